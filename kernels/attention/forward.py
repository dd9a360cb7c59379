"""The forward kernel of softmax attention: the online softmax.

A program owns a tile of queries and keeps, for each of them, the largest logit so far, the sum of the weights and the
output, both relative to that logit, while it visits the tiles of keys. A head's sink, which has no value, enters last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from accel.kernels.attention.arguments import LAUNCH_INTS
from accel.kernels.attention.logits import (
    LN_2,
    LOG2_E,
    clean,
    full_at,
    full_length,
    half,
    keep,
    key_spans,
    load_rows,
    logits,
    own_tile,
    part_at,
    part_length,
    power,
    store_rows,
    visible,
)


@triton.jit
def _attend(
    state,
    q,
    key_side,
    i,
    i0,
    j0,
    head,
    shape,
    terms,
    masks,
    dropout,
    RULE: tl.constexpr,
    GRID: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BINARY: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    PLAIN: tl.constexpr,
    PART: tl.constexpr,
):
    """One step of the online softmax over the tile of keys at ``j0``.

    With PLAIN the logits are products and no more, and stay in their units: the change of units is part of the
    subtraction then.
    """
    o, total, top = state
    k_ptr, k_s, v_ptr, v_s = key_side
    _, keys = shape
    _, _, _, _, rows_ptr = masks
    seed_ptr, _, keep_scale, _ = dropout
    j = j0 + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, j, keys, k_s, D, BLOCK_D, PART, DOT)
    raw = tl.dot(q, tl.trans(k), input_precision="ieee")
    raw += raw * 0.0  # an infinite product becomes NaN, as −inf would pass for a key that is not seen
    scale, _, _, _, _ = terms
    if PLAIN:
        s = raw
        unit = scale * LOG2_E
    else:
        s, _capped = logits(raw, i[:, None], j[None, :], i0, j0, head, shape, terms, rows_ptr, GRID, SOFTCAP, BINARY)
    if PART:
        seen = visible(i[:, None], j[None, :], i0, j0, shape, masks, RULE)
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
    if seed_ptr is not None:
        p = tl.where(keep(i[:, None], j[None, :], shape, dropout), p * keep_scale, 0.0)
    v = load_rows(v_ptr, j, keys, v_s, E, BLOCK_E, PART, DOT)
    if PART:
        v, bad = clean(v)
        p = tl.where(seen & bad[None, :], float("nan"), p)
    o = tl.dot(p.to(DOT), v, o * shrink[:, None], input_precision="ieee")
    return o, total, higher


@triton.jit(do_not_specialize=LAUNCH_INTS)
def _forward(
    out_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    line_ptr,
    table_ptr,
    sinks_ptr,
    mask_ptr,
    index_ptr,
    rows_ptr,
    seed_ptr,
    out_b,
    out_h,
    out_t,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    bias_b,
    bias_h,
    bias_t,
    bias_s,
    mask_b,
    mask_h,
    mask_t,
    mask_s,
    rows_b,
    batches,
    heads,
    group,
    together,
    queries,
    keys,
    line_length,
    table_rows,
    grid_h,
    grid_w,
    extra,
    threshold,
    keep_scale,
    scale,
    softcap,
    RULE: tl.constexpr,
    GRID: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BINARY: tl.constexpr,
    MASKED: tl.constexpr,
    PLAIN: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
):
    PART_N: tl.constexpr = half(BLOCK_N)
    tiles = tl.cdiv(queries, BLOCK_M)
    tile, unit = own_tile(tl.program_id(0), tiles, together, batches * heads)
    i0 = (tiles - 1 - tile) * BLOCK_M  # the last tiles have most to do under a causal rule
    head = (unit % heads).to(tl.int64)
    batch = (unit // heads).to(tl.int64)
    i = i0 + tl.arange(0, BLOCK_M)
    shape = (queries, keys)
    if rows_ptr is not None:
        rows_ptr += batch * rows_b
    bias = (bias_ptr, batch * bias_b + head * bias_h, bias_t, bias_s)
    table = (table_ptr, table_rows, heads, index_ptr, (grid_h, grid_w, extra))
    terms = (scale, softcap, bias, (line_ptr, line_length), table)
    masks = (mask_ptr, batch * mask_b + head * mask_h, mask_t, mask_s, rows_ptr)
    dropout = (seed_ptr, threshold, keep_scale, (batch * heads + head) * queries)
    k_at = k_ptr + (batch * k_b + head // group * k_h) * UNIT
    v_at = v_ptr + (batch * v_b + head // group * v_h) * UNIT
    key_side = (k_at, k_s * UNIT, v_at, v_s * UNIT)
    q = load_rows(q_ptr + (batch * q_b + head * q_h) * UNIT, i, queries, q_t * UNIT, D, BLOCK_D, True, DOT)
    o = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    spans = key_spans(i0, shape, masks, RULE, BLOCK_M, BLOCK_N)
    # not pipelined, and nothing hoisted: with the masks' operands that would not fit the registers
    for offset in tl.range(0, part_length(spans), PART_N, num_stages=1, disable_licm=True):
        o, total, top = _attend(
            (o, total, top), q, key_side, i, i0, part_at(spans, offset), head, shape, terms, masks, dropout,
            RULE, GRID, SOFTCAP, BINARY, D, E, BLOCK_D, BLOCK_E, PART_N, DOT, PLAIN, True,
        )  # fmt: skip
    if not MASKED:
        for offset in tl.range(0, full_length(spans), BLOCK_N, disable_licm=True):
            o, total, top = _attend(
                (o, total, top), q, key_side, i, i0, full_at(spans, offset), head, shape, terms, masks, dropout,
                RULE, GRID, SOFTCAP, BINARY, D, E, BLOCK_D, BLOCK_E, BLOCK_N, DOT, PLAIN, False,
            )  # fmt: skip
    if PLAIN:
        top *= scale * LOG2_E
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head) * (LOG2_E if BINARY else 1.0)
        higher = tl.maximum(top, sink)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = power(top - base, BINARY)
        total = total * shrink + power(sink - base, BINARY)
        o *= shrink[:, None]
        top = higher
    total = tl.where(total == 0.0, 1.0, total)  # nothing was seen: o is 0 and top −inf
    o /= total[:, None]
    o += tl.sum(o * 0.0, 1)[:, None]  # a value that is not finite makes its row NaN
    at = (batch * heads + head) * queries + i
    lse = (top + tl.log2(total)) * LN_2 if BINARY else top + tl.log(total)
    tl.store(lse_ptr + at, lse, mask=i < queries)
    out_at = out_ptr + (batch * out_b + head * out_h) * UNIT
    store_rows(out_at, o, i, queries, out_t * UNIT, E, BLOCK_E)
