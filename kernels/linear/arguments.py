"""How a call of linear attention becomes kernel arguments: what is compiled in, tensors, integers, the tile.

The output and the gradients of q, k and v are one sum, by different tensors:

    o_i = Σ_j D_ij f (x_i · y_j + c) u_j,    D_ij the decay between both tokens

========  =====  =====  =====  =====================================================================
mode      x      y      u      c
========  =====  =====  =====  =====================================================================
out       φ(q)   φ(k)   v      none, but the sum without u, the denominator, is made too
grad_q    g      v      φ(k)   that of row i: −(output · upstream gradient)
grad_k    v      g      φ(q)   that of column j, the same
grad_v    φ(k)   φ(q)   g      none
========  =====  =====  =====  =====================================================================

g is the upstream gradient, and f the scale over the denominator of the query. Where the order is causal, the columns of
the first two are before the row, those of the others after it: these visit the tokens backwards. A **state** is what
the columns so far sum up to, Σ yᵀ u beside one vector (Σ y for the denominator, Σ f c u or Σ u for gradients), flat in
memory as ``R·V + Z`` numbers: R the size of x and y, V of u, Z of the vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from accel.kernels import _launch
from accel.kernels._launch import power_of_two

FAR = 2**31 - 1
"""The place of the first token that is not finite, where there is none."""

LAUNCH_INTS = [
    *[f"{name}_{axis}" for name in ("x", "y", "u", "raw", "v") for axis in ("b", "h", "t", "group")],
    *["o_b", "o_h", "o_t"],
    *["heads", "state_group", "decay_group", "init_parts", "states_parts", "rows", "columns", "parts", "tiles"],
    *["blocks", "size", "batches", "flags", "group", "grad_b", "grad_h", "grad_t", "out_b", "out_h", "out_t"],
]
"""Integers on whose values no kernel of this op is specialised."""


class Pointers(NamedTuple):
    """The tensors of a launch, None for what it lacks."""

    x: Tensor | None
    y: Tensor | None
    u: Tensor | None
    raw: Tensor | None  # q or k itself, whose gradient is made
    o: Tensor | None
    den: Tensor | None  # (B, H, T)
    dots: Tensor | None  # (tiles, B, H, T): of a row of φ(q) or φ(k) and its gradient, in parts
    mask: Tensor | None  # (B, S) of bytes
    cu_rows: Tensor | None  # (N + 1,)
    cu_columns: Tensor | None
    decay: Tensor | None  # (Hs,), or (2, B, Hs, T) where it is one for each token: see decay_kernel
    factor: Tensor | None  # (B, H, T): f of a query
    constant: Tensor | None  # (B, H, T): c of a query
    own: Tensor | None  # (B, H, T): f (x · y + c) of a query with its own key, where dots are asked for
    init: Tensor | None  # states to start from
    states: Tensor | None  # states at the end
    totals: Tensor | None  # the logarithm of what they decay a former state by
    first: Tensor | None  # int32: the first token of a sequence that is not finite
    flags: Tensor | None  # int32: the same for what one program saw


class Numbers(NamedTuple):
    """The numbers of a call."""

    scale: float
    eps: float


@dataclass(frozen=True)
class Config:
    """What a kernel is compiled for; all of it is known at compile time."""

    mode: str
    rows: bool  # whether rows are computed from states
    columns: bool  # whether columns are added to them; with both the order is causal
    features: str
    normalize: bool
    decay: str  # "", "head" or "token"
    r: int
    v: int
    block_r: int
    block_v: int
    chunk: int
    unit: int  # strides are counted in so many elements
    dot: tl.dtype
    drop: int  # trailing bits of fp32 that operands of a product are rounded to be without
    precision: str
    fine: bool  # see sweep.py

    @property
    def reverse(self) -> bool:
        return self.mode in ("grad_k", "grad_v")

    @property
    def z(self) -> int:
        """The length of a state's vector."""
        if not self.normalize or self.mode == "grad_v":
            return 0
        return self.r if self.mode == "out" else self.v


