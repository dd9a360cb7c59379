"""Tokens sorted by expert in Triton; the kernels are in ``rows.py``. The plan is made by torch's own stable sort, on
the device."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from accel.kernels import _launch
from accel.kernels.moe import rows as kernels
from accel.kernels.moe.rows import why_not
from accel.ops.moe import plan

__all__ = ["backward", "compile_cases", "forward", "why_not"]


def forward(x: Tensor, *of_the_plan: object) -> tuple[Tensor, ...]:
    """The rows and the plan; arguments are the fields of ``accel.ops.moe.moe_permute.Args``."""
    made = plan.make(*of_the_plan)
    return kernels.spread(x, None, None, made.source, made.destination)[0], *made


def backward(grad_rows: Tensor, destination: Tensor, *rest: object) -> Tensor:
    """The gradient of x."""
    return kernels.combine(grad_rows, None, destination)


def compile_cases() -> Iterator[_launch.CompileCase]:
    yield from kernels.spread_cases(weighted=False)
    yield from kernels.combine_cases(weighted=False)
