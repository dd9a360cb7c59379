"""How a call of gated attention becomes kernel arguments: what is compiled in, and what earlier kernels found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from accel.kernels import _launch
from accel.kernels._pairs import Tile, head_block
from accel.kernels.linear.arguments import products_of
from accel.ops.linear.gau_attention import Args
from accel.ops.linear.gau_strips import BY_ROW
from accel.ops.pairs import adds


class Upstream(NamedTuple):
    """What kernels before this one found; None for what it does not read."""

    grad: Tensor | None = None
    """``(B, Hq, T, E)``, the upstream gradients of the sums of values, as operands of a product."""
    rest: Tensor | None = None
    """What rounding left of them, where gradients are made of few pairs."""
    bad_q: Tensor | None = None
    """``(B, Hq, T)``, NaN for a row that holds what is not finite, else 0; like it ``bad_k`` and ``bad_v``
    ``(B, Hkv, S)``, and ``bad_grad``."""
    bad_k: Tensor | None = None
    bad_v: Tensor | None = None
    bad_grad: Tensor | None = None
    factor: Tensor | None = None
    """``(B, Hq, T)`` of activations by row, like the following: what a row's logits are multiplied by."""
    top: Tensor | None = None
    """The largest of them then."""
    inverse: Tensor | None = None
    """1 over the sum of the weights relative to that, 0 where there are none."""
    delta: Tensor | None = None
    """The sum of weight · gradient."""


class Factors(NamedTuple):
    """The numbers of a call."""

    keep_scale: float
    scale: float


@dataclass(frozen=True)
class Operands:
    """How fp32 becomes an operand: what ``products_of`` says."""

    dot: tl.dtype
    drop: int
    precision: str


@dataclass(frozen=True)
class Config:
    """What a kernel is compiled for; all of it is known at compile time."""

    activation: str
    by_row: bool  # weights depend on all logits of their row
    rule: str
    grid: bool  # a bias table is that of a grid, else it has an index
    adds: bool  # a bias, a line or a table to the logits
    unit: int  # strides of rows are counted in so many elements
    d: int
    e: int
    block_d: int
    block_e: int  # channels of values at a time
    block_m: int  # queries of a tile
    block_n: int  # keys
    given: tl.dtype  # operands of the products of q and k
    dot: tl.dtype  # of all other products; these three are made by ``products_of``
    drop: int
    precision: str
    split: bool  # gradients of logits are multiplied as two operands
    softcap: bool = False
    binary: bool = False


def config(args: Args, tile: Tile, block_e: int, unit: int) -> Config:
    return Config(
        activation=args.activation,
        by_row=args.activation in BY_ROW,
        rule=args.rule,
        grid=bool(args.grid),
        adds=adds(args),
        unit=unit,
        d=args.q.shape[3],
        e=args.v.shape[3],
        block_d=head_block(args.q.shape[3]),
        block_e=block_e,
        block_m=tile.queries,
        block_n=tile.keys,
        given=_launch.dot_dtype(args.q.dtype),
        split=args.q.dtype == torch.bfloat16,
        **products_of(args.q.dtype),
    )


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a buffer that holds operands."""
    return torch.float32 if dtype == torch.float16 else _launch.store_dtype(dtype)
