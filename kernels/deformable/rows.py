"""Weighted sums of samples, channel by channel: the kernels of multi-scale deformable attention and of DCNv3.

``value`` is (N, S, M, D) with S pixels and M heads, positions are (N, Q, M, P, 2), x before y, and weights are
(N, Q, M, P). DCNv3 is the case of one level whose queries stand on a grid: its groups are heads. Where a position lies
is all that differs, in :func:`locate`: the number of levels is that of a pyramid, or 0 for a grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from accel.kernels.deformable.sampling import (
    cell_of,
    corners,
    entry_at,
    load_corners,
    mean,
    moments,
    output_tile,
    reach,
    store_records,
)

INTS = [
    *["heads", "pixels", "height", "width", "out_height", "out_width", "stride_y", "stride_x", "padding_y"],
    *["padding_x", "dilation_y", "dilation_x", "cells", "unit0", "units"],
]
"""Integers on whose values no kernel is specialised; head size, points and taps are compile-time constants."""


class Levels(NamedTuple):
    """Height and width of each level of a pyramid, and its first pixel; None for a grid."""

    shapes: Tensor | None
    starts: Tensor | None


@dataclass(frozen=True)
class Samples:
    """The samples of a query, known at compile time: of a pyramid how many points each level has, of a grid the taps.

    ``ends`` holds, 16 bits each, how many points there are up to each level's last.
    """

    points: int
    levels: int = 0
    ends: int = 0
    kh: int = 1
    kw: int = 1


@dataclass(frozen=True)
class Cut:
    """How the rows of ``d`` channels are cut into tiles."""

    d: int
    tile_h: int
    tile_w: int
    block_d: int
    at_once: int  # points that are on their way together
    lanes: int  # partial sums of a pixel


class Geometry(NamedTuple):
    """What positions are found by."""

    levels: Any
    pixels: Any
    height: Any
    width: Any
    stride_y: Any
    stride_x: Any
    padding_y: Any
    padding_x: Any
    dilation_y: Any
    dilation_x: Any
    scale: Any


# --- positions ---


@triton.jit
def level_of(p, SAMPLES: tl.constexpr):
    """The level of point ``p``."""
    LEVELS: tl.constexpr = SAMPLES.levels
    ENDS: tl.constexpr = SAMPLES.ends
    level = p * 0
    for i in tl.static_range(LEVELS - 1):
        level += (p >= ((ENDS >> (16 * i)) & 0xFFFF)).to(tl.int32)
    return level


@triton.jit
def level_size(levels, level, pixels):
    """Height, width and first pixel of a level, made to lie within the pixels there are whatever the tensors say."""
    start = tl.load(levels.starts + level)
    width = tl.load(levels.shapes + 2 * level + 1)
    height = tl.load(levels.shapes + 2 * level)
    start = tl.minimum(tl.maximum(start, 0), pixels)
    width = tl.minimum(tl.maximum(width, 0), pixels)
    height = tl.minimum(tl.maximum(height, 0), (pixels - start) // tl.maximum(width, 1))
    return height.to(tl.int32), width.to(tl.int32), start


@triton.jit
def first_cell(levels, level, pixels, cells, LEVELS: tl.constexpr):
    """Where the cells of a level begin among ``cells``, which they cannot leave."""
    first = level.to(tl.int64) * 0
    own = first
    for i in tl.static_range(LEVELS):
        height, width, _ = level_size(levels, i, pixels)
        size = (height + 1).to(tl.int64) * (width + 1)
        first += tl.where(i < level, size, 0)
        own += tl.where(i == level, size, 0)
    return tl.minimum(first, cells - own)


@triton.jit
def locate(location_ptr, at, real, p, i, j, geometry, SAMPLES: tl.constexpr):
    """Pixel positions y and x of point ``p`` of queries, whose place in weights is ``at``, then the height, width and
    first pixel of the map and what a position grows by where its location does, in y and x."""
    POINTS: tl.constexpr = SAMPLES.points
    KH: tl.constexpr = SAMPLES.kh
    KW: tl.constexpr = SAMPLES.kw
    x = tl.load(location_ptr + 2 * at, mask=real, other=0.0)
    y = tl.load(location_ptr + 2 * at + 1, mask=real, other=0.0)
    if SAMPLES.levels > 0:
        high, wide, start = level_size(geometry.levels, level_of(p, SAMPLES), geometry.pixels)
        grow_y = high.to(tl.float32)
        grow_x = wide.to(tl.float32)
        y = y * grow_y - 0.5
        x = x * grow_x - 0.5
    else:
        high = geometry.height
        wide = geometry.width
        start = (high * 0).to(tl.int64)
        tap = p
        if POINTS < KH * KW:
            tap = p + (p >= POINTS // 2).to(tl.int32)
        middle_y = geometry.dilation_y * (KH - 1) // 2
        middle_x = geometry.dilation_x * (KW - 1) // 2
        base_y = (i * geometry.stride_y - geometry.padding_y + middle_y).to(tl.float32)
        base_x = (j * geometry.stride_x - geometry.padding_x + middle_x).to(tl.float32)
        y = base_y + (tap % KH * geometry.dilation_y - middle_y).to(tl.float32) * geometry.scale + y * geometry.scale
        x = base_x + (tap // KH * geometry.dilation_x - middle_x).to(tl.float32) * geometry.scale + x * geometry.scale
        grow_y = geometry.scale
        grow_x = geometry.scale
    return y, x, high, wide, start, grow_y, grow_x


@triton.jit
def softmax_stats(weight_ptr, at, real, POINTS: tl.constexpr):
    """Largest weight of each query, and 1 / the sum of exponentials."""
    BLOCK: tl.constexpr = triton.next_power_of_2(POINTS)
    p = tl.arange(0, BLOCK)
    some = real[:, None] & (p < POINTS)[None, :]
    logits = tl.load(weight_ptr + at[:, None] + p[None, :], mask=some, other=float("-inf"))
    logits = tl.where(real[:, None], logits, 0.0)
    largest = tl.max(logits, 1)
    return largest, 1.0 / tl.sum(tl.exp(logits - largest[:, None]), 1)


# --- kernels ---


@triton.jit(do_not_specialize=INTS)
def forward_kernel(
    out_ptr, value_ptr, location_ptr, weight_ptr, levels,
    heads, pixels, height, width, out_height, out_width, stride_y, stride_x, padding_y, padding_x,
    dilation_y, dilation_x, scale,
    SAMPLES: tl.constexpr, CUT: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of queries and a block of channels of one head."""
    POINTS: tl.constexpr = SAMPLES.points
    D: tl.constexpr = CUT.d
    BLOCK_D: tl.constexpr = CUT.block_d
    TILE_H: tl.constexpr = CUT.tile_h
    TILE_W: tl.constexpr = CUT.tile_w
    AT_ONCE: tl.constexpr = CUT.at_once
    program = tl.program_id(0)
    c = program % tl.cdiv(D, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    rest = program // tl.cdiv(D, BLOCK_D)
    head = rest % heads
    n, i, j, real = output_tile(rest // heads, out_height, out_width, TILE_H, TILE_W)
    in_range = None
    if D % BLOCK_D != 0:
        in_range = c < D
    row = ((n * out_height + i) * out_width + j) * heads + head
    geometry = Geometry(
        levels, pixels, height, width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, scale
    )
    stride = heads.to(tl.int64) * D
    if SOFTMAX:
        largest, inverse = softmax_stats(weight_ptr, row * POINTS, real, POINTS)
    acc = tl.zeros((TILE_H * TILE_W, BLOCK_D), tl.float32)
    for p0 in range(0, POINTS, AT_ONCE):
        for ahead in tl.static_range(AT_ONCE):
            p = p0 + ahead
            at = row * POINTS + p
            y, x, high, wide, start, _, _ = locate(location_ptr, at, real, p, i, j, geometry, SAMPLES)
            weight = tl.load(weight_ptr + at, mask=real, other=0.0)
            if SOFTMAX:
                weight = tl.exp(weight - largest) * inverse
            pixel, inside, dy, dx, _ = corners(y, x, real, high, wide)
            pixel = (n * pixels + start + pixel) * stride + head * D
            acc += mean(load_corners(value_ptr, pixel, inside, stride, wide * stride, c, in_range), dy, dx, weight)
    tl.store(
        out_ptr + (row * D)[:, None] + c[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & (c < D)[None, :],
    )


@triton.jit(do_not_specialize=INTS)
def points_kernel(
    grad_location_ptr, grad_weight_ptr, grad_out_ptr, value_ptr, location_ptr, weight_ptr, levels,
    heads, pixels, height, width, out_height, out_width, stride_y, stride_x, padding_y, padding_x,
    dilation_y, dilation_x, scale,
    SAMPLES: tl.constexpr, CUT: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    """Gradients of locations and weights: a program owns a tile of queries of one head. A pixel position of exactly −1
    has a gradient if BORDER."""
    POINTS: tl.constexpr = SAMPLES.points
    D: tl.constexpr = CUT.d
    BLOCK_D: tl.constexpr = CUT.block_d
    TILE_H: tl.constexpr = CUT.tile_h
    TILE_W: tl.constexpr = CUT.tile_w
    AT_ONCE: tl.constexpr = CUT.at_once
    program = tl.program_id(0)
    head = program % heads
    n, i, j, real = output_tile(program // heads, out_height, out_width, TILE_H, TILE_W)
    row = ((n * out_height + i) * out_width + j) * heads + head
    geometry = Geometry(
        levels, pixels, height, width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, scale
    )
    stride = heads.to(tl.int64) * D
    for p0 in range(0, POINTS, AT_ONCE):
        for ahead in tl.static_range(AT_ONCE):
            p = p0 + ahead
            at = row * POINTS + p
            y, x, high, wide, start, grow_y, grow_x = locate(location_ptr, at, real, p, i, j, geometry, SAMPLES)
            weight = tl.load(weight_ptr + at, mask=real, other=0.0)
            pixel, inside, dy, dx, moves = corners(y, x, real, high, wide)
            if not BORDER:
                moves = moves & (y > -1.0) & (x > -1.0)
            pixel = (n * pixels + start + pixel) * stride + head * D
            zero = tl.where(real, 0.0, 0.0)
            sum_a, sum_b, sum_c, sum_d = zero, zero, zero, zero
            for c0 in range(0, D, BLOCK_D):
                c = c0 + tl.arange(0, BLOCK_D)
                in_range = None
                upstream_real = real[:, None]
                if D % BLOCK_D != 0:
                    in_range = c < D
                    upstream_real = upstream_real & in_range[None, :]
                grad = tl.load(grad_out_ptr + (row * D)[:, None] + c[None, :], mask=upstream_real, other=0.0)
                found = load_corners(value_ptr, pixel, inside, stride, wide * stride, c, in_range)
                a, b, c_sum, d = moments(grad.to(tl.float32), found)
                sum_a += a
                sum_b += b
                sum_c += c_sum
                sum_d += d
            if grad_weight_ptr is not None:
                total = sum_a + dx * sum_b + dy * sum_c + dx * dy * sum_d
                tl.store(grad_weight_ptr + at, total, mask=real)
            if grad_location_ptr is not None:
                grad_x = weight * (sum_b + dy * sum_d) * grow_x
                grad_y = weight * (sum_c + dx * sum_d) * grow_y
                tl.store(grad_location_ptr + 2 * at, tl.where(moves, grad_x, 0.0), mask=real)
                tl.store(grad_location_ptr + 2 * at + 1, tl.where(moves, grad_y, 0.0), mask=real)


@triton.jit(do_not_specialize=INTS)
def sample_keys_kernel(
    keys_ptr, location_ptr, levels,
    heads, pixels, height, width, out_height, out_width, stride_y, stride_x, padding_y, padding_x,
    dilation_y, dilation_x, cells, unit0, scale,
    SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The key of every sample of the units (pairs of image and head) from ``unit0`` on, unit by unit."""
    POINTS: tl.constexpr = SAMPLES.points
    queries = out_height.to(tl.int64) * out_width
    samples = queries * POINTS
    blocks = tl.cdiv(samples, BLOCK)
    program = tl.program_id(0)
    unit = (program // blocks).to(tl.int64)
    s = program % blocks * BLOCK + tl.arange(0, BLOCK)
    real = s < samples
    q = s // POINTS
    p = (s - q * POINTS).to(tl.int32)
    n = (unit0 + unit) // heads
    at = ((n * queries + q) * heads + (unit0 + unit) % heads) * POINTS + p
    geometry = Geometry(
        levels, pixels, height, width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, scale
    )
    y, x, high, wide, _, _, _ = locate(location_ptr, at, real, p, q // out_width, q % out_width, geometry, SAMPLES)
    cell, near = cell_of(y, x, high, wide)
    if SAMPLES.levels > 0:
        cell += first_cell(levels, level_of(p, SAMPLES), pixels, cells, SAMPLES.levels)
    key = unit * (cells + 1) + tl.where(near, cell, cells)
    tl.store(keys_ptr + unit * samples + s, key.to(tl.int32), mask=real)


@triton.jit(do_not_specialize=INTS)
def sample_records_kernel(
    row_ptr, record_ptr, order_ptr, location_ptr, weight_ptr, levels,
    heads, pixels, height, width, out_height, out_width, stride_y, stride_x, padding_y, padding_x,
    dilation_y, dilation_x, unit0, units, scale,
    SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The record of every sample in sorted order."""
    POINTS: tl.constexpr = SAMPLES.points
    queries = out_height.to(tl.int64) * out_width
    samples = queries * POINTS
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = e < units * samples
    sample = tl.load(order_ptr + e, mask=real, other=0)
    unit = sample // samples
    s = sample - unit * samples
    q = s // POINTS
    p = (s - q * POINTS).to(tl.int32)
    n = (unit0 + unit) // heads
    at = ((n * queries + q) * heads + (unit0 + unit) % heads) * POINTS + p
    geometry = Geometry(
        levels, pixels, height, width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, scale
    )
    y, x, high, wide, _, _, _ = locate(location_ptr, at, real, p, q // out_width, q % out_width, geometry, SAMPLES)
    factor = tl.load(weight_ptr + at, mask=real, other=0.0)
    store_records(row_ptr, record_ptr, e, q, y, x, factor, real, high, wide)


@triton.jit(do_not_specialize=INTS)
def value_kernel(
    grad_value_ptr, grad_out_ptr, row_ptr, record_ptr, starts_ptr, levels,
    heads, pixels, height, width, out_height, out_width, cells, unit0,
    LEVELS: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Gradient of value: a program owns a tile of pixels and a block of channels of one head. LANES partial sums of a
    pixel take its samples in turn and are added at the end, so that a long list is not one long chain."""
    D: tl.constexpr = CUT.d
    BLOCK_D: tl.constexpr = CUT.block_d
    LANES: tl.constexpr = CUT.lanes
    TILE_H: tl.constexpr = CUT.tile_h
    TILE_W: tl.constexpr = CUT.tile_w
    PIXELS: tl.constexpr = TILE_H * TILE_W
    program = tl.program_id(0)
    c = program % tl.cdiv(D, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    tile = program // tl.cdiv(D, BLOCK_D)
    c_real = (c < D)[None, :]
    map_height = height
    map_width = width
    if LEVELS > 0:  # all levels end to end are one row of pixels
        map_height = height * 0 + 1
        map_width = pixels
    unit, y, x, real = output_tile(tile, map_height, map_width, TILE_H, TILE_W, LANES)
    n = (unit0 + unit) // heads
    head = (unit0 + unit) % heads
    queries = out_height.to(tl.int64) * out_width
    lane = tl.arange(0, PIXELS * LANES) % LANES
    starts = starts_ptr + unit * (cells + 1)
    acc = tl.zeros((PIXELS * LANES, BLOCK_D), tl.float32)
    for turn in range(LEVELS if LEVELS > 0 else 1):
        level = turn + program * 0
        level_y = y
        level_x = x
        level_width = width
        inside = real
        level_cells = starts
        if LEVELS > 0:
            high, level_width, start = level_size(levels, level, pixels)
            within = x - start.to(tl.int32)
            level_y = within // tl.maximum(level_width, 1)
            level_x = within - level_y * level_width
            inside = real & (within >= 0) & (level_y < high)
            level_cells += first_cell(levels, level, pixels, cells, LEVELS)
        runs = reach(level_cells, level_y, level_x, level_width, inside)
        count = runs[2] + runs[5]
        for t0 in range(0, tl.max(count, 0), 2 * LANES):
            for ahead in tl.static_range(2):
                t = t0 + ahead * LANES + lane
                e, at = entry_at(runs, t)
                q = tl.load(row_ptr + e, mask=t < count, other=-1)
                weight = tl.load(record_ptr + at, mask=t < count, other=0.0)
                upstream = grad_out_ptr + (((n * queries + q) * heads + head) * D)[:, None] + c[None, :]
                upstream_real = (q >= 0)[:, None]
                if D % BLOCK_D != 0:
                    upstream_real = upstream_real & c_real
                acc += weight[:, None] * tl.load(upstream, mask=upstream_real, other=0.0).to(tl.float32)
    if LANES > 1:
        acc = tl.sum(tl.reshape(acc, (PIXELS, LANES, BLOCK_D)), 1)
    _, y, x, real = output_tile(tile, map_height, map_width, TILE_H, TILE_W)
    pixel = n * pixels + y.to(tl.int64) * map_width + x
    tl.store(
        grad_value_ptr + ((pixel * heads + head) * D)[:, None] + c[None, :],
        acc.to(grad_value_ptr.dtype.element_ty),
        mask=real[:, None] & c_real,
    )
