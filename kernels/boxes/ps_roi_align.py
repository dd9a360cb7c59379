"""Position-sensitive alignment in Triton; the kernels are in ``bins.py``."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from accel.kernels import _launch
from accel.kernels.boxes import bins
from accel.kernels.boxes.bins import why_not

__all__ = ["backward", "compile_cases", "forward", "why_not"]


def forward(input: Tensor, boxes: Tensor, output_size: list[int], spatial_scale: float, sampling_ratio: int) -> Tensor:
    """The output; arguments are the fields of ``accel.ops.boxes.ps_roi_align.Args``."""
    return bins.forward(input, boxes, output_size, spatial_scale, sampling_ratio)


def backward(
    grad_out: Tensor, boxes: Tensor, input_size: list[int], output_size: list[int], spatial_scale: float,
    sampling_ratio: int,
) -> Tensor:  # fmt: skip
    """The gradient of the input."""
    return bins.backward(grad_out, boxes, input_size, output_size, spatial_scale, sampling_ratio)


def compile_cases() -> Iterator[_launch.CompileCase]:
    return bins.compile_cases([0, 1, 2])
