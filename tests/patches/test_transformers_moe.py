"""Whole mixtures of experts, by name and patched: logits, every gradient, generation, and what is put around them."""

import contextlib

import pytest
import torch

pytest.importorskip("transformers")

from _moe_models import INPUTS, MODELS, build
from _transformers_models import (
    IDS,
    LEFT,
    RIGHT,
    assert_same,
    assert_same_gradients,
    checkpointing,
    gradients,
    outputs,
    text,
)

import accel
from accel import dispatch, testing
from accel.ops.moe import moe_experts, moe_route
from accel.patches import transformers_routers

pytestmark = pytest.mark.skipif(
    dispatch.leaf_reason("accel._C") is not None, reason="without a kernel transformers' own functions run"
)
WAYS = ("by name", "patched")


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    """Tests have no more."""
    monkeypatch.setattr(transformers_routers, "LEAST", 0)


@contextlib.contextmanager
def served(model, way):
    """``model`` with our experts, and with our routers if it is patched; as it was at the end."""
    if way == "by name":
        model.set_experts_implementation("accel")
        yield None
        model.set_experts_implementation("eager")
    else:
        with accel.patch(model) as report:
            yield report


@contextlib.contextmanager
def counted(layers, way, passes=("forward",)):
    """Each layer's experts are one call of the op, and so is its router where it is patched."""
    with testing.watch(moe_experts.OP) as experts, testing.watch(moe_route.OP) as routers:
        yield
    for of_op, ran in (("experts", experts), ("routers", routers)):
        wanted = layers if of_op == "experts" or way == "patched" else 0
        assert sorted(ran) == sorted([("cpu", p) for p in passes] * wanted), of_op


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, way):
    model, layers = build(name), MODELS[name][1]
    keys = list(model.state_dict())
    for inputs in INPUTS.values():
        expected, expected_gradients = gradients(model, inputs)
        with served(model, way) as report, counted(layers, way, ("forward", "backward")):
            found, found_gradients = gradients(model, inputs)
        assert_same(found, expected)
        assert_same_gradients(found_gradients, expected_gradients)
        if report is not None:
            assert not report.uncalled()
            assert not report.skipped
            assert not any(row.fallbacks for row in report.rows), str(report)
            assert [row.op for row in report.rows].count("moe_experts") == layers
    assert any(key.endswith("gate_up_proj") for key in expected_gradients)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), expected, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache(name, way):
    model, layers = build(name), MODELS[name][1]
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**text(LEFT), **how)
    with served(model, way), counted(5 * layers, way):
        assert torch.equal(model.generate(**text(LEFT), **how), want)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing(name, way):
    model, layers = build(name), MODELS[name][1]
    expected, expected_gradients = gradients(model, INPUTS["left"])
    for reentrant in (False, True):
        model.train()
        checkpointing(model, {"use_reentrant": reentrant})
        with served(model, way), counted(layers, way, ("forward", "forward", "backward")):
            found, found_gradients = gradients(model, INPUTS["left"])
        assert_same(found, expected)
        assert_same_gradients(found_gradients, expected_gradients)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_autocast(name, way):
    """As far from float32 as eager under autocast is, or nearer; the parameters keep float32 gradients."""
    model, layers = build(name), MODELS[name][1]
    exact, exact_gradients = gradients(model, INPUTS["right"])

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(model, INPUTS["right"])

    def distance(found, found_gradients):
        logits = float((found[0].float() - exact[0]).norm() / exact[0].norm())
        parts = [float((g - exact_gradients[n]).norm()) ** 2 for n, g in found_gradients.items()]
        return logits, (sum(parts) / sum(float(g.norm()) ** 2 for g in exact_gradients.values())) ** 0.5

    expected = run()
    with served(model, way), counted(layers, way, ("forward", "backward")):
        found = run()
    assert [x.dtype for x in found[0]] == [x.dtype for x in expected[0]]
    assert {n: g.dtype for n, g in found[1].items()} == {n: g.dtype for n, g in expected[1].items()}
    for ours, eager in zip(distance(*found), distance(*expected), strict=True):
        assert ours <= 1.25 * eager + 1e-3, (ours, eager)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_compiled(name, way):
    """In one graph, as eager's loop over experts is not; forward and backward."""
    model = build(name)
    expected, expected_gradients = gradients(model, INPUTS["left"])
    torch._dynamo.reset()
    with served(model, way):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out = compiled(**INPUTS["left"], use_cache=False).logits
        values = out[LEFT.bool()]
        generator = torch.Generator().manual_seed(9)
        model.zero_grad()
        (values * torch.randn(values.shape, generator=generator)).sum().backward()
    torch._dynamo.reset()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same([values.detach()], expected)
    assert_same_gradients(found, expected_gradients)


def test_router_logits_are_collected_and_balanced():
    """The hooks that collect them, and the loss that is made of them."""
    for name in ("Mixtral", "Qwen3-MoE"):
        model = build(name)
        how = {**text(RIGHT), "labels": IDS, "output_router_logits": True}
        want = model(**how)
        with served(model, "patched"), counted(MODELS[name][1], "patched"):
            got = model(**how)
        assert len(got.router_logits) == len(want.router_logits) == MODELS[name][1]
        assert_same(got.router_logits, want.router_logits)
        assert_same([got.loss, got.aux_loss], [want.loss, want.aux_loss])


def test_what_is_asked_for_by_name_is_left():
    model = build("Mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.config._experts_implementation = "sonicmoe"
    report = accel.patch(model)
    reasons = {row.reason for row in report.skipped}
    assert reasons == {"its experts are set to 'sonicmoe', not to eager, batched_mm, grouped_mm or accel"}
    assert {row.op for row in report.replaced} == {"softmax_attention", "moe_route"}


def test_one_op_alone():
    model = build("GPT-OSS")
    assert {row.op for row in accel.patch(model, ops="moe_experts").rows} == {"moe_experts"}
    assert {row.op for row in accel.patch(model, ops="moe_route").rows} == {"moe_route"}
    assert len(accel.unpatch(model)) == 4
    assert not any(vars(m).get("forward") for m in model.modules())


def test_a_wrong_choice_is_seen(monkeypatch):
    """The comparison above can fail: weights that belong to other experts are another model."""
    from accel.patches import transformers_experts

    original = transformers_experts.compute
    model = build("Qwen3-MoE")
    expected = outputs(model, INPUTS["left"])
    monkeypatch.setattr(
        transformers_experts, "compute", lambda m, attend, x, i, w: original(m, attend, x, i, w.flip(-1))
    )
    with served(model, "patched"):
        found = outputs(model, INPUTS["left"])
    assert float((found[0] - expected[0]).detach().abs().max()) > 1e-3
