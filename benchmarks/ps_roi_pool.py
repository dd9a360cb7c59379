"""Position-sensitive pooling of boxes: rows and goals; ``_boxes.py`` has rivals and costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from accel.benchmarks import _boxes
from accel.benchmarks.harness import Case, Pick, Short
from accel.ops.boxes.ps_roi_pool import OP

NAME = "ps_roi_pool"
PROVIDERS = _boxes.PROVIDERS


def axis(low: Tensor, high: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Each bin has whole pixels, at least none; the last pixel of the map is in no bin."""
    low, high = (low + 0.5).floor()[:, None], (high + 0.5).floor()[:, None]  # to nearest; no box begins before the map
    step = (high - low).clamp_min(1) / _boxes.BINS
    i = torch.arange(_boxes.BINS, device=low.device)
    first = (low + (i * step).floor()).clamp(0, size - 1)[..., None]
    end = (low + ((i + 1) * step).ceil()).clamp(0, size - 1)[..., None]
    pixel = torch.arange(size, device=low.device)
    weights = ((pixel >= first) & (pixel < end)).to(low.dtype)
    return weights, weights.sum(-1).clamp_min(1)


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op."""
    return _boxes.cases(OP, axis, device, dtypes)


SHORT = Short(
    rivals=("torchvision", "eager"),
    cpu=(Pick("ps_roi_pool, R-FCN", "R-FCN", modes=("forward", "forward+backward")),),
    cuda=(Pick("ps_roi_pool, R-FCN", "R-FCN", modes=("forward", "backward")),),
)

GOALS = _boxes.no_slower(NAME)
