"""The kernels of gated attention: every result is a sum over the keys of a tile of queries, or over the queries of a
tile of keys.

Values are wider than a tile holds. A program of ``out`` or ``grad_v`` has one block of their channels and computes the
weights again; one of a gradient of q or k goes over all blocks for each tile, as a weight's gradient is a sum over all
channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from accel.kernels._logits import Call, Grid, Head, Plane, load_rows, own_tile, rows_of, store_rows
from accel.kernels._pairs import LAUNCH_INTS
from accel.kernels._spans import full_at, full_length, half, key_spans, part_at, part_length, query_spans
from accel.kernels.linear.gau_weights import (
    Starts,
    add_product,
    grad_of_weights,
    hides,
    kept,
    load_channels,
    load_spared,
    logit_gradients,
    rounded,
    seen_logits,
    store_channels,
    weights,
)

# --- over keys ---


@triton.jit
def _add_keys(
    sums, top, q, starts, i, i0, j0, first, head, upstream,
    CONFIG: tl.constexpr, MODE: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Add what the tile of keys at ``j0`` gives."""
    HIDES: tl.constexpr = hides(PART, CONFIG)
    keys = head.call.keys
    j = j0 + tl.arange(0, BLOCK_N)
    if MODE == "grad_q" or MODE == "delta":
        grad_w = grad_of_weights(starts, i, j, head, False, CONFIG)
    k = load_rows(starts.k, j, keys, starts.k_step, CONFIG.d, CONFIG.block_d, PART, CONFIG.given)
    x, seen = seen_logits(q, k, i[:, None], j[None, :], i0, j0, head, CONFIG, PART)
    if MODE == "peak":
        top = tl.maximum(top, tl.max(tl.where(seen, x, float("-inf")), 1))
        sums += tl.sum(tl.where(seen, 1.0, 0.0), 1)
    elif MODE == "grad_q":
        grad = logit_gradients(x, seen, grad_w, i[:, None], j[None, :], head, upstream, CONFIG, HIDES)
        k = load_spared(starts.k, upstream.bad_k + starts.key_first, j, keys, starts.k_step, HIDES, PART, CONFIG)
        sums = add_product(grad, k, sums, CONFIG)
    else:
        w = weights(x, seen, i[:, None], head, upstream, CONFIG, HIDES)
        if MODE != "total" and head.call.inputs.seed is not None:
            w *= kept(i[:, None], j[None, :], head)
        if MODE == "out":
            bad = tl.load(upstream.bad_v + starts.key_first + j, mask=j < keys, other=0.0)
            w += bad[None, :]
            if HIDES:
                w = tl.where(seen, w, 0.0)
            v = load_channels(starts.v, j, (j < keys) & (bad == 0.0), starts.v_step, first, HIDES, CONFIG)
            sums = tl.dot(rounded(w, CONFIG), v, sums, input_precision=CONFIG.precision)
        elif MODE == "delta":
            sums += tl.sum(tl.where(seen, w * grad_w, 0.0), 1)
        else:
            sums += tl.sum(w, 1)
    return sums, top


