"""transformers' MiniMax: lightning attention computed by the op, alone, in a model and while it writes text."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from _linear_models import every_backend, gradients, noise
from _transformers_models import (
    IDS,
    LEFT,
    RIGHT,
    assert_same,
    assert_same_gradients,
    outputs,
    randomize,
    text,
)
from _transformers_models import gradients as gradients_of_model
from transformers.models.minimax import modeling_minimax

import accel
from accel.testing import assert_close

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 2, "block_size": 4, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 3,
    "layer_types": ["full_attention", "linear_attention", "linear_attention"],
}  # fmt: skip
LINEAR = ("model.layers.1.self_attn", "model.layers.2.self_attn")
WRITE = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def minimax():
    return randomize(transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**SIZES)))


def layer():
    """In float64 throughout, which the class's norm and decays are not."""
    module = modeling_minimax.MiniMaxLightningAttention(transformers.MiniMaxConfig(**SIZES), 2)
    module.norm = nn.RMSNorm(32)
    module = randomize(module).double()
    decays = module.decay_factors(module.slope_rate)
    module.query_decay, module.key_decay, module.diagonal_decay = decays
    return module


def rows(report):
    return [row for row in report.rows if row.op == "linear_attention"]


def call_of(module, mask=None):
    """The module as a function of its input and of its parameters."""
    names = [name for name, _ in module.named_parameters()]

    def call(x, *values):
        given = (x, None, mask)
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), given)

    return call, [noise(3, 9, 32, dtype=module.out_proj.weight.dtype), *module.parameters()]


@pytest.mark.parametrize("mask", [None, RIGHT, LEFT], ids=["all", "right", "left"])
def test_the_layer_computes_the_same(mask):
    """In float64, where nothing is rounded: outputs, the state and every gradient."""
    module = layer()
    expected, expected_gradients = gradients(*call_of(module, mask))
    report = accel.patch(module)
    found, found_gradients = gradients(*call_of(module, mask))
    assert [(row.calls, row.fallbacks, row.backend) for row in report.rows] == [(1, {}, "reference")]
    assert len(found) == 2
    for a, b in zip([*found, *found_gradients], [*expected, *expected_gradients], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert accel.unpatch(module) == [""]
    again, _ = gradients(*call_of(module, mask))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@every_backend
def test_fp32_within_the_tolerance_table(backend):
    module = layer()
    expected, expected_gradients = gradients(*call_of(module, LEFT))
    report = accel.patch(module.float())
    with accel.use(backend=backend):
        found, found_gradients = gradients(*call_of(module, LEFT))
    assert [(row.calls, row.fallbacks, row.backend) for row in report.rows] == [(1, {}, backend)]
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, "linear", torch.float32)
    for a, b in zip(found_gradients, expected_gradients, strict=True):
        assert_close(a, b, "linear_grad", torch.float32)


def test_a_wrong_decay_is_seen(monkeypatch):
    module = layer()
    report = accel.patch(module)
    op = report.rows[0].replacement.attend
    monkeypatch.setattr(
        report.rows[0].replacement,
        "attend",
        lambda *a, log_decay, **how: op(*a, log_decay=1.01 * log_decay, **how),
    )
    assert report.verify(noise(3, 9, 32), None, None) > 1e-6


@every_backend
@pytest.mark.parametrize("mask", [None, RIGHT, LEFT], ids=["all", "right", "left"])
def test_the_model_computes_the_same(mask, backend):
    model, inputs = minimax(), text(mask)
    expected, expected_gradients = gradients_of_model(model, inputs)
    report = accel.patch(model)
    assert tuple(row.name for row in rows(report)) == LINEAR
    with accel.use(backend=backend):
        found, found_gradients = gradients_of_model(model, inputs)
    assert_same(found, expected)
    assert_same_gradients(found_gradients, expected_gradients)
    assert [(row.calls, row.fallbacks, row.backend) for row in rows(report)] == [(1, {}, backend)] * 2
    accel.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), expected, strict=True))


@every_backend
@pytest.mark.parametrize("beams", [1, 2])
def test_it_writes_the_same_text(beams, backend):
    model = minimax()
    expected = model.generate(IDS, attention_mask=LEFT, num_beams=beams, **WRITE)
    report = accel.patch(model)
    with accel.use(backend=backend):
        found = model.generate(IDS, attention_mask=LEFT, num_beams=beams, **WRITE)
    assert torch.equal(found.sequences, expected.sequences)
    assert_same(found.logits, expected.logits)
    assert [(row.calls, row.fallbacks) for row in rows(report)] == [(len(found.logits), {})] * 2


