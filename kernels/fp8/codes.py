"""Numbers of eight bits in Triton, by arithmetic of integers: its own casts to and from them round wrongly in the
interpreter and on sm_89, and sm_80 has none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from accel.ops.fp8 import formats

INFINITY = tl.constexpr(0x7F800000)
"""The bits of fp32's infinity. Those of larger absolute values are greater, as integers too."""


@dataclass(frozen=True)
class Format:
    """What ``accel.ops.fp8.formats`` says of a format, as kernels need it."""

    mantissa: int  # bits
    bias: int
    exponent: int  # of the largest number
    largest: float
    least: int  # the bits of the smallest amax that has a scale
    infinite: bool  # whether it has infinities


def _format(name: str, mantissa: int, bias: int, infinite: bool) -> Format:
    made = formats.FORMATS[name]
    least = int(torch.tensor(made.least).view(torch.int32).item())
    return Format(mantissa, bias, made.exponent, made.largest, least, infinite)


FORMATS = {"e4m3": _format("e4m3", 3, 7, False), "e5m2": _format("e5m2", 2, 15, True)}


@triton.jit
def size_of(x):
    """The bits of the absolute values of fp32 numbers."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def finite_size_of(x):
    """The same, 0 of what is not finite."""
    size = size_of(x)
    return tl.where(size < INFINITY, size, 0)


@triton.jit
def scales_of(size, FORMAT: tl.constexpr, POWERS: tl.constexpr):
    """Of blocks by the bits of their largest values: the scale that codes are multiplied by, and what numbers are
    multiplied by before they are rounded."""
    some = size >= FORMAT.least
    if POWERS:
        power = (size >> 23) - FORMAT.exponent + ((size & 0x7FFFFF) > 0x600000).to(tl.int32)
        scale = tl.where(some, power << 23, 0x3F800000).to(tl.float32, bitcast=True)
        inverse = tl.where(some, (254 - power) << 23, 0x3F800000).to(tl.float32, bitcast=True)
    else:
        largest = tl.full(size.shape, FORMAT.largest, tl.float32)
        amax = tl.where(some, size.to(tl.float32, bitcast=True), largest)
        scale = tl.div_rn(amax, largest)  # `/` is not rounded correctly
        inverse = tl.div_rn(largest, amax)
    return scale, inverse


@triton.jit
def encode(x, FORMAT: tl.constexpr):
    """fp32 numbers of at most the largest in absolute value, or infinite where the format is, rounded to nearest even,
    as codes in the last eight bits of int32. Others become anything."""
    SHIFT: tl.constexpr = 23 - FORMAT.mantissa
    LEAST: tl.constexpr = (128 - FORMAT.bias) << 23
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    if FORMAT.infinite:  # the power of two above the largest number has the code of infinity
        size = tl.minimum(size, (128 + FORMAT.exponent) << 23)
    # A sum with 2^SHIFT times the power of two below x, or below the smallest normal number, rounds x to units of the
    # format, and counts them in its last bits. Both are twice as large: where a compiler makes one instruction of a
    # product and a sum, the product is an exact one.
    power = tl.maximum(size & 0x7F800000, LEAST)
    total = size.to(tl.float32, bitcast=True) * 2.0 + (power + ((SHIFT + 1) << 23)).to(tl.float32, bitcast=True)
    # the units of the power itself are in the exponent
    code = total.to(tl.int32, bitcast=True) + ((power - LEAST) >> SHIFT)
    return (code & 0x7F) | ((bits >> 24) & 0x80)


@triton.jit
def mark(codes, x, FORMAT: tl.constexpr):
    """``codes`` of ``x``, those of what the format does not have corrected."""
    return tl.where(size_of(x) > (INFINITY if FORMAT.infinite else INFINITY - 1), 0x7F, codes)


@triton.jit
def decode(codes, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """The numbers of uint8 codes; fp16 holds every one of both formats."""
    bits = codes.to(tl.uint16)
    if FORMAT.infinite:
        return (bits << 8).to(tl.float16, bitcast=True).to(DTYPE)
    else:
        size = bits & 0x7F
        # a code one step from fp16's exponents; of a subnormal one the product makes a normal number
        x = (((bits & 0x80) << 8) | (size << 7)).to(tl.float16, bitcast=True) * 256.0
        return tl.where(size == 0x7F, float("nan"), x).to(DTYPE)
