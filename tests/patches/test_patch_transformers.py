"""transformers: the registered attention and masks, whole models switched to them, and flattened batches.

Tiny random-weight models of the real classes, on the reference backend: what is tested is what reaches the op.
"""

import copy
import importlib
import importlib.util
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from transformers import masking_utils
from transformers.modeling_utils import AttentionInterface

import accel
from accel import integrations
from accel.patches import transformers_interface, transformers_rules, transformers_switch
from accel.patches.transformers_rules import LazyBias, LazyMask, MaskRule


@pytest.fixture(autouse=True)
def reference():
    with accel.use(backend="reference"):
        yield


# --- models and inputs ---

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 50, "max_position_embeddings": 64, "pad_token_id": 0}
DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 50, "dropout_rate": 0.0}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0}
BATCH, LENGTH = 3, 9
IDS = torch.randint(3, 50, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
RIGHT = torch.ones(BATCH, LENGTH, dtype=torch.long)
RIGHT[1, 5:] = 0
RIGHT[2, 8:] = 0
LEFT = RIGHT.flip(1)
GAPS = torch.ones_like(RIGHT)
GAPS[0, 3:5] = GAPS[1, :4] = GAPS[2, 7:] = 0
TARGET = torch.randint(3, 50, (BATCH, 7), generator=torch.Generator().manual_seed(2))
TARGET_MASK = torch.ones_like(TARGET)
TARGET_MASK[1, 4:] = 0
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def clip():
    text = {**TEXT, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16))


def siglip():
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=IMAGE))


def detr():
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    return transformers.DetrForObjectDetection(
        transformers.DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
            d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=5, num_labels=3, dropout=0.0,
        )
    )  # fmt: skip


def qwen3():
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**DECODER, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    )


def gpt_oss():
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, rope_parameters=rope
        )
    )


def gemma2():
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**DECODER, sliding_window=4, attn_logit_softcapping=5.0, query_pre_attn_scalar=8)
    )


def beit(**options):
    return transformers.BeitModel(transformers.BeitConfig(**{**IMAGE, "layer_scale_init_value": 0.1, **options}))


def data2vec(**options):
    return transformers.Data2VecVisionModel(transformers.Data2VecVisionConfig(**IMAGE, **options))


def modernbert():
    return transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(**TEXT, local_attention=4, global_attn_every_n_layers=2)
    )


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**DECODER, **options}))


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT))


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))


def text(mask):
    return {"input_ids": IDS, "attention_mask": mask}


def both(mask):
    return {**text(mask), "decoder_input_ids": TARGET, "decoder_attention_mask": TARGET_MASK}


PICTURE = {"pixel_values": PIXELS}
PICTURE_MASK = torch.ones(2, 32, 32, dtype=torch.long)
PICTURE_MASK[1, :, 20:] = 0

# name: model, arguments, rows
MODELS = {
    "BERT": (bert, text(RIGHT), 2),
    "ModernBERT": (modernbert, text(RIGHT), 2),
    "ViT": (lambda: transformers.ViTModel(transformers.ViTConfig(**IMAGE)), PICTURE, 2),
    "BEiT": (lambda: beit(use_relative_position_bias=True), PICTURE, 4),
    "BEiT, shared": (lambda: beit(use_shared_relative_position_bias=True), PICTURE, 3),
    "BEiT, both": (
        lambda: beit(use_shared_relative_position_bias=True, use_relative_position_bias=True),
        PICTURE,
        5,
    ),
    "Data2VecVision": (lambda: data2vec(use_relative_position_bias=True), PICTURE, 4),
    "Data2VecVision, both": (
        lambda: data2vec(use_shared_relative_position_bias=True, use_relative_position_bias=True),
        PICTURE,
        5,
    ),
    "CLIP": (clip, {**PICTURE, **text(RIGHT)}, 4),
    "SigLIP": (siglip, {**PICTURE, **text(RIGHT)}, 4),
    "DETR": (
        detr,
        {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4)),
         "pixel_mask": PICTURE_MASK},
        6,
    ),
    "T5": (t5, both(RIGHT), 8),
    "T5, left": (t5, {**both(LEFT), "decoder_attention_mask": None}, 8),
    "MT5": (lambda: transformers.MT5ForConditionalGeneration(transformers.MT5Config(**T5)), both(RIGHT), 8),
    "UMT5": (lambda: transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**T5)), both(LEFT), 10),
    "Llama": (llama, text(None), 2),
    "Llama, left": (llama, text(LEFT), 2),
    "Llama, right": (llama, text(RIGHT), 2),
    "Llama, eager": (lambda: llama(attn_implementation="eager"), text(LEFT), 2),
    "Qwen3": (qwen3, text(LEFT), 2),
    "GPT-OSS": (gpt_oss, text(LEFT), 2),
    "GPT-OSS, no padding": (gpt_oss, text(None), 2),
    "Gemma2": (gemma2, text(LEFT), 2),
}  # fmt: skip
KEYS = ("logits", "last_hidden_state", "text_embeds")