@every_backend
def test_a_text_goes_on_from_a_cache(backend):
    """In pieces of several tokens, patched after the first: the cache is the class's own."""
    model = minimax()
    whole = model(IDS).logits
    with torch.no_grad():
        first = model(IDS[:, :4], use_cache=True)
        report = accel.patch(model)
        with accel.use(backend=backend):
            second = model(IDS[:, 4:7], cache=first.cache, use_cache=True)
        mine = first.cache.get_linear_cache(2)
        before = mine.clone()
        with accel.use(backend=backend):
            third = model(IDS[:, 7:8], cache=first.cache, use_cache=True)
    assert torch.equal(mine, before), "who kept a state from the cache keeps it"
    found = torch.cat([first.logits, second.logits, third.logits], 1)
    torch.testing.assert_close(found, whole[:, :8], rtol=1e-4, atol=2e-5)
    assert [row.calls for row in rows(report)] == [2, 2]


@pytest.mark.parametrize("tokens", [1, 3])
def test_states_keep_the_dtype_of_the_class(tokens):
    module = layer().bfloat16()
    x = noise(2, 5 + tokens, 32, dtype=torch.bfloat16)
    exact, _ = copy.deepcopy(module).double()(x.double(), None, None)
    made = []
    for patched in (False, True):
        if patched:
            report = accel.patch(module)
        cache = modeling_minimax.MiniMaxCache()
        cache.linear_cache = [[], [], None]
        with accel.use(backend="reference"), torch.no_grad():
            module(x[:, :5], None, None, cache)
            out, state = module(x[:, 5:], None, None, cache)
        assert cache.get_linear_cache(2) is state
        made.append((out, state))
    (expected, expected_state), (found, found_state) = made
    assert (found.dtype, found_state.dtype) == (expected.dtype, expected_state.dtype) == (torch.bfloat16,) * 2
    errors = [float((x.double() - exact[:, 5:]).abs().max()) for x in (found, expected)]
    assert errors[0] <= 2 * errors[1] + 2**-8 * float(exact.abs().max()), errors
    assert report.rows[0].calls == 2


def test_autocast_keeps_the_dtype():
    module = layer().float()
    x = noise(2, 5, 32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), accel.use(backend="reference"):
        expected = module(x, None, None)
        report = accel.patch(module)
        found = module(x, None, None)
    assert [y.dtype for y in found] == [y.dtype for y in expected]
    assert report.rows[0].calls == 1
    assert_close(found[0], expected[0].double(), "linear", torch.bfloat16)


@pytest.mark.usefixtures("on_reference")
def test_the_layer_compiles_in_one_graph():
    module, x = layer(), noise(2, 7, 32)
    expected, _ = module(x, None, None)
    report = accel.patch(module)
    module.compile(fullgraph=True, backend="aot_eager")
    found, _ = module(x, None, None)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert not report.uncalled()


# --- what is left to the class ---


@pytest.mark.usefixtures("as_a_user_has_it")
def test_where_only_the_reference_computes_the_class_does():
    module, x = layer(), noise(2, 5, 32)
    expected = module(x, None, None)
    report = accel.patch(module)
    assert all(torch.equal(a, b) for a, b in zip(module(x, None, None), expected, strict=True))
    (reason,) = report.rows[0].fallbacks
    assert reason.startswith("only the reference of linear_attention computes torch.float64 on cpu")


def test_calls_of_another_kind_are_the_classs_affair():
    module, x = layer(), noise(2, 5, 32)
    expected = module(x, None, None)[0]
    report = accel.patch(module)
    cache = modeling_minimax.MiniMaxCache()
    cache.linear_cache = [[], [], None]
    torch.testing.assert_close(module(x, None, None, past_key_values=cache)[0], expected, rtol=1e-11, atol=1e-11)
    assert cache.linear_cache[2] is not None
    with pytest.raises(AttributeError):
        module(x, None, None, transformers.DynamicCache())
    assert list(report.rows[0].fallbacks) == [
        "past_key_values is given, which the class renames",
        "its cache is a DynamicCache, which keeps no states",
    ]


def test_a_subclass_is_left_alone():
    class Other(modeling_minimax.MiniMaxLightningAttention):
        pass

    module = Other(transformers.MiniMaxConfig(**SIZES), 0)
    with pytest.raises(ValueError, match=r"it is a subclass of .*MiniMaxLightningAttention, which may compute"):
        accel.patch(module)
