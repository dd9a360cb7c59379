"""Patching and taking back: what is chosen, what is left, what the report says, and all of it undone."""

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("transformers")

import torchvision.models.swin_transformer as tv
from _swin_models import build, gradients, tensor

import accel

# --- patching and taking back ---


def test_a_second_model_is_untouched():
    first, x = build("torchvision v1")
    second, _ = build("torchvision v1")
    expected = second.eval()(x)
    forward = tv.ShiftedWindowAttention.forward
    report = accel.patch(first)
    assert torch.equal(second(x), expected)
    assert tv.ShiftedWindowAttention.forward is forward
    assert len(report.uncalled()) == 4
    with pytest.raises(ValueError, match="nothing is patched in"):
        accel.patch(second, dry_run=True).verify(x)


def test_unpatch_restores_the_same_methods():
    model, _ = build("timm v1")
    before = [(vars(m).copy(), m.forward.__func__) for m in model.modules()]
    accel.patch(model)
    assert accel.unpatch(model) == [f"layers.{i}.blocks.{j}" for i in range(2) for j in range(2)]
    for module, (attributes, forward) in zip(model.modules(), before, strict=True):
        assert vars(module) == attributes
        assert module.forward.__func__ is forward
    assert accel.unpatch(model) == []


def test_patching_twice_changes_nothing_more():
    model, x = build("torchvision v1")
    first = accel.patch(model)
    second = accel.patch(model)
    assert [row.status for row in second.rows] == ["already patched"] * 4
    assert [a.replacement is b.replacement for a, b in zip(first.rows, second.rows, strict=True)] == [True] * 4
    model(x)
    assert [row.calls for row in second.rows] == [1] * 4
    assert "4 already patched" in str(second)


def test_context_manager_takes_back_what_it_put_in():
    model, x = build("torchvision v1")
    outer = accel.patch(model.features[1])
    report = accel.patch(model)
    assert [row.status for row in report.rows] == ["already patched"] * 2 + ["replaced"] * 2
    with pytest.raises(RuntimeError, match="3 channels"), report:
        model(x[:, :2])  # an error inside the block: the patch is taken back all the same
    assert [row.active for row in report.rows] == [True, True, False, False]
    assert all(row.active for row in outer.rows)
    with accel.patch(model) as report:
        model(x)
        assert not report.uncalled()
        accel.unpatch(model)
    assert not any(row.active for row in report.rows)


def test_leaving_the_block_refuses_when_something_covers_the_patch():
    model, _ = build("torchvision v1")
    attention = model.features[1][1].attn
    report = accel.patch(model)
    attention.forward = lambda x, old=attention.forward: old(x)
    with pytest.raises(RuntimeError, match=r"features\.1\.1\.attn\.forward"), report:
        pass


def test_dry_run_changes_nothing():
    model, _ = build("torchvision v1")
    before = [vars(m).copy() for m in model.modules()]
    report = accel.patch(model, dry_run=True)
    assert [row.status for row in report.replaced] == ["would be replaced"] * 4
    assert report.uncalled() == []
    assert [vars(m) for m in model.modules()] == before
    assert accel.patch(nn.Linear(2, 2), dry_run=True).rows == []


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("features.1", ["features.3.0.attn", "features.3.1.attn"]),
        (["*.1.attn"], ["features.1.0.attn", "features.3.0.attn"]),
        ([tv.PatchMerging, "features.[13].0"], ["features.1.1.attn", "features.3.1.attn"]),
    ],
)
def test_skip_leaves_modules_and_what_they_contain(skip, left):
    model, _ = build("torchvision v1")
    report = accel.patch(model, skip=skip, strict=True)
    assert [row.name for row in report.replaced] == left
    assert {row.reason for row in report.skipped} == {"named in skip"}
    with pytest.raises(ValueError, match="named in skip"):
        accel.patch(build("torchvision v1")[0], skip=tv.SwinTransformerBlock)


def test_nothing_to_replace_is_an_empty_report_where_that_is_allowed():
    report = accel.patch(nn.Linear(2, 2), allow_none=True)
    assert report.rows == []
    assert str(report).startswith("Linear: ")


