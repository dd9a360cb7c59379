"""Language models of experts, by what keeps their load even: what they learn, and the picture."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from _bench import CEILINGS, FakeClock

from accel.benchmarks import _moe_training, _results, moe_experts, run

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = replace(_moe_training.TEXT, channels=32, blocks=1, tokens=48, steps=40, rate=1e-2, bytes=1 << 16)


def test_models_learn_and_every_method_evens_the_load() -> None:
    ticks: list[None] = []
    curves = _moe_training.balanced_models(SMALL, 0, lambda: ticks.append(None))
    assert tuple(curves) == _moe_training.METHODS
    assert len(ticks) == 4 * 40
    uneven = sum(curves["nothing"].imbalance[-10:])
    for name, curve in curves.items():
        assert len(curve.loss) == len(curve.imbalance) == 40
        assert 5.0 < curve.loss[0] < 6.5, "256 bytes are equally likely at first"
        assert sum(curve.loss[-5:]) / 5 < 4.0
        assert name == "nothing" or sum(curve.imbalance[-10:]) < uneven
    assert curves["nothing"].loss[0] == curves["a bias of the choice"].loss[0], "all begin alike"


def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Any, *argv: str) -> dict[str, Any]:
    monkeypatch.setattr(moe_experts, "cases", lambda *args: iter(()))
    monkeypatch.setattr(_moe_training, "balanced_models", models)
    monkeypatch.setattr(run, "make_clock", lambda device: FakeClock())
    monkeypatch.setattr(run, "measure_ceilings", lambda device, dtypes: CEILINGS)
    monkeypatch.setattr(run, "pin_allocator", lambda: "left alone")
    code = run.main(["moe_experts", "--device", "cpu", "--out", str(tmp_path), *argv])
    return {"code": code, **json.loads((tmp_path / "results.json").read_text())}


def test_the_full_run_trains_and_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = _moe_training.Curve([5.0, 3.0], [4.0, 1.5])
    data = _run(tmp_path, monkeypatch, lambda text, seed, tick: {"nothing": curve}, "--full")
    assert (data["code"], data["balance"]) == (0, {"nothing": asdict(curve)})
    assert _results.load([tmp_path], []).balance == data["balance"]
    page = (tmp_path / "index.html").read_text()
    assert "<h3>Load of experts</h3>" in page
    assert "nothing: 3.00 at the end" in page
    assert "nothing: 1.50 at the end" in page
