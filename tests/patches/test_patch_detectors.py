"""Patching multi-scale deformable attention of transformers: whole detectors, every class alone, and that none is left.

Tiny random-weight models of the real classes, in float64 on the reference backend.
"""

import ast
import copy
import functools
import importlib
import types
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("transformers")

import transformers
from _detector_models import MODELS, PICTURE, build, floats, gradients, near, noise, randomize, rt_detr, same_outputs

import accel
from accel.patches import TABLE, transformers_deform
from accel.testing import assert_close

OP = "ms_deform_attn"
FOLDER = Path(transformers.__file__).parent / "models"
LAYER = "MultiScaleDeformableAttention"


# --- whole models ---


@pytest.mark.parametrize("name", MODELS)
def test_patched_model_computes_the_same(name):
    model, inputs, count = build(name)
    keys, types_ = list(model.state_dict()), [type(m) for m in model.modules()]
    reference, expected = gradients(model, inputs)
    report = accel.patch(model, ops=OP, strict=True)
    assert len(report.replaced) == count, str(report)
    found, grads = gradients(model, inputs)
    assert [(row.calls, row.fallbacks, row.backend) for row in report.rows] == [(1, {}, "reference")] * count
    same_outputs(found, reference)
    near(grads, expected, 1e-7)
    sampled = [n for n in expected if "sampling_offsets" in n]
    assert len(sampled) >= 2 * count
    assert all(expected[n].count_nonzero() > 0 for n in sampled)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == types_
    assert report.verify(**inputs) <= 1e-10

    assert len(accel.unpatch(model)) == count
    for a, b in zip(gradients(model, inputs)[0], reference, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["Deformable DETR", "RT-DETRv2", "D-FINE", "Mask2Former"])
def test_a_wrong_kernel_is_seen(name, monkeypatch):
    """The comparison above can fail: locations that are off by a thousandth of the map are noticed everywhere."""
    model, inputs, _ = build(name)
    report = accel.patch(model, ops=OP)
    for row in report.replaced:
        op = row.replacement.attend

        def wrong(value, shapes, starts, locations, *rest, op=op, **how):
            return op(value, shapes, starts, locations + 1e-3, *rest, **how)

        monkeypatch.setattr(row.replacement, "attend", wrong)
    assert report.verify(**inputs) > 1e-6


def test_all_that_a_detector_has_is_patched_together():
    model, inputs, _ = build("Deformable DETR")
    report = accel.patch(model)
    assert {row.op for row in report.rows} == {OP, "softmax_attention"}
    assert report.verify(**inputs) < 1e-6  # softmax is in float32 in some of the library's attention
    assert not report.uncalled()
    twin = copy.deepcopy(model)
    accel.unpatch(model)
    assert {row.status for row in accel.patch(twin).rows} == {"already patched"}


def test_a_copy_is_patched_and_stands_alone():
    model, inputs, count = build("RT-DETR")
    report = accel.patch(model, ops=OP)
    expected = floats(model(**inputs))
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    for a, b in zip(floats(twin(**inputs)), expected, strict=True):
        assert torch.equal(a, b)
    assert [row.calls for row in accel.patch(twin, ops=OP).rows] == [2] * count
    assert [row.calls for row in report.rows] == [1] * count


# --- every class alone ---

LEVELS = ((5, 4), (3, 2), (1, 7))
CONFIG = types.SimpleNamespace(
    d_model=32, num_feature_levels=3, decoder_n_levels=3, decoder_n_points=2, decoder_attention_heads=4,
    decoder_offset_scale=0.5, decoder_method="default", disable_custom_kernels=True,
)  # fmt: skip


def attention(target, **options):
    """The attention that ``target`` belongs to: the class itself, or the one that holds a layer of it."""
    module = importlib.import_module(target.rpartition(".")[0])
    config = types.SimpleNamespace(**{**vars(CONFIG), **options})
    (cls,) = {
        value
        for name, value in vars(module).items()
        if name.endswith("MultiscaleDeformableAttention") and value.__module__ == module.__name__
    }
    if "PixelDecoder" in cls.__name__:
        return randomize(cls(32, 4, 3, 2))
    if target.endswith(f".{LAYER}"):
        return randomize(cls(config, num_heads=4, n_points=2))
    return randomize(cls(config))


