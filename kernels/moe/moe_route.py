"""Routing in Triton, a token a program: scores, the choice of groups and of experts, and the weights in one launch.

Experts are compared by 64-bit keys: the number's order in the upper half, below it the index, so that the largest key
is the best expert and, of equal ones, the first. A NaN comes below every number, what does not take part below that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.backends import KERNEL_DTYPES, why_not_gpu
from accel.kernels import _launch
from accel.kernels._launch import Launch
from accel.ops.moe.moe_route import SCORES, SOFTMAX_TOPK

INTS = ["experts", "groups", "chosen_groups"]
"""Integers on whose values no kernel is specialised."""
MOST = 4096
"""Experts of a token, which a program holds in registers."""

_NOTHING = tl.constexpr(-(2**63))


@dataclass(frozen=True)
class Config:
    """What a kernel is compiled for."""

    score: str
    top_k: int
    block_x: int
    block_k: int
    block_g: int = 1
    grouped: bool = False
    top2_sum: bool = False
    renormalize: bool = False


@triton.jit
def _keys(x, index, exists):
    """Keys in the order of the numbers, of equal ones the lower index first."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    order = tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), -(2**31) + 1)
    return tl.where(exists, (order.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64), _NOTHING)


@triton.jit
def _index_of(key):
    return (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def _at(x, where):
    """The one number of ``x`` that is there; what else ``x`` holds does not matter."""
    return tl.sum(tl.where(where, x, 0.0), 0)


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _elementwise(x, SCORE: tl.constexpr):
    """The score of a logit where it depends on no other."""
    if SCORE == "sigmoid":
        return _sigmoid(x)
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    # ln(1 + e) as ln(u) · e / (u − 1): what u lost of e in rounding is in both
    small = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    root = tl.sqrt(tl.where(x > 0.0, x, 0.0) + small)
    return tl.where(x != x, x, tl.where(x < -40.0, tl.exp(x * 0.5), root))


@triton.jit
def _exponentials(x, exists):
    """e^(x − largest), and its sums with and without what is NaN."""
    numbers = tl.where(exists & (x == x), x, float("-inf"))
    e = tl.where(exists, tl.exp(x - tl.max(numbers, 0)), 0.0)
    return e, tl.sum(e, 0), tl.sum(tl.where(e == e, e, 0.0), 0)


@triton.jit(do_not_specialize=INTS)
def forward_kernel(
    weights_ptr, indices_ptr, logits_ptr, bias_ptr, experts, groups, chosen_groups, eps, scale, CONFIG: tl.constexpr
):  # fmt: skip
    """A token."""
    SCORE: tl.constexpr = CONFIG.score
    K: tl.constexpr = CONFIG.top_k
    BLOCK_X: tl.constexpr = CONFIG.block_x
    BLOCK_K: tl.constexpr = CONFIG.block_k
    BLOCK_G: tl.constexpr = CONFIG.block_g
    t = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, BLOCK_X)
    exists = x < experts
    logits = tl.load(logits_ptr + t * experts + x, mask=exists, other=float("-inf")).to(tl.float32)
    if SCORE == "softmax":
        scores, total, numbers = _exponentials(logits, exists)
        compared = scores / numbers
        scores = scores / total
    elif SCORE == "softmax_topk":
        scores = logits
        compared = logits
    else:
        scores = _elementwise(logits, SCORE)
        compared = scores
    by = logits
    if bias_ptr is not None:
        compared += tl.load(bias_ptr + x, mask=exists, other=0.0)
        by = compared
    if CONFIG.grouped:
        size = experts // groups
        of = x // size
        g = tl.arange(0, BLOCK_G)
        keys = _keys(compared, x, exists)
        values = tl.zeros((BLOCK_G,), tl.float32)
        for i in range(groups):
            mine = tl.where(of == i, keys, _NOTHING)
            best = tl.max(mine, 0)
            value = _at(compared, x == _index_of(best))
            if CONFIG.top2_sum:
                second = tl.max(tl.where(mine == best, _NOTHING, mine), 0)
                if second != _NOTHING:
                    value += _at(compared, x == _index_of(second))
            values = tl.where(g == i, value, values)
        order = _keys(values, g, g < groups)
        allowed = x < 0
        for _ in range(chosen_groups):
            best = tl.max(order, 0)
            order = tl.where(order == best, _NOTHING, order)
            allowed = allowed | (of == _index_of(best))
        exists = exists & allowed
    keys = _keys(by, x, exists)
    k = tl.arange(0, BLOCK_K)
    indices = tl.zeros((BLOCK_K,), tl.int32)
    weights = tl.zeros((BLOCK_K,), tl.float32)
    for i in range(K):
        best = tl.max(keys, 0)
        keys = tl.where(keys == best, _NOTHING, keys)
        index = _index_of(best)
        indices = tl.where(k == i, index, indices)
        weights = tl.where(k == i, _at(scores, x == index), weights)
    if SCORE == "softmax_topk":
        weights, total, _ = _exponentials(weights, k < K)
        weights = weights / total
    elif CONFIG.renormalize:
        weights = weights / (tl.sum(weights, 0) + eps)
    tl.store(weights_ptr + t * K + k, weights * scale, mask=k < K)
    tl.store(indices_ptr + t * K + k, indices.to(tl.int64), mask=k < K)


