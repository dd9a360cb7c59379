"""Which tiles a program visits: of keys for a tile of queries, and of queries for a tile of keys."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from accel.kernels._pairs import Tile, launch

ROW_FIELDS: tl.constexpr = tl.constexpr(5)  # of a query in `rows`: first0, end0, first1, end1, shift

# --- the tiles that a program visits ---
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

    Rows past the last query need no mask there: kernels read for them what leaves every sum as it is.
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


# --- where only `rows` tells which tiles of queries a tile of keys meets ---
#
# `rows` has the keys of each query, and a tile of keys needs the reverse: found before the backward pass of the keys.
# One kernel writes what each tile of queries sees, another looks through that, for each tile of keys, for the two spans
# that ``query_spans`` reads.


@triton.jit(do_not_specialize=["queries", "keys"])
def query_extents_kernel(extents_ptr, rows_ptr, queries, keys, BLOCK_M: tl.constexpr):
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
def query_spans_kernel(spans_ptr, extents_ptr, queries, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
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


def span_launches(args: Any, tile: Tile) -> tuple[list[Any], Tensor | None, int]:
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
    given.update(BLOCK_M=tile.queries, BLOCK_N=tile.keys)
    launches = [
        launch(query_extents_kernel, batches * query_tiles, small, **given),
        launch(query_spans_kernel, batches * key_tiles, small, **given),
    ]
    return launches, spans, 8 * key_tiles if batches > 1 else 0
