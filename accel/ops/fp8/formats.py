"""Numbers of eight bits and the scales of their blocks: the definition that every backend follows to the bit.

Registered ops carry codes as uint8 beside the name of their format: torch's checks of an op take no float8 argument.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Format(NamedTuple):
    dtype: torch.dtype
    largest: float  # 1.75 · 2^exponent
    exponent: int
    least: float  # an amax below this counts as 0: its scale would not be a normal fp32 number


FORMATS = {
    "e4m3": Format(torch.float8_e4m3fn, 448.0, 8, 2.0**-117),
    "e5m2": Format(torch.float8_e5m2, 57344.0, 15, 2.0**-110),
}
NAMES = {made.dtype: name for name, made in FORMATS.items()}
SCALE_FORMATS = ("fp32", "pow2", "e8m0")
E8M0 = torch.float8_e8m0fnu
NAN_CODE = 0x7F  # of both formats; every NaN gets this one


# --- codes ---


def encode(x: Tensor, name: str) -> Tensor:
    """fp32 numbers of at most the largest in absolute value, rounded to nearest even, as uint8. Infinities are kept
    where the format has them, and become NaN where not."""
    made = FORMATS[name]
    finite = x.isfinite()
    codes = torch.where(finite, x, 0.0).to(made.dtype).view(torch.uint8)
    if name == "e5m2":
        codes = torch.where(x.isinf(), torch.where(x > 0, 0x7C, 0xFC).to(torch.uint8), codes)
        finite = finite | x.isinf()
    return torch.where(finite, codes, NAN_CODE)


def decode(codes: Tensor, name: str) -> Tensor:
    """The fp32 numbers of uint8 codes."""
    return codes.view(FORMATS[name].dtype).float()


# --- blocks ---


def count(size: int, block: int) -> int:
    """Blocks along an axis; the last may be short."""
    return -(-size // block) if size else 0


def largest_of_blocks(x: Tensor, rows: int, cols: int) -> Tensor:
    """The largest finite absolute value of each block of the last two axes, 0 where there is none."""
    *batch, R, C = x.shape
    size = torch.where(x.isfinite(), x, 0.0).abs()
    size = F.pad(size, (0, -C % cols, 0, -R % rows))
    return size.view(*batch, count(R, rows), rows, count(C, cols), cols).amax((-3, -1))


def spread_scales(scale: Tensor, shape: tuple[int, int], rows: int, cols: int) -> Tensor:
    """A scale for each element of the last two axes, which are of ``shape``."""
    spread = scale.repeat_interleave(rows, -2)[..., : shape[0], :]
    return spread.repeat_interleave(cols, -1)[..., : shape[1]]


def scales_of(amax: Tensor, name: str, scale_format: str) -> tuple[Tensor, Tensor]:
    """Of blocks with these largest values: the scale that codes are multiplied by, and what numbers are multiplied by
    before they are rounded, both fp32."""
    made = FORMATS[name]
    some = amax >= made.least
    if scale_format == "fp32":
        largest = torch.full_like(amax, made.largest)  # torch divides a number by a tensor in two roundings
        safe = torch.where(some, amax, largest)
        return torch.where(some, safe / largest, 1.0), torch.where(some, largest / safe, 1.0)
    # the exponent of amax, less that of the largest number, and one more where its 1.75 does not suffice
    bits = torch.where(some, amax, 1.0).view(torch.int32)
    power = (bits >> 23) - made.exponent + ((bits & 0x7FFFFF) > 0x600000).to(torch.int32)
    scale, inverse = (power << 23).view(torch.float32), ((254 - power) << 23).view(torch.float32)
    return torch.where(some, scale, 1.0), torch.where(some, inverse, 1.0)


def quantize(x: Tensor, rows: int, cols: int, name: str, scale_format: str) -> tuple[Tensor, Tensor]:
    """Codes, and the fp32 scales of blocks ``rows`` x ``cols`` of the last two axes of ``x``."""
    x = x.float()
    scale, inverse = scales_of(largest_of_blocks(x, rows, cols), name, scale_format)
    return encode(x * spread_scales(inverse, (x.shape[-2], x.shape[-1]), rows, cols), name), scale


def to_e8m0(scale: Tensor) -> Tensor:
    """The bytes of powers of two in fp32."""
    return (scale.view(torch.int32) >> 23).to(torch.uint8)


def from_e8m0(scale: Tensor) -> Tensor:
    """fp32 powers of two: of float8_e8m0fnu, or of its bytes."""
    return scale.view(E8M0).float()


# --- which blocks scales belong to ---


def resolve_block(shape: tuple[int, int], scales: tuple[int, ...], name: str) -> tuple[int, int]:
    """The block that ``scales``, the last two sizes of a tensor of scales, names for a matrix of ``shape``: 1, 128 or
    all rows, and all, 128, 32 or single columns."""
    rows = next((b for b in (1, 128, max(shape[0], 1)) if count(shape[0], b) == scales[0]), None)
    cols = next((b for b in (max(shape[1], 1), 128, 32, 1) if count(shape[1], b) == scales[1]), None)
    if rows is None or cols is None:
        R, C = shape
        raise ValueError(
            f"{name} has {tuple(scales)} scales, which are of no blocks of ({R}, {C}): rows have {R}, {count(R, 128)} "
            f"or 1, columns 1, {count(C, 128)} or {count(C, 32)}"
        )
    return rows, cols
