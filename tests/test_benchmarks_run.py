"""A run of the benchmark suite: which rows it takes, when it stops, and what it leaves on disk."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from _bench import CEILINGS, FASTER, WHERE, FakeClock, make_case, provider_of
from torch import Tensor

from accel.benchmarks import _choice, _page, _results, _tables, harness, run, window_attention
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import Case

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: list[Case], goals: list[Goal], *argv: str) -> int:
    monkeypatch.setattr(window_attention, "cases", lambda *args: iter(cases))
    monkeypatch.setattr(run, "GOALS", goals)
    monkeypatch.setattr(run, "make_clock", lambda device: FakeClock({"accel": [0.004], "eager": [0.006]}))
    monkeypatch.setattr(run, "measure_ceilings", lambda device, dtypes: CEILINGS)
    monkeypatch.setattr(run, "pin_allocator", lambda: "left alone")
    return run.main(["window_attention", "--device", "cpu", "--out", str(tmp_path), *argv])


def test_check_names_the_misses_and_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = make_case(provider_of("accel", lambda x, y: x * y), provider_of("eager", lambda x, y: x * y))
    assert _run(tmp_path, monkeypatch, [right], [FASTER], "--check") == 1
    assert "missed: twice as fast: measured 1.500, target ≥ 2" in capsys.readouterr().out
    assert _run(tmp_path, monkeypatch, [right], [FASTER]) == 0
    reachable = Goal("a bit faster", "window_attention", "speedup", "cpu", WHERE, "eager", at_least=1.4)
    assert _run(tmp_path, monkeypatch, [right], [reachable], "--check") == 0


def test_check_fails_on_a_wrong_result_even_without_goals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = make_case(provider_of("accel", lambda x, y: x + y), modes=["forward"])
    assert _run(tmp_path, monkeypatch, [wrong], [], "--check") == 1
    assert "FAIL: window_attention stage 1 shift 0 fp32 forward" in capsys.readouterr().out


def test_a_run_leaves_json_csv_and_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(
        provider_of("accel", lambda x, y: x * y),
        provider_of("eager", lambda x, y: x * y),
        provider_of("sdpa", torch.add),
    )
    assert _run(tmp_path, monkeypatch, [case], [FASTER], "--full") == 0
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["finished"] is True
    assert [(r["provider"], r["mode"], r["status"]) for r in data["rows"]][:3] == [
        ("accel", "forward", "ok"), ("eager", "forward", "ok"), ("sdpa", "forward", "FAIL"),
    ]  # fmt: skip
    assert data["rows"][2]["p50_ms"] is None
    assert "--rows '^stage 1 shift 0 fp32$'" in data["rows"][0]["command"]
    assert {"torch", "accel", "device name", "threads", "allocator", "seed", "date", "command"} <= set(
        data["environment"]
    )
    assert data["goals"][0]["measured"] == pytest.approx(1.5)
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(data["rows"]) == 6
    assert lines[0]["p50_ms"] == "4.0"
    assert lines[2]["p50_ms"] == ""
    page = (tmp_path / "index.html").read_text()
    links = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert all(link.startswith("http://www.w3.org/") for link in links), f"the page must stand alone: {links}"
    assert "1.500" in page
    assert "FAIL" in page


def test_a_run_cut_short_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(generator: torch.Generator) -> tuple[Tensor, ...]:
        before = json.loads((tmp_path / "results.json").read_text())
        assert (before["finished"], len(before["rows"])) == (False, 1)
        raise KeyboardInterrupt

    first = make_case(provider_of("accel", lambda x, y: x * y), modes=["forward"])
    second = Case(**{**vars(first), "inputs": interrupt})
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, monkeypatch, [first, second], [])
    data = json.loads((tmp_path / "results.json").read_text())
    assert (data["finished"], len(data["rows"])) == (False, 1)
    assert "the run did not finish" in (tmp_path / "index.html").read_text()


def test_a_budget_leaves_out_the_rest_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(provider_of("accel", lambda x, y: x * y), modes=["forward"])
    assert _run(tmp_path, monkeypatch, [case, case, case], [], "--budget", "1e-9") == 0
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["rows"] == []
    assert data["not run"] == ["window_attention stage 1 shift 0 fp32"] * 3
    assert "Not run for want of time: window_attention stage 1 shift 0 fp32;" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("argv", [["no_such_op"], ["--providers", "nobody"], ["--rows", "("]])
def test_bad_options_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main([*argv, "--device", "cpu"])
    assert caught.value.code == 2
    assert argv[-1] in capsys.readouterr().err


def test_a_real_row_through_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accel", "bench", "window_attention", "--device", "cpu"]
    command += ["--dtype", "fp32", "--rows", "^stage 4", "--threads", "1", "--out", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["provider"], row["mode"]) for row in rows] == [
        (provider, mode) for mode in harness.MODES for provider in ("accel", "eager")
    ]
    for row in rows:
        assert row["status"] == "ok", row["reason"]
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert rows[0]["backend"] in ("cpu", "reference")
    assert f"accel ({rows[0]['backend']})" in done.stdout


def test_the_help_tells_the_three_runs_apart(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--help"])
    said = capsys.readouterr().out
    for words in ("bench           whole models", "bench --goals", "bench --full", "4.5 minutes"):
        assert words in said


# --- which rows, and how long ---


def test_the_short_run_has_time_for_every_family() -> None:
    assert sum(family.seconds for family in _choice.FAMILIES) <= _choice.BUDGET - 20


def test_families_are_the_shelves_of_the_ops() -> None:
    for name, module in _choice.OPS.items():
        if name != "flash_training":  # layers
            assert (module.OP.name, module.OP.function.__module__) == (name, f"accel.ops.{_choice.FAMILY[name]}.{name}")


def test_the_short_run_takes_picks_with_their_rivals_what_matters_most_first() -> None:
    every = list(window_attention.cases("cpu", [torch.float32, torch.bfloat16]))
    chosen = list(_choice.short(every, "cpu"))
    assert sorted((rank, case.label) for rank, case in chosen) == [
        (0, "stage 1 shift 3 fp32"), (1, "stage 1 shift 3 bf16"),
        (2, "stage 1 shift 0 fp32"), (3, "stage 1 shift 0 bf16"),
    ]  # fmt: skip
    for _, case in chosen:
        assert [p.name for p in case.providers] == ["accel", "eager"]
        assert list(case.costs) == ["forward", "forward+backward"]


@pytest.mark.parametrize("module", _choice.OPS.values(), ids=_choice.OPS)
def test_the_run_for_goals_has_all_rows_of_all_goals(module: Any) -> None:
    every = list(module.cases("cpu", [torch.float32, torch.bfloat16]))
    goals = [goal for goal in module.GOALS if goal.device == "cpu"]
    found = list(_choice.judged(every, "cpu", goals))
    rows = [list(_choice.rows_of(cases, "cpu")) for cases in (every, found)]
    assert _choice.whole(goals, *rows) == goals
    assert bool(found) == bool(goals)
    assert len(rows[1]) < len(rows[0])


def test_a_goal_of_which_a_row_is_missing_is_not_judged() -> None:
    case = make_case(provider_of("accel", torch.mul), provider_of("eager", torch.mul), modes=["forward"])
    rows = list(_choice.rows_of([case], "cpu"))
    another = _choice.rows_of([dataclasses.replace(case, variant="shift 3")], "cpu")
    compiled = _choice.rows_of([make_case(provider_of("compile", torch.mul), modes=["forward"])], "cpu")
    assert _choice.whole([FASTER], [*rows, *compiled], rows) == [FASTER]
    assert _choice.whole([FASTER], [*rows, *another], rows) == []


def test_what_begins_after_a_familys_time_is_left_out() -> None:
    now = [0.0]
    first, second = _choice.FAMILIES[:2]
    share = 100 * first.seconds / (first.seconds + second.seconds)
    purse = run.Purse(100, {first.name, second.name}, lambda: now[0])
    purse.pay(first.name, share - 1)
    assert purse.allows(first.name)
    purse.pay(first.name, 1)
    assert (purse.allows(first.name), purse.allows(second.name)) == (False, True)
    now[0] = 100
    assert not purse.allows(second.name)
    whole = run.Purse(None, clock=lambda: now[0])
    whole.pay(first.name, 1e9)
    assert whole.allows(first.name)


# --- what lies on disk ---


def test_results_come_back_as_they_were_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(provider_of("accel", lambda x, y: x * y), provider_of("eager", lambda x, y: x * y))
    assert _run(tmp_path, monkeypatch, [case], [FASTER]) == 0
    results = _results.load([tmp_path], [FASTER])
    saved = json.loads((tmp_path / "results.json").read_text())
    assert _results.as_json(results) == saved
    twice = _results.load([tmp_path, tmp_path], [FASTER])
    assert twice.rows == results.rows


def test_a_page_is_made_of_results_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(provider_of("accel", lambda x, y: x * y), provider_of("eager", lambda x, y: x * y))
    assert _run(tmp_path, monkeypatch, [case], [FASTER]) == 0
    made = tmp_path / "made"
    assert run.main(["--results", str(tmp_path), "--out", str(made)]) == 0
    assert (made / "index.html").read_text() == (tmp_path / "index.html").read_text()
    picture = (made / "speed.svg").read_text()
    ElementTree.fromstring(picture)
    assert "1.50×" in picture


@pytest.mark.parametrize("folder", sorted(path.parent for path in (ROOT / "benchmarks/results").rglob("results.json")))
def test_committed_results_make_a_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_page, "pictures", lambda results: [])  # by matplotlib, which takes its time
    results = _results.load([folder], _choice.GOALS)
    page = _page.page(results)
    assert "Speed by family" in page or "Whole models" in page
    for match in _tables.matches(results):
        assert f"{match.speedup:.2f}"[:3] in page
