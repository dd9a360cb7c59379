"""Which token goes to which row where the choices of all tokens are sorted by expert: a stable counting sort."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel.backends import check_beside, integer
from accel.ops.moe.groups import check_indices


class Plan(NamedTuple):
    """Where the rows of each expert are. N is known from sizes alone; how many rows are used, from ``offsets``."""

    source: Tensor
    """``(N,)`` int64: the choice t·K + k of which a row is; its token is ``source // K``. −1 where a row is of none."""
    destination: Tensor
    """``(T, K)`` int64: the row of each choice, −1 where it has none."""
    counts: Tensor
    """``(X,)`` int64: rows of each expert, without what they were padded by."""
    offsets: Tensor
    """``(X + 1,)`` int64: expert x has rows ``offsets[x]`` to ``offsets[x] + counts[x]``, and zeros up to
    ``offsets[x + 1]``; rows from ``offsets[X]`` on are zeros, too."""


class PlanArgs(NamedTuple):
    """The checked arguments of a plan."""

    indices: Tensor  # (T, K) int64 contiguous
    weights: Tensor | None  # (T, K) fp32 (fp64 beside fp64) contiguous, where the largest keep their rows
    num_experts: int
    capacity: int  # −1 for no limit
    align: int
    rows: int  # N


def row_bound(choices: int, num_experts: int, capacity: int, align: int) -> int:
    """N: rows that are enough whatever the indices are, by sizes alone."""
    rows = choices
    if align > 1:  # of at most this many experts the last block is not full, and the sum is a multiple
        rows = (choices + torch.sym_min(num_experts, choices) * (align - 1)) // align * align
    if capacity >= 0:
        rows = torch.sym_min(rows, num_experts * ((capacity + align - 1) // align * align))
    return rows


def _positions(experts: Tensor, num_experts: int, order: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each choice among those of its expert, and how many each has; expert X are those that have none."""
    count = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    counts = count.scatter_add(0, experts, torch.ones_like(experts))
    starts = counts.cumsum(0) - counts
    places = torch.arange(experts.shape[0], device=experts.device) - starts[experts[order]]
    return torch.zeros_like(experts).scatter(0, order, places), counts[:-1]


def make(*given: Any) -> Plan:
    """The definition, in plain torch."""
    args = PlanArgs(*given)
    X, flat = args.num_experts, args.indices.flatten()
    experts = torch.where((flat >= 0) & (flat < X), flat, X)
    if args.capacity >= 0:
        if args.weights is None:
            order = experts.argsort(stable=True)
        else:  # the largest first; a NaN behind every number
            best = (-args.weights.detach().flatten()).argsort(stable=True)
            order = best[experts[best].argsort(stable=True)]
        places, _ = _positions(experts, X, order)
        experts = torch.where(places < args.capacity, experts, X)
    places, counts = _positions(experts, X, experts.argsort(stable=True))
    ends = ((counts + (args.align - 1)) // args.align * args.align).cumsum(0)
    offsets = torch.cat([torch.zeros_like(ends[:1]), ends])
    rows = torch.where(experts < X, offsets[experts] + places, -1)
    # one place more, for choices without a row
    source = torch.full((args.rows + 1,), -1, dtype=torch.int64, device=flat.device)
    to = torch.where(rows < 0, args.rows, rows)
    source = source.scatter(0, to, torch.arange(flat.shape[0], device=flat.device))[:-1]
    return Plan(source, rows.view(args.indices.shape), counts, offsets)


# --- checks ---


def at_least(value: Any, name: str, least: int) -> Any:
    """``value`` as an integer that is not smaller."""
    try:
        number = integer(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {name}={value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {name}={value!r}")
    return number


def prepare_plan(
    x: Tensor,
    indices: Tensor,
    num_experts: int,
    weights: Tensor | None,
    capacity: int | None,
    drop: str,
    align: int,
) -> PlanArgs:
    """The arguments of a plan for the choices of the tokens ``x``, checked."""
    check_indices(indices, x.shape[0], x)
    num_experts, align = at_least(num_experts, "num_experts", 1), at_least(align, "align", 1)
    limit = -1 if capacity is None else at_least(capacity, "capacity", 0)
    if drop not in ("order", "score"):
        raise ValueError(f"drop must be 'order' or 'score', got {drop!r:.80}")
    if weights is not None:
        check_beside(weights, "weights", x, "x")
        if tuple(weights.shape) != tuple(indices.shape):
            raise ValueError(f"weights must be (T, K) = {tuple(indices.shape)} as indices, got {tuple(weights.shape)}")
    if drop == "score" and weights is None:
        raise ValueError(f"{drop=} needs weights")
    by = weights.detach() if weights is not None and drop == "score" and limit >= 0 else None
    if by is not None:
        by = by.to(torch.float64 if by.dtype == x.dtype == torch.float64 else torch.float32).contiguous()
    rows = row_bound(indices.shape[0] * indices.shape[1], num_experts, limit, align)
    return PlanArgs(indices.to(torch.int64).contiguous(), by, num_experts, limit, align, rows)
