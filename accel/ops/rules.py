"""Which keys a query may see, and which relative position a pair has, as short integer tensors made on the host.

Every rule gives a query at most two intervals of keys, so that causal order, windows, prefixes, blocks and packed
documents together are one ``(B or 1, T, 5)`` tensor: the kernels know no rule by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

FAR = 2**30
"""Beyond any token that a kernel takes, and far enough from the end of int32 to be added to one."""

Interval = tuple[Any, Any]
"""First key and the key behind the last, each an int or an int32 tensor over queries."""


def at_least(x: Tensor, bound: int | Tensor) -> Tensor:
    """Numbers stay numbers: as tensors they would be copied to the GPU, which waits, and no CUDA graph takes it."""
    return torch.maximum(x, bound) if isinstance(bound, Tensor) else x.clamp_min(bound)


def at_most(x: Tensor, bound: int | Tensor) -> Tensor:
    return torch.minimum(x, bound) if isinstance(bound, Tensor) else x.clamp_max(bound)


class Queries(NamedTuple):
    """Where each query stands; every field an int or an int32 tensor that broadcasts to ``(B or 1, T)``."""

    position: Any  # within its sequence
    aligned: Any  # the same with the last query beside the last key, or unchanged for top-left alignment
    queries: Any  # length of its sequence
    keys: Any  # number of keys of its sequence
    sequence: Any  # index of its sequence: the batch entry, or the document


# --- patterns ---


@dataclass(frozen=True, eq=False)
class PrefixLM:
    """The first ``lengths`` keys are seen by every query, later ones by queries at or after them (bottom-right).

    Args:
        lengths: an int, or one per sequence of the batch (per document in packed form) as a sequence or an integer
            tensor ``(B,)``; at least 0.
    """

    lengths: int | Sequence[int] | Tensor

    def intervals(self, at: Queries) -> list[Interval]:
        lengths: Any = min(self.lengths, FAR) if isinstance(self.lengths, int) else self.lengths
        if not isinstance(lengths, int):
            given = torch.as_tensor(lengths)
            if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool:
                raise ValueError(f"PrefixLM takes an int or integers (B,), got {given.dtype} {tuple(given.shape)}")
            lengths = given.clamp_max(FAR).to(at.position.device, torch.int32)[at.sequence]
        return [(0, at_least(at.aligned + 1, lengths))]


@dataclass(frozen=True)
class BlockCausal:
    """Blocks of ``n`` tokens see themselves whole and all blocks before them (bottom-right)."""

    n: int

    def __post_init__(self) -> None:
        _check_block(self)

    def intervals(self, at: Queries) -> list[Interval]:
        n = min(self.n, FAR)
        return [(0, (at.aligned.div(n, rounding_mode="floor") + 1) * n)]


@dataclass(frozen=True)
class BlockDiffusion:
    """The training mask of block diffusion: a noised copy of the sequence followed by the clean one, blocks of ``n``.

    A noised token sees its own noised block and the clean blocks before it; a clean token sees the clean blocks up to
    its own. T = S, even (each document of a packed batch). Arriola et al., Block Diffusion (2025).
    """

    n: int

    def __post_init__(self) -> None:
        _check_block(self)

    def intervals(self, at: Queries) -> list[Interval]:
        half, n = at.keys // 2, min(self.n, FAR)
        noised = at.position < half
        start = torch.where(noised, at.position, at.position - half).div(n, rounding_mode="floor") * n
        end = at_most(start + n, half)
        own = (torch.where(noised, start, half), torch.where(noised, end, half + end))
        return [own, (half, torch.where(noised, half + start, half))]


def _check_block(pattern: BlockCausal | BlockDiffusion) -> None:
    if not isinstance(pattern.n, int) or pattern.n < 1:
        raise ValueError(f"{type(pattern).__name__} takes a positive block size, got {pattern.n!r}")


Pattern = PrefixLM | BlockCausal | BlockDiffusion


def key_intervals(at: Queries, left: int, right: int, patterns: Sequence[Pattern]) -> tuple[Tensor, ...]:
    """``first0, end0, first1, end1`` of the keys each query sees: sorted, within its sequence, empty as first = end.

    ``left`` and ``right`` bound the distance before and after the aligned position, inclusive, −1 without a bound.
    """
    low, high = torch.zeros_like(at.position), torch.zeros_like(at.position) + at.keys
    if left >= 0:
        low = torch.maximum(low, at.aligned - min(left, FAR))
    if right >= 0:
        high = torch.minimum(high, at.aligned + min(right, FAR - 1) + 1)
    pieces: list[Interval] = [(low, high)]
    for pattern in patterns:
        pieces = [(at_least(a, c), torch.minimum(b, d)) for a, b in pieces for c, d in pattern.intervals(at)]
    (a, b), (c, d) = pieces[0], pieces[1] if len(pieces) > 1 else (high, high)
    return a, torch.maximum(a, b), c, torch.maximum(c, d)


# --- relative positions ---


@dataclass(frozen=True)
class T5Buckets:
    """The logarithmic buckets of T5's relative position bias; their number is the rows of the table.

    Args:
        bidirectional: half of the buckets for keys after the query (encoder), else later keys share bucket 0.
        max_distance: from here on all distances share the last bucket.
        q_offset: position of the first query among the keys, for decoding with a cache.

    Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (2020).
    """

    bidirectional: bool = True
    max_distance: int = 128
    q_offset: int = 0

    def rows_of(self, distance: Tensor, buckets: int) -> Tensor:
        """Bucket of each ``distance`` = query − key, int64."""
        away = -(distance + self.q_offset)  # key − query
        first = torch.zeros_like(away)
        if self.bidirectional:
            buckets //= 2
            first = (away > 0) * buckets
            away = away.abs()
        else:
            away = -away.clamp_max(0)
        exact = buckets // 2
        if exact < 1 or self.max_distance <= exact:
            raise ValueError(f"{self!r} leaves no room for {buckets} buckets a direction")
        # fp32 and this order of operations, so that the edges of the buckets fall where T5's own do
        ratio = torch.log(away.clamp_min(1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (buckets - exact)).to(torch.int64)).clamp_max(buckets - 1)
        return first + torch.where(away < exact, away, far)


@dataclass(frozen=True)
class Grid2D:
    """Tokens of an ``h`` × ``w`` grid, row by row, behind ``extra`` tokens without a place on it (a class token).

    The table's row for query i and key j is ``(yi−yj+h−1)·(2w−1) + (xi−xj+w−1)``, as in Swin (``extra=0``). With extra
    tokens three more rows follow, as in BEiT: extra to grid, grid to extra, extra to extra.
    """

    h: int
    w: int
    extra: int = 0

    def __post_init__(self) -> None:
        if min(self.h, self.w) < 1 or self.extra < 0:
            raise ValueError(f"a grid has positive sides and no negative number of extra tokens, got {self!r}")

    @property
    def tokens(self) -> int:
        return self.h * self.w + self.extra

    @property
    def rows(self) -> int:
        return (2 * self.h - 1) * (2 * self.w - 1) + (3 if self.extra else 0)


def grid_index(
    grid: Sequence[int], device: torch.device | None = None, queries: slice = slice(None), keys: slice = slice(None)
) -> Tensor:
    """The rows of :class:`Grid2D`'s table as an int64 tensor ``(T, T)``, or some of it: its definition."""
    h, w, extra = grid
    at = torch.arange(-extra, h * w, device=device)
    i, j = at[queries, None], at[keys]
    rows = (2 * h - 1) * (2 * w - 1)
    y = i.div(w, rounding_mode="floor") - j.div(w, rounding_mode="floor") + h - 1
    index = y * (2 * w - 1) + i % w - j % w + w - 1
    if not extra:
        return index
    special = torch.where(i >= 0, rows + 1, torch.where(j >= 0, rows, rows + 2))
    return torch.where((i >= 0) & (j >= 0), index, special)


BiasIndex = Tensor | str | T5Buckets | Grid2D
