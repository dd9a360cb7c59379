"""mmpose's gated attention unit and MossFormer's blocks, patched: outputs, every gradient, and what is left to the
class."""

import _gated_models as models
import pytest
import torch
from torch import nn

import accel
from accel.patches import mossformer
from accel.testing import assert_close


@pytest.fixture(autouse=True)
def mmpose(monkeypatch):
    models.mmpose_is_there(monkeypatch)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def built(cls, *args, **given):
    torch.manual_seed(0)
    layer = cls(*args, **given)
    for name, p in layer.named_parameters():
        last = name.rpartition(".")[2]
        if last in ("gamma", "g", "scale"):
            nn.init.uniform_(p, 0.5, 1.5)
        elif last in ("beta", "w", "a", "b"):
            nn.init.normal_(p)
        elif name == "uv.weight":
            p.data.mul_(1.5)  # logits of both signs
    return layer


def run(model, inputs, **given):
    """Output, the gradients of all inputs, and of all parameters."""
    model.zero_grad()
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = model(inputs[0] if len(inputs) == 1 else tuple(inputs), **given)
    (out * drawn(*out.shape, seed=9).to(out)).sum().backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.any() for p in learned)
    return [out.detach(), *[x.grad for x in inputs], *[p.grad.clone() for p in learned]]


def check_equal(model, inputs, **given):
    """In float64 by the reference, where rounding hides nothing, and in float32 by a kernel; then as it was."""
    plain = run(model, inputs, **given)
    with accel.patch(model) as report:
        served = run(model, inputs, **given)
        assert [(row.old_class, row.calls, row.fallbacks) for row in report.replaced] == [(type(model).__name__, 1, {})]
    for a, b in zip(run(model, inputs, **given), plain, strict=True):
        assert torch.equal(a, b)
    model.double()
    inputs = [x.double() for x in inputs]
    expected = run(model, inputs, **given)
    for a, b in zip(served, expected, strict=True):
        assert_close(a, b, "gau", torch.float32)
    with accel.patch(model) as report, accel.use(backend="reference"):
        got = run(model, inputs, **given)
        assert [(row.calls, row.fallbacks) for row in report.replaced] == [(1, {})]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# --- mmpose ---

BLOCKS = {
    "as in RTMPose": {"use_rel_bias": False},
    "biased": {},
    "fewer tokens": {"num_token": 30},
    "with all": {"pos_enc": True, "bias": True, "act_fn": nn.ReLU, "dropout_rate": 0.3, "out_dim": 24},
}


@pytest.mark.parametrize("given", BLOCKS.values(), ids=BLOCKS)
def test_mmpose_on_itself(given):
    block = built(models.RTMCCBlock, **{"num_token": 17, "dim": 32} | given).eval()
    check_equal(block, [drawn(3, 17, 32)])


@pytest.mark.parametrize("given", BLOCKS.values(), ids=BLOCKS)
def test_mmpose_across(given):
    block = built(models.RTMCCBlock, **{"num_token": 17, "dim": 32, "attn_type": "cross-attn"} | given).eval()
    check_equal(block, [drawn(3, 13, 32), drawn(3, 19, 32, seed=1), drawn(3, 19, 32, seed=2)])


def test_mmpose_left_to_the_class():
    block = built(models.RTMCCBlock, 17, 32)
    with accel.patch(block) as report:
        for x in (drawn(2, 18, 32), drawn(2, 1, 32)):
            with pytest.raises((RuntimeError, IndexError)) if x.shape[1] > 17 else accel.use():
                block(x)
        block.pos_enc = True
        del models.sys.modules[models.RTMCC].rope
        block(drawn(2, 17, 32))
    reasons = list(report.replaced[0].fallbacks)
    assert reasons[0] == "its input has 18 tokens, and its bias by distance takes 2 to 17"
    assert reasons[1] == "its input has 1 tokens, and its bias by distance takes 2 to 17"
    assert "has no rope" in reasons[2]
    cross = built(models.RTMCCBlock, 17, 32, attn_type="cross-attn")
    with accel.patch(cross) as report:
        cross(drawn(3, 2, 17, 32))  # unpacked along the first axis
        with pytest.raises(RuntimeError):
            cross((drawn(2, 5, 32), drawn(2, 7, 32), drawn(2, 6, 32)))
    assert list(report.replaced[0].fallbacks) == [
        "its input is a Tensor, which cross-attn does not take",
        "its inputs do not fit each other: (2, 5, 32), (2, 7, 32), (2, 6, 32)",
    ]
    for change, words in (
        ({"dropout": nn.AlphaDropout(0.5)}, "dropout is torch.nn.modules.dropout.AlphaDropout"),
        ({"attn_type": "axial"}, "attn_type is 'axial', not one of self-attn, cross-attn"),
    ):
        other = built(models.RTMCCBlock, 17, 32, dropout_rate=0.5)
        for name, value in change.items():
            setattr(other, name, value)
        with pytest.raises(ValueError, match=words):
            accel.patch(other)


