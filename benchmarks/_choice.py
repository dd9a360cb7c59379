"""Which rows a run measures: the few that a user cares about, those that a goal is about, or all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accel.benchmarks import (
    deform_attention2d,
    deform_conv2d,
    flash_mix,
    flash_training,
    fp8_gemm,
    fp8_linear,
    fp8_quantize,
    fp8_training,
    gau_attention,
    grouped_linear,
    linear_attention,
    linear_attention_step,
    models,
    moe_experts,
    moe_permute,
    moe_route,
    ms_deform_attn,
    ps_roi_align,
    ps_roi_pool,
    softmax_attention,
    window_attention,
)
from accel.benchmarks._machine import dtype_name
from accel.benchmarks.goals import Goal, concerns
from accel.benchmarks.harness import OURS, Case, Row


@dataclass(frozen=True)
class Family:
    """``seconds`` is what its rows of the short run take on two cores. A run's budget is shared out by them, and
    nothing new of a family begins when its share is spent."""

    name: str
    seconds: float
    ops: tuple[Any, ...]  # benchmark modules, the most important first


FAMILIES = (
    Family(models.NAME, 85, (models,)),
    Family("attention", 15, (softmax_attention,)),
    Family("windows", 10, (window_attention,)),
    Family("deformable", 75, (ms_deform_attn, deform_conv2d, deform_attention2d)),
    Family("boxes", 20, (ps_roi_align, ps_roi_pool)),
    Family("linear", 10, (linear_attention, linear_attention_step, gau_attention, flash_mix, flash_training)),
    Family("moe", 15, (moe_experts, moe_route, moe_permute, grouped_linear)),
    Family("fp8", 20, (fp8_linear, fp8_quantize, fp8_gemm)),
)
BUDGET = 270.0
"""Seconds of the short run, after which nothing new begins; with the set-up (150 s) it ends within 8 minutes."""

OPS: dict[str, Any] = {module.NAME: module for family in FAMILIES for module in family.ops if module is not models}
FAMILY = {module.NAME: family.name for family in FAMILIES for module in family.ops}
RIVALS: dict[str, tuple[str, ...]] = {module.NAME: module.SHORT.rivals for family in FAMILIES for module in family.ops}
PROVIDERS = tuple(dict.fromkeys(name for module in OPS.values() for name in module.PROVIDERS))
GOALS: tuple[Goal, ...] = (
    *(goal for module in OPS.values() for goal in module.GOALS),
    *models.GOALS,
    *fp8_training.GOALS,
)


def narrowed(case: Case, modes: Collection[str], names: Collection[str]) -> Iterator[Case]:
    """The part of a case that is of these modes and providers, if there is any."""
    costs = {mode: cost for mode, cost in case.costs.items() if mode in modes}
    providers = tuple(p for p in case.providers if p.name in names)
    if costs and providers:
        yield replace(case, costs=costs, providers=providers)


def short(cases: Sequence[Case], device: str) -> Iterator[tuple[int, Case]]:
    """The cases that their op picks for the short run, with their rank: an op's first pick in the first dtype matters
    most, then the same in the next dtype."""
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    for case in cases:
        what = OPS[case.op].SHORT
        for i, pick in enumerate(what.picks(device)):
            if (case.group, case.variant) == (pick.group, pick.variant):
                rank = i * len(dtypes) + dtypes.index(case.dtype)
                yield from ((rank, part) for part in narrowed(case, pick.modes, (OURS, *what.rivals)))


def judged(cases: Iterable[Case], device: str, goals: Sequence[Goal]) -> Iterator[Case]:
    """What the goals need: each case in the modes they are about, with the rivals they name."""
    bases = [replace(goal, where={**goal.where, **goal.base}) for goal in goals if goal.base]
    for case in cases:
        modes: set[str] = set()
        names: set[str] = set()
        for row in rows_of([case], device):
            for goal in (*goals, *bases):
                if concerns(goal, row):
                    modes.add(row.mode)
                    names |= {goal.of, *goal.rival.split("|")}
        yield from narrowed(case, modes, names)


def rows_of(cases: Iterable[Case], device: str) -> Iterator[Row]:
    """Their rows, with nothing measured."""
    for case in cases:
        about = (case.op, case.group, case.variant, case.shape, dtype_name(case.dtype))
        yield from (Row(*about, mode, device, provider.name) for mode in case.costs for provider in case.providers)


def whole(goals: Iterable[Goal], every: Iterable[Row], chosen: Iterable[Row]) -> list[Goal]:
    """The goals of which each row there is was chosen: a mean over a part of its rows would judge something else."""
    have = {(row.op, row.label, row.mode, row.provider) for row in chosen}
    missing = [row for row in every if (row.op, row.label, row.mode, row.provider) not in have]

    def lacks(goal: Goal, row: Row) -> bool:
        return row.provider in (goal.of, *goal.rival.split("|")) and concerns(goal, row)

    return [goal for goal in goals if not any(lacks(goal, row) for row in missing)]
