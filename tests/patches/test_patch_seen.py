"""What is said of attention that is not replaced."""

import importlib

import pytest
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("timm")

import timm
from _swin_models import build
from timm.models.cait import ClassAttn
from timm.models.xcit import XCA, Xcit

import accel
from accel.patches import TABLE
from accel.patches.unserved import UNSERVED

BLOCK = "timm.models.swin_transformer.SwinTransformerBlock"
CHANNELS = "its softmax is over channels, not over tokens"


class SwinTransformerBlok(nn.Module):
    pass


class MyAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = MyInnerAttn()


class MyInnerAttn(nn.Module):
    pass


def test_nothing_to_replace_names_the_attention_it_saw():
    with pytest.raises(ValueError, match=r"^nothing to replace in Sequential: no class in it looks like attention"):
        accel.patch(nn.Sequential(nn.Linear(2, 2)))
    model = nn.Sequential(MyAttention(), MyAttention(), XCA(8, 2), SwinTransformerBlok(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing to replace in Sequential") as error:
        accel.patch(model)
    here = __name__
    assert str(error.value).splitlines() == [
        "nothing to replace in Sequential: it holds",
        f"  {here}.MyInnerAttn (0.inner and 1 more): it is not known here",
        f"  timm.models.xcit.XCA (2): {CHANNELS}",
        f"  {here}.SwinTransformerBlok (3): it is not known here, as {BLOCK} is",
    ]
    with pytest.raises(ValueError, match=r"XCA \(the model\): its softmax"):
        accel.patch(XCA(8, 2))


def test_what_is_switched_off_is_said_to_be():
    for name, where in (
        ("torchvision v1", "swin_transformer.ShiftedWindowAttention (features.1.0.attn and 3 more)"),
        ("timm v1", "swin_transformer.SwinTransformerBlock (layers.0.blocks.0 and 3 more)"),
    ):
        with pytest.raises(ValueError, match="nothing to replace") as error:
            accel.patch(build(name)[0], recipe={"window_attention": False})
        assert f"{where}: window_attention is not switched on" in str(error.value)
        assert "not known" not in str(error.value)


def test_a_report_says_per_class_what_is_not_served():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), XCA(8, 2), XCA(8, 2), ClassAttn(8, 2))
    report = accel.patch(model, strict=True)
    assert [row.name for row in report.rows] == ["0"]
    assert report.unserved == [
        f"timm.models.xcit.XCA (1 and 1 more): {CHANNELS}",
        "timm.models.cait.ClassAttn (3): its class token alone asks, which is little work",
    ]
    assert str(report).splitlines()[-2:] == [f"not served: {sentence}" for sentence in report.unserved]
    report = accel.patch(model, skip=XCA)
    assert [sentence.partition(" ")[0] for sentence in report.unserved] == ["timm.models.cait.ClassAttn"]
    assert accel.patch(model, ops="window_attention", allow_none=True).unserved == []


def test_a_model_of_which_nothing_is_served():
    model = Xcit(img_size=16, patch_size=8, embed_dim=16, depth=2, cls_attn_layers=1, num_heads=2, num_classes=5)
    with pytest.raises(ValueError, match="nothing to replace in Xcit") as error:
        accel.patch(model)
    assert f"timm.models.xcit.XCA (blocks.0.attn and 1 more): {CHANNELS}" in str(error.value)
    assert "timm.models.cait.ClassAttn (cls_attn_blocks.0.attn): its class token alone asks" in str(error.value)
    report = accel.patch(model, allow_none=True)
    assert report.rows == []
    assert len(report.unserved) == 2


@pytest.mark.parametrize("target", UNSERVED)
def test_every_class_that_is_named_exists_and_is_served_by_nothing(target):
    assert target not in TABLE
    module, _, name = target.rpartition(".")
    found = getattr(importlib.import_module(module), name, None)
    assert found is not None, f"timm {timm.__version__} has no {target}"
    assert f"{found.__module__}.{found.__qualname__}" == target
