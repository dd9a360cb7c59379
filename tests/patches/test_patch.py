"""Patching real architectures with random weights: equal outputs and gradients, nothing bypassed, all of it undone."""

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("transformers")

import torchvision.models.swin_transformer as tv
import transformers
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from torchvision.models.video.swin_transformer import SwinTransformer3d
from transformers.models.clap.modeling_clap import ClapAudioConfig, ClapAudioEncoder
from transformers.models.donut.modeling_donut_swin import DonutSwinConfig, DonutSwinModel
from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinConfig, MaskFormerSwinModel

import accel
from accel.testing import assert_close

# Maps of 13 x 11 and 7 x 6: no multiple of any window here, and in the second stage smaller than the largest.
IMAGE = (26, 22)
SIZES = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}


def torchvision_v1(window=(4, 4), **options):
    return tv.SwinTransformer(
        [2, 2], 8, [2, 2], [2, 4], list(window), stochastic_depth_prob=0.0, num_classes=5, **options
    )


def torchvision_v2():
    return torchvision_v1(block=tv.SwinTransformerBlockV2, downsample_layer=tv.PatchMergingV2)


def torchvision_3d():
    return SwinTransformer3d([2, 2, 2], 8, [2, 2], [2, 4], [4, 3, 7], stochastic_depth_prob=0.0, num_classes=5)


def timm_v1(window=(4, 3), **options):
    options = {"img_size": IMAGE, "patch_size": 2, "window_size": window, "drop_path_rate": 0.0, **SIZES, **options}
    return TimmSwin(num_classes=5, **options)


def timm_v2(**options):
    return TimmSwinV2(
        img_size=IMAGE, patch_size=2, window_size=4, num_classes=5, drop_path_rate=0.0, **SIZES, **options
    )


def timm_v2_separate():
    model = timm_v2()
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
    return model


def config(cls, **options):
    options = {"window_size": 4, "image_size": IMAGE, "patch_size": 2, "drop_path_rate": 0.0, **SIZES, **options}
    return cls(**options)


def swin(**options):
    return transformers.SwinModel(config(transformers.SwinConfig, **options))


def swinv2():
    return transformers.Swinv2Model(config(transformers.Swinv2Config))


class Clap(nn.Module):
    """The audio encoder on a spectrogram of the size it is made for."""

    def __init__(self):
        super().__init__()
        self.encoder = ClapAudioEncoder(
            ClapAudioConfig(
                window_size=4, num_mel_bins=8, spec_size=32, patch_size=[4, 4], patch_stride=[4, 4], depths=[2, 2],
                num_attention_heads=[2, 4], patch_embeds_hidden_size=8, hidden_size=16, drop_path_rate=0.0,
                hidden_dropout_prob=0.0,
            )
        )  # fmt: skip

    def forward(self, x):
        return self.encoder(x).last_hidden_state


def image(dtype=torch.float64, size=IMAGE, channels=3):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


MODELS = {
    "torchvision v1": (torchvision_v1, image),
    "torchvision v2": (torchvision_v2, image),
    "torchvision 3d": (torchvision_3d, lambda: image(size=(6, 14, 18))),
    "timm v1": (timm_v1, image),
    "timm v1, window as large as the second map": (lambda: timm_v1((7, 6)), image),
    "timm v1, attention wider than the block": (lambda: timm_v1(head_dim=12), image),
    "timm v1, always partition": (lambda: timm_v1(8, always_partition=True), image),
    "timm v1, any size": (lambda: timm_v1(strict_img_size=False), lambda: image(size=(30, 18))),
    "timm v2": (timm_v2, image),
    "timm v2, separate bias": (timm_v2_separate, image),
    "timm v2, no bias": (lambda: timm_v2(qkv_bias=False), image),
    "Swin": (swin, image),
    "Swin, no bias": (lambda: swin(qkv_bias=False), image),
    "Swin, wide": (
        lambda: swin(embed_dim=192, depths=(2,), num_heads=(4,), image_size=(14, 10)),
        lambda: image(size=(14, 10)),
    ),
    "Swinv2": (swinv2, image),
    "Donut": (lambda: DonutSwinModel(config(DonutSwinConfig)), image),
    "MaskFormer": (lambda: MaskFormerSwinModel(config(MaskFormerSwinConfig)), image),
    "CLAP": (Clap, lambda: image(size=(120, 8), channels=1)),
    "Swin2SR": (
        lambda: transformers.Swin2SRModel(
            config(transformers.Swin2SRConfig, image_size=16, patch_size=1, embed_dim=8, num_channels=3)
        ),
        lambda: image(size=(16, 12)),
    ),
}
BLOCKS = {"Swin, wide": 2}


