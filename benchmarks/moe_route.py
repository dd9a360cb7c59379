"""Routing: rows, rivals, costs and goals. Rivals are transformers' lines for the same choice, as they are and compiled.

The output that is judged is the weight of each choice, the best first; the gradient of the logits shows whose it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import accel
from accel import dispatch
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import Case, Cost, Pick, Provider, Short, compiled
from accel.ops.moe.moe_route import OP

NAME = "moe_route"
PROVIDERS = ("accel", "torch", "compile")
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Routing:
    """X experts of which each token has K; in groups, of the best of which they are, sigmoid scores and a bias."""

    group: str
    tokens: int
    experts: int
    choices: int
    groups: tuple[int, int] | None = None

    def bias(self, like: Tensor) -> Tensor | None:
        if self.groups is None:
            return None
        return torch.linspace(-0.1, 0.1, self.experts, dtype=torch.float32, device=like.device).to(like.dtype)

    @property
    def how(self) -> dict[str, Any]:
        if self.groups is None:
            return {}
        return {"score": "sigmoid", "num_groups": self.groups[0], "topk_groups": self.groups[1], "scale": 2.5}

    def __str__(self) -> str:
        groups = "" if self.groups is None else f", {self.groups[1]} of {self.groups[0]} groups"
        return f"T{self.tokens} X{self.experts} K{self.choices}{groups}"


def ours(routing: Routing, **how: Any) -> Function:
    def function(logits: Tensor) -> Tensor:
        return accel.moe_route(logits, routing.choices, bias=routing.bias(logits), **routing.how, **how)[0]

    return function


def theirs(routing: Routing) -> Function:
    """Qwen3-MoE's router behind its product, or DeepSeek-V3's."""

    def softmax(logits: Tensor) -> Tensor:
        weights = logits.softmax(-1, dtype=torch.float32).topk(routing.choices, dim=-1)[0]
        return weights / weights.sum(-1, keepdim=True)

    def grouped(logits: Tensor) -> Tensor:
        number, chosen = routing.groups or (1, 1)
        scores, bias = logits.float().sigmoid(), routing.bias(logits)
        compared = scores if bias is None else scores + bias
        best = compared.unflatten(-1, (number, -1)).topk(2, dim=-1)[0].sum(-1).topk(chosen, dim=-1, sorted=False)[1]
        mask = torch.zeros(logits.shape[0], number, device=logits.device).scatter(1, best, 1)
        mask = mask.repeat_interleave(routing.experts // number, 1).bool()
        weights = scores.gather(1, compared.masked_fill(~mask, float("-inf")).topk(routing.choices, dim=-1)[1])
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5

    return softmax if routing.groups is None else grouped


def _case(routing: Routing, device: str, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        """Logits that no rounding makes equal: a choice between equals has no gradient to be judged by."""
        size = (routing.tokens, routing.experts)
        order = torch.rand(size, generator=generator, device=device).argsort(-1)
        return ((order.float() / routing.experts * 8 - 4).to(dtype),)

    def backend(logits: Tensor) -> str:
        return dispatch.select(OP, OP.prepare(logits, routing.choices, bias=routing.bias(logits), **routing.how)).name

    read, made = routing.tokens * routing.experts * dtype.itemsize, routing.tokens * routing.choices * 12
    work = routing.tokens * routing.experts
    return Case(
        op=NAME,
        group=routing.group,
        variant=f"T {routing.tokens}",
        shape=str(routing),
        dtype=dtype,
        inputs=make,
        reference=ours(routing, backend="reference"),
        providers=(
            Provider("accel", lambda: ours(routing), backend),
            Provider("torch", lambda: theirs(routing)),
            Provider("compile", lambda: compiled(theirs(routing))),
        ),
        costs={"forward": Cost(work, read + made), "forward+backward": Cost(2 * work, 3 * read + 2 * made)},
        family="softmax",
    )


def routings(device: str) -> Iterator[Routing]:
    for tokens in (1, 16, 512) if device == "cpu" else (1, 4096, 32768):
        yield Routing("64 experts", tokens, 64, 8)
        yield Routing("256 experts in groups", tokens, 256, 8, (8, 4))


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """In float32, as models route; bfloat16 makes equals of logits."""
    if torch.float32 in dtypes:
        for routing in routings(device):
            yield _case(routing, device, torch.float32)


SHORT = Short(
    rivals=("torch",),
    cpu=(Pick("64 experts, 512 tokens", "64 experts", "T 512", ("forward",)),),
    cuda=(Pick("256 experts in groups, 4096 tokens", "256 experts in groups", "T 4096", ("forward",)),),
)

GOALS = tuple(
    Goal(
        f"{group}, {mode}, against transformers' lines", NAME, "speedup", "cpu", {"group": group, "mode": mode},
        "torch", at_least=1.0,
    )
    for group in ("64 experts", "256 experts in groups")
    for mode in ("forward", "forward+backward")
)  # fmt: skip
