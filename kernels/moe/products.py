"""Products of rows that lie sorted by expert in Triton. Every tile of a result has one program that writes it, with no
atomics, so that the same input gives the same bits.

``product`` multiplies the rows of each expert with its weights, ``outer`` sums the products of two rows over the rows
of each expert, which is the gradient of the weights, and ``sums`` the rows alone, which is that of a bias. Rows may be
gathered from tokens as they are read. Which tile is whose is found on the device from the offsets, whose values are
bounded there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.backends import why_not_gpu
from accel.kernels import _launch
from accel.kernels._launch import Launch

INTS = ["tokens", "choices", "experts", "depth", "outputs", "left_size", "right_size"]
"""Integers on whose values no kernel is specialised."""


@dataclass(frozen=True)
class Config:
    """The tile of a program: rows, columns, and how much of what is summed over it takes at once."""

    rows: int
    outputs: int
    depth: int
    dot: Any
    inner_first: bool = False
    """Whether neighbours in a weight differ in what is summed over."""
    gather_left: bool = False
    gather_right: bool = False
    unit: int = 1
    """What sizes are multiples of, and are given in: of 16 a thread reads 16 bytes at once, while others are waited
    for."""


class Tiles(NamedTuple):
    """Of each tile of rows: its expert, X for those that have none, and its rows, from ``first`` up to ``stop``."""

    expert: Tensor
    first: Tensor
    stop: Tensor


class Source(NamedTuple):
    """Where rows are gathered from: the choice of each, t · K + k, and T and K; None for rows as they lie."""

    choice: Tensor | None
    tokens: int
    choices: int


AS_THEY_LIE = Source(None, 0, 1)


def bounded(offsets: Tensor, rows: int) -> Tensor:
    """``offsets`` that rise from 0 to at most ``rows``, whatever they held; with the end of the rows of no expert."""
    inside = offsets.clamp(0, rows).cummax(0)[0]
    return torch.cat([torch.zeros_like(inside[:1]), inside[1:], inside.new_full((1,), rows)])


def tiles(offsets: Tensor, rows: int, block: int) -> Tiles:
    """The tiles of all rows, on the device; as many as are enough for any offsets."""
    edges = bounded(offsets, rows)
    each = (edges.diff() + (block - 1)) // block
    ends = each.cumsum(0)
    number = torch.arange(triton.cdiv(rows, block) + offsets.shape[0], device=offsets.device)
    found = torch.searchsorted(ends, number, right=True)
    expert = found.clamp_max(offsets.shape[0] - 1)
    first = edges[expert] + (number - (ends - each)[expert]) * block
    return Tiles(expert, torch.where(found < offsets.shape[0], first, rows), edges[expert + 1])


# --- kernels ---


@triton.jit
def row_of(source_ptr, n, inside, tokens, choices):
    """The token of each row, and whether it has one."""
    i = tl.load(source_ptr + n, mask=inside, other=-1)
    there = inside & (i >= 0) & (i < tokens.to(tl.int64) * choices)
    return tl.where(there, i, 0) // choices, there


@triton.jit
def multiplied(acc, x_ptr, row, there, weight_ptr, column, columns, depth, outputs, CONFIG: tl.constexpr):
    """``acc`` plus rows of x times some columns of one expert's weights."""
    DEPTH: tl.constexpr = CONFIG.depth
    DOT: tl.constexpr = CONFIG.dot
    for k0 in range(0, depth, DEPTH):
        k = k0 + tl.arange(0, DEPTH)
        x = tl.load(
            x_ptr + row[:, None] * depth + k[None, :], mask=there[:, None] & (k < depth)[None, :], other=0.0
        ).to(DOT)  # fmt: skip
        if CONFIG.inner_first:
            at = column[None, :].to(tl.int64) * depth + k[:, None]
        else:
            at = k[:, None].to(tl.int64) * outputs + column[None, :]
        w = tl.load(weight_ptr + at, mask=(k < depth)[:, None] & columns[None, :], other=0.0).to(DOT)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=INTS)
def product_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, source_ptr, expert_ptr, first_ptr, stop_ptr, tokens, choices, experts, depth,
    outputs, CONFIG: tl.constexpr,
):  # fmt: skip
    """Some rows of one expert and some of its outputs; 0 in rows of none."""
    UNIT: tl.constexpr = CONFIG.unit
    depth *= UNIT
    outputs *= UNIT
    ROWS: tl.constexpr = CONFIG.rows
    OUTPUTS: tl.constexpr = CONFIG.outputs
    blocks = tl.cdiv(outputs, OUTPUTS)
    tile = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    columns = column < outputs
    expert = tl.load(expert_ptr + tile)
    n = tl.load(first_ptr + tile) + tl.arange(0, ROWS)
    inside = n < tl.load(stop_ptr + tile)
    acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
    if expert < experts:
        if source_ptr is not None:
            row, there = row_of(source_ptr, n, inside, tokens, choices)
        else:
            row, there = n, inside
        weight_ptr += expert * depth * outputs
        acc = multiplied(acc, x_ptr, row, there, weight_ptr, column, columns, depth, outputs, CONFIG)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + expert * outputs + column, mask=columns, other=0.0)
            acc = tl.where(there[:, None], acc + bias[None, :], acc)
    mask = inside[:, None] & columns[None, :]
    tl.store(out_ptr + n[:, None] * outputs + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=INTS)
