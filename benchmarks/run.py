"""``python -m accel bench``: choose the rows, run them, report."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import re
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from accel.benchmarks import (
    _choice,
    flash_training,
    fp8_linear,
    fp8_training,
    models,
    moe_experts,
    moe_training,
    report,
)
from accel.benchmarks._ceilings import measure_ceilings
from accel.benchmarks._choice import BUDGET, FAMILIES, FAMILY, GOALS, OPS, PROVIDERS
from accel.benchmarks._machine import LEVEL, Load, device_name, environment, pin_allocator
from accel.benchmarks._results import Results, load, save
from accel.benchmarks._tables import number
from accel.benchmarks._terminal import Terminal
from accel.benchmarks._timing import FULL, NORMAL, SHORT, Clock, Effort, make_clock
from accel.benchmarks.goals import fitting, kinds
from accel.benchmarks.harness import MODES, OURS, Case, Row, UnavailableError, one_line, run_case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EFFORTS = {"short": SHORT, "goals": NORMAL, "full": FULL}
DENORMALS = (
    "Denormal numbers are kept, as torch does by default: where the shift mask of −100 makes weights near 1e-44, "
    "providers that store them multiply slowly by them on many CPUs, most of all in fp32. --flush-denormal measures "
    "without this, for all providers alike."
)
STEPS = 200  # of each training run on the digits
TEXT = flash_training.Text()
DESCRIPTION = f"""\
Measure whole models and ops against what people use today, each proven right before it is timed.

  bench           whole models, and two or three rows of each family: {BUDGET / 60:g} minutes
  bench --goals   every row that a goal is about, with the rivals it names: 11 minutes on two cores
  bench --full    every row, shape, model and rival, torch.compile among them, in more rounds: an hour

