"""transformers: BLOOM and the copies of BART's attention that ask no registry, computed by the op."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from _transformers_models import (
    IDS,
    LEFT,
    LENGTH,
    RIGHT,
    assert_same,
    assert_same_gradients,
    both,
    gradients,
    outputs,
    randomize,
    text,
)
from _transformers_odd import SEQ2SEQ

import accel

pytestmark = pytest.mark.usefixtures("on_reference")

EMBEDDED = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(7))


def bloom(**options):
    config = {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, **options}
    return transformers.BloomForCausalLM(transformers.BloomConfig(**config))


def xglm():
    config = {"vocab_size": 50, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "dropout": 0.0}
    return transformers.XGLMForCausalLM(transformers.XGLMConfig(**config, attention_dropout=0.0, pad_token_id=0))


def trocr():
    config = {**SEQ2SEQ, "decoder_layers": 2, "is_decoder": True, "cross_attention_hidden_size": 32}
    return transformers.TrOCRForCausalLM(transformers.TrOCRConfig(**config))


def mvp(**options):
    return transformers.MvpForConditionalGeneration(transformers.MvpConfig(**{**SEQ2SEQ, **options}))


# name: model, arguments, rows
DECODERS = {
    "BLOOM": (bloom, text(None), 2),
    "BLOOM, left": (bloom, text(LEFT), 2),
    "BLOOM, right": (bloom, text(RIGHT), 2),
    "XGLM, left": (xglm, text(LEFT), 2),
    "TrOCR": (trocr, {**text(RIGHT), "encoder_hidden_states": EMBEDDED}, 4),
    "MVP": (mvp, both(RIGHT), 3),
}


@pytest.mark.parametrize("name", DECODERS)
def test_patched_decoder_computes_the_same(name):
    make, inputs, rows = DECODERS[name]
    model = randomize(make())
    expected, expected_gradients = gradients(model, inputs)
    report = accel.patch(model)
    assert len(report.replaced) == rows, str(report)
    found, found_gradients = gradients(model, inputs)
    assert_same(found, expected)
    assert_same_gradients(found_gradients, expected_gradients)
    assert all(row.calls == 1 and not row.fallbacks for row in report.rows), str(report)
    accel.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), expected, strict=True))


def test_what_is_added_by_the_caller_is_added():
    model = randomize(bloom())
    mask = torch.randn(3, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(5))
    inputs = {"inputs_embeds": model.transformer.word_embeddings(IDS).detach(), "alibi": torch.zeros(12, 1, LENGTH)}
    attention = model.transformer.h[0].self_attention
    given = (inputs["inputs_embeds"], inputs["inputs_embeds"], inputs["alibi"] + 0.5, mask)
    expected = attention(*given)[0]
    report = accel.patch(model)
    torch.testing.assert_close(attention(*given)[0], expected, rtol=1e-4, atol=2e-5)
    assert report.rows[0].calls == 1


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["BLOOM, left", "XGLM, left", "MVP"])
def test_generation_with_a_cache(name, cache):
    make, inputs, _ = DECODERS[name]
    model = randomize(make())
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "attention_mask": inputs["attention_mask"]}
    if cache == "static":
        how |= {"cache_implementation": "static", "disable_compile": True}
    expected = model.generate(IDS, **how)
    report = accel.patch(model)
    assert torch.equal(model.generate(IDS, **how), expected)
    assert all(row.calls and not row.fallbacks for row in report.rows), str(report)


@pytest.mark.parametrize("name", ["BLOOM", "XGLM, left", "TrOCR", "MVP"])
def test_weights_come_from_the_class(name):
    make, inputs, rows = DECODERS[name]
    model = randomize(make())
    expected = model(**inputs, output_attentions=True)
    report = accel.patch(model)
    found = model(**inputs, output_attentions=True)
    for key in ("attentions", "decoder_attentions", "cross_attentions"):
        assert len(found.get(key) or ()) == len(expected.get(key) or ())
        for a, b in zip(found.get(key) or (), expected.get(key) or (), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [row.fallbacks for row in report.rows] == [{"attention weights are asked for": 1}] * rows


def test_calls_that_are_left_to_the_class():
    model = randomize(mvp(use_prompt=True, prompt_length=3, prompt_mid_dim=8))
    inputs = both(None)
    expected = outputs(model, inputs)
    report = accel.patch(model)
    assert_same(outputs(model, inputs), expected)
    assert {reason for row in report.rows for reason in row.fallbacks} == {"attn_prompt is given"}
    model = randomize(bloom(pretraining_tp=2, slow_but_exact=True))
    expected = outputs(model, text(LEFT))
    report = accel.patch(model)
    assert_same(outputs(model, text(LEFT)), expected)
    assert all(row.fallbacks == {"its last product is taken in slices": 1} for row in report.rows)


def test_dropout_is_applied_in_training_only():
    for make in (lambda: bloom(attention_dropout=0.5), lambda: mvp(attention_dropout=0.5)):
        model = randomize(make())
        accel.patch(model)
        inputs = both(RIGHT) if "decoder_layers" in vars(model.config) else text(RIGHT)
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.eval()
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_checkpointing_recomputes_the_same():
    model = randomize(bloom()).train()
    expected, expected_gradients = gradients(model, text(LEFT))
    accel.patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found, found_gradients = gradients(model, text(LEFT))
    assert_same(found, expected)
    assert_same_gradients(found_gradients, expected_gradients)


def test_compiled_decoder_is_one_graph():
    model = randomize(bloom(n_layer=1))
    expected = outputs(model, text(LEFT))
    report = accel.patch(model)
    model.compile(fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_same(outputs(model, text(LEFT)), expected)
    assert not report.uncalled()
