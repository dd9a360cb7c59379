"""What a run knows, whole or so far, and how it lies on disk as JSON and CSV.

Both files are written anew after every case, so that a run cut short keeps what it had.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accel.benchmarks._ceilings import MM, Ceilings
from accel.benchmarks._machine import LEVEL
from accel.benchmarks.fp8_training import Course as EightBits
from accel.benchmarks.goals import Goal, Verdict, concerns, fitting, kinds, reach
from accel.benchmarks.harness import Row, to_json
from accel.benchmarks.models import Curves
from accel.benchmarks.moe_training import Course

COPY, MULTIPLY, MATMUL = (
    "copy bytes per second by bytes moved",
    "FLOP per second by dtype",
    "matmul FLOP per second by dtype",
)
SOURCES = "what gave them, by dtype"


@dataclass
class Results:
    """Everything a run knows."""

    environment: dict[str, Any]
    ceilings: Ceilings
    goals: Sequence[Goal]
    rows: list[Row] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    curves: Curves | None = None
    language: dict[str, list[float]] = field(default_factory=dict)  # losses of language models, a step, by name
    balance: dict[str, Course] = field(default_factory=dict)  # trainings of experts, by what balanced them
    eight_bits: dict[str, EightBits] = field(default_factory=dict)  # trainings in bf16 and in FP8, by seed
    notes: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)  # by name, for want of time
    finished: bool = False

    def verdicts(self) -> list[Verdict]:
        """The goals that are about anything measured here."""
        about = [g for g in self.goals if g.name in self.values or self._has_rows(g)]
        return [reach(g, self.rows, self.values) for g in about]

    def _has_rows(self, goal: Goal) -> bool:
        return goal.figure != "value" and any(concerns(goal, row) for row in self.rows)

    def misses(self) -> list[Verdict]:
        return [v for v in self.verdicts() if v.met is False]


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
    ceilings = results.ceilings
    return {
        "finished": results.finished,
        "environment": results.environment,
        "ceilings": {
            COPY: {str(size): rate for size, rate in ceilings.copy},
            MULTIPLY: ceilings.multiply,
            SOURCES: ceilings.sources,
            MATMUL: ceilings.mm,
        },
        "goals": verdicts,
        "rows": [_plain(row) for row in results.rows],
        "values": {name: to_json(value) for name, value in results.values.items()},
        "curves": curves,
        "language": results.language,
        "balance": {name: dataclasses.asdict(course) for name, course in results.balance.items()},
        "eight bits": {name: dataclasses.asdict(course) for name, course in results.eight_bits.items()},
        "notes": results.notes,
        "not run": results.not_run,
    }


def write(path: Path, text: str) -> None:
    """As a whole or not at all: a reader, or a run that dies here, never meets half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def save(results: Results, out: Path) -> None:
    """JSON and CSV of what there is so far."""
    out.mkdir(parents=True, exist_ok=True)
    write(out / "results.json", json.dumps(as_json(results), indent=1, ensure_ascii=False) + "\n")
    beside = out / "results.csv.part"
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(_plain(row) for row in results.rows)
    os.replace(beside, out / "results.csv")


def _fitting(kind: Any, data: dict[str, Any]) -> Any:
    """A dataclass from those of ``data`` that it has a field for: older files have fewer, and some have more."""
    names = {f.name for f in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in data.items() if name in names})


def load(folders: Sequence[Path], goals: Sequence[Goal]) -> Results:
    """What lies in these folders; machine and ceilings are the first's, a row measured twice is the last's."""
    read = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
    first = read[0]
    ceilings = first["ceilings"]
    mm = ceilings[MATMUL]
    copy = tuple((int(size), rate) for size, rate in ceilings[COPY].items())
    known = Ceilings(copy, ceilings.get(MULTIPLY, mm), ceilings.get(SOURCES, dict.fromkeys(mm, MM)), mm)
    machine = kinds(known, first["environment"].get(LEVEL) or "")
    fit = fitting(goals, machine)
    results = Results(first["environment"], known, fit, finished=all(data["finished"] for data in read))
    rows: dict[tuple[str, ...], Row] = {}
    for data in read:
        for plain in data["rows"]:
            row: Row = _fitting(Row, plain)
            rows[row.op, row.label, row.shape, row.mode, row.provider] = row
        results.values.update(data.get("values", {}))
        results.curves = _fitting(Curves, data["curves"]) if data["curves"] else results.curves
        results.language = data.get("language") or results.language
        results.balance.update({name: _fitting(Course, plain) for name, plain in data.get("balance", {}).items()})
        eight_bits = data.get("eight bits", {})
        results.eight_bits.update({name: _fitting(EightBits, plain) for name, plain in eight_bits.items()})
        results.notes += [note for note in data["notes"] if note not in results.notes]
        results.not_run += data.get("not run", [])
    results.rows = list(rows.values())
    return results
