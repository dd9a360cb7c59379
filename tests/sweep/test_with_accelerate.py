"""accelerate's hooks and offload around patched models: none is lost, and no weights are read while they are away."""

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")

import accelerate
from _with_models import MODELS, build, run, same
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules

import accel

pytestmark = pytest.mark.slow


class Counting(ModelHook):
    def __init__(self):
        self.before = self.after = 0

    def pre_forward(self, module, *args, **kwargs):
        self.before += 1
        return args, kwargs

    def post_forward(self, module, output):
        self.after += 1
        return output


def patched_modules(model, report):
    return [model.get_submodule(row.name) for row in report.rows]


@pytest.mark.parametrize("name", MODELS)
def test_hooks_around_patched_modules(name):
    model, x = build(name)
    expected = run(model, x)
    report = accel.patch(model)
    hooks = []
    for module in patched_modules(model, report):
        hooks.append(Counting())
        add_hook_to_module(module, hooks[-1])
    same(run(model, x), expected)
    assert not report.uncalled()
    assert report.verify(x) < 1e-4
    assert [(hook.before, hook.after) for hook in hooks] == [(3, 3)] * len(hooks)
    if name in ("hf_swin", "vit"):  # where forward is what is replaced
        with pytest.raises(RuntimeError, match=r"forward \(now a partial\)"):
            accel.unpatch(model)
    remove_hook_from_submodules(model)
    assert accel.unpatch(model) == [row.name for row in report.rows]
    assert torch.equal(run(model, x), expected)
    assert [hook.before for hook in hooks] == [3] * len(hooks)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("order", ["patch first", "offload first"])
def test_offloaded_to_the_cpu(name, order):
    model, x = build(name)
    expected = run(model, x)
    if order == "patch first":
        report = accel.patch(model)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        report = accel.patch(model, allow_none=True)
    assert any(p.device.type == "meta" for p in model.parameters()), "the weights are away between calls"
    for _ in range(2):
        same(run(model, x), expected)
    if any(row.replacement is not None for row in report.rows):
        assert report.verify(x) < 1e-4
    assert any(p.device.type == "meta" for p in model.parameters())
    remove_hook_from_submodules(model)
    accel.unpatch(model)
    same(run(model, x), expected)
    assert accel.patch(model, strict=True).verify(x) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_dispatched_to_disk_and_cpu(name, tmp_path):
    model, x = build(name)
    expected = run(model, x)
    report = accel.patch(model)
    places = {child: "disk" if i % 2 else "cpu" for i, (child, _) in enumerate(model.named_children())}
    places |= {n: "cpu" for n, _ in model.named_parameters(recurse=False)}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    same(run(model, x), expected)
    assert report.verify(x) < 1e-4
    accelerate.hooks.remove_hook_from_submodules(model)
    accel.unpatch(model)
    same(run(model, x), expected)
