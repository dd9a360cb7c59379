"""What a run leaves behind: tables in the terminal, and JSON, CSV and one HTML page in a folder.

JSON and CSV are written anew after every case, so that a run cut short keeps what it had.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accel.benchmarks._machine import Ceilings
from accel.benchmarks.harness import OURS, Goal, Row, Verdict, concerns, reach, to_json
from accel.benchmarks.models import Curves

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError:  # a machine with no network still gets its tables, plainly
    Console = None  # type: ignore[assignment,misc]


@dataclass
class Results:
    """Everything a run knows, whole or so far."""

    environment: dict[str, Any]
    ceilings: Ceilings
    goals: Sequence[Goal]
    rows: list[Row] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    curves: Curves | None = None
    notes: list[str] = field(default_factory=list)
    finished: bool = False

    def verdicts(self) -> list[Verdict]:
        """The goals that are about anything measured here."""
        about = [g for g in self.goals if g.name in self.values or self._has_rows(g)]
        return [reach(g, self.rows, self.values) for g in about]

    def _has_rows(self, goal: Goal) -> bool:
        return goal.figure != "value" and any(concerns(goal, row) for row in self.rows)

    def misses(self) -> list[Verdict]:
        return [v for v in self.verdicts() if v.met is False]


# --- files ---


def _replace(path: Path, text: str) -> None:
    """Write as a whole or not at all: a reader, or a run that dies here, never meets half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _plain(row: Row) -> dict[str, Any]:
    return {name: to_json(value) for name, value in dataclasses.asdict(row).items()}


def as_json(results: Results) -> dict[str, Any]:
    verdicts = [
        {
            "name": v.goal.name,
            "op": v.goal.op,
            "figure": v.goal.figure,
            "target": v.target,
            "stretch": v.goal.stretch,
            "measured": to_json(v.measured),
            "met": v.met,
            "note": v.note,
        }
        for v in results.verdicts()
    ]
    curves = None
    if results.curves is not None:
        curves = dataclasses.asdict(results.curves)
        curves.update(difference=results.curves.difference, noise=results.curves.noise)
    return {
        "finished": results.finished,
        "environment": results.environment,
        "ceilings": {
            "copy bytes per second by bytes moved": {str(size): rate for size, rate in results.ceilings.copy},
            "matmul FLOP per second by dtype": results.ceilings.matmul,
        },
        "goals": verdicts,
        "rows": [_plain(row) for row in results.rows],
        "curves": curves,
        "notes": results.notes,
    }


def save(results: Results, out: Path) -> None:
    """JSON and CSV of what there is so far."""
    out.mkdir(parents=True, exist_ok=True)
    _replace(out / "results.json", json.dumps(as_json(results), indent=1, ensure_ascii=False) + "\n")
    beside = out / "results.csv.part"
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(_plain(row) for row in results.rows)
    os.replace(beside, out / "results.csv")


def save_page(results: Results, out: Path) -> Path:
    from accel.benchmarks._page import page

    out.mkdir(parents=True, exist_ok=True)
    _replace(out / "index.html", page(results))
    return out / "index.html"


# --- tables, shared by terminal and page ---


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


def speedups(rows: Sequence[Row], rival: str = "eager") -> dict[int, float]:
    """How many times as fast as the rival each row is, by ``id`` of the row."""
    base = {}
    for row in rows:
        if row.provider == rival and row.p50_ms:
            base[row.op, row.group, row.variant, row.shape, row.dtype, row.mode] = row.p50_ms
    out = {}
    for row in rows:
        key = (row.op, row.group, row.variant, row.shape, row.dtype, row.mode)
        if row.p50_ms and key in base:
            out[id(row)] = base[key] / row.p50_ms
    return out


_TIMES = ("p50 ms", "p20–p80", "× eager", "CPU ms")
_RATES = ("TFLOP/s", "GB/s", "of ceiling", "peak MiB", "error")
ROW_HEADER = ("row", "mode", "by", *_TIMES, *_RATES, "note")


