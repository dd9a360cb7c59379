"""Softmax attention: the common checks on awkward calls, the log-sum-exp, what must not leak, dropout and memory."""

import dataclasses
import functools
import math

import pytest
import torch
from _attention_calls import BACKENDS, drawn
from _attention_cases import (
    BEHAVIOUR,
    CASES,
    FOURS,
    FP32,
    GRADIENTS,
    PACKED,
    PACKED_BEHAVIOUR,
    SCORES,
    available,
    by_name,
)
from _pairs import cumulative, random_index

import accel
from accel import BlockCausal, BlockDiffusion, T5Buckets, dispatch, testing
from accel.ops.attention.softmax_attention import OP
from accel.testing import assert_close, check_op

# in half precision the reference computes as in fp32
PLAINLY = [dataclasses.replace(c, dtypes=c.dtypes if c in SCORES else FP32) for c in CASES]
CHECKS = [
    *check_op(accel.softmax_attention, [*CASES, *FOURS], BEHAVIOUR, GRADIENTS, BACKENDS[:1]),
    *check_op(accel.softmax_attention, PLAINLY, BEHAVIOUR, [], BACKENDS[1:]),
]


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


@pytest.mark.parametrize("call", FOURS, ids=str)
def test_heads_in_multiples_of_four_are_not_left_to_the_reference(call):
    """The checks above would skip them."""
    available("cpu", *by_name("plain").make(torch.float32, "cpu", 0))  # else the extension is not there
    for dtype in call.dtypes:
        tensors, kwargs = call.make(dtype, "cpu", 0)
        assert dispatch.select(OP, OP.prepare(**tensors, **kwargs)).name == "cpu"


# --- what the harness does not reach by itself: packed behaviour, and the gradient through the log-sum-exp ---

# the packed form has one batch entry, so that the checks of empty batches and of single entries do not apply
ON_PACKED = [
    testing.check_subsets,
    testing.check_opcheck,
    testing.check_compile,
    testing.check_poison,
    testing.check_repeat,
    testing.check_checkpoint,
    testing.check_autocast,
]


