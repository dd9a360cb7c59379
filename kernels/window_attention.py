"""Shifted-window attention in Triton: tokens are found by addressing, nothing of size windows × N × N is stored.

A token of a window has a rolled coordinate, from that a source coordinate, and from that a memory row, or it is a
padded token, which holds ``qkv_bias`` and takes part like any other. Windows of at most 64 tokens are one tile: a
program keeps its head and walks over several windows, summing small gradients in registers. Larger ones go in blocks:
online softmax forward, three backward kernels (queries, keys, bias), so that every sum has one owner and a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.kernels import _blocks
from accel.kernels._blocks import Launch, keep_bits

NORM_EPS: tl.constexpr = tl.constexpr(1e-12)

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
def _locate(
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
def _rolled_round(
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
def _last_windows(window, size_z, size_y, size_x, WZ: tl.constexpr, WY: tl.constexpr, WX: tl.constexpr):
    """A bit per axis: the window is the last one along it, the only place where regions meet."""
    count_x = tl.cdiv(size_x, WX)
    count_y = tl.cdiv(size_y, WY)
    count_z = tl.cdiv(size_z, WZ)
    z = (window // (count_x * count_y) % count_z == count_z - 1).to(tl.int32)
    y = (window // count_x % count_y == count_y - 1).to(tl.int32)
    x = (window % count_x == count_x - 1).to(tl.int32)
    return z * 4 + y * 2 + x


@triton.jit
def _load_rows(ptr, row, real, stride, channel, fill_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr):
    """``(tokens, BLOCK_D)`` in DOT: D channels from ``channel`` on of each row, padded tokens from ``fill_ptr``."""
    d = tl.arange(0, BLOCK_D)
    at = row[:, None] * stride + channel + d[None, :]
    x = tl.load(ptr + at, mask=real[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    if fill_ptr is not None:
        fill = tl.load(fill_ptr + channel + d, mask=d < D, other=0.0).to(tl.float32)
        x = tl.where(real[:, None], x, fill[None, :])
    return x.to(DOT)


@triton.jit
def _store_rows(ptr, x, row, real, stride, channel, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    at = row[:, None] * stride + channel + d[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])


# --- logits ---


@triton.jit
def _table_row(token, WY: tl.constexpr, WX: tl.constexpr):
    """The row of the bias table for a pair is linear in both tokens: ``row(i) - row(j) + row(last)``."""
    return (token // (WY * WX) * (2 * WY - 1) + token // WX % WY) * (2 * WX - 1) + token % WX


@triton.jit
def _bias_tile(table_ptr, bias_ptr, head, num_heads, i, j, WZ: tl.constexpr, WY: tl.constexpr, WX: tl.constexpr):
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
def _inverse_norm(x):
    """1 / max(norm, 1e-12) of each row and 0 for a zero row, and whether the norm is above that bound.

    A zero row is known by its elements: the squares of tiny ones vanish in fp32.
    """
    x = x.to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 1))
    inverse = tl.where(tl.max(tl.abs(x), 1) > 0.0, 1.0 / tl.maximum(norm, NORM_EPS), 0.0)
    return inverse, norm >= NORM_EPS


@triton.jit
def _unnormalize(grad, x, inverse, above):
    """Gradient of x from that of its normalised rows."""
    unit = x.to(tl.float32) * inverse[:, None]
    along = tl.where(above, tl.sum(unit * grad, 1), 0.0)
    return inverse[:, None] * (grad - unit * along[:, None])


@triton.jit
def _logits(
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
def _rounding(x, DOT: tl.constexpr):
    """What rounding takes from ``x``, rounded itself.

    The gradient of the factor of cosine attention is the sum of grad_q · q. Its terms have both signs, and the rounding
    of what grad_q is a product of would show.
    """
    return (x - x.to(DOT).to(tl.float32)).to(DOT)


@triton.jit
def _keep(seed_ptr, threshold, window, head, num_heads, i, j, N: tl.constexpr):
    """Dropout's keep bits of a tile of ``(B, windows, H, N, N)``; ``window`` counts through the batch."""
    position = ((window.to(tl.int64) * num_heads + head) * N + i[:, None]) * N + j[None, :]
    return keep_bits(seed_ptr, position, threshold)


@triton.jit
def _inverse_total(total):
    """1 / total, and 0 for rows past the window, which have no weight.

    The log-sum-exp is rounded like any number, at large logits by more than a weight can bear: the backward takes it
    for a maximum only, and divides by its own totals.
    """
    return tl.where(total == 0.0, 0.0, 1.0 / total)


