"""PEFT's LoRA in models before and after they are patched: the adapters compute, are trained, and can be merged."""

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

import peft
from _with_models import ATTENTION, MODELS, build, out, run, same

import accel

pytestmark = pytest.mark.slow


def adapted(model, name):
    """``model`` with LoRA on its attention's projections, away from its initial zeros."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=ATTENTION[name], lora_dropout=0.0))
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in wrapped.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return wrapped.eval()


def gradients(model, x):
    model.zero_grad()
    out(model, x).square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same_gradients(found, expected):
    assert list(found) == list(expected)
    assert all("lora_" in name for name in expected)
    for name, gradient in expected.items():
        same(found[name], gradient, 1e-4 * float(gradient.abs().max()) + 1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_are_there_when_the_model_is_patched(name):
    model, x = build(name)
    model = adapted(model, name)
    expected, expected_gradients = run(model, x), gradients(model, x)
    report = accel.patch(model, allow_none=True)
    same(run(model, x), expected)
    same_gradients(gradients(model, x), expected_gradients)
    if name in ("vit", "llama"):
        assert not report.skipped
        assert not report.uncalled()
    else:  # which would read the weights that the adapters stand beside
        assert not report.replaced
        assert all("peft.tuners.lora" in row.reason for row in report.skipped)
    merged = model.merge_and_unload()
    accel.patch(merged)
    same(run(merged, x), expected, 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_come_after_the_patch(name):
    model, x = build(name)
    model = adapted(model, name)
    expected, expected_gradients = run(model, x), gradients(model, x)
    plain = run(build(name)[0], x)
    assert not torch.allclose(expected, plain, atol=1e-3)

    model, x = build(name)
    report = accel.patch(model)
    model = adapted(model, name)
    same(run(model, x), expected)
    same_gradients(gradients(model, x), expected_gradients)
    if name in ("vit", "llama"):
        assert not report.uncalled()
    else:
        assert all("peft.tuners.lora" in next(iter(row.fallbacks)) for row in report.rows)
    with model.disable_adapter():
        same(run(model, x), plain)
    base = model.unload()
    same(run(base, x), plain)
    assert not report.uncalled(), "without adapters the kernels compute again"


# --- adapters on experts ---


def with_experts(way):
    """A small Mixtral with adapters on its experts' parameters and on attention beside them, and how it was patched."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    )
    model.set_experts_implementation("accel" if way == "by name" else "eager")
    report = accel.patch(model) if way == "patched first" else None
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    report = accel.patch(wrapped) if way == "patched last" else report
    return wrapped.eval(), report


TOKENS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("way", ["by name", "patched first", "patched last"])
def test_experts_and_attention_beside_them(way):
    plain, _ = with_experts("eager")
    expected, expected_gradients = plain(TOKENS).logits.detach(), gradients(plain, TOKENS)
    assert any("experts" in name for name in expected_gradients)
    model, report = with_experts(way)
    with accel.testing.watch(accel.dispatch.OPS["moe_experts"]) as ran:
        same(model(TOKENS).logits.detach(), expected)
    assert [pass_ for _, pass_ in ran] == ["forward"] * 2
    same_gradients(gradients(model, TOKENS), expected_gradients)
    if report is not None:
        assert not [row for row in report.rows if row.op == "moe_experts" and (row.reason or row.fallbacks)], str(
            report
        )
    with model.disable_adapter(), plain.disable_adapter():
        same(model(TOKENS).logits.detach(), plain(TOKENS).logits.detach())
    same(model.merge_and_unload()(TOKENS).logits.detach(), expected, 1e-4)
