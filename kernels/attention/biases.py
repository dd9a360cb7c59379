"""Gradients of the biases of softmax attention, each added up by owners in a fixed order.

The gradient of a logit is computed again from queries and keys. A dense bias is owned tile by tile; a line and the
table of a grid are added up along the tile's diagonals, a table with an index by a product with its one-hot code.
Where owners are few, each is split in parts of a number that only shapes decide; the parts are summed at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.kernels._launch import Launch, dot_dtype
from accel.kernels.attention.arguments import LAUNCH_INTS, Tile, launch
from accel.kernels.attention.logits import (
    all_in_part,
    grid_middle,
    grid_place,
    key_spans,
    line_place,
    load_rows,
    load_sums,
    pair_gradients,
    part_at,
    part_length,
    table_row,
)
from accel.ops.attention.softmax_attention import Args

# Enough programs to fill any present GPU several times over; fixed, so that sums do not depend on the device.
PROGRAMS = 1024
PARTS_BYTES = 64 << 20
CODE: tl.constexpr = tl.constexpr(32)  # rows of a table go as CODE × CODE one-hot codes


@triton.jit
def _tile_gradient(
    i0,
    j0,
    batch,
    head,
    group,
    sides,
    shape,
    terms,
    masks,
    dropout,
    RULE: tl.constexpr,
    GRID: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BINARY: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
):
    """Gradient of the logits of the tile at ``(i0, j0)``, 0 where nothing is seen."""
    q, k, v, grad, lse_ptr, delta_ptr = sides
    q_ptr, q_b, q_h, q_t = q
    k_ptr, k_b, k_h, k_s = k
    v_ptr, v_b, v_h, v_s = v
    grad_ptr, grad_b, grad_h, grad_t = grad
    scale, softcap, bias, line, table = terms
    bias_ptr, bias_b, bias_h, bias_t, bias_s = bias
    seed_ptr, threshold, keep_scale = dropout
    _, _, heads, _, _ = table
    queries, keys = shape
    i = i0 + tl.arange(0, BLOCK_M)
    j = j0 + tl.arange(0, BLOCK_N)
    q_at = q_ptr + (batch * q_b + head * q_h) * UNIT
    k_at = k_ptr + (batch * k_b + head // group * k_h) * UNIT
    v_at = v_ptr + (batch * v_b + head // group * v_h) * UNIT
    grad_at = grad_ptr + (batch * grad_b + head * grad_h) * UNIT
    q = load_rows(q_at, i, queries, q_t * UNIT, D, BLOCK_D, True, DOT)
    k = load_rows(k_at, j, keys, k_s * UNIT, D, BLOCK_D, True, DOT)
    raw = tl.dot(q, tl.trans(k), input_precision="ieee")
    grad_o = load_rows(grad_at, i, queries, grad_t * UNIT, E, BLOCK_E, True, DOT)
    v = load_rows(v_at, j, keys, v_s * UNIT, E, BLOCK_E, True, DOT)
    grad_p = tl.dot(grad_o, tl.trans(v), input_precision="ieee")
    first = (batch * heads + head) * queries
    lse, delta = load_sums(lse_ptr + first, delta_ptr + first, i, queries, BINARY)
    bias = (bias_ptr, batch * bias_b + head * bias_h, bias_t, bias_s)
    _used, grad_s, _grad_raw, _seen = pair_gradients(
        raw, grad_p, lse[:, None], delta[:, None], i[:, None], j[None, :], i0, j0, head, shape,
        (scale, softcap, bias, line, table), masks, (seed_ptr, threshold, keep_scale, first),
        RULE, GRID, SOFTCAP, BINARY, True,
    )  # fmt: skip
    return grad_s


@triton.jit
def _meets(spans, j0):
    """Whether the tile of keys at ``j0`` is in the spans."""
    start0, _, _, end0, start1, _, _, end1 = spans
    return ((start0 <= j0) & (j0 < end0)) | ((start1 <= j0) & (j0 < end1))


@triton.jit(do_not_specialize=LAUNCH_INTS)
def _backward_bias(
    part_ptr,
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
    queries,
    keys,
    line_length,
    table_rows,
    grid_h,
    grid_w,
    extra,
    threshold,
    per_part,
    owners_b,
    owners_h,
    owners_t,
    owners_s,
    total,
    keep_scale,
    scale,
    softcap,
    ALONG_T: tl.constexpr,
    ALONG_S: tl.constexpr,
    RULE: tl.constexpr,
    GRID: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BINARY: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
):
    """A part of a tile of the bias' gradient: over ``per_part`` of the tiles of logits that take the same bias.

    ``owners`` are the bias' own axes, in tiles; along any other axis it is 1 and the program goes over all.
    """
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
    shape = (queries, keys)
    sides = (
        (q_ptr, q_b, q_h, q_t),
        (k_ptr, k_b, k_h, k_s),
        (v_ptr, v_b, v_h, v_s),
        (grad_ptr, grad_b, grad_h, grad_t),
        lse_ptr,
        delta_ptr,
    )
    table = (table_ptr, table_rows, heads, index_ptr, (grid_h, grid_w, extra))
    terms = (scale, softcap, (bias_ptr, bias_b, bias_h, bias_t, bias_s), (line_ptr, line_length), table)
    dropout = (seed_ptr, threshold, keep_scale)
    total_gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = part * per_part
    for step in tl.range(0, tl.minimum(per_part, total - first), disable_licm=True):
        n = first + step
        j0 = (own_s + (n % over_s).to(tl.int32)) * BLOCK_N
        i0 = (own_t + (n // over_s % over_t).to(tl.int32)) * BLOCK_M
        n = n // over_s // over_t
        head = own_h + n % over_h
        batch = own_b + n // over_h
        mask_at = batch * mask_b + head * mask_h
        masks = (mask_ptr, mask_at, mask_t, mask_s, rows_ptr)
        if rows_ptr is not None:
            masks = (mask_ptr, mask_at, mask_t, mask_s, rows_ptr + batch * rows_b)
        spans = key_spans(i0, shape, masks, RULE, BLOCK_M, BLOCK_N)
        if _meets(spans, j0):
            total_gradient += _tile_gradient(
                i0, j0, batch, head, group, sides, shape, terms, masks, dropout,
                RULE, GRID, SOFTCAP, BINARY, UNIT, D, E, BLOCK_D, BLOCK_E, BLOCK_M, BLOCK_N, DOT,
            )  # fmt: skip
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
def _add_diagonals(
    bins_ptr,
    grad_s,
    i,
    j0,
    shape,
    masks,
    grid,
    bins,
    ON_GRID: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Add a tile to the program's own bins: bin m gets, of each query, the key that stands m behind its place."""
    queries, keys = shape
    grid_h, grid_w, extra = grid
    _, _, _, _, rows_ptr = masks
    last = tl.minimum(j0 + BLOCK_N, keys) - 1
    if ON_GRID:
        place = grid_place(i, grid_w, extra) + grid_middle(grid_h, grid_w)
        real = (i < queries) & (i >= extra)
        low_key = grid_place(tl.maximum(j0, extra), grid_w, extra)
        high_key = grid_place(tl.maximum(last, extra), grid_w, extra)
    else:
        place = line_place(i, shape, rows_ptr)
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
            x = behind % (2 * grid_w - 1)
            key = behind // (2 * grid_w - 1) * grid_w + x + extra
            held = (behind >= 0) & (x < grid_w)
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
def _backward_diagonals(
    part_ptr,
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
    queries,
    keys,
    line_length,
    table_rows,
    grid_h,
    grid_w,
    extra,
    threshold,
    per_part,
    bins,
    total,
    keep_scale,
    scale,
    softcap,
    ON_GRID: tl.constexpr,
    WINDOW: tl.constexpr,
    RULE: tl.constexpr,
    GRID: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BINARY: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
):
    """A part of the gradient of a head's line or grid table: over ``per_part`` tiles of queries of the batch.

    ``part_ptr`` is ``(parts, heads, bins)`` of zeros, with three more for the extra tokens of a grid.
    """
    part = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    tiles = tl.cdiv(queries, BLOCK_M)
    BINS_BEHIND: tl.constexpr = 3 if ON_GRID else 0
    bins_ptr = part_ptr + tl.program_id(0).to(tl.int64) * (bins + BINS_BEHIND)
    from_extra = tl.zeros((BLOCK_N,), tl.float32)
    to_extra = tl.zeros((BLOCK_N,), tl.float32)
    between_extra = tl.zeros((BLOCK_N,), tl.float32)
    grid = (grid_h, grid_w, extra)
    shape = (queries, keys)
    sides = (
        (q_ptr, q_b, q_h, q_t),
        (k_ptr, k_b, k_h, k_s),
        (v_ptr, v_b, v_h, v_s),
        (grad_ptr, grad_b, grad_h, grad_t),
        lse_ptr,
        delta_ptr,
    )
    table = (table_ptr, table_rows, heads, index_ptr, (grid_h, grid_w, extra))
    terms = (scale, softcap, (bias_ptr, bias_b, bias_h, bias_t, bias_s), (line_ptr, line_length), table)
    dropout = (seed_ptr, threshold, keep_scale)
    first = part * per_part
    for step in tl.range(0, tl.minimum(per_part, total - first), disable_licm=True):
        batch = ((first + step) // tiles).to(tl.int64)
        i0 = (first + step) % tiles * BLOCK_M
        i = i0 + tl.arange(0, BLOCK_M)
        mask_at = batch * mask_b + head * mask_h
        masks = (mask_ptr, mask_at, mask_t, mask_s, rows_ptr)
        if rows_ptr is not None:
            masks = (mask_ptr, mask_at, mask_t, mask_s, rows_ptr + batch * rows_b)
        spans = all_in_part(key_spans(i0, shape, masks, RULE, BLOCK_M, BLOCK_N))
        for offset in tl.range(0, part_length(spans), BLOCK_N, disable_licm=True):
            j0 = part_at(spans, offset)
            grad_s = _tile_gradient(
                i0, j0, batch, head, group, sides, shape, terms, masks, dropout,
                RULE, GRID, SOFTCAP, BINARY, UNIT, D, E, BLOCK_D, BLOCK_E, BLOCK_M, BLOCK_N, DOT,
            )  # fmt: skip
            _add_diagonals(bins_ptr, grad_s, i, j0, shape, masks, grid, bins, ON_GRID, BLOCK_M, BLOCK_N, WINDOW)
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
def _backward_index(
    part_ptr,
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
    queries,
    keys,
    line_length,
    table_rows,
    grid_h,
    grid_w,
    extra,
    threshold,
    per_part,
    total,
    keep_scale,
    scale,
    softcap,
    CODES: tl.constexpr,
    RULE: tl.constexpr,
    GRID: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BINARY: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
):
    """A part of CODE² rows of a head's table gradient: over ``per_part`` tiles of queries.

    Row r is CODE · a + b: the product of the one-hot codes of a, weighted by the gradient, and of b adds up all pairs.
    ``part_ptr`` is ``(parts, heads, rows)``.
    """
    blocks = tl.cdiv(table_rows, CODE * CODE)
    row0 = tl.program_id(0) % blocks * (CODE * CODE)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    part = tl.program_id(0) // (blocks * heads)
    code = tl.arange(0, CODE)
    sums = tl.zeros((CODE, CODE), tl.float32)
    grid = (grid_h, grid_w, extra)
    shape = (queries, keys)
    sides = (
        (q_ptr, q_b, q_h, q_t),
        (k_ptr, k_b, k_h, k_s),
        (v_ptr, v_b, v_h, v_s),
        (grad_ptr, grad_b, grad_h, grad_t),
        lse_ptr,
        delta_ptr,
    )
    table = (table_ptr, table_rows, heads, index_ptr, (grid_h, grid_w, extra))
    terms = (scale, softcap, (bias_ptr, bias_b, bias_h, bias_t, bias_s), (line_ptr, line_length), table)
    dropout = (seed_ptr, threshold, keep_scale)
    first = part * per_part
    for step in tl.range(0, tl.minimum(per_part, total - first), disable_licm=True):
        i0 = (first + step) * BLOCK_M
        i = (i0 + tl.arange(0, BLOCK_M))[:, None]
        low = keys
        high = keys * 0
        for entry in tl.range(0, tl.where(rows_b > 0, batches, 1)):  # what any batch entry sees
            masks = (mask_ptr, 0, mask_t, mask_s, rows_ptr)
            if rows_ptr is not None:
                masks = (mask_ptr, 0, mask_t, mask_s, rows_ptr + (i0 * 0 + entry).to(tl.int64) * rows_b)
            start0, _, _, end0, start1, _, _, end1 = key_spans(i0, shape, masks, RULE, BLOCK_M, BLOCK_N)
            low = tl.minimum(low, tl.where(start0 < end0, start0, low))
            low = tl.minimum(low, tl.where(start1 < end1, start1, low))
            high = tl.maximum(high, tl.maximum(end0, end1))
        for begin in tl.range(low, high, BLOCK_N, disable_licm=True):
            j0 = i0 * 0 + begin  # the interpreter counts in numbers of Python
            # a row stands at the same pair in every batch entry, so that one product adds up the whole batch
            weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for entry in tl.range(0, batches, disable_licm=True):
                batch = (i0 * 0 + entry).to(tl.int64)
                mask_at = batch * mask_b + head * mask_h
                masks = (mask_ptr, mask_at, mask_t, mask_s, rows_ptr)
                if rows_ptr is not None:
                    masks = (mask_ptr, mask_at, mask_t, mask_s, rows_ptr + batch * rows_b)
                weight += _tile_gradient(
                    i0, j0, batch, head, group, sides, shape, terms, masks, dropout,
                    RULE, GRID, SOFTCAP, BINARY, UNIT, D, E, BLOCK_D, BLOCK_E, BLOCK_M, BLOCK_N, DOT,
                )  # fmt: skip
            j = (j0 + tl.arange(0, BLOCK_N))[None, :]
            row = table_row(i, j, i0, j0, shape, index_ptr, grid, GRID)
            row = tl.minimum(tl.maximum(row, 0), table_rows - 1) - row0
            row = tl.reshape(row, (BLOCK_M * BLOCK_N,))
            weight = tl.reshape(weight, (BLOCK_M * BLOCK_N,))
            of_block = code[:, None] == (row >> 5)[None, :]  # rows of other blocks have none of the codes
            within = tl.where((row & (CODE - 1))[:, None] == code[None, :], 1.0, 0.0).to(CODES)
            # Three bf16 numbers hold an fp32 one, so that tensor cores add up what the FMA units would spill over, and
            # two what half precision needs. They truncate their sums, which shows in fp32: each tile has its own there,
            # and FMA units add the tiles up.
            before = sums
            if not BINARY:
                sums = tl.zeros((CODE, CODE), tl.float32)
            for _ in tl.static_range(2 if BINARY else 3):
                piece = weight.to(CODES)
                sums = tl.dot(tl.where(of_block, piece[None, :], 0.0), within, sums, input_precision="ieee")
                weight -= piece.to(tl.float32)
            if not BINARY:
                sums += before
    row = row0 + code[:, None] * CODE + code[None, :]
    at = (part.to(tl.int64) * heads + head) * table_rows + row
    tl.store(part_ptr + at, sums, mask=row < table_rows)


# --- launches ---


def bias_tile(args: Args, capability: tuple[int, int]) -> Tile:
    """For kernels that hold the gradient of a tile and what it comes from."""
    queries, keys = args.q.shape[2], args.k.shape[2]
    widest = max(args.q.shape[3], args.v.shape[3])
    if args.q.element_size() == 4:  # products without tensor cores: many warps, or their operands fill the registers
        return Tile(16, 16, 8 if widest <= 64 else 16, 1).within(queries, keys)
    if widest > 128:
        return Tile(16, 32, 8, 1).within(queries, keys)
    if widest > 64 or args.dropout_p > 0.0:
        return Tile(32, 32, 8, 1).within(queries, keys)
    return Tile(64, 64, 4 if capability[0] == 9 else 8, 1).within(queries, keys)


def _parts(total: int, owners: int, owned: int) -> tuple[int, int]:
    """Parts, and tiles of each: enough programs, and not more than PARTS_BYTES unless one part has that already."""
    wanted = min(triton.cdiv(PROGRAMS, owners), PARTS_BYTES // (4 * owned))
    per_part = triton.cdiv(total, max(1, min(wanted, total)))
    return triton.cdiv(total, per_part), per_part


def plan_bias(args: Args, given: dict[str, Any], capability: tuple[int, int]) -> tuple[Launch, Tensor]:
    """The launch for the gradient of a dense bias, and its parts ``(parts, *bias.shape)``."""
    assert args.bias is not None
    tile = bias_tile(args, capability)
    batches, heads, queries, keys = *args.q.shape[:3], args.k.shape[2]
    whole = [batches, heads, triton.cdiv(queries, tile.queries), triton.cdiv(keys, tile.keys)]
    owners = [n if size > 1 else 1 for n, size in zip(whole, args.bias.shape, strict=True)]
    count, total = 1, 1
    for own, n in zip(owners, whole, strict=True):
        count, total = count * own, total * (n // own)
    parts, per_part = _parts(total, count, args.bias.numel())
    out = args.q.new_empty((parts, *args.bias.shape), dtype=torch.float32)
    names = dict(zip(("owners_b", "owners_h", "owners_t", "owners_s"), owners, strict=True))
    along = {"ALONG_T": args.bias.shape[2] > 1, "ALONG_S": args.bias.shape[3] > 1}
    more = {"part_ptr": out, "per_part": per_part, "total": total, **names, **along}
    return launch(_backward_bias, parts * count, tile, **given, **more), out


def _by_queries(args: Args, tile: Tile, owners: int, owned: int) -> tuple[int, dict[str, int]]:
    """Parts of what is added up over the tiles of queries of all the batch."""
    total = args.q.shape[0] * triton.cdiv(args.q.shape[2], tile.queries)
    parts, per_part = _parts(total, owners, owned)
    return parts, {"per_part": per_part, "total": total}


def _plan_diagonals(
    args: Args, given: dict[str, Any], capability: tuple[int, int], bins: int, on_grid: bool
) -> tuple[Launch, Tensor]:
    behind = 3 if on_grid else 0  # the bins of extra tokens
    tile, heads = bias_tile(args, capability), args.q.shape[1]
    parts, counts = _by_queries(args, tile, heads, heads * (bins + behind))
    out = args.q.new_zeros((parts, heads, bins + behind), dtype=torch.float32)
    more = {"part_ptr": out, "bins": bins, "ON_GRID": on_grid, "WINDOW": tile.keys, **counts}
    return launch(_backward_diagonals, parts * heads, tile, **given, **more), out


def plan_line(args: Args, given: dict[str, Any], capability: tuple[int, int]) -> tuple[Launch, Tensor]:
    """The launch for the gradient of a line, and its parts ``(parts, Hq, L)``."""
    assert args.line is not None
    return _plan_diagonals(args, given, capability, args.line.shape[1], on_grid=False)


def plan_table(args: Args, given: dict[str, Any], capability: tuple[int, int]) -> tuple[Launch, Tensor]:
    """The launch for the gradient of a table, and its parts ``(parts, R, Hq)``."""
    assert args.table is not None
    rows, heads = args.table.shape
    if args.grid:
        h, w, _extra = args.grid
        bins = (2 * h - 1) * (2 * w - 1)
        step, out = _plan_diagonals(args, given, capability, bins, on_grid=True)
        return step, out[..., :rows].transpose(1, 2)
    tile = Tile(16, 16, 16 if args.q.element_size() == 4 else 8, 1)
    blocks = triton.cdiv(rows, CODE.value**2)
    total = triton.cdiv(args.q.shape[2], tile.queries)
    parts, per_part = _parts(total, heads * blocks, heads * rows)
    out = args.q.new_empty((parts, heads, rows), dtype=torch.float32)
    more = {"part_ptr": out, "CODES": dot_dtype(torch.bfloat16), "per_part": per_part, "total": total}
    step = launch(_backward_index, parts * heads * blocks, tile, **given, **more)
    return step, out.transpose(1, 2)
