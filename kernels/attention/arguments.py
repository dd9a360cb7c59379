"""What the kernels of softmax attention take besides the arguments of any call that weighs pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from accel.kernels import _launch, _pairs
from accel.kernels._launch import Launch
from accel.kernels._pairs import Tile, head_block, launch
from accel.ops.attention.softmax_attention import Args
from accel.ops.pairs import adds


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


def plain(args: Args) -> bool:
    """Whether logits are products times a positive number: their order is that of the products then."""
    return args.q.dtype != torch.float32 and args.scale > 0.0 and args.softcap == 0.0 and not adds(args)


def shared(args: Args, buffers: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments that the kernels of a call have in common, with strides of ``buffers`` too."""
    factors = Factors(1.0 / (1.0 - args.dropout_p), args.scale, args.softcap)
    return {**_pairs.shared(args, buffers), "factors": factors}


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


def launch_call(kernel: Any, programs: int, tile: Tile, args: Args, given: Mapping[str, Any], **more: Any) -> Launch:
    """A launch over this tile of a kernel that takes what the kernels of a call have in common."""
    return launch(kernel, programs, tile, **given, **more, CONFIG=config(args, tile, given["unit"]))
