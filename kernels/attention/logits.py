"""What the softmax attention kernels share: which tiles a program visits, the logits of a tile, its gradients.

A tile has queries on one axis and keys on the other; helpers take both as broadcastable 2-D indices, so that they
serve either order. What belongs together travels as a NamedTuple, and what is compiled in as ``CONFIG``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from accel.kernels._launch import keep_bits

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LEAST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # of fp32
FAR: tl.constexpr = tl.constexpr(128.0)  # a log-sum-exp beyond is off by more than 4e-6
FAR_IN_HALF: tl.constexpr = tl.constexpr(1024.0)  # by more than 4e-5, in units of ln 2
ROW_FIELDS: tl.constexpr = tl.constexpr(5)  # of a query in `rows`: first0, end0, first1, end1, shift

# --- a call, and one head of it ---


class Plane(NamedTuple):
    """A tensor over queries and keys: its steps by batch entry, head, query and key."""

    b: Any
    h: Any
    t: Any
    s: Any


class Grid(NamedTuple):
    """Height and width of the grid of tokens, and how many extra ones stand before it."""

    h: Any
    w: Any
    extra: Any


class Call(NamedTuple):
    """What a kernel is given but for keys, queries and values."""

    inputs: Any
    factors: Any
    bias: Any
    mask: Any
    heads: Any
    queries: Any
    keys: Any
    line_length: Any
    table_rows: Any
    grid: Any
    threshold: Any


class Head(NamedTuple):
    """The same for one head of a batch entry: where its rows, bias and mask begin, and the queries of all heads before
    it. Kernels build it themselves: Triton 3.6 cannot return tuples of tuples from a function."""

    call: Any
    index: Any
    rows: Any
    bias_at: Any
    mask_at: Any
    first: Any


@triton.jit
def rows_of(call, batch, rows_b):
    """Where the rows of a batch entry begin, None if there are none."""
    rows = call.inputs.rows
    if rows is not None:
        rows += batch * rows_b
    return rows


# --- memory ---


@triton.jit
def load_rows(ptr, row, count, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr, DOT: tl.constexpr):
    """``(rows, BLOCK_D)`` in DOT; channels past D are 0 and, with EDGE, so are rows past ``count``."""
    d = tl.arange(0, BLOCK_D)
    at = row.to(tl.int64)[:, None] * stride + d[None, :]
    if EDGE or BLOCK_D != D:
        x = tl.load(ptr + at, mask=(row < count)[:, None] & (d < D)[None, :], other=0.0)
    else:
        x = tl.load(ptr + at)
    return x.to(DOT)


@triton.jit
def store_rows(ptr, x, row, count, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    at = row.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=(row < count)[:, None] & (d < D)[None, :])


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")  # nor is a NaN


@triton.jit
def clean(x):
    """``x`` with 0 for what is not finite, and whether a row held such: weight 0 times NaN would be NaN."""
    good = x.to(tl.float32) * 0.0 == 0.0
    return tl.where(good, x, 0.0), tl.max(tl.where(good, 0, 1), 1) > 0


class KeySide(NamedTuple):
    """Where the keys and values of a head begin, and the steps from row to row."""

    k: Any
    v: Any
    k_step: Any
    v_step: Any


class QuerySide(NamedTuple):
    """Where the queries of a head and what a backward pass starts from begin, and the steps from row to row."""

    q: Any
    grad: Any
    q_step: Any
    grad_step: Any
    lse: Any
    delta: Any


# --- which program computes what ---


@triton.jit
def own_tile(program, tiles, together, units):
    """The tile and the unit (a head of a batch entry) of a program: ``together`` units share the cache, the
    first tile of each of them first, so that what takes longest under a causal rule is not left for the end."""
    first = program // (together * tiles) * together
    count = tl.minimum(together, units - first)
    rest = program - first * tiles
    return rest // count, first + rest % count


# --- spans: the tiles that a program visits ---
#
# A tile of queries sees keys in two intervals. In whole tiles of keys that is two spans, each a run of tiles inside the
# interval of every query (no mask is needed there) between tiles that are seen in part; and likewise with the roles
# exchanged. Offsets are in tokens: (start, full, full_end, end) and the same for the second span.


@triton.jit
def _in_tiles(low, high, whole_low, whole_high, BLOCK: tl.constexpr):
    """The span that touches ``[low, high)`` with its full tiles in ``[whole_low, whole_high)``."""
    empty = low >= high
    start = tl.where(empty, 0, low // BLOCK * BLOCK)
    end = tl.where(empty, 0, (high + BLOCK - 1) // BLOCK * BLOCK)
    full = tl.minimum(tl.maximum((whole_low + BLOCK - 1) // BLOCK * BLOCK, start), end)
    full_end = tl.minimum(tl.maximum(whole_high // BLOCK * BLOCK, full), end)
    return start, full, full_end, end


@triton.jit
def _apart(span0, span1):
    """Both spans, as one where they share a tile, which keeps the longer run of full tiles."""
    start0, full0, full_end0, end0 = span0
    start1, full1, full_end1, end1 = span1
    shared = tl.maximum(start0, start1) < tl.minimum(end0, end1)
    longer = shared & (full_end1 - full1 > full_end0 - full0)
    start = tl.where(shared, tl.minimum(start0, start1), start0)
    end = tl.where(shared, tl.maximum(end0, end1), end0)
    full = tl.where(longer, full1, full0)
    full_end = tl.where(longer, full_end1, full_end0)
    end1 = tl.where(shared, start1, end1)
    return (
        start,
        full,
        full_end,
        end,
        start1,
        tl.minimum(full1, end1),
        tl.minimum(full_end1, end1),
        end1,
    )


@triton.jit
def extent(rows_ptr, i, queries, keys, COLUMN: tl.constexpr):
    """Of the intervals at COLUMN of queries i: the hull ``[low, high)``, and what all of them contain."""
    real = i < queries
    at = i.to(tl.int64) * ROW_FIELDS + COLUMN
    first = tl.load(rows_ptr + at, mask=real, other=0)
    end = tl.minimum(tl.load(rows_ptr + at + 1, mask=real, other=0), keys)
    some = first < end
    low = tl.min(tl.where(some, first, keys), 0)
    high = tl.max(tl.where(some, end, 0), 0)
    return low, high, tl.max(first, 0), tl.min(tl.where(real, end, keys), 0)


@triton.jit
def key_spans(i0, call, rows, CONFIG: tl.constexpr):
    """Spans of keys for the tile of queries at ``i0``."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    queries = call.queries
    keys = call.keys
    zero = queries * 0
    if CONFIG.rule == "other":
        i = i0 + tl.arange(0, BLOCK_M)
        low, high, whole_low, whole_high = extent(rows, i, queries, keys, 0)
        span0 = _in_tiles(low, high, whole_low, whole_high, BLOCK_N)
        low, high, whole_low, whole_high = extent(rows, i, queries, keys, 2)
        spans = _apart(span0, _in_tiles(low, high, whole_low, whole_high, BLOCK_N))
    else:
        high = keys
        whole_high = keys
        if CONFIG.rule == "causal":
            high = tl.minimum(keys, tl.minimum(i0 + BLOCK_M, queries))
            whole_high = tl.minimum(keys, i0 + 1)
        start, full, full_end, end = _in_tiles(zero, high, zero, whole_high, BLOCK_N)
        spans = (start, full, full_end, end, zero, zero, zero, zero)
    if call.inputs.mask is not None:
        spans = all_in_part(spans)
    return spans


