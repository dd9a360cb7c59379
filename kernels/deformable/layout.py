"""Memory formats: ``(N, C, H, W)`` to channels-last, at the speed of memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.kernels import _launch
from accel.kernels._launch import Launch

BLOCK = 64
"""Pixels and channels of a tile: 128 bytes a row on both sides in half precision."""


@triton.jit(do_not_specialize=["pixels"])
def transpose_kernel(out_ptr, x_ptr, pixels, C: tl.constexpr, BLOCK: tl.constexpr):
    """``(N, C, pixels)`` to ``(N, pixels, C)``: a program owns a tile of an image."""
    tiles_p = tl.cdiv(pixels, BLOCK)
    tiles_c: tl.constexpr = (C + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    p = program % tiles_p * BLOCK + tl.arange(0, BLOCK)
    rest = program // tiles_p
    c = rest % tiles_c * BLOCK + tl.arange(0, BLOCK)
    image = (rest // tiles_c).to(tl.int64) * C * pixels
    x = tl.load(
        x_ptr + image + c.to(tl.int64)[:, None] * pixels + p[None, :],
        mask=(c < C)[:, None] & (p < pixels)[None, :],
        other=0.0,
    )
    out_at = out_ptr + image + p.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(out_at, tl.trans(x), mask=(p < pixels)[:, None] & (c < C)[None, :])


def transpose_launch(out: Tensor, x: Tensor) -> Launch:
    n, channels, height, width = x.shape
    programs = n * triton.cdiv(height * width, BLOCK) * triton.cdiv(channels, BLOCK)
    arguments = {"out_ptr": out, "x_ptr": x, "pixels": height * width, "C": channels, "BLOCK": BLOCK}
    return Launch(transpose_kernel, programs, arguments, warps=4, stages=1)


def channels_last(x: Tensor) -> Tensor:
    """``x (N, C, H, W)`` as ``(N, H, W, C)``, contiguous; a copy only where it has another format.

    torch copies between formats element by element, several times slower than memory.
    """
    moved = x.permute(0, 2, 3, 1)
    if moved.is_contiguous() or _launch.INTERPRETING or not x.is_contiguous():
        return moved.contiguous()
    out = torch.empty_like(moved, memory_format=torch.contiguous_format)
    if out.numel():
        transpose_launch(out, x).run()
    return out