def randomize(model):
    """Every parameter away from its initial value: tables and sinks that start at zero hide mistakes."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, 0.2)
    return model.eval()


def outputs(model, inputs):
    """What is compared: at padding the two may differ, where a query may see nothing."""
    out = model(**inputs)
    values = [out[key] for key in KEYS if out.get(key) is not None]
    values += [out[key] for key in ("pred_boxes", "image_embeds") if out.get(key) is not None]
    mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
    if mask is None:
        return values
    return [x[mask.bool()] if x.shape[:2] == mask.shape else x for x in values]


def gradients(model, inputs):
    model.zero_grad()
    generator = torch.Generator().manual_seed(9)
    values = outputs(model, inputs)
    sum((x * torch.randn(x.shape, generator=generator)).sum() for x in values).backward()
    return [x.detach() for x in values], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        error = float((found[name] - gradient).abs().max())
        # the rounding of sums over the whole model: relative to the largest gradient in it
        largest = max(float(g.abs().max()) for g in expected.values())
        assert error <= 1e-4 * max(float(gradient.abs().max()), 1e-2 * largest), f"{name}: {error}"


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


# --- the same function ---


@pytest.mark.parametrize("name", MODELS)
def test_patched_model_computes_the_same(name):
    make, inputs, rows = MODELS[name]
    model = randomize(make())
    keys, configs = list(model.state_dict()), [vars(m).get("config") for m in model.modules()]
    expected, expected_gradients = gradients(model, inputs)
    report = accel.patch(model)
    attention = [row for row in report.replaced if row.old_class != "MultiheadAttention"]
    assert len(attention) == rows, str(report)
    found, found_gradients = gradients(model, inputs)
    assert_same(found, expected)
    assert_same_gradients(found_gradients, expected_gradients)
    for row in attention:
        assert row.calls >= 1, str(report)
        assert not row.fallbacks, str(report)
        prepares = "compute_bias" in row.old_class or "RelativePositionBias" in row.old_class
        assert row.backend == (None if prepares else "reference")
    assert list(model.state_dict()) == keys
    accel.unpatch(model)
    assert [vars(m).get("config") for m in model.modules()] == configs
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), expected, strict=True))
    assert not any("_accel" in vars(m) for m in model.modules())


def test_a_table_counts_whatever_a_version_calls_causal():
    """transformers 5.17 does not call the decoder's own attention of UMT5 causal."""
    make, inputs, _ = MODELS["UMT5"]
    model = randomize(make())
    for block in model.decoder.block:
        block.layer[0].SelfAttention.is_causal = False
    expected = outputs(model, inputs)
    accel.patch(model)
    assert_same(outputs(model, inputs), expected)


def test_a_wrong_attention_is_seen(monkeypatch):
    """The comparison above can fail: each thing that is read here matters to some model."""
    original = transformers_interface.pairs

    def without(name):
        return lambda *args: {k: v for k, v in original(*args).items() if k != name}

    for name, argument in (
        ("Llama, left", "mask"), ("Llama", "causal"), ("Qwen3", "window"), ("T5", "bias_table"), ("BEiT", "bias_index"),
    ):  # fmt: skip
        make, inputs, _ = MODELS[name]
        model = randomize(make())
        expected = outputs(model, inputs)
        with accel.patch(model), monkeypatch.context() as patched:
            patched.setattr(transformers_interface, "pairs", without(argument))
            if argument == "bias_index":
                with pytest.raises(TypeError, match="bias_index"):
                    outputs(model, inputs)
                continue
            if argument == "bias_table":
                patched.setattr(transformers_interface, "pairs", lambda *args: {
                    k: v for k, v in original(*args).items() if not k.startswith("bias")})  # fmt: skip
            found = outputs(model, inputs)
        assert max(float((a - b).detach().abs().max()) for a, b in zip(found, expected, strict=True)) > 1e-3, name