def call(width, levels=3, maps=LEVELS, **others):
    shapes = torch.tensor(maps)
    sizes = shapes[:, 0] * shapes[:, 1]
    return {
        "hidden_states": noise(2, 9, 32),
        "encoder_hidden_states": noise(2, int(sizes.sum()), 32, seed=1),
        "reference_points": noise(2, 9, levels, width, seed=2).sigmoid(),
        "spatial_shapes": shapes,
        "spatial_shapes_list": list(maps),
        "level_start_index": sizes.cumsum(0) - sizes,
        **others,
    }


ENTRIES = {e.target.removeprefix("transformers.models."): e.target for e in transformers_deform.ENTRIES}
EXTRAS = {"position_embeddings": noise(2, 9, 32, seed=3), "attention_mask": noise(2, 33, seed=4) > -1}


def calls_of(target):
    """What the class can be called with."""
    if any(name in target for name in ("d_fine", "deimv2")):
        return [call(4, 1)]
    if "rt_detr_v2" in target:
        return [call(4, 1), call(4, 1, **EXTRAS)]
    calls = [call(2), call(4), call(4, **EXTRAS)]
    if "mask2former" in target:
        for given in calls:
            del given["spatial_shapes"]
    return calls


def target_of(name):
    (target,) = [t for t in ENTRIES.values() if f".{name}." in t]
    return target


def to(dtype, given):
    """The arguments of a call with every floating tensor in ``dtype``."""
    return {n: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in given.items()}


def installed(target):
    if not (FOLDER / target.split(".")[2]).is_dir():
        pytest.skip(f"{target} is not in this version of transformers")
    return target


@pytest.mark.parametrize("target", ENTRIES.values(), ids=ENTRIES)
def test_every_attention_computes_the_same(target):
    attn = attention(installed(target))
    for given in calls_of(target):
        model = copy.deepcopy(attn)
        reference, expected = gradients(model, given)
        assert all(g.count_nonzero() > 0 for g in expected.values())
        report = accel.patch(model, strict=True)
        assert [row.old_class for row in report.replaced] == [target.rpartition(".")[2]]
        found, grads = gradients(model, given)
        assert [(row.calls, row.fallbacks) for row in report.rows] == [(1, {})]
        same_outputs(found, reference, 1e-12)
        near(grads, expected, 1e-11)


def test_fp32_within_the_tolerance_table():
    """The layer alone: projections before it would be rounded, and move the positions."""
    layer = attention(target_of("rt_detr")).attn
    value, at, weights = noise(2, 33, 4, 8), noise(2, 9, 4, 3, 2, 2, seed=1), noise(2, 9, 4, 3, 2, seed=2)
    value, at, weights = value.float(), at.sigmoid().float(), weights.sigmoid().float()
    exact = layer(value.double(), None, list(LEVELS), None, at.double(), weights.double(), 64)
    report = accel.patch(layer)
    found = layer(value, None, list(LEVELS), None, at, weights, 64)
    assert_close(found, exact, "sample", torch.float32)
    assert not report.uncalled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["deformable_detr", "oneformer", "d_fine", "rt_detr_v2"])
def test_rounding_is_no_worse_than_the_class(name, dtype):
    target = target_of(name)
    attn, given = attention(target).to(dtype), to(dtype, calls_of(target)[0])
    exact = copy.deepcopy(attn).double()(**to(torch.float64, given))[0]
    theirs = attn(**given)[0]
    accel.patch(attn, strict=True)
    found = attn(**given)[0]
    assert found.dtype == theirs.dtype == dtype
    assert (found - exact).norm() <= 1.5 * (theirs - exact).norm()


@pytest.mark.parametrize("name", ["deformable_detr", "mask2former", "d_fine", "rt_detr_v2"])
def test_compiled_attention_is_one_graph(name):
    target = target_of(name)
    attn, given = attention(target), calls_of(target)[0]
    reference, expected = gradients(attn, given)
    report = accel.patch(attn)
    attn.compile(fullgraph=True, backend="aot_eager")
    found, grads = gradients(attn, given)
    same_outputs(found, reference)
    near(grads, expected, 1e-9)
    assert not report.uncalled()


