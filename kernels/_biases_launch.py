"""How the gradients of biases become launches of the kernels in ``_biases.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from accel.kernels import _biases
from accel.kernels._launch import Launch, dot_dtype
from accel.kernels._pairs import Tile, launch

# Enough programs to fill any present GPU several times over; fixed, so that sums do not depend on the device.
PROGRAMS = 1024
PARTS_BYTES = 64 << 20


@dataclass(frozen=True)
class Gradient:
    """How an op computes the gradient of the logits of a tile again."""

    function: Any
    """A jit function, a kernel's ``TILE_GRADIENT``."""
    given: Mapping[str, Any]
    """What it and the kernels take."""
    config: Callable[[Tile], Any]
    tile: Tile
    index_tile: Tile
    """That of a table with an index, whose one-hot codes take most registers."""

    def launch(self, kernel: Any, programs: int, tile: Tile, **more: Any) -> Launch:
        more.update(TILE_GRADIENT=self.function, CONFIG=self.config(tile))
        return launch(kernel, programs, tile, **self.given, **more)


Plan = tuple[Launch, Tensor]
"""A launch and the parts that it fills, to be summed over the first axis."""


def _parts(total: int, owners: int, owned: int) -> tuple[int, int]:
    """Parts, and tiles of each: enough programs, and not more than PARTS_BYTES unless one part has that already."""
    wanted = min(triton.cdiv(PROGRAMS, owners), PARTS_BYTES // (4 * owned))
    per_part = triton.cdiv(total, max(1, min(wanted, total)))
    return triton.cdiv(total, per_part), per_part


def _plan_bias(args: Any, how: Gradient) -> Plan:
    """For a dense bias: ``(parts, *bias.shape)``."""
    tile = how.tile
    (batches, heads, queries), keys = args.q.shape[:3], args.k.shape[2]
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
    return how.launch(_biases.bias_kernel, parts * count, tile, **more), out


def _by_queries(args: Any, tile: Tile, owners: int, owned: int) -> tuple[int, dict[str, int]]:
    """Parts of what is added up over the tiles of queries of all the batch."""
    total = args.q.shape[0] * triton.cdiv(args.q.shape[2], tile.queries)
    parts, per_part = _parts(total, owners, owned)
    return parts, {"per_part": per_part, "total": total}


def _plan_diagonals(args: Any, how: Gradient, bins: int, on_grid: bool) -> Plan:
    behind = 3 if on_grid else 0  # the bins of extra tokens
    tile, heads = how.tile, args.q.shape[1]
    parts, counts = _by_queries(args, tile, heads, heads * (bins + behind))
    out = args.q.new_zeros((parts, heads, bins + behind), dtype=torch.float32)
    more = {"part_ptr": out, "bins": bins, "ON_GRID": on_grid, **counts}
    return how.launch(_biases.diagonals_kernel, parts * heads, tile, **more), out


def _plan_line(args: Any, how: Gradient) -> Plan:
    """``(parts, Hq, L)``."""
    return _plan_diagonals(args, how, args.line.shape[1], on_grid=False)


def _plan_table(args: Any, how: Gradient) -> Plan:
    """``(parts, R, Hq)``."""
    rows, heads = args.table.shape
    if args.grid:
        h, w, _extra = args.grid
        bins = (2 * h - 1) * (2 * w - 1)
        step, out = _plan_diagonals(args, how, bins, on_grid=True)
        return step, out[..., :rows].transpose(1, 2)
    tile = how.index_tile
    blocks = triton.cdiv(rows, _biases.CODE.value**2)
    total = triton.cdiv(args.q.shape[2], tile.queries)
    parts, per_part = _parts(total, heads * blocks, heads * rows)
    out = args.q.new_empty((parts, heads, rows), dtype=torch.float32)
    more = {"part_ptr": out, "CODES": dot_dtype(torch.bfloat16), "HALF": args.q.dtype != torch.float32}
    more.update(per_part=per_part, total=total)
    return how.launch(_biases.index_kernel, parts * heads * blocks, tile, **more), out.transpose(1, 2)


def plan_biases(args: Any, needs: Sequence[bool], how: Gradient) -> list[Plan | None]:
    """For bias, line and table; None for what is not there or not needed."""
    plans = ((args.bias, _plan_bias), (args.line, _plan_line), (args.table, _plan_table))
    return [
        plan(args, how) if wanted and x is not None else None for wanted, (x, plan) in zip(needs, plans, strict=True)
    ]