All three leave a table here and, in a folder, results.json, results.csv, speed.svg and index.html."""


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m accel bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("op", nargs="*", help=f"what to measure: {', '.join((models.NAME, *OPS))}; all if none is named")
    level = out.add_mutually_exclusive_group()
    level.add_argument("--goals", action="store_true", help="every row that a goal is about")
    level.add_argument("--full", action="store_true", help="everything")
    out.add_argument("--check", action="store_true", help="exit 1 and name the goals that were missed")
    out.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one, else cpu")
    out.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="may be repeated")
    out.add_argument(
        "--rows",
        metavar="REGEX",
        help="only rows whose label matches, as in 'stage 1 shift 0'; without --goals any row there is",
    )
    out.add_argument("--providers", metavar="A,B", help=f"instead of those chosen: {', '.join(PROVIDERS)}")
    out.add_argument("--out", type=Path, metavar="DIR", help="reports/<device>-<date>/ if not given")
    out.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"start nothing new after this time, and name what was not run; {BUDGET:g} without --goals and --full",
    )
    out.add_argument("--threads", type=int, help="torch.set_num_threads")
    out.add_argument("--flush-denormal", action="store_true", help="torch.set_flush_denormal(True), for all providers")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument(
        "--results",
        action="append",
        type=Path,
        metavar="DIR",
        help="measure nothing: make the page and the picture of the results in this folder, or in several",
    )
    return out


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    made = parser()
    options = made.parse_args(argv)
    for name in options.op:
        if name not in (*OPS, models.NAME):
            made.error(f"unknown op {name!r}; there are {models.NAME}, {', '.join(OPS)}")
    options.op = options.op or [models.NAME, *OPS]
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: this torch sees no CUDA device")
    options.level = "goals" if options.goals else "full" if options.full else "short"
    every = ["fp32", "bf16"] if options.device == "cpu" else ["bf16", "fp16", "fp32"]
    if options.device == "cuda" and options.level == "short":
        every = ["bf16"]
    options.dtypes = [DTYPES[name] for name in (options.dtype or every)]
    options.providers = options.providers.split(",") if options.providers else None
    for name in options.providers or ():
        if name not in PROVIDERS:
            made.error(f"unknown provider {name!r}; there are {', '.join(PROVIDERS)}")
    try:
        options.rows = re.compile(options.rows) if options.rows is not None else None
    except re.error as error:
        made.error(f"--rows {options.rows!r}: {error}")
    if options.budget is None and options.level == "short" and options.rows is None:
        options.budget = BUDGET
    return options


def _command(options: argparse.Namespace) -> Callable[[Row], str]:
    """The command line that measures a row again, with all its rivals."""

    def command(row: Row) -> str:
        label = row.label + (f" {row.mode}" if row.op == models.NAME else "")
        words = ["python", "-m", "accel", "bench", row.op, "--device", row.device, "--dtype", row.dtype]
        words += [f"--{options.level}"] if options.level != "short" else []
        words += ["--rows", f"^{label}$", "--threads", str(torch.get_num_threads()), "--seed", str(options.seed)]
        words += ["--providers", ",".join(options.providers)] if options.providers else []
        words += ["--flush-denormal"] if options.flush_denormal else []
        return shlex.join(words)

    return command


def folder(device: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return Path("reports") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


@dataclass(frozen=True)
class Job:
    """A case, a model or the digits: what is run or left out as a whole."""

    label: str
    family: str
    rank: int  # in the short run those of rank 0 come first, of all families
    do: Callable[[], None]


class Purse:
    """The seconds of a run, and in the short one each family's: what would begin when they are spent is left out."""

    def __init__(
        self, budget: float | None, families: Collection[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._budget, self._clock, self._start = budget, clock, clock()
        parts = {family.name: family.seconds for family in FAMILIES if family.name in families}
        self._left = {name: (budget or 0.0) * part / sum(parts.values()) for name, part in parts.items()}

    def spent(self) -> float:
        return self._clock() - self._start

    def allows(self, family: str) -> bool:
        if self._budget is not None and self.spent() >= self._budget:
            return False
        return self._left.get(family, 1.0) > 0.0

    def pay(self, family: str, seconds: float) -> None:
        if family in self._left:
            self._left[family] -= seconds


class Suite:
    """One run: its jobs in order, the results so far, and where they are kept."""

    def __init__(self, options: argparse.Namespace, argv: Sequence[str], terminal: Terminal) -> None:
        shared = options.level == "short" and options.budget is not None
        self.purse = Purse(options.budget, {FAMILY[name] for name in options.op} if shared else ())
        allocator = pin_allocator()
        if options.threads:
            torch.set_num_threads(options.threads)
        if options.flush_denormal:
            torch.set_flush_denormal(True)  # before any worker thread exists: they inherit it
        self.options, self.terminal = options, terminal
        self.out: Path = options.out or folder(options.device)
        self.effort: Effort = EFFORTS[options.level]
        self.clock: Clock = make_clock(options.device)
        self.command = _command(options)
        line = shlex.join(["python", "-m", "accel", "bench", *argv])
        facts = environment(options.device, options.seed, allocator, line)
        facts["denormals"] = "flushed to zero" if options.flush_denormal else "kept, as torch does by default"
        terminal.say("measuring the machine's ceilings")
        load = Load()
        ceilings = measure_ceilings(options.device, options.dtypes)
        self.goals = fitting(GOALS, kinds(ceilings, facts[LEVEL] or ""))
        self.results = Results(facts, ceilings, self.goals)
        if options.device == "cpu" and (others := load.others()) > 0.2:
            self.results.notes.append(
                f"The ceilings are too low: others used {others:.1f} cores while they were measured."
            )
        if options.device == "cpu" and not options.flush_denormal:
            self.results.notes.append(DENORMALS)

    def _chosen(self, every: Sequence[Case]) -> Iterator[tuple[int, Case]]:
        """The cases of this run, with their rank."""
        options = self.options
        if options.level == "goals":
            found = [(0, case) for case in _choice.judged(every, options.device, self.goals)]
        elif options.level == "full":
            found = [(0, case) for case in every]
        elif options.rows is None:
            found = list(_choice.short(every, options.device))
        else:
            found = [(0, c) for case in every for c in _choice.narrowed(case, MODES, (OURS, *_choice.RIVALS[case.op]))]
        for rank, case in found:
            if options.rows is not None and not options.rows.search(case.label):
                continue
            names = options.providers or [p.name for p in case.providers]
            yield from ((rank, part) for part in _choice.narrowed(case, MODES, names))

    def jobs(self) -> list[Job]:
        """What there is to do, in the order of its worth."""
        options = self.options
        out = list(self._models()) if models.NAME in options.op else []
        every = [
            case
            for name in options.op
            if name != models.NAME
            for case in OPS[name].cases(options.device, options.dtypes)
        ]
        chosen = list(self._chosen(every))
        for rank, case in chosen:
            out.append(Job(f"{case.op} {case.label}", FAMILY[case.op], rank, partial(self._case, case)))
        out += self._texts()
        rows = (_choice.rows_of(cases, options.device) for cases in (every, [case for _, case in chosen]))
        self.results.goals = _choice.whole(self.goals, *rows)
        return sorted(out, key=lambda job: job.rank) if options.level == "short" else out

    def _models(self) -> Iterator[Job]:
        options = self.options
        wanted = options.rows.search if options.rows is not None else lambda text: True
        every = options.level == "full" or (options.level == "short" and options.rows is not None)
        for model, dtype, mode in models.jobs(options.dtypes, every):
            row = Row(models.NAME, model.name, "", "", _name(dtype), mode, options.device, "")
            if wanted(f"{row.label} {mode}"):
                yield Job(f"{row.label} {mode}", models.NAME, 0, partial(self._model, model, dtype, mode))
        if options.device == "cpu" and torch.float32 in options.dtypes and wanted("digits"):
            yield Job("digits: training with and without the patch", models.NAME, 0, self._digits)

    def _texts(self) -> Iterator[Job]:
        """The small language models of a full run."""
        known = (
            (flash_training.NAME, "language models of FLASH and of softmax attention", self._language),
            (moe_experts.NAME, "language models of experts, with each way to balance them", self._balance),
            (fp8_linear.NAME, "language models in bf16 and in eight bits", self._eight_bits),
        )
        options = self.options
        for op, name, do in known:
            wanted = options.rows is None or options.rows.search(name)
            if options.level == "full" and op in options.op and torch.float32 in options.dtypes and wanted:
                yield Job(name, FAMILY[op], 0, partial(do, name))

    def run(self) -> int:
        terminal, results = self.terminal, self.results
        jobs = self.jobs()
        if not jobs:
            terminal.print(f"no row matches {self.options.rows.pattern if self.options.rows else ''!r}")
            return 2
        try:
            with terminal.progress(len(jobs), self.options.budget):
                for job in jobs:
                    self._do(job)
            results.finished = True
        finally:
            results.environment["seconds taken"] = round(self.purse.spent(), 1)
            save(results, self.out)
            page = report.save_page(results, self.out)
        report.show(results, terminal, page, self.options.level != "short" or self.options.rows is not None)
        return self._verdict()

    def _do(self, job: Job) -> None:
        if not self.purse.allows(job.family):
            self.results.not_run.append(job.label)
            self.terminal.step(f"{job.label}: not run, the time is spent")
            return
        self.terminal.say(job.label)
        before = self.purse.spent()
        job.do()
        self.purse.pay(job.family, self.purse.spent() - before)
        self.terminal.step(job.label)

    def _verdict(self) -> int:
        if not self.options.check:
            return 0
        wrong = [r for r in self.results.rows if r.provider == OURS and r.status == "FAIL"]
        misses = self.results.misses()
        for row in wrong:
            self.terminal.print(f"FAIL: {row.op} {row.label} {row.mode}: {row.reason}")
        for miss in misses:
            measured = number(miss.measured, 4)
            self.terminal.print(f"missed: {miss.goal.name}: measured {measured}, target {miss.target}")
        return 1 if wrong or misses else 0

    def _keep(self, rows: Sequence[Row]) -> None:
        self.results.rows.extend(rows)
        save(self.results, self.out)

    def _case(self, case: Case) -> None:
        for rows in run_case(
            case,
            device=self.options.device,
            clock=self.clock,
            effort=self.effort,
            ceilings=self.results.ceilings,
            seed=self.options.seed,
            say=self.terminal.say,
            command=self.command,
        ):
            self._keep(rows)

    def _model(self, model: models.Model, dtype: torch.dtype, mode: str) -> None:
        rows = models.model_rows(
            model,
            dtype,
            mode,
            device=self.options.device,
            clock=self.clock,
            effort=self.effort,
            ceilings=self.results.ceilings,
            seed=self.options.seed,
            say=self.terminal.say,
            command=self.command,
            ceiling=self.options.level != "short",
        )
        self._keep(rows)

    def _digits(self) -> None:
        with self._noting("digits"):
            curves = models.digits(STEPS, self.options.seed, self._ticking("digits", 4 * STEPS))
            self.results.curves = curves
            self.results.values[models.CURVES_GOAL] = models.noise_ratio(curves)

    def _language(self, label: str) -> None:
        results, tick = self.results, self._ticking(label, 2 * TEXT.steps)
        with self._noting(label):
            results.language = flash_training.language_models(TEXT, self.options.seed, tick)

    def _balance(self, label: str) -> None:
        text = moe_training.TEXT
        results, tick = self.results, self._ticking(label, len(moe_training.METHODS) * text.steps)
        with self._noting(label):
            results.balance = moe_training.train_all(text, self.options.seed, tick)

    def _eight_bits(self, label: str) -> None:
        text = fp8_training.TEXT
        results, tick = self.results, self._ticking(label, 2 * len(fp8_training.SEEDS) * text.steps)
        with self._noting(label):
            results.eight_bits = fp8_training.train_all(text, tick)
            results.values |= fp8_training.differences(results.eight_bits)

    def _ticking(self, label: str, steps: int) -> Callable[[], None]:
        """Says which step it is, of all."""
        done = itertools.count(1)
        return lambda: self.terminal.say(f"{label}: step {next(done)} of {steps}")

    @contextlib.contextmanager
    def _noting(self, label: str) -> Iterator[None]:
        """Keep what is found inside, or note why there is nothing."""
        try:
            yield
        except UnavailableError as error:
            self.results.notes.append(f"{label}: {one_line(error)}")
            return
        save(self.results, self.out)


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    terminal = Terminal()
    if options.results:
        results = load(options.results, GOALS)
        report.show(results, terminal, report.save_page(results, options.out or Path("reports/page")), details=False)
        return 0
    terminal.print(f"accel bench on {device_name(options.device)}, {torch.get_num_threads()} threads")
    return Suite(options, arguments, terminal).run()


if __name__ == "__main__":
    sys.exit(main())
