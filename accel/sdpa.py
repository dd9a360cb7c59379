"""PyTorch's ``scaled_dot_product_attention``, over the kernels of :func:`accel.softmax_attention`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from accel.ops.attention.softmax_attention import softmax_attention

__all__ = ["scaled_dot_product_attention"]


def _four_axes(x: Tensor) -> Tensor:
    """``(..., H, tokens, size)`` with one batch axis; a batch and a head of one where there are none."""
    heads = x.shape[-3] if x.dim() > 2 else 1
    return x.reshape(math.prod(x.shape[:-3]), heads, *x.shape[-2:])


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention`, argument for argument.

    ``is_causal`` is aligned top-left as there, ``attn_mask`` is boolean (True takes part) or is added, and has a
    gradient then; a query that sees no key gives 0. ``dropout_p`` must be below 1. See :func:`accel.softmax_attention`
    for dtypes, backends and errors.

    Args:
        query: ``(..., Hq, L, E)``; at least ``(L, E)``.
        key: ``(..., H, S, E)``.
        value: ``(..., H, S, Ev)``.
        attn_mask: broadcasting to ``(..., Hq, L, S)``.

    Returns:
        ``(..., Hq, L, Ev)``.
    """
    if attn_mask is not None and is_causal:
        raise ValueError(f"give attn_mask or is_causal, not both: {tuple(attn_mask.shape)=}, {is_causal=}")
    tensors = [query, key, value]
    if min([x.dim() for x in tensors]) < 2:
        raise ValueError(f"query, key and value must be at least 2-D, got {[tuple(x.shape) for x in tensors]}")
    shape = query.shape[:-2]
    if not enable_gqa:
        shape = torch.broadcast_shapes(*[x.shape[:-2] for x in tensors])
        tensors = [x.expand(*shape, *x.shape[-2:]) for x in tensors]
    four = [_four_axes(x) for x in tensors]
    how: dict[str, Any] = {}
    if attn_mask is not None:
        if attn_mask.dim() > 4 or (len(shape) > 2 and attn_mask.dim() > 3):
            attn_mask = attn_mask.expand(*shape, *attn_mask.shape[-2:]).flatten(0, len(shape) - 2)
        how = {"mask" if attn_mask.dtype == torch.bool else "bias": attn_mask}
    causal = "top_left" if is_causal else False
    out = softmax_attention(four[0], four[1], four[2], causal=causal, scale=scale, dropout_p=dropout_p, **how)
    assert isinstance(out, Tensor)
    return out.reshape(*shape, *out.shape[-2:])