@triton.jit(do_not_specialize=LAUNCH_INTS)
def by_queries_kernel(
    out_ptr, more_ptr, gate_ptr, upstream, inputs,
    out_b, out_h, out_t, gate_b, gate_h, gate_t, grad_b, grad_h, grad_t,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s,
    bias_b, bias_h, bias_t, bias_s, mask_b, mask_h, mask_t, mask_s, rows_b,
    batches, heads, group, together, queries, keys, line_length, table_rows, grid_h, grid_w, extra, threshold, blocks,
    factors, CONFIG: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """A tile of queries of a head, and in ``out`` a block of channels. MODE:

    ``out``: the sums of values times the gate, if there is one; the sums alone go to ``more_ptr``, unless it is None.
    ``grad_q``: the gradient of q.
    For activations by row ``peak``: the factor of a row's logits, and the largest of them times it, to ``more_ptr``;
    ``total``: one over the sum of weights relative to that; ``delta``: the sum of weight · gradient.
    """
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_D: tl.constexpr = CONFIG.block_d
    BLOCK_E: tl.constexpr = CONFIG.block_e
    PART_N: tl.constexpr = half(CONFIG.block_n)
    UNIT: tl.constexpr = CONFIG.unit
    tiles = tl.cdiv(queries, BLOCK_M)
    channel = tl.program_id(0) % blocks * BLOCK_E
    tile, unit = own_tile(tl.program_id(0) // blocks, tiles, together, batches * heads)
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
    grad_first = (batch * grad_b + index * grad_h) * UNIT
    grad = upstream.grad
    rest = upstream.rest
    if grad is not None:
        grad += grad_first
    if rest is not None:
        rest += grad_first
    starts = Starts(
        q=inputs.q + (batch * q_b + index * q_h) * UNIT,
        k=inputs.k + (batch * k_b + index // group * k_h) * UNIT,
        v=inputs.v + (batch * v_b + index // group * v_h) * UNIT,
        grad=grad,
        rest=rest,
        q_step=q_t * UNIT,
        k_step=k_s * UNIT,
        v_step=v_s * UNIT,
        grad_step=grad_t * UNIT,
        key_first=(batch * (heads // group) + index // group) * keys,
    )
    q = load_rows(starts.q, i, queries, starts.q_step, CONFIG.d, BLOCK_D, True, CONFIG.given)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if MODE == "out":
        sums = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    elif MODE == "grad_q":
        sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    else:
        sums = tl.zeros((BLOCK_M,), tl.float32)
    spans = key_spans(i0, call, head.rows, CONFIG)
    # not pipelined, and nothing hoisted: with the masks' operands that would not fit the registers
    for offset in tl.range(0, part_length(spans), PART_N, num_stages=1, disable_licm=True):
        j0 = part_at(spans, offset)
        sums, top = _add_keys(sums, top, q, starts, i, i0, j0, channel, head, upstream, CONFIG, MODE, PART_N, True)
    if inputs.mask is None:
        for offset in tl.range(0, full_length(spans), BLOCK_N, disable_licm=True):
            j0 = full_at(spans, offset)
            sums, top = _add_keys(
                sums, top, q, starts, i, i0, j0, channel, head, upstream, CONFIG, MODE, BLOCK_N, False
            )
    row = (batch * heads + index) * queries + i
    real = i < queries
    if MODE == "out":
        at = (batch * out_b + index * out_h) * UNIT
        if more_ptr is not None:
            store_channels(more_ptr + at, sums, i, queries, out_t * UNIT, channel, CONFIG)
        if gate_ptr is not None:
            gate_at = gate_ptr + (batch * gate_b + index * gate_h) * UNIT
            e = channel + tl.arange(0, BLOCK_E)
            places = i.to(tl.int64)[:, None] * (gate_t * UNIT) + e[None, :]
            gate = tl.load(gate_at + places, mask=real[:, None] & (e < CONFIG.e)[None, :], other=0.0)
            sums *= gate.to(tl.float32)
        store_channels(out_ptr + at, sums, i, queries, out_t * UNIT, channel, CONFIG)
    elif MODE == "grad_q":
        at = out_ptr + (batch * out_b + index * out_h) * UNIT
        store_rows(at, sums * factors.scale, i, queries, out_t * UNIT, CONFIG.d, BLOCK_D)
    elif MODE == "peak":
        factor = tl.full((BLOCK_M,), 1.0, tl.float32)
        if CONFIG.activation == "softmax_plus":
            factor = tl.log(tl.maximum(sums, 1.0)) * (1.0 / 6.238324625039508)  # ln 512
        tl.store(out_ptr + row, factor, mask=real)
        tl.store(more_ptr + row, tl.where(top == float("-inf"), 0.0, top * factor), mask=real)
    elif MODE == "total":
        tl.store(out_ptr + row, tl.where(sums == 0.0, 0.0, 1.0 / sums), mask=real)
    else:
        tl.store(out_ptr + row, sums, mask=real)


# --- over queries ---


@triton.jit
def _add_queries(
    sums, k, starts, i0, j, j0, first, head, upstream,
    CONFIG: tl.constexpr, MODE: tl.constexpr, BLOCK_M: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Add what the tile of queries at ``i0`` gives. Tiles are keys × queries."""
    HIDES: tl.constexpr = hides(PART, CONFIG)
    queries = head.call.queries
    i = i0 + tl.arange(0, BLOCK_M)
    if MODE == "grad_k":
        grad_w = grad_of_weights(starts, i, j, head, True, CONFIG)
    q = load_rows(starts.q, i, queries, starts.q_step, CONFIG.d, CONFIG.block_d, True, CONFIG.given)
    x, seen = seen_logits(k, q, i[None, :], j[:, None], i0, j0, head, CONFIG, PART)
    if MODE == "grad_k":
        grad = logit_gradients(x, seen, grad_w, i[None, :], j[:, None], head, upstream, CONFIG, HIDES)
        q = load_spared(starts.q, upstream.bad_q + head.first, i, queries, starts.q_step, HIDES, True, CONFIG)
        sums = add_product(grad, q, sums, CONFIG)
    else:
        w = weights(x, seen, i[None, :], head, upstream, CONFIG, HIDES)
        if head.call.inputs.seed is not None:
            w *= kept(i[None, :], j[:, None], head)
        bad = tl.load(upstream.bad_grad + head.first + i, mask=i < queries, other=0.0)
        w += bad[None, :]
        if HIDES:
            w = tl.where(seen, w, 0.0)
        grad = load_channels(starts.grad, i, (i < queries) & (bad == 0.0), starts.grad_step, first, True, CONFIG)
        sums = tl.dot(rounded(w, CONFIG), grad, sums, input_precision=CONFIG.precision)
    return sums


@triton.jit(do_not_specialize=LAUNCH_INTS)
def by_keys_kernel(
    out_ptr, spans_ptr, upstream, inputs,
    out_b, out_h, out_t, grad_b, grad_h, grad_t, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s,
    bias_b, bias_h, bias_t, bias_s, mask_b, mask_h, mask_t, mask_s, rows_b, spans_b,
    batches, heads, group, together, queries, keys, line_length, table_rows, grid_h, grid_w, extra, threshold, blocks,
    factors, CONFIG: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """A tile of keys of a key head: ``grad_k``, or a block of channels of ``grad_v``, over the group's heads and the
    queries that see the tile."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_D: tl.constexpr = CONFIG.block_d
    BLOCK_E: tl.constexpr = CONFIG.block_e
    PART_M: tl.constexpr = half(CONFIG.block_m)
    UNIT: tl.constexpr = CONFIG.unit
    tiles = tl.cdiv(keys, BLOCK_N)
    key_heads = heads // group
    channel = tl.program_id(0) % blocks * BLOCK_E
    # the first tiles have most to do under a causal rule
    shared = (together + group - 1) // group
    tile, unit = own_tile(tl.program_id(0) // blocks, tiles, shared, batches * key_heads)
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
    k = load_rows(k_at, j, keys, k_s * UNIT, CONFIG.d, BLOCK_D, True, CONFIG.given)
    if MODE == "grad_k":
        sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    else:
        sums = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
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
        grad_first = (batch * grad_b + index * grad_h) * UNIT
        rest = upstream.rest
        if rest is not None:
            rest += grad_first
        starts = Starts(
            q=inputs.q + (batch * q_b + index * q_h) * UNIT,
            k=k_at,
            v=inputs.v + (batch * v_b + key_head * v_h) * UNIT,
            grad=upstream.grad + grad_first,
            rest=rest,
            q_step=q_t * UNIT,
            k_step=k_s * UNIT,
            v_step=v_s * UNIT,
            grad_step=grad_t * UNIT,
            key_first=unit.to(tl.int64) * keys,
        )
        spans = query_spans(j0, call, spans_ptr, CONFIG)
        for offset in tl.range(0, part_length(spans), PART_M, num_stages=1, disable_licm=True):
            i0 = part_at(spans, offset)
            sums = _add_queries(sums, k, starts, i0, j, j0, channel, head, upstream, CONFIG, MODE, PART_M, True)
        if inputs.mask is None:
            for offset in tl.range(0, full_length(spans), BLOCK_M, disable_licm=True):
                i0 = full_at(spans, offset)
                sums = _add_queries(sums, k, starts, i0, j, j0, channel, head, upstream, CONFIG, MODE, BLOCK_M, False)
    at = out_ptr + (batch * out_b + key_head * out_h) * UNIT
    if MODE == "grad_k":
        store_rows(at, sums * factors.scale, j, keys, out_t * UNIT, CONFIG.d, BLOCK_D)
    else:
        store_channels(at, sums, j, keys, out_t * UNIT, channel, CONFIG)