@triton.jit
def query_spans(j0, call, spans_ptr, CONFIG: tl.constexpr):
    """Spans of queries for the tile of keys at ``j0``; ``spans_ptr`` has them where only `rows` tells.

    All are in part for a tile that reaches past the last key.

    Rows past the last query need no mask: their log-sum-exp is read as +inf, which makes every weight 0.
    """
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    queries = call.queries
    keys = call.keys
    zero = queries * 0
    if CONFIG.rule == "other":
        spans = (
            tl.load(spans_ptr),
            tl.load(spans_ptr + 1),
            tl.load(spans_ptr + 2),
            tl.load(spans_ptr + 3),
            tl.load(spans_ptr + 4),
            tl.load(spans_ptr + 5),
            tl.load(spans_ptr + 6),
            tl.load(spans_ptr + 7),
        )
    else:
        end = (queries + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        low = zero
        whole_low = zero
        if CONFIG.rule == "causal":
            low = j0
            whole_low = j0 + BLOCK_N - 1
        whole_low = tl.where(j0 + BLOCK_N > keys, end, whole_low)
        start, full, full_end, end = _in_tiles(low, queries, whole_low, end, BLOCK_M)
        spans = (start, full, full_end, end, zero, zero, zero, zero)
    if call.inputs.mask is not None:
        spans = all_in_part(spans)
    return spans


@triton.jit
def all_in_part(spans):
    """The same tiles, none of them full."""
    start0, _, _, end0, start1, _, _, end1 = spans
    return start0, start0, start0, end0, start1, start1, start1, end1


@triton.constexpr_function
def half(block):
    """Steps over tiles seen in part are half as wide where that is enough for tensor cores: masks take registers."""
    return block // 2 if block > 32 else block


@triton.jit
def part_length(spans):
    """How many tokens the tiles seen in part have together."""
    start0, full0, full_end0, end0, start1, full1, full_end1, end1 = spans
    return end0 - start0 - (full_end0 - full0) + end1 - start1 - (full_end1 - full1)


@triton.jit
def full_length(spans):
    _, full0, full_end0, _, _, full1, full_end1, _ = spans
    return full_end0 - full0 + full_end1 - full1


@triton.jit
def part_at(spans, offset):
    """Where the tile at ``offset`` among those seen in part starts."""
    start0, full0, full_end0, end0, start1, full1, full_end1, _ = spans
    at = start0 + offset
    at = tl.where(at >= full0, at + full_end0 - full0, at)
    second = at - end0 + start1
    second = tl.where(second >= full1, second + full_end1 - full1, second)
    return tl.where(at >= end0, second, at)


@triton.jit
def full_at(spans, offset):
    """Where the tile at ``offset`` among the full ones starts."""
    _, full0, full_end0, _, _, full1, _, _ = spans
    at = full0 + offset
    return tl.where(at >= full_end0, at - full_end0 + full1, at)


# --- a tile ---


@triton.jit
def visible(i, j, i0, j0, head, CONFIG: tl.constexpr):
    """Whether query i may see key j."""
    queries = head.call.queries
    seen = (i < queries) & (j < head.call.keys)
    if CONFIG.rule == "causal":
        seen &= j <= i
    if CONFIG.rule == "other":
        row = head.rows + i.to(tl.int64) * ROW_FIELDS
        first0 = tl.load(row, mask=i < queries, other=0)
        end0 = tl.load(row + 1, mask=i < queries, other=0)
        first1 = tl.load(row + 2, mask=i < queries, other=0)
        end1 = tl.load(row + 3, mask=i < queries, other=0)
        seen &= ((j >= first0) & (j < end0)) | ((j >= first1) & (j < end1))
    if head.call.inputs.mask is not None:
        mask = head.call.mask
        corner = head.call.inputs.mask + head.mask_at + i0.to(tl.int64) * mask.t + j0.to(tl.int64) * mask.s
        seen &= tl.load(corner + (i - i0) * mask.t + (j - j0) * mask.s, mask=seen, other=0) != 0
    return seen


@triton.jit
def line_place(i, call, rows):
    """``shift_i`` of a line: a pair takes element ``shift_i − j``."""
    if rows is None:
        place = i + call.keys - 1
    else:
        place = tl.load(rows + i.to(tl.int64) * ROW_FIELDS + 4, mask=i < call.queries, other=0)
    return place


@triton.jit
def grid_place(token, grid):
    """A token's place on the grid as a number; the table's row for a pair is the difference of two, plus a constant."""
    at = token - grid.extra
    return at // grid.w * (2 * grid.w - 1) + at % grid.w


@triton.jit
def grid_middle(grid):
    """The table's row for a token and itself."""
    return (grid.h - 1) * (2 * grid.w - 1) + grid.w - 1


@triton.jit
def _grid_row(i, j, grid):
    last = (2 * grid.h - 1) * (2 * grid.w - 1)
    row = grid_place(i, grid) - grid_place(j, grid) + grid_middle(grid)
    row = tl.where(j < grid.extra, last + 1, row)
    return tl.where(i < grid.extra, tl.where(j < grid.extra, last + 2, last), row)


@triton.jit
def table_row(i, j, i0, j0, call, CONFIG: tl.constexpr):
    """Row of the bias table for query i and key j, from the index or in closed form. Bounded by the reader."""
    if CONFIG.grid:
        row = _grid_row(i, j, call.grid)
    else:
        keys = call.keys
        corner = call.inputs.bias_index + i0.to(tl.int64) * keys + j0
        row = tl.load(corner + (i - i0) * keys + (j - j0), mask=(i < call.queries) & (j < keys), other=0)
    return row


@triton.jit
def _tanh(x):
    """tanh in fp32 without cancellation near 0."""
    square = x * x
    near = ((62.0 / 2835.0 * square - 17.0 / 315.0) * square + 2.0 / 15.0) * square - 1.0 / 3.0
    near = x + x * square * near
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0.0, -far, far))


