"""The drop-in modules against torchvision's and torch's: one seed gives one model, states load both ways."""

import copy

import pytest
import torch

pytest.importorskip("torchvision")

from torchvision.models import swin_transformer as tv
from torchvision.models.video import swin_transformer as tv3d

import accel
from accel.testing import assert_close

PAIRS = {
    "v1": (accel.nn.ShiftedWindowAttention, tv.ShiftedWindowAttention),
    "v2": (accel.nn.ShiftedWindowAttentionV2, tv.ShiftedWindowAttentionV2),
    "3d": (accel.nn.ShiftedWindowAttention3d, tv3d.ShiftedWindowAttention3d),
}

# name of the pair, window, shift, map; the last ones are smaller than the window along one axis or all
CASES = [
    ("v1", [4, 4], [0, 0], (8, 8)),
    ("v1", [4, 3], [2, 1], (9, 11)),
    ("v1", [4, 4], [2, 2], (3, 9)),
    ("v2", [3, 4], [1, 2], (7, 9)),
    ("v2", [4, 4], [2, 2], (4, 5)),
    ("3d", [2, 3, 4], [1, 1, 2], (5, 7, 9)),
    ("3d", [4, 3, 3], [2, 1, 1], (3, 7, 5)),
    ("3d", [4, 3, 3], [2, 1, 1], (2, 2, 8)),
]


