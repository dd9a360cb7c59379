"""Results of experts brought back to their tokens in Triton; the kernels are in ``rows.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from accel.kernels import _launch
from accel.kernels.moe import rows as kernels
from accel.kernels.moe.rows import why_not

__all__ = ["backward", "compile_cases", "forward", "why_not"]


def forward(y: Tensor, weights: Tensor | None, source: Tensor, destination: Tensor) -> Tensor:
    """The output; arguments are the fields of ``accel.ops.moe.moe_unpermute.Args``."""
    return kernels.combine(y, weights, destination)


def backward(
    grad_out: Tensor, y: Tensor, weights: Tensor | None, source: Tensor, destination: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """The gradients of y and the weights."""
    wanted = weights is not None and needs[0]
    return kernels.spread(grad_out, y if wanted else None, weights, source, destination)


def compile_cases() -> Iterator[_launch.CompileCase]:
    yield from kernels.spread_cases(weighted=True)
    yield from kernels.combine_cases(weighted=True)
