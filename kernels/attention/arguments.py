"""How a call of softmax attention becomes kernel arguments: tensors, strides, what is compiled in, the tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.kernels import _launch
from accel.kernels._launch import Launch
from accel.ops.attention.softmax_attention import Args, adds

_AXES = {"q": "t", "k": "s", "v": "s", "out": "t", "grad": "t", "grad_q": "t", "grad_k": "s", "grad_v": "s"}

LAUNCH_INTS = [
    *[f"{name}_{axis}" for name, tokens in _AXES.items() for axis in ("b", "h", tokens)],
    *[f"{name}_{axis}" for name in ("bias", "mask") for axis in "bhts"],
    *["rows_b", "spans_b", "batches", "heads", "group", "together", "queries", "keys"],
    *["line_length", "table_rows", "bins"],
    *["grid_h", "grid_w", "extra", "threshold", "per_part", "total"],
    *["owners_b", "owners_h", "owners_t", "owners_s"],
]
"""Integers on whose values no kernel of this op is specialised."""


class Inputs(NamedTuple):
    """The tensors of a call, None for what it lacks."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    line: Tensor | None
    table: Tensor | None
    mask: Tensor | None
    bias_index: Tensor | None
    rows: Tensor | None
    seed: Tensor | None


class Upstream(NamedTuple):
    """The tensors that a backward pass starts from. ``lse`` is what a row's weights are relative to. Where something is
    added to the logits, it is in their units and may be the largest of them; gradient and delta are divided then."""

    grad: Tensor
    lse: Tensor
    delta: Tensor


class Factors(NamedTuple):
    """The numbers of a call."""

    keep_scale: float
    scale: float
    softcap: float


@dataclass(frozen=True)
class Config:
    """What a kernel is compiled for; all of it is known at compile time."""

    rule: str
    grid: bool  # a bias table is that of a grid, else it has an index
    softcap: bool
    adds: bool  # a bias, a line or a table to the logits
    binary: bool  # logits are in units of ln 2
    unit: int  # strides of rows are counted in so many elements
    d: int
    e: int
    block_d: int
    block_e: int
    block_m: int  # queries of a tile
    block_n: int  # keys
    dot: tl.dtype


CACHE_BYTES = 32 << 20
"""What keys and values of the heads that are worked on together may take: the half of an H100's second-level cache."""


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, the warps of a program, how many tiles ahead it loads, and up to how many bytes a
    thread may spill: 0, but for tiles that were measured to be the fastest all the same."""

    queries: int
    keys: int
    warps: int
    stages: int
    spill: int = 0

    def within(self, queries: int, keys: int) -> Tile:
        """No larger than a call with so few tokens needs."""
        return Tile(
            min(self.queries, max(16, triton.next_power_of_2(queries))),
            min(self.keys, max(16, triton.next_power_of_2(keys))),
            self.warps,
            self.stages,
            self.spill,
        )


def strides(x: Tensor | None) -> list[int]:
    """Strides with 0 for an axis of one element, which is read at the same place whatever the index."""
    if x is None:
        return [0, 0, 0, 0]
    return [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]


def head_block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def plain(args: Args) -> bool:
    """Whether logits are products times a positive number: their order is that of the products then."""
    return args.q.dtype != torch.float32 and args.scale > 0.0 and args.softcap == 0.0 and not adds(args)


def shared(args: Args, buffers: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments that the kernels of a call have in common, with strides of ``buffers`` too.

    Strides of ``(B, H, tokens, ·)`` are counted in units, so that the compiler knows rows to be aligned.
    """
    found = {name: strides(x) for name, x in {"q": args.q, "k": args.k, "v": args.v, **buffers}.items()}
    unit = 8 if all(n % 8 == 0 for steps in found.values() for n in steps[:3]) else 1
    given: dict[str, Any] = {}
    for name, steps in found.items():
        for axis, step in zip(("b", "h", _AXES[name]), steps, strict=False):
            given[f"{name}_{axis}"] = step // unit
    for name, x in (("bias", args.bias), ("mask", args.mask)):
        given.update({f"{name}_{axis}": step for axis, step in zip("bhts", strides(x), strict=True)})
    rows = args.rows if args.rule == "other" else None
    batches, heads, queries, head_size = args.q.shape
    keys_bytes = args.k.shape[2] * (head_size + args.v.shape[3]) * args.q.element_size() * args.k.shape[1] // heads
    grid_h, grid_w, extra = args.grid or (1, 1, 0)
    return {
        **given,
        "inputs": Inputs(
            q=args.q,
            k=args.k,
            v=args.v,
            bias=args.bias,
            line=None if args.line is None else args.line.contiguous(),
            table=args.table,
            mask=None if args.mask is None else args.mask.view(torch.uint8),
            bias_index=args.bias_index,
            rows=rows,
            seed=args.seed if args.dropout_p > 0.0 else None,
        ),
        "factors": Factors(1.0 / (1.0 - args.dropout_p), args.scale, args.softcap),
        "rows_b": 0 if rows is None or rows.shape[0] == 1 else rows.stride(0),
        "batches": batches,
        "heads": heads,
        "group": heads // args.k.shape[1],
        "together": max(1, min(batches * heads, CACHE_BYTES // max(1, keys_bytes))),
        "queries": queries,
        "keys": args.k.shape[2],
        "line_length": 0 if args.line is None else args.line.shape[1],
        "table_rows": 0 if args.table is None else args.table.shape[0],
        "grid_h": grid_h,
        "grid_w": grid_w,
        "extra": extra,
        "threshold": int(args.dropout_p * 2.0**32),
        "unit": unit,
    }


def config(args: Args, tile: Tile, unit: int) -> Config:
    head_size, value_size = args.q.shape[3], args.v.shape[3]
    return Config(
        rule=args.rule,
        grid=bool(args.grid),
        softcap=args.softcap > 0.0,
        adds=adds(args),
        binary=args.q.dtype != torch.float32,
        unit=unit,
        d=head_size,
        e=value_size,
        block_d=head_block(head_size),
        block_e=head_block(value_size),
        block_m=tile.queries,
        block_n=tile.keys,
        dot=_launch.dot_dtype(args.q.dtype),
    )


def launch(kernel: Any, programs: int, tile: Tile, **arguments: Any) -> Launch:
    """A launch over this tile."""
    return _launch.launch(kernel, programs, tile.warps, tile.stages, None, tile.spill, **arguments)


def launch_call(kernel: Any, programs: int, tile: Tile, args: Args, given: Mapping[str, Any], **more: Any) -> Launch:
    """A launch over this tile of a kernel that takes what the kernels of a call have in common."""
    return launch(kernel, programs, tile, **given, **more, CONFIG=config(args, tile, given["unit"]))