def test_ops_and_recipes_choose():
    model, _ = build("torchvision v1")
    assert len(accel.patch(model, ops="window_attention").replaced) == 4
    assert len(accel.patch(model, ops=["window_attention"], recipe=None).replaced) == 4
    assert len(accel.patch(model, recipe="exact").replaced) == 4
    known = (
        "deform_conv2d",
        "flash_mix",
        "fp8_linear",
        "gau_attention",
        "linear_attention",
        "moe_experts",
        "moe_route",
        "ms_deform_attn",
        "softmax_attention",
        "window_attention",
    )
    with pytest.raises(ValueError, match="no op is switched on"):
        accel.patch(model, recipe=dict.fromkeys(known, False))
    with pytest.raises(ValueError, match=r"ShiftedWindowAttention .*: window_attention is not switched on"):
        accel.patch(model, recipe={"window_attention": False})
    with pytest.raises(ValueError, match="known: " + ", ".join(known)):
        accel.patch(model, ops=["softmax"])
    with pytest.raises(ValueError, match="unknown recipe 'fast'"):
        accel.patch(model, recipe="fast")
    with pytest.raises(ValueError, match="not both"):
        accel.patch(model, ops=["window_attention"], recipe="exact")


def test_what_changes_numerics_is_taken_only_when_named(monkeypatch):
    import dataclasses

    from accel.patches import TABLE

    target = "torchvision.models.swin_transformer.ShiftedWindowAttention"
    monkeypatch.setitem(TABLE, target, dataclasses.replace(TABLE[target], op="rounded", same_function=False))
    model, _ = build("torchvision v1")
    assert accel.patch(model, allow_none=True).rows == []
    assert len(accel.patch(model, ops="rounded", dry_run=True).replaced) == 4
    assert len(accel.patch(model, recipe={"rounded": True}, dry_run=True).replaced) == 4


def test_report_prints_a_table():
    model, x = build("torchvision v1")
    model.features[1][0].attn.qkv.register_forward_hook(lambda *a: None)
    report = accel.patch(model)
    with torch.no_grad():
        model(x)
    lines = str(report).splitlines()
    assert lines[0] == "SwinTransformer: 3 replaced, 1 skipped"
    assert lines[1].split() == ["module", "class", "op", "backend", "calls", "note"]
    assert lines[2].split(maxsplit=5)[5] == "skipped: qkv carries hooks"
    assert lines[3].split() == ["features.1.1.attn", "ShiftedWindowAttention", "window_attention", "reference", "1"]


def test_the_backend_shown_is_the_one_that_ran():
    model, x = build("torchvision v1")
    report = accel.patch(model.float())
    assert [row.backend for row in report.rows] == [None] * 4
    with accel.use(backend="reference"):
        model(x.float())
    assert [row.backend for row in report.rows] == ["reference"] * 4
    model(x.float())
    first = accel.explain(accel.window_attention, torch.zeros(1, 4, 4, 24), num_heads=2, window_size=(4, 4))
    chosen = next(line for line in first.splitlines() if line.startswith(" -> "))
    assert all(chosen.startswith(f" -> {row.backend}:") for row in report.rows)


def test_verify_sees_a_difference_and_nan():
    model, x = build("torchvision v1")
    report = accel.patch(model)
    row = report.rows[0]
    attend = row.replacement.attend
    row.replacement.attend = lambda *a, **k: attend(*a, **k) + 1
    assert report.verify(x) > 1e-3
    row.replacement.attend = lambda *a, **k: attend(*a, **k) * float("nan")
    assert report.verify(x) == float("inf")
    assert row.active


def test_compiled_model_is_one_graph_and_counts_as_called():
    model, x = build("Swin, wide")
    model.train()
    reference, expected = gradients(model, x)
    report = accel.patch(model)
    model.compile(fullgraph=True, backend="aot_eager")
    out, found = gradients(model, x)
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-11)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-10)
    assert not report.uncalled()
    assert all(row.calls == 0 and row.replacement.compiled for row in report.rows)
    assert str(report).count("compiled") == 2
    accel.unpatch(model)  # compiled code must not outlive the patch
    again, _ = gradients(model, x)
    torch.testing.assert_close(again, reference, rtol=0, atol=1e-11)
    assert not any(row.active for row in report.rows)


@pytest.mark.parametrize(
    ("name", "path", "arguments"),
    [
        ("torchvision v1", "features.1.1", ()),
        ("timm v1", "layers.0.blocks.1", ()),
        ("timm v2", "layers.0.blocks.1", ()),
        ("Swinv2", "encoder.layers.0.blocks.1", ((13, 11),)),
        ("Donut", "encoder.layers.0.blocks.1", ((13, 11),)),
    ],
)
def test_compiled_block_is_one_graph(name, path, arguments):
    block = build(name)[0].get_submodule(path)
    x = torch.randn(2, 13, 11, 8, dtype=torch.float64)
    x = (x.flatten(1, 2) if arguments else x).requires_grad_()
    expected = tensor(block(x, *arguments))
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    report = accel.patch(block)
    out = tensor(torch.compile(block, fullgraph=True, backend="aot_eager")(x, *arguments))
    (found,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(found, gradient, rtol=0, atol=1e-10)
    assert not report.uncalled()
