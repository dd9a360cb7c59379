"""Patching deformable convolution: torchvision's module and function, mmcv's layers; and one that learns digits."""

import copy
import math
import pickle
import sys
import types

import _mmcv
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torchvision")

import torchvision
from _deform_models import MODELS, Given, attention_inputs, build, everything, gradients, near, noise, randomize
from torchvision.ops import deform_conv as tv

import accel
from accel.patches import FUNCTIONS
from accel.testing import assert_close

TARGET = "torchvision.ops.deform_conv.deform_conv2d"
HAS_OPERATOR = torchvision.extension._has_ops()  # false where it is a build for another torch


@pytest.fixture(autouse=True)
def theirs(monkeypatch):
    """torchvision's function where its operator does not load, so that an unpatched model has something to compare."""
    if not HAS_OPERATOR:
        monkeypatch.setattr(tv, "deform_conv2d", _mmcv.convolve)


@pytest.fixture
def own_function(theirs, monkeypatch):
    """The function that torchvision ships, whatever it can do here, and no other library's."""
    monkeypatch.setattr(sys.modules["accel.patch_functions"], "FUNCTIONS", {TARGET: FUNCTIONS[TARGET]})
    monkeypatch.setattr(tv, "deform_conv2d", torchvision.ops.deform_conv2d)


# --- the same function ---


@pytest.mark.parametrize("name", MODELS)
def test_patched_model_computes_the_same(name):
    model, inputs = build(name)
    keys, types_ = list(model.state_dict()), [type(m) for m in model.modules()]
    reference, expected = gradients(model, inputs)
    assert all(g.count_nonzero() > 0 for g in expected.values())
    count = 2 if name == "mmcv v1 pack" else 1
    report = accel.patch(model, strict=True)
    assert len(report.replaced) == count, str(report)
    out, found = gradients(model, inputs)
    assert [(row.calls, row.fallbacks, row.backend) for row in report.rows] == [(1, {}, "reference")] * count
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-12 * max(1.0, float(reference.abs().max())))
    near(found, expected, 1e-11)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == types_
    assert report.verify(*inputs) <= 1e-12

    assert len(accel.unpatch(model)) == count
    assert torch.equal(gradients(model, inputs)[0], reference)


LAYERS = {
    "torchvision": (lambda: tv.DeformConv2d(8, 12, 3, padding=1), everything),
    "mmcv v1": MODELS["mmcv v1"],
    "mmcv v2": MODELS["mmcv v2"],
}


@pytest.mark.parametrize("name", LAYERS)
def test_fp32_within_the_tolerance_table(name):
    make, inputs = LAYERS[name]
    model, inputs = randomize(make()).float(), [x.float() for x in inputs()]
    expected = copy.deepcopy(model).double()(*[x.double() for x in inputs])
    report = accel.patch(model)
    assert_close(model(*inputs), expected, "deform_conv", torch.float32, name)
    assert [(row.calls, row.fallbacks) for row in report.rows] == [(1, {})]


@pytest.mark.parametrize("name", ["torchvision v2", "mmcv v1", "mmcv v2 pack", "mmcv attention"])
def test_a_wrong_kernel_is_seen(name, monkeypatch):
    """The comparison above can fail: positions that are off by a hundredth are noticed everywhere."""
    model, inputs = build(name)
    report = accel.patch(model)
    where = 3 if name == "mmcv attention" else 1  # of offsets or locations
    for row in report.replaced:
        op = row.replacement.attend

        def wrong(*a, op=op, **how):
            return op(*a[:where], a[where] + 0.01, *a[where + 1 :], **how)

        monkeypatch.setattr(row.replacement, "attend", wrong)
    assert report.verify(*inputs) > 1e-6


@pytest.mark.parametrize("name", ["torchvision v2", "mmcv v2 pack"])
def test_a_copy_is_patched_and_stands_alone(name):
    model, inputs = build(name)
    report = accel.patch(model)
    expected = model(*inputs)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(*inputs), expected)
    assert [row.calls for row in report.rows] == [1]
    assert [row.calls for row in accel.patch(twin).rows] == [2]


def test_a_pickle_is_patched():
    model, inputs = build("torchvision v2")
    accel.patch(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(*inputs), model(*inputs))
    assert [(row.status, row.calls) for row in accel.patch(twin).rows] == [("already patched", 1)]


