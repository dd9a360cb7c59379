"""``python -m accel bench``: choose the rows, run them, report."""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from accel.benchmarks import deform_conv2d, models, ms_deform_attn, report, softmax_attention, window_attention
from accel.benchmarks._machine import Load, device_name, environment, measure_ceilings, pin_allocator
from accel.benchmarks._timing import FULL, NORMAL, QUICK, Clock, Effort, make_clock
from accel.benchmarks.harness import Case, Goal, Row, UnavailableError, one_line, run_case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EFFORTS = {"quick": QUICK, "normal": NORMAL, "full": FULL}
OPS: dict[str, Any] = {
    module.NAME: module for module in (window_attention, softmax_attention, deform_conv2d, ms_deform_attn)
}
GOALS: tuple[Goal, ...] = (*(goal for module in OPS.values() for goal in module.GOALS), *models.GOALS)
PROVIDERS = tuple(dict.fromkeys(name for module in OPS.values() for name in module.PROVIDERS))
DENORMALS = (
    "Denormal numbers are kept, as torch does by default: where the shift mask of −100 makes weights near 1e-44, "
    "providers that store them multiply slowly by them on many CPUs, most of all in fp32. --flush-denormal measures "
    "without this, for all providers alike."
)
STEPS = {"quick": 30, "normal": 200, "full": 200}


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m accel bench",
        description="Measure ops and whole models against what people use today, and hold them against their goals.",
    )
    out.add_argument("op", nargs="*", help=f"what to measure: {', '.join(OPS)}, models; all if none is named")
    out.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one, else cpu")
    out.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="may be repeated; all if none is named")
    level = out.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_true", help="fewer rounds and steps, without torch.compile")
    level.add_argument("--full", action="store_true", help="more rounds, shapes, providers and models")
    out.add_argument(
        "--rows", default="", metavar="REGEX", help="only rows whose label matches, as in 'stage 1 shift 0'"
    )
    out.add_argument("--providers", metavar="A,B", help=f"instead of the level's: {', '.join(PROVIDERS)}")
    out.add_argument("--out", type=Path, metavar="DIR", help="reports/<device>-<date>/ if not given")
    out.add_argument("--check", action="store_true", help="exit 1 and name the goals that were missed")
    out.add_argument("--budget", type=float, metavar="SECONDS", help="start nothing new after this time")
    out.add_argument("--threads", type=int, help="torch.set_num_threads")
    out.add_argument("--flush-denormal", action="store_true", help="torch.set_flush_denormal(True), for all providers")
    out.add_argument("--seed", type=int, default=0)
    return out


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    made = parser()
    options = made.parse_args(argv)
    for name in options.op:
        if name not in (*OPS, models.NAME):
            made.error(f"unknown op {name!r}; there are {', '.join(OPS)} and {models.NAME}")
    options.op = options.op or [*OPS, models.NAME]
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: this torch sees no CUDA device")
    every = ("fp32", "bf16") if options.device == "cpu" else ("bf16", "fp16", "fp32")
    options.dtypes = [DTYPES[name] for name in (options.dtype or every)]
    options.level = "quick" if options.quick else "full" if options.full else "normal"
    options.providers = options.providers.split(",") if options.providers else None
    for name in options.providers or ():
        if name not in PROVIDERS:
            made.error(f"unknown provider {name!r}; there are {', '.join(PROVIDERS)}")
    try:
        options.rows = re.compile(options.rows)
    except re.error as error:
        made.error(f"--rows {options.rows!r}: {error}")
    return options


def _command(options: argparse.Namespace) -> Callable[[Row], str]:
    """The command line that measures a row again, with all its rivals."""

    def command(row: Row) -> str:
        label = row.label + (f" {row.mode}" if row.op == models.NAME else "")
        words = ["python", "-m", "accel", "bench", row.op, "--device", row.device, "--dtype", row.dtype]
        words += [f"--{options.level}"] if options.level != "normal" else []
        words += ["--rows", f"^{label}$", "--threads", str(torch.get_num_threads()), "--seed", str(options.seed)]
        words += ["--providers", ",".join(options.providers)] if options.providers else []
        words += ["--flush-denormal"] if options.flush_denormal else []
        return shlex.join(words)

    return command


