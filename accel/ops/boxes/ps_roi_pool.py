"""Position-sensitive pooling of boxes (R-FCN): each bin is the mean of its pixels in a channel of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library
from accel.backends import KERNEL_DTYPES
from accel.ops.boxes.bins import check_arguments, weighted_mean, without_data


class Args(NamedTuple):
    """The checked arguments every backend receives."""

    input: Tensor  # (N, C, H, W) contiguous
    boxes: Tensor  # (K, 5) contiguous fp32 (fp64 beside fp64): image, x1, y1, x2, y2
    output_size: list[int]  # (y, x)
    spatial_scale: float


# --- the definition ---


def _round(x: Tensor) -> Tensor:
    """To the nearest integer, ties away from 0."""
    whole = x.abs().floor()
    return (whole + (x.abs() - whole >= 0.5)) * x.sign()


def _axis(low: Tensor, high: Tensor, bins: int, size: int) -> tuple[Tensor, Tensor]:
    """Weights of the pixels of each bin, 1 or 0, and how many there are."""
    low = _round(low)[:, None]
    step = (_round(high)[:, None] - low).clamp_min(1) / bins
    i = torch.arange(bins, device=low.device)
    first = (low + (i * step).floor()).clamp(0, size - 1)
    end = (low + ((i + 1) * step).ceil()).clamp(0, size - 1)
    pixel = torch.arange(size, device=low.device)
    inside = (pixel >= first[..., None]) & (pixel < end[..., None])
    return inside.to(low.dtype), (end - first).clamp_min(1)


def reference(input: Tensor, boxes: Tensor, output_size: list[int], spatial_scale: float) -> Tensor:
    """The op in plain torch, fp32 or fp64 inside."""
    return weighted_mean(_axis, input, boxes, output_size, spatial_scale)


# --- backends, fastest first for each device ---


_native = backends.native("ps_roi_pool")
_triton = backends.triton(__name__)


# --- declaration ---


def _flops(args: Args) -> int:
    """The least: how large bins are is in the values."""
    outputs: int = args.boxes.shape[0] * args.input.shape[1]
    return outputs


# --- the public function ---


def _prepare(
    input: Tensor, boxes: Tensor | Sequence[Tensor], output_size: int | Sequence[int], spatial_scale: float = 1.0
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    return Args(*check_arguments(input, boxes, output_size, spatial_scale))


_run = library.differentiable(
    "ps_roi_pool",
    Args,
    reference,
    gradients=1,
    always=1,
    sizes_only=["input"],
    fake=without_data,
    flops=_flops,
    backward_flops=lambda args, made: _flops(args),
)


def ps_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""The mean of each bin of each box, each bin in a channel of its own; ``torchvision.ops.ps_roi_pool``.

    A box is multiplied by ``spatial_scale``, its corners are rounded to integers (ties away from 0), and its height
    :math:`h = \max(y_2 - y_1, 1)` and width are cut into ``ph × pw`` bins that may share pixels. Bin (i, j) holds the
    rows from :math:`y_1 + ⌊i h / ph⌋` to :math:`y_1 + ⌈(i + 1) h / ph⌉`, the latter not among them, and columns
    likewise. Output (c, i, j) is the mean of these pixels in channel :math:`(c · ph + i) · pw + j`, or 0 where there
    are none.

    As in torchvision, both ends of a bin are clipped to H − 1 and W − 1, so that the last row and column of the map
    are in no bin, and the borders of bins are computed in float32 (float64 beside float64). The gradient is that of
    this output; torchvision's clips to H and W, and so disagrees with its own output for boxes that reach the border.

    A box with a corner that is NaN, infinite or more than 2^22 pixels away gives zeros and no gradient. A pixel outside
    of a bin has no say in it, whatever it holds.

    Args:
        input: ``(N, C, H, W)`` with C a multiple of ph·pw; float32, bfloat16, float16, and float64 on the reference.
            Under autocast it is cast as a matrix product's operand would be. N may be 0.
        boxes: ``(K, 5)``, the index of an image, then x1, y1, x2, y2; or a list with ``(L, 4)`` for each image. Any
            floating dtype; never cast by autocast. K may be 0.
        output_size: (ph, pw), or one integer for both.
        spatial_scale: pixels of the map for each unit of the boxes.
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(K, C / (ph·pw), ph, pw)`` in the dtype of ``input``, contiguous.

    Gradients exist for ``input``, not for ``boxes``. They are the same bits every time: what reaches a pixel is summed
    in the order of the boxes, without atomics. Second and forward-mode derivatives are the reference's; a kernel
    refuses them.

    Raises:
        TypeError: a tensor that must be floating is not.
        ValueError: shapes, sizes or devices that do not fit, or, on the CPU, a box of an image that is not there; the
            message holds them. On a GPU, and in compiled code on the reference, such a box gives zeros.
        NotImplementedError: ``backend`` cannot run this call; the message says why.

    Follows Dai et al., R-FCN (2016).
    """
    args = _prepare(input, boxes, output_size, spatial_scale)
    return _run(args, backend)


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    input = torch.zeros(1, 18, 6, 6, device=device, dtype=dtype)
    return (input, torch.tensor([[0.0, 0.0, 0.0, 5.0, 5.0]], device=device), 3), {}


OP = dispatch.register(
    dispatch.Op(
        name="ps_roi_pool",
        function=ps_roi_pool,
        prepare=_prepare,
        example=_example,
        backends=(
            dispatch.Backend("cpu", backends.why_not_cpu, *_native, frozenset({"cpu"}), KERNEL_DTYPES),
            dispatch.Backend("triton", *_triton, frozenset({"cuda"}), KERNEL_DTYPES),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
    )
)