def test_where_only_the_reference_computes_the_class_does(as_a_user_has_it):
    block = built(models.RTMCCBlock, 17, 32, attn_type="cross-attn").double()
    with accel.patch(block) as report:
        block(tuple(drawn(2, 17, 32, seed=i).double() for i in range(3)))
    assert "only the reference of gau_attention computes torch.float64" in str(report.replaced[0].fallbacks)


# --- MossFormer ---

MOSS = {
    "whole groups": {"tokens": 32},
    "a part of a group": {"tokens": 43, "group_size": 16, "rotary": 0},
    "less than a group": {"tokens": 7},
    "causal": {"tokens": 43, "causal": True},
    "padded": {"tokens": 43, "mask": True},
    "padded causal": {"tokens": 43, "mask": True, "causal": True},
}


@pytest.mark.parametrize("given", MOSS.values(), ids=MOSS)
@pytest.mark.parametrize("cls", [models.MossFormerBlock, models.FLASH_ShareA_FFConvM])
def test_mossformer(cls, given):
    given = {"group_size": 16, **given}
    tokens, mask = given.pop("tokens"), given.pop("mask", None)
    if mask:
        mask = torch.arange(tokens)[None] < torch.tensor([[tokens], [20]])
    layer = built(cls, 24, dropout=0.4, **given).eval()
    check_equal(layer, [drawn(2, tokens, 24)], mask=mask)


def test_every_copy_of_mossformer_is_known():
    for path in mossformer.SHARED:
        home, _, name = path.rpartition(".")
        cls = type(name, (models.FLASH_ShareA_FFConvM,), {"__module__": home})
        layer = built(cls, 24, group_size=16)
        expected, (v, u) = layer(drawn(2, 20, 24)), layer.uses(drawn(2, 20, 24))[4:]
        with accel.patch(layer) as report:
            assert_close(layer(drawn(2, 20, 24)), expected.double(), "gau", torch.float32)
            a, b = layer.cal_attention(drawn(2, 20, 24), *layer.uses(drawn(2, 20, 24)))
        assert (a.shape, b.shape) == (v.shape, u.shape)
        assert report.replaced[0].calls == 2


@pytest.mark.parametrize("causal", [False, True])
def test_mossformer_of_sequences_and_across_them(causal):
    layer = built(models.MossFormer, 8, query_key_dim=16, group_size=11, causal=causal, dropout=0.4).eval()
    check_equal(layer, [drawn(2, 5, 11, 8)])


def test_mossformer_left_to_the_class():
    layer, x = built(models.FLASH_ShareA_FFConvM, 24, group_size=16), drawn(2, 20, 24)
    uses = layer.uses(x)
    with accel.patch(layer) as report:
        with pytest.raises(RuntimeError):
            layer.cal_attention(x, uses[0][:, :5], *uses[1:])
        list(layer.cal_attention(x, *uses, mask=torch.ones(2, 20)))
        layer.dropout.register_forward_hook(lambda *_: None)
        layer(x)
        layer.dropout = nn.Dropout(1.0)
        layer(x)
    assert list(report.replaced[0].fallbacks) == [
        "not all is (B, T, channels): (2, 20, 24), (2, 5, 16), (2, 20, 16), (2, 20, 16), (2, 20, 16), (2, 20, 48), "
        "(2, 20, 48)",
        "mask is torch.float32 (2, 20), not boolean (B, T)",
        "dropout carries hooks",
        "attention dropout is 1.0, and a kernel takes less than 1",
    ]
    layer, x = built(models.MossFormer, 8, query_key_dim=8, causal=True), drawn(2, 5, 11, 8)
    with accel.patch(layer) as report:
        layer(x)
        layer.qk_offset_scale, layer.to_qk = models.OffsetScale(16, 4), nn.Linear(8, 16)
        layer(x)
    reasons = list(report.replaced[0].fallbacks)
    assert reasons[0].startswith("its values are of another size than its keys, [8, 16]")
    assert reasons[1] == "it is causal, and has 11 tokens where group_size is 256"


