"""What others put around a patched module stays there, and what they put into it is seen."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("transformers")

from _copies import DUPLICATES
from _swin_models import build, tensor
from _wrappers import Quantized, add_hook, quantize, remove_hook
from torch.nn.modules import module as hooks

import accel
from accel.patches.entry import class_path, plain_class

NAME = "features.1.1.attn"


@pytest.fixture
def model():
    return build("torchvision v1")[0].eval()


@pytest.fixture
def x():
    return build("torchvision v1")[1]


def untouched(model):
    return not any("forward" in vars(m) or "__prepare_scriptable__" in vars(m) for m in model.modules())


# --- hooks as accelerate's, around a patched module ---


def test_unpatch_leaves_a_hook_and_raises(model, x):
    expected = model(x)
    report = accel.patch(model)
    seen = []
    attention = model.get_submodule(NAME)
    add_hook(attention, seen)
    with pytest.raises(RuntimeError, match=r"undo that first: features\.1\.1\.attn\.forward \(now a partial\)$"):
        accel.unpatch(model)
    assert not any(row.active for row in report.rows), "the three others are taken out"
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert seen == ["ShiftedWindowAttention"]
    assert report.rows[1].calls == 1
    remove_hook(attention)
    assert report.rows[1].active
    assert accel.unpatch(model) == [NAME]
    assert untouched(model)
    assert torch.equal(model(x), expected)


def test_verify_compares_under_the_hook(model, x):
    report = accel.patch(model)
    seen = []
    attention = model.get_submodule(NAME)
    add_hook(attention, seen)
    hooked = attention.forward
    assert report.verify(x) < 1e-12
    assert vars(attention)["forward"] is hooked
    assert len(seen) == 2
    assert [row.calls for row in report.rows] == [1] * 4
    replacement = report.rows[1].replacement
    attend = replacement.attend
    replacement.attend = lambda *a, **k: attend(*a, **k) + 1
    assert report.verify(x) > 1e-3, "the kernel under the hook is left out of the first run"


def test_what_covers_a_patch_without_a_trace_of_it_is_seen(model, x):
    attention = model.get_submodule(NAME)
    report = accel.patch(model)
    attention.forward = lambda x, old=attention.forward: old(x) + 1
    expected = model(x)
    with pytest.raises(RuntimeError, match=r"features\.1\.1\.attn\.forward \(now a function\)"):
        accel.unpatch(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert [row.status for row in accel.patch(model).rows] == ["replaced", "already patched", "replaced", "replaced"]
    del attention.forward
    accel.unpatch(model)
    assert untouched(model)
    assert not any(row.active for row in report.rows)


@pytest.mark.parametrize("duplicate", DUPLICATES[:1])
def test_a_copy_under_a_hook_stands_alone(duplicate, model, x):
    report = accel.patch(model)
    add_hook(model.get_submodule(NAME), [])
    twin = duplicate(model)
    expected = twin(x)
    assert [row.calls for row in report.rows] == [0] * 4
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(x), expected)
    remove_hook(twin.get_submodule(NAME))
    assert len(accel.unpatch(twin)) == 4


def test_a_module_that_is_hooked_already_names_the_order(model, x):
    attention = model.get_submodule(NAME)
    add_hook(attention, [])
    report = accel.patch(model)
    assert [row.reason for row in report.skipped] == [
        "its forward has been replaced by partial: patch before that is done"
    ]
    accel.unpatch(model)
    remove_hook(attention)
    for child in attention.children():
        add_hook(child, [])
        remove_hook(child)
    assert "forward" in vars(attention), "the class's own, bound, is what remains"
    report = accel.patch(model, strict=True)
    assert len(report.replaced) == 4
    assert report.verify(x) < 1e-12
    assert not report.uncalled()


# --- hooks for every module ---


@pytest.mark.parametrize(
    "register",
    [
        hooks.register_module_forward_hook,
        hooks.register_module_forward_pre_hook,
        hooks.register_module_full_backward_hook,
        hooks.register_module_full_backward_pre_hook,
    ],
)
def test_a_hook_for_all_modules_sees_every_child(register):
    model, x = build("timm v1")
    report = accel.patch(model)
    seen = set()
    handle = register(lambda module, *rest: seen.add(module) and None)
    try:
        model(x.requires_grad_()).sum().backward()
        assert len(accel.patch(build("timm v1")[0], allow_none=True).skipped) == 4
    finally:
        handle.remove()
    assert all(model.get_submodule(row.name).attn.qkv in seen for row in report.rows)
    reason = "a hook for all modules is registered, and would not see attn"
    assert [row.fallbacks for row in report.rows] == [{reason: 1}] * 4
    model(x)
    assert [row.calls for row in report.rows] == [1] * 4


def test_what_a_hook_for_all_modules_returns_counts():
    def doubled(module, args, out):
        return 2 * out if isinstance(module, nn.Linear) else None

    model, x = build("timm v1")
    model.eval()
    plain = model(x)
    handle = hooks.register_module_forward_hook(doubled)
    expected = model(x)
    handle.remove()
    assert not torch.allclose(expected, plain)
    accel.patch(model)
    handle = hooks.register_module_forward_hook(doubled)
    try:
        assert torch.equal(model(x), expected)
    finally:
        handle.remove()


# --- shallow copies ---


def shallow(module):
    """A copy with children of its own, as replicas are made."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    twin.qkv = nn.Linear(8, 24).double()
    return twin