def test_parameters_and_attributes_are_read_at_the_time_of_the_call():
    model, inputs = build("torchvision v2")
    report = accel.patch(model)
    model.conv.weight = nn.Parameter(2 * model.conv.weight.detach())
    model.conv.bias = None
    assert report.verify(*inputs) < 1e-12
    model.conv.stride, model.offset.stride, model.mask.stride = [(2, 2)] * 3
    assert report.verify(*inputs) < 1e-12


def test_batches_of_any_size():
    """torchvision and mmcv cut batches into steps that must divide them."""
    for name in ("torchvision v2", "mmcv v2 pack"):
        model, _ = build(name)
        accel.patch(model)
        assert model(noise(0, 8, 7, 6)).shape == (0, 12, *((5, 4) if "pack" in name else (7, 6)))
        x = noise(37, 8, 7, 6)
        torch.testing.assert_close(model(x)[5:6], model(x[5:6]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["torchvision v2", "mmcv v2 pack"])
def test_compiled_module_is_one_graph(name):
    model, inputs = build(name)
    reference, expected = gradients(model, inputs)
    report = accel.patch(model)
    model.compile(fullgraph=True, backend="aot_eager")
    out, found = gradients(model, inputs)
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-11)
    near(found, expected, 1e-10)
    assert not report.uncalled()


def test_under_autocast_it_stays_in_half():
    model, inputs = build("torchvision v2")
    with torch.no_grad():
        expected = model(*inputs)
        accel.patch(model.float())
        with torch.autocast("cpu", torch.bfloat16):
            out = model(inputs[0].float())
    assert out.dtype == torch.bfloat16
    assert float((out.double() - expected).norm() / expected.norm()) < 0.05


# --- what is not bypassed ---


class Louder(tv.DeformConv2d):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


def test_subclasses_are_skipped_and_parametrizations_seen_through():
    model, inputs = build("torchvision v2")
    model.conv.__class__ = Louder
    expected = model(*inputs)
    report = accel.patch(model, allow_none=True)
    assert [row.reason for row in report.rows] == [
        "it is a subclass of torchvision.ops.deform_conv.DeformConv2d, which may compute something else"
    ]
    assert torch.equal(model(*inputs), expected)

    model, inputs = build("torchvision v2")
    nn.utils.parametrizations.weight_norm(model.conv)
    reference, expected = gradients(model, inputs)
    report = accel.patch(model, strict=True)
    out, found = gradients(model, inputs)
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-12)
    near(found, expected, 1e-11)
    assert [(row.old_class, row.calls) for row in report.rows] == [("DeformConv2d", 1)]

    model, inputs = build("mmcv v2 pack")
    model[0].forward = lambda x, old=model[0].forward: old(x) + 1
    with pytest.raises(ValueError, match="its forward has been replaced by function"):
        accel.patch(model)


def test_hooks_of_the_module_and_its_predictor_run():
    seen = []
    for name, path in (("torchvision v2", "conv"), ("mmcv v2 pack", "0"), ("mmcv v2 pack", "0.conv_offset")):
        model, inputs = build(name)
        model.get_submodule(path).register_forward_hook(lambda m, args, out, path=path: seen.append(path) or 2 * out)
        expected = model(*inputs)
        report = accel.patch(model)
        torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=1e-12)
        assert not report.uncalled()
    assert seen == ["conv"] * 2 + ["0"] * 2 + ["0.conv_offset"] * 2


def recorded(input, *args, **kwargs):
    if not isinstance(input, torch.fx.Proxy):
        return _mmcv.convolve(input, *args, **kwargs)
    return input.tracer.create_proxy("call_function", _mmcv.convolve, (input, *args), kwargs)


def test_fx_tracing_sees_the_class(monkeypatch):
    model, inputs = build("torchvision v1")
    expected = model(*inputs)
    monkeypatch.setattr(tv, "deform_conv2d", recorded)
    report = accel.patch(model)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(*inputs), expected, rtol=0, atol=1e-12)  # torchvision's own where it loads
    (reason,) = report.rows[0].fallbacks
    assert "writes down the code of DeformConv2d, so the traced model has no kernel there" in reason