@triton.jit
def _drop(
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
        keep = _keep(seed_ptr, threshold, window, head, num_heads, i, j, N)
        used = tl.where(keep, p * keep_scale, 0.0)
        grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
    return used, grad_p


# --- windows of one tile: a program owns a head and `per_program` consecutive windows ---

_INTS = ["size_z", "size_y", "size_x", "num_heads", "windows", "per_program", "threshold"]


@triton.jit(do_not_specialize=_INTS)
def _forward_tile(
    out_ptr,
    lse_ptr,
    qkv_ptr,
    table_ptr,
    bias_ptr,
    head_scale_ptr,
    fill_ptr,
    seed_ptr,
    size_z,
    size_y,
    size_x,
    num_heads,
    windows,
    per_program,
    threshold,
    keep_scale,
    scale,
    mask_value,
    WZ: tl.constexpr,
    WY: tl.constexpr,
    WX: tl.constexpr,
    SZ: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    N: tl.constexpr = WZ * WY * WX
    head = tl.program_id(0) % num_heads  # heads side by side, so that rows of neighbouring heads share cache lines
    first = tl.program_id(0) // num_heads * per_program
    C = num_heads * D
    i = tl.arange(0, BLOCK)
    came_round = _rolled_round(i, WZ, WY, WX, SZ, SY, SX)
    tile = _bias_tile(table_ptr, bias_ptr, head, num_heads, i, i, WZ, WY, WX)
    factor = scale
    if head_scale_ptr is not None:
        factor = tl.load(head_scale_ptr + head).to(tl.float32)
    count = tl.minimum(per_program, windows - first)
    for step in tl.range(0, count, disable_licm=True):  # hoisted shared-memory addresses would crowd the registers
        window = first + step
        row, real = _locate(window, i, size_z, size_y, size_x, WZ, WY, WX, SZ, SY, SX, ROLL_FIRST)
        q = _load_rows(qkv_ptr, row, real, 3 * C, head * D, fill_ptr, D, BLOCK_D, DOT)
        k = _load_rows(qkv_ptr, row, real, 3 * C, C + head * D, fill_ptr, D, BLOCK_D, DOT)
        v = _load_rows(qkv_ptr, row, real, 3 * C, 2 * C + head * D, fill_ptr, D, BLOCK_D, DOT)
        inverse_q = None
        inverse_k = None
        if head_scale_ptr is not None:
            inverse_q, _ = _inverse_norm(q)
            inverse_k, _ = _inverse_norm(k)
        last = _last_windows(window, size_z, size_y, size_x, WZ, WY, WX)
        s = _logits(
            q, k, inverse_q, inverse_k, tile, factor, came_round, came_round, last, mask_value, SZ + SY + SX > 0
        )
        top = tl.max(s, 1)
        p = tl.exp(s - top[:, None])
        total = tl.sum(p, 1)
        lse = top + tl.log(total)
        tl.store(lse_ptr + (window.to(tl.int64) * num_heads + head) * N + i, lse, mask=i < N)
        if seed_ptr is not None:
            keep = _keep(seed_ptr, threshold, window, head, num_heads, i, i, N)
            p = tl.where(keep, p * keep_scale, 0.0)
        o = tl.dot(p.to(DOT), v, input_precision="ieee") / total[:, None]
        _store_rows(out_ptr, o, row, real, C, head * D, D, BLOCK_D)


@triton.jit(do_not_specialize=["num_heads"])
def _expand_bias(
    tile_ptr,
    table_ptr,
    bias_ptr,
    num_heads,
    WZ: tl.constexpr,
    WY: tl.constexpr,
    WX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sixteen rows of a head's bias tile, fp32, -inf for keys past the window."""
    head = tl.program_id(0) % num_heads
    i = tl.program_id(0) // num_heads * 16 + tl.arange(0, 16)
    j = tl.arange(0, BLOCK)
    tile = _bias_tile(table_ptr, bias_ptr, head, num_heads, i, j, WZ, WY, WX)
    tl.store(tile_ptr + (head.to(tl.int64) * BLOCK + i[:, None]) * BLOCK + j[None, :], tile)


@triton.jit(do_not_specialize=_INTS)
def _backward_tile(
    grad_qkv_ptr,
    bias_part_ptr,
    head_part_ptr,
    fill_part_ptr,
    grad_out_ptr,
    lse_ptr,
    qkv_ptr,
    tile_ptr,
    head_scale_ptr,
    fill_ptr,
    seed_ptr,
    size_z,
    size_y,
    size_x,
    num_heads,
    windows,
    per_program,
    threshold,
    keep_scale,
    scale,
    mask_value,
    WZ: tl.constexpr,
    WY: tl.constexpr,
    WX: tl.constexpr,
    SZ: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    N: tl.constexpr = WZ * WY * WX
    head = tl.program_id(0) % num_heads
    part = tl.program_id(0) // num_heads
    first = part * per_program
    C = num_heads * D
    i = tl.arange(0, BLOCK)
    came_round = _rolled_round(i, WZ, WY, WX, SZ, SY, SX)
    d = tl.arange(0, BLOCK_D)
    factor = scale
    if head_scale_ptr is not None:
        factor = tl.load(head_scale_ptr + head).to(tl.float32)
    grad_bias = tl.zeros((BLOCK, BLOCK), tl.float32)
    grad_head = tl.zeros((BLOCK,), tl.float32)
    grad_fill_k = tl.zeros((BLOCK_D,), tl.float32)
    grad_fill_v = tl.zeros((BLOCK_D,), tl.float32)
    count = tl.minimum(per_program, windows - first)
    for step in tl.range(0, count, disable_licm=True):  # hoisted shared-memory addresses would crowd the registers
        window = first + step
        row, real = _locate(window, i, size_z, size_y, size_x, WZ, WY, WX, SZ, SY, SX, ROLL_FIRST)
        q = _load_rows(qkv_ptr, row, real, 3 * C, head * D, fill_ptr, D, BLOCK_D, DOT)
        k = _load_rows(qkv_ptr, row, real, 3 * C, C + head * D, fill_ptr, D, BLOCK_D, DOT)
        v = _load_rows(qkv_ptr, row, real, 3 * C, 2 * C + head * D, fill_ptr, D, BLOCK_D, DOT)
        grad_o = _load_rows(grad_out_ptr, row, real, C, head * D, None, D, BLOCK_D, DOT)
        # +inf gives rows past the window weight 0, where 0 could give inf · 0
        lse = tl.load(lse_ptr + (window.to(tl.int64) * num_heads + head) * N + i, mask=i < N, other=float("inf"))
        inverse_q = None
        inverse_k = None
        if head_scale_ptr is not None:
            inverse_q, above_q = _inverse_norm(q)
            inverse_k, above_k = _inverse_norm(k)
        if tile_ptr is not None:
            # Read for every window, from L1: kept in registers it would make them spill.
            tile = tl.load(tile_ptr + head.to(tl.int64) * BLOCK * BLOCK + i[:, None] * BLOCK + i[None, :])
        else:
            tile = tl.where((i < N)[None, :], tl.zeros((BLOCK, BLOCK), tl.float32), float("-inf"))
        last = _last_windows(window, size_z, size_y, size_x, WZ, WY, WX)
        s = _logits(
            q, k, inverse_q, inverse_k, tile, factor, came_round, came_round, last, mask_value, SZ + SY + SX > 0
        )
        p = tl.exp(s - lse[:, None])
        p *= _inverse_total(tl.sum(p, 1))[:, None]
        used, grad_p = _drop(p, v, grad_o, seed_ptr, threshold, keep_scale, window, head, num_heads, i, i, N)
        grad_v = tl.dot(tl.trans(used.to(DOT)), grad_o, input_precision="ieee")
        _store_rows(grad_qkv_ptr, grad_v, row, real, 3 * C, 2 * C + head * D, D, BLOCK_D)
        grad_s = p * (grad_p - tl.sum(p * grad_p, 1)[:, None])
        if bias_part_ptr is not None:
            grad_bias += grad_s
        if head_scale_ptr is not None:
            scaled = grad_s * inverse_k[None, :]
            grad_q = tl.dot(scaled.to(DOT), k, input_precision="ieee")
            if head_part_ptr is not None:
                whole = grad_q
                if tl.float32 != DOT:
                    whole = tl.dot(_rounding(scaled, DOT), k, grad_q, input_precision="ieee")
                grad_head += tl.sum(q.to(tl.float32) * inverse_q[:, None] * whole, 1)
            grad_s = grad_s.to(DOT)
            grad_q = _unnormalize(grad_q * factor, q, inverse_q, above_q)
            unit_q = (q.to(tl.float32) * inverse_q[:, None]).to(DOT)
            grad_k = tl.dot(tl.trans(grad_s), unit_q, input_precision="ieee") * factor
            grad_k = _unnormalize(grad_k, k, inverse_k, above_k)
        else:
            grad_s = grad_s.to(DOT)
            grad_q = tl.dot(grad_s, k, input_precision="ieee") * factor
            grad_k = tl.dot(tl.trans(grad_s), q, input_precision="ieee") * factor
        _store_rows(grad_qkv_ptr, grad_q, row, real, 3 * C, head * D, D, BLOCK_D)
        _store_rows(grad_qkv_ptr, grad_k, row, real, 3 * C, C + head * D, D, BLOCK_D)
        if fill_part_ptr is not None:
            # rows past the window have weight 0, and so gradients 0
            grad_fill_k += tl.sum(tl.where(real[:, None], 0.0, grad_k), 0)
            grad_fill_v += tl.sum(tl.where(real[:, None], 0.0, grad_v), 0)
    if bias_part_ptr is not None:
        at = ((part.to(tl.int64) * num_heads + head) * N + i[:, None]) * N + i[None, :]
        tl.store(bias_part_ptr + at, grad_bias, mask=(i < N)[:, None] & (i < N)[None, :])
    if head_part_ptr is not None:
        tl.store(head_part_ptr + tl.program_id(0), tl.sum(grad_head, 0))
    if fill_part_ptr is not None:
        at = part.to(tl.int64) * 2 * C + head * D + d
        tl.store(fill_part_ptr + at, grad_fill_k, mask=d < D)
        tl.store(fill_part_ptr + at + C, grad_fill_v, mask=d < D)


# --- larger windows: a program owns a block of queries or keys, of one head of one window ---


@triton.jit(do_not_specialize=_INTS)
def _forward_blocks(
    out_ptr,
    lse_ptr,
    qkv_ptr,
    table_ptr,
    bias_ptr,
    head_scale_ptr,
    fill_ptr,
    seed_ptr,
    size_z,
    size_y,
    size_x,
    num_heads,
    threshold,
    keep_scale,
    scale,
    mask_value,
    WZ: tl.constexpr,
    WY: tl.constexpr,
    WX: tl.constexpr,
    SZ: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    N: tl.constexpr = WZ * WY * WX
    head = tl.program_id(0) % num_heads
    rest = tl.program_id(0) // num_heads
    i = rest % tl.cdiv(N, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    window = rest // tl.cdiv(N, BLOCK)
    C = num_heads * D
    round_i = _rolled_round(i, WZ, WY, WX, SZ, SY, SX)
    last = _last_windows(window, size_z, size_y, size_x, WZ, WY, WX)
    factor = scale
    if head_scale_ptr is not None:
        factor = tl.load(head_scale_ptr + head).to(tl.float32)
    row_i, real_i = _locate(window, i, size_z, size_y, size_x, WZ, WY, WX, SZ, SY, SX, ROLL_FIRST)
    q = _load_rows(qkv_ptr, row_i, real_i, 3 * C, head * D, fill_ptr, D, BLOCK_D, DOT)
    inverse_q = None
    if head_scale_ptr is not None:
        inverse_q, _ = _inverse_norm(q)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    o = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in tl.range(0, N, BLOCK, disable_licm=True):
        j = start + tl.arange(0, BLOCK)
        tile = _bias_tile(table_ptr, bias_ptr, head, num_heads, i, j, WZ, WY, WX)
        row_j, real_j = _locate(window, j, size_z, size_y, size_x, WZ, WY, WX, SZ, SY, SX, ROLL_FIRST)
        k = _load_rows(qkv_ptr, row_j, real_j, 3 * C, C + head * D, fill_ptr, D, BLOCK_D, DOT)
        v = _load_rows(qkv_ptr, row_j, real_j, 3 * C, 2 * C + head * D, fill_ptr, D, BLOCK_D, DOT)
        inverse_k = None
        if head_scale_ptr is not None:
            inverse_k, _ = _inverse_norm(k)
        round_j = _rolled_round(j, WZ, WY, WX, SZ, SY, SX)
        s = _logits(q, k, inverse_q, inverse_k, tile, factor, round_i, round_j, last, mask_value, SZ + SY + SX > 0)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no key yet, where the bias is -inf
        shrink = tl.exp(top - base)
        p = tl.exp(s - base[:, None])
        total = total * shrink + tl.sum(p, 1)
        top = higher
        if seed_ptr is not None:
            keep = _keep(seed_ptr, threshold, window, head, num_heads, i, j, N)
            p = tl.where(keep, p * keep_scale, 0.0)
        o = o * shrink[:, None] + tl.dot(p.to(DOT), v, input_precision="ieee")
    lse = top + tl.log(total)
    tl.store(lse_ptr + (window.to(tl.int64) * num_heads + head) * N + i, lse, mask=i < N)
    _store_rows(out_ptr, o / total[:, None], row_i, real_i, C, head * D, D, BLOCK_D)


@triton.jit(do_not_specialize=_INTS)
def _backward_queries(
    grad_qkv_ptr,
    delta_ptr,
    inverse_total_ptr,
    head_part_ptr,
    grad_out_ptr,
    lse_ptr,
    qkv_ptr,
    table_ptr,
    bias_ptr,
    head_scale_ptr,
    fill_ptr,
    seed_ptr,
    size_z,
    size_y,
    size_x,
    num_heads,
    threshold,
    keep_scale,
    scale,
    mask_value,
    WZ: tl.constexpr,
    WY: tl.constexpr,
    WX: tl.constexpr,
    SZ: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Gradient of q, 1 / total and delta (the sum of p · its gradient) of each query, and head_scale's part."""
    N: tl.constexpr = WZ * WY * WX
    head = tl.program_id(0) % num_heads
    rest = tl.program_id(0) // num_heads
    i = rest % tl.cdiv(N, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    window = rest // tl.cdiv(N, BLOCK)
    C = num_heads * D
    round_i = _rolled_round(i, WZ, WY, WX, SZ, SY, SX)
    last = _last_windows(window, size_z, size_y, size_x, WZ, WY, WX)
    factor = scale
    if head_scale_ptr is not None:
        factor = tl.load(head_scale_ptr + head).to(tl.float32)
    row_i, real_i = _locate(window, i, size_z, size_y, size_x, WZ, WY, WX, SZ, SY, SX, ROLL_FIRST)
    q = _load_rows(qkv_ptr, row_i, real_i, 3 * C, head * D, fill_ptr, D, BLOCK_D, DOT)
    grad_o = _load_rows(grad_out_ptr, row_i, real_i, C, head * D, None, D, BLOCK_D, DOT)
    at_i = (window.to(tl.int64) * num_heads + head) * N + i
    lse = tl.load(lse_ptr + at_i, mask=i < N, other=float("inf"))
    inverse_q = None
    if head_scale_ptr is not None:
        inverse_q, _ = _inverse_norm(q)
    # Twice over the keys: delta from the rounded output would leave its rounding where a weight is near 1.
    delta = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, N, BLOCK, disable_licm=True):
        j = start + tl.arange(0, BLOCK)
        tile = _bias_tile(table_ptr, bias_ptr, head, num_heads, i, j, WZ, WY, WX)
        row_j, real_j = _locate(window, j, size_z, size_y, size_x, WZ, WY, WX, SZ, SY, SX, ROLL_FIRST)
        k = _load_rows(qkv_ptr, row_j, real_j, 3 * C, C + head * D, fill_ptr, D, BLOCK_D, DOT)
        v = _load_rows(qkv_ptr, row_j, real_j, 3 * C, 2 * C + head * D, fill_ptr, D, BLOCK_D, DOT)
        inverse_k = None
        if head_scale_ptr is not None:
            inverse_k, _ = _inverse_norm(k)
        round_j = _rolled_round(j, WZ, WY, WX, SZ, SY, SX)
        s = _logits(q, k, inverse_q, inverse_k, tile, factor, round_i, round_j, last, mask_value, SZ + SY + SX > 0)
        p = tl.exp(s - lse[:, None])
        _used, grad_p = _drop(p, v, grad_o, seed_ptr, threshold, keep_scale, window, head, num_heads, i, j, N)
        total += tl.sum(p, 1)
        delta += tl.sum(p * grad_p, 1)
    inverse_total = _inverse_total(total)
    delta *= inverse_total
    tl.store(delta_ptr + at_i, delta, mask=i < N)
    tl.store(inverse_total_ptr + at_i, inverse_total, mask=i < N)
    along = tl.zeros((BLOCK,), tl.float32)
    grad_q = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in tl.range(0, N, BLOCK, disable_licm=True):
        j = start + tl.arange(0, BLOCK)
        tile = _bias_tile(table_ptr, bias_ptr, head, num_heads, i, j, WZ, WY, WX)
        row_j, real_j = _locate(window, j, size_z, size_y, size_x, WZ, WY, WX, SZ, SY, SX, ROLL_FIRST)
        k = _load_rows(qkv_ptr, row_j, real_j, 3 * C, C + head * D, fill_ptr, D, BLOCK_D, DOT)
        v = _load_rows(qkv_ptr, row_j, real_j, 3 * C, 2 * C + head * D, fill_ptr, D, BLOCK_D, DOT)
        inverse_k = None
        if head_scale_ptr is not None:
            inverse_k, _ = _inverse_norm(k)
        round_j = _rolled_round(j, WZ, WY, WX, SZ, SY, SX)
        s = _logits(q, k, inverse_q, inverse_k, tile, factor, round_i, round_j, last, mask_value, SZ + SY + SX > 0)
        p = tl.exp(s - lse[:, None]) * inverse_total[:, None]
        _used, grad_p = _drop(p, v, grad_o, seed_ptr, threshold, keep_scale, window, head, num_heads, i, j, N)
        grad_s = p * (grad_p - delta[:, None])
        if head_scale_ptr is not None:
            grad_s *= inverse_k[None, :]
        if head_part_ptr is not None and tl.float32 != DOT:
            lost = tl.dot(_rounding(grad_s, DOT), k, input_precision="ieee")
            along += tl.sum(q.to(tl.float32) * inverse_q[:, None] * lost, 1)
        grad_q += tl.dot(grad_s.to(DOT), k, input_precision="ieee")
    if head_scale_ptr is not None:
        # read again: kept over both loops it would make fp32 heads of 128 spill
        q = _load_rows(qkv_ptr, row_i, real_i, 3 * C, head * D, fill_ptr, D, BLOCK_D, DOT)
        inverse_q, above_q = _inverse_norm(q)
        if head_part_ptr is not None:
            along += tl.sum(q.to(tl.float32) * inverse_q[:, None] * grad_q, 1)
            tl.store(head_part_ptr + tl.program_id(0), tl.sum(along, 0))
        grad_q = _unnormalize(grad_q, q, inverse_q, above_q)
    _store_rows(grad_qkv_ptr, grad_q * factor, row_i, real_i, 3 * C, head * D, D, BLOCK_D)


@triton.jit(do_not_specialize=_INTS)
def _backward_keys(
    grad_qkv_ptr,
    fill_part_ptr,
    grad_out_ptr,
    delta_ptr,
    inverse_total_ptr,
    lse_ptr,
    qkv_ptr,
    table_ptr,
    bias_ptr,
    head_scale_ptr,
    fill_ptr,
    seed_ptr,
    size_z,
    size_y,
    size_x,
    num_heads,
    threshold,
    keep_scale,
    scale,
    mask_value,
    WZ: tl.constexpr,
    WY: tl.constexpr,
    WX: tl.constexpr,
    SZ: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Gradients of k and v, and what padded tokens of the block receive."""
    N: tl.constexpr = WZ * WY * WX
    head = tl.program_id(0) % num_heads
    rest = tl.program_id(0) // num_heads
    j = rest % tl.cdiv(N, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    window = rest // tl.cdiv(N, BLOCK)
    C = num_heads * D
    round_j = _rolled_round(j, WZ, WY, WX, SZ, SY, SX)
    last = _last_windows(window, size_z, size_y, size_x, WZ, WY, WX)
    factor = scale
    if head_scale_ptr is not None:
        factor = tl.load(head_scale_ptr + head).to(tl.float32)
    row_j, real_j = _locate(window, j, size_z, size_y, size_x, WZ, WY, WX, SZ, SY, SX, ROLL_FIRST)
    k = _load_rows(qkv_ptr, row_j, real_j, 3 * C, C + head * D, fill_ptr, D, BLOCK_D, DOT)
    v = _load_rows(qkv_ptr, row_j, real_j, 3 * C, 2 * C + head * D, fill_ptr, D, BLOCK_D, DOT)
    inverse_k = None
    if head_scale_ptr is not None:
        inverse_k, above_k = _inverse_norm(k)
    grad_k = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in tl.range(0, N, BLOCK, disable_licm=True):
        i = start + tl.arange(0, BLOCK)
        tile = _bias_tile(table_ptr, bias_ptr, head, num_heads, i, j, WZ, WY, WX)
        row_i, real_i = _locate(window, i, size_z, size_y, size_x, WZ, WY, WX, SZ, SY, SX, ROLL_FIRST)
        q = _load_rows(qkv_ptr, row_i, real_i, 3 * C, head * D, fill_ptr, D, BLOCK_D, DOT)
        grad_o = _load_rows(grad_out_ptr, row_i, real_i, C, head * D, None, D, BLOCK_D, DOT)
        at_i = (window.to(tl.int64) * num_heads + head) * N + i
        lse = tl.load(lse_ptr + at_i, mask=i < N, other=float("inf"))
        delta = tl.load(delta_ptr + at_i, mask=i < N, other=0.0)
        inverse_total = tl.load(inverse_total_ptr + at_i, mask=i < N, other=0.0)
        inverse_q = None
        if head_scale_ptr is not None:
            inverse_q, _ = _inverse_norm(q)
        round_i = _rolled_round(i, WZ, WY, WX, SZ, SY, SX)
        s = _logits(q, k, inverse_q, inverse_k, tile, factor, round_i, round_j, last, mask_value, SZ + SY + SX > 0)
        p = tl.exp(s - lse[:, None]) * inverse_total[:, None]
        used, grad_p = _drop(p, v, grad_o, seed_ptr, threshold, keep_scale, window, head, num_heads, i, j, N)
        grad_v += tl.dot(tl.trans(used.to(DOT)), grad_o, input_precision="ieee")
        grad_s = (p * (grad_p - delta[:, None])).to(DOT)
        if head_scale_ptr is not None:
            q = (q.to(tl.float32) * inverse_q[:, None]).to(DOT)
        grad_k += tl.dot(tl.trans(grad_s), q, input_precision="ieee")
    grad_k *= factor
    if head_scale_ptr is not None:
        grad_k = _unnormalize(grad_k, k, inverse_k, above_k)
    _store_rows(grad_qkv_ptr, grad_k, row_j, real_j, 3 * C, C + head * D, D, BLOCK_D)
    _store_rows(grad_qkv_ptr, grad_v, row_j, real_j, 3 * C, 2 * C + head * D, D, BLOCK_D)
    if fill_part_ptr is not None:
        d = tl.arange(0, BLOCK_D)
        padded = ((j < N) & ~real_j)[:, None]
        at = rest.to(tl.int64) * 2 * C + head * D + d
        tl.store(fill_part_ptr + at, tl.sum(tl.where(padded, grad_k, 0.0), 0), mask=d < D)
        tl.store(fill_part_ptr + at + C, tl.sum(tl.where(padded, grad_v, 0.0), 0), mask=d < D)


@triton.jit(do_not_specialize=_INTS)
def _backward_bias(
    bias_part_ptr,
    grad_out_ptr,
    delta_ptr,
    inverse_total_ptr,
    lse_ptr,
    qkv_ptr,
    table_ptr,
    bias_ptr,
    head_scale_ptr,
    fill_ptr,
    seed_ptr,
    size_z,
    size_y,
    size_x,
    num_heads,
    windows,
    per_program,
    threshold,
    keep_scale,
    scale,
    mask_value,
    WZ: tl.constexpr,
    WY: tl.constexpr,
    WX: tl.constexpr,
    SZ: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    """One tile of the dense bias gradient, summed over `per_program` consecutive windows."""
    N: tl.constexpr = WZ * WY * WX
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    head = tl.program_id(0) % num_heads
    rest = tl.program_id(0) // num_heads
    i = rest % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    j = rest // BLOCKS % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    part = rest // (BLOCKS * BLOCKS)
    first = part * per_program
    C = num_heads * D
    round_i = _rolled_round(i, WZ, WY, WX, SZ, SY, SX)
    round_j = _rolled_round(j, WZ, WY, WX, SZ, SY, SX)
    factor = scale
    if head_scale_ptr is not None:
        factor = tl.load(head_scale_ptr + head).to(tl.float32)
    tile = _bias_tile(table_ptr, bias_ptr, head, num_heads, i, j, WZ, WY, WX)
    grad_bias = tl.zeros((BLOCK, BLOCK), tl.float32)
    count = tl.minimum(per_program, windows - first)
    for step in tl.range(0, count, disable_licm=True):  # hoisted shared-memory addresses would crowd the registers
        window = first + step
        row_i, real_i = _locate(window, i, size_z, size_y, size_x, WZ, WY, WX, SZ, SY, SX, ROLL_FIRST)
        row_j, real_j = _locate(window, j, size_z, size_y, size_x, WZ, WY, WX, SZ, SY, SX, ROLL_FIRST)
        q = _load_rows(qkv_ptr, row_i, real_i, 3 * C, head * D, fill_ptr, D, BLOCK_D, DOT)
        k = _load_rows(qkv_ptr, row_j, real_j, 3 * C, C + head * D, fill_ptr, D, BLOCK_D, DOT)
        inverse_q = None
        inverse_k = None
        if head_scale_ptr is not None:
            inverse_q, _ = _inverse_norm(q)
            inverse_k, _ = _inverse_norm(k)
        at_i = (window.to(tl.int64) * num_heads + head) * N + i
        lse = tl.load(lse_ptr + at_i, mask=i < N, other=float("inf"))
        delta = tl.load(delta_ptr + at_i, mask=i < N, other=0.0)
        inverse_total = tl.load(inverse_total_ptr + at_i, mask=i < N, other=0.0)
        last = _last_windows(window, size_z, size_y, size_x, WZ, WY, WX)
        s = _logits(q, k, inverse_q, inverse_k, tile, factor, round_i, round_j, last, mask_value, SZ + SY + SX > 0)
        v = _load_rows(qkv_ptr, row_j, real_j, 3 * C, 2 * C + head * D, fill_ptr, D, BLOCK_D, DOT)
        grad_o = _load_rows(grad_out_ptr, row_i, real_i, C, head * D, None, D, BLOCK_D, DOT)
        p = tl.exp(s - lse[:, None]) * inverse_total[:, None]
        _used, grad_p = _drop(p, v, grad_o, seed_ptr, threshold, keep_scale, window, head, num_heads, i, j, N)
        grad_bias += p * (grad_p - delta[:, None])
    at = ((part.to(tl.int64) * num_heads + head) * N + i[:, None]) * N + j[None, :]
    tl.store(bias_part_ptr + at, grad_bias, mask=(i < N)[:, None] & (j < N)[None, :])


@triton.jit(do_not_specialize=["num_heads"])
def _reduce_table(
    grad_table_ptr,
    grad_bias_ptr,
    num_heads,
    WZ: tl.constexpr,
    WY: tl.constexpr,
    WX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows of the table's gradient from the dense one: the sum over the pairs of tokens that far apart."""
    N: tl.constexpr = WZ * WY * WX
    COUNT: tl.constexpr = (2 * WZ - 1) * (2 * WY - 1) * (2 * WX - 1)
    head = tl.program_id(0) % num_heads
    row = tl.program_id(0) // num_heads * ROWS + tl.arange(0, ROWS)
    apart_x = (row % (2 * WX - 1) - (WX - 1))[:, None]
    apart_y = (row // (2 * WX - 1) % (2 * WY - 1) - (WY - 1))[:, None]
    apart_z = (row // ((2 * WX - 1) * (2 * WY - 1)) - (WZ - 1))[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, N, BLOCK):
        i = (start + tl.arange(0, BLOCK))[None, :]
        x = i % WX - apart_x
        y = i // WX % WY - apart_y
        z = i // (WX * WY) - apart_z
        inside = (i < N) & (x >= 0) & (x < WX) & (y >= 0) & (y < WY) & (z >= 0) & (z < WZ)
        at = (head.to(tl.int64) * N + i) * N + (z * WY + y) * WX + x
        total += tl.load(grad_bias_ptr + at, mask=inside & (row < COUNT)[:, None], other=0.0)
    tl.store(grad_table_ptr + row.to(tl.int64) * num_heads + head, tl.sum(total, 1), mask=row < COUNT)


# --- tiles: chosen by the compile gate's registers and by byte counts, not yet by measurement ---

MAX_TOKENS = 32768  # a query's and a key's offset in the dense bias of one head fit 32 bits

# Enough programs to fill any present GPU several times over; fixed, so that sums do not depend on the device.
FORWARD_PROGRAMS = 2048
BACKWARD_PROGRAMS = 1024
PARTS_BYTES = 64 << 20


@dataclass(frozen=True)
class Tile:
    """How a window is cut: in one tile or in blocks, the tokens of either, and the warps of a program."""

    whole: bool
    block: int
    warps: int


def _blocks_of(block: int, warps: int, tokens: int) -> Tile:
    return Tile(False, min(block, max(16, triton.next_power_of_2(tokens))), warps)


def _small_blocks(tokens: int, head_dim: int, itemsize: int) -> Tile:
    """What every call can run on: fp32 products go without tensor cores and hold many operands in registers."""
    if itemsize == 4:
        return _blocks_of(32 if head_dim <= 32 else 16, 8, tokens)
    return _blocks_of(32 if head_dim <= 64 else 16, 4, tokens)


def forward_tile(tokens: int, head_dim: int, itemsize: int, cosine: bool, dropout: bool, deep: bool) -> Tile:
    """``deep``: the window has more than one token along z, which makes addressing dearer."""
    if itemsize == 4 or head_dim > 64:
        return _small_blocks(tokens, head_dim, itemsize)
    if tokens <= 64:
        return Tile(True, max(16, triton.next_power_of_2(tokens)), 4)
    if cosine or dropout or deep:
        return _small_blocks(tokens, head_dim, itemsize)
    return _blocks_of(64, 4, tokens)


def backward_tile(tokens: int, head_dim: int, itemsize: int, cosine: bool, dropout: bool, padded: bool) -> Tile:
    """A whole tile reads and writes 7·N·D elements, blocks 15·N·D; but it holds p, its gradient and the bias' at
    once. That leaves no registers for cosine with padding or dropout, and at 64 tokens none for dropout, wide or
    odd heads, or cosine with masked loads."""
    if itemsize == 4 or head_dim > 64:
        return _small_blocks(tokens, head_dim, itemsize)
    if tokens <= 16:
        return Tile(True, 16, 2)
    if tokens <= 32 and not (cosine and (dropout or padded)):
        return Tile(True, 32, 4)
    if tokens <= 64 and head_dim in (16, 32) and not dropout and not (cosine and (padded or tokens < 64)):
        return Tile(True, 64, 8 if cosine else 4)
    if cosine or dropout or head_dim > 32:
        return _small_blocks(tokens, head_dim, itemsize)
    return _blocks_of(64, 4, tokens)


def bias_tile(tokens: int, head_dim: int, itemsize: int) -> Tile:
    """For the bias gradient of windows that go in blocks; it holds one more tile than the other two kernels."""
    if itemsize == 2 and head_dim > 32:
        return _blocks_of(16, 2, tokens)
    return _small_blocks(tokens, head_dim, itemsize)


# --- launches ---


class _Shape(NamedTuple):
    """What the launchers need of a call, from its shapes alone."""

    head_dim: int
    tokens: int
    windows: int  # of the whole batch
    padded: bool


def _shape(qkv: Tensor, num_heads: int, window: list[int]) -> _Shape:
    counts = [-(-qkv.shape[i + 1] // window[i]) for i in range(3)]
    return _Shape(
        head_dim=qkv.shape[-1] // (3 * num_heads),
        tokens=math.prod(window),
        windows=qkv.shape[0] * math.prod(counts),
        padded=[counts[i] * window[i] for i in range(3)] != list(qkv.shape[1:4]),
    )


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtype and head size are judged by the op.

    ``torch.compile`` traces through this, which bars generator expressions and Triton's helpers.
    """
    qkv = args.qkv
    if not (_blocks.INTERPRETING and qkv.device.type == "cpu"):
        if qkv.device.type != "cuda":
            return f"it runs on NVIDIA GPUs, and the tensors are on {qkv.device.type}"
        if torch.version.hip:
            return f"it is built for NVIDIA GPUs, and this is ROCm {torch.version.hip}"
        capability = torch.cuda.get_device_capability(qkv.device)
        if capability < (8, 0):
            return f"it needs a GPU of compute capability 8.0, this one has {capability[0]}.{capability[1]}"
    shape = _shape(qkv, args.num_heads, args.window)
    if shape.tokens > MAX_TOKENS:
        return f"it takes windows of at most {MAX_TOKENS} tokens, not {shape.tokens} ({args.window})"
    rows = math.prod([2 * size - 1 for size in args.window])
    if rows * args.num_heads >= 2**31:
        return f"a bias table of {rows} rows and {args.num_heads} heads is more than 32 bits can address"
    programs = shape.windows * args.num_heads * -(-shape.tokens // 16)
    if programs >= 2**31:
        return f"{shape.windows} windows with {args.num_heads} heads are more than one launch can number"
    return None


def _shared(
    qkv: Tensor,
    bias_table: Tensor | None,
    bias: Tensor | None,
    head_scale: Tensor | None,
    qkv_bias: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    window: list[int],
    shift: list[int],
    scale: float,
    roll_first: bool,
    mask_value: float,
    dropout_p: float,
) -> dict[str, Any]:
    """The arguments that all kernels of a call have in common, but for the tile."""
    shape = _shape(qkv, num_heads, window)
    return {
        "qkv_ptr": qkv,
        "table_ptr": bias_table,
        "bias_ptr": bias,
        "head_scale_ptr": head_scale,
        "fill_ptr": qkv_bias if shape.padded else None,
        "seed_ptr": seed if dropout_p > 0.0 else None,
        "size_z": qkv.shape[1],
        "size_y": qkv.shape[2],
        "size_x": qkv.shape[3],
        "num_heads": num_heads,
        "windows": shape.windows,
        "threshold": int(dropout_p * 2.0**32),
        "keep_scale": 1.0 / (1.0 - dropout_p),
        "scale": scale,
        "mask_value": mask_value,
        "WZ": window[0],
        "WY": window[1],
        "WX": window[2],
        "SZ": shift[0],
        "SY": shift[1],
        "SX": shift[2],
        "ROLL_FIRST": roll_first,
        "D": shape.head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(shape.head_dim)),
        "DOT": _blocks.dot_dtype(qkv.dtype),
    }


def _launch(kernel: Any, programs: int, warps: int, **arguments: Any) -> Launch:
    """A launch with those of the arguments that the kernel takes."""
    return Launch(kernel, programs, {name: arguments[name] for name in kernel.arg_names}, warps, stages=1)


def _forward_launch(out: Tensor, lse: Tensor, qkv: Tensor, *rest: Any) -> Launch:
    head_scale, num_heads, window, dropout_p = rest[2], rest[5], rest[6], rest[11]
    shape = _shape(qkv, num_heads, window)
    tile = forward_tile(
        shape.tokens,
        shape.head_dim,
        qkv.element_size(),
        cosine=head_scale is not None,
        dropout=dropout_p > 0.0,
        deep=window[0] > 1,
    )
    shared = {**_shared(qkv, *rest), "out_ptr": out, "lse_ptr": lse, "BLOCK": tile.block}
    if not tile.whole:
        programs = shape.windows * num_heads * triton.cdiv(shape.tokens, tile.block)
        return _launch(_forward_blocks, programs, tile.warps, **shared)
    # A bias tile is read once a program: for up to 16 windows, fewer where that would leave the GPU idle.
    per_program = min(16, max(1, shape.windows * num_heads // FORWARD_PROGRAMS))
    programs = triton.cdiv(shape.windows, per_program) * num_heads
    return _launch(_forward_tile, programs, tile.warps, per_program=per_program, **shared)


def _windows_per_part(shape: _Shape, num_heads: int, itemsize: int, programs_per_part: int, need_bias: bool) -> int:
    """Windows whose small gradients one program sums before it writes its part; only shapes decide it, and with it
    the order of the sum.

    Enough parts for BACKWARD_PROGRAMS programs. But a part of the bias gradient costs 8·N² bytes a head, written and
    then read once: that shall stay below a quarter of the 7·N·D elements each of its windows costs anyway, and all
    parts together below PARTS_BYTES, or be one part where the dense bias is already larger than that.
    """
    parts = triton.cdiv(BACKWARD_PROGRAMS, programs_per_part)
    least = 1
    if need_bias:
        parts = min(parts, max(1, PARTS_BYTES // (4 * num_heads * shape.tokens**2)))
        least = triton.cdiv(4 * 8 * shape.tokens, 7 * shape.head_dim * itemsize)
    return max(triton.cdiv(shape.windows, parts), min(least, shape.windows))


@dataclass(frozen=True)
class _Backward:
    """The launches of a backward pass in order, and the buffers they fill.

    Parts of head_scale's and qkv_bias' gradients are a number and two head rows for each program: at most a hundredth
    and a 24th of the gradient of qkv.
    """

    launches: list[Launch]
    grad_qkv: Tensor
    bias_parts: Tensor | None  # (parts, H, N, N)
    head_parts: Tensor | None  # (parts, H)
    fill_parts: Tensor | None  # (parts, 2, C): of k and v, as nobody reads what a padded token's q gives


def _backward_plan(grad_out: Tensor, qkv: Tensor, lse: Tensor, *rest: Any) -> _Backward:
    bias_table, bias, head_scale, qkv_bias, _, num_heads, window, *_, dropout_p, needs = rest
    shape = _shape(qkv, num_heads, window)
    tile = backward_tile(
        shape.tokens,
        shape.head_dim,
        qkv.element_size(),
        cosine=head_scale is not None,
        dropout=dropout_p > 0.0,
        padded=shape.padded,
    )
    blocks = triton.cdiv(shape.tokens, tile.block)
    tile_of_bias = tile if tile.whole else bias_tile(shape.tokens, shape.head_dim, qkv.element_size())
    tiles_of_bias = triton.cdiv(shape.tokens, tile_of_bias.block) ** 2
    need_bias = (bias_table is not None and needs[0]) or (bias is not None and needs[1])
    per_program = _windows_per_part(shape, num_heads, qkv.element_size(), num_heads * tiles_of_bias, need_bias)
    parts = triton.cdiv(shape.windows, per_program)
    owners = parts if tile.whole else shape.windows * blocks  # programs of a head that add to the smallest gradients

    def part(needed: bool, *size: int) -> Tensor | None:
        return lse.new_empty(size) if needed else None

    grad_qkv = torch.empty_like(qkv, dtype=_blocks.store_dtype(qkv.dtype))
    bias_parts = part(need_bias, parts, num_heads, shape.tokens, shape.tokens)
    head_parts = part(head_scale is not None and needs[2], owners, num_heads)
    fill_parts = part(qkv_bias is not None and needs[3] and shape.padded, owners, 2, qkv.shape[-1] // 3)
    tile_bias = part(tile.whole and (bias_table is not None or bias is not None), num_heads, tile.block, tile.block)
    arguments = {
        **_shared(qkv, *rest[:-1]),
        "grad_out_ptr": grad_out,
        "lse_ptr": lse,
        "delta_ptr": None if tile.whole else torch.empty_like(lse),
        "inverse_total_ptr": None if tile.whole else torch.empty_like(lse),
        "tile_ptr": tile_bias,
        "grad_qkv_ptr": grad_qkv,
        "bias_part_ptr": bias_parts,
        "head_part_ptr": head_parts,
        "fill_part_ptr": fill_parts,
        "per_program": per_program,
        "BLOCK": tile.block,
    }
    launches = []
    if tile_bias is not None:
        launches.append(_launch(_expand_bias, num_heads * (tile.block // 16), 4, **arguments))
    if tile.whole:
        launches.append(_launch(_backward_tile, owners * num_heads, tile.warps, **arguments))
        return _Backward(launches, grad_qkv, bias_parts, head_parts, fill_parts)
    launches.append(_launch(_backward_queries, owners * num_heads, tile.warps, **arguments))
    launches.append(_launch(_backward_keys, owners * num_heads, tile.warps, **arguments))
    if need_bias:
        arguments["BLOCK"] = tile_of_bias.block
        launches.append(_launch(_backward_bias, parts * tiles_of_bias * num_heads, tile_of_bias.warps, **arguments))
    return _Backward(launches, grad_qkv, bias_parts, head_parts, fill_parts)


def _table_launch(grad_table: Tensor, grad_bias: Tensor, window: list[int]) -> Launch:
    num_heads, rows = grad_bias.shape[0], 16
    return _launch(
        _reduce_table,
        triton.cdiv(grad_table.shape[0], rows) * num_heads,
        4,
        grad_table_ptr=grad_table,
        grad_bias_ptr=grad_bias,
        num_heads=num_heads,
        WZ=window[0],
        WY=window[1],
        WX=window[2],
        ROWS=rows,
        BLOCK=64,
    )


def _results(qkv: Tensor, num_heads: int, window: list[int]) -> tuple[Tensor, Tensor]:
    """Empty out and lse."""
    shape = _shape(qkv, num_heads, window)
    out = qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3), dtype=_blocks.store_dtype(qkv.dtype))
    return out, qkv.new_empty((shape.windows, num_heads, shape.tokens), dtype=torch.float32)


def forward(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; arguments as ``accel.ops.window_attention.reference``."""
    out, lse = _results(qkv, rest[5], rest[6])
    with _blocks.device_of(qkv):
        _forward_launch(out, lse, qkv, *rest).run()
    return out.to(qkv.dtype), lse


def backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of qkv and, where needed, of table, dense bias, head_scale and qkv_bias (fp32, else empty).

    ``out`` is rounded and so not what the gradients start from; it is recomputed.
    """
    bias_table, bias, _, qkv_bias, _, _, window, *_, needs = rest
    grad_table, grad_bias, grad_head, grad_fill = (lse.new_empty(0) for _ in range(4))
    with _blocks.device_of(qkv):
        plan = _backward_plan(grad_out, qkv, lse, *rest)
        for launch in plan.launches:
            launch.run()
        if plan.bias_parts is not None:
            dense = plan.bias_parts.sum(0)
            if bias is not None:
                grad_bias = dense
            else:
                grad_table = lse.new_empty(bias_table.shape)
                _table_launch(grad_table, dense, window).run()
        if plan.head_parts is not None:
            grad_head = plan.head_parts.sum(0)
        if qkv_bias is not None and needs[3]:
            grad_fill = lse.new_zeros(qkv_bias.shape)  # its q third and, without padding, all of it stay zero
            if plan.fill_parts is not None:
                grad_fill.view(3, -1)[1:] = plan.fill_parts.sum(0)
    return plan.grad_qkv.to(qkv.dtype), grad_table, grad_bias, grad_head, grad_fill


# --- what the compile gate builds ---


def compile_cases() -> Iterator[_blocks.CompileCase]:
    """Every tile the tables can choose in the heaviest calls that reach it, and the calls of the Swin models.

    What differs only by tensors' shapes, or by nothing the kernel sees, comes once.
    """
    return _blocks.once(
        case for dtype, window, size, flags in _calls() for case in _cases(dtype, window, size, **flags)
    )


def _calls() -> Iterator[tuple[torch.dtype, list[int], int, dict[str, bool]]]:
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    tiny, small, v1, v2, wide, deep = [1, 3, 5], [1, 5, 6], [1, 7, 7], [1, 8, 8], [1, 16, 16], [8, 7, 7]
    shifted = {"shift": True}
    padded = {"shift": True, "fill": True}
    cosine = {"shift": True, "cosine": True}
    everything = {"cosine": True, "shift": True, "fill": True, "dropout": True}
    other = {"shift": True, "fill": True, "roll_first": True, "dense": True}
    for head_dim in (16, 32, 64, 128):
        yield fp32, v1, head_dim, everything
    yield fp32, tiny, 32, everything
    yield fp32, v1, 20, other
    yield fp32, v2, 32, cosine
    for window in (tiny, v1, wide):
        yield bf16, window, 32, everything
    for head_dim in (32, 64):
        yield bf16, small, head_dim, cosine
        yield bf16, small, head_dim, {**padded, "dropout": True}
    yield bf16, v1, 64, everything
    yield bf16, v1, 128, everything
    for window in (v1, v2, wide, deep):
        yield bf16, window, 32, padded
    for window in (v2, wide):
        yield bf16, window, 32, cosine
    for window in (v1, wide):
        yield bf16, window, 32, other
        yield bf16, window, 64, padded
    yield fp16, v1, 32, shifted
    yield bf16, v1, 16, padded
    yield bf16, v1, 20, other
    yield bf16, v1, 32, {}
    yield fp16, v1, 32, everything


def _cases(
    dtype: torch.dtype,
    window: list[int],
    head_dim: int,
    cosine: bool = False,
    shift: bool = False,
    fill: bool = False,
    dropout: bool = False,
    dense: bool = False,
    roll_first: bool = False,
) -> Iterator[_blocks.CompileCase]:
    """The launches of one call, forward and backward, on tensors that have shapes only."""
    heads = 3
    name = f"{str(dtype)[6:]} window {'x'.join(map(str, window))} D={head_dim}"
    for flag in ("cosine", "shift", "fill", "dropout", "dense", "roll_first"):
        name += f" {flag}" if locals()[flag] else ""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    tokens = math.prod(window)
    rows = math.prod(2 * w - 1 for w in window)
    channels = heads * head_dim
    qkv = empty(64, *(8 * w - int(fill) for w in window), 3 * channels, dtype=dtype)
    rest = [
        None if dense else empty(rows, heads),
        empty(heads, tokens, tokens) if dense else None,
        empty(heads) if cosine else None,
        empty(3 * channels) if fill else None,
        empty(1, dtype=torch.int64) if dropout else None,
        heads,
        window,
        [w // 2 if shift else 0 for w in window],
        head_dim**-0.5,
        roll_first,
        -100.0,
        0.1 if dropout else 0.0,
    ]
    out, lse = _results(qkv, heads, window)
    yield _forward_launch(out, lse, qkv, *rest).case(name)
    plan = _backward_plan(out, qkv, lse, *rest, [True] * 4)
    for launch in plan.launches:
        yield launch.case(name)
    if not dense:
        yield _table_launch(empty(rows, heads), empty(heads, tokens, tokens), window).case(name)
