"""Position-sensitive pooling in Triton; the kernels are in ``bins.py``."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from accel.kernels import _launch
from accel.kernels.boxes import bins
from accel.kernels.boxes.bins import why_not

__all__ = ["backward", "compile_cases", "forward", "why_not"]


def forward(input: Tensor, boxes: Tensor, output_size: list[int], spatial_scale: float) -> Tensor:
    """The output; arguments are the fields of ``accel.ops.boxes.ps_roi_pool.Args``."""
    return bins.forward(input, boxes, output_size, spatial_scale, bins.POOL)


def backward(
    grad_out: Tensor, boxes: Tensor, input_size: list[int], output_size: list[int], spatial_scale: float
) -> Tensor:
    """The gradient of the input."""
    return bins.backward(grad_out, boxes, input_size, output_size, spatial_scale, bins.POOL)


def compile_cases() -> Iterator[_launch.CompileCase]:
    return bins.compile_cases([bins.POOL])
