"""Patching the attention of timm's other families, torchvision's MaxViT and transformers' SAM: the same function."""

import copy
import importlib

import pytest
import torch
from _attention_models import (
    assert_compiles_as_one_graph,
    assert_same_function,
    change_op,
    gradients,
    noise,
    randomize,
    served,
    tensor,
)
from _timm_models import MODELS, MODULES, module_inputs, transformers_sam
from torch import nn

import accel
from accel.patches import class_path, timm, torchvision, transformers_vision
from accel.testing import assert_close


@pytest.fixture(autouse=True)
def softmax_in_float64(monkeypatch):
    """The eager classes of transformers ask for float32 there, which would hide what a double is compared for."""
    softmax = nn.functional.softmax

    def in_its_own_dtype(x, *args, dtype=None, **how):
        return softmax(x, *args, dtype=None if x.dtype == torch.float64 else dtype, **how)

    monkeypatch.setattr(nn.functional, "softmax", in_its_own_dtype)


def build(name):
    return randomize(MODULES[name][0]()), module_inputs(name)


# --- the same function ---


@pytest.mark.parametrize("name", MODULES)
def test_attention_computes_the_same(name):
    for fused in (True, False):
        module, inputs = build(name)
        for m in module.modules():
            if hasattr(m, "fused_attn"):
                m.fused_attn = fused
        assert_same_function(module, inputs, 1)


@pytest.mark.parametrize("name", MODELS)
def test_patched_model_computes_the_same(name):
    make, size, count = MODELS[name]
    assert_same_function(randomize(make()), [noise(2, 3, *size)], count)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("sam_hq", "SamHQVisionAttention"),
        ("deepseek_ocr2", "DeepseekOcr2SamVisionAttention"),
        ("deepseek_ocr2", "DeepseekOcr2SamVisionSdpaAttention"),
        ("unlimited_ocr", "UnlimitedOcrSamVisionAttention"),
        ("unlimited_ocr", "UnlimitedOcrSamVisionSdpaAttention"),
        ("got_ocr2", "GotOcr2VisionAttention"),
        ("pp_formulanet", "PPFormulaNetVisionAttention"),
        ("slanext", "SLANeXtVisionAttention"),
    ],
)
def test_copies_of_sam_compute_the_same(model, name):
    assert_same_function(randomize(transformers_sam(model, name)), [noise(2, 4, 3, 16)], 1)


@pytest.mark.parametrize("name", MODULES)
def test_fp32_within_the_tolerance_table(name):
    module, inputs = build(name)
    module.eval()
    expected, _ = gradients(module, inputs)
    module.float()
    report = accel.patch(module)
    out, _ = gradients(module, [x.float() for x in inputs])
    assert served(report) == [1]
    assert [row.backend for row in report.rows] == ["cpu"]
    assert_close(out, expected, "softmax", torch.float32, name)


@pytest.mark.parametrize("name", MODULES)
def test_autocast_keeps_the_dtype_and_the_precision(name):
    module, inputs = build(name)
    module.eval()
    exact, _ = gradients(module, inputs)
    module, inputs = module.float(), [x.float() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        reference, expected = gradients(module, inputs)
        report = accel.patch(module)
        out, found = gradients(module, inputs)
    assert served(report) == [1]
    assert out.dtype == reference.dtype
    assert {n: g.dtype for n, g in found.items()} == {n: g.dtype for n, g in expected.items()}
    scale = float(exact.abs().max())
    error, own = [float((x - exact).abs().max()) / scale for x in (out, reference)]
    assert error <= 2 * own + 2**-8, f"{error=} beside the class's {own}"


@pytest.mark.parametrize("name", ["RelPos, MLP and a class token", "MaxViT", "Twins, windows", "SAM"])
def test_a_copy_is_patched_and_stands_alone(name):
    module, inputs = build(name)
    accel.patch(module.eval())
    expected = module(*inputs)
    twin = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(*inputs), expected)
    assert [row.calls for row in accel.patch(twin).rows] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Twins, windows", "RelPos", "TinyViT", "SAM", "transformers SAM"])
def test_compiled_module_is_one_graph(name):
    assert_compiles_as_one_graph(*build(name))


@pytest.mark.parametrize("name", ["MaxViT", "TinyViT", "Twins, windows", "SAM", "torchvision MaxViT", "Hiera"])
def test_a_wrong_kernel_is_seen(name, monkeypatch):
    """The comparisons above can fail: a logit scale of another value is noticed."""
    module, inputs = build(name)
    report = accel.patch(module)
    change_op(monkeypatch, report, lambda op, *a, **how: op(*a, **{**how, "scale": 0.01}))
    assert report.verify(*inputs) > 1e-6


@pytest.mark.parametrize("library", [timm, torchvision, transformers_vision])
def test_every_class_of_the_table_is_there(library):
    """A target is text; a letter amiss in it would leave its class unserved and unseen."""
    for entry in library.ENTRIES:
        home, _, name = entry.target.rpartition(".")
        cls = getattr(importlib.import_module(home), name)
        assert class_path(cls) == entry.target
        assert hasattr(cls, entry.attribute)


# --- dropout of weights ---


