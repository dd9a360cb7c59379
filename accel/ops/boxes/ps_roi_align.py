"""Position-sensitive alignment of boxes (Light-Head R-CNN): each bin is the mean of samples in a channel of its own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library
from accel.backends import KERNEL_DTYPES, integer
from accel.ops.boxes.bins import SLACK, check_arguments, weighted_mean, without_data

MOST_SAMPLES = 4096
"""The largest ``sampling_ratio``."""


class Args(NamedTuple):
    """The checked arguments every backend receives."""

    input: Tensor  # (N, C, H, W) contiguous
    boxes: Tensor  # (K, 5) contiguous fp32 (fp64 beside fp64): image, x1, y1, x2, y2
    output_size: list[int]  # (y, x)
    spatial_scale: float
    sampling_ratio: int  # samples along each side of a bin; 0: as many as it has pixels, rounded up


# --- the definition ---


def _axis(sampling_ratio: int, low: Tensor, high: Tensor, bins: int, size: int) -> tuple[Tensor, Tensor]:
    """Weights of the pixels of each bin, summed over its samples, and how many samples it has."""
    low = low - 0.5
    step = ((high - 0.5 - low) / bins)[:, None, None]
    begin = low[:, None, None] + torch.arange(bins, device=low.device)[:, None] * step
    if sampling_ratio:
        grid = torch.full_like(step, sampling_ratio)
        t = torch.arange(sampling_ratio, device=low.device)
    else:  # a bin of more than one pixel has its samples more than half a pixel apart; only those near the map matter
        grid = step.ceil().clamp_min(0)
        first = ((-1 - begin) * grid / step - SLACK).floor()
        first = torch.where(grid > 0, first, 0.0).clamp_min(0)
        t = first + torch.arange(2 * size + 2 + 2 * SLACK, device=low.device)
    at = begin + (t + 0.5) * step / grid
    near = (t < grid) & (at >= -1) & (at <= size)  # False for NaN
    at = torch.where(near, at, 0.0).clamp(0, size - 1)
    above, past = at.floor().long(), at - at.floor()
    weights = low.new_zeros(low.shape[0], bins, size)
    weights = weights.scatter_add(2, above, torch.where(near, 1 - past, 0.0))
    weights = weights.scatter_add(2, (above + 1).clamp_max(size - 1), torch.where(near, past, 0.0))
    return weights, grid[..., 0].clamp_min(1)


def reference(
    input: Tensor, boxes: Tensor, output_size: list[int], spatial_scale: float, sampling_ratio: int
) -> Tensor:
    """The op in plain torch, fp32 or fp64 inside."""
    axis = functools.partial(_axis, sampling_ratio)
    return weighted_mean(axis, input, boxes, output_size, spatial_scale)


# --- backends, fastest first for each device ---


_native = backends.native("ps_roi_align")
_triton = backends.triton(__name__)


# --- declaration ---


def _flops(args: Args) -> int:
    """Of four pixels for each sample; at least, where the number of samples follows from values."""
    outputs: int = args.boxes.shape[0] * args.input.shape[1]
    return 2 * 4 * outputs * max(args.sampling_ratio, 1) ** 2


# --- the public function ---


def _prepare(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    try:
        ratio = integer(sampling_ratio)
    except TypeError:
        raise TypeError(f"sampling_ratio must be an integer, got {sampling_ratio=}") from None
    if ratio > MOST_SAMPLES:
        raise ValueError(f"sampling_ratio must be at most {MOST_SAMPLES}, got {sampling_ratio=}")
    return Args(*check_arguments(input, boxes, output_size, spatial_scale), max(ratio, 0))


_run = library.differentiable(
    "ps_roi_align",
    Args,
    reference,
    gradients=1,
    always=1,
    sizes_only=["input"],
    fake=without_data,
    flops=_flops,
    backward_flops=lambda args, made: _flops(args),
)


def ps_roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""The mean of samples in each bin of each box, each bin in a channel of its own; ``torchvision.ops.ps_roi_align``.

    A box is multiplied by ``spatial_scale`` and moved by half a pixel, :math:`y_1 = y_1' \cdot s - 1/2` and so on, and
    cut into ``ph × pw`` bins of height :math:`b = (y_2 - y_1) / ph`, without rounding. A bin has a grid of g samples in
    y, at :math:`y_1 + i b + (t + 1/2) b / g` for t = 0 … g − 1, and likewise in x, where g is ``sampling_ratio``, or
    :math:`⌈b⌉` if that is not positive. Output (c, i, j) is the sum of the bilinear samples of channel
    :math:`(c · ph + i) · pw + j`, divided by how many the grid has.

    As in torchvision, a sample more than a pixel outside of the map's first or last pixel, y < −1 or y > H, is 0, and
    one that is less far outside is moved to the border. A box without size has no samples if ``sampling_ratio`` is not
    positive: it gives 0, where torchvision divides 0 by 0. One that ends before it begins likewise; with a positive
    ``sampling_ratio`` it is sampled backwards.

    A box with a corner that is NaN, infinite or more than 2^22 pixels away gives zeros and no gradient. A pixel whose
    weight is 0 has no say, whatever it holds. Positions are computed in float32 (float64 beside float64).

    Args:
        input: ``(N, C, H, W)`` with C a multiple of ph·pw; float32, bfloat16, float16, and float64 on the reference.
            Under autocast it is cast as a matrix product's operand would be. N may be 0.
        boxes: ``(K, 5)``, the index of an image, then x1, y1, x2, y2; or a list with ``(L, 4)`` for each image. Any
            floating dtype; never cast by autocast. K may be 0.
        output_size: (ph, pw), or one integer for both.
        spatial_scale: pixels of the map for each unit of the boxes.
        sampling_ratio: samples along each side of a bin, at most 4096; 0 or less: one for each pixel of its length,
            rounded up.
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(K, C / (ph·pw), ph, pw)`` in the dtype of ``input``, contiguous.

    Gradients exist for ``input``, not for ``boxes``. They are the same bits every time: what reaches a pixel is summed
    in the order of the boxes, without atomics. Second and forward-mode derivatives are the reference's; a kernel
    refuses them.

    Raises:
        TypeError: a tensor that must be floating is not, or ``sampling_ratio`` is no integer.
        ValueError: shapes, sizes or devices that do not fit, or, on the CPU, a box of an image that is not there; the
            message holds them. On a GPU, and in compiled code on the reference, such a box gives zeros.
        NotImplementedError: ``backend`` cannot run this call; the message says why.

    Follows Li et al., Light-Head R-CNN (2017).
    """
    args = _prepare(input, boxes, output_size, spatial_scale, sampling_ratio)
    return _run(args, backend)


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    input = torch.zeros(1, 18, 6, 6, device=device, dtype=dtype)
    return (input, torch.tensor([[0.0, 0.0, 0.0, 5.0, 5.0]], device=device), 3), {}


OP = dispatch.register(
    dispatch.Op(
        name="ps_roi_align",
        function=ps_roi_align,
        prepare=_prepare,
        example=_example,
        backends=(
            dispatch.Backend("cpu", backends.why_not_cpu, *_native, frozenset({"cpu"}), KERNEL_DTYPES),
            dispatch.Backend("triton", *_triton, frozenset({"cuda"}), KERNEL_DTYPES),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
    )
)