def test_a_shallow_copy_computes_with_its_own_children(model):
    attention = model.get_submodule(NAME)
    report = accel.patch(attention)
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    twin = shallow(attention)
    own = type(attention).forward
    torch.testing.assert_close(twin(x), own(twin, x), rtol=0, atol=1e-12)
    torch.testing.assert_close(attention(x), own(attention, x), rtol=0, atol=1e-12)
    assert not torch.allclose(twin(x), attention(x))
    assert [row.calls for row in report.rows] == [2]
    rows = accel.patch(twin).rows
    assert [(row.status, row.calls) for row in rows] == [("already patched", 2)]
    assert rows[0].replacement.module is twin
    twin.register_forward_hook(lambda *given: None)  # called from another frame then
    twin(x)
    assert rows[0].calls == 3
    assert accel.unpatch(twin) == [""]
    assert report.rows[0].active
    assert torch.equal(twin(x), own(twin, x))


def test_a_shallow_copy_is_undone_alone(model):
    attention = model.get_submodule(NAME)
    report = accel.patch(attention)
    twin = shallow(attention)
    assert accel.unpatch(twin) == [""]
    assert untouched(twin)
    assert report.rows[0].active
    twin = shallow(attention)
    with accel.patch(twin) as second:
        assert [row.status for row in second.rows] == ["already patched"]
    assert accel.unpatch(attention) == [""]
    assert second.rows[0].active


def test_a_shallow_copy_that_was_patched_compiles(model):
    attention = model.get_submodule(NAME)
    accel.patch(attention)
    twin = shallow(attention)
    accel.patch(twin)
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    out = torch.compile(twin, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(out, type(twin).forward(twin, x), rtol=0, atol=1e-12)


# --- weights that are no plain tensors ---


@pytest.mark.parametrize(
    ("name", "path", "child"),
    [("Swin", "encoder.layers.0.blocks.1", "attention.k_proj"), ("torchvision v1", NAME, "proj")],
)
def test_a_quantized_weight_is_called_not_read(name, path, child):
    model, x = build(name)
    linear = model.eval().get_submodule(f"{path}.{child}")
    quantize(linear)
    expected = tensor(model(x))
    report = accel.patch(model)
    reason = f"weight of {child.rpartition('.')[2]} is a {class_path(Quantized)}, not a plain parameter"
    assert [(row.name, row.reason) for row in report.skipped] == [(path, reason)]
    torch.testing.assert_close(tensor(model(x)), expected, rtol=0, atol=1e-11)

    model, x = build(name)
    report = accel.patch(model.eval())
    quantize(model.get_submodule(f"{path}.{child}"))
    torch.testing.assert_close(tensor(model(x)), expected, rtol=0, atol=1e-11)
    assert [row.fallbacks for row in report.rows if row.name == path] == [{reason: 1}]


# --- classes that torch puts over a module's own ---


def test_a_parametrized_module_is_seen_through(model, x):
    attention = model.get_submodule(NAME)
    nn.utils.parametrize.register_parametrization(attention, "relative_position_bias_table", Twice())
    expected = model(x)
    report = accel.patch(model, strict=True)
    assert {row.old_class for row in report.rows} == {"ShiftedWindowAttention"}
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert [row.calls for row in report.rows] == [1] * 4
    accel.unpatch(model)
    assert torch.equal(model(x), expected)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def test_only_what_leaves_the_forward_alone_is_seen_through(monkeypatch):
    made = type("FSDPLinear", (nn.Linear,), {"__module__": "torch.distributed.fsdp._fully_shard._fully_shard"})
    assert plain_class(made) is nn.Linear
    made.forward = lambda self, x: x
    assert plain_class(made) is made
    assert plain_class(type("Linear2", (nn.Linear,), {})).__name__ == "Linear2"
    assert plain_class(nn.Linear) is nn.Linear


@pytest.fixture
def one_rank():
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this torch is built without torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_sharded_modules(x):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    expected = build("torchvision v1")[0].eval()(x)
    model = build("torchvision v1")[0].eval()
    report = accel.patch(model)
    for row in report.rows:
        fully_shard(model.get_submodule(row.name), mesh=mesh)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert [row.calls for row in report.rows] == [1] * 4

    model = build("torchvision v1")[0].eval()
    fully_shard(model.get_submodule(NAME), mesh=mesh)
    report = accel.patch(model)
    (row,) = report.skipped
    found = "a torch.distributed.tensor.DTensor, not a plain parameter"
    assert row.reason == f"weight of qkv is {found}: patch the model before it is sharded"
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