@torch.no_grad()
def test_two_graphs_serve_every_size():
    """As many as the class needs; sizes of levels come as integers."""
    attn = attention(target_of("d_fine")).float()
    accel.patch(attn, strict=True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(attn, backend=counter, dynamic=True)
    for grown in range(3):
        given = to(torch.float32, call(4, 1, [(height + grown, width + 2 * grown) for height, width in LEVELS]))
        same_outputs(floats(compiled(**given)), floats(attn(**given)))
    torch._dynamo.reset()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", MODELS)
def test_dtypes_under_autocast_are_those_of_the_class(name):
    model, inputs, _ = build(name)
    model, inputs = model.float(), to(torch.float32, inputs)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = [x.dtype for x in floats(model(**inputs))]
        accel.patch(model, ops=OP)
        assert [x.dtype for x in floats(model(**inputs))] == expected


@pytest.mark.parametrize("name", ["d_fine", "deimv2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_dtype_of_a_sum_that_no_projection_follows(name, dtype):
    target = target_of(name)
    attn, given = attention(installed(target)).float(), to(dtype, calls_of(target)[0])
    with torch.autocast("cpu", torch.bfloat16):
        expected = [x.dtype for x in attn(**given)]
        accel.patch(attn, strict=True)
        assert [x.dtype for x in attn(**given)] == expected


def test_checkpointing_recomputes():
    target = target_of("rt_detr_v2")
    attn, given = attention(target), call(4, 1)
    reference, expected = gradients(attn, given)
    report = accel.patch(attn)
    attn.zero_grad()
    given = {**given, "hidden_states": given["hidden_states"].clone().requires_grad_()}
    out = torch.utils.checkpoint.checkpoint(attn, **given, use_reentrant=False)
    sum((x * noise(*x.shape, seed=9)).mean() for x in out).backward()
    same_outputs(out, reference)
    near({n: p.grad for n, p in attn.named_parameters()}, expected, 1e-10)
    assert [row.calls for row in report.rows] == [2]


def test_hooks_of_the_projections_run():
    attn, given = attention(target_of("rt_detr_v2")), call(4, 1)
    seen = []
    for name, child in attn.named_children():
        child.register_forward_hook(lambda m, args, out, name=name: seen.append(name) or 1.5 * out)
    expected = attn(**given)
    accel.patch(attn)
    found = attn(**given)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert sorted(seen) == sorted(["sampling_offsets", "attention_weights", "value_proj", "output_proj"] * 2)


@pytest.mark.parametrize("name", ["deformable_detr", "rt_detr", "rt_detr_v2", "d_fine", "deimv2"])
def test_keywords_on_their_way_through_a_detector_are_passed_over(name):
    target = target_of(name)
    attn, given = attention(target), calls_of(target)[0]
    expected = attn(**given)[0]
    report = accel.patch(attn, strict=True)
    found = attn(**given, token_type_ids=torch.ones(2, 9), output_hidden_states=True)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert [(row.calls, row.fallbacks) for row in report.rows] == [(1, {})]


# --- what is left to the class ---

DISCRETE = "its sampling method is 'discrete', which is not bilinear"


@pytest.mark.parametrize(("name", "attribute"), [("rt_detr_v2", "method"), ("d_fine", "decoder_method")])
def test_discrete_sampling_is_left_to_the_class(name, attribute):
    target = target_of(name)
    with pytest.raises(ValueError, match="which is not bilinear"):
        accel.patch(attention(target, decoder_method="discrete"), ops=OP)
    attn, given = attention(target), call(4, 1)
    report = accel.patch(attn)
    setattr(attn, attribute, "discrete")
    found = attn(**given)[0]
    assert [(row.calls, row.fallbacks) for row in report.rows] == [(0, {DISCRETE: 1})]
    accel.unpatch(attn)
    assert torch.equal(found, attn(**given)[0])


def test_discrete_detector_is_reported_and_works():
    model = randomize(rt_detr("RTDetrV2", decoder_method="discrete"))
    report = accel.patch(model)
    assert [row.reason for row in report.rows if row.op == OP] == [DISCRETE] * 2
    model(**PICTURE)


def test_reference_points_that_the_class_reads_otherwise(caplog):
    for name, width, reason in (
        ("rt_detr_v2", 2, "its reference points have 2 coordinates"),
        ("mask2former", 3, "its reference points have 3 coordinates"),
        ("d_fine", 3, "its reference points have 3 coordinates"),
    ):
        target = target_of(name)
        attn = attention(target)
        report = accel.patch(attn)
        given = calls_of(target)[0]
        given["reference_points"] = noise(*given["reference_points"].shape[:-1], width).sigmoid()
        with pytest.raises((ValueError, RuntimeError)):
            attn(**given)
        assert report.rows[0].fallbacks == {reason: 1}, name
        assert reason in caplog.text


def test_a_mask_for_d_fine_is_the_classs_affair():
    target = target_of("d_fine")
    attn = attention(target)
    report = accel.patch(attn)
    with pytest.raises(RuntimeError, match="must match"):
        attn(**call(4, 1, attention_mask=EXTRAS["attention_mask"]))
    assert report.rows[0].fallbacks == {"an attention mask is given, which the class holds against heads": 1}


@pytest.mark.parametrize("name", ["mask2former", "oneformer", "rt_detr_v2"])
def test_a_function_that_someone_replaced_is_not_bypassed(name, monkeypatch):
    target = target_of(name)
    attn, given = attention(target), calls_of(target)[0]
    report = accel.patch(attn)
    module = importlib.import_module(target.rpartition(".")[0])
    (function,) = [f for f in vars(module) if f.startswith("multi_scale_deformable_attention")]
    old = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *a: 2 * old(*a))
    attn(**given)
    reason = f"{function} is not the function of its own module any more"
    assert [(row.calls, row.fallbacks) for row in report.rows] == [(0, {reason: 1})]


def test_a_core_that_someone_replaced_is_not_bypassed():
    target = target_of("d_fine")
    attn = attention(target)
    old = attn.ms_deformable_attn_core
    attn.ms_deformable_attn_core = lambda *a: 2 * old(*a)
    with pytest.raises(ValueError, match="is not the function of its own module"):
        accel.patch(attn)


def test_a_layer_that_was_given_a_kernel_is_skipped():
    """kernelize of Hugging Face's kernels sets forward on the instance."""
    attn = attention(target_of("rt_detr"))
    attn.attn.forward = types.MethodType(lambda self, *given: None, attn.attn)
    with pytest.raises(ValueError, match="its forward has been replaced by method"):
        accel.patch(attn)


# --- none is left ---

LEFT_OUT: dict[str, str] = {}
"""Classes and functions of transformers' models that are not patched, each with its reason."""


def is_sampling(node):
    """Whether a class or function is multi-scale deformable attention, by its name, its mark or its arguments."""
    if "multiscaledeform" in node.name.replace("_", "").lower():
        return True
    marks = {x.value for d in node.decorator_list for x in ast.walk(d) if isinstance(x, ast.Constant)}
    arguments = {x.arg for x in ast.walk(node) if isinstance(x, ast.arg)}
    called = {x.attr for x in ast.walk(node) if isinstance(x, ast.Attribute)}
    return LAYER in marks or ("sampling_locations" in arguments and "grid_sample" in called)


def read_by(node):
    return {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}


@functools.cache
def definitions():
    """Of every model with anything deformable: its module, and of each class and function in it the name, whether it
    is a class, whether it is deformable attention, and the names it reads."""
    found = []
    for path in sorted(FOLDER.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "deform" not in text.lower() and "sampling_locations" not in text:
            continue
        nodes = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
        facts = [(n.name, isinstance(n, ast.ClassDef), is_sampling(n), read_by(n)) for n in nodes]
        found.append((f"transformers.models.{path.parent.name}.{path.stem}", facts))
    return found


def unknown(table):
    """What computes multi-scale deformable attention in the installed models and is neither patched nor explained.

    Known are also the functions that a patched class reads, and the classes that hold one.
    """
    left = []
    for module, facts in definitions():
        patched = {name: names for name, _, _, names in facts if f"{module}.{name}" in table}
        covered = {name for name, is_class, *_ in facts if not is_class} & set().union(*patched.values())
        for name, is_class, sampling, names in facts:
            known = name in patched or name in covered or (is_class and names & patched.keys())
            if sampling and not known and f"{module}.{name}" not in LEFT_OUT:
                left.append(f"{module}.{name}")
    return left


def test_no_multi_scale_deformable_attention_of_transformers_is_left():
    assert unknown(TABLE) == []


@pytest.mark.parametrize("target", ENTRIES.values(), ids=ENTRIES)
def test_one_that_is_left_would_be_found(target):
    found = unknown({t: e for t, e in TABLE.items() if t != installed(target)})
    assert target in found
    module, _, name = target.rpartition(".")
    assert getattr(importlib.import_module(module), name).__module__ == module
