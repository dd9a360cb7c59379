"""Rows that lie sorted by expert: offsets, the product of each expert's rows with its weights, and checks of both."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from accel import memo, transforms

INTEGERS = (torch.int32, torch.int64)


# --- the definition of a grouped product ---


def bounds(offsets: Tensor) -> list[int] | None:
    """The values of ``offsets``, None where they cannot be read: in a graph that is traced, under ``vmap``, and of a
    tensor without data."""
    traced = torch.compiler.is_compiling() or type(offsets) is not Tensor
    if traced or transforms.batched() or offsets.device.type == "meta":
        return None
    found: list[int] = offsets.tolist()
    return found


def grouped_product(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Rows ``offsets[e]`` to ``offsets[e + 1]`` of x ``(N, C)`` times ``weight[e]`` of ``(X, C, O)``, plus ``bias[e]``;
    0 in the rows behind the last offset. Where offsets cannot be read every row meets every expert."""
    edges = bounds(offsets)
    if edges is not None:
        *parts, tail = x.split([b - a for a, b in itertools.pairwise(edges)] + [x.shape[0] - edges[-1]])
        made = [part @ w for part, w in zip(parts, weight.unbind(0), strict=True)]
        if bias is not None:
            made = [y + b for y, b in zip(made, bias.unbind(0), strict=True)]
        return torch.cat([*made, tail.new_zeros(tail.shape[0], weight.shape[2])])
    owner = torch.searchsorted(offsets, torch.arange(x.shape[0], device=x.device), right=True) - 1
    out = x.new_zeros(x.shape[0], weight.shape[2])
    for e in range(weight.shape[0]):
        own = (owner == e)[:, None]
        y = torch.where(own, x, 0.0) @ weight[e]  # what is not finite in a row must reach no other expert's gradient
        out = torch.where(own, y if bias is None else y + bias[e], out)
    return out


def sort_choices(indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choices ``(T, K)`` sorted by expert: their places ``t · K + k`` in that order, those whose index is none of
    ``experts`` last; where each expert's begin, ``(X + 1,)``; and which of the sorted ones have an expert."""
    of = indices.flatten()
    of, order = torch.where((of >= 0) & (of < experts), of, experts).sort(stable=True)
    return order, torch.searchsorted(of, torch.arange(experts + 1, dtype=of.dtype, device=of.device)), of < experts


def add_up_choices(rows: Tensor, weights: Tensor, order: Tensor, here: Tensor) -> Tensor:
    """Rows ``(T · K, C)`` of sorted choices, weighed by ``weights (T, K)`` and added up over K in that order. One that
    is not ``here`` counts for nothing, whatever it and its weight hold."""
    weighed = torch.where(here[:, None], rows * weights.flatten()[order][:, None], 0.0)
    return weighed[order.argsort()].view(*weights.shape, rows.shape[1]).sum(1)


# --- checks ---


def check_integers(x: Any, name: str, what: str, beside: Tensor | None = None, beside_name: str = "x") -> None:
    """``x`` is an int32 or int64 tensor, on the device of ``beside`` where one is given."""
    if not isinstance(x, Tensor) or x.dtype not in INTEGERS:
        kind = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{name} must be {what}, int32 or int64, got {kind}")
    if beside is not None and x.device != beside.device:
        raise ValueError(f"{name} is on {x.device} but {beside_name} is on {beside.device}")


def check_indices(indices: Any, tokens: int, beside: Tensor | None = None) -> None:
    """The experts of each of ``tokens``."""
    check_integers(indices, "indices", "the experts of each token", beside)
    if indices.dim() != 2 or indices.shape[0] != tokens or indices.shape[1] == 0:
        raise ValueError(f"indices must be (T, K) with T = {tokens} and K at least 1, got {tuple(indices.shape)}")


_right: memo.Facts[bool] = memo.Facts()


def check_offsets(offsets: Tensor, rows: int) -> None:
    """On a CPU: they rise from 0 to at most ``rows``. What is remembered of a tensor is read once."""
    if offsets.device.type != "cpu" or _right.known((offsets,), rows):
        return
    edges = bounds(offsets)
    if edges is None:
        return
    if edges[0] != 0:
        raise ValueError(f"offsets must begin with 0, got offsets[0]={edges[0]}")
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        if b < a:
            raise ValueError(f"offsets must not fall, got offsets[{i}]={a} and offsets[{i + 1}]={b}")
    if edges[-1] > rows:
        raise ValueError(f"offsets must end within the {rows} rows of x, got offsets[{len(edges) - 1}]={edges[-1]}")
    _right.get_or_read((offsets,), rows, lambda: True)
