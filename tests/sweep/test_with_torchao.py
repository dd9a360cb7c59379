"""torchao's int8 weights in models before and after they are patched."""

import pytest
import torch

pytest.importorskip("torchao", reason="torchao is not installed")

from _with_models import MODELS, build, run, same
from torch import nn
from torchao import quantization

import accel

pytestmark = pytest.mark.slow


def to_int8(model):
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    kinds = {type(m.weight) for m in model.modules() if type(m) is nn.Linear}
    assert nn.Parameter not in kinds, "every linear layer is quantized"
    return model


@pytest.mark.parametrize("name", MODELS)
def test_int8_before_the_patch(name):
    model, x = build(name)
    expected = run(to_int8(model), x)
    report = accel.patch(model, allow_none=True)
    same(run(model, x), expected)
    if name in ("vit", "llama"):
        assert not report.skipped
        assert not report.uncalled()
    else:
        assert not report.replaced
        assert all("not a plain parameter" in row.reason for row in report.skipped)


@pytest.mark.parametrize("name", MODELS)
def test_int8_after_the_patch(name):
    model, x = build(name)
    expected = run(to_int8(model), x)
    assert not torch.equal(expected, run(build(name)[0], x))

    model, x = build(name)
    report = accel.patch(model)
    same(run(to_int8(model), x), expected)
    if name in ("vit", "llama"):
        assert not report.uncalled()
    else:
        assert all("not a plain parameter" in next(iter(row.fallbacks)) for row in report.rows)
    assert report.verify(x) < 1e-4
    accel.unpatch(model)
    same(run(model, x), expected)
