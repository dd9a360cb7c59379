"""What the kernels that weigh pairs of queries and keys share: a call as data, the memory of a tile, its logits.

A tile has queries on one axis and keys on the other; helpers take both as broadcastable 2-D indices, so that they
serve either order. What belongs together travels as a NamedTuple, and what is compiled in as ``CONFIG``: see
``Config`` in the shelves' ``arguments.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from accel.kernels._launch import keep_bits
from accel.kernels._spans import ROW_FIELDS

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LEAST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # of fp32

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
