"""What the kernels of gated attention need to know of whole rows: whether all of one is finite, and the upstream
gradients of the sums of values, which are those of the output times the gate."""

from __future__ import annotations

import triton
import triton.language as tl

from accel.kernels._pairs import LAUNCH_INTS
from accel.kernels.linear.features import remainder
from accel.kernels.linear.gau_weights import rounded


@triton.jit(do_not_specialize=[*LAUNCH_INTS, "x_b", "x_h", "x_t", "tokens"])
def rows_kernel(
    bad_ptr, grad_ptr, rest_ptr, x_ptr, gate_ptr, x_b, x_h, x_t, gate_b, gate_h, gate_t, heads, tokens,
    CONFIG: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``bad_ptr``: NaN for each row of x, times the gate if there is one, that holds what is not finite, else 0.

    The product goes to ``grad_ptr`` as operands, contiguous, and what rounding left of it to ``rest_ptr``; None for
    what is not wanted.
    """
    tiles = tl.cdiv(tokens, BLOCK_M)
    unit = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    batch, head = unit // heads, unit % heads
    at = row.to(tl.int64)[:, None]
    x_ptr += batch * x_b + head * x_h
    worst = tl.zeros((BLOCK_M,), tl.float32)
    for first in tl.range(0, SIZE, BLOCK):
        c = first + tl.arange(0, BLOCK)[None, :]
        real = (row < tokens)[:, None] & (c < SIZE)
        x = tl.load(x_ptr + at * x_t + c, mask=real, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + batch * gate_b + head * gate_h + at * gate_t + c, mask=real, other=0.0)
            x *= gate.to(tl.float32)
        worst += tl.sum(x * 0.0, 1)  # NaN of what is not finite
        if grad_ptr is not None:
            place = (unit * tokens + at) * SIZE + c
            part = rounded(x, CONFIG)
            tl.store(grad_ptr + place, part.to(grad_ptr.dtype.element_ty), mask=real)
            if rest_ptr is not None:
                rest = remainder(x, part, CONFIG)
                tl.store(rest_ptr + place, rest.to(rest_ptr.dtype.element_ty), mask=real)
    tl.store(bad_ptr + unit * tokens + row, worst, mask=row < tokens)
