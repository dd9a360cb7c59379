"""Rows of tokens to rows of experts and back in Triton. Every row has one program that writes it, with no atomics.

``combine`` sums the rows of a token's choices; ``spread`` writes the rows of the experts, each from its token, and next
to it the product of that token with a row of another tensor, which is the gradient of a weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.backends import KERNEL_DTYPES, why_not_gpu
from accel.kernels import _launch
from accel.kernels._launch import Launch

INTS = ["tokens", "choices", "rows", "channels"]
"""Integers on whose values no kernel is specialised: T, K, N and C."""


@dataclass(frozen=True)
class Config:
    """The tile of a program: rows (of tokens, or of experts) and channels."""

    block_rows: int
    block_c: int


@triton.jit(do_not_specialize=INTS)
def combine_kernel(
    out_ptr, rows_ptr, weights_ptr, destination_ptr, tokens, choices, rows, channels, CONFIG: tl.constexpr
):  # fmt: skip
    """Some channels of some tokens."""
    T: tl.constexpr = CONFIG.block_rows
    C: tl.constexpr = CONFIG.block_c
    blocks = tl.cdiv(channels, C)
    t = (tl.program_id(0) // blocks).to(tl.int64) * T + tl.arange(0, T)
    c = tl.program_id(0) % blocks * C + tl.arange(0, C)
    inside = t < tokens
    acc = tl.zeros((T, C), tl.float32)
    for k in range(choices):
        at = t * choices + k
        n = tl.load(destination_ptr + at, mask=inside, other=-1)
        there = (n >= 0) & (n < rows)
        mask = there[:, None] & (c < channels)[None, :]
        row = tl.load(rows_ptr + n[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            row *= tl.load(weights_ptr + at, mask=there, other=0.0)[:, None]
        acc += row
    mask = inside[:, None] & (c < channels)[None, :]
    tl.store(out_ptr + t[:, None] * channels + c[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=INTS)
def spread_kernel(
    rows_ptr, products_ptr, from_ptr, y_ptr, weights_ptr, source_ptr, destination_ptr, tokens, choices, rows, channels,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Some rows of experts, all channels of them."""
    N: tl.constexpr = CONFIG.block_rows
    C: tl.constexpr = CONFIG.block_c
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = n < rows
    i = tl.load(source_ptr + n, mask=inside, other=-1)
    there = (i >= 0) & (i < tokens.to(tl.int64) * choices)
    there = there & (tl.load(destination_ptr + i, mask=there, other=-1) == n)
    token = tl.where(there, i, 0) // choices
    acc = tl.zeros((N, C), tl.float32)
    for c0 in range(0, channels, C):
        c = c0 + tl.arange(0, C)
        mask = (c < channels)[None, :]
        some = mask & there[:, None]
        x = tl.load(from_ptr + token[:, None] * channels + c[None, :], mask=some, other=0.0).to(tl.float32)
        if products_ptr is not None:
            y = tl.load(y_ptr + n[:, None] * channels + c[None, :], mask=some, other=0.0).to(tl.float32)
            acc += x * y
        if weights_ptr is not None:
            x *= tl.load(weights_ptr + i, mask=there, other=0.0)[:, None]
        row = tl.where(some, x, 0.0).to(rows_ptr.dtype.element_ty)
        tl.store(rows_ptr + n[:, None] * channels + c[None, :], row, mask=mask & inside[:, None])
    if products_ptr is not None:
        tl.store(products_ptr + i, tl.sum(acc, 1), mask=there)