# --- both ---


def one_seen():
    """Layers, inputs and the axes they weigh along such that a query sees one key by a weight that may be dropped."""
    block = built(models.RTMCCBlock, 1, 32, dropout_rate=0.5, use_rel_bias=False)
    moss = built(models.FLASH_ShareA_FFConvM, 24, group_size=1, dropout=0.5)
    return [(block, drawn(200, 1, 32)), (moss, drawn(200, 1, 24))]


@pytest.mark.parametrize("which", [0, 1])
def test_dropout_drops_weights_and_scales_the_rest(which):
    """A single weight is 0 or twice itself: so is its part of what comes before the last projection."""
    layer, x = one_seen()[which]
    seen = []
    if which == 0:
        layer.o.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))

    def attended():
        if which == 1:
            return layer.cal_attention(x, *layer.uses(x))[0].detach()
        layer(x)
        return seen.pop()

    with accel.patch(layer, strict=True):
        layer.eval()
        whole = attended()
        without = 0.0
        if which == 1:
            layer.qk_offset_scale.gamma.data[0], layer.qk_offset_scale.beta.data[0] = 0.0, 0.0
            without = attended()  # the linear part, of which nothing is dropped
            layer.qk_offset_scale = built(models.FLASH_ShareA_FFConvM, 24, group_size=1).qk_offset_scale
        layer.train()
        found = attended()
    part = whole - without
    alive = part.abs().amax((1, 2)) > 1e-4
    dropped = (found - without).abs().amax((1, 2)) < 1e-6
    assert 0.3 < dropped[alive].double().mean() < 0.7
    expected = without + 2 * part * ~dropped[:, None, None]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


LAYERS = {
    "itself": (lambda: built(models.RTMCCBlock, 17, 32), [(3, 17, 32)]),
    "turned": (lambda: built(models.RTMCCBlock, 17, 32, pos_enc=True), [(3, 17, 32)]),
    "across": (lambda: built(models.RTMCCBlock, 17, 32, attn_type="cross-attn"), [(3, 13, 32), *[(3, 19, 32)] * 2]),
    "mossformer": (lambda: built(models.FLASH_ShareA_FFConvM, 24, group_size=16), [(2, 37, 24)]),
    "sequences": (lambda: built(models.MossFormer, 8, group_size=11), [(2, 5, 11, 8)]),
}


# mmpose's rotary embedding gives float32, which its class does not multiply with half values outside autocast.
HALF = [(name, autocast) for name in LAYERS for autocast in (True, False) if autocast or name != "turned"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "autocast"), HALF)
def test_half_is_as_the_class_has_it(name, autocast, dtype):
    """The dtypes of all results, and errors no larger than the class's."""
    make, shapes = LAYERS[name]
    layer, inputs = make(), [drawn(*shape, seed=i) for i, shape in enumerate(shapes)]
    if not autocast:
        layer, inputs = layer.to(dtype), [x.to(dtype) for x in inputs]
    with torch.autocast("cpu", dtype, enabled=autocast):
        theirs = run(layer, inputs)
        with accel.patch(layer) as report:
            ours = run(layer, inputs)
    assert [(row.calls, row.fallbacks) for row in report.replaced] == [(1, {})]
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]
    exact = run(layer.double(), [x.double() for x in inputs])

    def errors(found):
        """Of all together, and of each by itself; of a few numbers they are good or bad luck."""
        relative = [(x - e).flatten() / e.square().mean().sqrt() for x, e in zip(found, exact, strict=True)]
        return [x.square().mean().sqrt() for x in [torch.cat(relative), *relative] if x.numel() >= 32]

    (ours, *each), (theirs, *each_of_theirs) = errors(ours), errors(theirs)
    assert ours <= 1.2 * theirs
    assert all(a <= 2 * b for a, b in zip(each, each_of_theirs, strict=True)), (each, each_of_theirs)


@pytest.mark.parametrize(
    "name", [x if x in ("turned", "mossformer") else pytest.param(x, marks=pytest.mark.slow) for x in LAYERS]
)
def test_compiled(name):
    make, shapes = LAYERS[name]
    layer, inputs = make(), [drawn(*shape, seed=i) for i, shape in enumerate(shapes)]
    expected = run(layer, inputs)
    accel.patch(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for a, b in zip(run(compiled, inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
