"""How a call of multi-scale deformable attention or of DCNv3 becomes launches of the kernels in ``rows.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from accel.kernels import _launch
from accel.kernels._launch import CompileCase, Launch, launch, power_of_two
from accel.kernels.deformable import rows, sampling
from accel.kernels.deformable.rows import Cut, Levels, Samples

SAMPLES = 256
"""Samples of a program that writes keys or records."""


@dataclass(frozen=True)
class Call:
    """What the kernels need to know of a call."""

    value: Tensor  # (N, S, M, D)
    locations: Tensor  # (N, Q, M, P, 2)
    weights: Tensor  # (N, Q, M, P)
    queries: tuple[int, int]  # as a grid
    map: tuple[int, int]  # the pixels as a map; a pyramid's are one row
    cells: int  # at least as many as all levels have together
    levels: Levels
    samples_of_query: Samples
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    scale: float = 1.0
    softmax: bool = False
    border_gradient: bool = True

    @property
    def points(self) -> int:
        return self.weights.shape[3]

    @property
    def units(self) -> int:
        return self.value.shape[0] * self.value.shape[2]

    @property
    def rows(self) -> int:
        return self.units * self.queries[0] * self.queries[1]

    @property
    def samples(self) -> int:
        """Of a unit."""
        return self.queries[0] * self.queries[1] * self.points


@dataclass(frozen=True)
class Tile:
    """Rows (queries, or pixels times lanes) and channels of a tile, warps of a program, points that are on their way
    together, partial sums of a pixel."""

    rows: int
    d: int
    warps: int
    at_once: int = 1
    lanes: int = 1


# Chosen by bytes and registers, not measured. The four pixels of the points that a thread waits for take 64 registers:
# enough loads on their way, and few enough registers for several programs to share a processor.


def _tile(rows: int, head_size: int, points: int, itemsize: int, most: int) -> Tile:
    d = power_of_two(head_size, 1, 128)
    elements = 2048 if rows * d >= 2048 * 1056 else 1024  # eight programs for each of 132 processors remain
    most = min(most, max(1, 8192 // (elements * itemsize)))
    at_once = max(count for count in range(1, most + 1) if points % count == 0)
    return Tile(power_of_two(elements // d, 16, 128), d, 4, at_once)


def forward_tile(rows: int, head_size: int, points: int, itemsize: int) -> Tile:
    return _tile(rows, head_size, points, itemsize, 4)


def points_tile(rows: int, head_size: int, points: int, itemsize: int) -> Tile:
    return _tile(rows, head_size, points, itemsize, 2)


def value_tile(list_length: float, head_size: int) -> Tile:
    """``list_length`` is how many samples reach a pixel on the average."""
    lanes = power_of_two(int(list_length / 8), 1, 8)
    return Tile(64, power_of_two(head_size, 1, 64), 4, lanes=lanes)


def shared(call: Call) -> dict[str, Any]:
    return {
        "value_ptr": call.value,
        "location_ptr": call.locations,
        "weight_ptr": call.weights,
        "levels": call.levels,
        "heads": call.value.shape[2],
        "pixels": call.value.shape[1],
        "height": call.map[0],
        "width": call.map[1],
        "out_height": call.queries[0],
        "out_width": call.queries[1],
        "stride_y": call.stride[0],
        "stride_x": call.stride[1],
        "padding_y": call.padding[0],
        "padding_x": call.padding[1],
        "dilation_y": call.dilation[0],
        "dilation_x": call.dilation[1],
        "cells": call.cells,
        "scale": call.scale,
        "SAMPLES": call.samples_of_query,
    }


def _cut(tile: Tile, head_size: int, height: int, width: int) -> tuple[Cut, int]:
    """The cut of a map of this size, and how many tiles it has."""
    tile_h, tile_w = sampling.output_block(height, width, max(1, tile.rows // tile.lanes))
    tiles = triton.cdiv(height, tile_h) * triton.cdiv(width, tile_w)
    return Cut(head_size, tile_h, tile_w, tile.d, tile.at_once, tile.lanes), tiles


def forward_launch(out: Tensor, call: Call) -> Launch:
    n, _, heads, head_size = call.value.shape
    tile = forward_tile(call.rows, head_size, call.points, call.value.element_size())
    cut, tiles = _cut(tile, head_size, *call.queries)
    programs = n * tiles * heads * triton.cdiv(head_size, tile.d)
    given = {**shared(call), "out_ptr": out, "CUT": cut, "SOFTMAX": call.softmax}
    return launch(rows.forward_kernel, programs, tile.warps, **given)


def points_launch(grad_location: Tensor | None, grad_weight: Tensor | None, grad_out: Tensor, call: Call) -> Launch:
    n, _, heads, head_size = call.value.shape
    tile = points_tile(call.rows, head_size, call.points, call.value.element_size())
    cut, tiles = _cut(tile, head_size, *call.queries)
    pointers = {"grad_location_ptr": grad_location, "grad_weight_ptr": grad_weight, "grad_out_ptr": grad_out}
    given = {**shared(call), **pointers, "CUT": cut, "BORDER": call.border_gradient}
    return launch(rows.points_kernel, n * tiles * heads, tile.warps, **given)


def sample_launches(
    keys: Tensor, order: Tensor, row: Tensor, record: Tensor, unit0: int, call: Call
) -> tuple[Launch, Launch]:
    """What writes the keys of samples, and what writes their records once they are sorted."""
    pointers = {"keys_ptr": keys, "order_ptr": order, "row_ptr": row, "record_ptr": record}
    given = {**shared(call), **pointers, "unit0": unit0, "units": keys.shape[0], "BLOCK": SAMPLES}
    return (
        launch(rows.sample_keys_kernel, keys.shape[0] * triton.cdiv(keys.shape[1], SAMPLES), 4, **given),
        launch(rows.sample_records_kernel, triton.cdiv(keys.numel(), SAMPLES), 4, **given),
    )


def value_launch(
    grad_value: Tensor, grad_out: Tensor, row: Tensor, record: Tensor, starts: Tensor, units: tuple[int, int],
    call: Call,
) -> Launch:  # fmt: skip
    head_size = call.value.shape[3]
    tile = value_tile(4 * call.samples / call.value.shape[1], head_size)
    cut, tiles = _cut(tile, head_size, *call.map)
    programs = units[1] * tiles * triton.cdiv(head_size, tile.d)
    pointers = {"grad_value_ptr": grad_value, "grad_out_ptr": grad_out, "row_ptr": row, "record_ptr": record}
    more = {"starts_ptr": starts, "unit0": units[0], "LEVELS": call.samples_of_query.levels, "CUT": cut}
    return launch(rows.value_kernel, programs, tile.warps, **{**shared(call), **pointers, **more})


def forward(call: Call) -> Tensor:
    """``(N, Q, M, D)``."""
    n, _, heads, head_size = call.value.shape
    out = call.value.new_empty(
        (n, call.queries[0] * call.queries[1], heads, head_size), dtype=_launch.store_dtype(call.value.dtype)
    )
    forward_launch(out, call).run()
    return out.to(call.value.dtype)


def grad_value(grad_out: Tensor, call: Call) -> Tensor:
    grad = torch.empty_like(call.value, dtype=_launch.store_dtype(call.value.dtype))
    for first, count in sampling.chunks(call.units, call.samples, call.cells):
        keys, row = (call.locations.new_empty((count, call.samples), dtype=torch.int32) for _ in range(2))
        record, order = call.locations.new_empty((count, call.samples, 4)), row.new_empty(0, dtype=torch.int64)
        sample_launches(keys, order, row, record, first, call)[0].run()
        order, starts = sampling.sort_samples(keys, count, call.cells)
        sample_launches(keys, order, row, record, first, call)[1].run()
        value_launch(grad, grad_out, row, record, starts, (first, count), call).run()
    return grad.to(call.value.dtype)


def grad_points(grad_out: Tensor, call: Call, need_location: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    """Gradients of locations and weights, an empty tensor for what is not needed."""
    location = torch.empty_like(call.locations) if need_location else call.locations.new_empty(0)
    weight = torch.empty_like(call.weights) if need_weight else call.weights.new_empty(0)
    if need_location or need_weight:
        points_launch(location if need_location else None, weight if need_weight else None, grad_out, call).run()
    return location, weight


def too_large(call_units: int, samples: int, cells: int, pixels: int, head_size: int) -> str | None:
    """Why a call is more than 32-bit keys and one launch can number; samples, cells and pixels are a unit's."""
    if cells + 1 >= 2**31 or samples >= 2**31:
        return f"{samples} samples in {cells} cells are more than 32-bit keys can number"
    if call_units * (samples + pixels) * -(-head_size // 64) >= 2**31:
        return f"{call_units} heads with {samples} samples and {pixels} pixels are more than one launch can number"
    return None


def compile_cases(call: Call, name: str) -> Iterator[CompileCase]:
    """Every launch of a call, forward and backward, on tensors that have shapes only."""
    integers = torch.empty((call.units, call.samples), dtype=torch.int32, device="meta")
    long = torch.empty(1, dtype=torch.int64, device="meta")
    yield forward_launch(call.value, call).case(name)
    yield points_launch(call.locations, call.weights, call.value, call).case(name)
    for step in sample_launches(integers, long, integers, call.weights, 0, call):
        yield step.case(name)
    units = (0, call.units)
    yield value_launch(call.value, call.value, integers, call.weights, integers, units, call).case(name)
