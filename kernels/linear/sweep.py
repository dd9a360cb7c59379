"""The sum over columns that is the output and the gradients of q, k and v, for a sequence or a part of it.

A program owns a head, a tile of the channels of u, and a part of the tokens, which it visits in chunks. Of a chunk it
computes the rows, from the state of the columns before the chunk and from those in it, and then adds the chunk to the
state, which stays in registers in fp32. Decay enters as differences of sums that begin with the chunk: a product of
two exponentials, one of them of a positive number, would overflow.

Where the order is not causal, one launch sums up all columns and another computes the rows.

The gradient of decay is a running sum, over a part's tokens, of what gradients of k give less what those of q give: the
same numbers in another order, which all but cancel. A token with itself, which depends on no decay, is left out of
both: beside heavy decay it would be all there is. The gradient of a query of little weight is a difference of large
numbers, too. For both, pairs and states are **fine** if operands are rounded: each is two, the rounded number and what
it lacks. Upstream gradients and values are exact as they are, and features the same rounded ones in all sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from accel.kernels.linear.arguments import FAR, LAUNCH_INTS
from accel.kernels.linear.features import feature, is_finite, load_tile, operand, remainder, slope

FLOOR = -128.0
"""Decay below it is that: exp(−128) is 0 in fp32, and nothing beside it is lost from a sum."""
_FLOOR: tl.constexpr = tl.constexpr(FLOOR)
_FAR: tl.constexpr = tl.constexpr(FAR)


@triton.constexpr_function
def kinds(mode):
    """How x, y and u are loaded."""
    return {
        "out": ("feature", "feature", "value"),
        "grad_q": ("gradient", "value", "feature"),
        "grad_k": ("value", "gradient", "feature"),
        "grad_v": ("feature", "feature", "gradient"),
    }[mode]


@triton.jit
def bounds(cu_ptr, n, tokens):
    """The first token of sequence n, and the one behind its last."""
    start = 0
    stop = tokens
    if cu_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(cu_ptr + n), 0), tokens)
        stop = tl.minimum(tl.maximum(tl.load(cu_ptr + n + 1), start), tokens)
    return start, stop


class Decay(NamedTuple):
    """That of a chunk: from its start to each token, from each to its end, and the logarithm of all."""

    from_start: Any
    to_end: Any
    total: Any


@triton.jit
def decay_of(pointers, t, inside, t0, count, at, plane, CONFIG: tl.constexpr):
    """``at``: where the head's decay begins; ``plane``: how far the lower halves of sums are from the upper ones."""
    if CONFIG.decay == "head":
        each = tl.load(pointers.decay + at)
        each = tl.where(each < _FLOOR, _FLOOR, each)
        high = (t - t0 + 1).to(tl.float32) * each
        total = count.to(tl.float32) * each
        rest = (t0 + count - 1 - t).to(tl.float32) * each
    else:
        high = tl.load(pointers.decay + at + t, mask=inside, other=0.0)
        low = tl.load(pointers.decay + plane + at + t, mask=inside, other=0.0)
        end_high = tl.load(pointers.decay + at + t0 + count - 1)
        end_low = tl.load(pointers.decay + plane + at + t0 + count - 1)
        total = end_high + end_low
        rest = (end_high - high) + (end_low - low)
    from_start = tl.where(inside, tl.exp(high), 0.0)
    return Decay(from_start, tl.where(inside, tl.exp(rest), 0.0), total)


@triton.jit
def between(pointers, t, inside, ordered, at, plane, REVERSE: tl.constexpr, CONFIG: tl.constexpr):
    """The decay between rows and columns where they are in order, else something."""
    if CONFIG.decay == "head":
        each = tl.load(pointers.decay + at)
        each = tl.where(each < _FLOOR, _FLOOR, each)
        along = (t[:, None] - t[None, :]).to(tl.float32) * each
    else:
        t = t + tl.program_id(1)  # 0: unknown to the compiler, which would keep the numbers since the chunk's beginning
        high = tl.load(pointers.decay + at + t, mask=inside, other=0.0)
        low = tl.load(pointers.decay + plane + at + t, mask=inside, other=0.0)
        along = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    if REVERSE:
        along = -along
    return tl.exp(tl.where(ordered, along, 0.0))


