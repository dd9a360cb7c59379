"""Window attention where a window goes in blocks: larger ones, fp32, wide heads, what one tile has no registers for.

A program owns a block of queries or keys, of one head of one window: online softmax forward, three backward kernels
(queries, keys, bias), so that every sum has one owner and a fixed order. The gradient of the bias table is made from
the dense one, whichever way the windows went.
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
def forward_blocks_kernel(
    out_ptr, lse_ptr, qkv_ptr, bias, inputs,
    size_z, size_y, size_x, num_heads, threshold,
    factors, CONFIG: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a block of queries."""
    N: tl.constexpr = CONFIG.tokens
    D: tl.constexpr = CONFIG.d
    WINDOW: tl.constexpr = CONFIG.window
    BLOCK: tl.constexpr = CONFIG.block
    BLOCK_D: tl.constexpr = CONFIG.block_d
    DOT: tl.constexpr = CONFIG.dot
    sizes = Sizes(size_z, size_y, size_x)
    dropout = Dropout(inputs.seed, threshold, factors.keep_scale)
    head = tl.program_id(0) % num_heads
    rest = tl.program_id(0) // num_heads
    i = rest % tl.cdiv(N, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    window = rest // tl.cdiv(N, BLOCK)
    C = num_heads * D
    round_i = rolled_round(i, CONFIG)
    last = last_windows(window, sizes, CONFIG)
    factor = factors.scale
    if inputs.head_scale is not None:
        factor = tl.load(inputs.head_scale + head).to(tl.float32)
    row_i, real_i = locate(window, i, sizes, CONFIG)
    q = load_rows(qkv_ptr, row_i, real_i, 3 * C, head * D, inputs.fill, CONFIG)
    inverse_q = None
    if inputs.head_scale is not None:
        inverse_q, _ = inverse_norm(q)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    o = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in tl.range(0, N, BLOCK, disable_licm=True):
        j = start + tl.arange(0, BLOCK)
        tile = load_bias(bias, head, num_heads, i, j, WINDOW)
        row_j, real_j = locate(window, j, sizes, CONFIG)
        k = load_rows(qkv_ptr, row_j, real_j, 3 * C, C + head * D, inputs.fill, CONFIG)
        v = load_rows(qkv_ptr, row_j, real_j, 3 * C, 2 * C + head * D, inputs.fill, CONFIG)
        inverse_k = None
        if inputs.head_scale is not None:
            inverse_k, _ = inverse_norm(k)
        round_j = rolled_round(j, CONFIG)
        s = logits(q, k, inverse_q, inverse_k, tile, factor, round_i, round_j, last, factors, CONFIG)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no key yet, where the bias is -inf
        shrink = tl.exp(top - base)
        p = tl.exp(s - base[:, None])
        total = total * shrink + tl.sum(p, 1)
        top = higher
        if inputs.seed is not None:
            keep = keep_tile(dropout, window, head, num_heads, i, j, N)
            p = tl.where(keep, p * factors.keep_scale, 0.0)
        o = o * shrink[:, None] + tl.dot(p.to(DOT), v, input_precision="ieee")
    lse = top + tl.log(total)
    tl.store(lse_ptr + (window.to(tl.int64) * num_heads + head) * N + i, lse, mask=i < N)
    store_rows(out_ptr, o / total[:, None], row_i, real_i, C, head * D, CONFIG)


@triton.jit(do_not_specialize=INTS)
def queries_kernel(
    grad_qkv_ptr, head_part_ptr, upstream, qkv_ptr, bias, inputs,
    size_z, size_y, size_x, num_heads, threshold,
    factors, CONFIG: tl.constexpr,
):  # fmt: skip
    """Gradient of q, 1 / total and delta (the sum of p · its gradient) of each query, and head_scale's part."""
    N: tl.constexpr = CONFIG.tokens
    D: tl.constexpr = CONFIG.d
    WINDOW: tl.constexpr = CONFIG.window
    BLOCK: tl.constexpr = CONFIG.block
    BLOCK_D: tl.constexpr = CONFIG.block_d
    DOT: tl.constexpr = CONFIG.dot
    sizes = Sizes(size_z, size_y, size_x)
    dropout = Dropout(inputs.seed, threshold, factors.keep_scale)
    head = tl.program_id(0) % num_heads
    rest = tl.program_id(0) // num_heads
    i = rest % tl.cdiv(N, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    window = rest // tl.cdiv(N, BLOCK)
    C = num_heads * D
    round_i = rolled_round(i, CONFIG)
    last = last_windows(window, sizes, CONFIG)
    factor = factors.scale
    if inputs.head_scale is not None:
        factor = tl.load(inputs.head_scale + head).to(tl.float32)
    row_i, real_i = locate(window, i, sizes, CONFIG)
    q = load_rows(qkv_ptr, row_i, real_i, 3 * C, head * D, inputs.fill, CONFIG)
    grad_o = load_rows(upstream.grad_out, row_i, real_i, C, head * D, None, CONFIG)
    at_i = (window.to(tl.int64) * num_heads + head) * N + i
    lse = tl.load(upstream.lse + at_i, mask=i < N, other=float("inf"))
    inverse_q = None
    if inputs.head_scale is not None:
        inverse_q, _ = inverse_norm(q)
    # Twice over the keys: delta from the rounded output would leave its rounding where a weight is near 1.
    delta = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, N, BLOCK, disable_licm=True):
        j = start + tl.arange(0, BLOCK)
        tile = load_bias(bias, head, num_heads, i, j, WINDOW)
        row_j, real_j = locate(window, j, sizes, CONFIG)
        k = load_rows(qkv_ptr, row_j, real_j, 3 * C, C + head * D, inputs.fill, CONFIG)
        v = load_rows(qkv_ptr, row_j, real_j, 3 * C, 2 * C + head * D, inputs.fill, CONFIG)
        inverse_k = None
        if inputs.head_scale is not None:
            inverse_k, _ = inverse_norm(k)
        round_j = rolled_round(j, CONFIG)
        s = logits(q, k, inverse_q, inverse_k, tile, factor, round_i, round_j, last, factors, CONFIG)
        p = tl.exp(s - lse[:, None])
        _used, grad_p = drop(p, v, grad_o, dropout, window, head, num_heads, i, j, N)
        total += tl.sum(p, 1)
        delta += tl.sum(p * grad_p, 1)
    inverse_total = invert_total(total)
    delta *= inverse_total
    tl.store(upstream.delta + at_i, delta, mask=i < N)
    tl.store(upstream.inverse_total + at_i, inverse_total, mask=i < N)
    along = tl.zeros((BLOCK,), tl.float32)
    grad_q = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in tl.range(0, N, BLOCK, disable_licm=True):
        j = start + tl.arange(0, BLOCK)
        tile = load_bias(bias, head, num_heads, i, j, WINDOW)
        row_j, real_j = locate(window, j, sizes, CONFIG)
        k = load_rows(qkv_ptr, row_j, real_j, 3 * C, C + head * D, inputs.fill, CONFIG)
        v = load_rows(qkv_ptr, row_j, real_j, 3 * C, 2 * C + head * D, inputs.fill, CONFIG)
        inverse_k = None
        if inputs.head_scale is not None:
            inverse_k, _ = inverse_norm(k)
        round_j = rolled_round(j, CONFIG)
        s = logits(q, k, inverse_q, inverse_k, tile, factor, round_i, round_j, last, factors, CONFIG)
        p = tl.exp(s - lse[:, None]) * inverse_total[:, None]
        _used, grad_p = drop(p, v, grad_o, dropout, window, head, num_heads, i, j, N)
        grad_s = p * (grad_p - delta[:, None])
        if inputs.head_scale is not None:
            grad_s *= inverse_k[None, :]
        if head_part_ptr is not None and tl.float32 != DOT:
            lost = tl.dot(rounding(grad_s, DOT), k, input_precision="ieee")
            along += tl.sum(q.to(tl.float32) * inverse_q[:, None] * lost, 1)
        grad_q += tl.dot(grad_s.to(DOT), k, input_precision="ieee")
    if inputs.head_scale is not None:
        # read again: kept over both loops it would make fp32 heads of 128 spill
        q = load_rows(qkv_ptr, row_i, real_i, 3 * C, head * D, inputs.fill, CONFIG)
        inverse_q, above_q = inverse_norm(q)
        if head_part_ptr is not None:
            along += tl.sum(q.to(tl.float32) * inverse_q[:, None] * grad_q, 1)
            tl.store(head_part_ptr + tl.program_id(0), tl.sum(along, 0))
        grad_q = unnormalize(grad_q, q, inverse_q, above_q)
    store_rows(grad_qkv_ptr, grad_q * factor, row_i, real_i, 3 * C, head * D, CONFIG)


@triton.jit(do_not_specialize=INTS)
def keys_kernel(
    grad_qkv_ptr, fill_part_ptr, upstream, qkv_ptr, bias, inputs,
    size_z, size_y, size_x, num_heads, threshold,
    factors, CONFIG: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v, and what padded tokens of the block receive."""
    N: tl.constexpr = CONFIG.tokens
    D: tl.constexpr = CONFIG.d
    WINDOW: tl.constexpr = CONFIG.window
    BLOCK: tl.constexpr = CONFIG.block
    BLOCK_D: tl.constexpr = CONFIG.block_d
    DOT: tl.constexpr = CONFIG.dot
    sizes = Sizes(size_z, size_y, size_x)
    dropout = Dropout(inputs.seed, threshold, factors.keep_scale)
    head = tl.program_id(0) % num_heads
    rest = tl.program_id(0) // num_heads
    j = rest % tl.cdiv(N, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    window = rest // tl.cdiv(N, BLOCK)
    C = num_heads * D
    round_j = rolled_round(j, CONFIG)
    last = last_windows(window, sizes, CONFIG)
    factor = factors.scale
    if inputs.head_scale is not None:
        factor = tl.load(inputs.head_scale + head).to(tl.float32)
    row_j, real_j = locate(window, j, sizes, CONFIG)
    k = load_rows(qkv_ptr, row_j, real_j, 3 * C, C + head * D, inputs.fill, CONFIG)
    v = load_rows(qkv_ptr, row_j, real_j, 3 * C, 2 * C + head * D, inputs.fill, CONFIG)
    inverse_k = None
    if inputs.head_scale is not None:
        inverse_k, above_k = inverse_norm(k)
    grad_k = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in tl.range(0, N, BLOCK, disable_licm=True):
        i = start + tl.arange(0, BLOCK)
        tile = load_bias(bias, head, num_heads, i, j, WINDOW)
        row_i, real_i = locate(window, i, sizes, CONFIG)
        q = load_rows(qkv_ptr, row_i, real_i, 3 * C, head * D, inputs.fill, CONFIG)
        grad_o = load_rows(upstream.grad_out, row_i, real_i, C, head * D, None, CONFIG)
        at_i = (window.to(tl.int64) * num_heads + head) * N + i
        lse = tl.load(upstream.lse + at_i, mask=i < N, other=float("inf"))
        delta = tl.load(upstream.delta + at_i, mask=i < N, other=0.0)
        inverse_total = tl.load(upstream.inverse_total + at_i, mask=i < N, other=0.0)
        inverse_q = None
        if inputs.head_scale is not None:
            inverse_q, _ = inverse_norm(q)
        round_i = rolled_round(i, CONFIG)
        s = logits(q, k, inverse_q, inverse_k, tile, factor, round_i, round_j, last, factors, CONFIG)
        p = tl.exp(s - lse[:, None]) * inverse_total[:, None]
        used, grad_p = drop(p, v, grad_o, dropout, window, head, num_heads, i, j, N)
        grad_v += tl.dot(tl.trans(used.to(DOT)), grad_o, input_precision="ieee")
        grad_s = (p * (grad_p - delta[:, None])).to(DOT)
        if inputs.head_scale is not None:
            q = (q.to(tl.float32) * inverse_q[:, None]).to(DOT)
        grad_k += tl.dot(tl.trans(grad_s), q, input_precision="ieee")
    grad_k *= factor
    if inputs.head_scale is not None:
        grad_k = unnormalize(grad_k, k, inverse_k, above_k)
    store_rows(grad_qkv_ptr, grad_k, row_j, real_j, 3 * C, C + head * D, CONFIG)
    store_rows(grad_qkv_ptr, grad_v, row_j, real_j, 3 * C, 2 * C + head * D, CONFIG)
    if fill_part_ptr is not None:
        d = tl.arange(0, BLOCK_D)
        padded = ((j < N) & ~real_j)[:, None]
        at = rest.to(tl.int64) * 2 * C + head * D + d
        tl.store(fill_part_ptr + at, tl.sum(tl.where(padded, grad_k, 0.0), 0), mask=d < D)
        tl.store(fill_part_ptr + at + C, tl.sum(tl.where(padded, grad_v, 0.0), 0), mask=d < D)


@triton.jit(do_not_specialize=INTS)
def bias_kernel(
    bias_part_ptr, upstream, qkv_ptr, bias, inputs,
    size_z, size_y, size_x, num_heads, windows, per_program, threshold,
    factors, CONFIG: tl.constexpr,
):  # fmt: skip
    """One tile of the dense bias gradient, summed over `per_program` consecutive windows."""
    N: tl.constexpr = CONFIG.tokens
    D: tl.constexpr = CONFIG.d
    WINDOW: tl.constexpr = CONFIG.window
    BLOCK: tl.constexpr = CONFIG.block
    sizes = Sizes(size_z, size_y, size_x)
    dropout = Dropout(inputs.seed, threshold, factors.keep_scale)
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    head = tl.program_id(0) % num_heads
    rest = tl.program_id(0) // num_heads
    i = rest % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    j = rest // BLOCKS % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    part = rest // (BLOCKS * BLOCKS)
    first = part * per_program
    C = num_heads * D
    round_i = rolled_round(i, CONFIG)
    round_j = rolled_round(j, CONFIG)
    factor = factors.scale
    if inputs.head_scale is not None:
        factor = tl.load(inputs.head_scale + head).to(tl.float32)
    tile = load_bias(bias, head, num_heads, i, j, WINDOW)
    grad_bias = tl.zeros((BLOCK, BLOCK), tl.float32)
    count = tl.minimum(per_program, windows - first)
    for step in tl.range(0, count, disable_licm=True):  # hoisted shared-memory addresses would crowd the registers
        window = first + step
        row_i, real_i = locate(window, i, sizes, CONFIG)
        row_j, real_j = locate(window, j, sizes, CONFIG)
        q = load_rows(qkv_ptr, row_i, real_i, 3 * C, head * D, inputs.fill, CONFIG)
        k = load_rows(qkv_ptr, row_j, real_j, 3 * C, C + head * D, inputs.fill, CONFIG)
        inverse_q = None
        inverse_k = None
        if inputs.head_scale is not None:
            inverse_q, _ = inverse_norm(q)
            inverse_k, _ = inverse_norm(k)
        at_i = (window.to(tl.int64) * num_heads + head) * N + i
        lse = tl.load(upstream.lse + at_i, mask=i < N, other=float("inf"))
        delta = tl.load(upstream.delta + at_i, mask=i < N, other=0.0)
        inverse_total = tl.load(upstream.inverse_total + at_i, mask=i < N, other=0.0)
        last = last_windows(window, sizes, CONFIG)
        s = logits(q, k, inverse_q, inverse_k, tile, factor, round_i, round_j, last, factors, CONFIG)
        v = load_rows(qkv_ptr, row_j, real_j, 3 * C, 2 * C + head * D, inputs.fill, CONFIG)
        grad_o = load_rows(upstream.grad_out, row_i, real_i, C, head * D, None, CONFIG)
        p = tl.exp(s - lse[:, None]) * inverse_total[:, None]
        _used, grad_p = drop(p, v, grad_o, dropout, window, head, num_heads, i, j, N)
        grad_bias += p * (grad_p - delta[:, None])
    at = ((part.to(tl.int64) * num_heads + head) * N + i[:, None]) * N + j[None, :]
    tl.store(bias_part_ptr + at, grad_bias, mask=(i < N)[:, None] & (j < N)[None, :])


@triton.jit(do_not_specialize=["num_heads"])
def reduce_table_kernel(
    grad_table_ptr, grad_bias_ptr, num_heads, WINDOW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """ROWS rows of the table's gradient from the dense one: the sum over the pairs of tokens that far apart."""
    WZ: tl.constexpr = WINDOW.z
    WY: tl.constexpr = WINDOW.y
    WX: tl.constexpr = WINDOW.x
    N: tl.constexpr = WINDOW.tokens
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