def pair(kind, window, shift, dim=8, heads=2, dtype=torch.float64, **options):
    """Our module and torchvision's with the same random parameters."""
    ours, theirs = (cls(dim, window, shift, heads, **options).to(dtype) for cls in PAIRS[kind])
    torch.manual_seed(1)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def run(module, x, weight):
    x = x.clone().requires_grad_()
    out = module(x)
    (out * weight).sum().backward()
    return out, {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def inputs(size, dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shape = (2, *size, dim)
    return (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "window", "shift", "size"), CASES)
def test_equals_torchvision(kind, window, shift, size, bias):
    ours, theirs = pair(kind, window, shift, qkv_bias=bias, proj_bias=bias)
    x, weight = inputs(size)
    (out, grads), (expected, expected_grads) = run(ours, x, weight), run(theirs, x, weight)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    assert list(grads) == list(expected_grads)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", PAIRS)
def test_fp32_within_the_tolerance_table(kind):
    window, shift, size = ([2, 3, 4], [1, 1, 2], (5, 7, 9)) if kind == "3d" else ([4, 4], [2, 2], (9, 11))
    ours, theirs = pair(kind, window, shift, dtype=torch.float32)
    x, weight = inputs(size, dtype=torch.float32)
    out, grads = run(ours, x, weight)
    expected, expected_grads = run(theirs.double(), x.double(), weight.double())
    assert_close(out, expected, "softmax", torch.float32, "output")
    assert_close(grads["x"], expected_grads["x"], "softmax_grad", torch.float32, "gradient")


@pytest.mark.parametrize("kind", PAIRS)
def test_one_seed_gives_the_same_state(kind):
    window = [2, 3, 4] if kind == "3d" else [3, 4]
    states = []
    for cls in PAIRS[kind]:
        torch.manual_seed(5)
        states.append(cls(8, window, [1] * len(window), 2).state_dict())
    ours, theirs = states
    assert list(ours) == list(theirs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("kind", PAIRS)
def test_state_dict_loads_both_ways(kind):
    axes = 3 if kind == "3d" else 2
    ours, theirs = pair(kind, [2, 3, 4][-axes:], [1] * axes)
    fresh = copy.deepcopy(theirs)
    for parameter in fresh.parameters():
        torch.nn.init.zeros_(parameter)
    fresh.load_state_dict(ours.state_dict())
    x, _ = inputs((5, 7, 9)[-axes:])
    torch.testing.assert_close(fresh(x), ours(x), rtol=1e-11, atol=1e-11)


def test_takes_the_place_of_the_attention_layer_in_torchvisions_block():
    block = tv.SwinTransformerBlock(8, 2, [4, 4], [2, 2], attn_layer=accel.nn.ShiftedWindowAttention).double().eval()
    original = tv.SwinTransformerBlock(8, 2, [4, 4], [2, 2]).double().eval()
    original.load_state_dict(block.state_dict())
    x, _ = inputs((9, 6))
    torch.testing.assert_close(block(x), original(x), rtol=1e-11, atol=1e-11)


def test_dropout_follows_training():
    ours, _ = pair("v1", [4, 4], [2, 2], attention_dropout=0.5, dropout=0.5)
    x, _ = inputs((9, 6))
    torch.manual_seed(0)
    first, second = ours(x), ours(x)
    assert not torch.equal(first, second)
    assert 0.3 < float((first == 0).double().mean()) < 0.7  # what the output dropout took
    ours.eval()
    assert torch.equal(ours(x), ours(x))


def test_dropped_attention_weights_average_to_the_undropped_output():
    ours, theirs = pair("v1", [4, 4], [2, 2], attention_dropout=0.3)
    x, _ = inputs((4, 9))
    torch.manual_seed(0)
    with torch.no_grad():
        mean = torch.stack([ours(x) for _ in range(200)]).mean(0)
        expected = theirs.eval()(x)
    assert float((mean - expected).abs().mean() / expected.abs().mean()) < 0.1


def test_bad_arguments_name_their_values():
    with pytest.raises(ValueError, match=r"2 integers.*\[4, 4, 4\]"):
        accel.nn.ShiftedWindowAttention(8, [4, 4, 4], [0, 0, 0], 2)
    with pytest.raises(ValueError, match="num_heads=3"):
        accel.nn.ShiftedWindowAttentionV2(8, [4, 4], [0, 0], 3)
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 8\)"):
        accel.nn.ShiftedWindowAttention3d(8, [2, 2, 2], [0, 0, 0], 2)(torch.zeros(2, 4, 4, 8))


def test_a_window_of_one_is_finite():
    module = accel.nn.ShiftedWindowAttentionV2(8, [1, 1], [0, 0], 2)
    assert torch.isfinite(module(torch.randn(1, 3, 2, 8))).all()


@pytest.mark.parametrize("kind", PAIRS)
def test_compiles_in_one_graph(kind):
    size = (3, 7, 5) if kind == "3d" else (9, 6)
    window, shift = ([4, 3, 3], [2, 1, 1]) if kind == "3d" else ([4, 4], [2, 2])
    ours, _ = pair(kind, window, shift)
    x, weight = inputs(size)
    expected, expected_grads = run(ours, x, weight)
    ours.zero_grad()
    out, grads = run(torch.compile(ours, fullgraph=True, backend="aot_eager"), x, weight)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grads["x"], expected_grads["x"], rtol=1e-10, atol=1e-10)


# --- multi-head attention ---

OPTIONS = {
    "plain": {},
    "other sizes of k and v": {"kdim": 12, "vdim": 20},
    "no biases": {"bias": False},
    "further keys": {"add_bias_kv": True, "add_zero_attn": True},
}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mha_inputs(kdim=16, vdim=16, batch_first=False, **_):
    """Query, key and value of 5 and 7 tokens, 3 batch entries."""
    found = (noise(5, 3, 16), noise(7, 3, kdim, seed=1), noise(7, 3, vdim, seed=2))
    return tuple(x.transpose(0, 1).contiguous() if batch_first else x for x in found)


def mha_masks():
    hidden = noise(5, 7, seed=3) > 0.5
    hidden[:, 0] = False
    padded = torch.arange(7) >= torch.tensor([[7], [4], [1]])
    return {
        "none": {},
        "padding": {"key_padding_mask": padded},
        "mask": {"attn_mask": hidden},
        "both": {"attn_mask": hidden, "key_padding_mask": padded},
        "floating": {"attn_mask": noise(5, 7, seed=4), "key_padding_mask": noise(3, 7, seed=5)},
        "for every head": {"attn_mask": noise(6, 5, 7, seed=6)},
        "boolean and floating": {"attn_mask": noise(5, 7, seed=4), "key_padding_mask": padded},
        "causal": {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(1), "is_causal": True},
    }


