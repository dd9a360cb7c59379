"""The weights of softmax attention from the logits of a tile, and the gradients of both."""

from __future__ import annotations

import triton
import triton.language as tl

from accel.kernels._logits import LOG2_E, Head, keep, load_rows, logits, visible

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
FAR: tl.constexpr = tl.constexpr(128.0)  # a log-sum-exp beyond is off by more than 4e-6
FAR_IN_HALF: tl.constexpr = tl.constexpr(1024.0)  # by more than 4e-5, in units of ln 2


@triton.jit
def power(x, BINARY: tl.constexpr):
    """The exponential of what is in the units of the logits."""
    return tl.exp2(x) if BINARY else tl.exp(x)


@triton.jit
def load_sums(lse_ptr, delta_ptr, i, queries, CONFIG: tl.constexpr):
    """What the weights of queries i are relative to, in the units of the logits, and delta.

    Rows past the last and rows that see nothing get +inf and 0, which leaves every weight and its gradient 0.
    """
    lse = tl.load(lse_ptr + i, mask=i < queries, other=float("-inf"))
    delta = tl.load(delta_ptr + i, mask=i < queries, other=0.0)
    UNITS: tl.constexpr = LOG2_E if CONFIG.binary and not CONFIG.adds else 1.0
    nothing = lse == float("-inf")
    return tl.where(nothing, float("inf"), lse * UNITS), tl.where(nothing, 0.0, delta)


@triton.jit
def pair_gradients(raw, grad_p, lse, delta, i, j, i0, j0, head, CONFIG: tl.constexpr, PART: tl.constexpr):
    """Weights after dropout, gradients of the logits and of the product (but for the scale), and who may see whom."""
    s, capped = logits(raw, i, j, i0, j0, head, CONFIG)
    s -= lse
    seen = (i < head.call.queries) & (j < head.call.keys)
    if PART:
        seen = visible(i, j, i0, j0, head, CONFIG)
        s = tl.where(seen, s, float("-inf"))
    p = power(s, CONFIG.binary)
    used = p
    if head.call.inputs.seed is not None:
        keep_scale = head.call.factors.keep_scale
        kept = keep(i, j, head)
        used = tl.where(kept, p * keep_scale, 0.0)
        grad_p = tl.where(kept, grad_p * keep_scale, 0.0)
    grad_s = p * (grad_p - delta)
    if PART:
        grad_s = tl.where(seen, grad_s, 0.0)
    grad_raw = grad_s
    if CONFIG.softcap:
        grad_raw = grad_s * (1.0 - capped * capped)
    return used, grad_s, grad_raw, seen


@triton.jit
def tile_gradient(i0, j0, batch, index, rows, mask_at, call, sides, upstream, CONFIG: tl.constexpr):
    """Gradient of the logits of the tile at ``(i0, j0)`` of a head, 0 where nothing is seen."""
    UNIT: tl.constexpr = CONFIG.unit
    DOT: tl.constexpr = CONFIG.dot
    queries = call.queries
    keys = call.keys
    i = i0 + tl.arange(0, CONFIG.block_m)
    j = j0 + tl.arange(0, CONFIG.block_n)
    q, k, v, grad, group = sides
    q_at = q.ptr + (batch * q.b + index * q.h) * UNIT
    k_at = k.ptr + (batch * k.b + index // group * k.h) * UNIT
    v_at = v.ptr + (batch * v.b + index // group * v.h) * UNIT
    grad_at = grad.ptr + (batch * grad.b + index * grad.h) * UNIT
    q = load_rows(q_at, i, queries, q.t * UNIT, CONFIG.d, CONFIG.block_d, True, DOT)
    k = load_rows(k_at, j, keys, k.t * UNIT, CONFIG.d, CONFIG.block_d, True, DOT)
    raw = tl.dot(q, tl.trans(k), input_precision="ieee")
    grad_o = load_rows(grad_at, i, queries, grad.t * UNIT, CONFIG.e, CONFIG.block_e, True, DOT)
    v = load_rows(v_at, j, keys, v.t * UNIT, CONFIG.e, CONFIG.block_e, True, DOT)
    grad_p = tl.dot(grad_o, tl.trans(v), input_precision="ieee")
    # only now: registers would hold these numbers over the products
    first = (batch * call.heads + index) * queries
    lse, delta = load_sums(upstream.lse + first, upstream.delta + first, i, queries, CONFIG)
    bias_at = batch * call.bias.b + index * call.bias.h
    _used, grad_s, _grad_raw, _seen = pair_gradients(
        raw, grad_p, lse[:, None], delta[:, None], i[:, None], j[None, :], i0, j0,
        Head(call, index, rows, bias_at, mask_at, first), CONFIG, True,
    )  # fmt: skip
    return grad_s
