"""Softmax attention against its definition, pair by pair, against torch, and against itself in another form."""

import functools
import gc
import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from _attention_calls import BACKENDS, drawn
from _attention_cases import available, by_name
from _bad import zeros
from _pairs import cumulative, random_index, toeplitz_index

import accel
from accel import BlockCausal, BlockDiffusion, Grid2D, PrefixLM, T5Buckets, testing
from accel.ops.attention.softmax_attention import OP
from accel.ops.rules import grid_index
from accel.testing import assert_close

# --- the definition, pair by pair ---


def definition(q, k, v, *, seen=None, bias=None, scale=None, softcap=None, sinks=None):
    """Output and log-sum-exp by loops over float64 tensors; ``seen(b, i, j)`` and ``bias(h, i, j)`` are functions."""
    B, H, T, D = q.shape
    group, scale = H // k.shape[1], D**-0.5 if scale is None else scale
    out = torch.zeros(B, H, T, v.shape[3], dtype=torch.float64)
    lse = torch.full((B, H, T), -math.inf, dtype=torch.float64)
    for b, h, i in itertools.product(range(B), range(H), range(T)):
        keys = [j for j in range(k.shape[2]) if seen is None or seen(b, i, j)]
        logits = [scale * float(q[b, h, i] @ k[b, h // group, j]) for j in keys]
        if softcap is not None:
            logits = [softcap * math.tanh(x / softcap) for x in logits]
        if bias is not None:
            logits = [x + bias(h, i, j) for x, j in zip(logits, keys, strict=True)]
        weights = [math.exp(x) for x in logits]
        total = sum(weights) + (0.0 if sinks is None else math.exp(sinks[h]))
        for weight, j in zip(weights, keys, strict=True):
            out[b, h, i] += weight / total * v[b, h // group, j]
        lse[b, h, i] = math.log(total) if total else -math.inf
    return out, lse


def agree(qkv, arguments, **rules):
    """The reference with ``arguments`` is the definition with ``rules``."""
    got = accel.softmax_attention(*qkv, **arguments, return_lse=True, backend="reference")
    for result, expected in zip(got, definition(*qkv, **rules), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)


SIZES = [(9, 9), (5, 11), (11, 5), (1, 7), (7, 1)]


@pytest.mark.parametrize(("T", "S"), SIZES)
@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ({}, lambda p, i, j: True),
        ({"causal": True}, lambda p, i, j: j <= p),
        ({"causal": "bottom_right"}, lambda p, i, j: j <= p),
        ({"causal": "top_left"}, lambda p, i, j: j <= i),
        ({"window": (2, 1)}, lambda p, i, j: p - 2 <= j <= p + 1),
        ({"window": (0, -1)}, lambda p, i, j: p <= j),
        ({"window": (-1, 3)}, lambda p, i, j: j <= p + 3),
        ({"window": (3, 2), "causal": True}, lambda p, i, j: p - 3 <= j <= p),
        ({"window": (1, 2), "causal": "top_left"}, lambda p, i, j: i - 1 <= j <= i),
        ({"pattern": PrefixLM(4)}, lambda p, i, j: j < 4 or j <= p),
        ({"pattern": PrefixLM(4), "window": (1, 4)}, lambda p, i, j: (j < 4 or j <= p) and p - 1 <= j <= p + 4),
        ({"pattern": BlockCausal(3)}, lambda p, i, j: j // 3 <= p // 3),
        ({"pattern": [BlockCausal(4), BlockCausal(3)]}, lambda p, i, j: j // 3 <= p // 3 and j // 4 <= p // 4),
        ({"pattern": BlockCausal(3), "causal": True}, lambda p, i, j: j <= p),
    ],
    ids=lambda x: "definition" if callable(x) else str(x),
)  # fmt: skip
def test_rules_are_their_definition(T, S, arguments, seen):
    agree(drawn(T, S), arguments, seen=lambda b, i, j: seen(i + S - T, i, j))


def three_parts(i, j, half, n):
    """Block diffusion's mask as its paper builds it: (block diagonal) or (offset block causal) or (block causal)."""
    clean_i, clean_j = i >= half, j >= half
    block_i, block_j = i % half // n, j % half // n
    diagonal = block_i == block_j and clean_i == clean_j
    offset = block_i > block_j and clean_j and not clean_i
    causal = block_i >= block_j and clean_j and clean_i
    return diagonal or offset or causal


@pytest.mark.parametrize(("tokens", "n"), [(12, 2), (14, 3), (10, 1), (10, 9), (2, 1), (16, 8)])
def test_block_diffusion_is_its_definition(tokens, n):
    half = tokens // 2
    agree(drawn(tokens, tokens), {"pattern": BlockDiffusion(n)}, seen=lambda b, i, j: three_parts(i, j, half, n))
    agree(
        drawn(tokens, tokens),
        {"pattern": [BlockDiffusion(n), PrefixLM(3)], "window": (half, 2)},
        seen=lambda b, i, j: three_parts(i, j, half, n) and (j < 3 or j <= i) and i - half <= j <= i + 2,
    )


@pytest.mark.parametrize("lengths", [[0, 6], (3, 9), torch.tensor([8, 2]), torch.tensor([1, 20], dtype=torch.int32)])
def test_prefix_of_each_batch_entry(lengths):
    agree(drawn(7, 9), {"pattern": PrefixLM(lengths)}, seen=lambda b, i, j: j < int(lengths[b]) or j <= i + 2)


@pytest.mark.parametrize(("T", "S"), SIZES)
def test_biases_are_their_definition(T, S):
    generator = torch.Generator().manual_seed(5)
    slopes = torch.rand(2, generator=generator, dtype=torch.float64)
    table = torch.randn(T + S - 1, 2, generator=generator, dtype=torch.float64)
    index = random_index(T, S, T + S - 1)
    dense = torch.randn(2, T, S, generator=generator, dtype=torch.float64)
    sinks = torch.randn(2, generator=generator, dtype=torch.float64)

    def alibi(h, i, j):
        return -float(slopes[h]) * abs(i + S - T - j)

    def along(h, i, j):
        return float(table[i - j + S - 1, h])

    def gathered(h, i, j):
        return float(table[index[i, j], h])

    qkv = drawn(T, S, H=2, Hkv=1)
    agree(qkv, {"alibi_slopes": slopes}, bias=alibi)
    agree(qkv, {"bias_table": table, "bias_index": "toeplitz"}, bias=along)
    agree(qkv, {"bias_table": table, "bias_index": index}, bias=gathered)
    for arguments, rule in (({"bias_index": "toeplitz"}, along), ({"bias_index": index}, gathered)):
        agree(
            qkv,
            {"bias_table": table, **arguments, "alibi_slopes": slopes, "bias": dense, "sinks": sinks, "softcap": 1.5,
             "scale": 0.7, "causal": True},
            bias=lambda h, i, j, rule=rule: rule(h, i, j) + alibi(h, i, j) + float(dense[h, i, j]),
            seen=lambda b, i, j: j <= i + S - T, sinks=sinks.tolist(), softcap=1.5, scale=0.7,
        )  # fmt: skip


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 20), (8, 9), (64, 1000), (31, 77)])
def test_t5_buckets_are_those_of_transformers(bidirectional, buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-3000, 3001)  # query − key
    expected = t5.T5Attention._relative_position_bucket(-distance, bidirectional, buckets, max_distance)
    got = T5Buckets(bidirectional, max_distance).rows_of(distance, buckets)
    assert torch.equal(got, expected)
    assert torch.equal(T5Buckets(bidirectional, max_distance, q_offset=7).rows_of(distance - 7, buckets), expected)
    assert expected.unique().numel() > 6, "the distances reach few buckets"


def test_t5_bias_is_that_of_transformers():
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = pytest.importorskip("transformers").T5Config(d_model=16, d_kv=8, num_heads=2)
    for decoder in (False, True):
        config.is_decoder = decoder
        module = t5.T5Attention(config, has_relative_attention_bias=True).double()
        table = module.relative_attention_bias.weight.detach()
        q, k, v = drawn(9, 9)
        bias = module.compute_bias(9, 9).detach()
        expected = accel.softmax_attention(q, k, v, bias=bias, scale=1.0, backend="reference")
        rule = T5Buckets(bidirectional=not decoder)
        got = accel.softmax_attention(q, k, v, bias_table=table, bias_index=rule, scale=1.0, backend="reference")
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        one = T5Buckets(bidirectional=not decoder, q_offset=8)  # the last query alone, as in decoding
        got = accel.softmax_attention(
            q[:, :, 8:], k, v, bias_table=table, bias_index=one, scale=1.0, backend="reference"
        )
        torch.testing.assert_close(got, expected[:, :, 8:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("h", "w"), [(3, 5), (4, 4), (1, 6), (7, 2)])
def test_grids_are_those_of_timm(h, w):
    beit = pytest.importorskip("timm.models.beit")
    swin = pytest.importorskip("timm.models.swin_transformer")
    assert torch.equal(grid_index([h, w, 1]), beit.gen_relative_position_index((h, w)))
    assert torch.equal(grid_index([h, w, 0]), swin.get_relative_position_index(h, w))
    assert Grid2D(h, w, 1).rows == int(grid_index([h, w, 1]).max()) + 1
    assert Grid2D(h, w).rows == int(grid_index([h, w, 0]).max()) + 1
    two = grid_index([h, w, 2])  # the rows of one extra token, each for both
    assert torch.equal(two[1:, 1:], grid_index([h, w, 1]))
    assert torch.equal(two[0, 2:], two[1, 2:])
    assert torch.equal(two[2:, 0], two[2:, 1])
    assert two[:2, :2].unique().tolist() == [Grid2D(h, w, 2).rows - 1]


def test_grid_is_that_of_torchvision():
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    layer = swin.ShiftedWindowAttention(8, [4, 6], [0, 0], 2)
    assert torch.equal(grid_index([4, 6, 0]).flatten(), layer.relative_position_index)
    assert layer.relative_position_bias_table.shape[0] == Grid2D(4, 6).rows


@pytest.mark.parametrize("name", ["swin_grid", "beit_grid", "deit_grid", "grid_of_one_column"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_grid_is_its_index_tensor(name, backend):
    tensors, kwargs = by_name(name).make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    grid = kwargs["bias_index"]
    index = grid_index([grid.h, grid.w, grid.extra])
    one, other = (
        testing.run(accel.softmax_attention, tensors, {**kwargs, "bias_index": i}, backend) for i in (grid, index)
    )
    for key, value in one.named().items():
        family = "softmax_few" if key == "out" else "softmax_few_grad"
        assert_close(other.named()[key], value, family, torch.float32, key)


# --- against torch, and against itself in another form ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("plain", lambda t: {}),
        ("head_size_40", lambda t: {}),
        ("scale_1", lambda t: {"scale": 1.0}),
        ("gqa", lambda t: {"enable_gqa": True}),
        ("value_size_larger", lambda t: {"enable_gqa": True}),
        ("top_left_more_queries", lambda t: {"is_causal": True}),
        ("padding_holes", lambda t: {"attn_mask": t["mask"]}),
        ("rows_without_keys", lambda t: {"attn_mask": t["mask"]}),
        ("bias_of_heads_and_keys", lambda t: {"attn_mask": t["bias"].double()}),
        ("minus_inf_rows_of_bias", lambda t: {"attn_mask": t["bias"].double()}),
    ],
)
def test_torch_agrees(name, arguments, backend):
    tensors, kwargs = by_name(name).make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    got = testing.run(accel.softmax_attention, tensors, kwargs, backend)
    wide = {n: t.double().requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}
    expected = F.scaled_dot_product_attention(wide["q"], wide["k"], wide["v"], **arguments(wide))
    assert_close(got.out, expected, "softmax", torch.float32)
    grads = torch.autograd.grad(expected.sum(), [wide[n] for n in "qkv"])
    for n, grad in zip("qkv", grads, strict=True):
        assert_close(got.grads[n], grad, "softmax_grad", torch.float32, n)


PACKED_NAMES = [
    "packed", "packed_causal", "packed_window", "packed_prefix_list", "packed_block_causal", "packed_block_diffusion",
    "packed_t5_alibi_window", "packed_t5_one_way", "packed_toeplitz_wide", "packed_cross_causal",
    "packed_cross_top_left", "packed_cross_window", "packed_cross_alibi", "packed_cross_t5", "packed_cross_toeplitz",
    "packed_cross_patterns",
]  # fmt: skip


def one_sequence(kwargs, number, queries, keys, rows):
    """The arguments of a call on sequence ``number`` alone."""
    alone = {n: v for n, v in kwargs.items() if not n.startswith("cu_seqlens")}
    if alone.get("bias_index") == "toeplitz":  # a table for these lengths: rows of the packed one
        distance = torch.arange(queries)[:, None] - torch.arange(keys)
        alone["bias_index"] = distance + rows // 2
    patterns = alone.get("pattern")
    if patterns is not None:
        patterns = patterns if isinstance(patterns, list) else [patterns]
        alone["pattern"] = [
            PrefixLM([p.lengths[number]]) if isinstance(p, PrefixLM) and not isinstance(p.lengths, int) else p
            for p in patterns
        ]
    return alone


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PACKED_NAMES)
def test_packed_is_a_loop_over_sequences(name, backend):
    tensors, kwargs = by_name(name).make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    out, lse = accel.softmax_attention(**tensors, **kwargs, return_lse=True, backend=backend)
    starts_q = kwargs["cu_seqlens_q"].tolist()
    starts_k = kwargs.get("cu_seqlens_k", kwargs["cu_seqlens_q"]).tolist()
    table = tensors.get("bias_table")
    pieces = zip(itertools.pairwise(starts_q), itertools.pairwise(starts_k), strict=True)
    for number, ((a, b), (c, d)) in enumerate(pieces):
        alone = {**tensors, "q": tensors["q"][:, :, a:b]}
        alone |= {n: tensors[n][:, :, c:d] for n in "kv"}
        given = one_sequence(kwargs, number, b - a, d - c, 0 if table is None else table.shape[0])
        expected = accel.softmax_attention(**testing.double(alone), **given, return_lse=True, backend="reference")
        assert_close(out[:, :, a:b], expected[0], "softmax", torch.float32, f"sequence {number}")
        assert_close(lse[:, :, a:b], expected[1], "lse", torch.float32, f"log-sum-exp of sequence {number}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_index_that_depends_on_the_distance_takes_the_short_path(backend):
    tensors, kwargs = by_name("index_toeplitz").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    kwargs["bias_index"] = kwargs["bias_index"].clone()
    args = OP.prepare(**tensors, **kwargs)
    assert args.line is not None
    assert args.table is None
    assert args.bias_index is None
    other = kwargs["bias_index"].clone()
    other[-1, -1] = (other[-1, -1] + 1) % tensors["bias_table"].shape[0]
    args = OP.prepare(**tensors, bias_index=other)
    assert args.line is None
    assert torch.equal(args.bias_index.long(), other)
    kwargs["bias_index"][-1, -1] = other[-1, -1]  # what was known of the tensor is no longer true
    assert OP.prepare(**tensors, **kwargs).line is None
    got = accel.softmax_attention(**tensors, **kwargs, backend=backend)
    dense = tensors["bias_table"][other].permute(2, 0, 1)
    expected = accel.softmax_attention(
        **{n: tensors[n].double() for n in "qkv"}, bias=dense.double(), backend="reference"
    )
    assert_close(got, expected, "softmax", torch.float32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "given",
    [
        lambda dtype: {"bias_table": zeros(6, 2).double(), "bias_index": random_index(5, 5, 6, dtype)},
        lambda dtype: {"bias_table": zeros(6, 2).double(), "bias_index": toeplitz_index(5, 5, 6, dtype)},
        lambda dtype: {"cu_seqlens_q": cumulative((2, 3), dtype)},
        lambda dtype: {"cu_seqlens_k": cumulative((2, 3), dtype), "cu_seqlens_q": cumulative((1, 4), dtype)},
    ],
    ids=["index", "toeplitz", "packed", "cross"],
)
def test_what_is_known_of_a_tensor_does_not_keep_it_alive(given, dtype):
    arguments = given(dtype)
    q, k, v = drawn(5, 5, B=1)
    for _ in range(2):
        accel.softmax_attention(q, k, v, **arguments, causal=True, backend="reference")
    gone = [weakref.ref(x) for n, x in arguments.items() if n != "bias_table"]
    arguments.clear()
    gc.collect()
    assert [x() for x in gone] == [None] * len(gone)


def test_an_index_made_in_inference_mode_is_taken():
    q, k, v = drawn(5, 7)
    table = torch.randn(6, 2, dtype=torch.float64)
    call = functools.partial(accel.softmax_attention, q, k, v, bias_table=table, backend="reference")
    with torch.inference_mode():
        index = random_index(5, 7, 6)
        inside = call(bias_index=index)
    assert torch.equal(inside, call(bias_index=random_index(5, 7, 6)))


@pytest.mark.parametrize("name", ["index", "index_toeplitz", "packed_t5", "causal"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_after_inference_mode(name, backend):
    tensors, kwargs = by_name(name).make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    kwargs = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in kwargs.items()}
    with torch.inference_mode():
        inside = accel.softmax_attention(**tensors, **kwargs, backend=backend)
    got = testing.run(accel.softmax_attention, tensors, kwargs, backend)
    testing.assert_same(got.out, inside, "outside of inference mode")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_bias_has_the_gradient_of_each_of_its_elements(backend):
    q, k, v = (x.float() for x in drawn(5, 7, E=8))
    available(backend, {"q": q, "k": k, "v": v}, {})
    whole = torch.randn(2, 1, 5, 7)
    whole[1] = whole[0]
    grads = []
    for bias in (whole, whole[:1].expand(2, 1, 5, 7)):
        bias = bias.detach().requires_grad_()
        accel.softmax_attention(q, k, v, bias=bias, backend=backend)[:, :, :, 0].sum().backward()
        grads.append(bias.grad)
    assert grads[1].shape == whole.shape
    assert_close(grads[1], grads[0], "softmax_grad", torch.float32)
