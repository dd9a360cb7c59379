"""The offsets of a packed batch: their checks, and what is known of them without a look at a device."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from accel import memo


class Packed(NamedTuple):
    """Checked offsets of a packed batch, and bounds of its lengths that need no look at a device."""

    q: Tensor  # int32
    k: Tensor
    longest_q: int
    longest_k: int
    sequences: int
    same: bool  # keys are packed as queries are
    recent: memo.Recent  # tensors made from these offsets


def _check_offsets(given: Tensor, name: str, total: int, q: Tensor) -> int:
    """Check one ``cu_seqlens`` and return the longest sequence, or a bound of it where the values are on a GPU."""
    if not isinstance(given, Tensor) or given.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {getattr(given, 'dtype', type(given).__name__)}")
    if given.dim() != 1 or given.numel() < 2:
        raise ValueError(f"{name} must hold the starts of sequences and the end of the last, got {tuple(given.shape)=}")
    if given.device != q.device:
        raise ValueError(f"{name} is on {given.device} but q is on {q.device}")
    if given.device.type != "cpu" or torch.compiler.is_compiling():
        return total
    values = given.tolist()
    lengths = [b - a for a, b in itertools.pairwise(values)]
    if values[0] != 0 or values[-1] != total or min(lengths) < 0:
        shown = values if len(values) <= 12 else [*values[:6], "...", *values[-5:]]
        raise ValueError(f"{name} must rise from 0 to the {total} packed tokens without falling, got {shown}")
    return max(lengths)


_packed_facts: memo.Facts[Packed] = memo.Facts()


def read_packed(cu_q: Tensor | None, cu_k: Tensor | None, q: Tensor, k: Tensor) -> Packed | None:
    if cu_q is None:
        if cu_k is not None:
            raise ValueError(f"cu_seqlens_k needs cu_seqlens_q, got {tuple(cu_k.shape)=} alone")
        return None
    if q.shape[0] != 1:
        raise ValueError(f"the packed form is (1, H, total, D), got {tuple(q.shape)=}")
    given = (cu_q,) if cu_k is None else (cu_q, cu_k)
    if not all([isinstance(x, Tensor) for x in given]):
        return _read_packed(cu_q, cu_k, q, k)
    return _packed_facts.get_or_read(given, (q.shape[2], k.shape[2]), lambda: _read_packed(cu_q, cu_k, q, k))


def _read_packed(cu_q: Tensor, cu_k: Tensor | None, q: Tensor, k: Tensor) -> Packed:
    longest_q = _check_offsets(cu_q, "cu_seqlens_q", q.shape[2], q)
    small = cu_q.to(torch.int32, copy=True)  # what is known of a tensor must not keep it alive
    if cu_k is None:
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"cu_seqlens_k is needed where queries and keys differ in number: {tuple(q.shape)=}, {tuple(k.shape)=}"
            )
        return Packed(small, small, longest_q, longest_q, cu_q.numel() - 1, True, memo.Recent())
    longest_k = _check_offsets(cu_k, "cu_seqlens_k", k.shape[2], q)
    if cu_k.numel() != cu_q.numel():
        raise ValueError(f"as many sequences of queries as of keys: {tuple(cu_q.shape)=}, {tuple(cu_k.shape)=}")
    return Packed(small, cu_k.to(torch.int32, copy=True), longest_q, longest_k, cu_q.numel() - 1, False, memo.Recent())