@pytest.mark.parametrize("name", ["T5", "UMT5", "BEiT", "BEiT, shared", "Data2VecVision"])
def test_a_bias_from_a_table_is_never_written_out(name, monkeypatch):
    make, inputs, _ = MODELS[name]
    model = randomize(make())
    accel.patch(model)

    def dense(self):
        raise AssertionError(f"{self} was written out")

    monkeypatch.setattr(LazyBias, "dense", dense)
    monkeypatch.setattr(MaskRule, "dense", dense)
    gradients(model, inputs)


def test_a_padded_causal_batch_needs_no_dense_mask(monkeypatch):
    model = randomize(qwen3())
    accel.patch(model)
    monkeypatch.setattr(MaskRule, "dense", lambda self: pytest.fail("the mask was written out"))
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda *args, **kwargs: pytest.fail("the mask was written out"))
    model(**text(LEFT))


@pytest.mark.parametrize("name", ["Llama", "GPT-OSS", "Gemma2", "T5"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache(name, cache):
    model = randomize(MODELS[name][0]())
    how = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6, "attention_mask": LEFT}
    if cache == "static":
        how |= {"cache_implementation": "static", "disable_compile": True}
    expected = model.generate(IDS, **how)
    report = accel.patch(model)
    assert torch.equal(model.generate(IDS, **how), expected)
    counts = [row.calls for row in report.rows if "compute_bias" not in row.old_class]
    encoder = 2 if name == "T5" else 0
    assert counts[encoder:] == [6] * (len(counts) - encoder)
    late = {"its cache counts tokens on the device"} if name == "T5" and cache == "static" else set()
    assert {reason for row in report.rows for reason in row.fallbacks} == late


def checkpointing(model, options=None):
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(options)


def test_gradient_checkpointing_recomputes_the_same():
    for make, inputs in ((t5, both(RIGHT)), (llama, text(LEFT))):
        model = randomize(make()).train()
        expected, expected_gradients = gradients(model, inputs)
        report = accel.patch(model)
        for reentrant in (False, True):
            checkpointing(model, {"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
            found, found_gradients = gradients(model, inputs)
            assert_same(found, expected)
            assert_same_gradients(found_gradients, expected_gradients)
        assert all(row.calls >= 4 for row in report.rows if "compute_bias" not in row.old_class)


@pytest.mark.parametrize("make", [
    lambda: (llama(num_hidden_layers=1), text(LEFT)),
    lambda: (beit(use_relative_position_bias=True, num_hidden_layers=1), PICTURE),
    lambda: (transformers.T5EncoderModel(transformers.T5Config(**{**T5, "num_layers": 1})), text(RIGHT)),
], ids=["Llama", "BEiT", "T5"])  # fmt: skip
def test_compiled_model_is_one_graph(make):
    model, inputs = make()
    randomize(model)
    expected = outputs(model, inputs)
    report = accel.patch(model)
    model.compile(fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_same(outputs(model, inputs), expected)
    assert not report.uncalled()


def test_dropout_is_applied_in_training_only():
    model = randomize(llama(attention_dropout=0.5))
    accel.patch(model)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    model.eval()
    assert torch.equal(model(IDS).logits, model(IDS).logits)


# --- what the registry alone does ---


def test_both_registries_know_the_name():
    assert AttentionInterface._global_mapping["accel"] is transformers_interface.attention
    assert masking_utils.AttentionMaskInterface._global_mapping["accel"] is transformers_interface.mask


@pytest.mark.parametrize("mask", [LEFT, RIGHT, GAPS], ids=["left", "right", "gaps"])
def test_a_registered_name_keeps_the_padding(mask, monkeypatch):
    model = randomize(llama())
    expected = model(**text(mask)).logits[mask.bool()]
    model.set_attn_implementation("accel")
    torch.testing.assert_close(model(**text(mask)).logits[mask.bool()], expected, rtol=1e-4, atol=2e-5)
    monkeypatch.delitem(masking_utils.AttentionMaskInterface._global_mapping, "accel")  # the trap
    if mask is LEFT:
        assert float((model(**text(mask)).logits[mask.bool()] - expected).detach().abs().max()) > 1e-2
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**text(mask)).logits[mask.bool()], expected)


def test_a_model_is_built_with_the_name():
    model = randomize(llama(attn_implementation="accel"))
    other = randomize(llama())
    assert_same([model(**text(LEFT)).logits[LEFT.bool()]], [other(**text(LEFT)).logits[LEFT.bool()]])
    assert model.config._attn_implementation == "accel"
    report = accel.patch(model)  # counts from here on
    model(IDS)
    assert [row.calls for row in report.rows] == [1, 1]


def test_chunked_attention_and_packed_positions():
    config = transformers.Llama4TextConfig(
        **DECODER, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48, no_rope_layers=[1, 0]
    )
    model = randomize(transformers.Llama4ForCausalLM(config))
    expected = model(**text(LEFT)).logits[LEFT.bool()]
    accel.patch(model)
    assert_same([model(**text(LEFT)).logits[LEFT.bool()]], [expected])
    model = randomize(llama())
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    expected = model(IDS[:1], position_ids=positions).logits
    report = accel.patch(model)
    assert_same([model(IDS[:1], position_ids=positions).logits], [expected])
    assert not report.uncalled()


def test_float_masks_are_added():
    model = randomize(llama())
    mask = torch.randn(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(5))
    expected = model(IDS, attention_mask=mask).logits
    accel.patch(model)
    assert_same([model(IDS, attention_mask=mask).logits], [expected])


# --- calls that the op does not serve ---


@pytest.mark.parametrize("name", ["BERT", "Llama, left", "GPT-OSS", "T5"])
def test_asking_for_attention_weights_falls_back_for_that_call(name, caplog):
    make, inputs, _ = MODELS[name]
    model = randomize(make())
    model.set_attn_implementation("eager")
    expected = model(**inputs, output_attentions=True)
    report = accel.patch(model)
    found = model(**inputs, output_attentions=True)
    key = "decoder_attentions" if name == "T5" else "attentions"
    assert len(found[key]) == len(expected[key]) == 2
    real = inputs["decoder_attention_mask" if name == "T5" else "attention_mask"].bool()
    for a, b in zip(found[key], expected[key], strict=True):
        torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], rtol=1e-4, atol=1e-5)
    rows = [row for row in report.rows if "compute_bias" not in row.old_class]
    assert all(row.fallbacks == {"attention weights are asked for": 1} and row.calls == 0 for row in rows)
    assert "attention weights are asked for" in caplog.text
    model(**inputs)
    assert all(row.calls == 1 for row in rows)


