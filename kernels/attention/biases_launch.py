"""How the gradients of the biases of softmax attention become launches of the kernels in ``biases.py``."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from accel.kernels._launch import Launch, dot_dtype
from accel.kernels.attention import biases
from accel.kernels.attention.arguments import Tile, launch_call
from accel.ops.attention.softmax_attention import Args

# Enough programs to fill any present GPU several times over; fixed, so that sums do not depend on the device.
PROGRAMS = 1024
PARTS_BYTES = 64 << 20


def bias_tile(args: Args, capability: tuple[int, int]) -> Tile:
    """For kernels that hold the gradient of a tile and what it comes from."""
    queries, keys = args.q.shape[2], args.k.shape[2]
    widest = max(args.q.shape[3], args.v.shape[3])
    if args.q.element_size() == 4:  # products without tensor cores: many warps, or their operands fill the registers
        return Tile(16, 16, 8 if widest <= 64 else 16, 1).within(queries, keys)
    if widest > 128:
        return Tile(16, 32, 8, 1).within(queries, keys)
    if widest > 64 or args.dropout_p > 0.0:
        return Tile(32, 32, 8, 1).within(queries, keys)
    return Tile(64, 64, 4 if capability[0] == 9 else 8, 1).within(queries, keys)


def _parts(total: int, owners: int, owned: int) -> tuple[int, int]:
    """Parts, and tiles of each: enough programs, and not more than PARTS_BYTES unless one part has that already."""
    wanted = min(triton.cdiv(PROGRAMS, owners), PARTS_BYTES // (4 * owned))
    per_part = triton.cdiv(total, max(1, min(wanted, total)))
    return triton.cdiv(total, per_part), per_part


def plan_bias(args: Args, given: dict[str, Any], capability: tuple[int, int]) -> tuple[Launch, Tensor]:
    """The launch for the gradient of a dense bias, and its parts ``(parts, *bias.shape)``."""
    assert args.bias is not None
    tile = bias_tile(args, capability)
    batches, heads, queries, keys = *args.q.shape[:3], args.k.shape[2]
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
    return launch_call(biases.bias_kernel, parts * count, tile, args, given, **more), out


def _by_queries(args: Args, tile: Tile, owners: int, owned: int) -> tuple[int, dict[str, int]]:
    """Parts of what is added up over the tiles of queries of all the batch."""
    total = args.q.shape[0] * triton.cdiv(args.q.shape[2], tile.queries)
    parts, per_part = _parts(total, owners, owned)
    return parts, {"per_part": per_part, "total": total}


def _plan_diagonals(
    args: Args, given: dict[str, Any], capability: tuple[int, int], bins: int, on_grid: bool
) -> tuple[Launch, Tensor]:
    behind = 3 if on_grid else 0  # the bins of extra tokens
    tile, heads = bias_tile(args, capability), args.q.shape[1]
    parts, counts = _by_queries(args, tile, heads, heads * (bins + behind))
    out = args.q.new_zeros((parts, heads, bins + behind), dtype=torch.float32)
    more = {"part_ptr": out, "bins": bins, "ON_GRID": on_grid, **counts}
    return launch_call(biases.diagonals_kernel, parts * heads, tile, args, given, **more), out


def plan_line(args: Args, given: dict[str, Any], capability: tuple[int, int]) -> tuple[Launch, Tensor]:
    """The launch for the gradient of a line, and its parts ``(parts, Hq, L)``."""
    assert args.line is not None
    return _plan_diagonals(args, given, capability, args.line.shape[1], on_grid=False)


def plan_table(args: Args, given: dict[str, Any], capability: tuple[int, int]) -> tuple[Launch, Tensor]:
    """The launch for the gradient of a table, and its parts ``(parts, R, Hq)``."""
    assert args.table is not None
    rows, heads = args.table.shape
    if args.grid:
        h, w, _extra = args.grid
        bins = (2 * h - 1) * (2 * w - 1)
        step, out = _plan_diagonals(args, given, capability, bins, on_grid=True)
        return step, out[..., :rows].transpose(1, 2)
    tile = Tile(16, 16, 16 if args.q.element_size() == 4 else 8, 1)
    blocks = triton.cdiv(rows, biases.CODE.value**2)
    total = triton.cdiv(args.q.shape[2], tile.queries)
    parts, per_part = _parts(total, heads * blocks, heads * rows)
    out = args.q.new_empty((parts, heads, rows), dtype=torch.float32)
    more = {"part_ptr": out, "CODES": dot_dtype(torch.bfloat16), "per_part": per_part, "total": total}
    step = launch_call(biases.index_kernel, parts * heads * blocks, tile, args, given, **more)
    return step, out.transpose(1, 2)