def test_packed_strides():
    testing.check_strides(accel.softmax_attention, PACKED_BEHAVIOUR, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", ON_PACKED, ids=lambda check: check.__name__.removeprefix("check_"))
def test_packed_behaviour(check, backend):
    check(accel.softmax_attention, PACKED_BEHAVIOUR, backend)


@functools.wraps(accel.softmax_attention)
def with_lse(*args, **kwargs):
    """Output and log-sum-exp as one tensor, so that both have an upstream gradient."""
    out, lse = accel.softmax_attention(*args, **kwargs, return_lse=True)
    return torch.cat([out, lse[..., None].to(out.dtype)], -1)


def apart(x, name, kwargs):
    return {"out": x[..., :-1], "lse": x[..., -1]} if name == "out" else {name: x}


LSE_CASES = [
    "plain", "gqa_3", "causal_more_queries", "rows_without_keys", "no_keys_at_all", "packed_cross_causal",
    "bias_full", "toeplitz_more_keys", "alibi_and_grid", "index", "softcap", "sinks_rows_without_keys",
    "dropout_causal_gqa", "everything", "everything_packed", "huge_bias", "least_bias_of_left_keys",
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LSE_CASES)
def test_gradient_through_the_log_sum_exp(name, backend):
    given = dataclasses.replace(by_name(name), split=apart)
    for dtype in testing.KERNEL_DTYPES if name in ("plain", "toeplitz_more_keys") else FP32:
        testing.check_values(with_lse, given, backend, dtype)


def test_derivative_of_the_log_sum_exp():
    testing.check_gradcheck(with_lse, GRADIENTS[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", [*LSE_CASES, "large_logits", "very_negative", "value_size_128", "sinks_minus_inf"])
def test_log_sum_exp(name, dtype, backend):
    tensors, kwargs = by_name(name).make(dtype, "cpu", 0)
    available(backend, tensors, kwargs)
    lse = OP.backend(backend).forward(*OP.prepare(**tensors, **kwargs))[1]
    expected = OP.backend("reference").forward(*OP.prepare(**testing.double(tensors), **kwargs))[1]
    assert lse.dtype == torch.float32
    assert_close(lse, expected, "lse", torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys_pass_no_gradient(backend):
    tensors, kwargs = by_name("rows_without_keys").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    tensors = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    out, lse = accel.softmax_attention(**tensors, **kwargs, return_lse=True, backend=backend)
    assert torch.equal(out[:, :, ::3], torch.zeros_like(out[:, :, ::3]))
    assert (lse[:, :, ::3] == -math.inf).all()
    assert lse[:, :, 1::3].isfinite().all()
    lse.square().sum().backward()  # sends −∞ to those rows
    for name in "qk":
        assert tensors[name].grad.isfinite().all(), f"gradient of {name}"
    assert torch.equal(tensors["q"].grad[:, :, ::3], torch.zeros_like(out[:, :, ::3]))
    assert tensors["q"].grad[:, :, 1].abs().min() > 0


# --- what must not leak ---


def rule_seen(arguments, B, T, S):
    """``(B, T, S)``: which pairs a call's masks allow, from the reference's own weights on the identity."""
    q, k = torch.zeros(B, 1, T, 8, dtype=torch.float64), torch.zeros(B, 1, S, 8, dtype=torch.float64)
    eye = torch.eye(S, dtype=torch.float64).expand(B, 1, S, S)
    return accel.softmax_attention(q, k, eye, **arguments, backend="reference")[:, 0] > 0


LEAKS = {
    "causal": (2, 41, 41, {"causal": True}),
    "window": (2, 41, 70, {"window": (5, 3)}),
    "padding": (2, 23, 70, {"mask": torch.arange(70).view(1, 1, 1, -1) < torch.tensor([33, 70]).view(2, 1, 1, 1)}),
    "dense": (2, 23, 37, {"mask": torch.rand(2, 1, 23, 37, generator=torch.Generator().manual_seed(0)) < 0.1}),
    "blocks": (1, 44, 44, {"pattern": BlockDiffusion(5)}),
    "packed": (1, 67, 67, {"cu_seqlens_q": cumulative(PACKED["lengths"]), "causal": True}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("tensor", ["q", "k", "v"])
@pytest.mark.parametrize("name", LEAKS)
def test_what_is_not_finite_reaches_only_who_may_see_it(name, tensor, value, dtype, backend):
    B, T, S, arguments = LEAKS[name]
    seen = rule_seen(arguments, B, T, S)
    tensors = {n: t.to(dtype) for n, t in zip("qkv", drawn(T, S, B=B, E=8), strict=True)}
    available(backend, tensors, arguments)
    bias = {"alibi_slopes": torch.tensor([0.1, 0.2])} if name != "dense" else {}
    clean = testing.run(accel.softmax_attention, {**tensors, **bias}, arguments, backend, "qkv")
    place = T // 2 if tensor == "q" else S // 2
    tensors[tensor] = tensors[tensor].clone()
    tensors[tensor][0, :, place, 1] = value
    got = testing.run(accel.softmax_attention, {**tensors, **bias}, arguments, backend, "qkv")
    rows = torch.zeros(B, T, dtype=torch.bool)  # queries whose output or gradient may be touched
    rows[0] = seen[0, :, place] if tensor != "q" else torch.arange(T) == place
    keys = (rows[:, :, None] & seen).any(1)
    assert int((~rows[0]).sum()) > 0, "every query sees the place"
    spared_rows, spared_keys = (~x[:, None].expand(-1, 2, -1) for x in (rows, keys))
    if tensor != "q":
        spared_keys[0, :, place] = False
    if math.isnan(value):
        assert got.out[~spared_rows].isnan().any(-1).all(), "it does not reach who sees it"
    testing.assert_same(got.out[spared_rows], clean.out[spared_rows], "output")
    testing.assert_same(got.grads["q"][spared_rows], clean.grads["q"][spared_rows], "gradient of q")
    for n in "kv":
        testing.assert_same(got.grads[n][spared_keys], clean.grads[n][spared_keys], f"gradient of {n}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything(backend):
    """Keys that nobody sees hold NaN: output, gradients and those of bias, table and sinks are as without them."""
    tensors, kwargs = by_name("everything").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    tensors["mask"][..., 30:] = False
    clean = testing.run(accel.softmax_attention, tensors, kwargs, backend)
    dirty = {**tensors, "k": tensors["k"].clone(), "v": tensors["v"].clone()}
    for n in "kv":
        dirty[n][:, :, 30:] = math.nan
    got = testing.run(accel.softmax_attention, dirty, kwargs, backend)
    for key, value in clean.named().items():
        testing.assert_same(got.named()[key], value, key)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_skips_hidden_values(backend):
    """One query, whose keys a kernel may read where they lie: what is hidden and not finite does not reach it."""
    q, k, v = (torch.randn(2, 2, n, 16) for n in (1, 40, 40))
    mask = (torch.arange(40) < 30).view(1, 1, 1, 40)
    available(backend, {"q": q, "k": k, "v": v}, {"mask": mask})
    clean = accel.softmax_attention(q, k, v, mask=mask, backend=backend)
    for x in (k, v):
        x[:, :, 30:] = math.nan
    testing.assert_same(accel.softmax_attention(q, k, v, mask=mask, backend=backend), clean, "out")


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_sees_a_key_that_is_not_finite(backend):
    """Also one whose product is −∞, which would hide it."""
    q, k, v = torch.ones(1, 1, 1, 16), torch.ones(1, 1, 40, 16), torch.ones(1, 1, 40, 16)
    k[:, :, 7, 3] = -math.inf
    assert accel.softmax_attention(q, k, v, backend=backend).isnan().all()


# --- outputs, dropout, memory ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_is_fresh(backend):
    tensors, kwargs = by_name("one_projection").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    before = {n: t.clone() for n, t in tensors.items()}
    out, lse = accel.softmax_attention(**tensors, **kwargs, return_lse=True, backend=backend)
    out.zero_()
    lse.zero_()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), f"{name} changed with the output"


def test_output_lies_in_memory_as_q_does():
    for name in ("plain", "heads_inside_tokens"):
        tensors, kwargs = by_name(name).make(torch.float32, "cpu", 0)
        available("cpu", tensors, kwargs)
        out = accel.softmax_attention(**tensors, **kwargs, backend="cpu")
        turned = out.transpose(1, 2) if name == "heads_inside_tokens" else out
        assert turned.is_contiguous(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_the_stated_share_and_the_expectation(backend):
    # q and k are 0 and v is 1: an output is the share of the weights kept, over 1 − p
    q, v = torch.zeros(2, 4, 128, 8), torch.ones(2, 4, 64, 8)
    k = torch.zeros(2, 4, 64, 8)
    kwargs = {"dropout_p": 0.3}
    available(backend, {"q": q, "k": k, "v": v}, kwargs)
    torch.manual_seed(0)
    out = accel.softmax_attention(q, k, v, **kwargs, backend=backend)
    assert torch.equal(out[..., :1].expand_as(out), out), "a weight is dropped for all channels of its value"
    kept = out[..., 0] * 0.7 * 64
    assert_close(kept, kept.round(), "softmax", torch.float32)
    draws = kept.numel() * 64
    assert abs(kept.sum().item() / draws - 0.7) < 5 * math.sqrt(0.7 * 0.3 / draws)  # five standard deviations
    assert kept.std() > 0.5 * math.sqrt(64 * 0.7 * 0.3), "rows are drawn alike"
    assert not torch.equal(accel.softmax_attention(q, k, v, **kwargs, backend=backend), out), "the same seed twice"
    torch.manual_seed(0)
    repeated = accel.softmax_attention(q, k, v, **kwargs, backend=backend)
    testing.assert_same(repeated, out, "the generator's seed repeats the draw")


@pytest.mark.parametrize("rule", ["toeplitz", "t5", "alibi", "tensor", "window"])
def test_memory_is_linear_in_the_tokens(rule):
    from accel.benchmarks._machine import peak_memory

    T, heads = 2048, 4
    q = torch.randn(1, heads, T, 16).requires_grad_()
    how = {
        "toeplitz": {"bias_table": torch.zeros(2 * T - 1, heads).requires_grad_(), "bias_index": "toeplitz"},
        "t5": {"bias_table": torch.zeros(32, heads).requires_grad_(), "bias_index": T5Buckets()},
        "alibi": {"alibi_slopes": torch.zeros(heads).requires_grad_()},
        "tensor": {"bias_table": torch.zeros(9, heads).requires_grad_(), "bias_index": random_index(T, T, 9).int()},
        "window": {"window": (300, 0), "pattern": BlockCausal(64), "sinks": torch.zeros(heads).requires_grad_()},
    }[rule]
    available("cpu", {"q": q, "k": q, "v": q}, how)

    def call():
        accel.softmax_attention(q, q, q, **how, backend="cpu").sum().backward()

    call()
    peak = peak_memory(call, "cpu")
    if peak is None:
        pytest.skip("this system does not tell peak memory")
    square = heads * T * T * 4 / 2**20
    assert peak < square / 4, f"{peak:.1f} MiB where one T·S tensor has {square:.0f}"


LEVELS = testing.check_levels(
    accel.softmax_attention,
    map(
        by_name,
        [
            *("plain", "gqa_3", "head_size_40", "t5", "index", "everything", "everything_packed", "exact_bias"),
            *("huge_bias", "least_softcap", "head_size_20", "head_size_36"),
        ],
    ),
)


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in LEVELS])
def test_every_instruction_set(check):
    check()


def test_flops_are_counted_the_same_for_every_backend():
    expected = 2 * 2 * 4 * 21 * 34 * (8 + 72)
    testing.check_flops(accel.softmax_attention, by_name("value_size_larger"), BACKENDS, expected)