def test_weights_without_a_patch_are_said_once(caplog):
    model = randomize(llama(attn_implementation="accel"))
    for _ in range(2):
        assert model(IDS, output_attentions=True).attentions[0].shape == (BATCH, 4, LENGTH, LENGTH)
    assert caplog.text.count("LlamaAttention is not served by accel: attention weights are asked for") <= 1


def test_what_is_not_known_raises():
    q = torch.zeros(1, 1, 2, 8)
    module = nn.Module()
    with pytest.raises(NotImplementedError, match="passes indices=Tensor to its attention"):
        transformers_interface.attention(module, q, q, q, None, indices=q)
    with pytest.raises(NotImplementedError, match="cache=object"):
        transformers_interface.attention(module, q, q, q, None, cache=object())
    with pytest.raises(NotImplementedError, match="cannot serve Module: attention weights are asked for"):
        transformers_interface.attention(module, q, q, q, None, output_attentions=True)
    out, weights = transformers_interface.attention(module, q, q, q, None, use_cache=True, position_ids=q)
    assert out.shape == (1, 2, 1, 8)
    assert weights is None


def test_sparse_attention_is_not_claimed():
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention

    module = DeepseekV32Attention.__new__(DeepseekV32Attention)
    assert transformers_switch.why_not(module) == "it passes indices to its attention, which the op does not know"


def test_modules_that_ignore_the_registry_are_not_claimed():
    model = transformers.BloomModel(transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match="attention that goes through transformers' registry"):
        accel.patch(model)
    assert model.config._attn_implementation != "accel"


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


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
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
    assert [row.calls for row in report.rows] == [1] * 3
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
    with pytest.raises(NotImplementedError, match="the pooler reads the first token"):
        model(**text(LEFT))
    assert len(model(**text(RIGHT), return_dict=False)) == 2


def test_calls_that_cannot_be_flattened_raise():
    model = randomize(llama())
    report = accel.patch(model, unpad=True)
    with pytest.raises(NotImplementedError, match=r"has no (past_key_values|use_cache)"):
        model.generate(IDS, attention_mask=LEFT, max_new_tokens=2)
    with pytest.raises(NotImplementedError, match=r"an attention_mask \(B, S\)"):
        model(IDS, attention_mask=torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="has no output_attentions"):
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


# --- rules ---


