"""Mixed chunk attention: the common checks on awkward calls, its definition pair by pair, states, and bad input."""

import dataclasses
import math

import pytest
import torch
from _bad import Bad, check_bad, each, zeros
from _flash_cases import BACKENDS, BEHAVIOUR, CASES, FP32, GRADIENTS, PACKED_BEHAVIOUR, by_name
from _pairs import cumulative

import accel
from accel import T5Buckets, testing
from accel.testing import assert_close, check_op

# in half precision the reference and products of torch compute as in fp32, and both take their way for every rule
PLAINLY = [dataclasses.replace(c, dtypes=FP32) for c in CASES]
CHECKS = [
    *check_op(accel.flash_mix, CASES, BEHAVIOUR, GRADIENTS, BACKENDS[:1]),
    *check_op(accel.flash_mix, [*CASES[4:6], *PLAINLY[6::6]], BEHAVIOUR[:1], [], BACKENDS[1:2]),
    *check_op(accel.flash_mix, PLAINLY[::4], [], [], BACKENDS[2:]),
]


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


# the packed form has one batch entry, so that the checks of empty batches and of single entries do not apply, and its
# offsets are read on the host, so that only kernels are compiled in one graph
ON_PACKED = [
    testing.check_subsets,
    testing.check_opcheck,
    testing.check_compile,
    testing.check_poison,
    testing.check_repeat,
    testing.check_autocast,
]


@pytest.mark.parametrize("check", ON_PACKED, ids=lambda check: check.__name__.removeprefix("check_"))
def test_packed_behaviour(check):
    check(accel.flash_mix, PACKED_BEHAVIOUR, "cpu")


LEVEL_CASES = [by_name(n) for n in ("prime_causal", "value_size_300_full", "mask_blocks", "everything")]
LEVELS = list(testing.check_levels(accel.flash_mix, LEVEL_CASES))


@pytest.mark.parametrize("check", [check for _, check in LEVELS], ids=[name for name, _ in LEVELS])
def test_level(check):
    check()


def defined(quad_q, quad_k, lin_q, lin_k, v, gate, *, chunk_size, causal, quad_scale, lin_scale, bias, seen):
    """Every pair by itself, in float64. ``bias(i, j)`` of places in a chunk, ``seen (B, T)``."""
    T = v.shape[1]
    at = torch.arange(T)
    chunk = at // chunk_size
    same = chunk[:, None] == chunk[None]
    logits = quad_scale * quad_q @ quad_k.mT
    if bias is not None:
        logits = logits + bias[at % chunk_size][:, at % chunk_size]
    weights = logits.relu().square() * same
    linear = (lin_scale * lin_q @ lin_k.mT) * (chunk[:, None] > chunk[None] if causal else torch.ones(T, T))
    if causal:
        weights = weights * torch.ones(T, T).tril()
    out = ((weights + linear) * seen[:, None]) @ v
    return out if gate is None else gate * out