def outer_kernel(
    out_ptr, left_ptr, right_ptr, source_ptr, offsets_ptr, tokens, choices, left_size, right_size, CONFIG: tl.constexpr
):  # fmt: skip
    """A tile of one expert's matrix: ``rows`` of the left size by ``outputs`` of the right one."""
    UNIT: tl.constexpr = CONFIG.unit
    left_size *= UNIT
    right_size *= UNIT
    ROWS: tl.constexpr = CONFIG.rows
    OUTPUTS: tl.constexpr = CONFIG.outputs
    DEPTH: tl.constexpr = CONFIG.depth
    DOT: tl.constexpr = CONFIG.dot
    across, down = tl.cdiv(right_size, OUTPUTS), tl.cdiv(left_size, ROWS)
    expert = (tl.program_id(0) // (across * down)).to(tl.int64)
    a = tl.program_id(0) // across % down * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(0) % across * OUTPUTS + tl.arange(0, OUTPUTS)
    stop = tl.load(offsets_ptr + expert + 1)
    acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for n0 in range(tl.load(offsets_ptr + expert), stop, DEPTH):
        n = n0 + tl.arange(0, DEPTH).to(tl.int64)
        inside = n < stop
        row, there = n, inside
        if CONFIG.gather_left or CONFIG.gather_right:
            row, there = row_of(source_ptr, n, inside, tokens, choices)
        of_left = row if CONFIG.gather_left else n
        of_right = row if CONFIG.gather_right else n
        left = tl.load(
            left_ptr + of_left[None, :] * left_size + a[:, None], mask=there[None, :] & (a < left_size)[:, None],
            other=0.0,
        ).to(DOT)  # fmt: skip
        right = tl.load(
            right_ptr + of_right[:, None] * right_size + b[None, :], mask=there[:, None] & (b < right_size)[None, :],
            other=0.0,
        ).to(DOT)  # fmt: skip
        acc = tl.dot(left, right, acc, input_precision="ieee")
    at = expert * left_size * right_size + a[:, None].to(tl.int64) * right_size + b[None, :]
    mask = (a < left_size)[:, None] & (b < right_size)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=INTS)
