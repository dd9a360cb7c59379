"""Which tiles of queries a tile of keys meets, where only `rows` tells: found before the backward pass of the keys.

`rows` has the keys of each query, and a tile of keys needs the reverse. One kernel writes what each tile of queries
sees, another looks through that, for each tile of keys, for the two spans that ``query_spans`` reads.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from accel.kernels.attention.arguments import Tile, launch
from accel.kernels.attention.logits import extent
from accel.ops.attention.softmax_attention import Args


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


def span_launches(args: Args, tile: Tile) -> tuple[list[Any], Tensor | None, int]:
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
