"""What position-sensitive pooling and alignment have in common: checks of boxes, and the sum they both are.

Bin (i, j) of a box belongs to channel (c·ph + i)·pw + j of the map. Its value is a sum over pixels in which the weight
of a pixel is that of its row times that of its column, divided by how many pixels or samples were taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from accel import library
from accel.backends import check_beside, check_floating, inner_dtype, pair

LIMIT = 1 << 22
"""A box with a corner further than this many pixels away has no bins: float32 still tells half pixels apart there, and
counts the samples between two such corners exactly."""

SLACK = 16
"""How many samples before the first and behind the last near the map are looked at, where the first is computed from a
position: within ``LIMIT``, float32 is off by a few."""

Axis = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
"""``(low, high, bins, size) -> (weights, divisors)``: for the two ends (K,) of boxes on an axis of ``size`` pixels, the
weight of each pixel in each bin ``(K, bins, size)``, and what to divide by ``(K, 1 or bins)``."""


# --- the definition ---


def _scale(boxes: Tensor, spatial_scale: float, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which boxes count, their images, and x1, y1, x2, y2 in pixels ``(4, K)``, the last two 0 where they do not."""
    image, corners = boxes[:, 0], boxes[:, 1:].T * spatial_scale
    real = (image > -1) & (image < batch) & (corners.abs() < LIMIT).all(0)  # False for NaN
    return real, torch.where(real, image, 0.0).long(), torch.where(real, corners, 0.0)


def weighted_mean(axis: Axis, input: Tensor, boxes: Tensor, output_size: Sequence[int], spatial_scale: float) -> Tensor:
    """Either op in plain torch, fp32 or fp64 inside; row by row, so that a pixel without weight has no say."""
    n, c, height, width = input.shape
    ph, pw = output_size
    real, image, (x1, y1, x2, y2) = _scale(boxes, spatial_scale, n)
    rows, row_divisors = axis(y1, y2, ph, height)
    columns, column_divisors = axis(x1, x2, pw, width)
    rows = rows * real[:, None, None]
    out = input.new_zeros((boxes.shape[0], c // (ph * pw), ph, pw), dtype=boxes.dtype)
    if n == 0:  # nothing to select from
        return (out + input.sum()).to(input.dtype)
    for y in range(height):
        line = input[:, :, y].to(boxes.dtype).index_select(0, image).unflatten(1, (-1, ph, pw))
        weight = (rows[:, :, None, y, None] * columns[:, None]).unsqueeze(1)  # (K, 1, ph, pw, W)
        out = out + torch.where(weight > 0, line * weight, 0.0).sum(-1)
    divisors = row_divisors[:, :, None] * column_divisors[:, None]
    return (out / divisors[:, None]).to(input.dtype)


def without_data(args: Any) -> Tensor:
    """The output of either op, its values left out."""
    ph, pw = args.output_size
    return args.input.new_empty((args.boxes.shape[0], args.input.shape[1] // (ph * pw), ph, pw))


# --- checks ---


def _check_images(boxes: Tensor, batch: int) -> None:
    """Where looking at values costs nothing, every box must be of an image that is there."""
    if boxes.device.type != "cpu" or torch.compiler.is_compiling() or type(boxes) is not Tensor:
        return
    image = boxes[:, 0]
    wrong = ((image > -1) & (image < batch)).logical_not().nonzero()
    if wrong.numel():
        k = int(wrong[0])
        raise ValueError(f"box {k} of boxes is of image {image[k].item()}, and input has a batch of {batch}")


def _join(boxes: Any, input: Tensor) -> Tensor:
    """``(K, 5)`` in the dtype of coordinates, from that or from a list of ``(L, 4)``, one for each image."""
    inner = inner_dtype(input)
    if isinstance(boxes, Tensor):
        check_beside(boxes, "boxes", input, "input")
        if boxes.dim() != 2 or boxes.shape[1] != 5:
            raise ValueError(f"boxes must be (K, 5), the index of an image first, got {tuple(boxes.shape)=}")
        boxes = boxes.detach().to(inner).contiguous()
        _check_images(boxes, input.shape[0])
        return boxes
    if not isinstance(boxes, Sequence):
        raise TypeError(f"boxes must be a tensor (K, 5) or a list of (L, 4), got {type(boxes).__name__}")
    if len(boxes) > input.shape[0]:
        raise ValueError(f"boxes lists {len(boxes)} images, and input has a batch of {input.shape[0]}")
    parts = [torch.zeros((0, 5), dtype=inner, device=input.device)]
    for i, each in enumerate(boxes):
        check_beside(each, f"boxes[{i}]", input, "input")
        if each.dim() != 2 or each.shape[1] != 4:
            raise ValueError(f"boxes[{i}] must be (L, 4), got {tuple(each.shape)}")
        corners = each.detach().to(inner)
        parts.append(torch.cat([torch.full_like(corners[:, :1], i), corners], 1))
    return torch.cat(parts)


def check_arguments(
    input: Tensor, boxes: Any, output_size: Any, spatial_scale: float
) -> tuple[Tensor, Tensor, list[int], float]:
    """The first four arguments of either op, checked, in the form the backends take."""
    check_floating(input, "input")
    if input.dim() != 4 or 0 in input.shape[1:] or max(input.shape[2:]) > LIMIT:
        raise ValueError(
            f"input must be (N, C, H, W) with 1 to {LIMIT} pixels along a side and a channel, got {tuple(input.shape)=}"
        )
    size = pair(output_size, "output_size", 1)
    channels = input.shape[1]
    if channels % (size[0] * size[1]):
        raise ValueError(
            f"channels of input must be a multiple of the {size[0]} x {size[1]} = {size[0] * size[1]} bins of "
            f"{output_size=}, got {channels} in {tuple(input.shape)=}"
        )
    scale = float(spatial_scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"spatial_scale must be finite, got {spatial_scale=}")
    input = library.autocast(input)
    return input.contiguous(), _join(boxes, input), size, scale
