"""The router of a mixture behind its product: rows, rivals, costs and goals.

The rival is the code of transformers' own router classes with their product taken out, so that both begin with logits.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import accel
from accel import dispatch
from accel.benchmarks._torchvision import allow_import
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import Case, Cost, Pick, Provider, Short, UnavailableError
from accel.ops.moe.moe_route import OP

NAME = "moe_route"
PROVIDERS = ("accel", "transformers")
BOTH = "forward+backward"
SOFTMAX, GROUPED = "softmax", "sigmoid of groups"
TOP_K = 8
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """``how`` are the keywords of our op, and what transformers' class is told by the attributes ``theirs``."""

    group: str
    tokens: int
    experts: int
    how: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        return f"T {self.tokens}, {self.experts} experts"


@functools.cache
def bias_of(group: str, experts: int, device: torch.device) -> Tensor | None:
    return torch.linspace(0.1, -0.1, experts, device=device) if group == GROUPED else None


def softmax(tokens: int, experts: int) -> Shape:
    """Mixtral and Qwen3."""
    return Shape(SOFTMAX, tokens, experts)


def grouped(tokens: int, experts: int) -> Shape:
    """DeepSeek-V3: the experts are those of the best 4 of 8 groups."""
    how = {"score": "sigmoid", "num_groups": 8, "topk_groups": 4, "scale": 2.5}
    theirs = {"num_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
    return Shape(GROUPED, tokens, experts, how, theirs)


def cost(shape: Shape, mode: str) -> Cost:
    """Logits are read, weights and indices written; backward logits, indices and two gradients beside them."""
    logits, chosen = shape.tokens * shape.experts, shape.tokens * TOP_K
    forward = 4 * logits + 12 * chosen
    return Cost(logits, forward) if mode == "forward" else Cost(2 * logits, forward + 8 * logits + 12 * chosen)


def ours(shape: Shape, **how: Any) -> Function:
    def function(logits: Tensor) -> Tensor:
        bias = bias_of(shape.group, shape.experts, logits.device)
        return accel.moe_route(logits, TOP_K, bias=bias, **shape.how, **how)[0]

    return function


def theirs(shape: Shape) -> Function:
    with contextlib.suppress(ModuleNotFoundError):
        allow_import()  # transformers imports torchvision where it is installed
    try:
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    except ImportError as error:
        raise UnavailableError(f"transformers with routers of their own is not installed: {error}") from error
    cls: Any = MixtralTopKRouter if shape.group == SOFTMAX else DeepseekV3TopkRouter
    names = {**cls.forward.__globals__, "F": types.SimpleNamespace(linear=lambda x, weight: x)}
    forward = types.FunctionType(cls.forward.__code__, names)
    how = {"top_k": TOP_K, "num_experts": shape.experts, "hidden_dim": shape.experts, **shape.theirs}

    def function(logits: Tensor) -> Tensor:
        bias = bias_of(shape.group, shape.experts, logits.device)
        module = types.SimpleNamespace(**how, weight=logits.new_empty(0), e_score_correction_bias=bias)
        made: Tensor = forward(module, logits)[1]
        return made

    return function


def _case(shape: Shape, device: str) -> Case:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(shape.tokens, shape.experts, generator=generator, device=device),)

    def backend(logits: Tensor) -> str:
        args = OP.prepare(logits, TOP_K, bias=bias_of(shape.group, shape.experts, logits.device), **shape.how)
        return dispatch.select(OP, args).name

    def in_their_order(logits: Tensor) -> Tensor:
        """DeepSeek's weights come in any order: they are judged by their own code in float64."""
        return theirs(shape)(logits)

    return Case(
        op=NAME,
        group=shape.group,
        variant=shape.variant,
        shape=f"T{shape.tokens} X{shape.experts} K{TOP_K}",
        dtype=torch.float32,
        inputs=make,
        reference=ours(shape, backend="reference"),
        providers=(
            Provider("accel", lambda: ours(shape), backend),
            Provider("transformers", lambda: theirs(shape), computes=in_their_order),
        ),
        costs={mode: cost(shape, mode) for mode in ("forward", BOTH)},
        family="softmax",
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """In float32, in which routers compute."""
    if torch.float32 in dtypes:
        for make in (softmax, grouped):
            for experts in (64, 256):
                for tokens in (1, 16, 512, 4096):
                    yield _case(make(tokens, experts), device)


SHORT = Short(
    rivals=("transformers",),
    cpu=(Pick("256 experts in groups, 512 tokens", GROUPED, "T 512, 256 experts", ("forward",)),),
    cuda=(Pick("256 experts in groups, 4096 tokens", GROUPED, "T 4096, 256 experts", ("forward",)),),
)

GOALS = (
    *[
        Goal(
            f"routing of {tokens} tokens, {group}, {mode}, against transformers", NAME, "speedup", "cpu",
            {"group": group, "variant": f"T {tokens}, {experts} experts", "mode": mode}, "transformers", at_least=1.0,
        )
        for group, experts in ((SOFTMAX, 64), (GROUPED, 256))
        for tokens in (512, 4096)
        for mode in ("forward", BOTH)
    ],
    *[
        # 10 µs for these logits, each of which is one operation
        Goal(
            f"routing of 4096 tokens within 10 µs, {group}", NAME, "rate", "cuda",
            {"group": group, "variant": "T 4096, 256 experts", "mode": "forward"}, at_least=4096 * 256 / 10e-6 / 1e12,
        )
        for group in (SOFTMAX, GROUPED)
    ],
)  # fmt: skip
