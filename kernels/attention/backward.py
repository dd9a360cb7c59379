"""The backward kernels of softmax attention for queries, keys and values, in which every sum has one owner.

A program owns a tile of keys of a key head, or a tile of queries, and computes the weights again from the log-sum-exp.
The sum of output · upstream gradient over each row, which enters both, has a kernel too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from accel.kernels.attention.arguments import LAUNCH_INTS
from accel.kernels.attention.logits import (
    clean,
    full_at,
    full_length,
    half,
    key_spans,
    load_rows,
    load_sums,
    own_tile,
    pair_gradients,
    part_at,
    part_length,
    query_spans,
    store_rows,
)


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


# --- keys and values ---


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


# --- queries ---


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
