"""What the deformable ops have in common: bilinear samples at positions from a tensor, and what their kernels count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accel import backends

# --- the definition of a sample ---


def bilinear(
    image: Tensor, y: Tensor, x: Tensor, height: int | Tensor, width: int | Tensor, start: int | Tensor = 0,
    border_gradient: bool = True,
) -> Tensor:  # fmt: skip
    """Samples ``(R, C, *)`` of flat images ``(R, C, S)`` at pixel positions ``y`` and ``x``, both ``(R, *)``.

    Pixel (i, j) stands at ``start + i·width + j``; the last three may be integer tensors that broadcast to ``(*)``.
    Each of the four pixels around a position counts if it is inside, else it is 0 whatever the image holds. A position
    that is NaN, infinite or beyond the border has a sample and derivatives of 0, because it is replaced before
    anything is computed from it. At integer positions derivatives are those from the right; at exactly −1, in y or x,
    there are none without ``border_gradient``.
    """
    size = image.shape[2]
    near = (y >= -1) & (y < height) & (x >= -1) & (x < width)  # False for NaN; only here can a pixel be inside
    y, x = torch.where(near, y, 0.0), torch.where(near, x, 0.0)
    if not border_gradient:  # what is detached has no derivative, whatever the pixels hold
        moves = (y > -1) & (x > -1)
        y, x = torch.where(moves, y, y.detach()), torch.where(moves, x, x.detach())
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


def why_not_cuda(args: Any, sizes: dict[str, int], queries: int, points: int) -> str | None:
    """Why the CUDA kernels of ``accel._C`` cannot compute ``args`` of an op.

    ``sizes`` are the map's: ``batch``, ``pixels``, ``heads``, ``channels`` of a head. Every query and head takes
    ``points`` samples.
    """
    reason = backends.why_not_cuda(args)
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