def folder(device: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return Path("reports") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


class Suite:
    """One run: its jobs in order, the results so far, and where they are kept."""

    def __init__(self, options: argparse.Namespace, argv: Sequence[str], terminal: report.Terminal) -> None:
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
        self.results = report.Results(facts, measure_ceilings(options.device, options.dtypes), GOALS)
        if options.device == "cpu" and (others := load.others()) > 0.2:
            self.results.notes.append(
                f"The ceilings are too low: others used {others:.1f} cores while they were measured."
            )
        if options.device == "cpu" and not options.flush_denormal:
            self.results.notes.append(DENORMALS)

    def jobs(self) -> list[tuple[str, Callable[[], None]]]:
        """Label and what to do, in the order of their worth."""
        options = self.options
        out: list[tuple[str, Callable[[], None]]] = []
        for name in options.op:
            if name == models.NAME:
                continue
            for case in OPS[name].cases(options.device, options.dtypes, options.level, options.providers):
                if options.rows.search(case.label):
                    out.append((f"{name} {case.label}", partial(self._case, case)))
        if models.NAME in options.op:
            for model, dtype, mode in models.jobs(options.dtypes, options.level):
                row = Row(models.NAME, model.name, "", "", _name(dtype), mode, options.device, "")
                if options.rows.search(f"{row.label} {mode}"):
                    out.append((f"{row.label} {mode}", partial(self._model, model, dtype, mode)))
            if options.device == "cpu" and torch.float32 in options.dtypes and options.rows.search("digits"):
                out.append(("digits: training with and without the patch", self._digits))
        return out

    def run(self) -> int:
        options, terminal, results = self.options, self.terminal, self.results
        jobs = self.jobs()
        if not jobs:
            terminal.print(f"no row matches {options.rows.pattern!r}")
            return 2
        start = time.monotonic()
        try:
            with terminal.progress(len(jobs)):
                for done, (label, job) in enumerate(jobs):
                    if options.budget and time.monotonic() - start > options.budget:
                        results.notes.append(f"{len(jobs) - done} of {len(jobs)} jobs left out: the budget was spent")
                        break
                    terminal.say(label)
                    job()
                    terminal.step(label)
            results.finished = True
        finally:
            results.environment["seconds taken"] = round(time.monotonic() - start, 1)
            report.save(results, self.out)
            page = report.save_page(results, self.out)
        report.show(results, terminal, page)
        return self._verdict()

    def _verdict(self) -> int:
        if not self.options.check:
            return 0
        wrong = [r for r in self.results.rows if r.provider == "accel" and r.status == "FAIL"]
        misses = self.results.misses()
        for row in wrong:
            self.terminal.print(f"FAIL: {row.op} {row.label} {row.mode}: {row.reason}")
        for miss in misses:
            measured = report.number(miss.measured, 4)
            self.terminal.print(f"missed: {miss.goal.name}: measured {measured}, target {miss.target}")
        return 1 if wrong or misses else 0

    def _keep(self, rows: Sequence[Row]) -> None:
        self.results.rows.extend(rows)
        report.save(self.results, self.out)

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
        )
        self._keep(rows)

    def _digits(self) -> None:
        done = [0]

        def tick() -> None:
            done[0] += 1
            self.terminal.say(f"digits: step {done[0]} of {4 * steps}")

        steps = STEPS[self.options.level]
        try:
            curves = models.digits(steps, self.options.seed, tick)
        except UnavailableError as error:
            self.results.notes.append(f"digits: {one_line(error)}")
            return
        self.results.curves = curves
        self.results.values[models.CURVES_GOAL] = models.noise_ratio(curves)
        report.save(self.results, self.out)


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    terminal = report.Terminal()
    terminal.print(f"accel bench on {device_name(options.device)}, {torch.get_num_threads()} threads")
    return Suite(options, arguments, terminal).run()


if __name__ == "__main__":
    sys.exit(main())