# --- launches. Tiles are chosen by registers and for loads of 16 bytes a thread, not measured ---


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtypes are judged by the op. ``torch.compile`` traces through this."""
    reason = why_not_gpu(args[0], _launch.INTERPRETING)
    if reason is not None:
        return reason
    rows, channels = args[0].shape
    if rows * -(-channels // 512) >= 2**31:
        return f"{tuple(args[0].shape)} are more rows and channels than one launch can number"
    return None


def _combine_launch(out: Tensor, rows: Tensor, weights: Tensor | None, destination: Tensor) -> Launch:
    (tokens, choices), channels = destination.shape, rows.shape[1]
    block = _launch.power_of_two(channels, 16, 512)
    config = Config(max(1, 1024 // block), block)
    programs = triton.cdiv(tokens, config.block_rows) * triton.cdiv(channels, block)
    return _launch.launch(
        combine_kernel, programs, 4, out_ptr=out, rows_ptr=rows, weights_ptr=weights, destination_ptr=destination,
        tokens=tokens, choices=choices, rows=rows.shape[0], channels=channels, CONFIG=config,
    )  # fmt: skip


def _spread_launch(
    rows: Tensor, products: Tensor | None, tokens: Tensor, y: Tensor | None, weights: Tensor | None, source: Tensor,
    destination: Tensor,
) -> Launch:  # fmt: skip
    block = _launch.power_of_two(tokens.shape[1], 16, 512)
    config = Config(max(1, 1024 // block), block)
    return _launch.launch(
        spread_kernel, triton.cdiv(rows.shape[0], config.block_rows), 4, rows_ptr=rows, products_ptr=products,
        from_ptr=tokens, y_ptr=y, weights_ptr=weights, source_ptr=source, destination_ptr=destination,
        tokens=destination.shape[0], choices=destination.shape[1], rows=rows.shape[0], channels=rows.shape[1],
        CONFIG=config,
    )  # fmt: skip


def combine(rows: Tensor, weights: Tensor | None, destination: Tensor) -> Tensor:
    """``(T, C)``: the sum of the rows of each token's choices, each times its weight."""
    size = (destination.shape[0], rows.shape[1])
    with _launch.device_of(rows):
        out = torch.empty(size, dtype=_launch.store_dtype(rows.dtype), device=rows.device)
        _combine_launch(out, rows, weights, destination).run()
    return out.to(rows.dtype)


def spread(
    tokens: Tensor, y: Tensor | None, weights: Tensor | None, source: Tensor, destination: Tensor
) -> tuple[Tensor, Tensor]:
    """The rows ``(N, C)``, each its token times its weight, zeros where it is of none; and with ``y`` (N, C) the
    products of tokens and its rows, ``(T, K)``."""
    size = (source.shape[0], tokens.shape[1])
    with _launch.device_of(tokens):
        rows = torch.empty(size, dtype=_launch.store_dtype(tokens.dtype), device=tokens.device)
        shape = destination.shape if y is not None else (0,)
        products = torch.zeros(shape, dtype=torch.float32, device=tokens.device)
        if size[0] > 0:
            given = None if y is None else products
            _spread_launch(rows, given, tokens, y, weights, source, destination).run()
    return rows.to(tokens.dtype), products


SIZES = ((4096, 8, 2048), (3, 2, 70))  # T, K, C


def combine_cases(weighted: bool) -> Iterator[_launch.CompileCase]:
    for dtype, (T, K, C) in itertools.product(KERNEL_DTYPES, SIZES):
        x, rows, weights, destination, _ = _shapes(T, K, C, dtype)
        name = f"{str(dtype)[6:]} {C} channels{' weighted' if weighted else ''}"
        yield _combine_launch(x, rows, weights if weighted else None, destination).case(name)


def spread_cases(weighted: bool) -> Iterator[_launch.CompileCase]:
    for dtype, (T, K, C) in itertools.product(KERNEL_DTYPES, SIZES):
        x, rows, weights, destination, source = _shapes(T, K, C, dtype)
        name = f"{str(dtype)[6:]} {C} channels{' weighted' if weighted else ''}"
        y, factors = (rows, weights) if weighted else (None, None)
        yield _spread_launch(rows, factors, x, y, factors, source, destination).case(name)


def _shapes(T: int, K: int, C: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, rows = [torch.empty((n, C), dtype=dtype, device="meta") for n in (T, T * K)]
    weights = torch.empty((T, K), dtype=torch.float32, device="meta")
    destination, source = [torch.empty(size, dtype=torch.int64, device="meta") for size in ((T, K), (T * K,))]
    return x, rows, weights, destination, source
