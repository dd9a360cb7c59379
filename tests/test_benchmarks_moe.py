"""Mixtures of experts in the benchmark suite: rivals compute the same, costs are what is stated, and experts train."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _bench import CEILINGS, FakeClock, rows_of

from accel.benchmarks import _results, moe_experts, moe_permute, moe_route, moe_training, run
from accel.benchmarks.harness import Case, UnavailableError

pytestmark = pytest.mark.usefixtures("one_thread")
FLOAT = torch.float32


def _right(case: Case, providers: set[str]) -> None:
    rows = rows_of(case)
    assert {row.provider for row in rows} == providers
    for row in rows:
        assert row.status == "ok", f"{row.label} {row.mode} {row.provider}: {row.reason}"


@pytest.mark.parametrize("make", [moe_route.softmax, moe_route.grouped])
def test_routers_of_transformers_compute_the_same(make: Any) -> None:
    pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    _right(moe_route._case(make(37, 64), "cpu"), {"accel", "transformers"})


def test_a_rival_that_routes_otherwise_is_seen() -> None:
    pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    case = moe_route._case(moe_route.softmax(37, 64), "cpu")
    changed = dataclasses.replace(case.providers[1], computes=moe_route.ours(moe_route.grouped(37, 64)))
    rows = rows_of(dataclasses.replace(case, providers=(changed,)))
    assert {row.status for row in rows} == {"FAIL"}
    assert "relative RMS error" in rows[0].reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [moe_permute.THERE, moe_permute.BACK])
def test_plain_torch_sorts_and_sums_the_same(group: str, dtype: torch.dtype) -> None:
    _right(moe_permute._case(moe_permute.Shape(11, 24, 16), group, "cpu", dtype), {"accel", "eager"})


def test_bytes_of_a_pass() -> None:
    shape = moe_permute.Shape(10, 6, 16)
    token, plan = 10 * 6 * 2, 10 * 8 * 8
    both = "forward+backward"
    assert moe_permute.cost(shape, moe_permute.THERE, "forward", 2).moved == 9 * token + 3 * plan
    assert moe_permute.cost(shape, moe_permute.BACK, "forward", 2).moved == 9 * token + plan + 10 * 8 * 4
    assert moe_permute.cost(shape, moe_permute.BACK, both, 2).moved == (9 + 9 + 8) * token + 4 * plan
    of = moe_route.softmax(10, 64)
    assert moe_route.cost(of, "forward") == moe_route.Cost(640, 4 * 640 + 12 * 80)
    assert moe_route.cost(of, both).moved == 4 * 640 + 12 * 80 + 8 * 640 + 12 * 80


def test_what_comes_before_the_experts_is_a_row_beside_them() -> None:
    shape = dataclasses.replace(moe_experts.qwen3(512), channels=8, inner=4, experts=8, choices=2)
    case = moe_experts._case(shape, "cpu", FLOAT, ["forward"])
    assert "routing" not in [p.name for p in moe_experts._case(moe_experts.qwen3(16), "cpu", FLOAT, []).providers]
    kept = tuple([p for p in case.providers if p.name in ("accel", "routing")])
    part = dataclasses.replace(case, providers=kept, cold=())
    _right(part, {"accel", "routing"})
    clock = FakeClock({"accel": [1.0], "routing": [0.04]})
    rows = [dataclasses.replace(row, shape="") for row in rows_of(part, clock)]
    goals = [goal for goal in moe_experts.GOALS if goal.rival == "routing" and goal.where["dtype"] == "fp32"]
    (verdict,) = _results.Results({}, CEILINGS, goals, rows).verdicts()
    assert (verdict.met, verdict.measured) == (True, pytest.approx(0.04))


# --- training ---

SMALL = dataclasses.replace(moe_training.TEXT, channels=32, tokens=24, batch=4, steps=3, bytes=1 << 14)


def test_each_method_trains_the_same_model_and_balances_in_its_way() -> None:
    ticks: list[None] = []
    courses = moe_training.train_all(SMALL, 0, lambda: ticks.append(None))
    assert (list(courses), len(ticks)) == (list(moe_training.METHODS), 15)
    for course in courses.values():
        assert len(course.losses) == len(course.imbalance) == 3
        assert course.losses[0] == courses["nothing"].losses[0], "they begin with the same numbers"
        assert course.imbalance[0] == courses["nothing"].imbalance[0] >= 1.0
        assert sum(course.load) == pytest.approx(1.0)
        assert course.load == sorted(course.load, reverse=True)
        assert len(course.load) == moe_training.EXPERTS
    assert len({tuple(course.losses) for course in courses.values()}) == 5, "two methods do the same"
    assert moe_training.train_all(SMALL, 0) == courses


COURSES = {
    name: moe_training.Course([5.0, 4.0, 3.0], [2.0, 1.5, 1.25], [0.5, 0.25, 0.25]) for name in ("nothing", "bias")
}


def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Any, *argv: str) -> dict[str, Any]:
    monkeypatch.setattr(moe_experts, "cases", lambda *args: iter(()))
    monkeypatch.setattr(moe_training, "train_all", train)
    monkeypatch.setattr(run, "make_clock", lambda device: FakeClock())
    monkeypatch.setattr(run, "measure_ceilings", lambda device, dtypes: CEILINGS)
    monkeypatch.setattr(run, "pin_allocator", lambda: "left alone")
    code = run.main(["moe_experts", "--device", "cpu", "--out", str(tmp_path), *argv])
    path = tmp_path / "results.json"
    return {"code": code, **(json.loads(path.read_text()) if path.exists() else {})}


def test_the_full_run_trains_experts_and_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _run(tmp_path, monkeypatch, lambda text, seed, tick: COURSES, "--full")
    assert data["code"] == 0
    assert data["balance"]["bias"]["imbalance"] == [2.0, 1.5, 1.25]
    assert _results.load([tmp_path], []).balance == COURSES
    page = (tmp_path / "index.html").read_text()
    for words in ("<h3>Experts kept busy alike</h3>", "bias: 3.00", "nothing: 1.25"):
        assert words in page


def test_other_runs_train_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> dict[str, Any]:
        raise AssertionError("trained all the same")

    for argv in ([], ["--goals"], ["--full", "--dtype", "bf16"], ["--full", "--rows", "no such row"]):
        assert _run(tmp_path, monkeypatch, refuse, *argv) == {"code": 2}


def test_without_sources_a_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> dict[str, Any]:
        raise UnavailableError("there are no sources in nowhere")

    data = _run(tmp_path, monkeypatch, missing, "--full")
    assert data["balance"] == {}
    assert any("there are no sources in nowhere" in note for note in data["notes"])