@triton.jit(do_not_specialize=LAUNCH_INTS)
def sweep_kernel(
    pointers, numbers,
    x_b, x_h, x_t, x_group, y_b, y_h, y_t, y_group, u_b, u_h, u_t, u_group,
    raw_b, raw_h, raw_t, raw_group, o_b, o_h, o_t,
    heads, state_group, decay_group, init_parts, states_parts, rows, columns, batches, parts, tiles,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """See above. ``*_group``: how many heads of the launch share one of that tensor."""
    C: tl.constexpr = CONFIG.chunk
    R: tl.constexpr = CONFIG.r
    V: tl.constexpr = CONFIG.v
    Z: tl.constexpr = CONFIG.z
    BLOCK_R: tl.constexpr = CONFIG.block_r
    BLOCK_V: tl.constexpr = CONFIG.block_v
    MODE: tl.constexpr = CONFIG.mode
    REVERSE: tl.constexpr = CONFIG.reverse
    UNIT: tl.constexpr = CONFIG.unit
    KINDS: tl.constexpr = kinds(CONFIG.mode)
    CAUSAL: tl.constexpr = CONFIG.rows and CONFIG.columns
    BY_KEYS: tl.constexpr = CONFIG.reverse  # rows are keys, columns are queries
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles % parts
    unit = tl.program_id(0) // tiles // parts
    head = unit % heads
    n = unit // heads
    batch = n.to(tl.int64)
    if pointers.cu_rows is not None:
        batch = batch * 0
    if CONFIG.rows:
        start, stop = bounds(pointers.cu_rows, n, rows)
    else:
        start, stop = bounds(pointers.cu_columns, n, columns)
    each = tl.cdiv(tl.cdiv(stop - start, parts), C) * C
    start = tl.minimum(start + part * each, stop)
    stop = tl.minimum(start + each, stop)
    chunks = tl.cdiv(stop - start, C)

    r = tl.arange(0, BLOCK_R)
    v0 = tile * BLOCK_V
    v = v0 + tl.arange(0, BLOCK_V)
    in_r = r < R
    in_v = v < V
    if MODE == "out":
        z_at = r
        in_z = in_r
    else:
        z_at = v
        in_z = in_v
    owner = n.to(tl.int64) * (heads // state_group) + head // state_group
    state_at = r[:, None] * V + v[None, :]
    in_state = in_r[:, None] & in_v[None, :]
    if pointers.init is not None:
        init_ptr = pointers.init + (owner * init_parts + part % init_parts) * (R * V + Z)
        state = tl.load(init_ptr + state_at, mask=in_state, other=0.0)
    else:
        state = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    z = tl.zeros(z_at.shape, tl.float32)
    if Z > 0:  # noqa: SIM102  both sides of "and" are compiled
        if pointers.init is not None:
            z = tl.load(init_ptr + R * V + z_at, mask=in_z, other=0.0)
    first = tl.program_id(0) * 0 + _FAR
    if pointers.first is not None:
        first = tl.load(pointers.first + owner)
    total = 0.0

    y_ptr = pointers.y
    u_ptr = pointers.u
    if CONFIG.columns:
        y_ptr += (batch * y_b + (head // y_group).to(tl.int64) * y_h) * UNIT
        u_ptr += (batch * u_b + (head // u_group).to(tl.int64) * u_h) * UNIT
    x_ptr = pointers.x
    o_ptr = pointers.o
    raw_ptr = pointers.raw
    if CONFIG.rows:
        x_ptr += (batch * x_b + (head // x_group).to(tl.int64) * x_h) * UNIT
        o_ptr += (batch * o_b + head.to(tl.int64) * o_h) * UNIT
        if pointers.raw is not None:
            raw_ptr += (batch * raw_b + (head // raw_group).to(tl.int64) * raw_h) * UNIT
        by_row = (batch * heads + head) * rows
    state_in = operand(state, CONFIG)
    decay_at = batch * 0
    plane = batch * 0
    if CONFIG.decay == "head":
        decay_at += head // decay_group
    elif CONFIG.decay == "token":
        decay_at += (batch * (heads // decay_group) + head // decay_group) * columns
        plane += batches.to(tl.int64) * (heads // decay_group) * columns

    for step in tl.range(0, chunks, disable_licm=True):
        t0 = start + step * C
        if REVERSE:
            t0 = start + (chunks - 1 - step) * C
        t = t0 + tl.arange(0, C)
        inside = t < stop
        key_seen = inside
        if pointers.mask is not None:
            keys = columns
            if BY_KEYS:
                keys = rows
            kept = tl.load(pointers.mask + batch * keys + t, mask=inside, other=0)
            key_seen = inside & (kept != 0)
        row_seen = inside
        column_seen = key_seen
        if BY_KEYS:
            row_seen = key_seen
            column_seen = inside
        factor = None
        constant = None
        if MODE != "out":
            queries = rows
            if BY_KEYS:
                queries = columns
            by_query = (batch * heads + head) * queries + t
            if (MODE == "grad_q" and CONFIG.rows) or (BY_KEYS and CONFIG.columns):
                factor = tl.load(pointers.factor + by_query, mask=inside, other=0.0)
                if Z > 0:
                    constant = tl.load(pointers.constant + by_query, mask=inside, other=0.0)
            else:
                factor = tl.zeros((C,), tl.float32)
                constant = factor
        shrink = 1.0
        if CONFIG.decay != "":
            count = tl.minimum(stop - t0, C)
            decay = decay_of(pointers, t, inside, t0, count, decay_at, plane, CONFIG)
            shrink = tl.exp(decay.total)
            total += decay.total
            row_decay = decay.from_start
            column_decay = decay.to_end
            if REVERSE:
                row_decay = decay.to_end
                column_decay = decay.from_start
        if MODE != "out":  # it enters in fp32 after the products, whose operands are exact then
            weight = tl.where(factor == factor, factor, 0.0)
        # in the order in which registers hold it all: x and y, their pairs, then u and what it is multiplied with
        if CONFIG.rows:
            x, x_bad = load_tile(x_ptr, t, row_seen, x_t * UNIT, 0, factor, KINDS[0], R, BLOCK_R, CONFIG)
            if MODE == "out" and Z > 0:
                den = tl.sum(x.to(tl.float32) * z[None, :], 1)
                if CONFIG.decay != "":
                    den *= row_decay
        if CONFIG.columns:
            y, y_bad = load_tile(y_ptr, t, column_seen, y_t * UNIT, 0, factor, KINDS[1], R, BLOCK_R, CONFIG)
            if MODE == "out" and Z > 0:
                counted = y.to(tl.float32)
                if CONFIG.decay != "":
                    counted *= column_decay[:, None]
                z = z * shrink + tl.sum(counted, 0)
        if CAUSAL:
            w = tl.dot(x, tl.trans(y), input_precision=CONFIG.precision)
            if Z > 0:
                if MODE == "grad_q":
                    w += constant[:, None]
                elif MODE == "grad_k":
                    w += constant[None, :]
            if REVERSE:
                ordered = (t[:, None] <= t[None, :]) & inside[None, :]
            else:
                ordered = t[:, None] >= t[None, :]
            if CONFIG.decay != "":
                w *= between(pointers, t, inside, ordered, decay_at, plane, REVERSE, CONFIG)
            if REVERSE:
                w *= weight[None, :]
            if pointers.dots is not None:
                ordered = ordered & (t[:, None] != t[None, :])
            w = tl.where(ordered, w, 0.0)
            pairs = operand(w, CONFIG)
            if CONFIG.fine:
                more_pairs = remainder(w, pairs, CONFIG)
            if MODE == "out" and Z > 0:
                used = pairs.to(tl.float32)
                if CONFIG.fine:
                    used += more_pairs.to(tl.float32)
                den += tl.sum(used, 1)  # of those that are used: a row of one key gives its value
        if CONFIG.columns:
            u, u_bad = load_tile(u_ptr, t, column_seen, u_t * UNIT, v0, factor, KINDS[2], V, BLOCK_V, CONFIG)
            weighed = u.to(tl.float32)
            if REVERSE:
                weighed *= weight[:, None]
            if CONFIG.decay != "":
                weighed *= column_decay[:, None]
            added = operand(weighed, CONFIG)
            if CONFIG.fine:
                more_added = remainder(weighed, added, CONFIG)
            if MODE != "grad_q":
                if MODE == "out":
                    bad = y_bad | u_bad
                elif MODE == "grad_k":
                    bad = y_bad
                else:
                    bad = u_bad
                place = t
                if REVERSE:
                    place = -t
                first = tl.minimum(first, tl.min(tl.where(bad & inside, place, _FAR), 0))

        if CONFIG.rows:
            if CONFIG.columns:
                state_in = operand(state, CONFIG)
            o = tl.dot(x, state_in, input_precision=CONFIG.precision)
            if CONFIG.fine:
                o = tl.dot(x, remainder(state, state_in, CONFIG), o, input_precision=CONFIG.precision)
            if Z > 0:
                if MODE == "grad_q":
                    o += constant[:, None] * z[None, :]
                elif MODE == "grad_k":
                    o += z[None, :]
            if CONFIG.decay != "":
                o *= row_decay[:, None]
            if CAUSAL:
                o = tl.dot(pairs, u, o, input_precision=CONFIG.precision)
                if CONFIG.fine:
                    o = tl.dot(more_pairs, u, o, input_precision=CONFIG.precision)
            if MODE == "out":
                o *= numbers.scale
                if Z > 0:
                    den = den * numbers.scale + numbers.eps
                    nothing = den == 0.0
                    o = tl.where(nothing[:, None], 0.0, o / tl.where(nothing, 1.0, den)[:, None])
                    if pointers.den is not None:
                        tl.store(pointers.den + by_row + t, den, mask=inside & (tile == 0))
            if MODE == "grad_q":
                o *= weight[:, None]
                lost = x_bad
            else:
                if CAUSAL:
                    place = t
                    if REVERSE:
                        place = -t
                else:
                    place = tl.full((C,), _FAR - 1, tl.int32)
                lost = place >= first
                if MODE == "out":
                    lost = lost | x_bad
            inside_v = inside[:, None] & in_v[None, :]
            if MODE == "grad_q" or MODE == "grad_k":  # noqa: SIM102  both sides of "and" are compiled
                if pointers.raw is not None:
                    seen_v = row_seen[:, None] & in_v[None, :]
                    raw_at = t.to(tl.int64)[:, None] * (raw_t * UNIT) + v[None, :]
                    raw = tl.load(raw_ptr + raw_at, mask=seen_v, other=0.0).to(tl.float32)
                    found = feature(raw, CONFIG.features)
                    good = is_finite(found) & seen_v
                    if pointers.dots is not None:
                        dots_at = (tile * batches).to(tl.int64) * heads * rows + by_row + t
                        along = operand(found, CONFIG).to(tl.float32) * o
                        tl.store(pointers.dots + dots_at, tl.sum(tl.where(good, along, 0.0), 1), mask=inside)
                        own = tl.load(pointers.own + by_row + t, mask=inside, other=0.0)
                        o += own[:, None] * u.to(tl.float32)
                    o = tl.where(good, o * slope(raw, CONFIG.features), 0.0)
            o = tl.where(lost[:, None], float("nan"), o)
            if BY_KEYS:
                o = tl.where(row_seen[:, None], o, 0.0)
            o_at = t.to(tl.int64)[:, None] * (o_t * UNIT) + v[None, :]
            tl.store(o_ptr + o_at, o.to(pointers.o.dtype.element_ty), mask=inside_v)

        if CONFIG.columns:
            state = tl.dot(tl.trans(y), added, state * shrink, input_precision=CONFIG.precision)
            if CONFIG.fine:
                state = tl.dot(tl.trans(y), more_added, state, input_precision=CONFIG.precision)
            if MODE != "out" and Z > 0:
                weighed = added.to(tl.float32)
                if CONFIG.fine:
                    weighed += more_added.to(tl.float32)
                if MODE == "grad_k":
                    weighed *= constant[:, None]
                z = z * shrink + tl.sum(weighed, 0)

    if pointers.states is not None:
        if pointers.totals is None:  # else the first token that is not finite is not known yet
            state = tl.where(first < _FAR, float("nan"), state)
            z = tl.where(first < _FAR, float("nan"), z)
        place = owner * states_parts + part % states_parts
        mine = head % state_group == 0
        states_ptr = pointers.states + place * (R * V + Z)
        again = tl.program_id(1)  # 0: unknown to the compiler, which would keep the first addresses for this
        r = again + tl.arange(0, BLOCK_R)
        v = again + v0 + tl.arange(0, BLOCK_V)
        in_state = (r < R)[:, None] & (v < V)[None, :] & mine
        tl.store(states_ptr + (r[:, None] * V + v[None, :]), state, mask=in_state)
        if Z > 0:
            tl.store(states_ptr + R * V + z_at, z, mask=in_z & mine & ((tile == 0) | (MODE != "out")))
        if pointers.totals is not None:
            tl.store(pointers.totals + place, total, mask=mine & (tile == 0))
    if pointers.flags is not None:
        flag_at = ((n.to(tl.int64) * heads + head) * parts + part) * tiles + tile
        tl.store(pointers.flags + flag_at, first)
