"""Quantisation by blocks in Triton. Every number has one program that writes it, with no atomics.

Where the blocks of x and of xᵀ are small powers of two, ``tile_kernel`` reads a tile once and writes all that follows
from it. Else there are three steps: ``largest_kernel`` finds the largest value in each strip of a block,
``scales_kernel`` that of each block and its scale, and ``encode_kernel`` writes the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from accel.kernels.fp8.codes import INFINITY, Format, encode, finite_size_of, mark, scales_of, size_of

INTS = [
    "rows", "cols", "span_rows", "span_cols", "total", "down", "across", "strips_down", "strips_across", "height",
    "width", "height_t", "width_t",
]  # fmt: skip
"""Integers on whose values no kernel is specialised."""


@dataclass(frozen=True)
class Config:
    """The tile of a program, and the blocks of x in it, which divide it."""

    rows: int
    cols: int
    block_rows: int = 1
    block_cols: int = 1
    row_unit: int = 1
    col_unit: int = 1
    """What sizes are multiples of, and are given in: of 16 a thread reads or writes 16 bytes at once."""
    format: Format | None = None
    powers: bool = False
    """Whether scales are powers of two."""
    turned: bool = False
    """Whether scales are written as those of xᵀ."""


# --- blocks in a tile ---


@triton.jit
def largest_of(size, H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The largest of each block of H x W: (ROWS // H, COLS // W)."""
    if W == COLS:
        most = tl.max(size, 1)[:, None]
    elif W == 1:
        most = size
    else:
        most = tl.max(tl.reshape(size, (ROWS, COLS // W, W)), 2)
    if H == ROWS:
        most = tl.max(most, 0)[None, :]
    elif H != 1:
        most = tl.max(tl.reshape(most, (ROWS // H, H, COLS // W)), 1)
    return most


@triton.jit
def spread(x, H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The number of each block, (ROWS // H, COLS // W), for each element, or in a shape that is broadcast to that."""
    if H != ROWS and H != 1:
        x = tl.reshape(tl.broadcast_to(x[:, None, :], (ROWS // H, H, COLS // W)), (ROWS, COLS // W))
    if W != COLS and W != 1:
        x = tl.reshape(tl.broadcast_to(x[:, :, None], (x.shape[0], COLS // W, W)), (x.shape[0], COLS))
    return x


@triton.jit
def as_stored(scale, DTYPE: tl.constexpr):
    """fp32 scales, or the bytes of powers of two."""
    if DTYPE.is_uint8():
        scale = (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
    return scale


@triton.jit
def store(ptr, x, row, col, rows, cols, TURNED: tl.constexpr):
    """Rows and columns of a matrix, or of its transpose."""
    if TURNED:
        x = tl.trans(x)
        mask = (col < cols)[:, None] & (row < rows)[None, :]
        tl.store(ptr + col[:, None] * rows + row[None, :], x, mask=mask)
    else:
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        tl.store(ptr + row[:, None] * cols + col[None, :], x, mask=mask)


@triton.jit
def load(x_ptr, matrix, row, col, rows, cols, stop_row, stop_col):
    """Rows and columns of one matrix in fp32, zeros from the stops on."""
    at = x_ptr + matrix * rows * cols + row[:, None] * cols + col[None, :]
    x = tl.load(at, mask=(row < stop_row)[:, None] & (col < stop_col)[None, :], other=0.0)
    if x.dtype == tl.bfloat16:  # the interpreter loses subnormal ones in a cast
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


# --- small blocks ---


@triton.jit
def blocks_of(
    x, size, finite, scale_ptr, matrix, tile_row, tile_col, rows, cols, H: tl.constexpr, W: tl.constexpr,
    TURNED: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """Codes of a tile in blocks of H x W, whose largest values are of ``size``, and whose scales are stored."""
    ROWS: tl.constexpr = CONFIG.rows
    COLS: tl.constexpr = CONFIG.cols
    if not finite:
        size = largest_of(finite_size_of(x), H, W, ROWS, COLS)
    scale, inverse = scales_of(size, CONFIG.format, CONFIG.powers)
    down, across = tl.cdiv(rows, H), tl.cdiv(cols, W)
    row = tile_row * (ROWS // H) + tl.arange(0, ROWS // H)
    col = tile_col * (COLS // W) + tl.arange(0, COLS // W)
    scale = as_stored(scale, scale_ptr.dtype.element_ty)
    store(scale_ptr + matrix * down * across, scale, row, col, down, across, TURNED)
    codes = encode(x * spread(inverse, H, W, ROWS, COLS), CONFIG.format)
    if not finite:
        codes = mark(codes, x, CONFIG.format)
    return codes.to(tl.uint8)


@triton.jit(do_not_specialize=INTS)
def tile_kernel(codes_ptr, scale_ptr, codes_t_ptr, scale_t_ptr, x_ptr, rows, cols, CONFIG: tl.constexpr):
    """A tile of one matrix and of its transpose."""
    ROW_UNIT: tl.constexpr = CONFIG.row_unit
    COL_UNIT: tl.constexpr = CONFIG.col_unit
    rows *= ROW_UNIT
    cols *= COL_UNIT
    H: tl.constexpr = CONFIG.block_rows
    W: tl.constexpr = CONFIG.block_cols
    down, across = tl.cdiv(rows, CONFIG.rows), tl.cdiv(cols, CONFIG.cols)
    matrix = (tl.program_id(0) // (down * across)).to(tl.int64)
    tile_row = (tl.program_id(0) // across % down).to(tl.int64)
    tile_col = (tl.program_id(0) % across).to(tl.int64)
    row = tile_row * CONFIG.rows + tl.arange(0, CONFIG.rows)
    col = tile_col * CONFIG.cols + tl.arange(0, CONFIG.cols)
    x = load(x_ptr, matrix, row, col, rows, cols, rows, cols)
    size = largest_of(size_of(x), H, W, CONFIG.rows, CONFIG.cols)
    # what is not finite is rare: asked once for a tile, it costs nothing for each number
    finite = tl.max(tl.max(size, 1), 0) < INFINITY
    codes = blocks_of(x, size, finite, scale_ptr, matrix, tile_row, tile_col, rows, cols, H, W, False, CONFIG)
    store(codes_ptr + matrix * rows * cols, codes, row, col, rows, cols, False)
    if codes_t_ptr is not None:
        size = largest_of(size_of(x), W, H, CONFIG.rows, CONFIG.cols)
        codes = blocks_of(x, size, finite, scale_t_ptr, matrix, tile_row, tile_col, rows, cols, W, H, True, CONFIG)
        store(codes_t_ptr + matrix * rows * cols, codes, row, col, rows, cols, True)


# --- any blocks ---


@triton.jit(do_not_specialize=INTS)
def largest_kernel(largest_ptr, x_ptr, rows, cols, span_rows, span_cols, CONFIG: tl.constexpr):
    """The bits of the largest value of each block in a tile. Tiles go in strips of ``span_rows`` by ``span_cols``,
    across whose edges none reaches: that of one block, or just that of a tile."""
    COL_UNIT: tl.constexpr = CONFIG.col_unit
    cols *= COL_UNIT
    span_cols *= COL_UNIT
    ROWS: tl.constexpr = CONFIG.rows
    COLS: tl.constexpr = CONFIG.cols
    H: tl.constexpr = CONFIG.block_rows
    W: tl.constexpr = CONFIG.block_cols
    strips_down, strips_across = tl.cdiv(span_rows, ROWS), tl.cdiv(span_cols, COLS)
    down, across = tl.cdiv(rows, span_rows) * strips_down, tl.cdiv(cols, span_cols) * strips_across
    matrix = (tl.program_id(0) // (down * across)).to(tl.int64)
    tile_row = (tl.program_id(0) // across % down).to(tl.int64)
    tile_col = (tl.program_id(0) % across).to(tl.int64)
    first_row, first_col = tile_row // strips_down * span_rows, tile_col // strips_across * span_cols
    row = first_row + tile_row % strips_down * ROWS + tl.arange(0, ROWS)
    col = first_col + tile_col % strips_across * COLS + tl.arange(0, COLS)
    stop_row, stop_col = tl.minimum(first_row + span_rows, rows), tl.minimum(first_col + span_cols, cols)
    x = load(x_ptr, matrix, row, col, rows, cols, stop_row, stop_col)
    most = largest_of(finite_size_of(x), H, W, ROWS, COLS)
    down, across = down * (ROWS // H), across * (COLS // W)
    row = tile_row * (ROWS // H) + tl.arange(0, ROWS // H)
    col = tile_col * (COLS // W) + tl.arange(0, COLS // W)
    store(largest_ptr + matrix * down * across, most, row, col, down, across, False)


@triton.jit(do_not_specialize=INTS)
def scales_kernel(
    scale_ptr, inverse_ptr, largest_ptr, total, down, across, strips_down, strips_across, rows, cols,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Scales of some of all ``total`` blocks, ``down`` by ``across`` of each matrix, from the largest values of their
    strips, ``rows`` by ``cols`` of each matrix."""
    BLOCKS: tl.constexpr = CONFIG.rows
    STRIPS: tl.constexpr = CONFIG.cols
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    matrix, row, col = block // across // down, block // across % down, block % across
    first = (matrix * rows + row * strips_down) * cols + col * strips_across
    most = tl.zeros((BLOCKS, STRIPS), tl.int32)
    for s0 in range(0, strips_down * strips_across, STRIPS):
        strip = s0 + tl.arange(0, STRIPS)
        at = first[:, None] + (strip // strips_across)[None, :].to(tl.int64) * cols + (strip % strips_across)[None, :]
        mask = (block < total)[:, None] & (strip < strips_down * strips_across)[None, :]
        most = tl.maximum(most, tl.load(largest_ptr + at, mask=mask, other=0))
    scale, inverse = scales_of(tl.max(most, 1), CONFIG.format, CONFIG.powers)
    if CONFIG.turned:
        at = (matrix * across + col) * down + row
    else:
        at = block
    tl.store(scale_ptr + at, as_stored(scale, scale_ptr.dtype.element_ty), mask=block < total)
    tl.store(inverse_ptr + block, inverse, mask=block < total)


@triton.jit
def scaled(x, inverse_ptr, matrix, row, col, rows, cols, height, width):
    """Numbers times those of their blocks, which are ``height`` by ``width``."""
    down, across = tl.cdiv(rows, height), tl.cdiv(cols, width)
    at = (matrix * down + row // height)[:, None] * across + (col // width)[None, :]
    return x * tl.load(inverse_ptr + at, mask=(row < rows)[:, None] & (col < cols)[None, :], other=0.0)


@triton.jit(do_not_specialize=INTS)
def encode_kernel(
    codes_ptr, codes_t_ptr, inverse_ptr, inverse_t_ptr, x_ptr, rows, cols, height, width, height_t, width_t,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Codes of a tile of one matrix and of its transpose, whose blocks are given as those of x."""
    ROW_UNIT: tl.constexpr = CONFIG.row_unit
    COL_UNIT: tl.constexpr = CONFIG.col_unit
    rows *= ROW_UNIT
    cols *= COL_UNIT
    down, across = tl.cdiv(rows, CONFIG.rows), tl.cdiv(cols, CONFIG.cols)
    matrix = (tl.program_id(0) // (down * across)).to(tl.int64)
    row = (tl.program_id(0) // across % down).to(tl.int64) * CONFIG.rows + tl.arange(0, CONFIG.rows)
    col = (tl.program_id(0) % across).to(tl.int64) * CONFIG.cols + tl.arange(0, CONFIG.cols)
    x = load(x_ptr, matrix, row, col, rows, cols, rows, cols)
    y = scaled(x, inverse_ptr, matrix, row, col, rows, cols, height, width)
    codes = mark(encode(y, CONFIG.format), x, CONFIG.format).to(tl.uint8)
    store(codes_ptr + matrix * rows * cols, codes, row, col, rows, cols, False)
    if codes_t_ptr is not None:
        y = scaled(x, inverse_t_ptr, matrix, row, col, rows, cols, height_t, width_t)
        codes = mark(encode(y, CONFIG.format), x, CONFIG.format).to(tl.uint8)
        store(codes_t_ptr + matrix * rows * cols, codes, row, col, rows, cols, True)
