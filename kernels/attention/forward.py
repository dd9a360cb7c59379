"""The forward kernel of softmax attention: the online softmax.

A program owns a tile of queries and keeps, for each of them, the largest logit so far, the sum of the weights and the
output, both relative to that logit, while it visits the tiles of keys. A head's sink, which has no value, enters last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from accel.kernels._logits import (
    LEAST,
    LOG2_E,
    Call,
    Grid,
    Head,
    KeySide,
    Plane,
    clean,
    is_finite,
    keep,
    load_rows,
    logits,
    own_tile,
    rows_of,
    store_rows,
    visible,
)
from accel.kernels._pairs import LAUNCH_INTS
from accel.kernels._spans import full_at, full_length, half, key_spans, part_at, part_length
from accel.kernels.attention.weights import FAR, FAR_IN_HALF, LN_2, power


@triton.jit
def _attend(
    state, q, key_side, i, i0, j0, head,
    CONFIG: tl.constexpr, BLOCK_N: tl.constexpr, PLAIN: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the tile of keys at ``j0``.

    With PLAIN the logits are products and no more, and stay in their units: the change of units is part of the
    subtraction then.
    """
    BINARY: tl.constexpr = CONFIG.binary
    DOT: tl.constexpr = CONFIG.dot
    o, total, top = state
    keys = head.call.keys
    j = j0 + tl.arange(0, BLOCK_N)
    k = load_rows(key_side.k, j, keys, key_side.k_step, CONFIG.d, CONFIG.block_d, PART, DOT)
    raw = tl.dot(q, tl.trans(k), input_precision="ieee")
    raw += raw * 0.0  # an infinite product becomes NaN, as −inf would pass for a key that is not seen
    if PLAIN:
        s = raw
        unit = head.call.factors.scale * LOG2_E
    else:
        s, _capped = logits(raw, i[:, None], j[None, :], i0, j0, head, CONFIG)
    if PART:
        seen = visible(i[:, None], j[None, :], i0, j0, head, CONFIG)
        s = tl.where(seen, s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
    if PLAIN:
        shrink = tl.exp2((top - base) * unit)
        p = tl.exp2(s * unit - (base * unit)[:, None])
    else:
        shrink = power(top - base, BINARY)
        p = power(s - base[:, None], BINARY)
    total = total * shrink + tl.sum(p, 1)
    if head.call.inputs.seed is not None:
        p = tl.where(keep(i[:, None], j[None, :], head), p * head.call.factors.keep_scale, 0.0)
    v = load_rows(key_side.v, j, keys, key_side.v_step, CONFIG.e, CONFIG.block_e, PART, DOT)
    if PART:
        v, bad = clean(v)
        p = tl.where(seen & bad[None, :], float("nan"), p)
    o = tl.dot(p.to(DOT), v, o * shrink[:, None], input_precision="ieee")
    return o, total, higher


@triton.jit(do_not_specialize=LAUNCH_INTS)
def forward_kernel(
    out_ptr, lse_ptr, peak_ptr, sinks_ptr, worst_ptr, inputs,
    out_b, out_h, out_t, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s,
    bias_b, bias_h, bias_t, bias_s, mask_b, mask_h, mask_t, mask_s, rows_b,
    batches, heads, group, together, queries, keys, line_length, table_rows, grid_h, grid_w, extra, threshold,
    factors, CONFIG: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a tile of queries of a head, and what its weights are computed again from.

    Where there is a ``worst_ptr`` to a finite number, everything is left as it is.
    """
    if worst_ptr is not None:  # noqa: SIM102  both sides of "and" are compiled
        if is_finite(tl.load(worst_ptr)):
            return
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_E: tl.constexpr = CONFIG.block_e
    PART_N: tl.constexpr = half(CONFIG.block_n)
    UNIT: tl.constexpr = CONFIG.unit
    BINARY: tl.constexpr = CONFIG.binary
    tiles = tl.cdiv(queries, BLOCK_M)
    tile, unit = own_tile(tl.program_id(0), tiles, together, batches * heads)
    i0 = (tiles - 1 - tile) * BLOCK_M  # the last tiles have most to do under a causal rule
    index = (unit % heads).to(tl.int64)
    batch = (unit // heads).to(tl.int64)
    i = i0 + tl.arange(0, BLOCK_M)
    bias, mask = Plane(bias_b, bias_h, bias_t, bias_s), Plane(mask_b, mask_h, mask_t, mask_s)
    grid = Grid(grid_h, grid_w, extra)
    call = Call(inputs, factors, bias, mask, heads, queries, keys, line_length, table_rows, grid, threshold)
    head = Head(
        call=call,
        index=index,
        rows=rows_of(call, batch, rows_b),
        bias_at=batch * bias_b + index * bias_h,
        mask_at=batch * mask_b + index * mask_h,
        first=(batch * heads + index) * queries,
    )
    key_side = KeySide(
        k=inputs.k + (batch * k_b + index // group * k_h) * UNIT,
        v=inputs.v + (batch * v_b + index // group * v_h) * UNIT,
        k_step=k_s * UNIT,
        v_step=v_s * UNIT,
    )
    q_at = inputs.q + (batch * q_b + index * q_h) * UNIT
    q = load_rows(q_at, i, queries, q_t * UNIT, CONFIG.d, CONFIG.block_d, True, CONFIG.dot)
    o = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    spans = key_spans(i0, call, head.rows, CONFIG)
    # not pipelined, and nothing hoisted: with the masks' operands that would not fit the registers
    for offset in tl.range(0, part_length(spans), PART_N, num_stages=1, disable_licm=True):
        j0 = part_at(spans, offset)
        o, total, top = _attend((o, total, top), q, key_side, i, i0, j0, head, CONFIG, PART_N, PLAIN, True)
    if inputs.mask is None:
        for offset in tl.range(0, full_length(spans), BLOCK_N, disable_licm=True):
            j0 = full_at(spans, offset)
            o, total, top = _attend((o, total, top), q, key_side, i, i0, j0, head, CONFIG, BLOCK_N, PLAIN, False)
    if PLAIN:
        top *= factors.scale * LOG2_E
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + index) * (LOG2_E if BINARY else 1.0)
        higher = tl.maximum(top, sink)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = power(top - base, BINARY)
        total = total * shrink + power(sink - base, BINARY)
        o *= shrink[:, None]
        top = higher
    total = tl.where(total == 0.0, 1.0, total)  # nothing was seen: o is 0 and top −inf
    o /= total[:, None]
    o += tl.sum(o * 0.0, 1)[:, None]  # a value that is not finite makes its row NaN
    at = (batch * heads + index) * queries + i
    rest = tl.log2(total) if BINARY else tl.log(total)
    lse = (top + rest) * LN_2 if BINARY else top + rest
    if peak_ptr is not None:
        # far from 0 the sum of both would lose the rest: weights relative to the largest logit, divided by their sum
        far = tl.abs(top) > (FAR_IN_HALF if BINARY else FAR)
        tl.store(peak_ptr + at, tl.where(far, top, top + rest), mask=i < queries)
        share_ptr = peak_ptr + batches.to(tl.int64) * heads * queries
        tl.store(share_ptr + at, tl.where(far, 1.0 / total, 1.0), mask=i < queries)
        lse = tl.where(top <= LEAST, top, lse)  # which is the least number in any units
    tl.store(lse_ptr + at, lse, mask=i < queries)
    out_at = out_ptr + (batch * out_b + index * out_h) * UNIT
    store_rows(out_at, o, i, queries, out_t * UNIT, CONFIG.e, BLOCK_E)
