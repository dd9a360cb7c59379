"""The gated attention unit and FLASH as layers: their definition by hand, decoding, and other libraries' parameters."""

import math

import _gated_models as models
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
    """The layer with scales of size 1 and logits of both signs, so that attention weighs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (layer.gamma, layer.beta, layer.table, layer.residual_scale):
            if p is not None:
                p.copy_(torch.randn(p.shape, generator=generator))
        size = layer.to_hidden.weight.shape
        layer.to_hidden.weight.copy_(torch.randn(size, generator=generator) * 2 / size[1] ** 0.5)
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
    distance = torch.arange(n)[:, None] - torch.arange(n)[None]
    rows = layer.table.shape[0]
    rows = distance + rows // 2 if layer.relative == "toeplitz" else layer.relative.rows_of(distance, rows)
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
@pytest.mark.parametrize("tokens", [19, 23])
def test_unit_with_a_row_per_distance_and_a_scaled_residual(tokens, causal):
    layer = awake(GatedAttentionUnit(
        24, query_key_dim=8, causal=causal, relative="toeplitz", rows=45, table_scale=0.7, residual="scaled"
    ))  # fmt: skip
    x = x_of(tokens).double()
    gate, value, (q, k) = uses_of(layer, x)
    w = (q @ k.mT * 8**-0.5 + bias_of(layer, tokens)).relu().square()
    w = w.tril() if causal else w
    torch.testing.assert_close(layer(x), layer.to_out(gate * (w @ value)) + x * layer.residual_scale)
    with pytest.raises(ValueError, match="45 rows serves up to 23 tokens, got 24"):
        layer(x_of(24).double())


@pytest.mark.parametrize("causal", [False, True])
def test_unit_that_averages(causal):
    layer = awake(GatedAttentionUnit(24, query_key_dim=8, causal=causal, average=True, residual=False))
    x = x_of(19).double()
    gate, value, (q, k) = uses_of(layer, x)
    mask = torch.rand(2, 19, generator=torch.Generator().manual_seed(2)) < 0.7
    mask[1, :3] = False
    for seen in (None, mask):
        live = torch.ones(2, 19, 19) if seen is None else seen[:, None].expand(2, 19, 19).double()
        live = live.tril() if causal else live
        logits = q @ k.mT * 8**-0.5
        assert 0.2 < (logits > 0).double().mean() < 0.8
        w = logits.relu().square() * live / live.sum(-1, keepdim=True).clamp_min(1)
        torch.testing.assert_close(layer(x, key_mask=seen), layer.to_out(gate * (w @ value)))


def test_dropout_of_weights_and_of_the_output():
    x = x_of(19)
    for rate, out_rate in ((0.0, 0.5), (0.0, None), (0.5, 0.0), (0.3, None)):
        layer = awake(GatedAttentionUnit(24, dropout=rate, out_dropout=out_rate, residual=False)).float()
        seen = []
        layer.to_out.register_forward_hook(lambda _, given, out, seen=seen: seen.append((given[0], out)))
        out, quiet = layer(x), layer.eval()(x)
        (mixed, before), (whole, _) = seen
        assert torch.equal(mixed, whole) == (rate == 0.0)
        dropped = (out == 0.0).double().mean()
        rate = rate if out_rate is None else out_rate
        assert abs(dropped - rate) < 0.05
        torch.testing.assert_close(out, torch.where(out == 0.0, 0.0, before / (1 - rate)))
        assert not (quiet == 0.0).any()


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
    "unit toeplitz": lambda: GatedAttentionUnit(
        24, query_key_dim=8, causal=True, relative="toeplitz", rows=43, residual="scaled"
    ),
    "unit that averages": lambda: GatedAttentionUnit(24, query_key_dim=8, causal=True, average=True),
    "unit softmax": lambda: GatedAttentionUnit(24, query_key_dim=8, causal=True, activation="softmax_plus"),
    "flash": lambda: FLASH(24, query_key_dim=8, chunk_size=8, causal=True, relative=T5, rotary=4, shift=True),
    "flash toeplitz": lambda: FLASH(
        24, query_key_dim=8, chunk_size=8, causal=True, relative="toeplitz", rows=15, residual="scaled"
    ),
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
        ({"relative": "alibi"}, r"T5Buckets, 'toeplitz' or None, got 'alibi'"),
        ({"relative": "toeplitz"}, r"2n − 1 rows for n tokens, got rows=32"),
        ({"residual": "half"}, r"True, False or 'scaled', got 'half'"),
    ):
        with pytest.raises(ValueError, match=words):
            FLASH(24, **change)
    for change, words in (
        ({"out_dropout": -0.1}, r"out_dropout=-0.1"),
        ({"average": True, "activation": "laplace"}, r"activation='laplace'"),
        ({"average": True, "relative": T5}, r"relative=T5Buckets"),
    ):
        with pytest.raises(ValueError, match=words):
            GatedAttentionUnit(24, **change)
    with pytest.raises(ValueError, match="scale='tokens'"):
        GatedAttentionUnit(24, scale="tokens")
    with pytest.raises(ValueError, match=r"causal unit.*'length'|causal=False"):
        GatedAttentionUnit(24).step(x_of(1))
    with pytest.raises(ValueError, match=r"\(B, T, 24\), got .*\(2, 5, 16\)"):
        FLASH(24)(x_of(5, dim=16))
    with pytest.raises(TypeError, match=r"flash_pytorch's GAU, mmpose's .*, not torch.nn.*Linear"):
        GatedAttentionUnit.from_module(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"flash_pytorch's FLASH, not torch.nn.*Linear"):
        FLASH.from_module(torch.nn.Linear(2, 2))


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


def gradients(layer, out, x):
    """Of what the layer computes, by its input and by the two projections that all its classes have."""
    return torch.autograd.grad(out.square().sum(), [x, *layer])


@pytest.mark.parametrize("given", [{}, {"use_rel_bias": False, "bias": True}, {"dropout_rate": 0.25}])
def test_parameters_of_mmpose(given):
    torch.manual_seed(0)
    theirs = models.RTMCCBlock(17, 32, **given).double().eval()
    torch.nn.init.normal_(theirs.res_scale.scale)
    theirs.ln.eps = 4.0  # so that it clamps
    ours = GatedAttentionUnit.from_module(theirs)
    x = x_of(17, dim=32).double().requires_grad_()
    expected, got = theirs(x), ours(x)
    torch.testing.assert_close(got, expected)
    order = gradients([ours.to_out.weight, ours.to_hidden.weight, ours.gamma, ours.residual_scale], got, x)
    for a, b in zip(
        order, gradients([theirs.o.weight, theirs.uv.weight, theirs.gamma, theirs.res_scale.scale], expected, x),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)
    assert (ours.dropout, ours.out_dropout, ours.training) == (given.get("dropout_rate", 0.0), 0.0, False)
    assert ours.to_out.weight.data_ptr() != theirs.o.weight.data_ptr()


def test_what_a_unit_does_not_take_of_mmpose():
    for change, words in (
        ({"attn_type": "cross-attn"}, "attn_type='cross-attn'"),
        ({"pos_enc": True}, "pos_enc=True"),
        ({"act_fn": torch.nn.ReLU}, "act_fn=ReLU, not SiLU"),
        ({"out_dim": 24}, "24 output channels for 32"),
    ):
        with pytest.raises(ValueError, match=f"RTMCCBlock cannot be a GatedAttentionUnit with {words}"):
            GatedAttentionUnit.from_module(models.RTMCCBlock(17, 32, **change))
    block = models.RTMCCBlock(17, 32)
    block.drop_path = torch.nn.Dropout(0.1)
    with pytest.raises(ValueError, match="drop_path=Dropout"):
        GatedAttentionUnit.from_module(block)


@pytest.mark.parametrize("normalization", ["softmax", "softmax_plus", "squared_relu"])
@pytest.mark.parametrize("rope_rank", [None, "adjacent", "updown"])
def test_parameters_of_bert4torch(rope_rank, normalization):
    torch.manual_seed(0)
    bare = rope_rank == "updown"
    theirs = models.GatedAttention(
        24, normalization=normalization, rope_rank=rope_rank, bias=not bare, attention_scale=not bare, dropout=0.1
    )
    theirs = theirs.double().eval()
    ours = GatedAttentionUnit.from_module(theirs)
    assert (ours.dropout, ours.out_dropout, ours.training) == (0.1, 0.0, False)
    x = x_of(19).double().requires_grad_()
    mask = torch.arange(19)[None] < torch.tensor([[19], [7]])
    at = torch.arange(19).expand(2, -1)
    for seen in (None, mask):
        expected = theirs(x, None if seen is None else seen[:, None, None].double(), at)
        got = ours(x, key_mask=seen)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)  # its angles are fp32
        for a, b in zip(
            gradients([ours.to_out.weight, ours.to_hidden.weight], got, x),
            gradients([theirs.o_dense.weight, theirs.i_dense.weight], expected, x),
            strict=True,
        ):
            rows = slice(None) if a.dim() == 3 else slice(96)  # the base has its channels in another order
            torch.testing.assert_close(a[rows], b[rows], rtol=1e-5, atol=1e-6)


def test_what_a_unit_does_not_take_of_bert4torch():
    for change, words in (
        ({"normalization": "none"}, "one of softmax, softmax_plus, squared_relu, got 'none'"),
        ({"hidden_fn": F.relu}, "activation must be silu, got relu"),
    ):
        with pytest.raises(ValueError, match=words):
            GatedAttentionUnit.from_module(models.GatedAttention(24, **change))
    turned = models.GatedAttention(24, rope_rank="adjacent")
    turned.relative_positions_encoding.rope_theta = 5e5
    with pytest.raises(ValueError, match=r"other frequencies .*rope_theta=500000.0"):
        GatedAttentionUnit.from_module(turned)
    turned.relative_positions_encoding = torch.nn.Identity()
    with pytest.raises(ValueError, match="the plain one, got Identity"):
        GatedAttentionUnit.from_module(turned)