def test_offsets_for_other_groups_are_the_classs_affair():
    model, (x, offset) = build("mmcv v1")
    report = accel.patch(model)
    with pytest.raises(RuntimeError, match="18 is not 36"):
        model(x, offset[:, :18])
    assert report.rows[0].fallbacks == {"its offset has 18 channels, not 36": 1}
    attn = randomize(_mmcv.MultiScaleDeformableAttention())
    report = accel.patch(attn)
    query, given = attention_inputs(3)
    with pytest.raises(ValueError, match="reference_points of 3"):
        attn(query, **given)
    assert report.rows[0].fallbacks == {"its reference points have 3 coordinates": 1}


def test_a_map_lower_than_the_kernel_has_no_output_in_mmcv():
    """Where the op alone would refuse: the class pads map and offsets, and cuts off as many rows of the output."""
    model = randomize(Given(_mmcv.DeformConv2d))
    model.conv.padding = (0, 0)
    given = noise(2, 8, 2, 5), noise(2, 36, 0, 3)
    assert model(*given).shape == (2, 12, 0, 3)
    report = accel.patch(model)
    assert model(*given).shape == (2, 12, 0, 3)
    assert [(row.calls, row.fallbacks) for row in report.rows] == [(1, {})]


def test_mmcv_computes_in_the_dtype_of_the_offsets():
    model, (x, offset) = build("mmcv v1")
    model.float()
    expected = model(x, offset.float())
    accel.patch(model)
    found = model(x, offset.float())
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_dropout_and_layouts_of_mmcvs_attention():
    query, given = attention_inputs(2)
    batched = {**given, "value": given["value"].transpose(0, 1)}
    attn = randomize(_mmcv.MultiScaleDeformableAttention(batch_first=True))
    report = accel.patch(attn)
    assert report.verify(query.transpose(0, 1), **batched) < 1e-12
    attn = randomize(_mmcv.MultiScaleDeformableAttention(dropout=0.5))
    report = accel.patch(attn)
    assert report.verify(query, **given) < 1e-12
    assert not torch.equal(attn.train()(query, **given), attn(query, **given))
    torch.testing.assert_close(
        attn.eval()(query, residual=query + 1, **given), attn(query, identity=query + 1, **given), rtol=0, atol=0
    )
    assert report.rows[0].fallbacks == {}


# --- the function, for the whole process ---


@pytest.fixture
def user(monkeypatch):
    """A module that imported the function by its name, and once under another."""
    module = types.ModuleType("user_of_deform_conv2d")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec("from torchvision.ops import deform_conv2d\nfrom torchvision.ops import deform_conv2d as other", vars(module))
    return module


def arguments():
    return {
        "input": noise(2, 8, 7, 6),
        "offset": noise(2, 18, 7, 6, seed=1),
        "weight": noise(12, 4, 3, 3, seed=2),
        "bias": noise(12, seed=3),
        "padding": (1, 1),
        "mask": noise(2, 9, 7, 6, seed=4),
    }


@pytest.mark.usefixtures("own_function")
def test_the_function_is_replaced_and_restored(user):
    original = torchvision.ops.deform_conv2d
    given = arguments()
    expected = _mmcv.convolve(**given)
    if not HAS_OPERATOR:
        with pytest.raises(RuntimeError, match="custom C\\+\\+ ops"):
            original(**given)
    report = accel.patch_functions()
    for function in (torchvision.ops.deform_conv2d, tv.deform_conv2d, user.deform_conv2d):
        assert function is not original
        assert function.__name__ == "deform_conv2d"
        torch.testing.assert_close(function(**given), expected, rtol=0, atol=1e-12)
    assert user.other is original
    from torchvision.ops import deform_conv2d  # imported later

    positional = [given[name] for name in ("input", "offset", "weight", "bias")]
    out = deform_conv2d(*positional, 1, given["padding"], mask=given["mask"])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert [(row.calls, row.fallbacks, row.backend) for row in report.rows] == [(4, {}, "reference")]
    lines = str(report).splitlines()
    assert lines[0] == "functions: 1 replaced"
    assert lines[2].split() == [TARGET, "function", "deform_conv2d", "reference", "4"]

    assert accel.unpatch_functions() == [TARGET]
    assert torchvision.ops.deform_conv2d is tv.deform_conv2d is user.deform_conv2d is original
    assert accel.unpatch_functions() == []
    assert not any(row.active for row in report.rows)


