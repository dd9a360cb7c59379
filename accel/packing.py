"""Taking the padding out of a batch and putting it back."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pad", "unpad"]


def unpad(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Lay the real tokens of a padded batch one behind the other, so that nothing is computed on padding.

    Args:
        x: ``(B, S, ...)``, any dtype; has a gradient.
        mask: ``(B, S)`` boolean or integer, non-zero where the token is real; padding may stand anywhere.

    Returns:
        ``packed (total, ...)``; ``indices (total,)`` int64, the places in the flattened ``B·S``;
        ``cu_seqlens (B + 1,)`` int32, where each sequence begins; ``max_seqlen``, the longest. On a GPU this waits
        for the device, since ``total`` is the shape of a tensor: do it once for a whole model.

    Raises:
        TypeError: ``x`` is no tensor, or ``mask`` no boolean or integer one.
        ValueError: the shapes or devices do not fit.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask must be a boolean or integer tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.dim() != 2 or x.dim() < 2 or x.shape[:2] != mask.shape:
        raise ValueError(f"x must be (B, S, ...) and mask (B, S), got {tuple(x.shape)=}, {tuple(mask.shape)=}")
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device} but x is on {x.device}")
    real = mask != 0
    lengths = real.sum(1, dtype=torch.int32)
    indices = real.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return x.flatten(0, 1)[indices], indices, cu_seqlens, longest


def pad(packed: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of :func:`unpad`: ``(total, ...)`` to ``(batch, seqlen, ...)``, zeros where there was padding.

    Raises:
        TypeError: ``indices`` is no int64 tensor.
        ValueError: ``indices`` is not one place per token, or does not lie within ``batch · seqlen``.
    """
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {getattr(indices, 'dtype', type(indices).__name__)}")
    if indices.dim() != 1 or packed.dim() < 1 or indices.shape[0] != packed.shape[0]:
        raise ValueError(f"indices must be (total,), got {tuple(indices.shape)=}, {tuple(packed.shape)=}")
    if indices.numel() > batch * seqlen:
        raise ValueError(f"{indices.numel()} tokens do not fit into {batch=} · {seqlen=}")
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= batch * seqlen:
            raise ValueError(f"indices from {low} to {high} do not lie within {batch=} · {seqlen=}")
    out = packed.new_zeros((batch * seqlen, *packed.shape[1:]))
    return out.index_put((indices,), packed).unflatten(0, (batch, seqlen))
