"""Quantisation to eight bits in Triton; the kernels are in ``blocks.py``. Tiles are chosen by registers and for loads
of 16 bytes a thread, not measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from accel.backends import KERNEL_DTYPES, why_not_gpu
from accel.kernels import _launch
from accel.kernels._launch import Launch
from accel.kernels.fp8 import blocks
from accel.kernels.fp8.blocks import Config
from accel.kernels.fp8.codes import FORMATS
from accel.ops.fp8.fp8_quantize import Args

__all__ = ["compile_cases", "forward", "why_not"]

TILE = 128
"""Blocks of at most so many rows and columns are reduced inside a tile."""
STRIP = 4096
"""Elements of a larger block of which one program finds the largest."""


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtypes are judged by the op. ``torch.compile`` traces through this."""
    reason = why_not_gpu(args.x, _launch.INTERPRETING)
    if reason is not None:
        return reason
    B, R, C = args.x.shape
    for turned in (False, True):
        _, down, across = args.scale_shape(turned)
        if B * (-(-R // 8) * -(-C // 64) + down * across) >= 2**31:
            return f"{tuple(args.x.shape)} in blocks of {args.block(turned)} is more than one launch can number"
    return None


class Made(NamedTuple):
    """A result, of x or of xᵀ, and its blocks as they lie in x: their rows and columns, and how many a matrix has."""

    codes: Tensor
    scale: Tensor
    height: int
    width: int
    down: int
    across: int


def empty(args: Args, turned: bool) -> Made:
    B, R, C = args.x.shape
    codes = args.x.new_empty((B, C, R) if turned else (B, R, C), dtype=torch.uint8)
    shape = args.scale_shape(turned)
    scale = args.x.new_empty(shape, dtype=torch.uint8 if args.scale_format == "e8m0" else torch.float32)
    step = -1 if turned else 1
    return Made(codes, scale, *args.block(turned)[::step], *shape[1:][::step])


def forward(
    x: Tensor, rows: int, cols: int, format: str, scale_format: str, transpose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments are the fields of ``accel.ops.fp8.fp8_quantize.Args``."""
    args = Args(x, rows, cols, format, scale_format, transpose)
    made, turned = empty(args, False), empty(args, True) if transpose else None
    with _launch.device_of(x):
        for launch in launches(args, made, turned):
            launch.run()
    if turned is None:
        return made.codes, made.scale, made.codes.new_empty(0), made.scale.new_empty(0)
    return made.codes, made.scale, turned.codes, turned.scale


def launches(args: Args, made: Made, turned: Made | None) -> Iterator[Launch]:
    """What writes these results, in order."""
    _, R, C = args.x.shape
    height, width = in_tile(made.height, R), in_tile(made.width, C)
    alike = turned is None or (in_tile(turned.height, R), in_tile(turned.width, C)) == (width, height)
    if alike and height is not None and width is not None:
        found = tile_launch(args, made, turned, height, width)
        # where a thread reads and writes single numbers there are no registers for so large a tile
        if unit_of(C) > 1 or found.arguments["CONFIG"].rows < TILE:
            yield found
            return
    yield from steps(args, made, turned)


def in_tile(block: int, size: int) -> int | None:
    """Of an axis: the size of blocks that divide a tile and do what these do, None if there is none."""
    if block <= TILE and block & (block - 1) == 0:
        return block
    return TILE if size <= min(block, TILE) else None


def tile_launch(args: Args, made: Made, turned: Made | None, height: int, width: int) -> Launch:
    B, R, C = args.x.shape
    rows, cols = max(height, _launch.power_of_two(R, 8, 32)), TILE
    if turned is not None:
        rows = cols = max(height, width, 64)
    config = Config(
        rows, cols, height, width, 1 if turned is None else unit_of(R), unit_of(C), FORMATS[args.format],
        args.scale_format != "fp32",
    )  # fmt: skip
    return _launch.launch(
        blocks.tile_kernel, B * triton.cdiv(R, rows) * triton.cdiv(C, cols), 16 if rows == TILE else 4,
        codes_ptr=made.codes, scale_ptr=made.scale, codes_t_ptr=None if turned is None else turned.codes,
        scale_t_ptr=None if turned is None else turned.scale, x_ptr=args.x, rows=R // config.row_unit,
        cols=C // config.col_unit, CONFIG=config,
    )  # fmt: skip


def steps(args: Args, made: Made, turned: Made | None) -> Iterator[Launch]:
    """The way of blocks that no tile holds."""
    inverse = torch.empty((args.x.shape[0], made.down, made.across), dtype=torch.float32, device=args.x.device)
    inverse_t = None
    yield from scales(args, made, inverse, False)
    if turned is not None:
        inverse_t = inverse.new_empty((args.x.shape[0], turned.down, turned.across))
        yield from scales(args, turned, inverse_t, True)
    yield encode_launch(args, made, turned, inverse, inverse_t)


def scales(args: Args, made: Made, inverse: Tensor, turned: bool) -> Iterator[Launch]:
    """What writes the scales of a result, and what numbers are multiplied by."""
    B, R, C = args.x.shape
    width, of_width, span_cols = strip(made.width, C, STRIP)
    height, of_height, span_rows = strip(made.height, R, STRIP // width)
    unit = unit_of(C, span_cols)
    config = Config(height, width, of_height, of_width, 1, unit)
    down, across = triton.cdiv(span_rows, height), triton.cdiv(span_cols, width)  # tiles of a strip
    tiles = (triton.cdiv(R, span_rows) * down, triton.cdiv(C, span_cols) * across)
    shape = (B, tiles[0] * (height // of_height), tiles[1] * (width // of_width))
    largest = torch.empty(shape, dtype=torch.int32, device=args.x.device)
    yield _launch.launch(
        blocks.largest_kernel, B * tiles[0] * tiles[1], 4, largest_ptr=largest, x_ptr=args.x, rows=R, cols=C // unit,
        span_rows=span_rows, span_cols=span_cols // unit, CONFIG=config,
    )  # fmt: skip
    room = _launch.power_of_two(down * across, 1, 1024)
    many = Config(
        max(1, 256 // room), room, format=FORMATS[args.format], powers=args.scale_format != "fp32", turned=turned
    )
    total = B * made.down * made.across
    yield _launch.launch(
        blocks.scales_kernel, triton.cdiv(total, many.rows), 4, scale_ptr=made.scale, inverse_ptr=inverse,
        largest_ptr=largest, total=total, down=made.down, across=made.across, strips_down=down, strips_across=across,
        rows=shape[1], cols=shape[2], CONFIG=many,
    )  # fmt: skip


def strip(block: int, size: int, room: int) -> tuple[int, int, int]:
    """Of an axis: a tile of at most ``room``, the blocks in it, and across the edges of what no tile reaches."""
    found = in_tile(block, size)
    if found is None:
        tile = _launch.power_of_two(block, 1, room)
        return tile, tile, block
    tile = max(found, min(TILE, room))
    return tile, found, tile


def encode_launch(args: Args, made: Made, turned: Made | None, inverse: Tensor, inverse_t: Tensor | None) -> Launch:
    B, R, C = args.x.shape
    rows, cols = (_launch.power_of_two(R, 8, 32), TILE) if turned is None else (64, 64)
    config = Config(
        rows, cols, row_unit=1 if turned is None else unit_of(R), col_unit=unit_of(C), format=FORMATS[args.format]
    )
    return _launch.launch(
        blocks.encode_kernel, B * triton.cdiv(R, rows) * triton.cdiv(C, cols), 4 if turned is None else 8,
        codes_ptr=made.codes, codes_t_ptr=None if turned is None else turned.codes, inverse_ptr=inverse,
        inverse_t_ptr=inverse_t, x_ptr=args.x, rows=R // config.row_unit, cols=C // config.col_unit,
        height=made.height, width=made.width, height_t=1 if turned is None else turned.height,
        width_t=1 if turned is None else turned.width, CONFIG=config,
    )  # fmt: skip


def unit_of(*sizes: int) -> int:
    """What sizes are given in."""
    return 16 if all([size % 16 == 0 for size in sizes]) else 1


CASES = (  # R, C, rows, cols, format, scale_format, transpose
    (4096, 7168, 1, 128, "e4m3", "fp32", True),
    (4095, 7168, 1, 128, "e4m3", "fp32", True),
    (4096, 7168, 1, 128, "e5m2", "pow2", True),
    (4096, 7168, 1, 128, "e4m3", "fp32", False),
    (4095, 7161, 1, 128, "e4m3", "fp32", False),
    (4096, 7168, 128, 128, "e4m3", "fp32", True),
    (4096, 7168, 128, 128, "e4m3", "fp32", False),
    (4096, 7168, 1, 32, "e4m3", "e8m0", True),
    (4095, 7161, 1, 32, "e5m2", "e8m0", True),
    (4095, 7161, 128, 128, "e4m3", "fp32", True),
    (4096, 7168, 1, 0, "e4m3", "fp32", True),
    (4096, 7168, 0, 0, "e4m3", "fp32", False),
    (3, 70, 1, 128, "e4m3", "fp32", False),
)


def _cases() -> Iterator[_launch.CompileCase]:
    for dtype, (R, C, rows, cols, name, scale_format, transpose) in itertools.product(KERNEL_DTYPES, CASES):
        args = Args(torch.empty((1, R, C), dtype=dtype, device="meta"), rows, cols, name, scale_format, transpose)
        what = f"{str(dtype)[6:]} {R} x {C}, {rows} x {cols}, {name}, {scale_format}{', both' if transpose else ''}"
        made = empty(args, False), empty(args, True) if transpose else None
        for n, step in enumerate(launches(args, *made)):
            yield step.case(f"{what} {n}")


def compile_cases() -> Iterator[_launch.CompileCase]:
    return _launch.once(_cases())
