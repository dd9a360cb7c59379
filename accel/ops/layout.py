"""How the main tensors of attention lie in memory, and what is not finite in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def finite(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` with what is not finite set to 0, and whether each row of it held such."""
    good = torch.isfinite(x)
    return torch.where(good, x, 0.0), ~good.all(-1)


def empty_like_layout(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory for ``(B, H, T, ·)`` of ``shape`` in the order of ``x``: heads inside tokens where x has them so."""
    b, h, t, d = shape
    if x.shape[1] > 1 and x.stride(1) < x.stride(2):
        return x.new_empty((b, t, h, d)).transpose(1, 2)
    return x.new_empty((b, h, t, d))


def rows_contiguous(x: Tensor) -> Tensor:
    """``x`` with its last axis contiguous, copied only where it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
