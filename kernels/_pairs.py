"""How a call that weighs pairs of queries and keys becomes kernel arguments: its tensors, strides and numbers, a tile.

``args`` are those of any such op: q, k, v and the fields of ``accel.ops.pairs.Pairs``, with scale, seed and dropout_p.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from accel.kernels import _launch
from accel.kernels._launch import Launch

_OF_KEYS = ("k", "v", "grad_k", "grad_v")
_ADDRESSED = ("q", *_OF_KEYS, "gate", "out", "grad", "grad_q")

LAUNCH_INTS = [
    *[f"{name}_{axis}" for name in _ADDRESSED for axis in ("b", "h", "s" if name in _OF_KEYS else "t")],
    *[f"{name}_{axis}" for name in ("bias", "mask") for axis in "bhts"],
    *["rows_b", "spans_b", "batches", "heads", "group", "together", "queries", "keys"],
    *["line_length", "table_rows", "bins", "blocks"],
    *["grid_h", "grid_w", "extra", "threshold", "per_part", "total"],
    *["owners_b", "owners_h", "owners_t", "owners_s"],
]
"""Integers on whose values no kernel of these ops is specialised."""


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


def shared(args: Any, buffers: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments that the kernels of a call have in common, with strides of ``buffers`` too.

    Strides of ``(B, H, tokens, ·)`` are counted in units, so that the compiler knows rows to be aligned.
    """
    found = {name: strides(x) for name, x in {"q": args.q, "k": args.k, "v": args.v, **buffers}.items()}
    unit = 8 if all(n % 8 == 0 for steps in found.values() for n in steps[:3]) else 1
    given: dict[str, Any] = {}
    for name, steps in found.items():
        for axis, step in zip(("b", "h", "s" if name in _OF_KEYS else "t"), steps, strict=False):
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


def weight_of_a_logit(args: Any, others: bool = False) -> int:
    """What a logit takes beside its product: 0 nothing, 1 the registers of one more tile, 2 also those of an index or
    of places on a grid, 3 several of these or random bits. ``others``: whether an op has one thing more."""
    more = sum([x is not None for x in (args.bias, args.line, args.table, args.mask)]) + others
    if args.dropout_p > 0.0 or more > 1:
        return 3
    return 2 if args.table is not None else more


def why_not_addressed(args: Any) -> str | None:
    """Why 32 bits do not number the tiles of a call or the elements of its table, mask and bias.

    ``torch.compile`` traces through this, which bars generator expressions and Triton's helpers.
    """
    q, k = args.q, args.k
    tiles = -(-max(q.shape[2], k.shape[2]) // 16)
    if q.shape[0] * q.shape[1] * tiles >= 2**31:
        return f"{tuple(q.shape)} queries with {k.shape[2]} keys are more tiles than one launch can number"
    if args.table is not None and args.table.numel() >= 2**31:
        return f"a bias table of {tuple(args.table.shape)} is more than 32 bits can address"
    for name, x in (("bias", args.bias), ("mask", args.mask), ("bias_index", args.bias_index)):
        if x is not None and max([0 if x.shape[n] == 1 else x.stride(n) for n in (-2, -1)]) >= 2**23:
            return f"it takes a {name} whose rows are less than 2**23 elements apart, not strides of {x.stride()}"
    return None


def launch(kernel: Any, programs: int, tile: Tile, **arguments: Any) -> Launch:
    """A launch over this tile."""
    return _launch.launch(kernel, programs, tile.warps, tile.stages, None, tile.spill, **arguments)
