"""What the deformable kernels share: where a position lies among pixels, its four pixels, samples sorted by cell.

The gradient of a map is a scatter: each sample adds to four pixels. It is computed the other way round. The key of a
sample is the cell between pixels that it lies in, a stable sort brings the samples of a cell together, and a program
owns a tile of pixels and walks, for each of them, over the samples of the four cells around it. So every sum has one
owner and one order, and nothing depends on which program ran first.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

SORTED_AT_ONCE = 1 << 20
"""Samples that are sorted together. One takes 16 bytes for its key, before and after, and its place in the order, 12
in the sort's own buffers, 20 for its record; a cell takes 8 for where its samples start. So 60 MB at the most, or what
one image and offset group (or head) needs where that is more."""

# --- one position ---


@triton.jit
def output_tile(program, out_height, out_width, TILE_H: tl.constexpr, TILE_W: tl.constexpr, LANES: tl.constexpr = 1):
    """Image (int64), row and column of a tile of outputs, each LANES times, and which of them exist. A tile has two
    dimensions, so that taps of neighbouring rows meet in the same cache lines."""
    tiles_x = tl.cdiv(out_width, TILE_W)
    tiles_y = tl.cdiv(out_height, TILE_H)
    rest = program // tiles_x
    m = tl.arange(0, TILE_H * TILE_W * LANES) // LANES
    i = rest % tiles_y * TILE_H + m // TILE_W
    j = program % tiles_x * TILE_W + m % TILE_W
    return (rest // tiles_y).to(tl.int64), i, j, (i < out_height) & (j < out_width)


@triton.jit
def place(y, x, height, width):
    """Row and column (int32) of the pixel above and left of each position, how far the position is past it, and
    whether any of the four pixels around can be inside.

    A position that is NaN, infinite or beyond the border is replaced by 0 before it becomes an integer.
    """
    near = (y >= -1.0) & (y < height) & (x >= -1.0) & (x < width)
    y = tl.where(near, y, 0.0)
    x = tl.where(near, x, 0.0)
    top = tl.floor(y)
    left = tl.floor(x)
    return top.to(tl.int32), left.to(tl.int32), y - top, x - left, near


@triton.jit
def corners(y, x, real, height, width):
    """Of positions in a map: the index of the pixel above and left, which of the four pixels are inside (above
    left, above right, below left, below right), the distances past the first, and whether any can be inside."""
    top, left, dy, dx, near = place(y, x, height, width)
    near = near & real
    above = near & (top >= 0) & (top < height)
    below = near & (top + 1 < height)
    west = (left >= 0) & (left < width)
    east = left + 1 < width
    return top * width + left, (above & west, above & east, below & west, below & east), dy, dx, near


@triton.jit
def load_corners(ptr, at, inside, right, down, c, in_range):
    """Four tiles (positions, channels) in fp32: the pixels around, 0 where outside. ``at`` is the first element of the
    pixel above left, ``right`` and ``down`` the way to the next; ``in_range`` tells which channels exist, None: all."""
    above_left, above_right, below_left, below_right = inside
    here = ptr + at[:, None] + c[None, :]
    if in_range is None:
        v00 = tl.load(here, mask=above_left[:, None], other=0.0).to(tl.float32)
        v01 = tl.load(here + right, mask=above_right[:, None], other=0.0).to(tl.float32)
        v10 = tl.load(here + down, mask=below_left[:, None], other=0.0).to(tl.float32)
        v11 = tl.load(here + down + right, mask=below_right[:, None], other=0.0).to(tl.float32)
    else:
        some = in_range[None, :]
        v00 = tl.load(here, mask=above_left[:, None] & some, other=0.0).to(tl.float32)
        v01 = tl.load(here + right, mask=above_right[:, None] & some, other=0.0).to(tl.float32)
        v10 = tl.load(here + down, mask=below_left[:, None] & some, other=0.0).to(tl.float32)
        v11 = tl.load(here + down + right, mask=below_right[:, None] & some, other=0.0).to(tl.float32)
    return v00, v01, v10, v11


@triton.jit
def mean(pixels, dy, dx, factor):
    """The bilinear mean of four tiles, times the factor of each position."""
    v00, v01, v10, v11 = pixels
    above = (1.0 - dy) * factor
    below = dy * factor
    out = v00 * (above * (1.0 - dx))[:, None]
    out += v01 * (above * dx)[:, None]
    out += v10 * (below * (1.0 - dx))[:, None]
    return out + v11 * (below * dx)[:, None]


@triton.jit
def moments(grad, pixels):
    """A sample is a + b·dx + c·dy + d·dx·dy: the sums over channels of ``grad`` times each of the four. One tile of
    pixels after another is used up: their differences would be as many registers again."""
    v00, v01, v10, v11 = pixels
    a = tl.sum(grad * v00, 1)
    above_right = tl.sum(grad * v01, 1)
    below_left = tl.sum(grad * v10, 1)
    below_right = tl.sum(grad * v11, 1)
    return a, above_right - a, below_left - a, below_right - below_left - above_right + a


# --- samples by cell ---
#
# A cell is the square between four pixels, with those at the border half outside: (height + 1) · (width + 1) of them.
# A sample in cell (i, j) reaches the pixels (i - 1, j - 1) to (i, j).


@triton.jit
def cell_of(y, x, height, width):
    """The cell of each position (int64), and whether it is in any."""
    top, left, _, _, near = place(y, x, height, width)
    return (top + 1).to(tl.int64) * (width + 1) + left + 1, near


@triton.jit
def store_records(row_ptr, weight_ptr, e, row, y, x, factor, real, height, width):
    """The record of sample e in sorted order: its row of the upstream gradient, and its weights of the four pixels
    times ``factor``."""
    _, _, dy, dx, _ = place(y, x, height, width)
    corner = tl.arange(0, 4)[None, :]
    weight = tl.where(corner >= 2, dy[:, None], 1.0 - dy[:, None])
    weight *= tl.where(corner % 2 == 1, dx[:, None], 1.0 - dx[:, None])
    tl.store(row_ptr + e, row.to(tl.int32), mask=real)
    tl.store(weight_ptr + e[:, None] * 4 + corner, weight * factor[:, None], mask=real[:, None])


@triton.jit
def reach(starts, y, x, width, real):
    """The samples that reach pixels (y, x) in sorted order, which are two runs: for each of them where it begins,
    where the second of its cells begins, and how long it is."""
    above = starts + y.to(tl.int64) * (width + 1) + x
    below = above + width + 1
    first0 = tl.load(above, mask=real, other=0)
    second0 = tl.load(above + 1, mask=real, other=0)
    end0 = tl.load(above + 2, mask=real, other=0)
    first1 = tl.load(below, mask=real, other=0)
    second1 = tl.load(below + 1, mask=real, other=0)
    end1 = tl.load(below + 2, mask=real, other=0)
    return first0, second0, end0 - first0, first1, second1, end1 - first1


@triton.jit
def entry_at(runs, t):
    """The t-th sample of each pixel and where its weight stands."""
    first0, second0, count0, first1, second1, _ = runs
    above = t < count0
    e = tl.where(above, first0 + t, first1 + (t - count0))
    corner = tl.where(above, 2, 0) + (e < tl.where(above, second0, second1)).to(tl.int32)
    return e, e.to(tl.int64) * 4 + corner


def sort_samples(keys: Tensor, segments: int, cells: int) -> tuple[Tensor, Tensor]:
    """``(order, starts)`` of int32 keys segment · (cells + 1) + cell, where samples in no cell have ``cells``: the
    samples by key, first come first, and where each key's begin. No atomics, nothing the host would have to wait for.
    """
    values, order = torch.sort(keys.view(-1), stable=True)
    bounds = torch.arange(segments * (cells + 1), dtype=torch.int32, device=keys.device)
    return order, torch.searchsorted(values, bounds, out_int32=True)


def chunks(units: int, samples: int, cells: int) -> list[tuple[int, int]]:
    """``(first, count)`` of the units that are sorted together, each of so many samples and cells."""
    most = max(1, SORTED_AT_ONCE // max(samples, cells))
    each = math.ceil(units / math.ceil(units / most))
    return [(first, min(each, units - first)) for first in range(0, units, each)]


# --- launches ---


def output_block(out_height: int, out_width: int, outputs: int) -> tuple[int, int]:
    """Height and width of a tile of at most ``outputs`` outputs: of the shapes no more than four times as wide as
    high, the other way round likewise, or as long as the map allows, the one that needs the fewest tiles; the squarest
    where several do."""
    outputs = min(outputs, max(16, triton.next_power_of_2(out_height) * triton.next_power_of_2(out_width)))
    best: tuple[int, float, int, int] | None = None
    height = 1
    while height <= outputs:
        width = outputs // height
        thin = height < min(width, triton.next_power_of_2(out_height)) / 4
        thin = thin or width < min(height, triton.next_power_of_2(out_width)) / 4
        if not thin:
            tiles = triton.cdiv(out_height, height) * triton.cdiv(out_width, width)
            found = (tiles, abs(math.log2(width / height) - 0.5), height, width)
            best = found if best is None or found < best else best
        height *= 2
    assert best is not None
    return best[2], best[3]