def mask_functions():
    window, both_ways = (
        masking_utils.sliding_window_causal_mask_function,
        (masking_utils.sliding_window_bidirectional_mask_function),
    )
    return {
        "causal": masking_utils.causal_mask_function,
        "all": masking_utils.bidirectional_mask_function,
        "window": window(3),
        "window of one": window(1),
        "window both ways": both_ways(2),
    }


@pytest.mark.parametrize("name", mask_functions())
@pytest.mark.parametrize("offsets", [(5, 5, 0, 0), (3, 7, 4, 0), (1, 6, 5, 0), (4, 9, 0, 0), (2, 6, 9, 5)])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_are_those_of_sdpa(name, offsets, padded):
    queries, keys, q_offset, kv_offset = offsets
    padding = torch.ones(2, kv_offset + keys, dtype=torch.bool)
    padding[1, : kv_offset + 2] = False
    given = {
        "batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": mask_functions()[name], "attention_mask": padding if padded else None,
        "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False,
    }  # fmt: skip
    expected = masking_utils.sdpa_mask(**given)
    found = transformers_interface.mask(**given)
    assert found.shape == expected.shape
    assert found.dtype == torch.bool
    assert torch.equal(found & True, expected)
    if isinstance(found, LazyMask):  # and the op reads the rule as transformers does
        q, k = torch.randn(2, 2, queries, 8), torch.randn(2, 2, keys, 8)
        a = accel.softmax_attention(q, k, k, **found.rule.arguments())
        b = accel.softmax_attention(q, k, k, mask=expected)
        torch.testing.assert_close(a, b)
    else:
        assert queries != keys
        assert q_offset + queries != kv_offset + keys
        assert name == "window both ways"


def test_masks_that_are_no_rule_are_written_out():
    chunked = masking_utils.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int64))
    overlay = masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k < 2)
    for function in (chunked, overlay, lambda b, h, q, k: k <= q):
        given = {"batch_size": 1, "q_length": 7, "kv_length": 7, "mask_function": function}
        given["allow_is_causal_skip"] = False
        found = transformers_interface.mask(**given)
        assert type(found) is torch.Tensor
        assert torch.equal(found, masking_utils.sdpa_mask(**given))


def test_no_mask_where_nothing_is_hidden():
    causal = {"batch_size": 1, "q_length": 4, "kv_length": 4, "mask_function": masking_utils.causal_mask_function}
    ones = torch.ones(1, 4, dtype=torch.bool)
    assert transformers_interface.mask(**causal, attention_mask=ones) is None
    assert transformers_interface.mask(**causal, attention_mask=ones, allow_is_causal_skip=False) is not None
    window = {**causal, "mask_function": masking_utils.sliding_window_causal_mask_function(4)}
    assert transformers_interface.mask(**window, local_size=4) is None, "four tokens fit in a window of four"
    window = {**causal, "mask_function": masking_utils.sliding_window_causal_mask_function(3)}
    assert transformers_interface.mask(**window, local_size=3).rule.window == (2, -1)
    everything = {**causal, "mask_function": masking_utils.bidirectional_mask_function}
    assert transformers_interface.mask(**everything) is not None
    assert transformers_interface.mask(**everything, allow_is_bidirectional_skip=True) is None


def packed(inner, positions, numbers):
    """The mask function that transformers makes of packed positions; in one function up to 5.23."""
    if hasattr(masking_utils, "packed_sequence_compatibility_function"):
        return masking_utils.packed_sequence_compatibility_function(inner, positions, numbers)
    inner = masking_utils.remap_positions_for_packed_sequence(inner, positions)
    return masking_utils.and_masks(inner, masking_utils.packed_sequence_mask_function(numbers))


def test_packed_positions_become_offsets():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    numbers = masking_utils.find_packed_sequence_indices(positions)
    for inner in (masking_utils.causal_mask_function, masking_utils.sliding_window_causal_mask_function(2)):
        function = packed(inner, positions, numbers)
        given = {"batch_size": 1, "q_length": 6, "kv_length": 6, "mask_function": function}
        found = transformers_interface.mask(**given, allow_is_causal_skip=False)
        assert found.rule.cu_seqlens.tolist() == [0, 3, 5, 6]
        assert torch.equal(found.clone(), masking_utils.sdpa_mask(**given, allow_is_causal_skip=False))


