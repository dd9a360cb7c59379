"""Tokens sorted by expert and back: rows, rivals, costs and goals.

``eager`` is what transformers' grouped experts do in plain torch: a sort, a gather of the tokens; then the inverse of
the permutation, a gather of the results, a product and a sum. It makes no counts and no way back while it sorts: for
few tokens, where a call is what costs, it has less to do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import accel
from accel import dispatch
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import Case, Cost, Pick, Provider, Short
from accel.ops.moe.moe_permute import OP
from accel.ops.moe.moe_unpermute import OP as UNPERMUTE
from accel.ops.moe.plan import Plan

NAME = "moe_permute"
PROVIDERS = ("accel", "eager")
BOTH = "forward+backward"
THERE, BACK = "permute", "unpermute"
TOP_K = 8
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    tokens: int
    channels: int
    experts: int

    @property
    def variant(self) -> str:
        return f"T {self.tokens}, {self.experts} experts"

    def __str__(self) -> str:
        return f"T{self.tokens} C{self.channels} X{self.experts} K{TOP_K}"


def cost(shape: Shape, group: str, mode: str, itemsize: int) -> Cost:
    """A pass reads or writes each token once and each of its rows once; so does the backward of either, but that the
    gradient of weights needs the results and the gradient of rows: K more rows."""
    token = shape.tokens * shape.channels * itemsize
    plan = shape.tokens * TOP_K * 8
    one, sums = (TOP_K + 1) * token, 2 * shape.tokens * TOP_K * shape.channels
    if group == THERE:  # indices are read; source and destination written, the latter read again
        forward = Cost(0, one + 3 * plan)
        return forward if mode == "forward" else Cost(sums // 2, 2 * one + 4 * plan)
    forward = Cost(sums, one + plan + plan // 2)
    return forward if mode == "forward" else Cost(2 * sums + sums // 2, 2 * one + TOP_K * token + 4 * plan)


# --- what is computed ---


@functools.cache
def indices_of(shape: Shape, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(shape.tokens)
    return torch.rand(shape.tokens, shape.experts, generator=generator).topk(TOP_K).indices.to(device)


@functools.cache
def plan_of(shape: Shape, device: torch.device) -> Plan:
    tokens = torch.zeros(shape.tokens, 1, device=device)
    return accel.moe_permute(tokens, indices_of(shape, device), shape.experts)[1]


def permute(shape: Shape, **how: Any) -> Function:
    return lambda x: accel.moe_permute(x, indices_of(shape, x.device), shape.experts, **how)[0]


def eager_permute(shape: Shape) -> Function:
    return lambda x: x.index_select(0, indices_of(shape, x.device).flatten().argsort(stable=True) // TOP_K)


def unpermute(shape: Shape, **how: Any) -> Function:
    return lambda y, weights: accel.moe_unpermute(y, plan_of(shape, y.device), weights, **how)


def eager_unpermute(shape: Shape) -> Function:
    def function(y: Tensor, weights: Tensor) -> Tensor:
        order = plan_of(shape, y.device).source
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        picked = y[inverse].view(*weights.shape, -1) * weights[..., None].to(y.dtype)
        return picked.sum(1)

    return function


def _inputs(shape: Shape, group: str, device: str, dtype: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        rows = shape.tokens * (1 if group == THERE else TOP_K)
        x = torch.randn(rows, shape.channels, generator=generator, device=device).to(dtype)
        if group == THERE:
            return (x,)
        return x, torch.rand(shape.tokens, TOP_K, generator=generator, device=device)

    return make


def _backend(shape: Shape, group: str) -> Callable[..., str]:
    def there(x: Tensor) -> str:
        return dispatch.select(OP, OP.prepare(x, indices_of(shape, x.device), shape.experts)).name

    def back(y: Tensor, weights: Tensor) -> str:
        return dispatch.select(UNPERMUTE, UNPERMUTE.prepare(y, plan_of(shape, y.device), weights)).name

    return there if group == THERE else back


def _case(shape: Shape, group: str, device: str, dtype: torch.dtype) -> Case:
    mine, other = {THERE: (permute, eager_permute), BACK: (unpermute, eager_unpermute)}[group]
    return Case(
        op=NAME,
        group=group,
        variant=shape.variant,
        shape=str(shape),
        dtype=dtype,
        inputs=_inputs(shape, group, device, dtype),
        reference=mine(shape, backend="reference"),
        providers=(
            Provider("accel", lambda: mine(shape), _backend(shape, group)),
            Provider("eager", lambda: other(shape)),
        ),
        costs={mode: cost(shape, group, mode, dtype.itemsize) for mode in ("forward", BOTH)},
        family="softmax",
    )


# --- all rows ---

CPU = tuple([Shape(tokens, 1024, experts) for experts in (64, 256) for tokens in (1, 16, 512, 4096)])
CUDA = tuple([Shape(tokens, 4096, 256) for tokens in (4096, 8192, 32768)])


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op."""
    for dtype in dtypes:
        for group in (THERE, BACK):
            for shape in CUDA if device == "cuda" else CPU:
                yield _case(shape, group, device, dtype)


SHORT = Short(
    rivals=("eager",),
    cpu=(Pick("512 tokens sorted by expert", THERE, "T 512, 64 experts", ("forward",)),),
    cuda=(Pick("8192 tokens sorted by expert", THERE, "T 8192, 256 experts", ("forward",)),),
)

GOALS = (
    *[
        Goal(
            f"{group} of {tokens} tokens, {mode}, {dtype}, against eager", NAME, "speedup", "cpu",
            {"group": group, "dtype": dtype, "mode": mode, "variant": f"T {tokens}, 64 experts"}, "eager",
            at_least=1.0,
        )
        for group in (THERE, BACK)
        for tokens in (512, 4096)
        for dtype in ("fp32", "bf16")
        for mode in ("forward", BOTH)
    ],
    *[
        Goal(
            f"{group} of {tokens} tokens: 80 % of the copy bandwidth", NAME, "floor", "cuda",
            {"group": group, "dtype": "bf16", "mode": "forward", "variant": f"T {tokens}, 256 experts"}, at_most=1.25,
        )
        for group in (THERE, BACK)
        for tokens in (8192, 32768)
    ],
)  # fmt: skip
