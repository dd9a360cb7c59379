"""What the deformable ops have in common: bilinear samples at positions from a tensor, and checks of arguments."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accel import dispatch

HALF_DTYPES = (torch.bfloat16, torch.float16)
KERNEL_DTYPES = (torch.float32, *HALF_DTYPES)


def inner_dtype(x: Tensor) -> torch.dtype:
    """What coordinates and small parameters beside ``x`` are read in, and sums are made in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- the definition of a sample ---


def bilinear(
    image: Tensor, y: Tensor, x: Tensor, height: int | Tensor, width: int | Tensor, start: int | Tensor = 0
) -> Tensor:
    """Samples ``(R, C, *)`` of flat images ``(R, C, S)`` at pixel positions ``y`` and ``x``, both ``(R, *)``.

    Pixel (i, j) stands at ``start + i·width + j``; the last three may be integer tensors that broadcast to ``(*)``.
    Each of the four pixels around a position counts if it is inside, else it is 0 whatever the image holds. A position
    that is NaN, infinite or beyond the border has a sample and derivatives of 0, because it is replaced before
    anything is computed from it. At integer positions derivatives are those from the right.
    """
    size = image.shape[2]
    near = (y >= -1) & (y < height) & (x >= -1) & (x < width)  # False for NaN; only here can a pixel be inside
    y, x = torch.where(near, y, 0.0), torch.where(near, x, 0.0)
    top, left = y.detach().floor(), x.detach().floor()
    dy, dx = y - top, x - left
    top, left = top.long(), left.long()
    out: Tensor | None = None
    for row, weight_y in ((top, 1 - dy), (top + 1, dy)):
        for column, weight_x in ((left, 1 - dx), (left + 1, dx)):
            inside = near & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            at = torch.where(inside, start + row * width + column, 0)
            at = at.clamp(0, size - 1)  # sizes that were not checked give wrong numbers, never foreign memory
            index = at.flatten(1).unsqueeze(1).expand(-1, image.shape[1], -1)
            pixel = image.gather(2, index).reshape(image.shape[0], image.shape[1], *at.shape[1:])
            part = torch.where(inside.unsqueeze(1), pixel, 0.0) * (weight_y * weight_x).unsqueeze(1)
            out = part if out is None else out + part
    assert out is not None
    return out


# --- checks ---


def check_tensor(x: Any, name: str, main: Tensor, main_name: str) -> None:
    """``x`` is a floating tensor on the device of ``main``."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.device != main.device:
        raise ValueError(f"{name} is on {x.device} but {main_name} is on {main.device}")


def pair(values: int | Sequence[int], name: str, least: int) -> list[int]:
    """One integer for both axes, or two of them (y, x); none below ``least``."""
    try:
        if isinstance(values, Sequence):
            out = [operator.index(v) for v in values]
        else:
            out = [operator.index(values)] * 2
    except TypeError:
        raise TypeError(f"{name} must be an integer or two of them (y, x), got {name}={values!r}") from None
    if len(out) != 2:
        raise ValueError(f"{name} must be an integer or two of them (y, x), got {name}={values!r}")
    if out[0] < least or out[1] < least:
        raise ValueError(f"{name} must be at least {least}, got {name}={values!r}")
    return out


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Height and width of a convolution's output, which must be positive."""
    out = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    if out[0] < 1 or out[1] < 1:
        raise ValueError(
            f"the output would be {out[0]} x {out[1]}: a map of {size[0]} x {size[1]} is too small for a kernel of "
            f"{kernel[0]} x {kernel[1]} with {stride=}, {padding=}, {dilation=}"
        )
    return out


# --- leaves ---


def why_not_cpu(main: Tensor) -> str | None:
    """Why ``accel._C`` cannot compute an op on ``main``."""
    if main.device.type != "cpu":
        return f"the tensors are on {main.device.type}"
    reason = dispatch.leaf_reason("accel._C")
    if reason is not None:
        return reason
    return why_not_dtype(main)


def why_not_dtype(main: Tensor) -> str | None:
    if main.dtype not in KERNEL_DTYPES:
        return f"it computes float32, bfloat16 and float16, not {main.dtype}"
    return None


def why_not_triton(name: str, args: Any) -> str | None:
    """Why ``accel.kernels.<name>`` cannot compute ``args``."""
    return dispatch.why_not_triton(name, args) or why_not_dtype(args[0])


@functools.cache
def _why_not_device(extension: Any, index: int) -> str | None:
    build = extension.build_info()
    if not build["cuda_archs"]:
        return f"the CUDA kernels were not built: {build.get('cuda_missing')}"
    with torch.cuda.device(index):
        error = extension.cuda_error(index)
    if error:
        return f"the CUDA kernels, built for {build['cuda_archs']}, do not run on {_name_of(index)}: {error}"
    return None


def _name_of(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})"


@torch.compiler.assume_constant_result  # the extension cannot be traced, and its answer does not change
def _why_not_built(index: int) -> str | None:
    extension, reason = dispatch.leaf("accel._C")
    return reason or _why_not_device(extension, index)


def why_not_cuda(main: Tensor, sizes: dict[str, int], queries: int, points: int) -> str | None:
    """Why the CUDA kernels of ``accel._C`` cannot compute an op on ``main``.

    ``sizes`` are the map's: ``batch``, ``pixels``, ``heads``, ``channels`` of a head. Every query and head takes
    ``points`` samples.
    """
    if main.device.type != "cuda":
        return f"the tensors are on {main.device.type}"
    reason = _why_not_built(main.device.index) or why_not_dtype(main)
    if reason is not None:
        return reason
    batch, pixels, heads, channels = (sizes[name] for name in ("batch", "pixels", "heads", "channels"))
    counted = {  # what the kernels and their grids count, and what they count to
        "pixels": (pixels, 30),
        "outputs": (queries, 27),
        "samples of a head": (queries * points, 31),
        "channels of a head": (channels, 21),
        "channels": (heads * channels, 31),
        "heads of all images": (batch * heads, 31),
        "outputs of all heads": (batch * queries * heads, 33),
    }
    for name, (count, bits) in counted.items():
        if count >= 2**bits:
            return f"it takes fewer than 2^{bits} {name}, not {count}"
    return None
