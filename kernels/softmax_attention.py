"""Softmax attention in Triton: online softmax forward, and backward kernels in which every sum has one owner.

A program of the forward and of the dq kernel owns a tile of queries, one of the dk/dv kernel a tile of keys of a
key head. Each visits only tiles that its rule lets it see, first those seen in part, then the full ones without masks.
The gradients of biases have kernels of their own (``_attention_biases.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.kernels import _attention_biases as biases
from accel.kernels import _blocks
from accel.kernels._attention_launch import LAUNCH_INTS, Tile, head_block, launch, shared
from accel.kernels._attention_tiles import (
    LN_2,
    LOG2_E,
    clean,
    extent,
    full_at,
    full_length,
    half,
    keep,
    key_spans,
    load_rows,
    load_sums,
    logits,
    own_tile,
    pair_gradients,
    part_at,
    part_length,
    power,
    query_spans,
    store_rows,
    visible,
)
from accel.ops.softmax_attention import Args, empty_like_layout

# --- forward ---


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


# --- backward: which tiles of queries a tile of keys meets, where only `rows` tells ---


@triton.jit(do_not_specialize=["queries", "keys"])
def _query_extents(extents_ptr, rows_ptr, queries, keys, BLOCK_M: tl.constexpr):
    """Of each tile of queries: the hull of both intervals, and what all of their rows contain; ``(rows, 8, tiles)``."""
    tiles = tl.cdiv(queries, BLOCK_M)
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ptr += batch * queries * 5
    at = extents_ptr + batch * 8 * tiles + tile
    for n in tl.static_range(2):
        low, high, whole_low, whole_high = extent(rows_ptr, i, queries, keys, 2 * n)
        tl.store(at + 4 * n * tiles, low)
        tl.store(at + (4 * n + 1) * tiles, high)
        tl.store(at + (4 * n + 2) * tiles, whole_low)
        tl.store(at + (4 * n + 3) * tiles, whole_high)


@triton.jit
def _next(extents_ptr, tiles, begin, j0, j1, FULL: tl.constexpr, WANTED: tl.constexpr):
    """First tile of queries from ``begin`` on that meets keys ``[j0, j1)``, with FULL sees all of them, or does not."""
    found = tiles
    for start in tl.range(0, tiles, 128):
        t = start + tl.arange(0, 128)
        real = t < tiles
        meets = t < 0
        for n in tl.static_range(2):
            low = tl.load(extents_ptr + (4 * n + 2 * FULL) * tiles + t, mask=real, other=0)
            high = tl.load(extents_ptr + (4 * n + 2 * FULL + 1) * tiles + t, mask=real, other=0)
            meets |= ((low <= j0) & (high >= j1)) if FULL else ((low < j1) & (high > j0))
        meets = meets == WANTED
        found = tl.minimum(found, tl.min(tl.where(real & (t >= begin) & meets, t, tiles), 0))
    return found


@triton.jit
def _last(extents_ptr, tiles, j0, j1):
    """Behind the last tile of queries that meets keys ``[j0, j1)``."""
    found = tiles * 0
    for start in tl.range(0, tiles, 128):
        t = start + tl.arange(0, 128)
        real = t < tiles
        meets = t < 0
        for n in tl.static_range(2):
            low = tl.load(extents_ptr + 4 * n * tiles + t, mask=real, other=0)
            high = tl.load(extents_ptr + (4 * n + 1) * tiles + t, mask=real, other=0)
            meets |= (low < j1) & (high > j0)
        found = tl.maximum(found, tl.max(tl.where(real & meets, t + 1, 0), 0))
    return found


@triton.jit(do_not_specialize=["queries", "keys"])
def _query_spans(spans_ptr, extents_ptr, queries, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Spans of queries for each tile of keys: the first run of tiles that meet it, and the rest from the next one on.

    In a tile that reaches past the last key none is full.
    """
    tiles = tl.cdiv(queries, BLOCK_M)
    key_tiles = tl.cdiv(keys, BLOCK_N)
    batch = (tl.program_id(0) // key_tiles).to(tl.int64)
    j0 = tl.program_id(0) % key_tiles * BLOCK_N
    j1 = tl.minimum(j0 + BLOCK_N, keys)
    extents_ptr += batch * 8 * tiles
    start0 = _next(extents_ptr, tiles, 0, j0, j1, 0, True)
    end0 = _next(extents_ptr, tiles, start0, j0, j1, 0, False)
    start1 = _next(extents_ptr, tiles, end0, j0, j1, 0, True)
    end1 = tl.maximum(_last(extents_ptr, tiles, j0, j1), start1)
    full0 = tl.minimum(_next(extents_ptr, tiles, start0, j0, j0 + BLOCK_N, 1, True), end0)
    full_end0 = tl.minimum(_next(extents_ptr, tiles, full0, j0, j0 + BLOCK_N, 1, False), end0)
    full1 = tl.minimum(_next(extents_ptr, tiles, start1, j0, j0 + BLOCK_N, 1, True), end1)
    full_end1 = tl.minimum(_next(extents_ptr, tiles, full1, j0, j0 + BLOCK_N, 1, False), end1)
    at = spans_ptr + tl.program_id(0) * 8
    tl.store(at, start0 * BLOCK_M)
    tl.store(at + 1, full0 * BLOCK_M)
    tl.store(at + 2, full_end0 * BLOCK_M)
    tl.store(at + 3, end0 * BLOCK_M)
    tl.store(at + 4, start1 * BLOCK_M)
    tl.store(at + 5, full1 * BLOCK_M)
    tl.store(at + 6, full_end1 * BLOCK_M)
    tl.store(at + 7, end1 * BLOCK_M)


# --- backward: keys and values ---


@triton.jit
def _pull_keys(
    grads,
    k,
    v,
    query_side,
    i0,
    j,
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
    BLOCK_M: tl.constexpr,
    DOT: tl.constexpr,
    PART: tl.constexpr,
):
    """Add what the tile of queries at ``i0`` gives to the gradients of k and v. Tiles are keys × queries."""
    grad_k, grad_v = grads
    q_ptr, q_t, grad_ptr, grad_t, lse_ptr, delta_ptr = query_side
    queries, _ = shape
    i = i0 + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, i, queries, q_t, D, BLOCK_D, True, DOT)
    raw = tl.dot(k, tl.trans(q), input_precision="ieee")
    grad_o = load_rows(grad_ptr, i, queries, grad_t, E, BLOCK_E, True, DOT)
    grad_p = tl.dot(v, tl.trans(grad_o), input_precision="ieee")
    lse, delta = load_sums(lse_ptr, delta_ptr, i, queries, BINARY)
    used, _grad_s, grad_raw, seen = pair_gradients(
        raw, grad_p, lse[None, :], delta[None, :], i[None, :], j[:, None], i0, j0, head, shape, terms, masks, dropout,
        RULE, GRID, SOFTCAP, BINARY, PART,
    )  # fmt: skip
    if PART:
        q, _bad = clean(q)  # whoever may see a bad one has NaN for its log-sum-exp
        grad_o, bad = clean(grad_o)
        used = tl.where(seen & bad[None, :], float("nan"), used)
    grad_v = tl.dot(used.to(DOT), grad_o, grad_v, input_precision="ieee")
    grad_k = tl.dot(grad_raw.to(DOT), q, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit(do_not_specialize=["heads", "queries", *[f"{x}_{axis}" for x in ("out", "grad") for axis in "bht"]])
def _row_sums(
    sums_ptr,
    out_ptr,
    grad_ptr,
    out_b,
    out_h,
    out_t,
    grad_b,
    grad_h,
    grad_t,
    heads,
    queries,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The sum of output · upstream gradient over each row."""
    tiles = tl.cdiv(queries, BLOCK_M)
    unit = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    batch, head = unit // heads, unit % heads
    out = load_rows(out_ptr + batch * out_b + head * out_h, i, queries, out_t, E, BLOCK_E, True, tl.float32)
    grad = load_rows(grad_ptr + batch * grad_b + head * grad_h, i, queries, grad_t, E, BLOCK_E, True, tl.float32)
    tl.store(sums_ptr + unit * queries + i, tl.sum(out * grad, 1), mask=i < queries)


@triton.jit(do_not_specialize=LAUNCH_INTS)
def _backward_keys(
    grad_k_ptr,
    grad_v_ptr,
    spans_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    line_ptr,
    table_ptr,
    mask_ptr,
    index_ptr,
    rows_ptr,
    seed_ptr,
    grad_k_b,
    grad_k_h,
    grad_k_s,
    grad_v_b,
    grad_v_h,
    grad_v_s,
    grad_b,
    grad_h,
    grad_t,
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
    spans_b,
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
    UNIT: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
):
    """Gradients of a tile of keys of a key head: over the group's heads and the queries that see the tile."""
    PART_M: tl.constexpr = half(BLOCK_M)
    tiles = tl.cdiv(keys, BLOCK_N)
    key_heads = heads // group
    # the first tiles have most to do under a causal rule
    tile, unit = own_tile(tl.program_id(0), tiles, (together + group - 1) // group, batches * key_heads)
    key_head = (unit % key_heads).to(tl.int64)
    batch = (unit // key_heads).to(tl.int64)
    j0 = tile * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    shape = (queries, keys)
    if rows_ptr is not None:
        rows_ptr += batch * rows_b
    if spans_ptr is not None:
        spans_ptr += batch * spans_b + tile * 8
    k = load_rows(k_ptr + (batch * k_b + key_head * k_h) * UNIT, j, keys, k_s * UNIT, D, BLOCK_D, True, DOT)
    v = load_rows(v_ptr + (batch * v_b + key_head * v_h) * UNIT, j, keys, v_s * UNIT, E, BLOCK_E, True, DOT)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    table = (table_ptr, table_rows, heads, index_ptr, (grid_h, grid_w, extra))
    for member in tl.range(0, group):
        head = key_head * group + member
        bias = (bias_ptr, batch * bias_b + head * bias_h, bias_t, bias_s)
        terms = (scale, softcap, bias, (line_ptr, line_length), table)
        masks = (mask_ptr, batch * mask_b + head * mask_h, mask_t, mask_s, rows_ptr)
        first = (batch * heads + head) * queries
        dropout = (seed_ptr, threshold, keep_scale, first)
        q_at = q_ptr + (batch * q_b + head * q_h) * UNIT
        grad_at = grad_ptr + (batch * grad_b + head * grad_h) * UNIT
        query_side = (q_at, q_t * UNIT, grad_at, grad_t * UNIT, lse_ptr + first, delta_ptr + first)
        spans = query_spans(j0, shape, masks, spans_ptr, RULE, BLOCK_M, BLOCK_N)
        for offset in tl.range(0, part_length(spans), PART_M, num_stages=1, disable_licm=True):
            grad_k, grad_v = _pull_keys(
                (grad_k, grad_v), k, v, query_side, part_at(spans, offset), j, j0, head, shape, terms, masks, dropout,
                RULE, GRID, SOFTCAP, BINARY, D, E, BLOCK_D, BLOCK_E, PART_M, DOT, True,
            )  # fmt: skip
        if not MASKED:
            for offset in tl.range(0, full_length(spans), BLOCK_M, disable_licm=True):
                grad_k, grad_v = _pull_keys(
                    (grad_k, grad_v), k, v, query_side, full_at(spans, offset), j, j0, head, shape, terms, masks,
                    dropout, RULE, GRID, SOFTCAP, BINARY, D, E, BLOCK_D, BLOCK_E, BLOCK_M, DOT, False,
                )  # fmt: skip
    grad_k_at = grad_k_ptr + (batch * grad_k_b + key_head * grad_k_h) * UNIT
    grad_v_at = grad_v_ptr + (batch * grad_v_b + key_head * grad_v_h) * UNIT
    store_rows(grad_k_at, grad_k * scale, j, keys, grad_k_s * UNIT, D, BLOCK_D)
    store_rows(grad_v_at, grad_v, j, keys, grad_v_s * UNIT, E, BLOCK_E)


# --- backward: queries ---


@triton.jit
def _pull_queries(
    grad_q,
    q,
    grad_o,
    lse,
    delta,
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
    PART: tl.constexpr,
):
    """Add what the tile of keys at ``j0`` gives to the gradient of q."""
    k_ptr, k_s, v_ptr, v_s = key_side
    _, keys = shape
    j = j0 + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, j, keys, k_s, D, BLOCK_D, PART, DOT)
    raw = tl.dot(q, tl.trans(k), input_precision="ieee")
    v = load_rows(v_ptr, j, keys, v_s, E, BLOCK_E, PART, DOT)
    grad_p = tl.dot(grad_o, tl.trans(v), input_precision="ieee")
    _used, _grad_s, grad_raw, _seen = pair_gradients(
        raw, grad_p, lse[:, None], delta[:, None], i[:, None], j[None, :], i0, j0, head, shape, terms, masks, dropout,
        RULE, GRID, SOFTCAP, BINARY, PART,
    )  # fmt: skip
    if PART:
        k, _bad = clean(k)  # whoever may see a bad one has NaN for its log-sum-exp
    return tl.dot(grad_raw.to(DOT), k, grad_q, input_precision="ieee")


@triton.jit(do_not_specialize=LAUNCH_INTS)
def _backward_queries(
    grad_q_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    line_ptr,
    table_ptr,
    mask_ptr,
    index_ptr,
    rows_ptr,
    seed_ptr,
    grad_q_b,
    grad_q_h,
    grad_q_t,
    grad_b,
    grad_h,
    grad_t,
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
    first = (batch * heads + head) * queries
    dropout = (seed_ptr, threshold, keep_scale, first)
    k_at = k_ptr + (batch * k_b + head // group * k_h) * UNIT
    v_at = v_ptr + (batch * v_b + head // group * v_h) * UNIT
    key_side = (k_at, k_s * UNIT, v_at, v_s * UNIT)
    q = load_rows(q_ptr + (batch * q_b + head * q_h) * UNIT, i, queries, q_t * UNIT, D, BLOCK_D, True, DOT)
    grad_at = grad_ptr + (batch * grad_b + head * grad_h) * UNIT
    grad_o = load_rows(grad_at, i, queries, grad_t * UNIT, E, BLOCK_E, True, DOT)
    lse, delta = load_sums(lse_ptr + first, delta_ptr + first, i, queries, BINARY)
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    spans = key_spans(i0, shape, masks, RULE, BLOCK_M, BLOCK_N)
    for offset in tl.range(0, part_length(spans), PART_N, num_stages=1, disable_licm=True):
        grad_q = _pull_queries(
            grad_q, q, grad_o, lse, delta, key_side, i, i0, part_at(spans, offset), head, shape, terms, masks, dropout,
            RULE, GRID, SOFTCAP, BINARY, D, E, BLOCK_D, BLOCK_E, PART_N, DOT, True,
        )  # fmt: skip
    if not MASKED:
        for offset in tl.range(0, full_length(spans), BLOCK_N, disable_licm=True):
            grad_q = _pull_queries(
                grad_q, q, grad_o, lse, delta, key_side, i, i0, full_at(spans, offset), head, shape, terms, masks,
                dropout, RULE, GRID, SOFTCAP, BINARY, D, E, BLOCK_D, BLOCK_E, BLOCK_N, DOT, False,
            )  # fmt: skip
    grad_q_at = grad_q_ptr + (batch * grad_q_b + head * grad_q_h) * UNIT
    store_rows(grad_q_at, grad_q * scale, i, queries, grad_q_t * UNIT, D, BLOCK_D)


# --- tiles ---


def _weight(args: Args) -> int:
    """What a logit takes beside its product: 0 nothing, 1 the registers of one more tile, 2 also those of an index or
    of places on a grid, 3 several of these or random bits."""
    more = sum([x is not None for x in (args.bias, args.line, args.table, args.mask)]) + (args.softcap > 0.0)
    if args.dropout_p > 0.0 or more > 1:
        return 3
    return 2 if args.table is not None else more


Tiles = dict[tuple[int, int], Tile]
"""By head size and weight of a logit."""


@dataclass(frozen=True)
class _Choice:
    """The tiles of one kernel: on Hopper those of ``hopper`` first, a small one for what is in no table."""

    every: Tiles
    hopper: Tiles
    fp32: tuple[Tile, Tile]  # for heads up to 64 and wider ones

    def of(self, args: Args, capability: tuple[int, int]) -> Tile:
        """For the wider of both head sizes and the weight of a logit."""
        widest = max(64, triton.next_power_of_2(max(args.q.shape[3], args.v.shape[3])))
        key = (widest, _weight(args))
        if args.q.element_size() == 4:
            tile = self.fp32[0] if widest == 64 else self.fp32[1]
        elif capability[0] == 9 and key in self.hopper:
            tile = self.hopper[key]
        else:
            tile = self.every.get(key, Tile(32, 32, 8, 1))
        return tile.within(args.q.shape[2], args.k.shape[2])


# Those for every GPU were chosen by the registers that the compile gate reports. Those for Hopper were measured on an
# H200, with 8192 tokens (weight 0), 2048 (1) and 577 (2): the fastest that do not spill, or one that spills and is
# faster by a tenth or more.
FORWARD = _Choice(
    every={
        (64, 0): Tile(128, 64, 4, 3),
        (64, 1): Tile(64, 64, 4, 2),
        (64, 2): Tile(64, 64, 8, 2),
        (128, 0): Tile(128, 64, 8, 3),
        (128, 1): Tile(64, 64, 8, 2),
        (128, 2): Tile(64, 64, 8, 2),
        (256, 0): Tile(64, 32, 8, 2),
        (256, 1): Tile(64, 32, 8, 2),
    },
    hopper={
        (64, 1): Tile(64, 64, 4, 2),
        (64, 2): Tile(64, 64, 4, 2, spill=48),
        (128, 0): Tile(128, 128, 8, 3),
        (128, 1): Tile(64, 64, 4, 2, spill=320),
    },
    fp32=(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
)
KEYS = _Choice(
    every={
        (64, 0): Tile(32, 64, 8, 2),
        (64, 1): Tile(32, 64, 8, 1),
        (64, 2): Tile(32, 32, 4, 1),
        (128, 0): Tile(32, 64, 8, 2),
        (128, 1): Tile(32, 64, 8, 1),
        (256, 0): Tile(32, 32, 8, 1),
        (256, 1): Tile(32, 32, 8, 1),
    },
    hopper={
        (64, 0): Tile(64, 64, 4, 2),
        (64, 1): Tile(64, 64, 4, 1),
        (64, 2): Tile(64, 64, 4, 1),
        (128, 0): Tile(64, 128, 8, 2, spill=256),
        (128, 1): Tile(64, 64, 4, 1, spill=320),
    },
    fp32=(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
)
QUERIES = _Choice(
    every={
        (64, 0): Tile(128, 64, 8, 2),
        (64, 1): Tile(64, 32, 4, 2),
        (64, 2): Tile(64, 32, 8, 2),
        (128, 0): Tile(128, 64, 8, 2),
        (128, 1): Tile(64, 32, 8, 2),
        (256, 0): Tile(32, 32, 8, 1),
        (256, 1): Tile(32, 32, 8, 1),
    },
    hopper={
        (64, 0): Tile(128, 64, 8, 3),
        (64, 1): Tile(64, 64, 4, 1),
        (64, 2): Tile(64, 64, 4, 1),
        (128, 0): Tile(128, 64, 8, 3),
        (128, 1): Tile(64, 64, 4, 2),
    },
    fp32=(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
)


# --- launches ---


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtype and head sizes are judged by the op.

    ``torch.compile`` traces through this, which bars generator expressions and Triton's helpers.
    """
    q, k = args.q, args.k
    if not (_blocks.INTERPRETING and q.device.type == "cpu"):
        if q.device.type != "cuda":
            return f"it runs on NVIDIA GPUs, and the tensors are on {q.device.type}"
        if torch.version.hip:
            return f"it is built for NVIDIA GPUs, and this is ROCm {torch.version.hip}"
        capability = torch.cuda.get_device_capability(q.device)
        if capability < (8, 0):
            return f"it needs a GPU of compute capability 8.0, this one has {capability[0]}.{capability[1]}"
    tiles = -(-max(q.shape[2], k.shape[2]) // 16)
    if q.shape[0] * q.shape[1] * tiles >= 2**31:
        return f"{tuple(q.shape)} queries with {k.shape[2]} keys are more tiles than one launch can number"
    if args.table is not None and args.table.numel() >= 2**31:
        return f"a bias table of {tuple(args.table.shape)} is more than 32 bits can address"
    for name, x in (("bias", args.bias), ("mask", args.mask), ("bias_index", args.bias_index)):
        if x is not None and max([0 if x.shape[n] == 1 else x.stride(n) for n in (-2, -1)]) >= 2**23:
            return f"it takes a {name} whose rows are less than 2**23 elements apart, not strides of {x.stride()}"
    return None


def _empty(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A result buffer in the layout of ``x``."""
    return torch.empty_like(empty_like_layout(x, shape), dtype=_blocks.store_dtype(x.dtype))


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Empty out and lse."""
    return _empty(q, (*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


def _forward_launch(out: Tensor, lse: Tensor, args: Args, capability: tuple[int, int]) -> Any:
    tile = FORWARD.of(args, capability)
    programs = lse.shape[0] * lse.shape[1] * triton.cdiv(lse.shape[2], tile.queries)
    return launch(
        _forward, programs, tile, **shared(args, {"out": out}), out_ptr=out, lse_ptr=lse, sinks_ptr=args.sinks
    )


def _sums_launch(sums: Tensor, grad_out: Tensor, out: Tensor) -> Any:
    sides = (("out", out), ("grad", grad_out))
    steps = {f"{name}_{axis}": x.stride(n) for name, x in sides for n, axis in enumerate("bht")}
    batches, heads, queries, size = out.shape
    tile = Tile(max(1, 2048 // head_block(size)), 16, 4, 1)
    given = {"sums_ptr": sums, "out_ptr": out, "grad_ptr": grad_out, "heads": heads, "queries": queries, "E": size}
    programs = batches * heads * triton.cdiv(queries, tile.queries)
    return launch(_row_sums, programs, tile, **given, **steps, BLOCK_E=head_block(size))


def row_sums(grad_out: Tensor, out: Tensor) -> Tensor:
    """``(B, H, T)`` fp32: the sum of ``out`` · ``grad_out``, both ``(B, H, T, E)``, over the last axis.

    torch would write both in fp32 first, which takes as long as a tenth of the backward pass at 8192 tokens.
    """
    sums = out.new_empty(out.shape[:3], dtype=torch.float32)
    with _blocks.device_of(out):
        _sums_launch(sums, grad_out, out).run()
    return sums


@dataclass(frozen=True)
class _Backward:
    """The launches of a backward pass in order, and the buffers they fill."""

    launches: list[Any]
    grads: tuple[Tensor, Tensor, Tensor]
    parts: tuple[Tensor | None, Tensor | None, Tensor | None]  # of bias, line and table, summed over the first axis


def _span_launches(args: Args, tile: Tile) -> tuple[list[Any], Tensor | None, int]:
    """What finds the queries of each tile of keys, the buffer it fills and that buffer's stride by batch."""
    rows = args.rows
    if args.rule != "other" or rows is None:
        return [], None, 0
    batches, queries, keys = rows.shape[0], args.q.shape[2], args.k.shape[2]
    query_tiles, key_tiles = triton.cdiv(queries, tile.queries), triton.cdiv(keys, tile.keys)
    extents = rows.new_empty((batches, 8, query_tiles))
    spans = rows.new_empty((batches, key_tiles, 8))
    small = Tile(tile.queries, tile.keys, 4, 1)
    given = {"extents_ptr": extents, "rows_ptr": rows, "spans_ptr": spans, "queries": queries, "keys": keys}
    launches = [
        launch(_query_extents, batches * query_tiles, small, **given),
        launch(_query_spans, batches * key_tiles, small, **given),
    ]
    return launches, spans, 8 * key_tiles if batches > 1 else 0


def _backward_plan(
    grad_out: Tensor, delta: Tensor, lse: Tensor, args: Args, needs: list[bool], capability: tuple[int, int]
) -> _Backward:
    q, k, v = args.q, args.k, args.v
    grad_q, grad_k, grad_v = (_empty(x, tuple(x.shape)) for x in (q, k, v))
    given = {
        **shared(args, {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v, "grad": grad_out}),
        "grad_q_ptr": grad_q,
        "grad_k_ptr": grad_k,
        "grad_v_ptr": grad_v,
        "grad_ptr": grad_out,
        "lse_ptr": lse,
        "delta_ptr": delta,
    }
    tile = KEYS.of(args, capability)
    launches, spans, spans_b = _span_launches(args, tile)
    programs = k.shape[0] * k.shape[1] * triton.cdiv(k.shape[2], tile.keys)
    launches.append(launch(_backward_keys, programs, tile, **given, spans_ptr=spans, spans_b=spans_b))
    tile = QUERIES.of(args, capability)
    programs = q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], tile.queries)
    launches.append(launch(_backward_queries, programs, tile, **given))
    parts: list[Tensor | None] = []
    for wanted, x, plan in zip(
        needs, (args.bias, args.line, args.table), (biases.plan_bias, biases.plan_line, biases.plan_table), strict=True
    ):
        part = None
        if wanted and x is not None:
            more, part = plan(args, given, capability)
            launches.append(more)
        parts.append(part)
    return _Backward(launches, (grad_q, grad_k, grad_v), (parts[0], parts[1], parts[2]))


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; arguments are the fields of ``accel.ops.softmax_attention.Args``."""
    given = Args(*args)
    out, lse = _results(given.q, given.v)
    with _blocks.device_of(given.q):
        _forward_launch(out, lse, given, _blocks.capability(given.q)).run()
    return out.to(given.q.dtype), lse


def backward(grad_out: Tensor, delta: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and, where needed, of bias, line and table (fp32, else empty).

    ``delta`` is the sum of weight · gradient over each row, less the gradient of the log-sum-exp.
    """
    *args, needs = rest
    given = Args(*args)
    with _blocks.device_of(given.q):
        plan = _backward_plan(grad_out, delta.contiguous(), lse.contiguous(), given, needs, _blocks.capability(given.q))
        for step in plan.launches:
            step.run()
        small = [lse.new_empty(0) if part is None else part.sum(0).contiguous() for part in plan.parts]
    grads = [g.to(x.dtype) for g, x in zip(plan.grads, (given.q, given.k, given.v), strict=True)]
    return *grads, *small


# --- what the compile gate builds ---


def compile_cases() -> Iterator[_blocks.CompileCase]:
    """Every tile of the tables, plain and in the heaviest calls that reach it; what the compiler sees twice, once."""
    return _blocks.once(case for dtype, sizes, flags in _calls() for case in _cases(dtype, sizes, **flags))


def _calls() -> Iterator[tuple[torch.dtype, tuple[int, int], dict[str, Any]]]:
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    everything = {"rule": "other", "mask": True, "bias": True, "line": True, "dropout": True, "softcap": True}
    for size in (64, 128):
        yield bf16, (size, size), {"rule": "causal"}
        yield bf16, (size, size), {"rule": "other", "mask": True}
        yield bf16, (size, size), {"bias": True}
        yield fp32, (size, size), everything
    yield bf16, (64, 64), everything
    yield bf16, (256, 256), everything
    yield bf16, (192, 128), {"rule": "other", "softcap": True}
    yield bf16, (64, 64), {"table": "grid", "rule": "all"}
    yield bf16, (64, 64), {"line": True, "rule": "all"}
    yield bf16, (128, 128), {"table": "grid", "rule": "all"}
    yield fp16, (64, 64), {"table": "index", "rule": "causal", "aligned": False}


def _cases(
    dtype: torch.dtype,
    head_sizes: tuple[int, int],
    rule: str = "all",
    mask: bool = False,
    bias: bool = False,
    line: bool = False,
    table: str = "",
    dropout: bool = False,
    softcap: bool = False,
    aligned: bool = True,
) -> Iterator[_blocks.CompileCase]:
    """The launches of one call, forward and backward, on tensors that have shapes only."""
    name = f"{str(dtype)[6:]} D={head_sizes[0]} E={head_sizes[1]} {rule}"
    for flag in ("mask", "bias", "line", "table", "dropout", "softcap"):
        name += f" {flag}" if locals()[flag] else ""
    tokens = 1024

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def heads(count: int, size: int) -> Tensor:
        return empty(2, count, tokens, size + (0 if aligned else 1), dtype=dtype)[..., :size]

    args = Args(
        q=heads(4, head_sizes[0]),
        k=heads(2, head_sizes[0]),
        v=heads(2, head_sizes[1]),
        bias=empty(1, 4, tokens, tokens, dtype=dtype) if bias else None,
        line=empty(4, 2 * tokens - 1) if line else None,
        table=empty(63 * 63, 4) if table else None,
        sinks=empty(4) if softcap else None,
        mask=empty(2, 1, 1, tokens, dtype=torch.bool) if mask else None,
        bias_index=empty(tokens, tokens, dtype=torch.int32) if table == "index" else None,
        rows=empty(2, tokens, 5, dtype=torch.int32) if rule != "all" else None,
        seed=empty(1, dtype=torch.int64) if dropout else None,
        grid=[32, 32, 0] if table == "grid" else [],
        rule=rule,
        scale=0.125,
        softcap=30.0 if softcap else 0.0,
        dropout_p=0.1 if dropout else 0.0,
    )
    out, lse = _results(args.q, args.v)

    def of(capability: tuple[int, int]) -> Iterator[_blocks.CompileCase]:
        yield _forward_launch(out, lse, args, capability).case(name)
        yield _sums_launch(lse, out, out).case(name)
        for step in _backward_plan(out, lse, lse, args, [True] * 3, capability).launches:
            yield step.case(name)

    yield from _blocks.by_generation(of((8, 0)), of((9, 0)))
