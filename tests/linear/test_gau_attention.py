"""Gated attention: the common checks on awkward calls, its definition, what its users compute, and bad input."""

import dataclasses
import functools
import itertools
import math
import re
import statistics

import pytest
import torch
import torch.nn.functional as F
from _bad import Bad, check_bad, each, zeros
from _gau_cases import BACKENDS, BEHAVIOUR, CASES, FP32, GRADIENTS, PACKED_BEHAVIOUR, T5, by_name, case
from _pairs import cumulative

import accel
from accel import BlockDiffusion, Grid2D, T5Buckets, testing
from accel.ops.linear.gau_attention import OP
from accel.ops.linear.gau_strips import ACTIVATIONS, BY_PAIR
from accel.testing import assert_close, check_op

# in half precision the reference and the strips compute as in fp32
PLAINLY = [dataclasses.replace(c, dtypes=FP32) for c in CASES]
CHECKS = [
    *check_op(accel.gau_attention, CASES, BEHAVIOUR, GRADIENTS, BACKENDS[:1]),
    *check_op(accel.gau_attention, [*CASES[:6], *PLAINLY[6:]], BEHAVIOUR, [], BACKENDS[1:2]),
    *check_op(accel.gau_attention, PLAINLY, BEHAVIOUR, [], BACKENDS[2:]),
]


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