def mha_pair(batch_first=False, **options):
    modules = []
    for cls in (accel.nn.MultiHeadAttention, torch.nn.MultiheadAttention):
        torch.manual_seed(5)
        modules.append(cls(16, 2, batch_first=batch_first, **options).double())
    return modules


def run_mha(module, inputs, **given):
    """The output with every gradient, and the weights."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out, weights = module(*inputs, **given)
    (out * noise(*out.shape, seed=9)).sum().backward()
    return [out, *[x.grad for x in inputs], *[p.grad for p in module.parameters()]], weights


@pytest.mark.parametrize("options", OPTIONS)
def test_multi_head_attention_has_torchs_parameters(options):
    ours, theirs = mha_pair(**OPTIONS[options])
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    for name in expected:
        assert torch.equal(state[name], expected[name]), name
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("masks", mha_masks())
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_equals_torchs(options, masks, need_weights):
    batch_first = options != "plain"
    ours, theirs = mha_pair(batch_first, **OPTIONS[options])
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    given = {"average_attn_weights": masks != "mask", **mha_masks()[masks]}
    inputs = mha_inputs(batch_first=batch_first, **OPTIONS[options])
    found, weights = run_mha(ours, inputs, need_weights=need_weights, **given)
    # torch reads the mask and not the hint where it computes the weights
    expected, expected_weights = run_mha(theirs, inputs, need_weights=True, **given)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-12)
    else:
        assert weights is None


def test_multi_head_attention_unbatched_and_of_itself():
    for batch_first in (False, True):
        ours, theirs = mha_pair(batch_first)
        x = noise(5, 16)
        masks = {"key_padding_mask": torch.tensor([False, True, False, False, True])}
        for found, expected in zip(ours(x, x, x, need_weights=True, **masks), theirs(x, x, x, **masks), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_floating_mask_has_a_gradient():
    ours, theirs = mha_pair()
    grads = []
    for module in (ours, theirs):
        mask = noise(5, 7, seed=4).requires_grad_()
        (module(*mha_inputs(), attn_mask=mask, need_weights=False)[0] * noise(5, 3, 16, seed=9)).sum().backward()
        grads.append(mask.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-11)


RULES = {
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "causal window": {"causal": True, "window": (2, -1)},
    "T5": {"relative": accel.T5Buckets(), "causal": True},
    "T5, few buckets": {"relative": accel.T5Buckets(max_distance=6), "relative_rows": 8},
    "Toeplitz": {"relative": "toeplitz", "relative_rows": 21},
    "grid": {"relative": accel.Grid2D(2, 3, extra=1)},
    "grouped heads": {"num_kv_heads": 1, "causal": True},
}


@pytest.mark.parametrize(
    ("rules", "tokens"), [(r, t) for r in RULES for t in ((7, 7), (5, 9)) if r != "grid" or t == (7, 7)]
)
def test_rules_of_multi_head_attention(rules, tokens):
    """The op under a rule gives what the weights in plain torch give, gradients included."""
    torch.manual_seed(7)
    module = accel.nn.MultiHeadAttention(16, 2, batch_first=True, **RULES[rules]).double()
    inputs = (noise(2, tokens[0], 16), *[noise(2, tokens[1], 16, seed=1)] * 2)
    masks = {"key_padding_mask": torch.arange(tokens[1]) >= torch.tensor([[tokens[1]], [4]])}
    results = []
    for need_weights in (False, True):
        module.zero_grad()
        out, weights = module(*inputs, need_weights=need_weights, average_attn_weights=False, **masks)
        out.square().sum().backward()
        results.append([out.detach(), *[p.grad for p in module.parameters()]])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert weights.shape == (2, 2, *tokens)
    assert bool((weights[1, :, :, 4:] == 0).all())
    if RULES[rules].get("causal"):
        later = torch.ones(tokens, dtype=torch.bool).triu(tokens[1] - tokens[0] + 1)
        assert bool((weights[..., later] == 0).all())


def test_relative_rows_mean_what_the_op_means():
    """The middle row of a Toeplitz table is distance 0, whatever the lengths."""
    module = accel.nn.MultiHeadAttention(16, 2, relative="toeplitz", relative_rows=21).double()
    torch.nn.init.zeros_(module.relative_position_bias_table)
    with torch.no_grad():
        module.relative_position_bias_table[10 + 2] = 100.0  # a query sees the key two before it, where there is one
    x = noise(6, 16)
    _, weights = module(x, x, x, need_weights=True)
    assert torch.equal(weights[2:].argmax(1), torch.arange(4))


def test_grouped_heads_share_keys():
    module = accel.nn.MultiHeadAttention(16, 4, num_kv_heads=2).double()
    full = accel.nn.MultiHeadAttention(16, 4).double()
    state = module.state_dict()
    for name in ("in_proj_weight", "in_proj_bias"):
        q, k, v = state[name].split([16, 8, 8])
        twice = [x.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1) for x in (k, v)]
        state[name] = torch.cat([q, *twice])
    full.load_state_dict(state)
    x = noise(6, 3, 16)
    torch.testing.assert_close(module(x, x, x)[0], full(x, x, x)[0], rtol=0, atol=1e-12)


def test_dropout_of_multi_head_attention_follows_training():
    module = accel.nn.MultiHeadAttention(16, 2, dropout=0.5).double()
    x = noise(6, 3, 16)
    for need_weights in (False, True):
        module.train()
        assert not torch.equal(module(x, x, x, need_weights=need_weights)[0], module(x, x, x)[0])
        module.eval()
        torch.testing.assert_close(
            module(x, x, x, need_weights=need_weights)[0], module(x, x, x)[0], rtol=0, atol=1e-12
        )


def test_a_query_that_sees_nothing_gives_the_bias():
    module = accel.nn.MultiHeadAttention(16, 2).double()
    torch.nn.init.normal_(module.out_proj.bias)
    x = noise(6, 1, 16)
    for need_weights in (False, True):
        out, _ = module(x, x, x, key_padding_mask=torch.ones(1, 6, dtype=torch.bool), need_weights=need_weights)
        torch.testing.assert_close(out, module.out_proj.bias.expand_as(out), rtol=0, atol=1e-12)


def test_a_causal_hint_alone_stands_for_its_mask():
    module = accel.nn.MultiHeadAttention(16, 2).double()
    x = noise(6, 1, 16)
    expected, _ = module(x, x, x, attn_mask=torch.ones(6, 6, dtype=torch.bool).triu(1))
    torch.testing.assert_close(module(x, x, x, is_causal=True)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "embed_dim=16, num_heads=3"),
        ({"num_kv_heads": 3}, "num_heads=2, num_kv_heads=3"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"add_zero_attn": True, "causal": True}, "causal=True"),
        ({"relative": "toeplitz"}, "got None"),
        ({"relative": "toeplitz", "relative_rows": 8}, "got 8"),
        ({"relative": "rotary"}, "'rotary'"),
        ({"relative": accel.Grid2D(2, 2), "relative_rows": 8}, "relative_rows=8"),
        ({"relative": accel.T5Buckets(max_distance=4), "relative_rows": 32}, "leaves no room"),
        ({"relative_rows": 8}, "got 8 and none"),
    ],
)
def test_bad_options_of_multi_head_attention_name_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        accel.nn.MultiHeadAttention(16, **{"num_heads": 2, **options})


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"attn_mask": torch.zeros(1, 7)}, r"attn_mask must be \(5, 7\) or \(6, 5, 7\), got \(1, 7\)"),
        ({"key_padding_mask": torch.zeros(1, 7)}, r"key_padding_mask must be \(3, 7\).*got \(1, 7\)"),
        ({"attn_mask": torch.zeros(5, 7, dtype=torch.int64)}, "got torch.int64"),
    ],
)
def test_bad_masks_of_multi_head_attention_name_their_values(masks, message):
    with pytest.raises((ValueError, TypeError), match=message):
        accel.nn.MultiHeadAttention(16, 2).double()(*mha_inputs(), **masks)


def test_bad_inputs_of_multi_head_attention_name_their_values():
    module = accel.nn.MultiHeadAttention(16, 2, relative="toeplitz", relative_rows=9)
    x = torch.zeros(6, 16)
    with pytest.raises(ValueError, match=r"up to 5 tokens, got 6 queries and 6 keys"):
        module(x, x, x)
    with pytest.raises(ValueError, match="is_causal needs attn_mask"):
        accel.nn.MultiHeadAttention(16, 2, add_zero_attn=True)(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="7 keys of 6 queries"):
        accel.nn.MultiHeadAttention(16, 2, window=(2, 2))(x, torch.zeros(7, 16), torch.zeros(7, 16), is_causal=True)
    with pytest.raises(ValueError, match=r"tuple\(value.shape\)=\(4, 16\)"):
        module(x[:5], x[:5], x[:4])


def test_multi_head_attention_compiles_in_one_graph():
    module, _ = mha_pair()
    inputs = mha_inputs()
    masks = mha_masks()["both"]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, **masks)[0], module(*inputs, **masks)[0], rtol=0, atol=1e-11)


ENCODERS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "relative": {"relative": accel.T5Buckets(), "causal": True},
    "grouped heads": {"num_kv_heads": 1},
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("options", ENCODERS)
def test_multi_head_attention_inside_torchs_encoder_layer(options, norm_first):
    """In eval mode torch looks for its fast path, which knows nothing of rules: it is not taken."""
    torch.manual_seed(3)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True, norm_first=norm_first).double()
    layer.self_attn = accel.nn.MultiHeadAttention(16, 2, batch_first=True, **ENCODERS[options]).double()
    x = noise(3, 7, 16)
    masks = {"src_key_padding_mask": torch.arange(7) >= torch.tensor([[7], [4], [6]])}
    for given in ({}, masks):
        expected = layer.train()(x, **given)
        with torch.no_grad():
            found = layer.eval()(x, **given)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not layer.self_attn._qkv_same_embed_dim


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_multi_head_attention_inside_torchs_encoder():
    torch.manual_seed(3)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True).double()
    layer.self_attn = accel.nn.MultiHeadAttention(16, 2, batch_first=True, causal=True).double()
    model = torch.nn.TransformerEncoder(layer, 2)
    x, padded = noise(3, 7, 16), torch.arange(7) >= torch.tensor([[7], [4], [6]])
    expected = model.train()(x, src_key_padding_mask=padded)
    with torch.no_grad():
        found = model.eval()(x, src_key_padding_mask=padded)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("of_itself", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multi_head_attention_takes_a_bias_of_another_dtype(dtype, of_itself):
    """As torch's module does, which adds it in the wider of both."""
    ours, theirs = (module.to(dtype) for module in mha_pair(batch_first=True))
    theirs.in_proj_bias = torch.nn.Parameter(noise(48, seed=8))
    ours.load_state_dict(theirs.state_dict())
    ours.in_proj_bias = torch.nn.Parameter(theirs.in_proj_bias.detach().clone())
    inputs = [x.to(dtype) for x in mha_inputs(batch_first=True)]
    inputs = inputs[:1] * 3 if of_itself else inputs
    out, expected = ours(*inputs)[0], theirs(*inputs, need_weights=False)[0]
    assert out.dtype == expected.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    for module, result in ((ours, out), (theirs, expected)):
        result.float().square().sum().backward()
        assert module.in_proj_bias.grad.dtype == torch.float64
