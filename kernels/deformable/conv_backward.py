"""The backward kernels of deformable convolution.

Channels come in segments, the largest runs that lie in one offset group and in one weight group. Units are pairs of an
image and an offset group. All tensors of channels are read channels-last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from accel.kernels.deformable.conv_taps import INTS, Step, load_shift, load_weight, tap_at
from accel.kernels.deformable.sampling import (
    cell_of,
    corners,
    entry_at,
    load_corners,
    mean,
    moments,
    output_tile,
    reach,
    store_records,
)


@triton.jit(do_not_specialize=INTS)
def shifts_kernel(
    grad_offset_ptr, grad_mask_ptr, grad_out_ptr, inputs,
    height, width, out_height, out_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    CONFIG: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    """Gradients of offset and mask: a program owns a tap, an offset group and a tile of outputs. The gradient of the
    samples, upstream gradient times weight, is made block by block and summed over channels at once. At exactly
    −1 the offset has a gradient if BORDER."""
    TAPS: tl.constexpr = CONFIG.taps
    C: tl.constexpr = CONFIG.channels
    OUT: tl.constexpr = CONFIG.out_channels
    OFFSET_GROUPS: tl.constexpr = CONFIG.offset_groups
    SEGMENT: tl.constexpr = CONFIG.segment
    C_PER_GROUP: tl.constexpr = CONFIG.c_per_group
    O_PER_GROUP: tl.constexpr = CONFIG.o_per_group
    C_SHARED: tl.constexpr = CONFIG.c_shared
    C_BLOCKS: tl.constexpr = CONFIG.c_blocks
    KW: tl.constexpr = CONFIG.kw
    TILE_H: tl.constexpr = CONFIG.tile_h
    TILE_W: tl.constexpr = CONFIG.tile_w
    BLOCK_C: tl.constexpr = CONFIG.block_c
    BLOCK_O: tl.constexpr = CONFIG.block_o
    EDGE_C: tl.constexpr = CONFIG.edge_c
    EDGE_O: tl.constexpr = CONFIG.edge_o
    DOT: tl.constexpr = CONFIG.dot
    program = tl.program_id(0)
    tap = program % TAPS
    offset_group = program // TAPS % OFFSET_GROUPS
    n, i, j, real = output_tile(program // (TAPS * OFFSET_GROUPS), out_height, out_width, TILE_H, TILE_W)
    outputs = out_height.to(tl.int64) * out_width
    p = i.to(tl.int64) * out_width + j
    index = (n * OFFSET_GROUPS + offset_group) * TAPS + tap
    shift_y, shift_x, factor = load_shift(inputs.offset, inputs.mask, index, outputs, p, real)
    step = Step(stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x)
    y, x = tap_at(tap, i, j, step, KW)
    y += shift_y
    x += shift_x
    at, inside, dy, dx, moves = corners(y, x, real, height, width)
    if not BORDER:
        moves = moves & (y > -1.0) & (x > -1.0)
    at *= C
    image_ptr = inputs.input + n * height * width * C
    down = width * C
    row = grad_out_ptr + (n * outputs + p) * OUT
    zero = tl.where(real, 0.0, 0.0)
    a, b, c, d = zero, zero, zero, zero
    for block in range(C_SHARED // SEGMENT * C_BLOCKS):
        within = block % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
        first = offset_group * C_SHARED + block // C_BLOCKS * SEGMENT
        group = first // C_PER_GROUP
        in_range = None
        if EDGE_C:
            in_range = within < SEGMENT
        grad = tl.zeros((TILE_H * TILE_W, BLOCK_C), tl.float32)
        for o0 in range(0, O_PER_GROUP, BLOCK_O):
            o = o0 + tl.arange(0, BLOCK_O)
            o_real = real[:, None]
            some = None
            if EDGE_O:
                o_real = o_real & (o < O_PER_GROUP)[None, :]
                some = (o < O_PER_GROUP)[:, None] & (within < SEGMENT)[None, :]
            elif EDGE_C:
                some = (within < SEGMENT)[None, :]
            o += group * O_PER_GROUP
            upstream = tl.load(row[:, None] + o[None, :], mask=o_real, other=0.0).to(tl.float32)
            channel = (first % C_PER_GROUP + within)[None, :]
            kernel = load_weight(inputs.weight, tap, channel, o[:, None], C_PER_GROUP, OUT, some)
            grad = tl.dot(upstream.to(DOT), kernel.to(DOT), grad, input_precision="ieee")
        pixels = load_corners(image_ptr, at, inside, C, down, first + within, in_range)
        more_a, more_b, more_c, more_d = moments(grad, pixels)
        a += more_a
        b += more_b
        c += more_c
        d += more_d
    if grad_mask_ptr is not None:
        tl.store(grad_mask_ptr + index * outputs + p, a + dx * b + dy * c + dx * dy * d, mask=real)
    if grad_offset_ptr is not None:
        at = 2 * index * outputs + p
        tl.store(grad_offset_ptr + at, tl.where(moves, factor * (c + dx * d), 0.0), mask=real)
        tl.store(grad_offset_ptr + at + outputs, tl.where(moves, factor * (b + dy * d), 0.0), mask=real)


@triton.jit(do_not_specialize=INTS)
def weight_kernel(
    parts_ptr, grad_out_ptr, input_ptr, offset_ptr, mask_ptr,
    height, width, out_height, out_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    tiles, tiles_per_part,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """A part of the weight's gradient: a program owns a tap, a block of channels and one of outputs channels, and sums
    over consecutive tiles of outputs. ``parts`` is (parts, K, O, C/g), summed afterwards."""
    TAPS: tl.constexpr = CONFIG.taps
    C: tl.constexpr = CONFIG.channels
    OUT: tl.constexpr = CONFIG.out_channels
    OFFSET_GROUPS: tl.constexpr = CONFIG.offset_groups
    SEGMENT: tl.constexpr = CONFIG.segment
    C_PER_GROUP: tl.constexpr = CONFIG.c_per_group
    O_PER_GROUP: tl.constexpr = CONFIG.o_per_group
    C_SHARED: tl.constexpr = CONFIG.c_shared
    C_BLOCKS: tl.constexpr = CONFIG.c_blocks
    O_BLOCKS: tl.constexpr = CONFIG.o_blocks
    KW: tl.constexpr = CONFIG.kw
    TILE_H: tl.constexpr = CONFIG.tile_h
    TILE_W: tl.constexpr = CONFIG.tile_w
    BLOCK_C: tl.constexpr = CONFIG.block_c
    BLOCK_O: tl.constexpr = CONFIG.block_o
    EDGE_C: tl.constexpr = CONFIG.edge_c
    EDGE_O: tl.constexpr = CONFIG.edge_o
    DOT: tl.constexpr = CONFIG.dot
    program = tl.program_id(0)
    o = program % O_BLOCKS * BLOCK_O + tl.arange(0, BLOCK_O)
    rest = program // O_BLOCKS
    within = rest % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    rest = rest // C_BLOCKS
    first = rest % (C // SEGMENT) * SEGMENT
    rest = rest // (C // SEGMENT)
    tap = rest % TAPS
    part = (rest // TAPS).to(tl.int64)
    group = first // C_PER_GROUP
    offset_group = first // C_SHARED
    o_real = o < O_PER_GROUP
    in_range = None
    if EDGE_C:
        in_range = within < SEGMENT
    o += group * O_PER_GROUP
    outputs = out_height.to(tl.int64) * out_width
    down = width * C
    step = Step(stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x)
    acc = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    start = (part * tiles_per_part).to(tl.int32)
    for tile in range(start, tl.minimum(start + tiles_per_part, tiles)):
        n, i, j, real = output_tile(tile, out_height, out_width, TILE_H, TILE_W)
        p = i.to(tl.int64) * out_width + j
        index = (n * OFFSET_GROUPS + offset_group) * TAPS + tap
        shift_y, shift_x, factor = load_shift(offset_ptr, mask_ptr, index, outputs, p, real)
        y, x = tap_at(tap, i, j, step, KW)
        at, inside, dy, dx, _ = corners(y + shift_y, x + shift_x, real, height, width)
        at *= C
        image_ptr = input_ptr + n * height * width * C
        sample = mean(load_corners(image_ptr, at, inside, C, down, first + within, in_range), dy, dx, factor)
        upstream_at = ((i * out_width + j) * OUT)[:, None] + o[None, :]
        upstream_real = real[:, None]
        if EDGE_O:
            upstream_real = upstream_real & o_real[None, :]
        upstream = tl.load(grad_out_ptr + n * outputs * OUT + upstream_at, mask=upstream_real, other=0.0).to(tl.float32)
        acc = tl.dot(tl.trans(upstream.to(DOT)), sample.to(DOT), acc, input_precision="ieee")
    at = ((part * TAPS + tap) * OUT + o)[:, None] * C_PER_GROUP + (first % C_PER_GROUP + within)[None, :]
    tl.store(parts_ptr + at, acc, mask=o_real[:, None] & (within < SEGMENT)[None, :])


@triton.jit(do_not_specialize=INTS)
def sample_keys_kernel(
    keys_ptr, offset_ptr,
    height, width, out_height, out_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    unit0,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The key of every sample of the units from ``unit0`` on, in the order (unit, tap, output)."""
    outputs = out_height.to(tl.int64) * out_width
    blocks = tl.cdiv(outputs, BLOCK)
    program = tl.program_id(0)
    segment = (program // blocks).to(tl.int64)
    p = program % blocks * BLOCK + tl.arange(0, BLOCK)
    real = p < outputs
    index = unit0.to(tl.int64) * (KH * KW) + segment
    shift_y, shift_x, _ = load_shift(offset_ptr, None, index, outputs, p, real)
    step = Step(stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x)
    y, x = tap_at((segment % (KH * KW)).to(tl.int32), p // out_width, p % out_width, step, KW)
    cells = (height + 1) * (width + 1)
    cell, near = cell_of(y + shift_y, x + shift_x, height, width)
    key = segment * (cells + 1) + tl.where(near, cell, cells)
    tl.store(keys_ptr + segment * outputs + p, key.to(tl.int32), mask=real)


@triton.jit(do_not_specialize=INTS)
def sample_records_kernel(
    row_ptr, record_ptr, order_ptr, offset_ptr, mask_ptr,
    height, width, out_height, out_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    unit0, samples,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The record of every sample in sorted order."""
    outputs = out_height.to(tl.int64) * out_width
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = e < samples
    sample = tl.load(order_ptr + e, mask=real, other=0)
    segment = sample // outputs
    p = sample - segment * outputs
    index = unit0.to(tl.int64) * (KH * KW) + segment
    shift_y, shift_x, factor = load_shift(offset_ptr, mask_ptr, index, outputs, p, real)
    step = Step(stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x)
    y, x = tap_at((segment % (KH * KW)).to(tl.int32), p // out_width, p % out_width, step, KW)
    store_records(row_ptr, record_ptr, e, p, y + shift_y, x + shift_x, factor, real, height, width)


@triton.jit(do_not_specialize=INTS)
def input_kernel(
    grad_input_ptr, grad_out_ptr, weight_ptr, row_ptr, record_ptr, starts_ptr,
    height, width, out_height, out_width, unit0,
    CONFIG: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Gradient of the input: a program owns a tile of pixels and a block of channels of one image.

    For each tap, every pixel sums the upstream gradient of the samples that reach it, times its weight in them: a tile
    (pixels, output channels), which the weight of the tap turns into one of input channels. Nothing of the size of
    samples times channels is stored.
    """
    TAPS: tl.constexpr = CONFIG.taps
    C: tl.constexpr = CONFIG.channels
    OUT: tl.constexpr = CONFIG.out_channels
    OFFSET_GROUPS: tl.constexpr = CONFIG.offset_groups
    SEGMENT: tl.constexpr = CONFIG.segment
    C_PER_GROUP: tl.constexpr = CONFIG.c_per_group
    O_PER_GROUP: tl.constexpr = CONFIG.o_per_group
    C_SHARED: tl.constexpr = CONFIG.c_shared
    C_BLOCKS: tl.constexpr = CONFIG.c_blocks
    O_BLOCKS: tl.constexpr = CONFIG.o_blocks
    TILE_H: tl.constexpr = CONFIG.tile_h
    TILE_W: tl.constexpr = CONFIG.tile_w
    BLOCK_C: tl.constexpr = CONFIG.block_c
    BLOCK_O: tl.constexpr = CONFIG.block_o
    EDGE_C: tl.constexpr = CONFIG.edge_c
    EDGE_O: tl.constexpr = CONFIG.edge_o
    DOT: tl.constexpr = CONFIG.dot
    program = tl.program_id(0)
    within = program % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    rest = program // C_BLOCKS
    segment = rest % (C_SHARED // SEGMENT)
    unit, pixel_y, pixel_x, real = output_tile(rest // (C_SHARED // SEGMENT), height, width, TILE_H, TILE_W)
    n = (unit0 + unit) // OFFSET_GROUPS
    first = ((unit0 + unit) % OFFSET_GROUPS).to(tl.int32) * C_SHARED + segment * SEGMENT
    group = first // C_PER_GROUP
    channel = first % C_PER_GROUP + within
    outputs = out_height.to(tl.int64) * out_width
    cells = (height + 1).to(tl.int64) * (width + 1)
    acc = tl.zeros((TILE_H * TILE_W, BLOCK_C), tl.float32)
    for turn in range(O_BLOCKS * TAPS):
        tap = turn % TAPS
        o = turn // TAPS * BLOCK_O + tl.arange(0, BLOCK_O)
        o_real = o < O_PER_GROUP
        o += group * O_PER_GROUP
        runs = reach(starts_ptr + (unit * TAPS + tap) * (cells + 1), pixel_y, pixel_x, width, real)
        count = runs[2] + runs[5]
        total = tl.zeros((TILE_H * TILE_W, BLOCK_O), tl.float32)
        for t0 in range(0, tl.max(count, 0), 2):
            for t in tl.static_range(2):  # two at a time are on their way
                e, at = entry_at(runs, t0 + t)
                row = tl.load(row_ptr + e, mask=t0 + t < count, other=-1)
                weight = tl.load(record_ptr + at, mask=t0 + t < count, other=0.0)
                row_real = (row >= 0)[:, None]
                if EDGE_O:
                    row_real = row_real & o_real[None, :]
                upstream = grad_out_ptr + ((n * outputs + row) * OUT)[:, None] + o[None, :]
                total += weight[:, None] * tl.load(upstream, mask=row_real, other=0.0).to(tl.float32)
        some = None
        if EDGE_C or EDGE_O:
            some = o_real[:, None] & (within < SEGMENT)[None, :]
        kernel = load_weight(weight_ptr, tap, channel[None, :], o[:, None], C_PER_GROUP, OUT, some)
        acc = tl.dot(total.to(DOT), kernel.to(DOT), acc, input_precision="ieee")
    pixel = pixel_y.to(tl.int64) * width + pixel_x
    c = (first + within).to(tl.int64)
    pixels = height.to(tl.int64) * width
    if LAST:
        at = (n * pixels + pixel)[:, None] * C + c[None, :]
    else:
        at = (n * C + c)[None, :] * pixels + pixel[:, None]
    tl.store(
        grad_input_ptr + at,
        acc.to(grad_input_ptr.dtype.element_ty),
        mask=real[:, None] & (within < SEGMENT)[None, :],
    )
