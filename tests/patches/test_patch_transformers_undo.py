"""transformers: switching models and taking it back, and batches flattened to the tokens that are no padding."""

import pytest
import torch
from _copies import DUPLICATES
from torch import nn

pytest.importorskip("transformers")

import transformers
from _transformers_models import (
    BATCH,
    DECODER,
    GAPS,
    IDS,
    LEFT,
    LENGTH,
    RIGHT,
    TEXT,
    assert_same,
    assert_same_gradients,
    bert,
    both,
    checkpointing,
    clip,
    gemma2,
    gpt_oss,
    gradients,
    llama,
    modernbert,
    outputs,
    qwen3,
    randomize,
    t5,
    text,
)

import accel

pytestmark = pytest.mark.usefixtures("on_reference")

# --- patching and taking back ---


def test_a_second_model_of_the_same_configuration_is_untouched():
    config = transformers.LlamaConfig(**DECODER)
    first, second = [randomize(transformers.LlamaForCausalLM(config)) for _ in range(2)]
    expected = second(**text(LEFT)).logits
    report = accel.patch(first)
    assert first.config._attn_implementation == "accel"
    assert second.config is config
    assert config._attn_implementation == "sdpa"
    assert torch.equal(second(**text(LEFT)).logits, expected)
    assert len(report.uncalled()) == 2
    first.config.use_cache = False
    first.resize_token_embeddings(60)
    accel.unpatch(first)
    assert first.config is config
    assert (config.use_cache, config.vocab_size) == (False, 60), "what was set meanwhile is kept"


def test_sub_configurations_are_switched_together():
    model = randomize(clip())
    before = model.config
    with accel.patch(model):
        assert model.config is not before
        assert model.config.text_config is model.text_model.config
        assert {c._attn_implementation for c in (model.config, model.config.text_config)} == {"accel"}
        assert before.text_config._attn_implementation == "sdpa"
    assert model.config is before
    assert model.text_model.config is before.text_config


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_skip_leaves_attention_as_it_is(implementation):
    model = randomize(llama(attn_implementation=implementation))
    expected = model(**text(LEFT)).logits
    report = accel.patch(model, skip="model.layers.0", strict=True)
    assert [row.status for row in report.rows] == ["skipped", "replaced"]
    assert report.rows[0].reason == "named in skip"
    found = model(**text(LEFT)).logits
    assert [row.calls for row in report.rows] == [0, 1]
    assert_same([found[LEFT.bool()]], [expected[LEFT.bool()]])
    assert model.model.layers[0].self_attn.config._attn_implementation == implementation


def test_a_bias_reaches_attention_that_is_left_alone():
    for implementation in ("sdpa", "eager"):
        model = randomize(t5())
        model.set_attn_implementation(implementation)
        expected, expected_gradients = gradients(model, both(RIGHT))
        report = accel.patch(model, skip=["encoder.block.1*", "decoder.block.1*"])
        found, found_gradients = gradients(model, both(RIGHT))
        assert_same(found, expected)
        assert_same_gradients(found_gradients, expected_gradients)
        assert not report.uncalled()


def test_dry_run_changes_nothing():
    model = randomize(clip())
    before = [vars(m).copy() for m in model.modules()]
    report = accel.patch(model, dry_run=True)
    assert [row.status for row in report.rows] == ["would be replaced"] * 4
    assert all(vars(m) == b for m, b in zip(model.modules(), before, strict=True))


def test_patching_twice_and_the_report():
    model = randomize(bert())
    first = accel.patch(model)
    with accel.patch(model) as second:
        assert [row.status for row in second.rows] == ["already patched"] * 2
        model(**text(RIGHT))
    assert all(row.active for row in first.rows), "the block takes back only what it put in"
    lines = str(first).splitlines()
    assert lines[0] == "BertForMaskedLM: 2 replaced"
    name = "bert.encoder.layer.0.attention.self"
    assert lines[2].split() == [name, "BertSelfAttention", "softmax_attention", "reference", "1"]
    assert first.verify(**text(None)) < 1e-4
    assert accel.unpatch(model) == [row.name for row in first.rows]
    assert accel.unpatch(model) == []
    model.set_attn_implementation("eager")
    assert not any(row.active for row in first.rows)


def test_ops_choose():
    model = randomize(bert())
    with pytest.raises(ValueError, match="nothing to replace"):
        accel.patch(model, ops="window_attention")
    with pytest.raises(ValueError, match="nothing to replace"):
        accel.patch(model, recipe={"softmax_attention": False})
    assert len(accel.patch(model, ops="softmax_attention", dry_run=True).replaced) == 2


def test_a_switched_back_model_is_not_active():
    model = randomize(llama())
    report = accel.patch(model)
    model.set_attn_implementation("sdpa")
    model(IDS)
    assert [(row.active, row.calls) for row in report.rows] == [(False, 0)] * 2


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_a_copy_is_patched_and_stands_alone(duplicate):
    model = randomize(t5())
    plain = outputs(model, both(RIGHT))
    report = accel.patch(model)
    expected = outputs(model, both(RIGHT))
    twin = duplicate(model)
    assert torch.equal(outputs(twin, both(RIGHT))[0], expected[0])
    rows = accel.patch(twin).rows
    assert {row.status for row in rows} == {"already patched"}
    assert [row.calls for row in rows] == [2] * 8
    assert [row.calls for row in report.rows] == [1] * 8
    accel.unpatch(twin)
    assert all(row.active for row in report.rows)
    assert torch.equal(outputs(twin, both(RIGHT))[0], plain[0])
    assert twin.config._attn_implementation == "sdpa"
    assert twin.config is twin.get_encoder().config or twin.get_encoder().config is not model.get_encoder().config


