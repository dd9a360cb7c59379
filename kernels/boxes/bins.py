"""Position-sensitive pooling and alignment in Triton: one kernel forward and one backward for both.

The weight of a pixel in a bin is that of its row times that of its column. Forward, a program owns a bin of a box and
some of its channels; backward, a tile of one channel of an image, and walks over the boxes in their order, so that
every sum has one owner. A pixel of weight 0 is not read: it may hold a NaN that no sample has seen.

The ratio is the number of samples along a side of a bin, 0 for as many as it has pixels, or ``POOL``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.backends import KERNEL_DTYPES, why_not_gpu
from accel.kernels import _launch
from accel.kernels._launch import Launch
from accel.ops.boxes.bins import LIMIT, SLACK

POOL = -1
_POOL = tl.constexpr(POOL)
_LIMIT = tl.constexpr(float(LIMIT))
_SLACK = tl.constexpr(SLACK)
INTS = ["boxes", "batch", "channels", "height", "width"]
"""Integers on whose values no kernel is specialised."""


@dataclass(frozen=True)
class Config:
    """What a kernel is compiled for: bins of a box along both sides, the ratio, and the tile."""

    ph: int
    pw: int
    ratio: int
    block_y: int
    block_x: int
    block_c: int = 1


@triton.jit
def _load_box(image_at, corners_at, batch):
    """The image of a box, whether the box counts, and x1, y1, x2, y2; all of them 0 where it does not."""
    image = tl.load(image_at)
    x1 = tl.load(corners_at)
    y1 = tl.load(corners_at + 1)
    x2 = tl.load(corners_at + 2)
    y2 = tl.load(corners_at + 3)
    real = (image > -1.0) & (image < batch)
    real = real & (tl.abs(x1) < _LIMIT) & (tl.abs(y1) < _LIMIT) & (tl.abs(x2) < _LIMIT) & (tl.abs(y2) < _LIMIT)
    image = tl.where(real, image, 0.0).to(tl.int32)
    x1 = tl.where(real, x1, 0.0)
    y1 = tl.where(real, y1, 0.0)
    x2 = tl.where(real, x2, 0.0)
    y2 = tl.where(real, y2, 0.0)
    return image, real, x1, y1, x2, y2


@triton.jit
def _round(x):
    """To the nearest integer, ties away from 0."""
    size = tl.abs(x)
    whole = tl.floor(size)
    whole += tl.where(size - whole >= 0.5, 1.0, 0.0)
    return tl.where(x < 0.0, -whole, whole)


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _make_bin(low, high, i, BINS: tl.constexpr, size, RATIO: tl.constexpr):
    """Bin i of an axis of ``size`` pixels: the first and the end of the pixels that can have a weight, what to divide
    by, and for samples where the bin begins, its length, how many there are, the first and the end of those that can be
    near the map."""
    last = (size - 1).to(tl.float32)
    index = i.to(tl.float32)
    if RATIO == _POOL:
        begin = _round(low)
        step = tl.div_rn(tl.maximum(_round(high) - begin, 1.0), BINS * 1.0)
        first = _clamp(begin + tl.floor(index * step), 0.0, last)
        end = _clamp(begin + tl.ceil((index + 1.0) * step), 0.0, last)
        grid = tl.maximum(end - first, 1.0)
        start = index * 0.0
        stop = start
    else:
        low -= 0.5
        step = tl.div_rn(high - 0.5 - low, BINS * 1.0)
        begin = index * step + low
        if RATIO > 0:
            grid = index * 0.0 + RATIO
            start = index * 0.0
            stop = grid
        else:  # in long bins only the samples near the map are looked at
            grid = tl.maximum(tl.ceil(step), 0.0)
            start = tl.floor(tl.div_rn((-1.0 - begin) * grid, tl.where(grid > 0.0, step, 1.0)) - _SLACK)
            start = _clamp(start, 0.0, grid)
            stop = tl.minimum(grid, start + 2.0 * size + (2.0 + 2.0 * _SLACK))
        first = _clamp(tl.floor(tl.minimum(begin, begin + step)) - 1.0, 0.0, last)
        end = _clamp(tl.floor(tl.maximum(begin, begin + step)) + 2.0, 0.0, last) + 1.0
    divisor = tl.maximum(grid, 1.0)
    return first.to(tl.int32), end.to(tl.int32), divisor, begin, step, grid, start.to(tl.int32), stop.to(tl.int32)


@triton.jit
def _weigh(pixel, bin, size, RATIO: tl.constexpr):
    """The weights of pixels (a vector of int32) in a bin."""
    first, end, _, begin, step, grid, start, stop = bin
    if RATIO == _POOL:
        weight = tl.where((pixel >= first) & (pixel < end), 1.0, 0.0)
    else:
        weight = tl.where(pixel < 0, 0.0, 0.0)
        for t in range(start, stop):
            at = begin + tl.div_rn((t + 0.5) * step, grid)
            near = (at >= -1.0) & (at <= size)
            at = _clamp(at, 0.0, (size - 1).to(tl.float32))
            weight += tl.where(near, tl.maximum(1.0 - tl.abs(pixel - at), 0.0), 0.0)
    return weight


@triton.jit(do_not_specialize=INTS)
def forward_kernel(
    out_ptr, input_ptr, boxes_ptr, corners_ptr, batch, channels, height, width, CONFIG: tl.constexpr
):  # fmt: skip
    """A bin of a box, for some of its channels."""
    PH: tl.constexpr = CONFIG.ph
    PW: tl.constexpr = CONFIG.pw
    RATIO: tl.constexpr = CONFIG.ratio
    BLOCK_C: tl.constexpr = CONFIG.block_c
    BLOCK_Y: tl.constexpr = CONFIG.block_y
    BLOCK_X: tl.constexpr = CONFIG.block_x
    # the bins of a box side by side, then blocks of channels, then boxes
    program = tl.program_id(0)
    j = program % PW
    i = program // PW % PH
    blocks = tl.cdiv(channels // (PH * PW), BLOCK_C)
    c0 = program // (PH * PW) % blocks * BLOCK_C
    k = program // (PH * PW) // blocks
    image, real, x1, y1, x2, y2 = _load_box(boxes_ptr + k.to(tl.int64) * 5, corners_ptr + k.to(tl.int64) * 4, batch)
    rows = _make_bin(y1, y2, i, PH, height, RATIO)
    columns = _make_bin(x1, x2, j, PW, width, RATIO)
    lane = tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for y0 in range(rows[0], rows[1], BLOCK_Y):
        y = y0 + tl.arange(0, BLOCK_Y)
        along_y = _weigh(y, rows, height, RATIO)
        for x0 in range(columns[0], columns[1], BLOCK_X):
            x = x0 + tl.arange(0, BLOCK_X)
            weight = along_y[:, None] * _weigh(x, columns, width, RATIO)[None, :]
            at = y[:, None].to(tl.int64) * width + x[None, :]
            for c in range(BLOCK_C):
                channel = ((c0 + c) * PH + i) * PW + j
                plane = (image.to(tl.int64) * channels + channel) * height * width
                some = (weight > 0.0) & (channel < channels)
                pixels = tl.load(input_ptr + plane + at, mask=some, other=0.0).to(tl.float32)
                acc += tl.where(lane == c, tl.sum(pixels * weight), 0.0)
    acc = tl.where(real, tl.div_rn(acc, tl.zeros_like(acc) + rows[2] * columns[2]), 0.0)
    channel = ((c0 + lane) * PH + i) * PW + j
    tl.store(out_ptr + k.to(tl.int64) * channels + channel, acc.to(out_ptr.dtype.element_ty), mask=channel < channels)


@triton.jit(do_not_specialize=INTS)
def backward_kernel(
    grad_input_ptr, grad_out_ptr, boxes_ptr, corners_ptr, boxes, batch, channels, height, width, CONFIG: tl.constexpr
):  # fmt: skip
    """Gradient of a tile of one channel of an image."""
    PH: tl.constexpr = CONFIG.ph
    PW: tl.constexpr = CONFIG.pw
    RATIO: tl.constexpr = CONFIG.ratio
    BLOCK_Y: tl.constexpr = CONFIG.block_y
    BLOCK_X: tl.constexpr = CONFIG.block_x
    # the tiles of a channel side by side, then channels, then images
    program = tl.program_id(0)
    tiles_x = tl.cdiv(width, BLOCK_X)
    tiles_y = tl.cdiv(height, BLOCK_Y)
    x0 = program % tiles_x * BLOCK_X
    y0 = program // tiles_x % tiles_y * BLOCK_Y
    plane = program // tiles_x // tiles_y
    channel = plane % channels
    j = channel % PW
    i = channel // PW % PH
    y = y0 + tl.arange(0, BLOCK_Y)
    x = x0 + tl.arange(0, BLOCK_X)
    acc = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    image_at = boxes_ptr
    corners_at = corners_ptr
    grad_at = grad_out_ptr + channel
    for _ in range(boxes):
        image, real, x1, y1, x2, y2 = _load_box(image_at, corners_at, batch)
        rows = _make_bin(y1, y2, i, PH, height, RATIO)
        columns = _make_bin(x1, x2, j, PW, width, RATIO)
        real = real & (image == plane // channels)
        real = real & (rows[0] < y0 + BLOCK_Y) & (rows[1] > y0) & (columns[0] < x0 + BLOCK_X) & (columns[1] > x0)
        if real:
            grad = tl.div_rn(tl.load(grad_at).to(tl.float32), rows[2] * columns[2])
            weight = _weigh(y, rows, height, RATIO)[:, None] * _weigh(x, columns, width, RATIO)[None, :]
            acc += tl.where(weight > 0.0, weight * grad, 0.0)
        image_at += 5
        corners_at += 4
        grad_at += channels
    at = (plane.to(tl.int64) * height + y[:, None]) * width + x[None, :]
    inside = (y < height)[:, None] & (x < width)[None, :]
    tl.store(grad_input_ptr + at, acc.to(grad_input_ptr.dtype.element_ty), mask=inside)


# --- launches. Tiles are chosen by the size of a bin on common maps and by registers, not measured ---


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtypes are judged by the op. ``torch.compile`` traces through this."""
    reason = why_not_gpu(args.input, _launch.INTERPRETING)
    if reason is not None:
        return reason
    n, channels, height, width = args.input.shape
    if args.boxes.shape[0] * channels >= 2**31 or n * channels * -(-height // 8) * -(-width // 16) >= 2**31:
        return f"{tuple(args.input.shape)=} and {tuple(args.boxes.shape)=} are more than one launch can number"
    return None


def _corners(boxes: Tensor, spatial_scale: float) -> Tensor:
    """``(K, 4)`` in pixels. In a kernel the product could be fused with the difference that follows, and how many
    samples a bin has would not be the same everywhere."""
    return boxes[:, 1:] * spatial_scale


def _forward_launch(
    out: Tensor, input: Tensor, boxes: Tensor, corners: Tensor, output_size: list[int], ratio: int
) -> Launch:
    n, channels, height, width = input.shape
    ph, pw = output_size
    block = _launch.power_of_two(channels // (ph * pw), 1, 32)
    programs = boxes.shape[0] * triton.cdiv(channels // (ph * pw), block) * ph * pw
    config = Config(ph, pw, ratio, block_y=8, block_x=16, block_c=block)
    return _launch.launch(
        forward_kernel, programs, 1, out_ptr=out, input_ptr=input, boxes_ptr=boxes, corners_ptr=corners, batch=n,
        channels=channels, height=height, width=width, CONFIG=config,
    )  # fmt: skip


def _backward_launch(
    grad_input: Tensor, grad_out: Tensor, boxes: Tensor, corners: Tensor, output_size: list[int], ratio: int
) -> Launch:
    n, channels, height, width = grad_input.shape
    ph, pw = output_size
    config = Config(ph, pw, ratio, _launch.power_of_two(height, 8, 32), _launch.power_of_two(width, 16, 32))
    programs = n * channels * triton.cdiv(height, config.block_y) * triton.cdiv(width, config.block_x)
    return _launch.launch(
        backward_kernel, programs, 4, grad_input_ptr=grad_input, grad_out_ptr=grad_out, boxes_ptr=boxes,
        corners_ptr=corners, boxes=boxes.shape[0], batch=n, channels=channels, height=height, width=width,
        CONFIG=config,
    )  # fmt: skip


def forward(input: Tensor, boxes: Tensor, output_size: list[int], spatial_scale: float, ratio: int) -> Tensor:
    with _launch.device_of(input):
        ph, pw = output_size
        size = (boxes.shape[0], input.shape[1] // (ph * pw), ph, pw)
        out = torch.empty(size, dtype=_launch.store_dtype(input.dtype), device=input.device)
        _forward_launch(out, input, boxes, _corners(boxes, spatial_scale), output_size, ratio).run()
    return out.to(input.dtype)


def backward(
    grad_out: Tensor, boxes: Tensor, input_size: list[int], output_size: list[int], spatial_scale: float, ratio: int
) -> Tensor:
    with _launch.device_of(grad_out):
        grad = torch.empty(input_size, dtype=_launch.store_dtype(grad_out.dtype), device=grad_out.device)
        _backward_launch(grad, grad_out, boxes, _corners(boxes, spatial_scale), output_size, ratio).run()
    return grad.to(grad_out.dtype)


def compile_cases(ratios: list[int]) -> Iterator[_launch.CompileCase]:
    """Forward and backward on tensors that have shapes only."""
    sizes = [((2, 1029, 50, 84), [7, 7]), ((2, 24, 9, 13), [3, 2])]
    for dtype, (size, bins), ratio in itertools.product(KERNEL_DTYPES, sizes, ratios):
        x = torch.empty(size, dtype=dtype, device="meta")
        boxes, corners = torch.empty((300, 5), device="meta"), torch.empty((300, 4), device="meta")
        name = f"{str(dtype)[6:]} {bins[0]}x{bins[1]} bins ratio {ratio}"
        yield _forward_launch(x, x, boxes, corners, bins, ratio).case(name)
        yield _backward_launch(x, x, boxes, corners, bins, ratio).case(name)