@triton.jit(do_not_specialize=INTS)
def backward_kernel(
    grad_logits_ptr, grad_weights_ptr, indices_ptr, logits_ptr, experts, eps, scale, CONFIG: tl.constexpr
):
    """The gradient of a token's logits."""
    SCORE: tl.constexpr = CONFIG.score
    K: tl.constexpr = CONFIG.top_k
    BLOCK_X: tl.constexpr = CONFIG.block_x
    BLOCK_K: tl.constexpr = CONFIG.block_k
    t = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, BLOCK_X)
    k = tl.arange(0, BLOCK_K)
    exists = x < experts
    indices = tl.load(indices_ptr + t * K + k, mask=k < K, other=-1)
    there = (indices >= 0) & (indices < experts)
    grads = tl.load(grad_weights_ptr + t * K + k, mask=k < K, other=0.0) * scale
    chosen = tl.load(logits_ptr + t * experts + indices, mask=there, other=float("-inf")).to(tl.float32)
    row = tl.zeros((BLOCK_X,), tl.float32)
    if SCORE == "softmax":
        logits = tl.load(logits_ptr + t * experts + x, mask=exists, other=float("-inf")).to(tl.float32)
        row, total, _ = _exponentials(logits, exists)
        row = row / total
        numbers = tl.where(exists & (logits == logits), logits, float("-inf"))
        scores = tl.where(there, tl.exp(chosen - tl.max(numbers, 0)) / total, 0.0)
    elif SCORE == "softmax_topk":
        scores, total, _ = _exponentials(chosen, there)
        scores = scores / total
    else:
        scores = tl.where(there, _elementwise(chosen, SCORE), 0.0)
    if CONFIG.renormalize:
        total = tl.sum(scores, 0) + eps
        grads = tl.where(there, (grads - tl.sum(grads * (scores / total), 0)) / total, 0.0)
    if SCORE == "sigmoid":
        grads = grads * scores * _sigmoid(-chosen)
    elif SCORE == "sqrt_softplus":
        slope = _sigmoid(chosen) / (2.0 * tl.where(chosen < -40.0, 1.0, scores))
        grads = grads * tl.where(chosen < -40.0, scores * 0.5, slope)
    else:
        dot = tl.sum(grads * scores, 0)
        grads = scores * (grads - dot)
        row = row * -dot
    for i in range(K):
        index = tl.sum(tl.where(k == i, indices, 0), 0)
        row = tl.where(x == index, _at(grads, k == i), row)
    tl.store(grad_logits_ptr + t * experts + x, row.to(grad_logits_ptr.dtype.element_ty), mask=exists)


