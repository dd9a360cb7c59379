"""Patched models under torch.jit and torch.fx, which write down code: what they get, and that it is said."""

import logging

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from _attention_models import encoder, noise
from _swin_models import build
from torchvision.models.feature_extraction import create_feature_extractor

import accel


def plain_and_patched(name):
    if name == "torch encoder":
        torch.manual_seed(3)
        model, x = encoder().double(), noise(2, 9, 32)
    else:
        model, x = build(name)
    expected = model.eval()(x).detach()
    return model, x, expected, accel.patch(model)


@pytest.mark.parametrize("name", ["torchvision v1", "timm v1", "torch encoder"])
@pytest.mark.filterwarnings("ignore")
def test_a_traced_model_is_the_class_and_says_so(name, caplog):
    model, x, expected, report = plain_and_patched(name)
    with caplog.at_level(logging.WARNING, logger="accel"):
        traced = torch.jit.trace(model, x, check_trace=False)
    torch.testing.assert_close(traced(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(traced(x[:1]), expected[:1], rtol=0, atol=1e-12)
    assert "accel::" not in str(traced.inlined_graph)
    reason = "torch.jit.trace is running, which records the class's own code"
    assert all(set(row.fallbacks) <= {reason} for row in report.rows)
    assert any(row.fallbacks for row in report.rows)
    assert reason in caplog.text
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert not report.uncalled()


@pytest.mark.filterwarnings("ignore")
def test_script_is_refused_with_the_way_out():
    for name, refused in (
        ("torchvision v1", "ShiftedWindowAttention"),
        ("timm v1", "SwinTransformerBlock"),
        ("torch encoder", "TransformerEncoderLayer"),
    ):
        model, *_ = plain_and_patched(name)
        with pytest.raises(
            NotImplementedError, match=rf"torch\.jit\.script .* {refused} is patched: call accel\.unpatch"
        ):
            torch.jit.script(model)
    attention = nn.MultiheadAttention(8, 2)
    accel.patch(attention)
    accel.unpatch(attention)
    torch.jit.script(attention)


def test_a_feature_extractor_says_that_it_has_no_kernel(caplog):
    model, x, _, report = plain_and_patched("torchvision v1")
    extracted = create_feature_extractor(model, ["features.1"])
    assert "the traced model has no kernel there" in caplog.text
    assert list(report.rows[0].fallbacks) == [
        "torch.fx is tracing and writes down the code of ShiftedWindowAttention, so the traced model has no kernel "
        "there; with ShiftedWindowAttention among the tracer's leaf modules it keeps it"
    ]
    expected = extracted(x)["features.1"]
    assert report.uncalled()
    leaves = {"leaf_modules": [type(model.get_submodule(report.rows[0].name))]}
    kept = create_feature_extractor(model, ["features.1"], tracer_kwargs=leaves)
    torch.testing.assert_close(kept(x)["features.1"], expected, rtol=0, atol=1e-12)
    assert [row.calls for row in report.rows[:2]] == [1, 1]
