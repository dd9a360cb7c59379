"""Grouped linear layers: one product of the blocks of ``moe_experts``, against torch's grouped product and a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import accel
from accel import dispatch
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import Case, Cost, Pick, Provider, Short, UnavailableError
from accel.benchmarks.moe_experts import BOTH, Function, Shape, mixtral, qwen3
from accel.ops.moe.grouped_linear import OP

NAME = "grouped_linear"
PROVIDERS = ("accel", "grouped_mm", "loop")


def offsets_of(shape: Shape) -> Tensor:
    counts = shape.indices.flatten().bincount(minlength=shape.experts)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def costs(shape: Shape, itemsize: int, modes: Sequence[str]) -> dict[str, Cost]:
    """A product forward and two backward; weights that are met are read in either direction, gradients written."""
    expert, rows = 2 * shape.inner * shape.channels, shape.indices.numel()
    met, ends = int(shape.indices.unique().numel()), rows * (shape.channels + 2 * shape.inner)
    forward = Cost(2 * rows * expert, (met * expert + ends) * itemsize)
    both = Cost(6 * rows * expert, (2 * met * expert + shape.experts * expert + 3 * ends) * itemsize)
    known = {"forward": forward, BOTH: both}
    return {mode: known[mode] for mode in modes}


def ours(shape: Shape, **how: Any) -> Function:
    offsets = offsets_of(shape)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return accel.grouped_linear(x, weight, offsets.to(x.device), **how)

    return function


def grouped_mm(shape: Shape) -> Function:
    known: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if known is None:
        raise UnavailableError(f"torch {torch.__version__} has no grouped product")
    ends = offsets_of(shape)[1:].to(torch.int32)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        made: Tensor = known(x, weight.transpose(1, 2), offs=ends.to(x.device))
        return made

    return function


def loop(shape: Shape) -> Function:
    edges = offsets_of(shape).tolist()

    def function(x: Tensor, weight: Tensor) -> Tensor:
        parts = zip(edges, edges[1:], weight, strict=False)
        return torch.cat([x[a:b] @ w.T for a, b, w in parts if a < b])

    return function


def _inputs(shape: Shape, device: str, dtype: torch.dtype) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        x = torch.randn(shape.indices.numel(), shape.channels, generator=generator, device=device)
        size = (shape.experts, 2 * shape.inner, shape.channels)
        weight = torch.randn(size, generator=generator, device=device) * shape.channels**-0.5
        return x.to(dtype), weight.to(dtype)

    return make


def _backend(shape: Shape) -> Callable[..., str]:
    def name(x: Tensor, weight: Tensor) -> str:
        return dispatch.select(OP, OP.prepare(x, weight, offsets_of(shape).to(x.device))).name

    return name


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op."""
    for dtype in dtypes:
        for shape in (*map(qwen3, (1, 16, 512)), *map(mixtral, (1, 16, 512))):
            yield Case(
                op=NAME,
                group=shape.group,
                variant=shape.variant,
                shape=str(shape),
                dtype=dtype,
                inputs=_inputs(shape, device, dtype),
                reference=ours(shape, backend="reference"),
                providers=(
                    Provider("accel", lambda shape=shape: ours(shape), _backend(shape)),  # type: ignore[misc]
                    Provider("grouped_mm", lambda shape=shape: grouped_mm(shape)),  # type: ignore[misc]
                    Provider("loop", lambda shape=shape: loop(shape)),  # type: ignore[misc]
                ),
                costs=costs(shape, dtype.itemsize, ["forward", BOTH]),
                family="grouped",
                cold=(1,),
            )


SHORT = Short(
    rivals=("grouped_mm",),
    cpu=(Pick("64 experts, 512 tokens", "Qwen3-like", "T 512", ("forward",)),),
    cuda=(Pick("64 experts, 512 tokens", "Qwen3-like", "T 512", ("forward",)),),
)

GOALS = tuple(
    Goal(
        f"{group}, forward, fp32", NAME, "speedup", "cpu", {"group": group, "dtype": "fp32", "mode": "forward"},
        "grouped_mm", at_least=1.0,
    )
    for group in ("Qwen3-like", "Mixtral-like")
)  # fmt: skip