def sums_kernel(out_ptr, x_ptr, weights_ptr, source_ptr, offsets_ptr, tokens, choices, outputs, CONFIG: tl.constexpr):
    """Some columns of one expert: the sum of its rows, each times the weight of its choice."""
    ROWS: tl.constexpr = CONFIG.rows
    OUTPUTS: tl.constexpr = CONFIG.outputs
    blocks = tl.cdiv(outputs, OUTPUTS)
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    stop = tl.load(offsets_ptr + expert + 1)
    acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for n0 in range(tl.load(offsets_ptr + expert), stop, ROWS):
        n = n0 + tl.arange(0, ROWS).to(tl.int64)
        inside = n < stop
        row, there = n, inside
        if source_ptr is not None:
            row, there = row_of(source_ptr, n, inside, tokens, choices)
        mask = there[:, None] & (column < outputs)[None, :]
        x = tl.load(x_ptr + row[:, None] * outputs + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            choice = tl.load(source_ptr + n, mask=there, other=0)
            x *= tl.load(weights_ptr + choice, mask=there, other=0.0)[:, None]
        acc += x
    tl.store(out_ptr + expert * outputs + column, tl.sum(acc, 0), mask=column < outputs)


# --- launches. Tiles are chosen by registers and shared memory, not measured ---


def why_not(args: Any, weights: tuple[Tensor, ...], rows: int) -> str | None:
    """Why these kernels cannot run a call; dtypes are judged by the op. ``torch.compile`` traces through this."""
    reason = why_not_gpu(args[0], _launch.INTERPRETING)
    if reason is not None:
        return reason
    for w in weights:
        if w.shape[0] * -(-w.shape[1] // 16) * -(-w.shape[2] // 16) >= 2**31:
            return f"{tuple(w.shape)} is more than one launch can number"
        if (rows // 16 + w.shape[0] + 1) * -(-max(w.shape[1:]) // 16) >= 2**31:
            return f"{rows} rows beside {tuple(w.shape)} are more than one launch can number"
    return None


def unit_of(*sizes: int) -> int:
    return 16 if all([size % 16 == 0 for size in sizes]) else 1


def config(dtype: torch.dtype, rows: int, outputs: int, depth: int, unit: int, **how: Any) -> tuple[Config, int, int]:
    """A tile, its warps and stages. fp32 is multiplied without tensor cores, from registers: small tiles."""
    most_rows, most_outputs, most_depth = (32, 32, 16) if dtype == torch.float32 else (64, 64, 32)
    tile = Config(
        _launch.power_of_two(rows, 16, most_rows),
        _launch.power_of_two(outputs, 16, most_outputs),
        _launch.power_of_two(depth, 16, most_depth),
        _launch.dot_dtype(dtype),
        unit=unit,
        **how,
    )
    return tile, 4, 3


def average(rows: int, experts: int) -> int:
    """Rows of an expert, by sizes alone."""
    return -(-rows // max(experts, 1))


def product_launch(
    out: Tensor, x: Tensor, weight: Tensor, inner_first: bool, bias: Tensor | None, of: Tiles, source: Source,
    tile: tuple[Config, int, int],
) -> Launch:  # fmt: skip
    experts, a, b = weight.shape
    depth, outputs = (b, a) if inner_first else (a, b)
    programs = of.expert.shape[0] * triton.cdiv(outputs, tile[0].outputs)
    return _launch.launch(
        product_kernel, programs, tile[1], tile[2], out_ptr=out, x_ptr=x, weight_ptr=weight, bias_ptr=bias,
        source_ptr=source.choice, expert_ptr=of.expert, first_ptr=of.first, stop_ptr=of.stop, tokens=source.tokens,
        choices=source.choices, experts=experts, depth=depth // tile[0].unit, outputs=outputs // tile[0].unit,
        CONFIG=tile[0],
    )  # fmt: skip


def product(
    x: Tensor, weight: Tensor, inner_first: bool, bias: Tensor | None, offsets: Tensor, rows: int,
    source: Source = AS_THEY_LIE,
) -> Tensor:  # fmt: skip
    """``(N, outputs)``: rows of x times the weights of their expert, (X, outputs, depth) where ``inner_first`` and
    (X, depth, outputs) otherwise."""
    outputs, depth = weight.shape[1:] if inner_first else reversed(weight.shape[1:])
    out = torch.empty((rows, outputs), dtype=_launch.store_dtype(x.dtype), device=x.device)
    if out.numel() > 0:
        tile = config(
            x.dtype, average(rows, weight.shape[0]), outputs, depth, unit_of(outputs, depth), inner_first=inner_first
        )
        of = tiles(offsets, rows, tile[0].rows)
        product_launch(out, x, weight, inner_first, bias, of, source, tile).run()
    return out.to(x.dtype)


def outer_launch(
    out: Tensor, left: Tensor, right: Tensor, edges: Tensor, source: Source, tile: tuple[Config, int, int]
) -> Launch:
    experts, a, b = out.shape
    return _launch.launch(
        outer_kernel, experts * triton.cdiv(a, tile[0].rows) * triton.cdiv(b, tile[0].outputs), tile[1], tile[2],
        out_ptr=out, left_ptr=left, right_ptr=right, source_ptr=source.choice, offsets_ptr=edges, tokens=source.tokens,
        choices=source.choices, left_size=a // tile[0].unit, right_size=b // tile[0].unit, CONFIG=tile[0],
    )  # fmt: skip


def outer(
    left: Tensor, right: Tensor, offsets: Tensor, rows: int, source: Source = AS_THEY_LIE, *, gather_left: bool = False,
    gather_right: bool = False,
) -> Tensor:  # fmt: skip
    """``(X, A, B)``: the sum of the products of a row of ``left`` and one of ``right`` over each expert's rows."""
    size = (offsets.shape[0] - 1, left.shape[1], right.shape[1])
    out = torch.empty(size, dtype=_launch.store_dtype(left.dtype), device=left.device)
    tile = config(
        left.dtype,
        *size[1:],
        average(rows, size[0]),
        unit_of(*size[1:]),
        gather_left=gather_left,
        gather_right=gather_right,
    )
    if out.numel() > 0:
        outer_launch(out, left, right, bounded(offsets, rows), source, tile).run()
    return out.to(left.dtype)


def sums_launch(out: Tensor, x: Tensor, weights: Tensor | None, edges: Tensor, source: Source) -> Launch:
    experts, outputs = out.shape
    tile = Config(16, _launch.power_of_two(outputs, 16, 64), 1, tl.float32)
    return _launch.launch(
        sums_kernel, experts * triton.cdiv(outputs, tile.outputs), 4, out_ptr=out, x_ptr=x, weights_ptr=weights,
        source_ptr=source.choice, offsets_ptr=edges, tokens=source.tokens, choices=source.choices, outputs=outputs,
        CONFIG=tile,
    )  # fmt: skip


def sums(x: Tensor, offsets: Tensor, rows: int, weights: Tensor | None = None, source: Source = AS_THEY_LIE) -> Tensor:
    """``(X, O)`` fp32: the sum of each expert's rows, times the weights of their choices."""
    out = torch.empty((offsets.shape[0] - 1, x.shape[1]), dtype=torch.float32, device=x.device)
    if out.numel() > 0:
        sums_launch(out, x, weights, bounded(offsets, rows), source).run()
    return out
