"""What the attention layers around multi-scale deformable attention have in common, in mmcv as in transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sampling(
    sampling_offsets: Tensor, logits: Tensor, reference_points: Tensor, spatial_shapes: Tensor, sizes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Locations ``(N, Q, M, L, P, 2)`` and weights ``(N, Q, M, L, P)`` from the two projections of the queries.

    ``reference_points`` are ``(N, Q, L, 2)``, to which offsets in pixels are added, or boxes ``(N, Q, L, 4)``, centre
    and size, of which offsets are halves divided by P. ``sizes`` is (M, L, P).
    """
    heads, levels, points = sizes
    offsets = sampling_offsets.unflatten(-1, (heads, levels, points, 2))
    weights = logits.unflatten(-1, (heads, levels * points)).softmax(-1).unflatten(-1, (levels, points))
    centre = reference_points[:, :, None, :, None, :2]
    if reference_points.shape[-1] == 2:
        return centre + offsets / spatial_shapes.flip(-1)[:, None], weights
    size = reference_points[:, :, None, :, None, 2:]
    return centre + offsets / points * size * 0.5, weights


def why_not_reference_points(reference_points: Any, *sizes: int) -> str | None:
    """Why reference points are left to the class, whose error or other way of reading them they get."""
    if not isinstance(reference_points, Tensor):
        return f"its reference points are a {type(reference_points).__name__}, not a tensor"
    if reference_points.shape[-1] not in sizes:
        return f"its reference points have {reference_points.shape[-1]} coordinates"
    return None


def heads_of(value: Tensor, heads: int, padding: Tensor | None) -> Tensor:
    """``(N, S, M, D)`` from projected values, 0 where ``padding`` is True."""
    if padding is not None:
        value = value.masked_fill(padding[..., None], 0.0)
    return value.unflatten(-1, (heads, -1))


def as_tensor(spatial_shapes: Any, like: Tensor) -> Tensor:
    if isinstance(spatial_shapes, Tensor):
        return spatial_shapes
    return torch.tensor(spatial_shapes, device=like.device)
