"""Goals: figures to reach, as data beside the benchmark they judge, and what a run says of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from accel.benchmarks._ceilings import Ceilings
from accel.benchmarks.harness import OURS, Row

WIDE, EVEN, DOTS = "wide", "even", "dots"
WIDER = 1.6  # times the rate of torch.mm
PAGE = 4096 / 2**20  # MiB; less cannot be told, and results may fit into pages that were there before


@dataclass(frozen=True)
class Goal:
    """A figure to reach, as data beside the benchmark it judges. ``at_least`` or ``at_most`` is given.

    ``figure``: ``speedup`` is the rival's median over ours; ``floor`` is our median over the time of the measured
    memory bandwidth; ``rate`` is our TFLOP/s; ``memory`` is our peak over the rival's; ``growth`` is our peak over
    that of our row which is as ``base`` says. These are geometric means over the rows. ``spread`` is the longest time a
    token of our rows over the shortest; ``extra`` is the most that any of our rows holds beside its results, in MiB;
    ``value`` is a number the benchmark itself reports under the goal's name.

    ``rival`` may name several, as in ``"conv2d|matmul"``: each row is held against the slowest of them.

    ``per`` is what a figure is divided by: the part of it that the work saved explains. ``of`` names whose rows are
    meant where they are not ours. ``machine`` is the kind of CPU it is for (see :func:`kinds`), any if empty.
    """

    name: str
    op: str
    figure: str
    device: str
    where: Mapping[str, str] = field(default_factory=dict)  # field of Row -> value; variants are what is averaged over
    rival: str = ""
    at_least: float | None = None
    at_most: float | None = None
    stretch: float | None = None
    per: float = 1.0
    of: str = OURS
    base: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""


def kinds(ceilings: Ceilings, level: str) -> set[str]:
    """What a machine is, for goals that depend on it.

    ``wide`` where multiply-adds in fp32 run 1.6 times as fast as torch.mm or more, as on AMD processors with whole
    AVX-512 units, which MKL leaves half unused, and ``even`` elsewhere; ``dots`` where our kernels run at a ``level``
    with dot products of bf16.
    """
    rate, mm = ceilings.multiply.get("fp32", 0.0), ceilings.mm.get("fp32", 0.0)
    return {WIDE if rate >= WIDER * mm > 0.0 else EVEN} | ({DOTS} if level == "avx512_bf16" else set())


def by_machine(
    op: str, bounds: Mapping[tuple[str, str, str], Sequence[float]], rivals: Mapping[str, Sequence[str]]
) -> Iterator[Goal]:
    """Goals on a CPU: group, kind of machine and dtype -> how many times as fast as each of the group's rivals, and so
    as the fastest, forward and, where there are two, with the backward."""
    for (group, machine, dtype), least in bounds.items():
        for mode, bound in zip(("forward", "forward+backward"), least, strict=False):
            for rival in rivals[group]:
                where = {"group": group, "dtype": dtype, "mode": mode}
                name = f"{group}, {mode}, {dtype}, against {rival}"
                yield Goal(name, op, "speedup", "cpu", where, rival, at_least=bound, machine=machine)


def fitting(goals: Iterable[Goal], machine: Collection[str]) -> list[Goal]:
    """Those for any machine and for this kind of one."""
    return [goal for goal in goals if goal.machine in ("", *machine)]


@dataclass
class Verdict:
    """What was measured for a goal. ``met`` is None where nothing could be measured; ``note`` says why."""

    goal: Goal
    measured: float | None = None
    met: bool | None = None
    note: str = ""

    @property
    def target(self) -> str:
        goal = self.goal
        return f"≥ {goal.at_least:g}" if goal.at_least is not None else f"≤ {goal.at_most:g}"


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def _key(row: Row) -> tuple[str, ...]:
    return row.op, row.group, row.variant, row.shape, row.dtype, row.mode, row.device


def pairs(rows: Sequence[Row], rival: str, of: str = OURS) -> Iterator[tuple[Row, Row]]:
    """Our row and the rival's of the same case and mode, the slowest where several are named."""
    named = [row for row in rows if row.provider in rival.split("|")]
    rivals = {_key(row): row for row in sorted(named, key=lambda row: row.p50_ms or 0.0)}
    for row in rows:
        if row.provider == of and _key(row) in rivals:
            yield row, rivals[_key(row)]


def concerns(goal: Goal, row: Row) -> bool:
    """Whether the goal is about this row."""
    same = (row.op, row.device) == (goal.op, goal.device)
    return same and all(getattr(row, name) == value for name, value in goal.where.items())


def reach(goal: Goal, rows: Sequence[Row], values: Mapping[str, float]) -> Verdict:
    """Hold a goal against what was measured. A wrong result of ours misses; an absent rival only goes unjudged."""
    verdict = Verdict(goal)
    if goal.figure == "value":
        if goal.name not in values:
            verdict.note = "not measured in this run"
            return verdict
        verdict.measured = values[goal.name]
    else:
        mine = [row for row in rows if row.provider == goal.of and concerns(goal, row)]
        wrong = [row for row in mine if row.status == "FAIL"]
        if wrong:
            verdict.met, verdict.note = False, f"{wrong[0].label}: {wrong[0].reason}"
            return verdict
        figures, note = _figures(goal, mine, rows)
        if not figures:
            verdict.note = note or "not measured in this run"
            return verdict
        verdict.measured, verdict.note = geometric_mean(figures) / goal.per, note
    measured = verdict.measured
    verdict.met = measured >= goal.at_least if goal.at_least is not None else measured <= (goal.at_most or 0.0)
    return verdict


def _figures(goal: Goal, mine: Sequence[Row], rows: Sequence[Row]) -> tuple[list[float], str]:
    if goal.figure == "floor":
        return [row.p50_ms / row.floor_ms for row in mine if row.p50_ms and row.floor_ms], ""
    if goal.figure == "rate":
        return [row.tflops for row in mine if row.tflops], ""
    if goal.figure == "growth":
        return _growth(goal, mine, rows), ""
    if goal.figure == "spread":
        times = [row.p50_ms / row.tokens for row in mine if row.p50_ms and row.tokens]
        return ([max(times) / min(times)] if len(times) > 1 else []), ""
    if goal.figure == "extra":
        held = [row.peak_mib - row.kept_mib for row in mine if row.peak_mib is not None and row.kept_mib is not None]
        return ([max(*held, PAGE)] if held else []), ""
    figures, notes = [], []
    theirs = [r for r in rows if r.provider in goal.rival.split("|")]
    for row, rival in pairs([*mine, *theirs], goal.rival, goal.of):
        if rival.reason:
            notes.append(f"{rival.provider}: {rival.reason}")
        elif goal.figure == "memory" and row.peak_mib and rival.peak_mib:
            figures.append(row.peak_mib / rival.peak_mib)
        elif goal.figure == "speedup" and row.p50_ms and rival.p50_ms:
            figures.append(rival.p50_ms / row.p50_ms)
    return figures, "; ".join(dict.fromkeys(notes))


def _growth(goal: Goal, mine: Sequence[Row], rows: Sequence[Row]) -> list[float]:
    """Our peak over that of the row which differs in ``goal.base`` alone (its shape, which goes with that, beside)."""
    smaller = replace(goal, where={**goal.where, **goal.base})
    bases = {r.variant: r for r in rows if r.provider == goal.of and concerns(smaller, r)}
    found = [(row.peak_mib, bases[row.variant].peak_mib) for row in mine if row.variant in bases]
    return [peak / base for peak, base in found if peak and base]