@pytest.mark.usefixtures("own_function")
def test_unpatched_modules_call_the_replaced_function():
    model, inputs = build("torchvision v2")
    with accel.patch_functions() as report:
        expected = model(*inputs)
        assert [row.calls for row in report.rows] == [1]
        accel.patch(model)
        torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=0)
        assert [row.calls for row in report.rows] == [1]  # the module has a replacement of its own
    assert tv.deform_conv2d is torchvision.ops.deform_conv2d
    assert not report.replaced[0].active


@pytest.mark.usefixtures("own_function")
def test_the_innermost_call_that_put_it_in_takes_it_out():
    original = tv.deform_conv2d
    with accel.patch_functions() as outer:
        replaced = tv.deform_conv2d
        with accel.patch_functions() as inner:
            assert [row.status for row in inner.rows] == ["already patched"]
            assert inner.uncalled() == [TARGET]
        assert tv.deform_conv2d is replaced
        accel.unpatch_functions()
        assert tv.deform_conv2d is original
        again = accel.patch_functions()
    assert again.rows[0].active, "what was put in by another call is left there"
    assert not outer.rows[0].active
    accel.unpatch_functions()
    assert tv.deform_conv2d is original


@pytest.mark.usefixtures("own_function")
def test_undo_refuses_when_something_covers_the_function():
    original = tv.deform_conv2d
    accel.patch_functions()
    replaced, tv.deform_conv2d = tv.deform_conv2d, _mmcv.convolve
    with pytest.raises(RuntimeError, match=TARGET):
        accel.unpatch_functions()
    with pytest.raises(ValueError, match="it has been replaced by <function convolve"):
        accel.patch_functions()
    tv.deform_conv2d = replaced
    accel.unpatch_functions()
    assert torchvision.ops.deform_conv2d is tv.deform_conv2d is original


@pytest.mark.usefixtures("own_function")
def test_calls_that_go_to_the_original_are_counted():
    given = arguments()
    with accel.patch_functions() as report:
        for call in ({**given, "input": "x"}, {**given, "spacing": 1}):
            with pytest.raises((TypeError, RuntimeError, AttributeError)):
                torchvision.ops.deform_conv2d(**call)
        torchvision.ops.deform_conv2d(**given)
    names = "input, offset, weight, bias, stride, padding, dilation, mask"
    assert report.rows[0].fallbacks == {
        "its input is a str, not a tensor": 1,
        f"it is not called with its arguments, {names}": 1,
    }
    assert "1 calls not served: its input is a str" in str(report)
    assert report.rows[0].calls == 1


@pytest.mark.usefixtures("own_function")
def test_the_function_compiles_in_one_graph():
    given = arguments()
    expected = _mmcv.convolve(**given)

    def call(**given):
        return torchvision.ops.deform_conv2d(**given)

    with accel.patch_functions() as report:
        found = torch.compile(call, fullgraph=True, backend="aot_eager")(**given)
        assert not report.uncalled()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("own_function")
def test_functions_of_libraries_that_are_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, tv.__name__)
    with pytest.raises(ValueError, match=f"{TARGET}: torchvision.ops.deform_conv is not imported"):
        accel.patch_functions()


# --- a classifier of digits ---


def classifier(deformable):
    second = accel.nn.ModulatedDeformConv2d if deformable else nn.Conv2d
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), second(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def accuracy(deformable, x, y, held, seed, steps=300):
    torch.manual_seed(seed)
    model = classifier(deformable)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(seed)
    x_train, y_train = x[~held], y[~held]
    for _ in range(steps):
        pick = torch.randint(len(x_train), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x_train[pick]), y_train[pick]).backward()
        optimizer.step()
    with torch.no_grad():
        right = (model.eval()(x[held]).argmax(1) == y[held]).double().mean()
    return float(right), model


def test_a_deformable_classifier_learns_digits_as_well_as_a_plain_one():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.from_numpy(data.images).float().div(8).sub(1)[:, None], torch.from_numpy(data.target)
    held = torch.arange(len(x)) % 5 == 0
    plain, _ = accuracy(False, x, y, held, seed=0)
    found, model = accuracy(True, x, y, held, seed=0)
    noise = math.sqrt(2 * plain * (1 - plain) / int(held.sum()))  # one standard deviation of a difference
    assert found >= plain - noise, f"{found=}, {plain=}, {noise=}"
    assert found > 0.9
    assert model[2].conv_offset.weight.abs().max() > 0.01, "the offsets were not trained"
