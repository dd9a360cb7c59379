"""The forward kernel of deformable convolution: an implicit matrix product.

A program walks over taps and input channels: positions are computed once for a tap, the four pixels are gathered
channels-last, where channels lie together, and their mean enters the tensor cores in the dtype of the input, rounded
once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from accel.kernels.deformable.conv_taps import INTS, Step, load_shift, load_weight, tap_at
from accel.kernels.deformable.sampling import corners, load_corners, mean, output_tile


@triton.jit(do_not_specialize=INTS)
def forward_kernel(
    out_ptr, inputs, bias_ptr,
    height, width, out_height, out_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    CONFIG: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Outputs: a program owns a tile of them and a block of output channels."""
    TAPS: tl.constexpr = CONFIG.taps
    C: tl.constexpr = CONFIG.channels
    OUT: tl.constexpr = CONFIG.out_channels
    GROUPS: tl.constexpr = CONFIG.groups
    OFFSET_GROUPS: tl.constexpr = CONFIG.offset_groups
    SEGMENT: tl.constexpr = CONFIG.segment
    C_PER_GROUP: tl.constexpr = CONFIG.c_per_group
    O_PER_GROUP: tl.constexpr = CONFIG.o_per_group
    C_SHARED: tl.constexpr = CONFIG.c_shared
    O_BLOCKS: tl.constexpr = CONFIG.o_blocks
    KW: tl.constexpr = CONFIG.kw
    TILE_H: tl.constexpr = CONFIG.tile_h
    TILE_W: tl.constexpr = CONFIG.tile_w
    BLOCK_C: tl.constexpr = CONFIG.block_c
    BLOCK_O: tl.constexpr = CONFIG.block_o
    EDGE_C: tl.constexpr = CONFIG.edge_c
    EDGE_O: tl.constexpr = CONFIG.edge_o
    DOT: tl.constexpr = CONFIG.dot
    STEPS: tl.constexpr = C_PER_GROUP // SEGMENT * TAPS
    # blocks of output channels side by side, then tiles: neighbours sample the same pixels
    program = tl.program_id(0)
    o = program % O_BLOCKS * BLOCK_O + tl.arange(0, BLOCK_O)
    rest = program // O_BLOCKS
    group = rest % GROUPS
    n, i, j, real = output_tile(rest // GROUPS, out_height, out_width, TILE_H, TILE_W)
    o_real = o < O_PER_GROUP
    o += group * O_PER_GROUP
    outputs = out_height.to(tl.int64) * out_width
    p = i.to(tl.int64) * out_width + j
    image_ptr = inputs.input + n * height * width * C
    down = width * C
    step = Step(stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x)
    acc = tl.zeros((TILE_H * TILE_W, BLOCK_O), tl.float32)
    offset_group = group * C_PER_GROUP // C_SHARED
    shift_y, shift_x, factor = load_shift(
        inputs.offset, inputs.mask, (n * OFFSET_GROUPS + offset_group) * TAPS, outputs, p, real
    )
    for turn in range(STEPS):
        tap = turn % TAPS
        first = group * C_PER_GROUP + turn // TAPS * SEGMENT
        y, x = tap_at(tap, i, j, step, KW)
        at, inside, dy, dx, _ = corners(y + shift_y, x + shift_x, real, height, width)
        at *= C
        now = factor
        # those of the next turn are on their way while this one's pixels are gathered
        following = tl.minimum(turn + 1, STEPS - 1)
        offset_group = (group * C_PER_GROUP + following // TAPS * SEGMENT) // C_SHARED
        index = (n * OFFSET_GROUPS + offset_group) * TAPS + following % TAPS
        shift_y, shift_x, factor = load_shift(inputs.offset, inputs.mask, index, outputs, p, real)
        for c0 in range(0, SEGMENT, BLOCK_C):
            within = c0 + tl.arange(0, BLOCK_C)
            in_range = None
            if EDGE_C:
                in_range = within < SEGMENT
            some = None
            if EDGE_C or EDGE_O:
                some = (within < SEGMENT)[:, None] & o_real[None, :]
            channel = (first % C_PER_GROUP + within)[:, None]
            kernel = load_weight(inputs.weight, tap, channel, o[None, :], C_PER_GROUP, OUT, some)
            sample = mean(load_corners(image_ptr, at, inside, C, down, first + within, in_range), dy, dx, now)
            acc = tl.dot(sample.to(DOT), kernel.to(DOT), acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o_real, other=0.0)[None, :]
    p = i * out_width + j
    if LAST:
        at = p[:, None] * OUT + o[None, :]
    else:
        at = o[None, :] * (out_height * out_width) + p[:, None]
    tl.store(out_ptr + n * outputs * OUT + at, acc.to(out_ptr.dtype.element_ty), mask=real[:, None] & o_real[None, :])