# the packed form has one batch entry, so that the checks of empty batches and of single entries do not apply
ON_PACKED = [
    testing.check_subsets,
    testing.check_opcheck,
    testing.check_compile,
    testing.check_poison,
    testing.check_repeat,
    testing.check_autocast,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", ON_PACKED, ids=lambda check: check.__name__.removeprefix("check_"))
def test_packed_behaviour(check, backend):
    check(accel.gau_attention, PACKED_BEHAVIOUR, backend)


# --- the definition, pair by pair ---

SIGMA = math.sqrt(1 / (4 * math.pi))
WEIGHTS = {
    "relu2": lambda x: max(x, 0.0) ** 2,
    "laplace": lambda x: 0.5 * (1 + math.erf((x - math.sqrt(0.5)) / (SIGMA * math.sqrt(2)))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


def row_of_weights(activation, logits):
    """Weights of a row from the logits of the keys that it sees."""
    if activation in WEIGHTS:
        return [WEIGHTS[activation](x) for x in logits]
    if activation == "softmax_plus":
        logits = [x * math.log(len(logits)) / math.log(512) for x in logits]
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def definition(q, k, v, gate, activation, *, seen, bias, scale):
    """By loops over float64 tensors; ``seen(i, j)`` and ``bias(h, i, j)`` are functions."""
    B, H, T, _ = q.shape
    group = H // k.shape[1]
    out = torch.zeros(B, H, T, v.shape[3], dtype=torch.float64)
    for b, h, i in itertools.product(range(B), range(H), range(T)):
        keys = [j for j in range(k.shape[2]) if seen(i, j)]
        logits = [scale * float(q[b, h, i] @ k[b, h // group, j]) + bias(h, i, j) for j in keys]
        for weight, j in zip(row_of_weights(activation, logits), keys, strict=True):
            out[b, h, i] += weight * v[b, h // group, j]
    return out if gate is None else out * gate


def drawn(T, S, B=2, H=2, Hkv=None, D=8, E=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = (B, H, T, D), (B, Hkv or H, S, D), (B, Hkv or H, S, E), (B, H, T, E)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("T", "S"), [(7, 7), (4, 9), (9, 4), (1, 6)])
def test_definition(T, S, activation):
    q, k, v, gate = drawn(T, S, Hkv=1)
    table = torch.randn(T + S - 1, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for rules, seen in (
        ({}, lambda i, j: True),
        ({"causal": True, "window": (3, 0)}, lambda i, j: 0 <= i + S - T - j <= 3),
    ):
        got = accel.gau_attention(
            q, k, v, gate, activation=activation, scale=0.7, bias_table=table, bias_index="toeplitz", **rules,
            backend="reference",
        )  # fmt: skip
        expected = definition(
            q, k, v, gate, activation, seen=seen, bias=lambda h, i, j: float(table[i - j + S - 1, h]), scale=0.7
        )
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_the_scale_is_that_of_q():
    q, k, v, _ = drawn(5, 5, D=16)
    got, expected = (accel.gau_attention(q, k, v, scale=s, backend="reference") for s in (None, 0.25))
    assert torch.equal(got, expected)


def test_laplace_is_that_of_mega():
    """Another's normal distribution; a known copy of it has σ = √(π/4) in place of √(1/4π)."""
    x = torch.tensor([0.0, math.sqrt(0.5), 1.0, 2.0, -0.3, -1.0], dtype=torch.float64)
    expected = [statistics.NormalDist(math.sqrt(0.5), SIGMA).cdf(at) for at in x.tolist()]
    got = BY_PAIR["laplace"].weight(x).tolist()
    assert got == pytest.approx(expected, rel=1e-6)
    assert got[0] == pytest.approx(0.0060944, rel=1e-4)


@pytest.mark.parametrize("name", BY_PAIR)
def test_a_slope_is_the_derivative(name):
    x = torch.linspace(-4, 4, 81, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(BY_PAIR[name].weight(x).sum(), x)
    torch.testing.assert_close(BY_PAIR[name].slope(x.detach()), grad)


# --- what its users compute, in their own words ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_gau_of_flash_pytorch(backend):
    """relu²((q·k + t·√dim) / n), t by the buckets of T5, zero where it is masked, then the gate."""
    n, dim = 37, 64
    q, k, v, gate = (x[:, 0] for x in drawn(n, n, D=16, E=24, dtype=torch.float32))
    available(backend, {"q": q, "k": k, "v": v, "gate": gate}, {})
    weight = torch.randn(32, 1, generator=torch.Generator().manual_seed(1))
    for causal in (False, True):
        rule = T5Buckets(bidirectional=not causal)
        distance = torch.arange(n)[:, None] - torch.arange(n)
        bias = weight[rule.rows_of(distance, 32), 0] * dim**0.5
        attn = F.relu((q @ k.mT + bias) / n) ** 2
        if causal:
            attn = attn.masked_fill(distance < 0, 0.0)
        got = accel.gau_attention(
            q,
            k,
            v,
            gate,
            scale=1 / n,
            bias_table=weight * dim**0.5 / n,
            bias_index=rule,
            causal=causal,
            backend=backend,
        )
        assert_close(got, ((attn @ v) * gate).double(), "gau", torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rtmcc_block_of_mmpose(backend):
    """relu²((q·k + w[j − i + n − 1]) / √s)."""
    n, s = 17, 16
    q, k, v, gate = (x[:, 0] for x in drawn(n, n, D=s, E=24, dtype=torch.float32))
    available(backend, {"q": q, "k": k, "v": v, "gate": gate}, {})
    w = torch.randn(2 * n - 1, generator=torch.Generator().manual_seed(1))
    t = F.pad(w, (0, n)).repeat(n)[:-n].reshape(n, 3 * n - 2)  # as rel_pos_bias of the block makes it
    r = (2 * n - 1) // 2
    bias = t[..., r:-r]
    expected = gate * (F.relu((q @ k.mT + bias) / math.sqrt(s)) ** 2 @ v)
    table = w.flip(0)[:, None] / math.sqrt(s)
    got = accel.gau_attention(q, k, v, gate, bias_table=table, bias_index="toeplitz", backend=backend)
    assert_close(got, expected.double(), "gau", torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["relu2", "softmax_plus"])
def test_attention_normalize_of_bert4keras(activation, backend):
    """softmax_plus and relu²/l, l the keys of the row that mask and order leave."""
    q, k, v, gate = (x[:, 0] for x in drawn(23, 23, D=16, E=24, dtype=torch.float32))
    available(backend, {"q": q, "k": k, "v": v, "gate": gate}, {"activation": activation})
    real = torch.arange(23) < torch.tensor([[23], [9]])
    live = real[:, None] & (torch.arange(23)[:, None] >= torch.arange(23))
    count = live.sum(-1, keepdim=True).clamp_min(1)
    a = torch.where(live, q @ k.mT / 4, -1e12)
    rules = {"mask": real[:, None], "causal": True, "backend": backend}
    if activation == "relu2":
        weights = F.relu(a) ** 2 / count
        scaled = gate / count
    else:
        weights = torch.softmax(a * torch.log(count.float()) / math.log(512), -1)
        # with one key all logits are times 0, and masked ones must stay masked
        weights = torch.where(live, weights, 0.0) / torch.where(live, weights, 0.0).sum(-1, keepdim=True)
        scaled = gate
    got = accel.gau_attention(q, k, v, scaled, activation=activation, **rules)
    assert_close(got, (gate * (weights @ v)).double(), "gau", torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax_is_softmax_attention(backend):
    tensors, kwargs = by_name("toeplitz_softmax").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    got = accel.gau_attention(**tensors, **kwargs, backend=backend)
    gate, given = tensors.pop("gate"), {n: x for n, x in kwargs.items() if n != "activation"}
    expected = accel.softmax_attention(**testing.double(tensors), **given, backend="reference") * gate.double()
    assert_close(got, expected, "gau", torch.float32)


# --- numbers ---


def available(backend, tensors, kwargs):
    testing.require(accel.gau_attention, backend, tensors, kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [2048])
def test_small_weights_keep_their_digits_in_fp16(T, backend):
    """Weights of 1.4e-7, of which fp16 has the multiples of 6e-8: 2048 of them must not be off by a fifth."""
    q, k = torch.full((1, 1, 5, 8), 0.5).half(), torch.full((1, 1, T, 8), 0.75).half()
    v, gate = torch.full((1, 1, T, 8), 100.0).half(), torch.ones(1, 1, 5, 8).half()
    given = {"q": q, "k": k, "v": v, "gate": gate}
    scale = 1.23e-4
    available(backend, given, {"scale": scale})
    got = testing.run(accel.gau_attention, given, {"scale": scale}, backend)
    x = scale * 3.0
    assert_close(got.out, torch.full_like(got.out, T * x**2 * 100).double(), "gau", torch.float16)
    assert_close(
        got.grads["v"],
        torch.full((1, 1, T, 8), 5 * x**2, dtype=torch.float64).half().double(),
        "gau_grad",
        torch.float16,
    )


LEAKS = {
    "causal": (41, 41, {"causal": True}),
    "window": (41, 70, {"window": (5, 3), "activation": "laplace"}),
    "padding": (23, 70, {"mask": torch.arange(70).view(1, 1, 1, -1) < torch.tensor([33, 70]).view(2, 1, 1, 1)}),
    "few": (3, 70, {"mask": torch.rand(3, 70, generator=torch.Generator().manual_seed(1)) < 0.5}),
    "few_silu": (2, 70, {"window": (30, 2), "activation": "silu"}),
    "blocks": (44, 44, {"pattern": BlockDiffusion(5), "activation": "softmax"}),
}


def seen_by(arguments, B, T, S):
    """``(B, T, S)``: which pairs a call's masks allow, by the reference on the identity."""
    q, k = torch.zeros(B, 1, T, 8, dtype=torch.float64), torch.zeros(B, 1, S, 8, dtype=torch.float64)
    eye = torch.eye(S, dtype=torch.float64).expand(B, 1, S, S)
    rules = {n: x for n, x in arguments.items() if n != "activation"}
    return accel.gau_attention(q, k, eye, activation="sigmoid", **rules, backend="reference")[:, 0] > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("tensor", ["q", "k", "v"])
@pytest.mark.parametrize("name", LEAKS)
def test_what_is_not_finite_reaches_only_who_may_see_it(name, tensor, value, dtype, backend):
    T, S, arguments = LEAKS[name]
    seen = seen_by(arguments, 2, T, S)
    tensors = dict(zip(("q", "k", "v", "gate"), drawn(T, S, dtype=dtype), strict=True))
    available(backend, tensors, arguments)
    clean = testing.run(accel.gau_attention, tensors, arguments, backend)
    place = T // 2 if tensor == "q" else S // 2
    tensors[tensor] = tensors[tensor].clone()
    tensors[tensor][0, :, place, 1] = value
    got = testing.run(accel.gau_attention, tensors, arguments, backend)
    rows = torch.zeros(2, T, dtype=torch.bool)  # queries whose output or gradient may be touched
    rows[0] = seen[0, :, place] if tensor != "q" else torch.arange(T) == place
    keys = (rows[:, :, None] & seen).any(1)
    assert int((~rows[0]).sum()) > 0, "every query sees the place"
    spared_rows, spared_keys = (~x[:, None].expand(-1, 2, -1) for x in (rows, keys))
    if tensor != "q":
        spared_keys[0, :, place] = False
    assert got.out[~spared_rows].isnan().any(-1).all(), "it does not reach who sees it"
    testing.assert_same(got.out[spared_rows], clean.out[spared_rows], "output")
    for n in ("q", "gate"):
        testing.assert_same(got.grads[n][spared_rows], clean.grads[n][spared_rows], f"gradient of {n}")
    for n in "kv":
        testing.assert_same(got.grads[n][spared_keys], clean.grads[n][spared_keys], f"gradient of {n}")


@pytest.mark.parametrize("tensor", ["q", "k", "v"])
@pytest.mark.parametrize("name", ["causal", "window", "padding", "few"])
def test_what_is_not_finite_in_pairs(name, tensor):
    with testing.at_level("avx512_bf16"):
        test_what_is_not_finite_reaches_only_who_may_see_it(name, tensor, math.nan, torch.bfloat16, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("B", "H", "T", "S"), [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (2, 2, 0, 0)])
def test_nothing_in_nothing_out(B, H, T, S, activation, backend):
    q, k, v, gate = (x.requires_grad_() for x in drawn(T, S, B=B, H=H, dtype=torch.float32))
    how = {"causal": True, "activation": activation}
    available(backend, {"q": q, "k": k, "v": v, "gate": gate}, how)
    out = accel.gau_attention(q, k, v, gate, **how, backend=backend)
    assert torch.equal(out, torch.zeros(B, H, T, 8))
    for x, grad in zip((q, k, v, gate), torch.autograd.grad(out.sum(), (q, k, v, gate)), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


MEMORY = [
    pytest.param(rule, backend, marks=[pytest.mark.slow] if backend == "torch" and rule != "causal" else [])
    for rule in ("toeplitz", "grid", "causal", "softmax_plus")
    for backend in BACKENDS[:-1]
]


@pytest.mark.parametrize(("rule", "backend"), MEMORY)
def test_memory_is_linear_in_the_tokens(rule, backend):
    from accel.benchmarks._machine import peak_memory

    T = 96 * 96
    q, v = (torch.randn(1, T, n).requires_grad_() for n in (16, 32))
    how = {
        "toeplitz": {"bias_table": torch.zeros(2 * T - 1, 1).requires_grad_(), "bias_index": "toeplitz"},
        "grid": {"bias_table": torch.zeros(191 * 191, 1).requires_grad_(), "bias_index": Grid2D(96, 96)},
        "causal": {"causal": True},
        "softmax_plus": {"activation": "softmax_plus"},
    }[rule]
    available(backend, {"q": q, "k": q, "v": v, "gate": v}, how)

    def call():
        accel.gau_attention(q, q, v, v, **how, backend=backend).sum().backward()

    call()
    peak = peak_memory(call, "cpu")
    if peak is None:
        pytest.skip("this system does not tell peak memory")
    square = T * T * 4 / 2**20
    assert peak < square, f"{peak:.1f} MiB where one T·S tensor has {square:.0f}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_a_loop_over_sequences(backend):
    tensors, kwargs = by_name("packed_causal_t5").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    out = accel.gau_attention(**tensors, **kwargs, backend=backend)
    offsets = kwargs.pop("cu_seqlens_q").tolist()
    for start, end in itertools.pairwise(offsets):
        alone = {n: x if n == "bias_table" else x[:, :, start:end] for n, x in testing.double(tensors).items()}
        expected = accel.gau_attention(**alone, **kwargs, backend="reference")
        assert_close(out[:, :, start:end], expected, "gau", torch.float32)


# More tasks than workers: several runs of keys in the backward, several chunks of queries in the forward.
TASKS = [
    case("long", 530, 1100, B=1, D=8, E=136, causal=True, rows=1629, bias_index="toeplitz", dtypes=FP32),
    case("heads", 70, 600, H=4, Hkv=2, D=8, bias=(2, 1, 1, 600), activation="silu", dtypes=FP32),
    case("packed", 530, B=1, D=8, lengths=(300, 0, 1, 229), causal=True, **T5, dtypes=FP32),
]


@pytest.mark.parametrize("given", TASKS, ids=str)
def test_many_tasks(given):
    testing.check_values(accel.gau_attention, given, "cpu", torch.float32)
    testing.check_repeat(accel.gau_attention, given, "cpu")


LEVELS = testing.check_levels(
    accel.gau_attention,
    map(by_name, ["silu", "laplace_causal_bias", "sigmoid_without_gate", "gqa", "value_size_520", "window_causal_300",
                  "packed_causal_t5", "grid_extra", "everything", "exact_bias", "few_queries", "window_laplace",
                  "bias_and_table"]),
)  # fmt: skip


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in LEVELS])
def test_every_instruction_set(check):
    check()


def test_flops_are_counted_the_same_for_every_backend():
    pairs = 2 * 2 * 6 * 19 * 31
    testing.check_flops(accel.gau_attention, by_name("gqa"), BACKENDS, pairs * (16 + 24))
    given = case("some", 19, 31, H=6, Hkv=2)
    testing.check_flops(accel.gau_attention, given, BACKENDS[:-1], pairs * (4 * 16 + 3 * 24), backward=True)


# --- bad input ---

META = {"device": "meta"}
BAD = [
    Bad("unknown_activation", ValueError, re.escape(", ".join(ACTIVATIONS)) + ", got 'gelu'", {"activation": "gelu"}),
    Bad("no_activation", ValueError, "got None", {"activation": None}),
    Bad("no_tensor", TypeError, "q must be a floating point tensor, got list", {"q": [1.0]}),
    Bad("gate_shape", ValueError, r"gate must .*\(2, 4, 6, 16\).*\(2, 4, 7, 16\)", {"gate": zeros(2, 4, 7, 16)}),
    Bad("gate_of_one_head", ValueError, r"\(2, 1, 6, 16\)", {"gate": zeros(2, 1, 6, 16)}),
    Bad("gate_dtype", TypeError, "float32 and .*float16", {"gate": zeros(2, 4, 6, 16, dtype=torch.float16)}),
    Bad("gate_integer", TypeError, "gate .*int64", {"gate": zeros(2, 4, 6, 16, dtype=torch.int64)}),
    Bad("gate_elsewhere", ValueError, "gate is on meta", {"gate": zeros(2, 4, 6, 16, **META)}),
    Bad("gate_without_heads", ValueError, r"axis of heads.*\(2, 6, 16\)", {"gate": zeros(2, 6, 16)}),
    Bad("k_without_heads", ValueError, r"axis of heads.*\(2, 7, 8\)", {"k": zeros(2, 7, 8)}),
    Bad("two_axes", ValueError, r"got .*\(6, 8\)", {n: zeros(6, 8) for n in ("q", "k", "v", "gate")}),
    Bad("sizes", ValueError, r"do not fit: .*\(2, 2, 7, 9\)", {"k": zeros(2, 2, 7, 9)}),
    Bad("heads", ValueError, r"must divide", {"k": zeros(2, 3, 7, 8), "v": zeros(2, 3, 7, 16)}),
    Bad("dtypes", TypeError, "one dtype", {"v": zeros(2, 2, 7, 16, dtype=torch.float16)}),
    Bad("scale", ValueError, "scale=inf", {"scale": math.inf}),
    Bad("dropout", ValueError, "dropout_p=1.0", {"dropout_p": 1.0}),
    Bad("mask_float", TypeError, "mask must be boolean", {"mask": zeros(6, 7)}),
    Bad("bias_shape", ValueError, r"\(2, 4, 6, 7\)", {"bias": zeros(6, 8)}),
    Bad("index_word", ValueError, "got 'circulant'", {"bias_table": zeros(12, 4), "bias_index": "circulant"}),
    Bad("packed_batch", ValueError, r"\(1, H, total, D\)", {"cu_seqlens_q": cumulative([6])}),
    Bad("backend_refuses", NotImplementedError, "not softmax", {"activation": "softmax", "backend": "cpu"}),
    Bad(
        "backend_refuses_v",
        NotImplementedError,
        "multiple of 8 up to 8192, not 12",
        {"v": zeros(2, 2, 7, 12), "gate": None, "backend": "cpu"},
    ),
    Bad(
        "backend_refuses_q",
        NotImplementedError,
        "multiple of 4 up to 512, not 10",
        {"q": zeros(2, 4, 6, 10), "k": zeros(2, 2, 7, 10), "backend": "cpu"},
    ),
    Bad("no_such_backend", ValueError, "no backend 'cuda9'; it has", {"backend": "cuda9"}),
]


@each(BAD)
def test_bad_input(bad):
    good = {"q": zeros(2, 4, 6, 8), "k": zeros(2, 2, 7, 8), "v": zeros(2, 2, 7, 16), "gate": zeros(2, 4, 6, 16)}
    check_bad(accel.gau_attention, good, bad)


@pytest.mark.parametrize("backend", BACKENDS[:-1])
def test_a_backend_says_what_it_does_not_compute(backend):
    wide = functools.partial(zeros, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"not torch\.float64"):
        accel.gau_attention(wide(1, 4, 8), wide(1, 4, 8), wide(1, 4, 8), backend=backend)


def test_without_heads_is_one_head():
    tensors, kwargs = by_name("without_heads").make(torch.float32, "cpu", 0)
    out = accel.gau_attention(**tensors, **kwargs)
    with_heads = {n: x.unsqueeze(1) for n, x in tensors.items()}
    assert torch.equal(accel.gau_attention(**with_heads, **kwargs), out.unsqueeze(1))
    assert OP.prepare(**tensors, **kwargs).mask.shape == (2, 1, 37, 41)
