"""What terminal and page say alike: figures as text, and the lines of their tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from accel.benchmarks import models
from accel.benchmarks._choice import FAMILY, OPS, RIVALS
from accel.benchmarks._results import Results
from accel.benchmarks.goals import Verdict, pairs
from accel.benchmarks.harness import OURS, Row

NAMES = {
    "sdpa": "SDPA",
    "eager": "eager torch",
    "conv2d": "plain conv2d",
    "torchvision": "torchvision",
    "softmax": "softmax attention",
}
"""Rivals in a reader's words."""


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, never scientific between 0.001 and 100000; a dash for nothing."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(0, digits - whole)}f}"


# --- ours against the rival ---


@dataclass(frozen=True)
class Match:
    """Our row beside that of the rival whom people would use else; both have times."""

    family: str
    title: str
    ours: Row
    rival: Row

    @property
    def speedup(self) -> float:
        return (self.rival.p50_ms or 0.0) / (self.ours.p50_ms or 1.0)

    @property
    def memory(self) -> float | None:
        """Our peak over the rival's; nothing where either is too small to be told from a page or two."""
        if not self.ours.peak_mib or not self.rival.peak_mib or self.rival.peak_mib < 1:
            return None
        return self.ours.peak_mib / self.rival.peak_mib


def rival_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The first of the op's rivals that has a time for the same case and mode."""
    for name in RIVALS.get(row.op, ("eager",)):
        for _, rival in pairs([row, *(r for r in rows if r.provider == name)], name):
            if rival.p50_ms:
                return rival
    return None


def _title(row: Row) -> str | None:
    """A case's name for a visitor, if the short run has it."""
    if row.op == models.NAME:
        return row.group
    picks = OPS[row.op].SHORT.picks(row.device) if row.op in OPS else ()
    return next((p.title for p in picks if (p.group, p.variant) == (row.group, row.variant)), None)


def matches(results: Results) -> list[Match]:
    """The rows of a visitor: models, and what the short run has of each op; all of ours where there is none of them."""
    mine = [row for row in results.rows if row.provider == OURS and row.p50_ms]
    found = list(_matches(mine, results.rows, known=True))
    return found or list(_matches(mine, results.rows, known=False))


def _matches(mine: Sequence[Row], rows: Sequence[Row], known: bool) -> Iterator[Match]:
    order = {op: i for i, op in enumerate(FAMILY)}
    for row in sorted(mine, key=lambda row: order.get(row.op, len(order))):
        title, rival = _title(row) if known else f"{row.group} {row.variant}".strip(), rival_of(row, rows)
        if title and rival is not None:
            yield Match(FAMILY.get(row.op, row.op), title, row, rival)


def speedups(rows: Sequence[Row]) -> dict[int, float]:
    """How many times as fast as the op's rival each row is, by ``id`` of the row."""
    base: dict[tuple[str, ...], float] = {}
    for row in rows:
        if row.provider == OURS and (rival := rival_of(row, rows)) is not None:
            base[row.op, row.label, row.shape, row.mode] = rival.p50_ms or 0.0
    out = {}
    for row in rows:
        if row.p50_ms and (theirs := base.get((row.op, row.label, row.shape, row.mode))):
            out[id(row)] = theirs / row.p50_ms
    return out


MATCH_HEADER = ("family", "what", "mode", "dtype", "against", "their ms", "our ms", "faster", "memory")


def match_cells(match: Match) -> list[str]:
    row = match.ours
    return [
        match.family,
        match.title,
        row.mode,
        row.dtype,
        "unpatched" if row.op == models.NAME else NAMES.get(match.rival.provider, match.rival.provider),
        number(match.rival.p50_ms),
        number(row.p50_ms),
        f"{match.speedup:.2f}×",
        "–" if match.memory is None else f"{match.memory:.2f}×",
    ]


# --- every row ---

_TIMES = ("p50 ms", "p20–p80", "× rival", "CPU ms")
_RATES = ("TFLOP/s", "GB/s", "of ceiling", "peak MiB", "error")
ROW_HEADER = ("row", "mode", "by", *_TIMES, *_RATES, "note")