@dataclass(frozen=True)
class Tile:
    """Tokens of a chunk, channels of u of a program, and its warps."""

    chunk: int
    values: int
    warps: int


# Predicted, not measured: tiles that the compile gate finds to have registers enough. By the size of x and y, each for
# what is not fine and for what is. In fp16 products are made in TF32. Before Hopper, warps with less than 16 tokens of
# a chunk each repeat one another's work.
_TILES: dict[torch.dtype, dict[int, tuple[Tile, Tile]]] = {
    torch.bfloat16: {
        64: (Tile(64, 32, 4), Tile(32, 32, 4)),
        128: (Tile(32, 32, 4), Tile(32, 16, 4)),
        256: (Tile(16, 16, 4), Tile(16, 16, 8)),
    },
    torch.float16: {
        64: (Tile(32, 16, 4), Tile(16, 16, 4)),
        128: (Tile(16, 16, 4), Tile(16, 16, 4)),
        256: (Tile(16, 16, 4), Tile(16, 16, 8)),
    },
    torch.float32: {
        64: (Tile(16, 16, 8), Tile(16, 16, 8)),
        128: (Tile(16, 16, 8), Tile(16, 16, 8)),
    },
}
LARGEST: dict[torch.dtype, int] = {dtype: max(tiles) for dtype, tiles in _TILES.items()}
"""What D and E may be: in fp32 the products of more do not fit the registers."""
_ON_HOPPER: dict[torch.dtype, dict[int, tuple[Tile, Tile]]] = {
    torch.bfloat16: {
        64: (Tile(64, 64, 8), Tile(32, 64, 8)),
        128: (Tile(64, 32, 8), Tile(32, 32, 8)),
    },
}

PROGRAMS = 264
"""Two for each processor of an H100; fixed, so that sums do not depend on the device."""
SEGMENT = 512
"""Tokens of a part at least, where a sequence is cut into parts to make so many programs."""


def tile_of(r: int, v: int, dtype: torch.dtype, fine: bool, tokens: int, capability: tuple[int, int]) -> Tile:
    """The tile for x and y of r channels and u of v, of no more tokens than there are."""
    size = max(64, block_of(r))
    found = _ON_HOPPER.get(dtype, {}).get(size) if capability[0] == 9 else None
    tile = (found or _TILES[dtype][size])[fine]
    return Tile(power_of_two(tokens, 16, tile.chunk), power_of_two(v, 16, tile.values), tile.warps)


def block_of(size: int) -> int:
    return power_of_two(size, 16, 256)


def parts_of(programs: int, tokens: int) -> int:
    """Into how many parts a sequence is cut, of which one in each needs ``programs``."""
    return 1 if programs >= PROGRAMS else max(1, min(-(-PROGRAMS // programs), -(-tokens // SEGMENT)))


def products_of(dtype: torch.dtype) -> dict[str, Any]:
    """How products are made. Features, states and gradients over small denominators leave the range of fp16, and so do
    weights of 1/T²: TF32 has its precision and the range of fp32. The interpreter rounds as a GPU does."""
    if dtype == torch.float16:
        return {"dot": _launch.dot_dtype(torch.float32), "drop": 13, "precision": "tf32"}
    drop = 16 if dtype == torch.bfloat16 and _launch.INTERPRETING else 0
    return {"dot": _launch.dot_dtype(dtype), "drop": drop, "precision": "ieee"}


STEEP = frozenset({"identity", "relu", "squared_relu"})
"""Features whose slope does not shrink as they do: divided by the denominator of a row of next to no weight, the
gradient of the query is large."""

ANCHORED = 256
"""Tokens of a part at most, where the gradient of decay is asked for: a running difference starts anew in each."""


def anchored_parts(parts: int, tokens: int, sequences: int) -> int:
    """``parts``, or so many that none is longer; of packed sequences that differ, some are."""
    return max(parts, -(-tokens // (ANCHORED * sequences)))
