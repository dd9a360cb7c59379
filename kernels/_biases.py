"""The kernels for gradients of biases of logits, each added up by owners in a fixed order.

The gradient of a tile of logits is computed again by an op's own function, ``TILE_GRADIENT``. A dense bias is owned
tile by tile; a line and the table of a grid are added up along the tile's diagonals, a table with an index by a product
with its one-hot code. Where owners are few, each is split in parts of a number that only shapes decide; the parts are
summed at the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from accel.kernels._logits import Call, Grid, Plane, grid_middle, grid_place, line_place, rows_of, table_row
from accel.kernels._pairs import LAUNCH_INTS
from accel.kernels._spans import all_in_part, key_spans, part_at, part_length

CODE: tl.constexpr = tl.constexpr(32)  # rows of a table go as CODE × CODE one-hot codes


class Side(NamedTuple):
    """A tensor ``(B, H, tokens, ·)`` and its steps by batch entry, head and token."""

    ptr: Any
    b: Any
    h: Any
    t: Any


class Sides(NamedTuple):
    """What the product of a tile and its gradient come from. ``group`` is how many heads share a key head."""

    q: Any
    k: Any
    v: Any
    grad: Any
    group: Any


@triton.jit
def _meets(spans, j0):
    """Whether the tile of keys at ``j0`` is in the spans."""
    start0, _, _, end0, start1, _, _, end1 = spans
    return ((start0 <= j0) & (j0 < end0)) | ((start1 <= j0) & (j0 < end1))


@triton.jit(do_not_specialize=LAUNCH_INTS)
def bias_kernel(
    part_ptr, upstream, inputs,
    grad_b, grad_h, grad_t, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s,
    bias_b, bias_h, bias_t, bias_s, mask_b, mask_h, mask_t, mask_s, rows_b,
    heads, group, queries, keys, line_length, table_rows, grid_h, grid_w, extra, threshold,
    per_part, owners_b, owners_h, owners_t, owners_s, total,
    factors, CONFIG: tl.constexpr, TILE_GRADIENT: tl.constexpr, ALONG_T: tl.constexpr, ALONG_S: tl.constexpr,
):  # fmt: skip
    """A part of a tile of the bias' gradient: over ``per_part`` of the tiles of logits that take the same bias.

    ``owners`` are the bias' own axes, in tiles; along any other axis it is 1 and the program goes over all.
    """
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    tiles_t = tl.cdiv(queries, BLOCK_M)
    tiles_s = tl.cdiv(keys, BLOCK_N)
    own_s = tl.program_id(0) % owners_s
    rest = tl.program_id(0) // owners_s
    own_t = rest % owners_t
    rest = rest // owners_t
    own_h = rest % owners_h
    own_b = rest // owners_h % owners_b
    part = (rest // (owners_h * owners_b)).to(tl.int64)
    over_s = tiles_s // owners_s
    over_t = tiles_t // owners_t
    over_h = heads // owners_h
    sides = Sides(
        q=Side(inputs.q, q_b, q_h, q_t),
        k=Side(inputs.k, k_b, k_h, k_s),
        v=Side(inputs.v, v_b, v_h, v_s),
        grad=Side(upstream.grad, grad_b, grad_h, grad_t),
        group=group,
    )
    bias, mask = Plane(bias_b, bias_h, bias_t, bias_s), Plane(mask_b, mask_h, mask_t, mask_s)
    grid = Grid(grid_h, grid_w, extra)
    call = Call(inputs, factors, bias, mask, heads, queries, keys, line_length, table_rows, grid, threshold)
    total_gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = part * per_part
    for step in tl.range(0, tl.minimum(per_part, total - first), disable_licm=True):
        n = first + step
        j0 = (own_s + (n % over_s).to(tl.int32)) * BLOCK_N
        i0 = (own_t + (n // over_s % over_t).to(tl.int32)) * BLOCK_M
        n = n // over_s // over_t
        index = own_h + n % over_h
        batch = own_b + n // over_h
        mask_at = batch * mask_b + index * mask_h
        rows = rows_of(call, batch, rows_b)
        if _meets(key_spans(i0, call, rows, CONFIG), j0):
            total_gradient += TILE_GRADIENT(i0, j0, batch, index, rows, mask_at, call, sides, upstream, CONFIG)
    owner = (part * owners_b + own_b) * owners_h + own_h
    i = own_t * BLOCK_M + tl.arange(0, BLOCK_M)
    j = own_s * BLOCK_N + tl.arange(0, BLOCK_N)
    if ALONG_T and ALONG_S:
        at = (owner * queries + i[:, None]) * keys + j[None, :]
        tl.store(part_ptr + at, total_gradient, mask=(i < queries)[:, None] & (j < keys)[None, :])
    elif ALONG_T:
        tl.store(part_ptr + owner * queries + i, tl.sum(total_gradient, 1), mask=i < queries)
    elif ALONG_S:
        tl.store(part_ptr + owner * keys + j, tl.sum(total_gradient, 0), mask=j < keys)
    else:
        tl.store(part_ptr + owner, tl.sum(tl.sum(total_gradient, 1), 0))


# --- along the diagonals: a line, or the table of a grid ---


@triton.jit
def _add_diagonals(bins_ptr, grad_s, i, j0, call, rows, bins, CONFIG: tl.constexpr, ON_GRID: tl.constexpr):
    """Add a tile to the program's own bins: bin m gets, of each query, the key that stands m behind its place."""
    WINDOW: tl.constexpr = CONFIG.block_n
    queries = call.queries
    grid = call.grid
    last = tl.minimum(j0 + WINDOW, call.keys) - 1
    if ON_GRID:
        place = grid_place(i, grid) + grid_middle(grid)
        real = (i < queries) & (i >= grid.extra)
        low_key = grid_place(tl.maximum(j0, grid.extra), grid)
        high_key = grid_place(tl.maximum(last, grid.extra), grid)
    else:
        place = line_place(i, call, rows)
        real = i < queries
        low_key = j0
        high_key = last
    low = tl.maximum(tl.min(tl.where(real, place, 2147483647), 0) - high_key, 0)
    high = tl.minimum(tl.max(tl.where(real, place, -1), 0) - low_key, bins - 1)
    # The bins are this program's alone; the barrier lets its threads see what others of them have written.
    for start in tl.range(low // WINDOW * WINDOW, high + 1, WINDOW, disable_licm=True):
        m = start + tl.arange(0, WINDOW)
        behind = place[:, None] - m[None, :]
        if ON_GRID:
            x = behind % (2 * grid.w - 1)
            key = behind // (2 * grid.w - 1) * grid.w + x + grid.extra
            held = (behind >= 0) & (x < grid.w)
        else:
            key = behind
            held = behind >= 0
        held &= real[:, None] & (key >= j0) & (key <= last)
        picked = tl.gather(grad_s, tl.where(held, key - j0, 0), 1)
        sums = tl.sum(tl.where(held, picked, 0.0), 0)
        before = tl.load(bins_ptr + m, mask=m < bins, other=0.0)
        tl.store(bins_ptr + m, before + sums, mask=m < bins)
        tl.debug_barrier()


@triton.jit(do_not_specialize=LAUNCH_INTS)
def diagonals_kernel(
    part_ptr, upstream, inputs,
    grad_b, grad_h, grad_t, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s,
    bias_b, bias_h, bias_t, bias_s, mask_b, mask_h, mask_t, mask_s, rows_b,
    heads, group, queries, keys, line_length, table_rows, grid_h, grid_w, extra, threshold,
    per_part, bins, total,
    factors, CONFIG: tl.constexpr, TILE_GRADIENT: tl.constexpr, ON_GRID: tl.constexpr,
):  # fmt: skip
    """A part of the gradient of a head's line or grid table: over ``per_part`` tiles of queries of the batch.

    ``part_ptr`` is ``(parts, heads, bins)`` of zeros, with three more for the extra tokens of a grid.
    """
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BINS_BEHIND: tl.constexpr = 3 if ON_GRID else 0
    part = tl.program_id(0) // heads
    index = (tl.program_id(0) % heads).to(tl.int64)
    tiles = tl.cdiv(queries, BLOCK_M)
    bins_ptr = part_ptr + tl.program_id(0).to(tl.int64) * (bins + BINS_BEHIND)
    from_extra = tl.zeros((BLOCK_N,), tl.float32)
    to_extra = tl.zeros((BLOCK_N,), tl.float32)
    between_extra = tl.zeros((BLOCK_N,), tl.float32)
    sides = Sides(
        q=Side(inputs.q, q_b, q_h, q_t),
        k=Side(inputs.k, k_b, k_h, k_s),
        v=Side(inputs.v, v_b, v_h, v_s),
        grad=Side(upstream.grad, grad_b, grad_h, grad_t),
        group=group,
    )
    bias, mask = Plane(bias_b, bias_h, bias_t, bias_s), Plane(mask_b, mask_h, mask_t, mask_s)
    grid = Grid(grid_h, grid_w, extra)
    call = Call(inputs, factors, bias, mask, heads, queries, keys, line_length, table_rows, grid, threshold)
    first = part * per_part
    for step in tl.range(0, tl.minimum(per_part, total - first), disable_licm=True):
        batch = ((first + step) // tiles).to(tl.int64)
        i0 = (first + step) % tiles * BLOCK_M
        i = i0 + tl.arange(0, BLOCK_M)
        mask_at = batch * mask_b + index * mask_h
        rows = rows_of(call, batch, rows_b)
        spans = all_in_part(key_spans(i0, call, rows, CONFIG))
        for offset in tl.range(0, part_length(spans), BLOCK_N, disable_licm=True):
            j0 = part_at(spans, offset)
            grad_s = TILE_GRADIENT(i0, j0, batch, index, rows, mask_at, call, sides, upstream, CONFIG)
            _add_diagonals(bins_ptr, grad_s, i, j0, call, rows, bins, CONFIG, ON_GRID)
            if ON_GRID:
                query_extra = (i < extra)[:, None]
                key_extra = (j0 + tl.arange(0, BLOCK_N) < extra)[None, :]
                from_extra += tl.sum(tl.where(query_extra & ~key_extra, grad_s, 0.0), 0)
                to_extra += tl.sum(tl.where(~query_extra & key_extra, grad_s, 0.0), 0)
                between_extra += tl.sum(tl.where(query_extra & key_extra, grad_s, 0.0), 0)
    if ON_GRID:
        tl.store(bins_ptr + bins, tl.sum(from_extra, 0))
        tl.store(bins_ptr + bins + 1, tl.sum(to_extra, 0))
        tl.store(bins_ptr + bins + 2, tl.sum(between_extra, 0))


# --- a table with an index ---


@triton.jit(do_not_specialize=LAUNCH_INTS)
def index_kernel(
    part_ptr, upstream, inputs,
    grad_b, grad_h, grad_t, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s,
    bias_b, bias_h, bias_t, bias_s, mask_b, mask_h, mask_t, mask_s, rows_b,
    batches, heads, group, queries, keys, line_length, table_rows, grid_h, grid_w, extra, threshold,
    per_part, total,
    factors, CONFIG: tl.constexpr, TILE_GRADIENT: tl.constexpr, CODES: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A part of CODE² rows of a head's table gradient: over ``per_part`` tiles of queries.

    Row r is CODE · a + b: the product of the one-hot codes of a, weighted by the gradient, and of b adds up all pairs.
    ``part_ptr`` is ``(parts, heads, rows)``.
    """
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    blocks = tl.cdiv(table_rows, CODE * CODE)
    row0 = tl.program_id(0) % blocks * (CODE * CODE)
    index = (tl.program_id(0) // blocks % heads).to(tl.int64)
    part = tl.program_id(0) // (blocks * heads)
    code = tl.arange(0, CODE)
    sums = tl.zeros((CODE, CODE), tl.float32)
    sides = Sides(
        q=Side(inputs.q, q_b, q_h, q_t),
        k=Side(inputs.k, k_b, k_h, k_s),
        v=Side(inputs.v, v_b, v_h, v_s),
        grad=Side(upstream.grad, grad_b, grad_h, grad_t),
        group=group,
    )
    bias, mask = Plane(bias_b, bias_h, bias_t, bias_s), Plane(mask_b, mask_h, mask_t, mask_s)
    grid = Grid(grid_h, grid_w, extra)
    call = Call(inputs, factors, bias, mask, heads, queries, keys, line_length, table_rows, grid, threshold)
    first = part * per_part
    for step in tl.range(0, tl.minimum(per_part, total - first), disable_licm=True):
        i0 = (first + step) * BLOCK_M
        i = (i0 + tl.arange(0, BLOCK_M))[:, None]
        low = keys
        high = keys * 0
        for entry in tl.range(0, tl.where(rows_b > 0, batches, 1)):  # what any batch entry sees
            rows = rows_of(call, (i0 * 0 + entry).to(tl.int64), rows_b)
            start0, _, _, end0, start1, _, _, end1 = key_spans(i0, call, rows, CONFIG)
            low = tl.minimum(low, tl.where(start0 < end0, start0, low))
            low = tl.minimum(low, tl.where(start1 < end1, start1, low))
            high = tl.maximum(high, tl.maximum(end0, end1))
        for begin in tl.range(low, high, BLOCK_N, disable_licm=True):
            j0 = i0 * 0 + begin  # the interpreter counts in numbers of Python
            # a row stands at the same pair in every batch entry, so that one product adds up the whole batch
            weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for entry in tl.range(0, batches, disable_licm=True):
                batch = (i0 * 0 + entry).to(tl.int64)
                mask_at = batch * mask_b + index * mask_h
                rows = rows_of(call, batch, rows_b)
                weight += TILE_GRADIENT(i0, j0, batch, index, rows, mask_at, call, sides, upstream, CONFIG)
            j = (j0 + tl.arange(0, BLOCK_N))[None, :]
            row = table_row(i, j, i0, j0, call, CONFIG)
            row = tl.minimum(tl.maximum(row, 0), table_rows - 1) - row0
            row = tl.reshape(row, (BLOCK_M * BLOCK_N,))
            weight = tl.reshape(weight, (BLOCK_M * BLOCK_N,))
            of_block = code[:, None] == (row >> 5)[None, :]  # rows of other blocks have none of the codes
            within = tl.where((row & (CODE - 1))[:, None] == code[None, :], 1.0, 0.0).to(CODES)
            # Three bf16 numbers hold an fp32 one, so that tensor cores add up what the FMA units would spill over, and
            # two what half precision needs. They truncate their sums, which shows in fp32: each tile has its own there,
            # and FMA units add the tiles up.
            before = sums
            if not HALF:
                sums = tl.zeros((CODE, CODE), tl.float32)
            for _ in tl.static_range(2 if HALF else 3):
                piece = weight.to(CODES)
                sums = tl.dot(tl.where(of_block, piece[None, :], 0.0), within, sums, input_precision="ieee")
                weight -= piece.to(tl.float32)
            if not HALF:
                sums += before
    row = row0 + code[:, None] * CODE + code[None, :]
    at = (part.to(tl.int64) * heads + index) * table_rows + row
    tl.store(part_ptr + at, sums, mask=row < table_rows)