# --- launches: a warp for each 256 experts, which is not measured ---


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtypes are judged by the op. ``torch.compile`` traces through this."""
    reason = why_not_gpu(args.logits, _launch.INTERPRETING)
    if reason is not None:
        return reason
    tokens, experts = args.logits.shape
    if experts > MOST:
        return f"it holds up to {MOST} experts of a token, not {experts}"
    if tokens >= 2**31:
        return f"{tokens} tokens are more than one launch can number"
    return None


def _config(experts: int, top_k: int, score: str, **more: Any) -> tuple[Config, int]:
    block = triton.next_power_of_2(experts)
    return Config(score, top_k, block, triton.next_power_of_2(top_k), **more), max(1, min(8, block // 256))


def _forward_launch(
    weights: Tensor, indices: Tensor, logits: Tensor, bias: Tensor | None, top_k: int, score: str, num_groups: int,
    topk_groups: int, group_score: str, renormalize: bool, eps: float, scale: float,
) -> Launch:  # fmt: skip
    tokens, experts = logits.shape
    more = {"grouped": num_groups > 1, "block_g": triton.next_power_of_2(num_groups), "renormalize": renormalize}
    config, warps = _config(experts, top_k, score, top2_sum=num_groups > 1 and group_score == "top2_sum", **more)
    return _launch.launch(
        forward_kernel, tokens, warps, weights_ptr=weights, indices_ptr=indices, logits_ptr=logits, bias_ptr=bias,
        experts=experts, groups=num_groups, chosen_groups=topk_groups, eps=eps, scale=scale, CONFIG=config,
    )  # fmt: skip


def _backward_launch(
    grad_logits: Tensor, grad_weights: Tensor, indices: Tensor, logits: Tensor, top_k: int, score: str,
    renormalize: bool, eps: float, scale: float,
) -> Launch:  # fmt: skip
    tokens, experts = logits.shape
    config, warps = _config(experts, top_k, score, renormalize=renormalize and score != SOFTMAX_TOPK)
    return _launch.launch(
        backward_kernel, tokens, warps, grad_logits_ptr=grad_logits, grad_weights_ptr=grad_weights, indices_ptr=indices,
        logits_ptr=logits, experts=experts, eps=eps, scale=scale, CONFIG=config,
    )  # fmt: skip


def forward(logits: Tensor, bias: Tensor | None, top_k: int, *rest: Any) -> tuple[Tensor, Tensor]:
    """Weights and indices; arguments are the fields of ``accel.ops.moe.moe_route.Args``."""
    size = (logits.shape[0], top_k)
    with _launch.device_of(logits):
        weights = torch.empty(size, dtype=torch.float32, device=logits.device)
        indices = torch.empty(size, dtype=torch.int64, device=logits.device)
        _forward_launch(weights, indices, logits, bias, top_k, *rest).run()
    return weights, indices


def backward(
    grad_weights: Tensor, indices: Tensor, logits: Tensor, bias: Tensor | None, top_k: int, score: str, num_groups: int,
    topk_groups: int, group_score: str, renormalize: bool, eps: float, scale: float,
) -> Tensor:  # fmt: skip
    """The gradient of the logits."""
    with _launch.device_of(logits):
        grad = torch.empty(logits.shape, dtype=_launch.store_dtype(logits.dtype), device=logits.device)
        _backward_launch(grad, grad_weights, indices, logits, top_k, score, renormalize, eps, scale).run()
    return grad.to(logits.dtype)


def compile_cases() -> Iterator[_launch.CompileCase]:
    """Forward and backward on tensors that have shapes only."""
    kinds = itertools.product((*SCORES, SOFTMAX_TOPK), ((256, 8, 8, 4), (60, 4, 1, 1)))
    cases = [(torch.float32, score, sizes) for score, sizes in kinds]
    cases += [(dtype, "softmax", (MOST, 32, 1, 1)) for dtype in KERNEL_DTYPES]
    for dtype, score, (experts, top_k, groups, chosen) in cases:
        logits = torch.empty((4096, experts), dtype=dtype, device="meta")
        bias = torch.empty(experts, device="meta") if groups > 1 else None
        weights = torch.empty((4096, top_k), device="meta")
        indices = torch.empty((4096, top_k), dtype=torch.int64, device="meta")
        name = f"{str(dtype)[6:]} {score} {top_k} of {experts}, {groups} groups"
        rest = (top_k, score, groups, chosen, "top2_sum", True, 1e-20, 1.0)
        yield _forward_launch(weights, indices, logits, bias, *rest).case(name)
        yield _backward_launch(logits, weights, indices, logits, top_k, score, True, 1e-20, 1.0).case(name)
