"""The backward kernels of softmax attention for queries, keys and values, in which every sum has one owner.

A program owns a tile of keys of a key head, or a tile of queries, and computes the weights again from the log-sum-exp.
The sum of output · upstream gradient over each row, which enters both, has a kernel too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from accel.kernels._logits import (
    Call,
    Grid,
    Head,
    KeySide,
    Plane,
    QuerySide,
    clean,
    is_finite,
    load_rows,
    own_tile,
    rows_of,
    store_rows,
)
from accel.kernels._pairs import LAUNCH_INTS
from accel.kernels._spans import full_at, full_length, half, key_spans, part_at, part_length, query_spans
from accel.kernels.attention.weights import load_sums, pair_gradients


@triton.jit(do_not_specialize=["heads", "queries", *[f"{x}_{axis}" for x in ("out", "grad") for axis in "bht"]])
def row_sums_kernel(
    sums_ptr, out_ptr, grad_ptr, worst_ptr, out_b, out_h, out_t, grad_b, grad_h, grad_t, heads, queries,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The sum of output · upstream gradient over each row, unless there is a ``worst_ptr`` to a finite number."""
    if worst_ptr is not None:  # noqa: SIM102  both sides of "and" are compiled
        if is_finite(tl.load(worst_ptr)):
            return
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
    grads, k, v, query_side, i0, j, j0, head,
    CONFIG: tl.constexpr, BLOCK_M: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Add what the tile of queries at ``i0`` gives to the gradients of k and v. Tiles are keys × queries."""
    DOT: tl.constexpr = CONFIG.dot
    grad_k, grad_v = grads
    queries = head.call.queries
    i = i0 + tl.arange(0, BLOCK_M)
    q = load_rows(query_side.q, i, queries, query_side.q_step, CONFIG.d, CONFIG.block_d, True, DOT)
    raw = tl.dot(k, tl.trans(q), input_precision="ieee")
    grad_o = load_rows(query_side.grad, i, queries, query_side.grad_step, CONFIG.e, CONFIG.block_e, True, DOT)
    grad_p = tl.dot(v, tl.trans(grad_o), input_precision="ieee")
    lse, delta = load_sums(query_side.lse, query_side.delta, i, queries, CONFIG)
    used, _grad_s, grad_raw, seen = pair_gradients(
        raw, grad_p, lse[None, :], delta[None, :], i[None, :], j[:, None], i0, j0, head, CONFIG, PART
    )
    if PART:
        q, _bad = clean(q)  # whoever may see a bad one has NaN for its log-sum-exp
        grad_o, bad = clean(grad_o)
        used = tl.where(seen & bad[None, :], float("nan"), used)
    grad_v = tl.dot(used.to(DOT), grad_o, grad_v, input_precision="ieee")
    grad_k = tl.dot(grad_raw.to(DOT), q, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit(do_not_specialize=LAUNCH_INTS)
def keys_kernel(
    grad_k_ptr, grad_v_ptr, spans_ptr, worst_ptr, upstream, inputs,
    grad_k_b, grad_k_h, grad_k_s, grad_v_b, grad_v_h, grad_v_s, grad_b, grad_h, grad_t,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s,
    bias_b, bias_h, bias_t, bias_s, mask_b, mask_h, mask_t, mask_s, rows_b, spans_b,
    batches, heads, group, together, queries, keys, line_length, table_rows, grid_h, grid_w, extra, threshold,
    factors, CONFIG: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys of a key head: over the group's heads and the queries that see the tile.

    Where there is a ``worst_ptr`` to a finite number, everything is left as it is.
    """
    if worst_ptr is not None:  # noqa: SIM102  both sides of "and" are compiled
        if is_finite(tl.load(worst_ptr)):
            return
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_D: tl.constexpr = CONFIG.block_d
    BLOCK_E: tl.constexpr = CONFIG.block_e
    PART_M: tl.constexpr = half(CONFIG.block_m)
    UNIT: tl.constexpr = CONFIG.unit
    tiles = tl.cdiv(keys, BLOCK_N)
    key_heads = heads // group
    # the first tiles have most to do under a causal rule
    tile, unit = own_tile(tl.program_id(0), tiles, (together + group - 1) // group, batches * key_heads)
    key_head = (unit % key_heads).to(tl.int64)
    batch = (unit // key_heads).to(tl.int64)
    j0 = tile * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    bias, mask = Plane(bias_b, bias_h, bias_t, bias_s), Plane(mask_b, mask_h, mask_t, mask_s)
    grid = Grid(grid_h, grid_w, extra)
    call = Call(inputs, factors, bias, mask, heads, queries, keys, line_length, table_rows, grid, threshold)
    rows = rows_of(call, batch, rows_b)
    if spans_ptr is not None:
        spans_ptr += batch * spans_b + tile * 8
    k_at = inputs.k + (batch * k_b + key_head * k_h) * UNIT
    k = load_rows(k_at, j, keys, k_s * UNIT, CONFIG.d, BLOCK_D, True, CONFIG.dot)
    v_at = inputs.v + (batch * v_b + key_head * v_h) * UNIT
    v = load_rows(v_at, j, keys, v_s * UNIT, CONFIG.e, BLOCK_E, True, CONFIG.dot)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for member in tl.range(0, group):
        index = key_head * group + member
        head = Head(
            call=call,
            index=index,
            rows=rows,
            bias_at=batch * bias_b + index * bias_h,
            mask_at=batch * mask_b + index * mask_h,
            first=(batch * heads + index) * queries,
        )
        query_side = QuerySide(
            q=inputs.q + (batch * q_b + index * q_h) * UNIT,
            grad=upstream.grad + (batch * grad_b + index * grad_h) * UNIT,
            q_step=q_t * UNIT,
            grad_step=grad_t * UNIT,
            lse=upstream.lse + head.first,
            delta=upstream.delta + head.first,
        )
        spans = query_spans(j0, call, spans_ptr, CONFIG)
        for offset in tl.range(0, part_length(spans), PART_M, num_stages=1, disable_licm=True):
            i0 = part_at(spans, offset)
            grad_k, grad_v = _pull_keys((grad_k, grad_v), k, v, query_side, i0, j, j0, head, CONFIG, PART_M, True)
        if inputs.mask is None:
            for offset in tl.range(0, full_length(spans), BLOCK_M, disable_licm=True):
                i0 = full_at(spans, offset)
                grad_k, grad_v = _pull_keys((grad_k, grad_v), k, v, query_side, i0, j, j0, head, CONFIG, BLOCK_M, False)
    grad_k_at = grad_k_ptr + (batch * grad_k_b + key_head * grad_k_h) * UNIT
    grad_v_at = grad_v_ptr + (batch * grad_v_b + key_head * grad_v_h) * UNIT
    store_rows(grad_k_at, grad_k * factors.scale, j, keys, grad_k_s * UNIT, CONFIG.d, BLOCK_D)
    store_rows(grad_v_at, grad_v, j, keys, grad_v_s * UNIT, CONFIG.e, BLOCK_E)


# --- queries ---


@triton.jit
def _pull_queries(
    grad_q, q, grad_o, lse, delta, key_side, i, i0, j0, head,
    CONFIG: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Add what the tile of keys at ``j0`` gives to the gradient of q."""
    DOT: tl.constexpr = CONFIG.dot
    keys = head.call.keys
    j = j0 + tl.arange(0, BLOCK_N)
    k = load_rows(key_side.k, j, keys, key_side.k_step, CONFIG.d, CONFIG.block_d, PART, DOT)
    raw = tl.dot(q, tl.trans(k), input_precision="ieee")
    v = load_rows(key_side.v, j, keys, key_side.v_step, CONFIG.e, CONFIG.block_e, PART, DOT)
    grad_p = tl.dot(grad_o, tl.trans(v), input_precision="ieee")
    _used, _grad_s, grad_raw, _seen = pair_gradients(
        raw, grad_p, lse[:, None], delta[:, None], i[:, None], j[None, :], i0, j0, head, CONFIG, PART
    )
    if PART:
        k, _bad = clean(k)  # whoever may see a bad one has NaN for its log-sum-exp
    return tl.dot(grad_raw.to(DOT), k, grad_q, input_precision="ieee")


@triton.jit(do_not_specialize=LAUNCH_INTS)
def queries_kernel(
    grad_q_ptr, worst_ptr, upstream, inputs,
    grad_q_b, grad_q_h, grad_q_t, grad_b, grad_h, grad_t, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s,
    bias_b, bias_h, bias_t, bias_s, mask_b, mask_h, mask_t, mask_s, rows_b,
    batches, heads, group, together, queries, keys, line_length, table_rows, grid_h, grid_w, extra, threshold,
    factors, CONFIG: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries of a head; left as it is where there is a ``worst_ptr`` to a finite number."""
    if worst_ptr is not None:  # noqa: SIM102  both sides of "and" are compiled
        if is_finite(tl.load(worst_ptr)):
            return
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_D: tl.constexpr = CONFIG.block_d
    PART_N: tl.constexpr = half(CONFIG.block_n)
    UNIT: tl.constexpr = CONFIG.unit
    DOT: tl.constexpr = CONFIG.dot
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
    q = load_rows(q_at, i, queries, q_t * UNIT, CONFIG.d, BLOCK_D, True, DOT)
    grad_at = upstream.grad + (batch * grad_b + index * grad_h) * UNIT
    grad_o = load_rows(grad_at, i, queries, grad_t * UNIT, CONFIG.e, CONFIG.block_e, True, DOT)
    lse, delta = load_sums(upstream.lse + head.first, upstream.delta + head.first, i, queries, CONFIG)
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    spans = key_spans(i0, call, head.rows, CONFIG)
    for offset in tl.range(0, part_length(spans), PART_N, num_stages=1, disable_licm=True):
        j0 = part_at(spans, offset)
        grad_q = _pull_queries(grad_q, q, grad_o, lse, delta, key_side, i, i0, j0, head, CONFIG, PART_N, True)
    if inputs.mask is None:
        for offset in tl.range(0, full_length(spans), BLOCK_N, disable_licm=True):
            j0 = full_at(spans, offset)
            grad_q = _pull_queries(grad_q, q, grad_o, lse, delta, key_side, i, i0, j0, head, CONFIG, BLOCK_N, False)
    grad_q_at = grad_q_ptr + (batch * grad_q_b + index * grad_q_h) * UNIT
    store_rows(grad_q_at, grad_q * factors.scale, i, queries, grad_q_t * UNIT, CONFIG.d, BLOCK_D)