def row_cells(row: Row, speedup: float | None) -> list[str]:
    """A row of ROW_HEADER. A wrong row shows no time."""
    by = f"{row.provider} ({row.backend})" if row.backend else row.provider
    notes = [row.status] if row.status != "ok" else []
    notes += [row.reason] if row.reason else []
    notes += [f"{row.calls} calls"] if row.calls is not None else []
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
    wrong = sum(row.provider == OURS and row.status == "FAIL" for row in results.rows)
    text = f"{sum(v.met is True for v in judged)} of {len(judged)} goals met"
    if len(verdicts) > len(judged):
        text += f", {len(verdicts) - len(judged)} not judged"
    if wrong:
        text += f"; {wrong} of our rows FAIL against the reference"
    if not results.finished:
        text += "; the run did not finish"
    return text


LEFT_OUT = (
    "Rounds are left out, of all providers alike, where before or after them the processor took a quarter longer than "
    "at its best for a fixed piece of arithmetic on all threads."
)


def remarks(results: Results) -> list[str]:
    """The notes of a run, and what its rows call for."""
    return [*results.notes, *([LEFT_OUT] if any(row.left_out for row in results.rows) else [])]


def disturbed(results: Results) -> int:
    return sum(bool(row.disturbed) for row in results.rows)


# --- terminal ---


class Terminal:
    """Progress and tables, with rich where it is installed and as plain lines where it is not."""

    def __init__(self) -> None:
        # a log file has no width of its own: let rows be as long as they are
        wide = None if sys.stdout.isatty() else 200
        self._console = Console(width=wide) if Console is not None else None
        self._bar: Any = None
        self._task: Any = None
        self._start = time.monotonic()
        self._done = self._total = 0

    @contextmanager
    def progress(self, total: int) -> Iterator[None]:
        self._total = total
        if self._console is None or not self._console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as bar:
            self._bar, self._task = bar, bar.add_task("", total=total)
            yield
        self._bar = None

    def say(self, text: str) -> None:
        """What is going on now; shown in the bar only."""
        if self._bar is not None:
            self._bar.update(self._task, description=text[:70])

    def step(self, text: str) -> None:
        """One unit of the total is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        else:
            self.print(f"[{self._done:>3}/{self._total}] {time.monotonic() - self._start:5.0f} s  {text}")

    def print(self, text: str = "") -> None:
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if self._console is None:
            self.print(f"\n{title}")
            widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
            for line in [header, *rows]:
                self.print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
            return
        table = Table(
            title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False
        )
        for i, name in enumerate(header):
            text = name in ("row", "mode", "by", "goal", "note", "")
            table.add_column(name, justify="left" if text else "right", no_wrap=i == 0, overflow="fold")
        for line in rows:
            bad = any(cell in ("MISSED",) or cell.startswith("FAIL") for cell in line)
            table.add_row(*line, style="red" if bad else ("green" if "met" in line else ""))
        self._console.print(table)


def show(results: Results, terminal: Terminal, page: Path) -> None:
    """The tables of a finished run."""
    factor = speedups(results.rows)
    for op in dict.fromkeys(row.op for row in results.rows):
        cells = [row_cells(row, factor.get(id(row))) for row in results.rows if row.op == op]
        terminal.print()
        terminal.table(op, ROW_HEADER, cells)
    ceilings = results.ceilings
    terminal.print()
    terminal.print(
        f"measured ceilings: copy {ceilings.copy[-1][1] / 1e9:.1f} GB/s; matmul "
        + ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in ceilings.matmul.items())
    )
    if results.curves is not None:
        curves = results.curves
        terminal.print(
            f"digits, {len(curves.eager)} steps: loss {curves.eager[-1]:.4f} unpatched, {curves.patched[-1]:.4f} "
            f"patched; largest difference {curves.difference:.1e}, noise of rounding {curves.noise:.1e}"
        )
    for note in remarks(results):
        terminal.print(note)
    verdicts = results.verdicts()
    if verdicts:
        terminal.print()
        terminal.table("goals", GOAL_HEADER, [goal_cells(v) for v in verdicts])
    if disturbed(results):
        terminal.print(f"\n{disturbed(results)} rows were disturbed by other load: run again on a quiet machine")
    terminal.print(f"\n{summary(results)}\n{page}")
