"""Whole models in the benchmark suite: real input, patched against unpatched, and training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from accel.benchmarks import harness, models

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_photographs_are_four_different_pictures() -> None:
    pytest.importorskip("skimage")
    x = models.photographs()
    assert x.shape == (4, 3, 224, 224)
    assert torch.isfinite(x).all()
    assert all((x[i] - x[j]).abs().mean() > 0.1 for i in range(4) for j in range(i))


def test_detectors_run_on_one_photograph_in_fp32() -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("transformers")
    x = models._detectors.photograph()
    assert x.shape == (1, 3, 416, 640)
    assert x.std() > 0.5
    dtypes = (torch.float32, torch.bfloat16)
    names = ["transformers Deformable DETR", "transformers RT-DETR"]
    for every in (False, True):
        assert [(m.name, d) for m, d, _ in models.jobs(dtypes, every) if m.detects] == [
            (n, torch.float32) for n in names
        ]


def test_the_short_run_has_one_model_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    jobs = list(models.jobs([torch.bfloat16, torch.float32], False))
    assert [(m.name, d, mode) for m, d, mode in jobs] == [
        ("torchvision swin_t", torch.float32, "forward"),
        ("torchvision swin_t", torch.float32, models.TRAINING),
        ("torchvision swin_t", torch.bfloat16, "forward"),
    ]


def test_a_detector_is_compared_as_a_set_of_queries() -> None:
    class Detector(torch.nn.Module):
        order = torch.arange(5)

        def forward(self, pixel_values: Tensor) -> Any:
            found = torch.arange(20.0).view(1, 5, 4).square()[:, self.order]
            return type("Output", (), {"last_hidden_state": found, "logits": found + 100, "pred_boxes": found / 400})

    net, x = Detector(), torch.zeros(1, 3, 8, 8)
    first = models._results(net, x, x, False, 0, detects=True)
    net.order = torch.tensor([3, 1, 0, 4, 2])
    for a, b in zip(first, models._results(net, x, x, False, 0, detects=True), strict=True):
        torch.testing.assert_close(a, b)
    assert harness.relative_rms(first[1] + 1, first[1]) > 0.005
    assert "boxes" in models._judge([1e-6, 1e-6, 1e-3], [1e-6] * 3, torch.float32, models.FOUND)


def test_digits_curves_coincide_within_the_noise_and_the_loss_falls() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("torchvision")
    ticks: list[None] = []
    curves = models.digits(3, seed=0, tick=lambda: ticks.append(None))
    assert len(ticks) == 12
    assert len(curves.patched) == 3
    assert curves.difference < 1e-4
    assert all(torch.isfinite(torch.tensor(run_)).all() for run_ in (curves.eager, curves.patched, *curves.perturbed))


def test_noise_is_counted_in_runs_that_differ_by_rounding() -> None:
    curves = models.Curves([1.0, 2.0], [1.0, 2.5], [[1.0, 2.25], [1.0, 2.0]], {})
    assert (curves.difference, curves.noise, models.noise_ratio(curves)) == (0.5, 0.25, 2.0)


def test_a_patched_model_far_from_float64_is_wrong() -> None:
    assert models._judge([1e-6, 1e-6], [1e-6, 1e-6], torch.float32) == ""
    assert "gradients" in models._judge([1e-6, 1e-3], [1e-6, 1e-6], torch.float32)
    assert "output" in models._judge([float("nan")], [1e-6], torch.float32)


def test_the_command_line_without_a_command_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    from accel.__main__ import main

    assert main([]) == 2
    assert "bench" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert main(["dance"]) == 2