@triton.jit
def in_units(x, UNITS: tl.constexpr):
    """What is added to a logit, in its units. The least number, which masks add, must not overflow: −∞ hides a key."""
    if UNITS != 1.0:
        x = tl.maximum(x * UNITS, tl.minimum(x, LEAST), propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def logits(raw, i, j, i0, j0, head, CONFIG: tl.constexpr):
    """Logits from the product ``raw``, and that product capped: tanh of it, where there is a cap.

    Where ``CONFIG.binary`` they are in units of ln 2, which saves half precision a product an element. In fp32 the
    roundings of that change of units would show.
    """
    UNITS: tl.constexpr = LOG2_E if CONFIG.binary else 1.0
    call = head.call
    scale = call.factors.scale
    if CONFIG.softcap:
        raw = _tanh(raw * (scale / call.factors.softcap))
        s = raw * (call.factors.softcap * UNITS)
    else:
        s = raw * (scale * UNITS)
    if call.inputs.bias is not None:
        corner = call.inputs.bias + head.bias_at + i0.to(tl.int64) * call.bias.t + j0.to(tl.int64) * call.bias.s
        at = (i - i0) * call.bias.t + (j - j0) * call.bias.s
        s += in_units(tl.load(corner + at, mask=(i < call.queries) & (j < call.keys), other=0.0).to(tl.float32), UNITS)
    if call.inputs.line is not None:
        at = tl.minimum(tl.maximum(line_place(i, call, head.rows) - j, 0), call.line_length - 1)
        s += in_units(tl.load(call.inputs.line + head.index.to(tl.int64) * call.line_length + at), UNITS)
    if call.inputs.table is not None:
        row = table_row(i, j, i0, j0, call, CONFIG)
        row = tl.minimum(tl.maximum(row, 0), call.table_rows - 1)
        s += in_units(tl.load(call.inputs.table + head.index + row * call.heads), UNITS)
    return s, raw


@triton.jit
def keep(i, j, head):
    """Dropout's keep bits."""
    return keep_bits(head.call.inputs.seed, (head.first + i) * head.call.keys + j, head.call.threshold)


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