# --- flattened batches ---

UNPADDED = {
    "BERT": bert,
    "RoBERTa": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**{**TEXT, "pad_token_id": 1})),
    "ModernBERT": modernbert,
    "Llama": llama,
    "Qwen3": qwen3,
    "GPT-OSS": gpt_oss,
    "Gemma2": gemma2,
}


@pytest.mark.parametrize("name", UNPADDED)
@pytest.mark.parametrize("mask", [LEFT, RIGHT, GAPS], ids=["left", "right", "gaps"])
def test_a_flattened_batch_gives_the_logits_of_the_padded_one(name, mask):
    model = randomize(UNPADDED[name]())
    ids = IDS.masked_fill(mask == 0, model.config.pad_token_id)
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected, expected_gradients = gradients(model, inputs)
    report = accel.patch(model, unpad=True)
    assert report.rows[-1].op == "unpad"
    if mask is GAPS and name in ("ModernBERT", "Qwen3", "GPT-OSS", "Gemma2"):
        with pytest.raises(ValueError, match="padding stands between real tokens"):
            model(**inputs)
        return
    seen = []
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    hook = layers[0].register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0].shape), with_kwargs=True)
    found, found_gradients = gradients(model, inputs)
    hook.remove()
    assert seen == [(1, int(mask.sum()), 32)]
    assert_same(found, expected)
    assert_same_gradients(found_gradients, expected_gradients)
    assert {row.calls for row in report.rows if row.op != "moe_route"} == {1}
    accel.unpatch(model)
    assert torch.equal(outputs(model, inputs)[0], expected[0])


def test_flattened_batches_are_trained_with_labels_and_checkpointing():
    model = randomize(llama()).train()
    labels = IDS.masked_fill(RIGHT == 0, -100)
    expected = model(**text(RIGHT), labels=labels).loss
    expected.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    accel.patch(model, unpad=True)
    checkpointing(model)
    model.zero_grad()
    out = model(**text(RIGHT), labels=labels, output_hidden_states=True)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight.grad, gradient, rtol=1e-4, atol=1e-5)
    assert [tuple(x.shape) for x in out.hidden_states] == [(BATCH, LENGTH, 32)] * 3
    assert bool((out.hidden_states[-1][RIGHT == 0] == 0).all())


def test_classifiers_and_poolers_see_the_padded_batch():
    for model in (
        transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)),
        transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**DECODER)),
    ):
        model = randomize(model)
        inputs = {"input_ids": IDS.masked_fill(RIGHT == 0, 0), "attention_mask": RIGHT}
        expected = model(**inputs).logits
        accel.patch(model, unpad=True)
        assert_same([model(**inputs).logits, model(**inputs, return_dict=False)[0]], [expected, expected])
    model = randomize(transformers.BertModel(transformers.BertConfig(**TEXT)))
    accel.patch(model, unpad=True)
    with pytest.raises(NotImplementedError, match=r"BertModel .* its pooler reads the first token"):
        model(**text(LEFT))
    assert len(model(**text(RIGHT), return_dict=False)) == 2


def test_calls_that_cannot_be_flattened_raise():
    model = randomize(llama())
    report = accel.patch(model, unpad=True)
    with pytest.raises(NotImplementedError, match=r"have no (cache|past_key_values|use_cache)"):
        model.generate(IDS, attention_mask=LEFT, max_new_tokens=2)
    with pytest.raises(NotImplementedError, match=r"an attention_mask \(B, S\)"):
        model(IDS, attention_mask=torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="have no output_attentions"):
        model(**text(LEFT), output_attentions=True)
    with pytest.raises(NotImplementedError, match="is not laid out as the tokens"):
        model(**text(LEFT), something=torch.zeros(2, 2))
    model(IDS)
    assert report.rows[-1].fallbacks == {"no attention_mask is given": 1}
    assert report.rows[-1].calls == 0


def test_models_that_cannot_be_flattened():
    config = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1}
    for model, reason in (
        (t5(), "takes no position_ids"),
        (transformers.MambaModel(transformers.MambaConfig(**config)), "takes no position_ids"),
        (nn.Linear(2, 2), "no model of transformers"),
        (transformers.BloomModel(transformers.BloomConfig(**config, n_head=4)), "takes no position_ids"),
        (transformers.GPTNeoModel(transformers.GPTNeoConfig(
            **config, num_heads=4, num_layers=1, attention_types=[[["global"], 1]], max_position_embeddings=16)),
         "does not go through"),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match=reason):
            accel.patch(model, unpad=True, allow_none=True)
        assert not any("_accel" in vars(m) or "forward" in vars(m) for m in model.modules())
