"""Patching attention of torch.nn, timm, torchvision and diffusers: the same function, counted calls, all undone."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from _attention_models import (
    MODELS,
    VIT,
    assert_compiles_as_one_graph,
    assert_same_function,
    build,
    change_op,
    encoder,
    gradients,
    image,
    noise,
    padding,
    randomize,
    served,
    tensor,
    unet,
)
from timm.layers.attention import Attention as TimmAttention
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

import accel
from accel.testing import assert_close

# torch's own notes on when it does not take its fast paths, and that nested tensors are a prototype
pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

# A library that was built before its kernel for this op was written takes the reference.
BACKEND = None if hasattr(torch.ops.accel_native, "softmax_attention_forward") else "reference"


# --- the same function ---


@pytest.mark.parametrize("name", MODELS)
def test_patched_model_computes_the_same(name):
    assert_same_function(*build(name))


@pytest.mark.parametrize(
    "name", ["torch encoder", "torch transformer", "timm ViT", "timm BEiT", "timm EVA", "diffusers block"]
)
def test_fp32_within_the_tolerance_table(name):
    model, inputs, _ = build(name)
    expected, _ = gradients(model, inputs)
    model.float()
    report = accel.patch(model)
    with accel.use(backend=BACKEND):
        out, _ = gradients(model, [x.float() if x.is_floating_point() else x for x in inputs])
    assert set(served(report)) == {1}
    assert_close(out, expected, "softmax", torch.float32, name)


@pytest.mark.parametrize("name", ["torch encoder", "timm ViT", "timm BEiT", "diffusers block"])
def test_a_wrong_kernel_is_seen(name, monkeypatch):
    """The comparison above can fail: a logit scale of another value is noticed in every library."""
    model, inputs, _ = build(name)
    report = accel.patch(model)
    change_op(monkeypatch, report, lambda op, *a, **how: op(*a, **{**how, "scale": 0.01}))
    assert report.verify(*inputs) > 1e-6


@pytest.mark.parametrize("name", ["torch encoder", "timm ViT", "timm BEiT", "diffusers block"])
def test_a_copy_is_patched_and_stands_alone(name):
    model, inputs, count = build(name)
    model.eval()
    report = accel.patch(model)
    expected = tensor(model(*inputs))
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(tensor(twin(*inputs)), expected)
    assert served(report) == [1] * count
    assert [row.calls for row in accel.patch(twin).rows] == [2] * count


COMPILED = {
    "torch encoder layer": lambda: encoder().layers[0],
    "timm BEiT": lambda: Beit(**VIT, use_rel_pos_bias=True).blocks[0].attn,
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_module_is_one_graph(name):
    assert_compiles_as_one_graph(randomize(COMPILED[name]()), (noise(2, 17, 32),))


# --- torch.nn ---

DROPS_ALL = "attention dropout is 1.0, and a kernel takes less than 1"
CAUSAL = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
PADDED = padding(9, 6, longest=9)
MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": PADDED},
    "padding on the left": {"src_key_padding_mask": PADDED.flip(1)},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "boolean": {"mask": CAUSAL.isinf()},
    "causal and padding": {"mask": CAUSAL.isinf(), "is_causal": True, "src_key_padding_mask": PADDED},
    "floating": {"mask": noise(9, 9, seed=5)},
    "a mask for every head": {"mask": noise(4, 9, 9, seed=5)},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("training", [True, False])
def test_masks_of_the_encoder(masks, training):
    """In eval mode under no_grad torch takes its fast paths, with nested tensors where the padding is on the right."""
    model, x = randomize(encoder()).train(training), noise(2, 9, 32)
    floating = masks in ("floating", "a mask for every head")
    with torch.set_grad_enabled(training or floating):  # the fast path takes any number but 0 in a mask for "hidden"
        expected = model(x, **MASKS[masks]).detach()
    with torch.set_grad_enabled(training):
        report = accel.patch(model)
        found = model(x, **MASKS[masks])
    assert served(report) == [1] * 4
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_nested_tensors_are_packed(monkeypatch):
    """Padding that the encoder takes out stays out: the op sees the packed tokens and the outputs are padded with 0."""
    model, x = randomize(encoder()).eval(), noise(2, 9, 32)
    report = accel.patch(model)
    shapes = []
    change_op(monkeypatch, report, lambda op, q, *a, **how: shapes.append(tuple(q.shape)) or op(q, *a, **how))
    with torch.no_grad():
        out = model(x, src_key_padding_mask=PADDED)
    assert shapes == [(1, 2, 15, 16)] * 2
    assert bool((out[1, 6:] == 0).all())


def test_an_encoder_layer_on_a_nested_tensor_of_the_caller():
    layer = randomize(nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)).eval()
    x = torch.nested.nested_tensor([noise(5, 32), noise(3, 32, seed=1)])
    with torch.no_grad():
        expected = layer(x)
        report = accel.patch(layer)
        found = layer(x)
    assert found.is_nested
    assert served(report) == [1, 1]
    for a, b in zip(found.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_asking_for_attention_weights_falls_back_for_that_call():
    model, inputs, _ = build("DETR decoder")
    expected = model(*inputs, need_weights=True)
    report = accel.patch(model)
    assert torch.equal(
        report.rows[1].replacement.module(*[inputs[0]] * 3)[1], model.multihead_attn(*[inputs[0]] * 3)[1]
    )
    torch.testing.assert_close(model(*inputs, need_weights=True), expected, rtol=0, atol=1e-12)
    assert [row.calls for row in report.rows] == [1, 0]
    assert report.rows[1].fallbacks == {"attention weights are asked for": 3}
    model(*inputs)
    assert [row.calls for row in report.rows] == [2, 1]


def test_attention_with_every_option():
    attn = nn.MultiheadAttention(32, 2, kdim=20, vdim=12, add_bias_kv=True, add_zero_attn=True, batch_first=True)
    randomize(attn)
    inputs = (noise(2, 5, 32), noise(2, 7, 20, seed=1), noise(2, 7, 12, seed=2))
    masks = {"attn_mask": noise(4, 5, 7, seed=3) > 1, "key_padding_mask": padding(7, 4, longest=7)}
    for given in ({}, masks, {n: -3 * m.double() for n, m in masks.items()}):
        expected = attn(*inputs, need_weights=False, **given)[0]
        with accel.patch(attn) as report:
            found, weights = attn(*inputs, need_weights=False, **given)
        assert weights is None
        assert served(report) == [1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_dropout_of_weights_is_applied_in_training_only():
    for model, inputs in (
        (encoder(dropout=0.5), (noise(2, 9, 32),)),
        (nn.MultiheadAttention(32, 2, dropout=0.5), (noise(9, 2, 32),) * 3 + (None, False)),
        (VisionTransformer(**VIT, attn_drop_rate=0.5), (image(),)),
        (Beit(**VIT, use_rel_pos_bias=True, attn_drop_rate=0.5), (image(),)),
        (Eva(**VIT, attn_drop_rate=0.5), (image(),)),
    ):
        randomize(model)
        report = accel.patch(model)
        model.train()
        assert not torch.equal(tensor(model(*inputs)), tensor(model(*inputs)))
        assert report.verify(*inputs) < 1e-11
        assert set(served(report)) == {3}


def test_dropout_of_one_is_left_to_the_class():
    for make in (VisionTransformer, Beit, Eva):
        report = accel.patch(make(**VIT, attn_drop_rate=1.0))
        report.model.train()(image().float())
        assert not any(row.calls for row in report.rows)
        assert {reason for row in report.rows for reason in row.fallbacks} == {DROPS_ALL}
    layer = nn.TransformerEncoderLayer(32, 2, 48, dropout=1.0)
    report = accel.patch(layer)
    layer(noise(9, 2, 32).float())
    assert [row.fallbacks for row in report.rows] == [{DROPS_ALL: 1}] * 2


def test_an_encoder_layer_follows_its_attention():
    """With its attention left out, or something else in its place, nothing is left to gain in the layer."""
    model, x = randomize(encoder()).eval(), noise(2, 9, 32)
    expected = model(x)
    report = accel.patch(model, skip="layers.0.self_attn")
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert report.rows[0].fallbacks == {"self_attn is not patched": 1}
    accel.unpatch(model)

    class Louder(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return 2 * out, weights

    model.layers[1].self_attn.__class__ = Louder
    expected = model(x)
    report = accel.patch(model)
    reasons = {row.name: row.reason for row in report.skipped}
    assert "Louder, not the plain torch.nn" in reasons["layers.1"]
    assert "subclass of torch.nn" in reasons["layers.1.self_attn"]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_hooks_in_an_encoder_layer_run():
    model, x = randomize(encoder()).eval(), noise(2, 9, 32)
    accel.patch(model)
    seen = []
    for name in ("self_attn", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2"):
        getattr(model.layers[0], name).register_forward_hook(lambda *a, name=name: seen.append(name))
    with torch.no_grad():
        model(x)
    assert seen == ["self_attn", "dropout1", "norm1", "linear1", "dropout", "linear2", "dropout2", "norm2"]


def test_a_causal_hint_without_a_mask_is_the_classs_affair():
    layer = randomize(nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)).eval()
    x = noise(2, 9, 32)
    with torch.no_grad():
        expected = layer(x, is_causal=True)  # whose fast path pays it no heed
        report = accel.patch(layer)
        assert torch.equal(layer(x, is_causal=True), expected)
    assert report.rows[0].fallbacks == {"is_causal is a hint about a mask, and no mask is given": 1}
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        layer.self_attn(x, x, x, need_weights=False, is_causal=True)


# --- timm ---


@pytest.mark.parametrize("fused", [True, False])
def test_masks_of_timms_attention(fused):
    attn = randomize(TimmAttention(32, 2, qk_norm=True, gated=True, norm_layer=nn.LayerNorm))
    attn.fused_attn = fused
    x = noise(2, 9, 32)
    visible = ~PADDED[:, None, None, :]
    calls = [{"attn_mask": visible}, {"attn_mask": noise(2, 1, 9, 9, seed=2)}, {"is_causal": True}]
    expected = [attn(x, **given) for given in calls]
    report = accel.patch(attn)
    for given, e in zip(calls, expected, strict=True):
        torch.testing.assert_close(attn(x, **given), e, rtol=0, atol=1e-12)
    assert served(report) == [3]


def test_grouped_heads_of_timms_rope_attention():
    from timm.layers.attention import AttentionRope

    attn = randomize(AttentionRope(32, 4, qkv_fused=False, num_kv_heads=2, num_prefix_tokens=1))
    x, rope = noise(2, 9, 32), noise(8, 16, seed=4)
    expected = attn(x, rope=rope)
    report = accel.patch(attn)
    torch.testing.assert_close(attn(x, rope=rope), expected, rtol=0, atol=1e-12)
    assert served(report) == [1]


def test_a_beit_of_another_size():
    """The window is read at the time of the call; the bias beside the projection is the same sum as in it."""
    model = randomize(Beit(**VIT, use_abs_pos_emb=False, use_rel_pos_bias=True))
    report = accel.patch(model)
    model.set_input_size((24, 16))
    for block in model.blocks:
        nn.init.normal_(block.attn.relative_position_bias_table)
        block.attn.qkv_bias_separate = True
    assert report.verify(noise(2, 3, 24, 16)) < 1e-11
    assert served(report) == [1, 1]


def test_wrapped_children_are_called():
    model, inputs, _ = build("timm ViT")
    model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: output * 2)
    nn.utils.parametrizations.weight_norm(model.blocks[0].attn.proj)
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda *a: None)
    expected = model(*inputs)
    report = accel.patch(model)
    assert [row.reason for row in report.rows] == ["", "attn_drop carries hooks"]
    torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=1e-12)
    assert served(report) == [1, 0]


# --- diffusers ---


def test_a_processor_that_is_not_the_default_is_left_alone():
    processors = pytest.importorskip("diffusers.models.attention_processor")
    model = randomize(unet())
    inputs = MODELS["diffusers UNet"][1]()
    names = list(model.attn_processors)
    model.set_attn_processor({n: processors.AttnProcessor() if i else processors.AttnProcessor2_0()
                              for i, n in enumerate(names)})  # fmt: skip
    report = accel.patch(model)
    assert len(report.replaced) == 1
    assert {r.reason for r in report.skipped} == {
        "its processor is diffusers.models.attention_processor.AttnProcessor, "
        "not diffusers.models.attention_processor.AttnProcessor2_0"
    }
    expected = tensor(model(*inputs))
    model.set_attn_processor(processors.AttnProcessor())
    torch.testing.assert_close(tensor(model(*inputs)), expected, rtol=0, atol=1e-10)
    assert [sum(row.fallbacks.values()) for row in report.replaced] == [1]


def test_what_a_processor_is_handed_besides():
    pytest.importorskip("diffusers")
    model, inputs, _ = build("diffusers VAE attention")
    expected = model.attn(*inputs, scale=1.0)
    report = accel.patch(model)
    assert torch.equal(model.attn(*inputs, scale=1.0), expected)
    assert report.rows[0].fallbacks == {"its processor is handed scale": 1}
