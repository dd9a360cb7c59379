"""FLASH beside softmax attention in the benchmark suite: blocks of one size, language models, and their pictures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _bench import CEILINGS, FakeClock, row_of, rows_of
from torch import nn

from accel.benchmarks import _plots, _results, flash_training, run
from accel.benchmarks.harness import UnavailableError
from accel.nn.attention import attend_heads

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> flash_training.Blocks:
    """Blocks of few channels and short chunks, whose scales of queries and keys are such that attention weighs."""
    monkeypatch.setattr(flash_training, "CHANNELS", 32)
    monkeypatch.setattr(flash_training, "HEAD", 8)
    monkeypatch.setattr(flash_training, "CHUNK", 16)
    blocks = flash_training.Blocks.drawn(32)
    for layer in blocks.flash.layers:
        nn.init.normal_(layer.gamma)  # type: ignore[arg-type]
    return blocks


def test_blocks_have_as_many_parameters() -> None:
    for channels in (flash_training.CHANNELS, flash_training.Text().channels):
        flash, softmax = (flash_training.count(b) for b in vars(flash_training.Blocks.drawn(channels)).values())
        assert abs(flash - softmax) <= channels + 1


def test_each_block_is_right_and_takes_its_own_parameters(small: flash_training.Blocks) -> None:
    case = flash_training._case(small, 50, "cpu", torch.float32)
    rows = rows_of(case)
    assert [(row.provider, row.status, row.tokens) for row in rows] == [("accel", "ok", 50), ("softmax", "ok", 50)]
    inputs = [x.requires_grad_() for x in case.inputs(torch.Generator().manual_seed(0))]
    flash = len(list(small.flash.parameters()))
    for function, used in ((small.of_flash, [0, *range(1, 1 + flash)]), (small.of_softmax, None)):
        grads = torch.autograd.grad(function(*inputs).square().sum(), inputs, allow_unused=True)
        found = [i for i, grad in enumerate(grads) if grad is not None]
        assert found == (used or [0, *range(1 + flash, len(inputs))])


def test_the_judge_of_the_softmax_block_is_torchs_attention(small: flash_training.Blocks) -> None:
    block = small.softmax.double()
    x = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(0)).double()
    ours = attend_heads(block.attention, x, x, x, causal=True)
    judge = attend_heads(block.attention, x, x, x, flash_training._sdpa, causal=True)
    torch.testing.assert_close(judge, ours)


def test_what_a_block_costs(small: flash_training.Blocks) -> None:
    cost = flash_training._cost(small, 10)
    dense = 2 * (32 * (2 * 64 + 128) + 64 * 32)
    pairs, states = 8 * (2 * 4 * 128 + 2 * 3 * 64), 6 * 2 * 128 * 64
    assert cost.flops == 10 * (6 * dense + 2 * (pairs + states))


def test_language_models_learn_from_the_standard_library(small: flash_training.Blocks) -> None:
    ticks: list[None] = []
    text = flash_training.Text(channels=32, blocks=1, tokens=48, batch=4, steps=30, rate=1e-2, bytes=1 << 16)
    losses = flash_training.language_models(text, 0, lambda: ticks.append(None))
    assert (list(losses), len(ticks)) == (["FLASH", "softmax"], 60)
    for line in losses.values():
        assert 5.0 < line[0] < 6.5, "256 bytes are equally likely at first"
        assert sum(line[-5:]) / 5 < 4.0
    twice = dataclasses.replace(text, steps=2)
    assert flash_training.language_models(twice, 1) == flash_training.language_models(twice, 1)


def test_a_model_is_asked_for_the_byte_that_follows(small: flash_training.Blocks) -> None:
    text = flash_training.Text(channels=32, tokens=40, batch=3)
    given, following = next(flash_training._windows(torch.arange(200), text, 0))
    assert given.shape == (3, 40)
    assert torch.equal(following, given + 1)
    for block in (small.flash, small.softmax):
        model = flash_training.LanguageModel(32, [block])
        changed = given.clone()
        changed[:, 25:] += 50
        same = model(given)[:, :25] - model(changed)[:, :25]
        assert same.abs().max() < 1e-5, "it sees what follows"


def test_sources_are_text_of_the_asked_length(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = flash_training.sources(10_000)
    assert (data.dtype, data.shape) == (torch.int64, (10_000,))
    assert b"import" in bytes(data.tolist())
    monkeypatch.setattr(flash_training.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UnavailableError, match="no sources"):
        flash_training.sources(10)


LOSSES = {"FLASH": [5.0, 4.0, 3.0], "softmax": [5.0, 4.5, 3.5]}


def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Any, *argv: str) -> dict[str, Any]:
    monkeypatch.setattr(flash_training, "cases", lambda *args: iter(()))
    monkeypatch.setattr(flash_training, "language_models", models)
    monkeypatch.setattr(run, "make_clock", lambda device: FakeClock())
    monkeypatch.setattr(run, "measure_ceilings", lambda device, dtypes: CEILINGS)
    monkeypatch.setattr(run, "pin_allocator", lambda: "left alone")
    code = run.main(["flash_training", "--device", "cpu", "--out", str(tmp_path), *argv])
    path = tmp_path / "results.json"
    return {"code": code, **(json.loads(path.read_text()) if path.exists() else {})}


def test_the_full_run_trains_language_models_and_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _run(tmp_path, monkeypatch, lambda text, seed, tick: LOSSES, "--full")
    assert (data["code"], data["language"]) == (0, LOSSES)
    assert _results.load([tmp_path], []).language == LOSSES
    page = (tmp_path / "index.html").read_text()
    assert "<h3>Language models</h3>" in page
    assert "FLASH: 3.00 at the end" in page


def test_other_runs_train_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> dict[str, list[float]]:
        raise AssertionError("trained all the same")

    for argv in ([], ["--goals"], ["--full", "--dtype", "bf16"], ["--full", "--rows", "no such row"]):
        assert _run(tmp_path, monkeypatch, refuse, *argv) == {"code": 2}


def test_without_sources_a_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> dict[str, list[float]]:
        raise UnavailableError("there are no sources in nowhere")

    data = _run(tmp_path, monkeypatch, missing, "--full")
    assert data["language"] == {}
    assert any("there are no sources in nowhere" in note for note in data["notes"])


def test_time_by_length_is_a_line_for_each_provider() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    rows = [
        dataclasses.replace(row_of(provider, ms, f"T {tokens}", tokens=tokens), mode=mode)
        for mode in ("forward", "forward+backward")
        for provider, times in (("accel", (1.0, 4.0)), ("softmax", (2.0, 32.0)))
        for tokens, ms in zip((4096, 1024), reversed(times), strict=True)
    ]
    figure = _plots._by_length(plt, rows)
    assert figure is not None
    first = figure.axes[0]
    assert [axes.get_title() for axes in figure.axes] == ["stage 1, fp32, forward", "stage 1, fp32, forward+backward"]
    assert [line.get_xydata().tolist() for line in first.lines] == [
        [[1024.0, 1e6 / 1024], [4096.0, 4e6 / 4096]],
        [[1024.0, 2e6 / 1024], [4096.0, 32e6 / 4096]],
    ]
    assert [label.get_text() for label in first.get_xticklabels()] == ["1K", "4K"]
    assert first.get_ylim()[0] == 0
    plt.close(figure)
    assert _plots._by_length(plt, rows[:1]) is None
