"""Window attention where a whole window is one tile, of at most 64 tokens.

A program owns a head and ``per_program`` consecutive windows, and sums their small gradients in registers. The bias is
the same for all of them: forward it is read once, and for the backward, whose registers are full, it is written out
once for each head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from accel.kernels.windows.logits import (
    INTS,
    Dropout,
    Sizes,
    drop,
    inverse_norm,
    invert_total,
    keep_tile,
    last_windows,
    load_bias,
    load_rows,
    locate,
    logits,
    rolled_round,
    rounding,
    store_rows,
    unnormalize,
)


@triton.jit(do_not_specialize=INTS)
def forward_tile_kernel(
    out_ptr, lse_ptr, qkv_ptr, bias, inputs,
    size_z, size_y, size_x, num_heads, windows, per_program, threshold,
    factors, CONFIG: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of ``per_program`` windows of a head."""
    N: tl.constexpr = CONFIG.tokens
    D: tl.constexpr = CONFIG.d
    WINDOW: tl.constexpr = CONFIG.window
    BLOCK: tl.constexpr = CONFIG.block
    DOT: tl.constexpr = CONFIG.dot
    sizes = Sizes(size_z, size_y, size_x)
    dropout = Dropout(inputs.seed, threshold, factors.keep_scale)
    head = tl.program_id(0) % num_heads  # heads side by side, so that rows of neighbouring heads share cache lines
    first = tl.program_id(0) // num_heads * per_program
    C = num_heads * D
    i = tl.arange(0, BLOCK)
    came_round = rolled_round(i, CONFIG)
    tile = load_bias(bias, head, num_heads, i, i, WINDOW)
    factor = factors.scale
    if inputs.head_scale is not None:
        factor = tl.load(inputs.head_scale + head).to(tl.float32)
    count = tl.minimum(per_program, windows - first)
    for step in tl.range(0, count, disable_licm=True):  # hoisted shared-memory addresses would crowd the registers
        window = first + step
        row, real = locate(window, i, sizes, CONFIG)
        q = load_rows(qkv_ptr, row, real, 3 * C, head * D, inputs.fill, CONFIG)
        k = load_rows(qkv_ptr, row, real, 3 * C, C + head * D, inputs.fill, CONFIG)
        v = load_rows(qkv_ptr, row, real, 3 * C, 2 * C + head * D, inputs.fill, CONFIG)
        inverse_q = None
        inverse_k = None
        if inputs.head_scale is not None:
            inverse_q, _ = inverse_norm(q)
            inverse_k, _ = inverse_norm(k)
        last = last_windows(window, sizes, CONFIG)
        s = logits(q, k, inverse_q, inverse_k, tile, factor, came_round, came_round, last, factors, CONFIG)
        top = tl.max(s, 1)
        p = tl.exp(s - top[:, None])
        total = tl.sum(p, 1)
        lse = top + tl.log(total)
        tl.store(lse_ptr + (window.to(tl.int64) * num_heads + head) * N + i, lse, mask=i < N)
        if inputs.seed is not None:
            keep = keep_tile(dropout, window, head, num_heads, i, i, N)
            p = tl.where(keep, p * factors.keep_scale, 0.0)
        o = tl.dot(p.to(DOT), v, input_precision="ieee") / total[:, None]
        store_rows(out_ptr, o, row, real, C, head * D, CONFIG)


