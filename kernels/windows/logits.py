"""What the window attention kernels share: where the tokens of a window lie, the logits of a tile, its gradients.

A token of a window has a rolled coordinate, from that a source coordinate, and from that a memory row, or it is a
padded token, which holds ``qkv_bias`` and takes part like any other. A tile has queries on one axis and keys on the
other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from accel.kernels._launch import keep_bits

NORM_EPS: tl.constexpr = tl.constexpr(1e-12)
INTS = ["size_z", "size_y", "size_x", "num_heads", "windows", "per_program", "threshold"]
"""Integers on whose values no kernel is specialised."""

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
def locate(
    window,
    token,
    size_z,
    size_y,
    size_x,
    WZ: tl.constexpr,
    WY: tl.constexpr,
    WX: tl.constexpr,
    SZ: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
):
    """Memory row (int64) of each token of a window of the batch, and whether the token is in the map."""
    count_x = tl.cdiv(size_x, WX)
    count_y = tl.cdiv(size_y, WY)
    count_z = tl.cdiv(size_z, WZ)
    rest = window // count_x
    x, real_x = _source(window % count_x * WX + token % WX, size_x, WX, SX, ROLL_FIRST)
    y, real_y = _source(rest % count_y * WY + token // WX % WY, size_y, WY, SY, ROLL_FIRST)
    rest = rest // count_y
    z, real_z = _source(rest % count_z * WZ + token // (WY * WX), size_z, WZ, SZ, ROLL_FIRST)
    batch = (rest // count_z).to(tl.int64)
    row = ((batch * size_z + z) * size_y + y) * size_x + x
    return row, real_z & real_y & real_x & (token < WZ * WY * WX)


@triton.jit
def rolled_round(
    token,
    WZ: tl.constexpr,
    WY: tl.constexpr,
    WX: tl.constexpr,
    SZ: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
):
    """A bit per axis: in the axis' last window, this token came round from the near end of the map."""
    z = (token // (WY * WX) >= WZ - SZ).to(tl.int32)
    y = (token // WX % WY >= WY - SY).to(tl.int32)
    x = (token % WX >= WX - SX).to(tl.int32)
    return z * 4 + y * 2 + x


@triton.jit
def last_windows(window, size_z, size_y, size_x, WZ: tl.constexpr, WY: tl.constexpr, WX: tl.constexpr):
    """A bit per axis: the window is the last one along it, the only place where regions meet."""
    count_x = tl.cdiv(size_x, WX)
    count_y = tl.cdiv(size_y, WY)
    count_z = tl.cdiv(size_z, WZ)
    z = (window // (count_x * count_y) % count_z == count_z - 1).to(tl.int32)
    y = (window // count_x % count_y == count_y - 1).to(tl.int32)
    x = (window % count_x == count_x - 1).to(tl.int32)
    return z * 4 + y * 2 + x


@triton.jit
def load_rows(ptr, row, real, stride, channel, fill_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr):
    """``(tokens, BLOCK_D)`` in DOT: D channels from ``channel`` on of each row, padded tokens from ``fill_ptr``."""
    d = tl.arange(0, BLOCK_D)
    at = row[:, None] * stride + channel + d[None, :]
    x = tl.load(ptr + at, mask=real[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    if fill_ptr is not None:
        fill = tl.load(fill_ptr + channel + d, mask=d < D, other=0.0).to(tl.float32)
        x = tl.where(real[:, None], x, fill[None, :])
    return x.to(DOT)


@triton.jit
def store_rows(ptr, x, row, real, stride, channel, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    at = row[:, None] * stride + channel + d[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])


# --- logits ---


@triton.jit
def _table_row(token, WY: tl.constexpr, WX: tl.constexpr):
    """The row of the bias table for a pair is linear in both tokens: ``row(i) - row(j) + row(last)``."""
    return (token // (WY * WX) * (2 * WY - 1) + token // WX % WY) * (2 * WX - 1) + token % WX


@triton.jit
def load_bias(table_ptr, bias_ptr, head, num_heads, i, j, WZ: tl.constexpr, WY: tl.constexpr, WX: tl.constexpr):
    """Bias of queries i and keys j, fp32, with -inf for keys past the window."""
    N: tl.constexpr = WZ * WY * WX
    inside = (i < N)[:, None] & (j < N)[None, :]
    tile = tl.where(inside, 0.0, 0.0)
    if table_ptr is not None:
        # 32 bits, which why_not makes sure of: 64-bit offsets of a whole tile would take a hundred registers
        at_i = (_table_row(i, WY, WX) + _table_row(N - 1, WY, WX)) * num_heads + head
        at_j = _table_row(j, WY, WX) * num_heads
        at = at_i[:, None] - at_j[None, :]
        tile = tl.load(table_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        at = (head.to(tl.int64) * N + i[:, None]) * N + j[None, :]
        tile = tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
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
def logits(
    q,
    k,
    inverse_q,
    inverse_k,
    tile,
    factor,
    round_i,
    round_j,
    last,
    mask_value,
    MASKED: tl.constexpr,
):
    """Logits of queries i and keys j. ``tile`` is the bias, -inf for keys past the window; the inverse norms are None
    but for cosine attention, and are applied to the fp32 product: unit vectors rounded to half would cost too much.

    Forward and backward share this, so that a weight of exactly 1 comes back as exactly 1.
    """
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if inverse_q is not None:
        s = s * inverse_q[:, None] * inverse_k[None, :]
    s = s * factor + tile
    if MASKED:
        apart = (round_i & last)[:, None] != (round_j & last)[None, :]
        s += tl.where(apart, mask_value, 0.0)
    return s


@triton.jit
def rounding(x, DOT: tl.constexpr):
    """What rounding takes from ``x``, rounded itself.

    The gradient of the factor of cosine attention is the sum of grad_q · q. Its terms have both signs, and the rounding
    of what grad_q is a product of would show.
    """
    return (x - x.to(DOT).to(tl.float32)).to(DOT)


@triton.jit
def keep_tile(seed_ptr, threshold, window, head, num_heads, i, j, N: tl.constexpr):
    """Dropout's keep bits of a tile of ``(B, windows, H, N, N)``; ``window`` counts through the batch."""
    position = ((window.to(tl.int64) * num_heads + head) * N + i[:, None]) * N + j[None, :]
    return keep_bits(seed_ptr, position, threshold)


@triton.jit
def invert_total(total):
    """1 / total, and 0 for rows past the window, which have no weight.

    The log-sum-exp is rounded like any number, at large logits by more than a weight can bear: the backward takes it
    for a maximum only, and divides by its own totals.
    """
    return tl.where(total == 0.0, 0.0, 1.0 / total)


@triton.jit
def drop(
    p,
    v,
    grad_o,
    seed_ptr,
    threshold,
    keep_scale,
    window,
    head,
    num_heads,
    i,
    j,
    N: tl.constexpr,
):
    """The weights after dropout, and the gradient of those before it."""
    used = p
    grad_p = tl.dot(grad_o, tl.trans(v), input_precision="ieee")
    if seed_ptr is not None:
        keep = keep_tile(seed_ptr, threshold, window, head, num_heads, i, j, N)
        used = tl.where(keep, p * keep_scale, 0.0)
        grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
    return used, grad_p
