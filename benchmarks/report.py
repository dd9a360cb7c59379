"""What a run leaves behind: tables in the terminal, and in a folder JSON, CSV, a picture and one HTML page."""

from __future__ import annotations

from pathlib import Path

from accel.benchmarks import _svg
from accel.benchmarks._page import page
from accel.benchmarks._results import Results, write
from accel.benchmarks._tables import (
    GOAL_HEADER,
    MATCH_HEADER,
    ROW_HEADER,
    ceilings,
    disturbed,
    goal_cells,
    match_cells,
    matches,
    remarks,
    row_cells,
    speedups,
    summary,
)
from accel.benchmarks._terminal import Terminal


def save_page(results: Results, out: Path) -> Path:
    """The page, and beside it the picture of speed-ups alone."""
    out.mkdir(parents=True, exist_ok=True)
    write(out / "index.html", page(results))
    write(out / "speed.svg", _svg.picture(matches(results)))
    return out / "index.html"


def show(results: Results, terminal: Terminal, page: Path, details: bool) -> None:
    """The tables of a finished run: with ``details`` every row and goal, at the end what is read first."""
    factor = speedups(results.rows)
    for op in dict.fromkeys(row.op for row in results.rows if details):
        cells = [row_cells(row, factor.get(id(row))) for row in results.rows if row.op == op]
        terminal.print()
        terminal.table(op, ROW_HEADER, cells)
    terminal.print("\nthis machine: " + "; ".join(ceilings(results)))
    if results.curves is not None:
        curves = results.curves
        terminal.print(
            f"digits, {len(curves.eager)} steps: loss {curves.eager[-1]:.4f} unpatched, {curves.patched[-1]:.4f} "
            f"patched; largest difference {curves.difference:.1e}, noise of rounding {curves.noise:.1e}"
        )
    for note in remarks(results):
        terminal.print(note)
    verdicts = results.verdicts()
    shown = verdicts if details else [v for v in verdicts if v.met is False]
    if shown:
        terminal.print()
        terminal.table("goals" if details else "goals that were missed", GOAL_HEADER, [goal_cells(v) for v in shown])
    if found := matches(results):
        terminal.print()
        terminal.table("what it comes to", MATCH_HEADER, [match_cells(match) for match in found])
    if disturbed(results):
        terminal.print(f"\n{disturbed(results)} rows were disturbed by other load: run again on a quiet machine")
    terminal.print(f"\n{summary(results)}\n{page}")
