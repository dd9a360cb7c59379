"""What the window attention kernels share: where the tokens of a window lie, the logits of a tile, its gradients.

A token of a window has a rolled coordinate, from that a source coordinate, and from that a memory row, or it is a
padded token, which holds ``qkv_bias`` and takes part like any other. A tile has queries on one axis and keys on the
other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from accel.kernels._launch import keep_bits

NORM_EPS: tl.constexpr = tl.constexpr(1e-12)
INTS = ["size_z", "size_y", "size_x", "num_heads", "windows", "per_program", "threshold"]
"""Integers on whose values no kernel is specialised."""

# --- a call ---


class Inputs(NamedTuple):
    """The small tensors of a call but for its bias, None for what it lacks. ``fill`` is what padded tokens hold."""

    head_scale: Tensor | None
    fill: Tensor | None
    seed: Tensor | None


class Bias(NamedTuple):
    """Where the bias comes from: a table, a dense tensor, or nothing."""

    table: Tensor | None
    dense: Tensor | None


class Upstream(NamedTuple):
    """What a backward pass starts from; delta and inverse_total are written by its first kernel, in blocks only."""

    grad_out: Tensor
    delta: Tensor | None
    inverse_total: Tensor | None
    lse: Tensor


class Factors(NamedTuple):
    """The numbers of a call."""

    keep_scale: float
    scale: float
    mask_value: float


@dataclass(frozen=True)
class Window:
    """The tokens of a window along each axis."""

    z: int
    y: int
    x: int

    @property
    def tokens(self) -> int:
        return self.z * self.y * self.x


@dataclass(frozen=True)
class Config:
    """What a kernel is compiled for; all of it is known at compile time."""

    window: Window
    shift_z: int
    shift_y: int
    shift_x: int
    roll_first: bool
    d: int
    block_d: int
    block: int  # tokens of a tile
    dot: tl.dtype

    @property
    def tokens(self) -> int:
        return self.window.tokens

    @property
    def shifted(self) -> bool:
        return self.shift_z + self.shift_y + self.shift_x > 0


class Sizes(NamedTuple):
    """Of the map of tokens."""

    z: Any
    y: Any
    x: Any


class Dropout(NamedTuple):
    seed: Any
    threshold: Any
    keep_scale: Any


# --- addressing ---


@triton.jit
def _source(at, size, WINDOW: tl.constexpr, SHIFT: tl.constexpr, ROLL_FIRST: tl.constexpr):
    """Source coordinate on one axis of rolled coordinate ``at``, and whether it lies in the map."""
    if ROLL_FIRST:  # only the map turns, and what lies past it is padding
        turned = at + SHIFT % size
        coordinate = tl.where(turned >= size, turned - size, turned)
        real = at < size
    else:
        padded = tl.cdiv(size, WINDOW) * WINDOW
        turned = at + SHIFT
        coordinate = tl.where(turned >= padded, turned - padded, turned)
        real = coordinate < size
    return coordinate, real


@triton.jit
def locate(window, token, sizes, CONFIG: tl.constexpr):
    """Memory row (int64) of each token of a window of the batch, and whether the token is in the map."""
    WZ: tl.constexpr = CONFIG.window.z
    WY: tl.constexpr = CONFIG.window.y
    WX: tl.constexpr = CONFIG.window.x
    FIRST: tl.constexpr = CONFIG.roll_first
    count_x = tl.cdiv(sizes.x, WX)
    count_y = tl.cdiv(sizes.y, WY)
    count_z = tl.cdiv(sizes.z, WZ)
    rest = window // count_x
    x, real_x = _source(window % count_x * WX + token % WX, sizes.x, WX, CONFIG.shift_x, FIRST)
    y, real_y = _source(rest % count_y * WY + token // WX % WY, sizes.y, WY, CONFIG.shift_y, FIRST)
    rest = rest // count_y
    z, real_z = _source(rest % count_z * WZ + token // (WY * WX), sizes.z, WZ, CONFIG.shift_z, FIRST)
    batch = (rest // count_z).to(tl.int64)
    row = ((batch * sizes.z + z) * sizes.y + y) * sizes.x + x
    return row, real_z & real_y & real_x & (token < WZ * WY * WX)


@triton.jit
def rolled_round(token, CONFIG: tl.constexpr):
    """A bit per axis: in the axis' last window, this token came round from the near end of the map."""
    WZ: tl.constexpr = CONFIG.window.z
    WY: tl.constexpr = CONFIG.window.y
    WX: tl.constexpr = CONFIG.window.x
    z = (token // (WY * WX) >= WZ - CONFIG.shift_z).to(tl.int32)
    y = (token // WX % WY >= WY - CONFIG.shift_y).to(tl.int32)
    x = (token % WX >= WX - CONFIG.shift_x).to(tl.int32)
    return z * 4 + y * 2 + x


@triton.jit
def last_windows(window, sizes, CONFIG: tl.constexpr):
    """A bit per axis: the window is the last one along it, the only place where regions meet."""
    count_x = tl.cdiv(sizes.x, CONFIG.window.x)
    count_y = tl.cdiv(sizes.y, CONFIG.window.y)
    count_z = tl.cdiv(sizes.z, CONFIG.window.z)
    z = (window // (count_x * count_y) % count_z == count_z - 1).to(tl.int32)
    y = (window // count_x % count_y == count_y - 1).to(tl.int32)
    x = (window % count_x == count_x - 1).to(tl.int32)
    return z * 4 + y * 2 + x


@triton.jit
def load_rows(ptr, row, real, stride, channel, fill_ptr, CONFIG: tl.constexpr):
    """A head's channels, from ``channel`` on, of each row, for products; of padded tokens those at ``fill_ptr``."""
    D: tl.constexpr = CONFIG.d
    d = tl.arange(0, CONFIG.block_d)
    at = row[:, None] * stride + channel + d[None, :]
    x = tl.load(ptr + at, mask=real[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    if fill_ptr is not None:
        fill = tl.load(fill_ptr + channel + d, mask=d < D, other=0.0).to(tl.float32)
        x = tl.where(real[:, None], x, fill[None, :])
    return x.to(CONFIG.dot)


@triton.jit
def store_rows(ptr, x, row, real, stride, channel, CONFIG: tl.constexpr):
    D: tl.constexpr = CONFIG.d
    d = tl.arange(0, CONFIG.block_d)
    at = row[:, None] * stride + channel + d[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])


# --- logits ---


@triton.jit
def _table_row(token, WINDOW: tl.constexpr):
    """The row of the bias table for a pair is linear in both tokens: ``row(i) - row(j) + row(last)``."""
    WY: tl.constexpr = WINDOW.y
    WX: tl.constexpr = WINDOW.x
    return (token // (WY * WX) * (2 * WY - 1) + token // WX % WY) * (2 * WX - 1) + token % WX


@triton.jit
def load_bias(bias, head, num_heads, i, j, WINDOW: tl.constexpr):
    """Bias of queries i and keys j, fp32, with -inf for keys past the window."""
    N: tl.constexpr = WINDOW.tokens
    inside = (i < N)[:, None] & (j < N)[None, :]
    tile = tl.where(inside, 0.0, 0.0)
    if bias.table is not None:
        # 32 bits, which why_not makes sure of: 64-bit offsets of a whole tile would take a hundred registers
        at_i = (_table_row(i, WINDOW) + _table_row(N - 1, WINDOW)) * num_heads + head
        at_j = _table_row(j, WINDOW) * num_heads
        at = at_i[:, None] - at_j[None, :]
        tile = tl.load(bias.table + at, mask=inside, other=0.0).to(tl.float32)
    if bias.dense is not None:
        at = (head.to(tl.int64) * N + i[:, None]) * N + j[None, :]
        tile = tl.load(bias.dense + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where((j < N)[None, :], tile, float("-inf"))


@triton.jit
def inverse_norm(x):
    """1 / max(norm, 1e-12) of each row and 0 for a zero row, and whether the norm is above that bound.

    A zero row is known by its elements: the squares of tiny ones vanish in fp32.
    """
    x = x.to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 1))
    inverse = tl.where(tl.max(tl.abs(x), 1) > 0.0, 1.0 / tl.maximum(norm, NORM_EPS), 0.0)
    return inverse, norm >= NORM_EPS


@triton.jit
def unnormalize(grad, x, inverse, above):
    """Gradient of x from that of its normalised rows."""
    unit = x.to(tl.float32) * inverse[:, None]
    along = tl.where(above, tl.sum(unit * grad, 1), 0.0)
    return inverse[:, None] * (grad - unit * along[:, None])


@triton.jit
def logits(q, k, inverse_q, inverse_k, tile, factor, round_i, round_j, last, factors, CONFIG: tl.constexpr):
    """Logits of queries i and keys j. ``tile`` is the bias, -inf for keys past the window; the inverse norms are None
    but for cosine attention, and are applied to the fp32 product: unit vectors rounded to half would cost too much.

    Forward and backward share this, so that a weight of exactly 1 comes back as exactly 1.
    """
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if inverse_q is not None:
        s = s * inverse_q[:, None] * inverse_k[None, :]
    s = s * factor + tile
    if CONFIG.shifted:
        apart = (round_i & last)[:, None] != (round_j & last)[None, :]
        s += tl.where(apart, factors.mask_value, 0.0)
    return s


@triton.jit
def rounding(x, DOT: tl.constexpr):
    """What rounding takes from ``x``, rounded itself.

    The gradient of the factor of cosine attention is the sum of grad_q · q. Its terms have both signs, and the rounding
    of what grad_q is a product of would show.
    """
    return (x - x.to(DOT).to(tl.float32)).to(DOT)


@triton.jit
def keep_tile(dropout, window, head, num_heads, i, j, N: tl.constexpr):
    """Dropout's keep bits of a tile of ``(B, windows, H, N, N)``; ``window`` counts through the batch."""
    position = ((window.to(tl.int64) * num_heads + head) * N + i[:, None]) * N + j[None, :]
    return keep_bits(dropout.seed, position, dropout.threshold)


@triton.jit
def invert_total(total):
    """1 / total, and 0 for rows past the window, which have no weight.

    The log-sum-exp is rounded like any number, at large logits by more than a weight can bear: the backward takes it
    for a maximum only, and divides by its own totals.
    """
    return tl.where(total == 0.0, 0.0, 1.0 / total)


@triton.jit
def drop(p, v, grad_o, dropout, window, head, num_heads, i, j, N: tl.constexpr):
    """The weights after dropout, and the gradient of those before it."""
    used = p
    grad_p = tl.dot(grad_o, tl.trans(v), input_precision="ieee")
    if dropout.seed is not None:
        keep = keep_tile(dropout, window, head, num_heads, i, j, N)
        used = tl.where(keep, p * dropout.keep_scale, 0.0)
        grad_p = tl.where(keep, grad_p * dropout.keep_scale, 0.0)
    return used, grad_p