def drawn(T, B=2, s=8, s2=6, E=12, gate=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (s, s, s2, s2, E, *([E] if gate else []))
    return [torch.randn(B, T, n, generator=generator).to(dtype) for n in sizes]


def named(tensors):
    return dict(zip(("quad_q", "quad_k", "lin_q", "lin_k", "v", "gate"), tensors, strict=False))


def bias_of(table, chunk_size):
    at = torch.arange(chunk_size)
    return table[:, 0][at[:, None] - at[None] + chunk_size - 1]


CALLS = [
    (32, 8, ""), (37, 8, "table"), (5, 8, "table mask"), (24, 8, "mask"), (1, 1, ""), (23, 1, "mask"),
    (40, 16, "no gate"),
]  # fmt: skip
# in chunks of one token a gradient of quad_q is a single difference of what is rounded between the two parts
IN_DTYPES = [
    (*call, dtype) for call in CALLS for dtype in testing.KERNEL_DTYPES if call[1] > 1 or dtype == torch.float32
]


@pytest.mark.parametrize(("T", "chunk", "how", "dtype"), IN_DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_definition(T, chunk, how, causal, dtype):
    tensors = drawn(T, gate="no gate" not in how, dtype=dtype)
    seen = torch.rand(2, T, generator=torch.Generator().manual_seed(1)) < 0.7
    table = torch.randn(2 * chunk - 1, 1, generator=torch.Generator().manual_seed(2))
    given = {"chunk_size": chunk, "causal": causal, "quad_scale": 0.3, "lin_scale": 0.2}
    more = {"key_mask": seen} if "mask" in how else {}

    def run(tensors, table):
        leaves = [x.clone().requires_grad_() for x in tensors]
        t = table.clone().requires_grad_()
        biased = {"bias_table": t, "bias_index": "toeplitz"} if "table" in how else {}
        return accel.flash_mix(**named(leaves), **given, **biased, **more), leaves, t

    got, leaves, t = run(tensors, table)
    wide = [x.double().requires_grad_() for x in tensors]
    wide_t = table.double().requires_grad_()
    expected = defined(
        *(wide if len(wide) == 6 else [*wide, None]),
        **given,
        bias=bias_of(wide_t, chunk) if "table" in how else None,
        seen=seen if "mask" in how else torch.ones(2, T),
    )
    assert got.dtype == dtype
    assert_close(got, expected, "gau", dtype)
    upstream = testing.running.random_like(got)
    extra = [(t, wide_t)] if "table" in how else []
    mine = torch.autograd.grad(got, leaves + [a for a, _ in extra], upstream, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(
        expected, wide + [b for _, b in extra], upstream.double(), allow_unused=True, materialize_grads=True
    )
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert_close(a, b, "gau_grad", dtype, f"gradient {i}")


def test_default_scales():
    tensors = drawn(40)
    for causal in (False, True):
        asked = accel.flash_mix(
            *tensors, chunk_size=16, causal=causal, quad_scale=1 / 16, lin_scale=1 / 16 if causal else 1 / 40
        )
        assert torch.equal(accel.flash_mix(*tensors, chunk_size=16, causal=causal), asked)


def test_two_parts_joined_by_the_state():
    """The state is that of whole chunks: what follows begins with one."""
    tensors = drawn(53)
    state = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(3))
    whole, after = accel.flash_mix(*tensors, chunk_size=8, causal=True, initial_state=state, return_state=True)
    first, between = accel.flash_mix(
        *[x[:, :16] for x in tensors], chunk_size=8, causal=True, initial_state=state, return_state=True
    )
    second, last = accel.flash_mix(
        *[x[:, 16:] for x in tensors], chunk_size=8, causal=True, initial_state=between, return_state=True
    )
    assert_close(torch.cat([first, second], 1), whole.double(), "gau", torch.float32)
    assert_close(last, after.double(), "gau", torch.float32)
    seen = drawn(53)
    expected = state.double() + seen[3][:, :48].double().mT @ seen[4][:, :48].double()
    assert_close(after, expected, "gau", torch.float32)


def test_packed_sequences_are_as_if_alone():
    tensors = drawn(60, B=1)
    lengths = (7, 0, 24, 29)
    out, states = accel.flash_mix(
        *tensors, chunk_size=8, causal=True, cu_seqlens=cumulative(lengths), return_state=True
    )
    first = 0
    for n, length in enumerate(lengths):
        part = [x[:, first : first + length] for x in tensors]
        alone, state = accel.flash_mix(*part, chunk_size=8, causal=True, return_state=True)
        assert torch.equal(out[:, first : first + length], alone)
        assert torch.equal(states[n : n + 1], state)
        first += length


@pytest.mark.parametrize("causal", [False, True])
def test_masked_keys_do_not_matter(causal):
    tensors = drawn(21)
    seen = torch.ones(2, 21, dtype=torch.bool)
    seen[0, 3] = seen[1, 17:] = False
    clean = accel.flash_mix(*tensors, chunk_size=8, causal=causal, key_mask=seen)
    for x in (tensors[1], tensors[3], tensors[4]):
        x[~seen] = math.nan
    assert torch.equal(accel.flash_mix(*tensors, chunk_size=8, causal=causal, key_mask=seen), clean)


LEAKS = {
    "causal": (43, {"causal": True}),
    "full": (43, {}),
    "masked": (43, {"causal": True, "key_mask": torch.rand(2, 43, generator=torch.Generator().manual_seed(1)) < 0.6}),
    "packed": (43, {"causal": True, "cu_seqlens": cumulative((15, 28))}),
    "packed full": (43, {"cu_seqlens": cumulative((15, 28)), "activation": "sigmoid"}),
}


def seen_pairs(T, given, chunk=8):
    """Which pairs are weighed by their logit and which by the linear part, ``(B, T, T)`` each."""
    at, edges = torch.arange(T), given.get("cu_seqlens")
    sequence = torch.zeros(T, dtype=torch.int64) if edges is None else torch.bucketize(at, edges[1:-1], right=True)
    place = at if edges is None else at - edges[sequence]
    own = (sequence[:, None] == sequence)[None]
    number = place // chunk
    quad = own & (number[:, None] == number)
    linear = own.clone()
    if given.get("causal"):
        quad, linear = quad & (at[:, None] >= at), linear & (number[:, None] > number)
    mask = given.get("key_mask")
    return [x & mask[:, None] if mask is not None else x for x in (quad, linear)]


@pytest.mark.parametrize("level", ["best", "pairs"])
@pytest.mark.parametrize("tensor", ["quad_q", "quad_k", "lin_q", "lin_k", "v", "upstream"])
@pytest.mark.parametrize("name", LEAKS)
def test_what_is_not_finite_reaches_only_who_may_see_it(name, tensor, level):
    T, given = LEAKS[name]
    dtype = torch.bfloat16 if level == "pairs" else torch.float32
    tensors = named(drawn(T, B=1 if "cu_seqlens" in given else 2, dtype=dtype))
    testing.require(accel.flash_mix, "cpu", tensors, given)
    quad, linear = seen_pairs(T, given)
    upstream = testing.random_like(tensors["v"])
    with testing.at_level("avx512_bf16") if level == "pairs" else accel.use():
        run = lambda: testing.run(accel.flash_mix, tensors, {"chunk_size": 8, **given}, "cpu", grad_out=upstream)  # noqa: E731
        clean = run()
        place = 21
        (upstream if tensor == "upstream" else tensors[tensor])[0, place, 1] = math.nan
        got = run()
    by = {"quad_k": quad[0], "lin_k": linear[0], "v": quad[0] | linear[0]}.get(tensor, torch.eye(T, dtype=torch.bool))
    rows = by[:, place]  # that may be touched
    spared = ~rows
    if tensor != "upstream":
        assert got.out[0, rows].isnan().any(-1).all(), "it does not reach who sees it"
        testing.assert_same(got.out[0, spared], clean.out[0, spared], "output")
    keys = {n: (rows[:, None] & x[0]).any(0) for n, x in (("quad_k", quad), ("lin_k", linear))}
    keys["v"] = keys["quad_k"] | keys["lin_k"]
    for n in ("quad_q", "lin_q", "gate", "quad_k", "lin_k", "v"):
        same = ~keys[n] if n in keys else spared
        same[place] = False
        testing.assert_same(got.grads[n][0, same], clean.grads[n][0, same], f"gradient of {n}")
        testing.assert_same(got.grads[n][1:], clean.grads[n][1:], f"gradient of {n} of another")
    if tensor == "upstream":
        for n in ("quad_q", "lin_q", "gate"):
            assert got.grads[n][0, place].isnan().any() or not (quad | linear)[0, place].any()
        assert got.grads["v"][0, keys["v"]].isnan().any(-1).all()


def test_rules_and_index_tensors_of_chunks():
    tensors = drawn(21)
    table = torch.randn(32, 1)
    index = T5Buckets(bidirectional=False)
    rows = index.rows_of(torch.arange(8)[:, None] - torch.arange(8)[None], 32)
    by_rule = accel.flash_mix(*tensors, chunk_size=8, causal=True, bias_table=table, bias_index=index)
    by_tensor = accel.flash_mix(*tensors, chunk_size=8, causal=True, bias_table=table, bias_index=rows)
    assert_close(by_rule, by_tensor.double(), "gau", torch.float32)


def test_compiled_and_under_autocast():
    tensors = [x.requires_grad_() for x in drawn(40)]
    compiled = torch.compile(accel.flash_mix, backend="aot_eager", fullgraph=True)
    expected = accel.flash_mix(*tensors, chunk_size=16, causal=True)
    got = compiled(*tensors, chunk_size=16, causal=True)
    assert_close(got, expected.double(), "gau", torch.float32)
    for a, b in zip(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True):
        assert_close(a, b.double(), "gau_grad", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert accel.flash_mix(*tensors, chunk_size=16).dtype == torch.bfloat16


GOOD = dict(zip(("quad_q", "quad_k", "lin_q", "lin_k", "v"), [zeros(2, 6, n) for n in (8, 8, 8, 8, 16)], strict=True))
BAD = [
    Bad("chunk", ValueError, r"at least 1, got chunk_size=0", {"chunk_size": 0}),
    Bad("activation", ValueError, r"relu2.*got 'gelu'", {"activation": "gelu"}),
    Bad("tokens", ValueError, r"do not fit.*\(2, 7, 16\)", {"v": zeros(2, 7, 16)}),
    Bad("gate", ValueError, r"do not fit.*gate \(2, 6, 8\)", {"gate": zeros(2, 6, 8)}),
    Bad("keys", ValueError, r"queries and keys.*lin_k \(2, 6, 4\)", {"lin_k": zeros(2, 6, 4)}),
    Bad("dims", ValueError, r"quad_k must be \(B, T, size\)", {"quad_k": zeros(2, 1, 6, 8)}),
    Bad("dtypes", TypeError, r"one dtype", {"v": zeros(2, 6, 16, dtype=torch.float16)}),
    Bad("scale", ValueError, r"lin_scale must be finite", {"lin_scale": math.inf}),
    Bad("mask", TypeError, r"boolean", {"key_mask": zeros(2, 6)}),
    Bad("state", ValueError, r"causal order only", {"return_state": True}),
    Bad("state_shape", ValueError, r"\(2, 8, 16\), got torch.float32 \(2, 8, 8\)",
        {"initial_state": zeros(2, 8, 8), "causal": True}),
    Bad("packed", ValueError, r"packed form is", {"cu_seqlens": cumulative((6,))}),
]  # fmt: skip


@each(BAD)
def test_bad_call(bad):
    check_bad(accel.flash_mix, GOOD, bad)


def test_no_tokens():
    tensors = drawn(0)
    state = torch.ones(2, 6, 12)
    out, after = accel.flash_mix(*tensors, causal=True, initial_state=state, return_state=True)
    assert out.shape == (2, 0, 12)
    assert torch.equal(after, state)


@pytest.mark.parametrize("causal", [False, True])
def test_it_takes_less_memory_than_eager_products(causal):
    from accel.benchmarks import flash_mix
    from accel.benchmarks._machine import peak_memory

    shape = flash_mix.Shape("memory", causal, 4096, 1, 64, 512, 128)
    make = flash_mix._inputs(shape, "cpu", torch.bfloat16)
    leaves = [x.requires_grad_() for x in make(torch.Generator().manual_seed(0))]
    testing.require(accel.flash_mix, "cpu", named([x.detach() for x in leaves]), {"causal": causal})
    mine, theirs = (
        peak_memory(lambda f=f: torch.autograd.grad(f(*leaves).sum(), leaves), "cpu")
        for f in (flash_mix.ours(shape), flash_mix.eager(shape))
    )
    if mine is None or theirs is None:
        pytest.skip("what a call needs at its worst moment cannot be known here")
    assert mine < theirs