def row_cells(row: Row, speedup: float | None) -> list[str]:
    """A row of ROW_HEADER. A wrong row shows no time."""
    by = f"{row.provider} ({row.backend})" if row.backend else row.provider
    notes = [row.status] if row.status != "ok" else []
    notes += [row.reason] if row.reason else []
    notes += [f"{row.calls} calls"] if row.calls is not None else []
    notes += [f"{number(1e6 * row.p50_ms / row.tokens)} ns a token"] if row.tokens and row.p50_ms else []
    notes += [f"ceiling: {row.ceiling}"] if row.ceiling and row.provider == OURS else []
    notes += [f"{row.left_out} of {row.samples + row.left_out} rounds left out"] if row.left_out else []
    notes += [f"disturbed: {row.disturbed}"] if row.disturbed else []
    return [
        f"{row.label}",
        row.mode,
        by,
        number(row.p50_ms),
        "–" if row.p50_ms is None else f"{number(row.p20_ms)}–{number(row.p80_ms)}",
        "–" if speedup is None else f"{speedup:.2f}",
        number(row.cpu_ms),
        number(row.tflops),
        number(row.gbs),
        "–" if row.of_ceiling is None else f"{row.of_ceiling:.0%}",
        number(row.peak_mib),
        "–" if row.error is None else f"{row.error:.1e}",
        ": ".join(notes[:2]) + "".join(f"; {n}" for n in notes[2:]),
    ]


# --- goals and remarks ---

GOAL_HEADER = ("goal", "target", "measured", "stretch", "", "note")


def goal_cells(verdict: Verdict) -> list[str]:
    state = {True: "met", False: "MISSED", None: "not judged"}[verdict.met]
    return [
        verdict.goal.name,
        verdict.target,
        number(verdict.measured, 4),
        "" if verdict.goal.stretch is None else f"{verdict.goal.stretch:g}",
        state,
        verdict.note,
    ]


def summary(results: Results) -> str:
    """One sentence for the top."""
    verdicts = results.verdicts()
    judged = [v for v in verdicts if v.met is not None]
    ours = [row for row in results.rows if row.provider == OURS]
    wrong = sum(row.status == "FAIL" for row in ours)
    text = f"{len(ours) - wrong} of {len(ours)} results are right" if ours else "nothing was measured"
    text += f"; {sum(v.met is True for v in judged)} of {len(judged)} goals met" if judged else ""
    if judged and len(verdicts) > len(judged):
        text += f", {len(verdicts) - len(judged)} not judged"
    if wrong:
        text += f"; {wrong} of our rows FAIL against the reference"
    if results.not_run:
        text += f"; {len(results.not_run)} not run for want of time"
    if not results.finished:
        text += "; the run did not finish"
    return text


LEFT_OUT = (
    "Rounds are left out, of all providers alike, where before or after them the processor took a quarter longer than "
    "at its best for a fixed piece of arithmetic on all threads."
)


def remarks(results: Results) -> list[str]:
    """The notes of a run, and what its rows call for."""
    notes = [*results.notes, *([LEFT_OUT] if any(row.left_out for row in results.rows) else [])]
    if results.not_run:
        notes.append("Not run, since the time was spent: " + "; ".join(results.not_run) + ".")
    return notes


def disturbed(results: Results) -> int:
    return sum(bool(row.disturbed) for row in results.rows)


def ceilings(results: Results) -> list[str]:
    """The machine's rates, each with where it comes from, and torch.mm as a rival's."""
    known = results.ceilings
    lines = [f"copying {known.copy[-1][1] / 1e9:.1f} GB/s"]
    for dtype, rate in known.multiply.items():
        line = f"{dtype} {rate / 1e12:.3g} TFLOP/s ({known.sources.get(dtype, 'torch.mm')})"
        if dtype in known.mm and known.mm[dtype] != rate:
            line += f", where torch.mm gives {known.mm[dtype] / 1e12:.3g}"
        lines.append(line)
    return lines
