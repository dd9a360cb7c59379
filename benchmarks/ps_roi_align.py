"""Position-sensitive alignment of boxes: rows and goals; ``_boxes.py`` has rivals and costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from accel.benchmarks import _boxes
from accel.benchmarks.harness import Case, Pick, Short
from accel.ops.boxes.ps_roi_align import OP

NAME = "ps_roi_align"
PROVIDERS = _boxes.PROVIDERS
RATIO = 2
"""Samples along each side of a bin."""


def axis(low: Tensor, high: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Each bin has two samples, and each sample two pixels. No box of ours leaves the map by a whole pixel."""
    step = (high - low) / _boxes.BINS
    inside = torch.arange(_boxes.BINS * RATIO, device=low.device) / RATIO + 0.5 / RATIO
    at = (low[:, None] - 0.5 + inside * step[:, None]).clamp(0, size - 1).unflatten(1, (-1, RATIO))
    above, past = at.floor().long(), at - at.floor()
    weights = low.new_zeros(len(low), _boxes.BINS, size)
    weights = weights.scatter_add(2, above, 1 - past).scatter_add(2, (above + 1).clamp_max(size - 1), past)
    return weights, torch.full_like(weights[..., 0], RATIO)


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op."""
    return _boxes.cases(OP, axis, device, dtypes, RATIO)


SHORT = Short(
    rivals=("torchvision", "eager"),
    cpu=(Pick("ps_roi_align, Light-Head R-CNN", "Light-Head R-CNN", modes=("forward", "forward+backward")),),
    cuda=(Pick("ps_roi_align, Light-Head R-CNN", "Light-Head R-CNN", modes=("forward", "backward")),),
)

GOALS = _boxes.no_slower(NAME)
