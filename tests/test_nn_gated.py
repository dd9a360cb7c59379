"""The gated attention unit and FLASH as layers: their definition by hand, decoding, and flash-pytorch's parameters."""

import math

import pytest
import torch
import torch.nn.functional as F

import accel
from accel.nn import FLASH, GatedAttentionUnit, ScaleNorm
from accel.testing import assert_close

T5 = accel.T5Buckets(bidirectional=False)


def x_of(T, B=2, dim=24, seed=0):
    return torch.randn(B, T, dim, generator=torch.Generator().manual_seed(seed))


def awake(layer, seed=1):
    """The layer with scales of size 1, so that attention weighs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (layer.gamma, layer.beta, layer.table):
            if p is not None:
                p.copy_(torch.randn(p.shape, generator=generator))
    return layer.double()


def rotated(x, size):
    """Pairs of neighbours as complex numbers."""
    angle = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(0, size, 2).double() / size)
    turned = torch.view_as_complex(x[..., :size].unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([torch.view_as_real(turned).flatten(-2), x[..., size:]], -1)


def uses_of(layer, x):
    """Gate, value and each use of the base, from the layer's parameters, by hand."""
    h = F.layer_norm(x, x.shape[-1:], layer.norm.weight, layer.norm.bias)
    if layer.shift:
        half = h.shape[-1] // 2
        h = torch.cat([F.pad(h[..., :half], (0, 0, 1, 0))[:, :-1], h[..., half:]], -1)
    made = F.silu(F.linear(h, layer.to_hidden.weight, layer.to_hidden.bias))
    gate, value, base = made.split([layer.inner_dim, layer.inner_dim, layer.query_key_dim], -1)
    return gate, value, [rotated(base * g + b, layer.rotary) for g, b in zip(layer.gamma, layer.beta, strict=True)]


def bias_of(layer, n):
    if layer.table is None:
        return 0.0
    rows = layer.relative.rows_of(torch.arange(n)[:, None] - torch.arange(n)[None], layer.table.shape[0])
    return layer.table[:, 0][rows] * layer.table_scale


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.5, "length"])
def test_unit(scale, causal):
    layer = awake(GatedAttentionUnit(
        24, query_key_dim=8, causal=causal, scale=scale, relative=T5, table_scale=0.7, rotary=4, shift=True
    ))  # fmt: skip
    x = x_of(19).double()
    gate, value, (q, k) = uses_of(layer, x)
    factor = 8**-0.5 if scale is None else 1.0 if scale == "length" else scale
    logits = factor * q @ k.mT + bias_of(layer, 19)
    weights = (logits / (19 if scale == "length" else 1)).relu().square()
    mask = torch.rand(2, 19, generator=torch.Generator().manual_seed(2)) < 0.7
    for seen in (None, mask):
        w = weights if seen is None else weights * seen[:, None]
        w = w.tril() if causal else w
        torch.testing.assert_close(layer(x, key_mask=seen), layer.to_out(gate * (w @ value)) + x)