DROP_NO_WEIGHTS = (
    *("TinyViT", "LeViT", "EfficientFormer", "MViTv2", "DaViT", "Hiera", "SAM 2", "SHViT", "LowFormer", "CPUBone"),
    *("torchvision", "transformers", "SegGPT"),
)


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith(DROP_NO_WEIGHTS)])
def test_weights_are_dropped_in_training_only(name, monkeypatch):
    module, inputs = build(name)
    attn = next(child for child in module.modules() if hasattr(child, "attn_drop"))
    report = accel.patch(module)
    attn.attn_drop.p = 0.5
    seen = []
    change_op(monkeypatch, report, lambda op, *a, **how: seen.append(how["dropout_p"]) or op(*a, **how))
    first, second = module.train()(*inputs), module(*inputs)
    module.eval()(*inputs)
    assert seen == [0.5, 0.5, 0.0]
    assert not torch.equal(first, second)
    attn.attn_drop.p = 1.0
    module.train()(*inputs)
    assert report.rows[0].fallbacks == {"attention dropout is 1.0, and a kernel takes less than 1": 1}


def test_swin_v2_cr_drops_weights_in_training_only():
    model = randomize(MODELS["SwinV2-CR"][0]())
    for block in [m for m in model.modules() if hasattr(m, "attn_drop")]:
        block.attn_drop.p = 0.5
    report, x = accel.patch(model), noise(2, 3, 26, 22)
    outs = []
    for _ in range(2):
        torch.manual_seed(7)
        outs.append(model.train()(x))
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], model(x))
    assert report.verify(x) < 1e-11


def test_transformers_sam_drops_weights_in_eager_only():
    outs = {}
    for implementation in ("eager", "sdpa"):
        transformers = pytest.importorskip("transformers")
        config = transformers.SamVisionConfig(
            hidden_size=16, num_attention_heads=2, image_size=16, patch_size=4, num_hidden_layers=1,
            attention_dropout=0.5, output_channels=8, mlp_dim=16, attn_implementation=implementation,
        )  # fmt: skip
        model, x = randomize(transformers.SamVisionModel(config)), noise(2, 3, 16, 16)
        report = accel.patch(model)
        outs[implementation] = [tensor(model.train()(x)) for _ in range(2)]
        assert report.verify(x) < 1e-11
        assert served(report) == [3]
    assert not torch.equal(*outs["eager"])
    assert torch.equal(*outs["sdpa"])


# --- calls and modules that are left to the class ---


def test_a_bias_that_is_not_plain_is_called():
    def hooked(rel_pos):
        rel_pos.register_forward_hook(lambda *a: None)

    def replaced(rel_pos):
        rel_pos.get_bias = lambda: torch.zeros(1, 2, 12, 12, dtype=torch.float64)

    for change, reason in (
        (hooked, "rel_pos carries hooks"),
        (replaced, "rel_pos has a get_bias of its own"),
    ):
        module, inputs = build("RelPos, MLP as in Swin v2")
        change(module.rel_pos)
        report = accel.patch(module, allow_none=True)
        assert [row.reason for row in report.skipped] == [reason]

    module, inputs = build("RelPos, MLP as in Swin v2")

    class Louder(type(module.rel_pos)):
        def get_bias(self):
            return 2 * super().get_bias()

    module.eval()
    report = accel.patch(module)
    module.rel_pos.__class__ = Louder
    found = module(*inputs)
    assert "Louder, not the plain timm.layers.pos_embed_rel.RelPosBias" in next(iter(report.rows[0].fallbacks))
    accel.unpatch(module)
    assert torch.equal(module(*inputs), found)


def test_hooks_on_what_makes_the_bias_run():
    module, inputs = build("RelPos, MLP as in Swin v2")
    seen = []
    module.rel_pos.mlp.register_forward_hook(lambda *a: seen.append(a[2].shape))
    accel.patch(module)
    module(*inputs)
    assert seen == [(7, 5, 2)]


def test_a_projection_of_another_class_is_not_bypassed():
    module, inputs = build("Twins, windows")
    nn.utils.parametrizations.weight_norm(module.module.qkv)
    report = accel.patch(module, allow_none=True)
    assert "not the plain torch.nn.modules.linear.Linear" in report.skipped[0].reason

    module, inputs = build("Hiera")
    nn.utils.parametrizations.weight_norm(module.qkv)
    module.proj.register_forward_hook(lambda m, args, out: 2 * out)
    expected = module(*inputs)
    report = accel.patch(module)
    torch.testing.assert_close(module(*inputs), expected, rtol=0, atol=1e-12)
    assert served(report) == [1]


@pytest.mark.parametrize("name", ["SAM", "transformers SAM"])
def test_a_map_too_large_beside_the_head(name):
    module, _ = build(name)
    x = noise(1, 2, 254, 16)
    expected = tensor(module(x))
    report = accel.patch(module)
    assert torch.equal(tensor(module(x)), expected)
    assert report.rows[0].fallbacks == {"a head of 8 channels has no room beside 2 rows and 254 columns in 256": 1}
    module(noise(1, 2, 40, 16))
    assert report.rows[0].calls == 1


def test_a_mask_on_a_map_is_the_classs_affair():
    for name in ("on a map", "many queries"):
        module, inputs = build(name)
        mask = noise(2, 1, 12, 12, seed=5)
        expected = module(*inputs, attn_mask=mask)
        report = accel.patch(module)
        torch.testing.assert_close(module(*inputs, attn_mask=mask), expected, rtol=0, atol=1e-12)
        assert report.rows[0].fallbacks == {"a mask is given, whose kind the class does not tell": 1}


def test_weights_of_transformers_sam():
    """The eager class returns its weights always; the model keeps them where they are asked for."""
    model, x = randomize(MODELS["transformers SAM"][0](attn_implementation="eager")), noise(2, 3, 24, 24)
    expected = model(x, output_attentions=True)
    report = accel.patch(model)
    model(x)
    assert [row.calls for row in report.rows] == [1, 1]
    found = model(x, output_attentions=True)
    assert len(found.attentions) == len(expected.attentions) == 2
    for a, b in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert [row.fallbacks for row in report.rows] == [{"attention weights are asked for": 1}] * 2
