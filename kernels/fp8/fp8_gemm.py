"""Products of eight-bit numbers in Triton. Every tile of the result has one program that writes it, and its sums have
one order, with no atomics.

A chunk of 128 columns is one ``tl.dot`` without accumulator, whose fp32 result is then multiplied with its scales and
added up: tensor cores of Ada and Hopper keep some 14 bits of a sum. Where there are none for eight bits, codes become
fp16, which holds all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from accel.backends import KERNEL_DTYPES, why_not_gpu
from accel.kernels import _launch
from accel.kernels._launch import Launch
from accel.kernels.fp8.codes import FORMATS, Format, decode
from accel.ops.fp8.fp8_gemm import OUT_DTYPES, Args

__all__ = ["compile_cases", "forward", "why_not"]

INTS = ["rows", "outputs", "depth", "stride", "a_rows", "b_rows", "span", "chunks"]
"""Integers on whose values no kernel is specialised: M, N, K, and what follows from blocks."""
UNIT = tl.constexpr(16)
"""What rows of operands in memory are multiples of, and are given in, so that 16 bytes are read at once."""
NEIGHBOURS = tl.constexpr(8)
"""Tiles of rows that take the same columns at about the same time, which the L2 cache then holds."""


@dataclass(frozen=True)
class Config:
    """The tile of a program: rows, columns, and how much of what is summed over it takes at once."""

    rows: int
    outputs: int
    depth: int
    dot: Any
    """What tensor cores multiply; None for codes as they are."""
    a_format: Format | None
    """None where a has plain numbers."""
    b_format: Format
    b_turned: bool
    chunks: bool
    """Whether each chunk has scales of its own."""
    a_one: bool
    b_one: bool
    """Whether the rows of a tile have one scale."""
    out_unit: int
    """What the number of columns is a multiple of, and is given in."""


# --- the kernel ---


@triton.jit
def as_multiplied(ptr, FORMAT: tl.constexpr, DOT: tl.constexpr):
    """Codes as numbers of eight bits where those are multiplied: cast in memory, not in registers, they go from shared
    memory to tensor cores."""
    if FORMAT is None or DOT is not None:
        return ptr
    else:
        return ptr.to(tl.pointer_type(tl.float8e5 if FORMAT.infinite else tl.float8e4nv), bitcast=True)


@triton.jit
def operand(x, FORMAT: tl.constexpr, DOT: tl.constexpr):
    """Codes or plain numbers as ``tl.dot`` takes them."""
    if DOT is not None:
        return x.to(DOT) if FORMAT is None else decode(x, FORMAT, DOT)
    elif x.dtype.is_uint8():
        return x.to(tl.float8e5 if FORMAT.infinite else tl.float8e4nv, bitcast=True)
    else:
        return x


@triton.jit
def scales_of_a(ptr, first, chunk, rows, block, chunks, CONFIG: tl.constexpr):
    """The scales of a chunk of a tile's rows, to be broadcast."""
    if ptr is None:
        return 1.0
    elif CONFIG.a_one:
        return tl.load(ptr + first // block * chunks + chunk)
    else:
        row = first + tl.arange(0, CONFIG.rows)
        return tl.load(ptr + row * chunks + chunk, mask=row < rows, other=0.0)[:, None]


@triton.jit
def scales_of_b(ptr, first, chunk, outputs, block, chunks, CONFIG: tl.constexpr):
    """The same of its columns, whose scales lie side by side: a thread that kept an address for each would spill."""
    if CONFIG.b_one:
        return tl.load(ptr + first // block * chunks + chunk)
    else:
        column = first + tl.arange(0, CONFIG.outputs)
        return tl.load(ptr + tl.cast(chunk, tl.int64) * outputs + column, mask=column < outputs, other=0.0)[None, :]


@triton.jit(do_not_specialize=INTS)
def gemm_kernel(
    out_ptr, a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, rows, outputs, depth, stride, a_rows, b_rows, span,
    chunks, CONFIG: tl.constexpr,
):  # fmt: skip
    """A tile of the product. Scales are for ``span`` columns; ``stride`` is that of b."""
    depth *= UNIT
    stride *= UNIT
    OUT_UNIT: tl.constexpr = CONFIG.out_unit
    outputs *= OUT_UNIT
    ROWS: tl.constexpr = CONFIG.rows
    OUTPUTS: tl.constexpr = CONFIG.outputs
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(outputs, OUTPUTS)
    above = tl.program_id(0) // (NEIGHBOURS * across) * NEIGHBOURS
    beside = tl.minimum(down - above, NEIGHBOURS)
    within = tl.program_id(0) % (NEIGHBOURS * across)
    first_row = (above + within % beside).to(tl.int64) * ROWS
    first_column = (within // beside).to(tl.int64) * OUTPUTS
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, OUTPUTS)
    a_ptr = as_multiplied(a_ptr, CONFIG.a_format, CONFIG.dot)
    if not CONFIG.b_turned:  # Hopper's tensor cores read rows: through registers it is turned while others are read
        b_ptr = as_multiplied(b_ptr, CONFIG.b_format, CONFIG.dot)
    acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for k0 in range(0, depth, CONFIG.depth):
        k = k0 + tl.arange(0, CONFIG.depth)
        inside = k < depth
        a = tl.load(a_ptr + row[:, None] * depth + k[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        if CONFIG.b_turned:
            at, there = k[:, None].to(tl.int64) * stride + column[None, :], column < stride
        else:
            at, there = column[None, :] * stride + k[:, None], column < outputs
        b = tl.load(b_ptr + at, mask=inside[:, None] & there[None, :], other=0.0)
        a, b = operand(a, CONFIG.a_format, CONFIG.dot), operand(b, CONFIG.b_format, CONFIG.dot)
        part = tl.dot(a, b, input_precision="ieee")
        if CONFIG.chunks:
            scale = scales_of_a(a_scale_ptr, first_row, k0 // span, rows, a_rows, chunks, CONFIG)
            part *= scale * scales_of_b(b_scale_ptr, first_column, k0 // span, outputs, b_rows, chunks, CONFIG)
        elif CONFIG.dot is None:  # something must stand between the two sums, or Triton makes them one
            part *= scales_of_a(a_scale_ptr, first_row, 0, rows, a_rows, chunks, CONFIG)
        acc += part
    if not CONFIG.chunks:
        acc *= scales_of_b(b_scale_ptr, first_column, 0, outputs, b_rows, chunks, CONFIG)
        if CONFIG.dot is not None:
            acc *= scales_of_a(a_scale_ptr, first_row, 0, rows, a_rows, chunks, CONFIG)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=column < outputs, other=0.0)[None, :]
    mask = (row < rows)[:, None] & (column < outputs)[None, :]
    tl.store(out_ptr + row[:, None] * outputs + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


# --- launches ---


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtypes are judged by the op. ``torch.compile`` traces through this."""
    reason = why_not_gpu(args.a, _launch.INTERPRETING)
    if reason is not None:
        return reason
    M, N, K = args.sizes
    if args.depth < K and args.depth % 32 != 0:
        return f"it takes scales of multiples of 32 columns, not of {args.depth}"
    for name, block, size in (("a", args.a_rows, M), ("b", args.b_rows, N)):
        if block < size and block != 1 and block % 128 != 0:
            return f"it takes scales of one row, of all, or of multiples of 128, not of {block} rows of {name}"
    if -(-M // 16) * -(-N // 32) >= 2**31:
        return f"{M} x {N} is more than one launch can number"
    return None


def config(args: Args, capability: tuple[int, int]) -> tuple[Config, int, int]:
    """A tile, its warps and stages. A chunk's sum and that of all lie in registers: 64 x 128 for four warps is the most
    that they hold, and half of it where a thread writes single numbers. Not measured."""
    M, N, K = args.sizes
    native = args.a_format != "" and capability >= (8, 9) and not _launch.INTERPRETING
    dtype = torch.float16 if args.a_format else args.a.dtype
    unit = 1 if N % UNIT.value else UNIT.value
    stages = 4
    if dtype == torch.float32:  # multiplied without tensor cores, from registers
        rows, outputs, depth, warps = _launch.power_of_two(M, 16, 32), 32, 32, 4
    elif M <= 64:  # narrow, so that there are enough programs to read b
        rows, outputs, depth, warps = 16 if M <= 16 else 64, 32, 128, 4
    else:
        rows, outputs, depth, warps = 128, 64 if unit == 1 else 128, 128 if native else 64, 8
        stages = 4 if native and capability >= (9, 0) else 3
    chunks = args.depth < K
    a_one = args.a_scale is None or args.a_rows % rows == 0 or args.a_rows >= M
    b_one = args.b_rows % outputs == 0 or args.b_rows >= N
    tile = Config(
        rows, outputs, 32 if chunks and args.depth % depth else depth, None if native else _launch.dot_dtype(dtype),
        FORMATS.get(args.a_format), FORMATS[args.b_format], args.b_turned, chunks, a_one, b_one, unit,
    )  # fmt: skip
    return tile, warps, stages


def gemm_launch(args: Args, out: Tensor, a: Tensor, b: Tensor, tile: tuple[Config, int, int]) -> Launch:
    """``a`` and ``b`` are those of ``args``, with rows padded to units."""
    (M, N), how = out.shape, tile[0]
    b_scale = args.b_scale if how.b_one else args.b_scale.t().contiguous()
    return _launch.launch(
        gemm_kernel, triton.cdiv(M, how.rows) * triton.cdiv(N, how.outputs), *tile[1:], out_ptr=out, a_ptr=a, b_ptr=b,
        a_scale_ptr=args.a_scale, b_scale_ptr=b_scale, bias_ptr=args.bias, rows=M, outputs=N // how.out_unit,
        depth=a.shape[1] // UNIT.value, stride=b.shape[1] // UNIT.value, a_rows=args.a_rows, b_rows=args.b_rows,
        span=args.depth, chunks=args.b_scale.shape[1], CONFIG=how,
    )  # fmt: skip


def padded(x: Tensor, rows: bool = False) -> Tensor:
    """A matrix whose rows are whole units, and as many of them if asked for; what is added is 0."""
    down, across = (-x.shape[0] % UNIT.value if rows else 0), -x.shape[1] % UNIT.value
    return F.pad(x, (0, across, 0, down)) if down or across else x


def forward(*given: Any) -> Tensor:
    """Arguments are the fields of ``accel.ops.fp8.fp8_gemm.Args``."""
    args = Args(*given)
    M, N, _ = args.sizes
    dtype = OUT_DTYPES[args.out_dtype]
    out = torch.empty((M, N), dtype=_launch.store_dtype(dtype), device=args.a.device)
    with _launch.device_of(args.a):
        a, b = padded(args.a), padded(args.b, args.b_turned)
        gemm_launch(args, out, a, b, config(args, _launch.capability(args.a))).run()
    return out.to(dtype)


CASES = (  # M, N, K, a_rows, b_rows, depth (0 for all), b_turned, formats
    (4096, 4096, 7168, 1, 128, 128, False, "e4m3", "e4m3"),
    (4096, 4096, 7168, 1, 1, 128, False, "e4m3", "e4m3"),
    (4096, 4096, 7168, 128, 1, 128, False, "e4m3", "e4m3"),
    (4096, 4095, 7168, 1, 1, 128, False, "e4m3", "e4m3"),
    (4096, 4096, 7168, 1, 128, 128, True, "e4m3", "e4m3"),
    (4096, 4096, 7168, 1, 1, 0, False, "e4m3", "e4m3"),
    (4096, 4096, 7168, 0, 0, 0, True, "e5m2", "e5m2"),
    (4096, 4096, 7168, 1, 1, 32, False, "e5m2", "e4m3"),
    (64, 4096, 7168, 1, 128, 128, False, "e4m3", "e4m3"),
    (16, 4096, 7168, 1, 128, 128, False, "e4m3", "e4m3"),
    (16, 4096, 7168, 1, 1, 0, True, "e4m3", "e4m3"),
    (4096, 4096, 7168, 0, 128, 128, False, "", "e4m3"),
    (4096, 4096, 7168, 0, 1, 128, True, "", "e4m3"),
    (4096, 4095, 7168, 0, 1, 0, False, "", "e5m2"),
    (16, 4096, 7168, 0, 128, 128, False, "", "e4m3"),
)


def _arguments(
    M: int, N: int, K: int, a_rows: int, b_rows: int, depth: int, turned: bool, a_format: str, b_format: str,
    dtype: torch.dtype,
) -> Args:  # fmt: skip
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    a_rows, b_rows, depth = a_rows or M, b_rows or N, depth or K
    chunks = triton.cdiv(K, depth)
    a_scale = meta(triton.cdiv(M, a_rows), chunks) if a_format else None
    b = meta(*((K, N) if turned else (N, K)), dtype=torch.uint8)
    return Args(
        meta(M, K, dtype=torch.uint8 if a_format else dtype), b, a_scale, meta(triton.cdiv(N, b_rows), chunks), meta(N),
        a_format, b_format, a_rows, b_rows, depth, turned, str(dtype)[6:],
    )  # fmt: skip


def compile_cases() -> Iterator[_launch.CompileCase]:
    """Of each call one for GPUs whose tensor cores take eight bits and one for others, or one for all."""
    for dtype, given in itertools.product(KERNEL_DTYPES, CASES):
        args = _arguments(*given, dtype)
        if args.a_format and dtype == torch.float16:
            continue
        M, N, K = args.sizes
        blocks = f"{args.a_rows}, {args.b_rows} x {args.depth}{' turned' if args.b_turned else ''}"
        name = f"{args.a_format or 'plain'} {args.b_format} to {args.out_dtype} {M} x {N} x {K}, {blocks}"
        out = torch.empty((M, N), dtype=dtype, device="meta")
        of = {kind: gemm_launch(args, out, args.a, args.b, config(args, kind)).case(name) for kind in ((8, 0), (9, 0))}
        if of[8, 0] == of[9, 0]:
            yield of[9, 0]
        else:
            yield replace(of[8, 0], name=f"{of[8, 0].name} decoded", architectures=(80,))
            yield replace(of[9, 0], architectures=(90, 100))
