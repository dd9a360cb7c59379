"""A token of linear attention: rows, the rival, costs and goals.

The state is the one that its token leaves as it is, S = e^g S + kᵀv: every call computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import accel
from accel import dispatch
from accel.backends import inner_dtype
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import Case, Cost, Pick, Provider, Short
from accel.ops.linear.linear_attention_step import OP

NAME = "linear_attention_step"
PROVIDERS = ("accel", "in place")
LOG_DECAY = -0.125
HOW: dict[str, Any] = {"feature_map": "identity", "normalize": False}
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    size: int
    at_least: float | None  # times as fast as the rival

    @property
    def variant(self) -> str:
        return f"B{self.batch} h{self.heads} D{self.size}"

    def cost(self, itemsize: int) -> Cost:
        """A state is read and written, and used twice."""
        states = self.batch * self.heads
        tokens = 4 * states * self.size * itemsize
        return Cost(4 * states * self.size**2, 8 * states * self.size**2 + tokens)


SHAPES = (
    Shape(1, 8, 64, 1.5),
    Shape(8, 8, 64, 2.5),
    Shape(1, 32, 128, 2.5),
    Shape(8, 32, 128, 5.0),
    Shape(1, 16, 256, None),
)


def ours(decays: Tensor) -> Function:
    def function(q: Tensor, k: Tensor, v: Tensor, kv: Tensor) -> Tensor:
        return accel.linear_attention_step(q, k, v, (kv, None), log_decay=decays, **HOW)

    return function


def in_place(decays: Tensor) -> Function:
    """As decoding is written in plain torch, by who is careful."""
    shrink = torch.exp(decays)[:, None, None]

    def function(q: Tensor, k: Tensor, v: Tensor, kv: Tensor) -> Tensor:
        kv.mul_(shrink.to(kv.dtype)).addcmul_(k.transpose(-1, -2), v)
        return q @ kv

    return function


def reference(q: Tensor, k: Tensor, v: Tensor, kv: Tensor) -> Tensor:
    shrink = torch.tensor(LOG_DECAY, dtype=inner_dtype(q)).exp()
    return q @ (shrink * kv + k.transpose(-1, -2) @ v)


def _case(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    def decays() -> Tensor:
        return torch.full((shape.heads,), LOG_DECAY, device=device)

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        size = (shape.batch, shape.heads, 1, shape.size)
        q, k, v = [torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(3)]
        kept = torch.exp(torch.tensor(LOG_DECAY, dtype=torch.float64))
        return q, k, v, (k.double().transpose(-1, -2) @ v.double() / (1.0 - kept)).float()

    def backend(q: Tensor, k: Tensor, v: Tensor, kv: Tensor) -> str:
        given = OP.prepare(q, k, v, (kv, None), log_decay=decays(), **HOW)
        return dispatch.select(OP, given).name

    return Case(
        op=NAME,
        group="token",
        variant=shape.variant,
        shape=shape.variant,
        dtype=dtype,
        inputs=make,
        reference=reference,
        providers=(
            Provider("accel", lambda: ours(decays()), backend=backend),
            Provider("in place", lambda: in_place(decays())),
        ),
        costs={"forward": shape.cost(dtype.itemsize)},
        family="linear",
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op, in float32."""
    if torch.float32 in dtypes:
        for shape in SHAPES:
            yield _case(shape, device, torch.float32)


SHORT = Short(
    rivals=("in place",),
    cpu=(Pick("a token, 8 texts, 32 heads", "token", SHAPES[3].variant, ("forward",)),),
    cuda=(),
)
GOALS = tuple(
    [
        Goal(
            f"a token, {shape.variant}", NAME, "speedup", "cpu",
            {"variant": shape.variant, "dtype": "fp32", "mode": "forward"}, "in place", at_least=shape.at_least,
        )
        for shape in SHAPES
        if shape.at_least is not None
    ]
)  # fmt: skip