@pytest.mark.parametrize("causal", [False, True])
def test_flash(causal):
    layer = awake(FLASH(
        24, query_key_dim=8, chunk_size=8, causal=causal, norm="layer", relative=T5, rotary=8, shift=True
    ))  # fmt: skip
    x = x_of(21).double()
    gate, value, (quad_q, lin_q, quad_k, lin_k) = uses_of(layer, x)
    at = torch.arange(21)
    same = (at[:, None] // 8) == (at[None] // 8)
    weights = (quad_q @ quad_k.mT / 8 + bias_of(layer, 21)).relu().square() * same
    linear = lin_q @ lin_k.mT / (8 if causal else 21)
    if causal:
        weights, linear = weights.tril(), linear * ((at[:, None] // 8) > (at[None] // 8))
    torch.testing.assert_close(layer(x), layer.to_out(gate * ((weights + linear) @ value)) + x)


LAYERS = {
    "unit": lambda: GatedAttentionUnit(24, query_key_dim=8, causal=True, relative=T5, rotary=8, shift=True),
    "unit softmax": lambda: GatedAttentionUnit(24, query_key_dim=8, causal=True, activation="softmax_plus"),
    "flash": lambda: FLASH(24, query_key_dim=8, chunk_size=8, causal=True, relative=T5, rotary=4, shift=True),
    "flash of odd channels": lambda: FLASH(23, query_key_dim=8, chunk_size=5, causal=True, shift=True),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("lengths", [(1,) * 19, (5, 1, 1, 12), (19,), (8, 8, 3)])
def test_steps_are_the_whole(lengths, make):
    layer = awake(make())
    x = x_of(19, dim=layer.embed_dim).double()
    state, found = None, []
    for part in x.split(lengths, 1):
        out, state = layer.step(part, state)
        found.append(out)
    torch.testing.assert_close(torch.cat(found, 1), layer(x), rtol=1e-5, atol=1e-6)  # states are fp32


def test_a_step_of_flash_remembers_no_more_than_a_chunk():
    layer = FLASH(24, query_key_dim=8, chunk_size=8, causal=True)
    _, state = layer.step(x_of(37))
    assert state.v.shape[1] == 5
    assert state.position == 32
    assert state.total.shape == (2, 8, 48)


def test_initialisation_and_norms():
    torch.manual_seed(0)
    layer = GatedAttentionUnit(256, relative=T5)
    for p in (layer.to_hidden.weight, layer.to_out.weight, layer.gamma):
        assert 0.015 < p.std() < 0.025
    assert not layer.beta.any()
    x = x_of(3, dim=16)
    expected = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(ScaleNorm()(x), expected)


def test_bad_layers():
    for change, words in (
        ({"norm": "batch"}, r"'layer', 'scale' or None, got 'batch'"),
        ({"activation": "gelu"}, r"relu2.*got 'gelu'"),
        ({"rotary": 3}, r"rotary=3"),
        ({"dropout": 1.0}, r"dropout=1.0"),
        ({"query_key_dim": 0}, r"query_key_dim=0"),
    ):
        with pytest.raises(ValueError, match=words):
            FLASH(24, **change)
    with pytest.raises(ValueError, match="scale='tokens'"):
        GatedAttentionUnit(24, scale="tokens")
    with pytest.raises(ValueError, match=r"causal unit.*'length'|causal=False"):
        GatedAttentionUnit(24).step(x_of(1))
    with pytest.raises(ValueError, match=r"\(B, T, 24\), got .*\(2, 5, 16\)"):
        FLASH(24)(x_of(5, dim=16))
    with pytest.raises(TypeError, match=r"flash_pytorch's GAU, not torch.nn.*Linear"):
        GatedAttentionUnit.from_module(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("laplace", [False, True])
def test_parameters_of_flash_pytorch(laplace, causal):
    flash_pytorch = pytest.importorskip("flash_pytorch")
    torch.manual_seed(0)
    given = {"causal": causal, "laplace_attn_fn": laplace, "query_key_dim": 16}
    unit = flash_pytorch.GAU(dim=32, **given)
    whole = flash_pytorch.FLASHTransformer(dim=32, num_tokens=50, depth=1, group_size=16, **given)
    x = x_of(37, dim=32)
    mask = torch.arange(37)[None] < torch.tensor([[37], [21]])
    for theirs, kind in ((unit, GatedAttentionUnit), (whole.layers[0], FLASH)):
        for name, p in theirs.named_parameters():
            if "gamma" in name or "relative" in name:
                torch.nn.init.normal_(p)
        ours = kind.from_module(theirs)
        for given_mask in (None, mask):
            expected = theirs(x, mask=given_mask)
            assert (expected - x).abs().max() > 0.1 / math.sqrt(32)
            assert_close(ours(x, key_mask=given_mask), expected.double(), "gau", torch.float32)
