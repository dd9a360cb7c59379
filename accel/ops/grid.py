"""Relative positions on a grid, which attention's rules and windows share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def relative_position_index(window: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Row of the bias table for query i and key j of a window, int64 ``(N, N)``; window of 2 or 3 axes."""
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in window), indexing="ij")
    index: Any = 0
    for axis, n in zip(axes, window, strict=True):
        at = axis.flatten()
        index = index * (2 * n - 1) + (at[:, None] - at[None, :] + n - 1)
    return index