def randomize(model, dtype=torch.float64):
    """Every parameter away from its initial value: tables and biases that start at zero hide mistakes."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.2)
    return model.to(dtype)


def build(name):
    make, inputs = MODELS[name]
    return randomize(make()), inputs()


def tensor(output):
    if isinstance(output, torch.Tensor):
        return output
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state
    return output[0]


def gradients(model, x):
    model.zero_grad()
    out = tensor(model(x))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (out * weight.to(out.dtype)).sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# --- the same function ---


@pytest.mark.parametrize("name", MODELS)
def test_patched_model_computes_the_same(name):
    model, x = build(name)
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    reference, expected = gradients(model, x)
    report = accel.patch(model)
    assert len(report.replaced) == BLOCKS.get(name, 4)
    assert not report.skipped
    out, found = gradients(model, x)
    assert not report.uncalled()
    assert all(row.calls == 1 and not row.fallbacks and row.backend == "reference" for row in report.replaced)
    scale = float(reference.abs().max())
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-12 * max(scale, 1.0))
    assert list(found) == list(expected)
    for parameter, gradient in expected.items():
        error = float((found[parameter] - gradient).abs().max())
        assert error <= 1e-10 * max(float(gradient.abs().max()), 1e-2), f"{parameter}: {error}"
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == types
    assert report.verify(x) <= 1e-12 * max(scale, 1.0)

    assert len(accel.unpatch(model)) == len(report.replaced)
    again, _ = gradients(model, x)
    assert torch.equal(again, reference)


@pytest.mark.parametrize("name", ["torchvision v1", "torchvision v2", "timm v1", "Swin"])
def test_fp32_within_the_tolerance_table(name):
    model, x = build(name)
    expected = tensor(model.eval()(x)).detach()
    model.float()
    accel.patch(model)
    assert_close(tensor(model(x.float())), expected, "softmax", torch.float32, name)


def test_a_wrong_kernel_is_seen(monkeypatch):
    """The comparison above can fail: a mask of another value is noticed in every library."""
    for name in ("torchvision v1", "timm v1", "Swin", "Swinv2"):
        model, x = build(name)
        report = accel.patch(model)
        for row in report.replaced:
            attend = row.replacement.attend
            monkeypatch.setattr(
                row.replacement, "attend", lambda *a, _f=attend, **k: _f(*a, **{**k, "mask_value": 0.0})
            )
        assert report.verify(x) > 1e-6, name


def test_eager_attention_of_transformers():
    model, x = randomize(swin(attn_implementation="eager")).eval(), image()
    assert accel.patch(model).verify(x) < 1e-6  # its softmax is in float32 whatever the model


@pytest.mark.parametrize("name", ["timm v1", "timm v2"])
def test_attributes_are_read_at_the_time_of_the_call(name):
    model, x = build(name)
    report = accel.patch(model)
    model.set_input_size(img_size=(20, 28), window_size=(5, 3))
    x = image(size=(20, 28))
    assert report.verify(x) < 1e-12
    assert not any(row.fallbacks for row in report.rows)


def test_parameters_are_read_at_the_time_of_the_call():
    model, x = build("torchvision v1")
    report = accel.patch(model)
    before = model.eval()(x)
    attention = model.features[1][1].attn
    attention.qkv.weight = nn.Parameter(attention.qkv.weight.detach() * 2)
    attention.relative_position_bias_table.data.mul_(-1)
    assert not torch.equal(model(x), before)
    assert report.verify(x) < 1e-12


def test_dropout_is_applied_in_training_only():
    for make in (
        lambda: torchvision_v1(attention_dropout=0.5),
        lambda: timm_v1(attn_drop_rate=0.5),
        lambda: swin(attention_probs_dropout_prob=0.5),
        lambda: DonutSwinModel(config(DonutSwinConfig, attention_probs_dropout_prob=0.5)),
    ):
        model, x = randomize(make()), image()
        report = accel.patch(model)
        model.train()
        first, second = tensor(model(x)), tensor(model(x))
        assert not torch.equal(first, second)
        assert report.verify(x) < 1e-11
        assert model.training
        assert all(row.calls == 3 for row in report.replaced)


def test_dropout_of_one_is_left_to_the_class():
    model, x = randomize(torchvision_v1(attention_dropout=1.0)), image()
    report = accel.patch(model)
    model.train()(x)
    assert [sum(row.fallbacks.values()) for row in report.rows] == [1] * 4
    assert len(report.uncalled()) == 4


def test_gradient_checkpointing_still_recomputes():
    model, x = build("Swin")
    model.train()
    reference, expected = gradients(model, x)
    report = accel.patch(model)
    model.gradient_checkpointing_enable()
    out, found = gradients(model, x)
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)
    assert all(row.calls == 2 for row in report.rows)  # once in the forward, once when the stage is recomputed


# --- calls the kernel does not serve ---


@pytest.mark.parametrize("name", ["Swin", "Swinv2", "Donut"])
def test_asking_for_attention_weights_falls_back_for_that_call(name, caplog):
    model, x = build(name)
    model.eval()
    model.set_attn_implementation("eager")
    expected = model(x, output_attentions=True)
    report = accel.patch(model)
    with caplog.at_level(logging.WARNING, logger="accel"):
        found = model(x, output_attentions=True)
    assert len(found.attentions) == len(expected.attentions) == 2
    for a, b in zip(found.attentions, expected.attentions, strict=True):
        assert torch.equal(a, b)
    assert all(row.fallbacks == {"attention weights are asked for": 1} and row.calls == 0 for row in report.rows)
    assert sum("attention weights are asked for" in r.getMessage() for r in caplog.records) == len(report.rows)
    model(x)
    assert all(row.calls == 1 for row in report.rows)
    assert "1 calls not served: attention weights are asked for" in str(report)


def test_static_mask_of_another_size_falls_back():
    model, _ = build("timm v1")
    block = model.layers[0].blocks[1]
    report = accel.patch(block)
    x = torch.randn(1, 12, 12, 8, dtype=torch.float64)  # the mask is for 13 x 11 padded to 16 x 12
    with pytest.raises(RuntimeError, match="shape"):
        block(x)
    assert report.rows[0].fallbacks == {"its static mask was built for a map of another size": 1}


def test_fx_tracing_sees_the_class(recwarn):
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = build("torchvision v1")
    model.eval()
    expected = create_feature_extractor(model, ["features.1"])(x)["features.1"]
    accel.patch(model)
    assert torch.equal(create_feature_extractor(model, ["features.1"])(x)["features.1"], expected)


# --- children that must be called ---


class LoraLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def lora(block):
    wrapped = LoraLinear(block.attn.qkv.in_features, block.attn.qkv.out_features).double()
    wrapped.load_state_dict(block.attn.qkv.state_dict())
    block.attn.qkv = wrapped


def forward_hook(block):
    block.attn.qkv.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook(block):
    block.attn.proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def backward_hook(block):
    block.attn.qkv.register_full_backward_hook(lambda module, grad_input, grad_output: None)


def parametrization(block):
    nn.utils.parametrizations.weight_norm(block.attn.qkv)


def old_weight_norm(block):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(block.attn.proj)


def own_forward(block):
    block.attn.qkv.forward = lambda x, old=block.attn.qkv.forward: old(x) + 1


WRAPPERS = {
    lora: "LoraLinear",
    forward_hook: "hooks",
    pre_hook: "hooks",
    backward_hook: "hooks",
    parametrization: "Parametrized",
    old_weight_norm: "hooks",
    own_forward: "forward of its own",
}


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("library", ["timm v1", "torchvision v1"])
def test_wrapped_child_is_not_bypassed(wrap, library):
    model, x = build(library)
    block = model.layers[0].blocks[1] if library == "timm v1" else model.features[1][1]
    wrap(block)
    model.eval()
    expected = model(x)
    report = accel.patch(model)
    assert [WRAPPERS[wrap] in row.reason for row in report.skipped] == [True]
    assert len(report.replaced) == 3
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    accel.unpatch(model)
    with pytest.raises(ValueError, match=WRAPPERS[wrap]):
        accel.patch(model, strict=True)
    assert not any(isinstance(v, accel_replacement()) for m in model.modules() for v in vars(m).values())


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda f: f.__name__)
def test_child_wrapped_after_patching_is_not_bypassed(wrap):
    model, x = build("timm v1")
    model.eval()
    report = accel.patch(model)
    wrap(model.layers[0].blocks[1])
    model(x)
    counts = [(row.calls, sum(row.fallbacks.values())) for row in report.rows]
    assert counts == [(1, 0), (0, 1), (1, 0), (1, 0)]
    assert report.verify(x) < 1e-12


def test_hooked_transformers_projection_and_foreign_attention_are_skipped():
    model, x = build("Swin")
    model.eval()
    seen = []
    model.encoder.layers[0].blocks[0].attention.k_proj.register_forward_hook(lambda *a: seen.append(1))
    model.encoder.layers[0].blocks[1].layernorm_before.register_forward_hook(lambda *a: seen.append(2))
    report = accel.patch(model)
    assert [row.reason for row in report.skipped] == ["k_proj carries hooks"]
    model(x)
    assert sorted(seen) == [1, 2]  # the norm is called as a module, so its hook runs beside the kernel
    model.config._attn_implementation = "flash_attention_2"
    accel.unpatch(model)
    with pytest.raises(ValueError, match="flash_attention_2"):
        accel.patch(model)


class Subclass(tv.ShiftedWindowAttention):
    def forward(self, x):
        return super().forward(x) * 2


def test_subclass_and_foreign_forward_are_skipped():
    model, x = build("torchvision v1")
    model.features[1][0].attn.__class__ = Subclass
    attention = model.features[1][1].attn
    attention.forward = lambda x, old=attention.forward: old(x) + 1
    expected = model(x)
    report = accel.patch(model)
    reasons = [row.reason for row in report.skipped]
    assert "subclass of torchvision.models.swin_transformer.ShiftedWindowAttention" in reasons[0]
    assert reasons[1] == "its forward has been replaced by function"
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


# --- copies ---


def accel_replacement():
    from accel.patch import Replacement

    return Replacement


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("name", ["torchvision v2", "timm v1", "Swin"])
def test_a_copy_is_patched_and_stands_alone(name, duplicate):
    model, x = build(name)
    model.eval()
    report = accel.patch(model)
    expected = tensor(model(x))
    twin = duplicate(model)
    assert torch.equal(tensor(twin(x)), expected)
    rows = accel.patch(twin).rows
    assert [row.status for row in rows] == ["already patched"] * 4
    assert [row.calls for row in rows] == [2] * 4
    assert [row.calls for row in report.rows] == [1] * 4  # the copy counts for itself
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(tensor(twin(x)), expected)
    for mine, other in zip(rows, report.rows, strict=True):
        assert mine.replacement.module is twin.get_submodule(mine.name)
        assert other.replacement.module is model.get_submodule(other.name)
    accel.unpatch(twin)
    assert all(row.active for row in report.rows)


def test_state_dict_goes_to_and_from_an_unpatched_model():
    model, x = build("torchvision v1")
    accel.patch(model)
    plain, _ = build("torchvision v1")
    for parameter in plain.parameters():
        parameter.data.zero_()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain.eval()(x), model.eval()(x), rtol=0, atol=1e-12)


# --- patching and taking back ---


def test_a_second_model_is_untouched():
    first, x = build("torchvision v1")
    second, _ = build("torchvision v1")
    expected = second.eval()(x)
    forward = tv.ShiftedWindowAttention.forward
    report = accel.patch(first)
    assert torch.equal(second(x), expected)
    assert tv.ShiftedWindowAttention.forward is forward
    assert len(report.uncalled()) == 4
    with pytest.raises(ValueError, match="nothing is patched in"):
        accel.patch(second, dry_run=True).verify(x)


def test_unpatch_restores_the_same_methods():
    model, _ = build("timm v1")
    before = [(vars(m).copy(), m.forward.__func__) for m in model.modules()]
    accel.patch(model)
    assert accel.unpatch(model) == [f"layers.{i}.blocks.{j}" for i in range(2) for j in range(2)]
    for module, (attributes, forward) in zip(model.modules(), before, strict=True):
        assert vars(module) == attributes
        assert module.forward.__func__ is forward
    assert accel.unpatch(model) == []


def test_patching_twice_changes_nothing_more():
    model, x = build("torchvision v1")
    first = accel.patch(model)
    second = accel.patch(model)
    assert [row.status for row in second.rows] == ["already patched"] * 4
    assert [a.replacement is b.replacement for a, b in zip(first.rows, second.rows, strict=True)] == [True] * 4
    model(x)
    assert [row.calls for row in second.rows] == [1] * 4
    assert "4 already patched" in str(second)


def test_context_manager_takes_back_what_it_put_in():
    model, x = build("torchvision v1")
    outer = accel.patch(model.features[1])
    report = accel.patch(model)
    assert [row.status for row in report.rows] == ["already patched"] * 2 + ["replaced"] * 2
    with pytest.raises(RuntimeError, match="3 channels"), report:
        model(x[:, :2])  # an error inside the block: the patch is taken back all the same
    assert [row.active for row in report.rows] == [True, True, False, False]
    assert all(row.active for row in outer.rows)
    with accel.patch(model) as report:
        model(x)
        assert not report.uncalled()
        accel.unpatch(model)
    assert not any(row.active for row in report.rows)


def test_leaving_the_block_refuses_when_something_covers_the_patch():
    model, _ = build("torchvision v1")
    attention = model.features[1][1].attn
    report = accel.patch(model)
    attention.forward = lambda x, old=attention.forward: old(x)
    with pytest.raises(RuntimeError, match=r"features\.1\.1\.attn\.forward"), report:
        pass


def test_dry_run_changes_nothing():
    model, _ = build("torchvision v1")
    before = [vars(m).copy() for m in model.modules()]
    report = accel.patch(model, dry_run=True)
    assert [row.status for row in report.replaced] == ["would be replaced"] * 4
    assert report.uncalled() == []
    assert [vars(m) for m in model.modules()] == before
    assert accel.patch(nn.Linear(2, 2), dry_run=True).rows == []


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("features.1", ["features.3.0.attn", "features.3.1.attn"]),
        (["*.1.attn"], ["features.1.0.attn", "features.3.0.attn"]),
        ([tv.PatchMerging, "features.[13].0"], ["features.1.1.attn", "features.3.1.attn"]),
    ],
)
def test_skip_leaves_modules_and_what_they_contain(skip, left):
    model, _ = build("torchvision v1")
    report = accel.patch(model, skip=skip, strict=True)
    assert [row.name for row in report.replaced] == left
    assert {row.reason for row in report.skipped} == {"named in skip"}
    with pytest.raises(ValueError, match="named in skip"):
        accel.patch(build("torchvision v1")[0], skip=tv.SwinTransformerBlock)


def test_nothing_to_replace_raises_with_what_came_nearest():
    with pytest.raises(ValueError, match=r"looked for .*SwinLayer.*nearest classes.*none comes near"):
        accel.patch(nn.Sequential(nn.Linear(2, 2)))

    class SwinTransformerBlok(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"nearest classes in the model: .*SwinTransformerBlok"):
        accel.patch(nn.Sequential(SwinTransformerBlok()))
    report = accel.patch(nn.Linear(2, 2), allow_none=True)
    assert report.rows == []
    assert str(report).startswith("Linear: ")


def test_ops_and_recipes_choose():
    model, _ = build("torchvision v1")
    assert len(accel.patch(model, ops="window_attention").replaced) == 4
    assert len(accel.patch(model, ops=["window_attention"], recipe=None).replaced) == 4
    assert len(accel.patch(model, recipe="exact").replaced) == 4
    known = ("deform_conv2d", "ms_deform_attn", "softmax_attention", "window_attention")
    with pytest.raises(ValueError, match="no op is switched on"):
        accel.patch(model, recipe=dict.fromkeys(known, False))
    with pytest.raises(ValueError, match=r"looked for .*attention that goes through transformers' registry"):
        accel.patch(model, recipe={"window_attention": False})
    with pytest.raises(ValueError, match="known: " + ", ".join(known)):
        accel.patch(model, ops=["softmax"])
    with pytest.raises(ValueError, match="unknown recipe 'fast'"):
        accel.patch(model, recipe="fast")
    with pytest.raises(ValueError, match="not both"):
        accel.patch(model, ops=["window_attention"], recipe="exact")


def test_what_changes_numerics_is_taken_only_when_named(monkeypatch):
    import dataclasses

    from accel.patches import TABLE

    target = "torchvision.models.swin_transformer.ShiftedWindowAttention"
    monkeypatch.setitem(TABLE, target, dataclasses.replace(TABLE[target], op="rounded", same_function=False))
    model, _ = build("torchvision v1")
    assert accel.patch(model, allow_none=True).rows == []
    assert len(accel.patch(model, ops="rounded", dry_run=True).replaced) == 4
    assert len(accel.patch(model, recipe={"rounded": True}, dry_run=True).replaced) == 4


def test_report_prints_a_table():
    model, x = build("torchvision v1")
    model.features[1][0].attn.qkv.register_forward_hook(lambda *a: None)
    report = accel.patch(model)
    with torch.no_grad():
        model(x)
    lines = str(report).splitlines()
    assert lines[0] == "SwinTransformer: 3 replaced, 1 skipped"
    assert lines[1].split() == ["module", "class", "op", "backend", "calls", "note"]
    assert lines[2].split(maxsplit=5)[5] == "skipped: qkv carries hooks"
    assert lines[3].split() == ["features.1.1.attn", "ShiftedWindowAttention", "window_attention", "reference", "1"]


def test_the_backend_shown_is_the_one_that_ran():
    model, x = build("torchvision v1")
    report = accel.patch(model.float())
    assert [row.backend for row in report.rows] == [None] * 4
    with accel.use(backend="reference"):
        model(x.float())
    assert [row.backend for row in report.rows] == ["reference"] * 4
    model(x.float())
    first = accel.explain(accel.window_attention, torch.zeros(1, 4, 4, 24), num_heads=2, window_size=(4, 4))
    chosen = next(line for line in first.splitlines() if line.startswith(" -> "))
    assert all(chosen.startswith(f" -> {row.backend}:") for row in report.rows)


def test_verify_sees_a_difference_and_nan():
    model, x = build("torchvision v1")
    report = accel.patch(model)
    row = report.rows[0]
    attend = row.replacement.attend
    row.replacement.attend = lambda *a, **k: attend(*a, **k) + 1
    assert report.verify(x) > 1e-3
    row.replacement.attend = lambda *a, **k: attend(*a, **k) * float("nan")
    assert report.verify(x) == float("inf")
    assert row.active


def test_compiled_model_is_one_graph_and_counts_as_called():
    model, x = build("Swin, wide")
    model.train()
    reference, expected = gradients(model, x)
    report = accel.patch(model)
    model.compile(fullgraph=True, backend="aot_eager")
    out, found = gradients(model, x)
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-11)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-10)
    assert not report.uncalled()
    assert all(row.calls == 0 and row.replacement.compiled for row in report.rows)
    assert str(report).count("compiled") == 2
    accel.unpatch(model)  # compiled code must not outlive the patch
    again, _ = gradients(model, x)
    torch.testing.assert_close(again, reference, rtol=0, atol=1e-11)
    assert not any(row.active for row in report.rows)


@pytest.mark.parametrize(
    ("name", "path", "arguments"),
    [
        ("torchvision v1", "features.1.1", ()),
        ("timm v1", "layers.0.blocks.1", ()),
        ("timm v2", "layers.0.blocks.1", ()),
        ("Swinv2", "encoder.layers.0.blocks.1", ((13, 11),)),
        ("Donut", "encoder.layers.0.blocks.1", ((13, 11),)),
    ],
)
def test_compiled_block_is_one_graph(name, path, arguments):
    block = build(name)[0].get_submodule(path)
    x = torch.randn(2, 13, 11, 8, dtype=torch.float64)
    x = (x.flatten(1, 2) if arguments else x).requires_grad_()
    expected = tensor(block(x, *arguments))
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    report = accel.patch(block)
    out = tensor(torch.compile(block, fullgraph=True, backend="aot_eager")(x, *arguments))
    (found,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(found, gradient, rtol=0, atol=1e-10)
    assert not report.uncalled()
