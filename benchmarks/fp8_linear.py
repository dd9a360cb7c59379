"""Linear layers in eight bits, the input quantised inside, against torch's in the input's dtype; weights are cold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import accel
from accel import dispatch
from accel.benchmarks.goals import DOTS, Goal
from accel.benchmarks.harness import Case, Cost, Pick, Provider, Short
from accel.ops.fp8.fp8_linear import OP

NAME = "fp8_linear"
PROVIDERS = ("accel", "linear")
CODES, TRAINED = "weight in FP8", "weight to train"
TRAINING = "forward+backward"
SIZE = 4096
RECIPE = accel.FP8Recipe(size_rule=False)
Function = Callable[..., Tensor]


def with_codes(backend: str | None = None) -> Function:
    def function(x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return accel.fp8_linear(x, codes, weight_scale=scale.float(), recipe=RECIPE, backend=backend)

    return function


def quantising(backend: str | None = None) -> Function:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return accel.fp8_linear(x, weight, recipe=RECIPE, backend=backend)

    return function


def linear(x: Tensor, weight: Tensor, *codes: Tensor) -> Tensor:
    return F.linear(x, weight)


def _inputs(group: str, rows: int, size: int, device: str, dtype: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        x = torch.randn(rows, size, generator=generator, device=device).to(dtype)
        weight = torch.randn(size, size, generator=generator, device=device).mul_(size**-0.5).to(dtype)
        if group == TRAINED:
            return x, weight
        return x, weight, *accel.fp8_quantize(weight, block=(128, 128))

    return make


def _backend(x: Tensor, weight: Tensor, *codes: Tensor) -> str:
    given = {"weight_scale": codes[1], "recipe": RECIPE} if codes else {"recipe": RECIPE}
    return dispatch.select(OP, OP.prepare(x, codes[0] if codes else weight, **given)).name


def _case(group: str, rows: int, size: int, device: str, dtype: torch.dtype) -> Case:
    mine = with_codes if group == CODES else quantising
    flops, ends = 2 * rows * size * size, 2 * rows * size * dtype.itemsize
    costs = {"forward": Cost(flops, size * size + ends)}
    if group == TRAINED:  # the weight is read both ways, its gradient written
        costs = {TRAINING: Cost(3 * flops, 3 * size * size * dtype.itemsize + 2 * ends)}
    return Case(
        op=NAME,
        group=group,
        variant=f"{rows} rows" if rows > 1 else "1 row",
        shape=f"{rows} x {size} x {size}",
        dtype=dtype,
        inputs=_inputs(group, rows, size, device, dtype),
        reference=mine("reference"),
        providers=(Provider("accel", lambda: mine(), _backend), Provider("linear", lambda: linear, computes=linear)),
        costs=costs,
        family="fp8",
        cold=(1, 2) if group == CODES else (1,),
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op."""
    for dtype in dtypes:
        for rows in (1, 2, 4, 8, 16, 32, 128, 512, 2048):
            yield _case(CODES, rows, SIZE, device, dtype)
        for rows in (512,) if device == "cpu" else (4096, 16384):
            yield _case(TRAINED, rows, SIZE, device, dtype)


SHORT = Short(
    rivals=("linear",),
    cpu=(Pick("a weight in FP8, 1 row", CODES, "1 row"), Pick("a weight in FP8, 16 rows", CODES, "16 rows")),
    cuda=(Pick("a training step of 4096 rows", TRAINED, "4096 rows"),),
)


def _goal(name: str, variant: str, dtype: str, least: float, group: str = CODES, machine: str = "") -> Goal:
    where = {"group": group, "variant": variant, "dtype": dtype}
    return Goal(f"{name}, {dtype}", NAME, "speedup", "cpu", where, "linear", at_least=least, machine=machine)


GOALS = (
    _goal("FP8 weight, 1 row", "1 row", "bf16", 4.0),
    _goal("FP8 weight, 1 row", "1 row", "fp32", 7.5),
    Goal("FP8 weight, 1 row: 85 % of the bandwidth", NAME, "floor", "cpu",
         {"group": CODES, "variant": "1 row", "dtype": "bf16"}, at_most=1.18),
    *[_goal(f"FP8 weight, {rows} rows", f"{rows} rows", "bf16", 1.5 if rows == 16 else 1.25)
      for rows in (2, 4, 8, 16, 32)],
    # where torch multiplies bf16 in AMX the op's size rule leaves many rows to it
    *[_goal(f"FP8 weight, {rows} rows", f"{rows} rows", "bf16", least, machine=DOTS)
      for rows, least in ((128, 0.95), (512, 0.95), (2048, 0.9))],
    _goal("a training step of 512 rows", "512 rows", "bf16", 0.9, TRAINED, DOTS),
    Goal("a training step, bf16, against F.linear", NAME, "speedup", "cuda", {"group": TRAINED, "dtype": "bf16"},
         "linear", at_least=1.25),
)  # fmt: skip