@triton.jit(do_not_specialize=["num_heads"])
def expand_bias_kernel(tile_ptr, bias, num_heads, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Sixteen rows of a head's bias tile, fp32, -inf for keys past the window."""
    head = tl.program_id(0) % num_heads
    i = tl.program_id(0) // num_heads * 16 + tl.arange(0, 16)
    j = tl.arange(0, BLOCK)
    tile = load_bias(bias, head, num_heads, i, j, WINDOW)
    tl.store(tile_ptr + (head.to(tl.int64) * BLOCK + i[:, None]) * BLOCK + j[None, :], tile)


@triton.jit(do_not_specialize=INTS)
def backward_tile_kernel(
    grad_qkv_ptr, bias_part_ptr, head_part_ptr, fill_part_ptr, upstream, qkv_ptr, tile_ptr, inputs,
    size_z, size_y, size_x, num_heads, windows, per_program, threshold,
    factors, CONFIG: tl.constexpr,
):  # fmt: skip
    """Gradients of qkv of as many windows, and their sum of the small gradients."""
    N: tl.constexpr = CONFIG.tokens
    D: tl.constexpr = CONFIG.d
    BLOCK: tl.constexpr = CONFIG.block
    BLOCK_D: tl.constexpr = CONFIG.block_d
    DOT: tl.constexpr = CONFIG.dot
    sizes = Sizes(size_z, size_y, size_x)
    dropout = Dropout(inputs.seed, threshold, factors.keep_scale)
    head = tl.program_id(0) % num_heads
    part = tl.program_id(0) // num_heads
    first = part * per_program
    C = num_heads * D
    i = tl.arange(0, BLOCK)
    came_round = rolled_round(i, CONFIG)
    d = tl.arange(0, BLOCK_D)
    factor = factors.scale
    if inputs.head_scale is not None:
        factor = tl.load(inputs.head_scale + head).to(tl.float32)
    grad_bias = tl.zeros((BLOCK, BLOCK), tl.float32)
    grad_head = tl.zeros((BLOCK,), tl.float32)
    grad_fill_k = tl.zeros((BLOCK_D,), tl.float32)
    grad_fill_v = tl.zeros((BLOCK_D,), tl.float32)
    count = tl.minimum(per_program, windows - first)
    for step in tl.range(0, count, disable_licm=True):  # hoisted shared-memory addresses would crowd the registers
        window = first + step
        row, real = locate(window, i, sizes, CONFIG)
        q = load_rows(qkv_ptr, row, real, 3 * C, head * D, inputs.fill, CONFIG)
        k = load_rows(qkv_ptr, row, real, 3 * C, C + head * D, inputs.fill, CONFIG)
        v = load_rows(qkv_ptr, row, real, 3 * C, 2 * C + head * D, inputs.fill, CONFIG)
        grad_o = load_rows(upstream.grad_out, row, real, C, head * D, None, CONFIG)
        # +inf gives rows past the window weight 0, where 0 could give inf · 0
        lse = tl.load(upstream.lse + (window.to(tl.int64) * num_heads + head) * N + i, mask=i < N, other=float("inf"))
        inverse_q = None
        inverse_k = None
        if inputs.head_scale is not None:
            inverse_q, above_q = inverse_norm(q)
            inverse_k, above_k = inverse_norm(k)
        if tile_ptr is not None:
            # Read for every window, from L1: kept in registers it would make them spill.
            tile = tl.load(tile_ptr + head.to(tl.int64) * BLOCK * BLOCK + i[:, None] * BLOCK + i[None, :])
        else:
            tile = tl.where((i < N)[None, :], tl.zeros((BLOCK, BLOCK), tl.float32), float("-inf"))
        last = last_windows(window, sizes, CONFIG)
        s = logits(q, k, inverse_q, inverse_k, tile, factor, came_round, came_round, last, factors, CONFIG)
        p = tl.exp(s - lse[:, None])
        p *= invert_total(tl.sum(p, 1))[:, None]
        used, grad_p = drop(p, v, grad_o, dropout, window, head, num_heads, i, i, N)
        grad_v = tl.dot(tl.trans(used.to(DOT)), grad_o, input_precision="ieee")
        store_rows(grad_qkv_ptr, grad_v, row, real, 3 * C, 2 * C + head * D, CONFIG)
        grad_s = p * (grad_p - tl.sum(p * grad_p, 1)[:, None])
        if bias_part_ptr is not None:
            grad_bias += grad_s
        if inputs.head_scale is not None:
            scaled = grad_s * inverse_k[None, :]
            grad_q = tl.dot(scaled.to(DOT), k, input_precision="ieee")
            if head_part_ptr is not None:
                whole = grad_q
                if tl.float32 != DOT:
                    whole = tl.dot(rounding(scaled, DOT), k, grad_q, input_precision="ieee")
                grad_head += tl.sum(q.to(tl.float32) * inverse_q[:, None] * whole, 1)
            grad_s = grad_s.to(DOT)
            grad_q = unnormalize(grad_q * factor, q, inverse_q, above_q)
            unit_q = (q.to(tl.float32) * inverse_q[:, None]).to(DOT)
            grad_k = tl.dot(tl.trans(grad_s), unit_q, input_precision="ieee") * factor
            grad_k = unnormalize(grad_k, k, inverse_k, above_k)
        else:
            grad_s = grad_s.to(DOT)
            grad_q = tl.dot(grad_s, k, input_precision="ieee") * factor
            grad_k = tl.dot(tl.trans(grad_s), q, input_precision="ieee") * factor
        store_rows(grad_qkv_ptr, grad_q, row, real, 3 * C, head * D, CONFIG)
        store_rows(grad_qkv_ptr, grad_k, row, real, 3 * C, C + head * D, CONFIG)
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