def test_a_lazy_tensor_is_a_tensor_to_everyone_else():
    rule = MaskRule(2, 3, 3, torch.device("cpu"), causal=True)
    mask = LazyMask(rule)
    dense = rule.dense()
    assert (mask.shape, mask.dtype, mask.device, mask.ndim, mask.dim()) == (
        (2, 1, 3, 3),
        torch.bool,
        dense.device,
        4,
        4,
    )
    assert isinstance(mask, torch.Tensor)
    for f in (
        lambda x: x[:, :, :2], lambda x: ~x, lambda x: x.to(torch.float32), lambda x: torch.where(x, 0.0, -1.0),
        lambda x: x.clone(), lambda x: copy.deepcopy(x), lambda x: x.all(), lambda x: torch.cat([x, x]),
        lambda x: torch.zeros(2, 1, 3, 3).masked_fill(x, 1.0), lambda x: 1.0 + x, lambda x: x.contiguous(),
        lambda x: pickle.loads(pickle.dumps(x)), lambda x: x.mT, lambda x: torch.tensor(x.tolist()),
    ):  # fmt: skip
        assert type(f(mask)) is torch.Tensor
        assert torch.equal(f(mask), f(dense))
    table = torch.randn(7, 2, requires_grad=True)
    bias = LazyBias.of(table, accel.T5Buckets(True, 8), 4, 5)
    assert (bias.full, bias.shape) == ((1, 2, 4, 5), table.shape)
    scores = torch.zeros(1, 2, 4, 5)
    scores += bias
    (scores * torch.arange(20.0).view(4, 5)).sum().backward()
    assert float(table.grad.sum()) == 2 * 190
    assert repr(bias) == "LazyBias(1, 2, 4, 5)"


# --- imports ---

STUB = """
class {name}:
    known = {{}}
    @classmethod
    def register(cls, key, value):
        cls.known[key] = value
"""
HALF_WAY = """
import transformers.masking_utils as m
import accel
import transformers.modeling_utils as a
assert set(a.AttentionInterface.known) == set(m.AttentionMaskInterface.known) == {"accel"}
assert a.AttentionInterface.known["accel"].__module__ == "accel.patches.transformers_interface"
import inspect
assert "register" in inspect.getsource(a)
print("registered")
"""
ROOT = Path(__file__).resolve().parents[2]


def run(code, *paths):
    search = [*map(str, paths), str(ROOT)]
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {search}\n{code}"], capture_output=True, text=True
    )


def test_one_registry_before_and_one_after(tmp_path):
    folder = tmp_path / "transformers"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "modeling_utils.py").write_text(STUB.format(name="AttentionInterface"))
    (folder / "masking_utils.py").write_text(STUB.format(name="AttentionMaskInterface"))
    child = run(HALF_WAY, tmp_path)
    assert child.stdout == "registered\n", child.stderr[-2000:]


@pytest.fixture
def waiting(tmp_path, monkeypatch):
    """A finder that waits for modules of a folder, and what it has registered in."""
    seen = []

    def register(module):
        seen.append(module.__name__)
        module.AttentionInterface.register("accel", seen)

    names = {f"waited_for_{i}": register for i in range(3)}
    monkeypatch.setattr(integrations, "_REGISTRIES", names)
    others = [finder for finder in sys.meta_path if not isinstance(finder, integrations._Waiting)]
    monkeypatch.setattr(sys, "meta_path", [integrations._Waiting(), *others])
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path, seen
    for name in names:
        sys.modules.pop(name, None)


def test_an_import_is_never_broken(waiting):
    folder, seen = waiting
    (folder / "waited_for_0.py").write_text(STUB.format(name="AttentionInterface"))
    (folder / "waited_for_1.py").write_text("value = 1\n")  # a version without the registry
    found = importlib.import_module("waited_for_0")
    assert found.AttentionInterface.known == {"accel": ["waited_for_0"]}
    assert "exec_module" not in vars(found.__spec__.loader)
    assert importlib.reload(found).AttentionInterface.known
    assert importlib.import_module("waited_for_1").value == 1
    assert seen == ["waited_for_0", "waited_for_0", "waited_for_1"]
    assert importlib.util.find_spec("waited_for_2") is None
    with pytest.raises(ModuleNotFoundError, match="waited_for_2"):
        importlib.import_module("waited_for_2")
    (folder / "waited_for_2.py").write_text("raise RuntimeError('its own fault')\n")
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError, match="its own fault"):
        importlib.import_module("waited_for_2")


def test_registering_is_repeatable():
    before = len(sys.meta_path)
    integrations.install()
    integrations.install()
    assert len(sys.meta_path) <= before + 1
    assert masking_utils.__name__ == transformers_rules.MASKING
