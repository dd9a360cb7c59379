"""What the kernels of deformable convolution share: what is compiled in, where a tap stands, its shift and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

INTS = [
    *["height", "width", "out_height", "out_width", "stride_y", "stride_x", "padding_y", "padding_x"],
    *["dilation_y", "dilation_x", "unit0", "samples", "tiles", "tiles_per_part"],
]
"""Integers on whose values no kernel is specialised; channels and taps are compile-time constants."""


class Inputs(NamedTuple):
    """The tensors of a call but for its bias: the input channels-last, the weight packed as ``(K, C/g, O)``."""

    input: Tensor
    offset: Tensor
    mask: Tensor | None
    weight: Tensor


class Step(NamedTuple):
    """The way from output to output and from tap to tap."""

    stride_y: Any
    stride_x: Any
    padding_y: Any
    padding_x: Any
    dilation_y: Any
    dilation_x: Any


@dataclass(frozen=True)
class Config:
    """What a kernel is compiled for; all of it is known at compile time."""

    channels: int
    out_channels: int
    groups: int
    offset_groups: int
    segment: int  # the largest run of channels that lie in one offset group and in one weight group
    kh: int
    kw: int
    tile_h: int
    tile_w: int
    block_c: int
    block_o: int
    dot: tl.dtype

    @property
    def taps(self) -> int:
        return self.kh * self.kw

    @property
    def c_per_group(self) -> int:
        return self.channels // self.groups

    @property
    def o_per_group(self) -> int:
        return self.out_channels // self.groups

    @property
    def c_shared(self) -> int:
        """Channels that share an offset group."""
        return self.channels // self.offset_groups

    @property
    def c_blocks(self) -> int:
        """Of a segment."""
        return triton.cdiv(self.segment, self.block_c)

    @property
    def o_blocks(self) -> int:
        """Of a weight group."""
        return triton.cdiv(self.o_per_group, self.block_o)

    @property
    def edge_c(self) -> bool:
        """The last block of channels has fewer."""
        return self.segment % self.block_c != 0

    @property
    def edge_o(self) -> bool:
        return self.o_per_group % self.block_o != 0


@triton.jit
def tap_at(tap, i, j, step, KW: tl.constexpr):
    """Where a tap of outputs (i, j) stands before it is shifted, fp32."""
    y = i * step.stride_y - step.padding_y + tap // KW * step.dilation_y
    x = j * step.stride_x - step.padding_x + tap % KW * step.dilation_x
    return y.to(tl.float32), x.to(tl.float32)


@triton.jit
def load_shift(offset_ptr, mask_ptr, index, outputs, p, real):
    """Shift in y, in x, and mask (1 if there is none) at outputs ``p`` of tap ``index`` of ``(N, G, K)``."""
    at = index.to(tl.int64) * outputs
    y = tl.load(offset_ptr + 2 * at + p, mask=real, other=0.0)
    x = tl.load(offset_ptr + 2 * at + outputs + p, mask=real, other=0.0)
    factor = tl.where(real, 1.0, 1.0)
    if mask_ptr is not None:
        factor = tl.load(mask_ptr + at + p, mask=real, other=0.0)
    return y, x, factor


@triton.jit
def load_weight(weight_ptr, tap, row, column, C_PER_GROUP: tl.constexpr, OUT: tl.constexpr, some):
    """A tile of the packed weight: ``row`` and ``column`` are 2-D, one of them channels, in this order."""
    at = weight_ptr + ((tap * C_PER_GROUP + row).to(tl.int64) * OUT + column)
    return tl.load(at, mask=some, other=None if some is None else 0.0).to(tl.float32)
