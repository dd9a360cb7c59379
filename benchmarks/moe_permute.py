"""Tokens to their experts and back: rows, rivals, costs and goals.

A call sorts the tokens by expert and brings them back, weighed; ``grouped_mm`` is how transformers does it around its
grouped products. The rows of ``routed`` also choose the experts, beside the layer that this is for: ``layer`` is
``moe_experts`` on the same choice, of which routing and permutation should be a small part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import accel
from accel import dispatch
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import Case, Cost, Pick, Provider, Short
from accel.benchmarks.moe_experts import BOTH, Function, Shape, mixtral, qwen3
from accel.ops.moe.moe_permute import OP

NAME = "moe_permute"
PROVIDERS = ("accel", "grouped_mm", "layer")


def ours(shape: Shape, **how: Any) -> Function:
    def function(x: Tensor, weights: Tensor, *rest: Tensor) -> Tensor:
        rows, plan = accel.moe_permute(x, shape.indices.to(x.device), shape.experts, **how)
        return accel.moe_unpermute(rows, plan, weights, **how)

    return function


def grouped_mm(shape: Shape) -> Function:
    """What stands around the products in transformers' ``grouped_mm_experts_forward``."""

    def function(x: Tensor, weights: Tensor, *rest: Tensor) -> Tensor:
        experts = shape.indices.to(x.device).flatten()
        order = experts.argsort()
        sorted_ = experts[order].to(torch.float32 if x.device.type == "cpu" else torch.int32)
        counts = sorted_.histc(bins=shape.experts, min=0, max=shape.experts - 1)
        counts.cumsum(0, dtype=torch.int32)
        rows = x[order // shape.choices] * weights.flatten()[order, None]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0], device=x.device)
        return rows[inverse].view(shape.tokens, shape.choices, -1).sum(1)

    return function


def routed(shape: Shape, **how: Any) -> Function:
    def function(x: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
        weights, indices = accel.moe_route(logits, shape.choices, **how)
        rows, plan = accel.moe_permute(x, indices, shape.experts, **how)
        return accel.moe_unpermute(rows, plan, weights, **how)

    return function


def layer(shape: Shape, **how: Any) -> Function:
    """The experts themselves, on a choice that is at hand."""

    def function(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        weights = logits.softmax(-1)[:, : shape.choices]
        return accel.moe_experts(x, shape.indices.to(x.device), weights, gate_up, down, **how)

    return function


def _inputs(shape: Shape, device: str, dtype: torch.dtype, whole: bool) -> Callable[..., tuple[Tensor, ...]]:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        x = normal(shape.tokens, shape.channels).to(dtype)
        if not whole:
            return x, normal(shape.tokens, shape.choices).softmax(-1)
        order = torch.rand(shape.tokens, shape.experts, generator=generator, device=device).argsort(-1)
        gate_up = normal(shape.experts, 2 * shape.inner, shape.channels) * shape.channels**-0.5
        down = normal(shape.experts, shape.channels, shape.inner) * shape.inner**-0.5
        return x, order.float() / shape.experts * 8 - 4, gate_up.to(dtype), down.to(dtype)

    return make


def _cost(shape: Shape, itemsize: int, passes: int) -> Cost:
    moved = 2 * (shape.choices + 1) * shape.tokens * shape.channels * itemsize
    return Cost(passes * 2 * shape.indices.numel() * shape.channels, passes * moved)


def _backend(shape: Shape) -> Callable[..., str]:
    def name(x: Tensor, *rest: Tensor) -> str:
        return dispatch.select(OP, OP.prepare(x, shape.indices.to(x.device), shape.experts)).name

    return name


def _case(shape: Shape, device: str, dtype: torch.dtype, whole: bool) -> Case:
    if whole:
        function, providers = (
            routed,
            [Provider("layer", lambda: layer(shape), computes=layer(shape, backend="reference"))],
        )
    else:
        function, providers = ours, [Provider("grouped_mm", lambda: grouped_mm(shape))]
    costs = {"forward": _cost(shape, dtype.itemsize, 1)}
    return Case(
        op=NAME,
        group=shape.group,
        variant=f"{shape.variant}, routed" if whole else shape.variant,
        shape=str(shape),
        dtype=dtype,
        inputs=_inputs(shape, device, dtype, whole),
        reference=function(shape, backend="reference"),
        providers=(Provider("accel", lambda: function(shape), _backend(shape)), *providers),
        costs=costs if whole else {**costs, BOTH: _cost(shape, dtype.itemsize, 2)},
        family="experts",
        cold=(2, 3) if whole else (),
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op, those that goals are about first."""
    tokens = 512 if device == "cpu" else 32768
    for dtype in dtypes:
        for shape in (qwen3(tokens), mixtral(tokens)):
            yield _case(shape, device, dtype, whole=True)
        for shape in (qwen3(16), qwen3(tokens), mixtral(tokens)):
            yield _case(shape, device, dtype, whole=False)


SHORT = Short(
    rivals=("grouped_mm",),
    cpu=(Pick("64 experts, 512 tokens, there and back", "Qwen3-like", "T 512", ("forward",)),),
    cuda=(Pick("64 experts, 32768 tokens, there and back", "Qwen3-like", "T 32768", ("forward",)),),
)

GOALS = (
    *(
        Goal(
            f"{group}: the layer over routing and permutation, 512 tokens, {dtype}", NAME, "speedup", "cpu",
            {"group": group, "variant": "T 512, routed", "dtype": dtype}, "layer", at_least=20.0,
        )
        for group in ("Qwen3-like", "Mixtral-like")
        for dtype in ("fp32", "bf16")
    ),
    *(
        Goal(
            f"there and back, {mode}, {dtype}", NAME, "speedup", "cpu",
            {"group": "Qwen3-like", "variant": "T 512", "mode": mode, "dtype": dtype}, "grouped_mm", at_least=1.0,
        )
        for mode in ("forward", BOTH)
        for dtype in ("fp32", "bf16")
    ),
)  # fmt: skip
