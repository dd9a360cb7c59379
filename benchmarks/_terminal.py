"""Progress and tables in a terminal, with rich where it is installed and as plain lines where it is not."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError:  # a machine with no network still gets its tables, plainly
    Console = None  # type: ignore[assignment,misc]

TEXT = ("row", "mode", "by", "goal", "note", "family", "what", "dtype", "against", "")
"""Columns that are no numbers."""


class Terminal:
    """A bar that says what is running, lines where there is no terminal for one, and tables."""

    def __init__(self) -> None:
        # a log file has no width of its own: let rows be as long as they are
        wide = None if sys.stdout.isatty() else 200
        self._console = Console(width=wide) if Console is not None else None
        self._bar: Any = None
        self._task: Any = None
        self._start = time.monotonic()
        self._done = self._total = 0

    @contextmanager
    def progress(self, total: int, budget: float | None = None) -> Iterator[None]:
        self._total = total
        if self._console is None or not self._console.is_terminal:
            yield
            return
        limit = TextColumn(f"of at most {int(budget) // 60}:{int(budget) % 60:02}" if budget else "")
        columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), limit, TextColumn("{task.description}"))
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
            table.add_column(name, justify="left" if name in TEXT else "right", no_wrap=i == 0, overflow="fold")
        for line in rows:
            bad = any(cell in ("MISSED",) or cell.startswith("FAIL") for cell in line)
            table.add_row(*line, style="red" if bad else ("green" if "met" in line else ""))
        self._console.print(table)
