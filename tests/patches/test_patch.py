"""Patching real architectures with random weights: equal outputs and gradients, nothing bypassed, copies."""

import logging

import pytest
import torch
from _copies import DUPLICATES
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("transformers")

import torchvision.models.swin_transformer as tv
from _swin_models import (
    BLOCKS,
    MODELS,
    build,
    config,
    gradients,
    image,
    randomize,
    swin,
    tensor,
    timm_v1,
    torchvision_v1,
)
from transformers.models.donut.modeling_donut_swin import DonutSwinConfig, DonutSwinModel

import accel
from accel.testing import assert_close

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


def test_fx_tracing_sees_the_class():
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
    assert reasons[1] == "its forward has been replaced by function: patch before that is done"
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


# --- copies ---


def accel_replacement():
    from accel.patch import Replacement

    return Replacement


@pytest.mark.parametrize("duplicate", DUPLICATES)
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
