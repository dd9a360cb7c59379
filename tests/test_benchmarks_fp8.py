"""Numbers of eight bits in the benchmark suite: rivals compute what they say, and a model trains in them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _bench import CEILINGS, FakeClock, rows_of

from accel.benchmarks import _results, fp8_gemm, fp8_linear, fp8_quantize, fp8_training, run
from accel.benchmarks.harness import Case, UnavailableError

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16)


def _right(case: Case, providers: set[str], missing: str = "") -> None:
    """Every provider's row is right, but for one that is ``missing`` here."""
    rows = rows_of(dataclasses.replace(case, cold=()))
    assert {row.provider for row in rows} == providers
    for row in rows:
        wanted = "unavailable" if row.provider == missing else "ok"
        assert row.status == wanted, f"{row.label} {row.mode} {row.provider}: {row.reason}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [fp8_quantize.TILES, fp8_quantize.BOTH])
def test_plain_torch_quantises_to_the_same_bits(group: str, dtype: torch.dtype) -> None:
    _right(fp8_quantize._case(group, 200, "cpu", dtype), {"accel", "eager"})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [fp8_linear.CODES, fp8_linear.TRAINED])
def test_linear_layers_are_each_right(group: str, dtype: torch.dtype) -> None:
    _right(fp8_linear._case(group, 5, 256, "cpu", dtype), {"accel", "linear"})


def test_a_rival_that_computes_otherwise_is_seen() -> None:
    case = fp8_linear._case(fp8_linear.CODES, 5, 256, "cpu", torch.float32)
    changed = dataclasses.replace(case.providers[1], computes=None)  # held against eight bits
    (row,) = rows_of(dataclasses.replace(case, providers=(changed,), cold=()))
    assert row.status == "FAIL"
    assert "relative RMS error" in row.reason


@pytest.mark.parametrize("group", list(fp8_gemm.SCALES))
def test_products_are_those_of_the_dequantised(group: str) -> None:
    case = fp8_gemm._case(group, 16, 64, 256, "cpu", torch.bfloat16)
    missing = "" if group == fp8_gemm.ROWS else "scaled_mm"  # torch's, which on a CPU knows scales of rows alone
    _right(case, {"accel", "scaled_mm", "dequantised"}, missing)


def test_codes_are_cold_and_count_as_bytes() -> None:
    (case,) = [c for c in fp8_linear.cases("cpu", [torch.bfloat16]) if c.variant == "1 row"]
    x, weight, codes, scale = case.inputs(torch.Generator().manual_seed(0))
    assert case.cold == (1, 2)
    assert (x.dtype, weight.dtype, codes.dtype) == (torch.bfloat16, torch.bfloat16, torch.float8_e4m3fn)
    assert case.costs["forward"].moved == codes.numel() + 2 * x.numel() * 2
    assert scale.shape == (32, 32)


# --- training ---


def test_the_same_model_trains_in_both() -> None:
    pytest.importorskip("transformers.models.llama.modeling_llama")
    text = dataclasses.replace(fp8_training.TEXT, channels=64, blocks=1, tokens=24, batch=4, steps=4)
    data = fp8_training.topics()
    plain = fp8_training.train_one(data, text, 0, None, lambda: None)
    eight = fp8_training.train_one(data, text, 0, fp8_training.accel.FP8Recipe(size_rule=False), lambda: None)
    assert plain[0] == pytest.approx(eight[0], rel=0.01)
    assert plain != eight
    assert plain[-1] < plain[0]
    assert fp8_training.train_one(data, text, 0, None, lambda: None) == plain


def test_differences_are_of_the_last_steps() -> None:
    courses = {
        "a": fp8_training.Course([9.0] * 10 + [2.0] * 50, [1.0] * 10 + [2.01] * 50),
        "b": fp8_training.Course([2.0] * 50, [1.98] * 50),
    }
    found = fp8_training.differences(courses)
    assert found[fp8_training.EACH] == pytest.approx(1.0)
    assert found[fp8_training.MEAN] == pytest.approx(0.25)


COURSES = {"seed 0": fp8_training.Course([5.0, 4.0, 3.0], [5.0, 4.0, 3.003])}


def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Any, *argv: str) -> dict[str, Any]:
    monkeypatch.setattr(fp8_linear, "cases", lambda *args: iter(()))
    monkeypatch.setattr(fp8_training, "train_all", train)
    monkeypatch.setattr(run, "make_clock", lambda device: FakeClock())
    monkeypatch.setattr(run, "measure_ceilings", lambda device, dtypes: CEILINGS)
    monkeypatch.setattr(run, "pin_allocator", lambda: "left alone")
    code = run.main(["fp8_linear", "--device", "cpu", "--out", str(tmp_path), *argv])
    path = tmp_path / "results.json"
    return {"code": code, **(json.loads(path.read_text()) if path.exists() else {})}


def test_the_full_run_trains_in_eight_bits_and_draws_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _run(tmp_path, monkeypatch, lambda text, tick: COURSES, "--full")
    assert data["code"] == 0
    assert data["eight bits"]["seed 0"]["eight"] == [5.0, 4.0, 3.003]
    again = _results.load([tmp_path], fp8_training.GOALS)
    assert again.eight_bits == COURSES
    assert [verdict.met for verdict in again.verdicts()] == [True, True]
    page = (tmp_path / "index.html").read_text()
    for words in ("<h3>Training in eight bits</h3>", "seed 0: +0.03 %"):
        assert words in page


def test_without_transformers_a_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> dict[str, Any]:
        raise UnavailableError("transformers is not installed")

    data = _run(tmp_path, monkeypatch, missing, "--full")
    assert data["eight bits"] == {}
    assert any("transformers is not installed" in note for note in data["notes"])
