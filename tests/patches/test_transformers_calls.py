"""transformers: what one call of a switched attention asks for, and what becomes of what the op does not know."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from _transformers_models import (
    IDS,
    IMAGE,
    LEFT,
    MODELS,
    PICTURE,
    RIGHT,
    TEXT,
    assert_same,
    bert,
    llama,
    randomize,
    siglip,
    text,
)
from _transformers_odd import SEQ2SEQ, SOUND, inkling2
from transformers.models.bert import modeling_bert

import accel
from accel.patches import transformers_interface

pytestmark = pytest.mark.usefixtures("on_reference")


# --- attention weights ---

FRAMES = {"pixel_values": torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


def videomae():
    config = transformers.VideoMAEConfig(**IMAGE, num_frames=2, tubelet_size=1)
    return transformers.VideoMAEModel(config)


def aimv2():
    return transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**IMAGE))


HANDED_ON = {
    "SigLIP, vision": (lambda: siglip().vision_model, PICTURE),
    "SigLIP, text": (lambda: siglip().text_model, text(None)),
    "VideoMAE": (videomae, FRAMES),
    "AIMv2": (aimv2, PICTURE),
    "ViT": (MODELS["ViT"][0], PICTURE),
    "BERT": (bert, text(RIGHT)),
}


def eager(make):
    model = randomize(make())
    model.set_attn_implementation("eager")
    return model


def same_weights(found, expected, mask):
    assert len(found) == len(expected) == 2
    for a, b in zip(found, expected, strict=True):
        if mask is not None:
            a, b = a.transpose(1, 2)[mask.bool()], b.transpose(1, 2)[mask.bool()]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HANDED_ON)
def test_weights_are_given_whether_or_not_a_class_hands_the_wish_on(name):
    make, inputs = HANDED_ON[name]
    model = eager(make)
    expected = model(**inputs, output_attentions=True).attentions
    report = accel.patch(model, ops="softmax_attention", skip=torch.nn.MultiheadAttention)
    same_weights(model(**inputs, output_attentions=True).attentions, expected, inputs.get("attention_mask"))
    rows = report.replaced
    assert all(row.fallbacks == {"attention weights are asked for": 1} and not row.calls for row in rows), str(report)
    model(**inputs)
    assert all(row.calls == 1 for row in rows), "the next call does not ask"


@pytest.mark.parametrize("name", ["SigLIP, text", "BERT", "ViT"])
def test_a_configuration_may_ask_for_weights(name):
    make, inputs = HANDED_ON[name]
    model = eager(make)
    expected = model(**inputs, output_attentions=True).attentions
    report = accel.patch(model, ops="softmax_attention", skip=torch.nn.MultiheadAttention)
    model.config.output_attentions = True
    same_weights(model(**inputs).attentions, expected, inputs.get("attention_mask"))
    assert all(not row.calls for row in report.replaced)
    model.config.output_attentions = False
    model(**inputs)
    assert all(row.calls == 1 for row in report.replaced)
    model.config.output_attentions = True
    accel.unpatch(model)
    same_weights(model(**inputs).attentions, expected, inputs.get("attention_mask"))


def test_a_configuration_may_ask_by_name_too(tmp_path):
    model = randomize(bert())
    model.set_attn_implementation("accel")
    model.config.output_attentions = True
    assert model(IDS).attentions[0].shape == (3, 4, 9, 9)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="accel")
    assert len(again(IDS).attentions) == 2
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="not supported"):
        model.config.output_attentions = True


def test_a_compiled_model_gives_weights():
    model = eager(bert)
    expected = model(**text(RIGHT), output_attentions=True).attentions
    accel.patch(model)
    model.compile(backend="eager")
    with torch.no_grad():
        same_weights(model(**text(RIGHT), output_attentions=True).attentions, expected, RIGHT)


# --- keywords ---


def speech_to_text():
    config = transformers.Speech2TextConfig(**SEQ2SEQ, input_feat_per_channel=16, conv_channels=8, num_conv_layers=1,
        conv_kernel_sizes=[3])  # fmt: skip
    return transformers.Speech2TextForConditionalGeneration(config)


SPOKEN = {"input_features": SOUND["input_features"][:, :20], "decoder_input_ids": IDS}


@pytest.mark.parametrize("extra", ["token_type_ids", "decoder_attention_ids", "decoder_input_ids"])
@pytest.mark.parametrize(("make", "inputs"), [(llama, text(LEFT)), (speech_to_text, SPOKEN)])
def test_what_eager_does_not_read_is_not_read_here(make, inputs, extra):
    model = eager(make)
    expected = model(**inputs).logits
    report = accel.patch(model)
    assert_same([model(**{extra: torch.zeros_like(IDS), **inputs}).logits], [expected])
    assert all(row.calls == 1 and not row.fallbacks for row in report.rows)


def test_what_eager_reads_and_the_op_does_not_know_goes_to_the_class(monkeypatch, caplog):
    plain = modeling_bert.eager_attention_forward

    def twisting(module, query, key, value, attention_mask, scaling=None, dropout=0.0, twist=None, **kwargs):
        out, weights = plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout)
        return (out if twist is None else out * twist), weights

    def taking(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        return twisting(module, query, key, value, attention_mask, scaling, dropout, twist=kwargs.get("twist"))

    for function in (twisting, taking):
        monkeypatch.setattr(modeling_bert, "eager_attention_forward", function)
        monkeypatch.setattr("accel.patches.transformers_classes._read", {})
        model = eager(bert)
        expected = model(**text(RIGHT), twist=2.0).logits
        report = accel.patch(model)
        torch.testing.assert_close(model(**text(RIGHT), twist=2.0).logits, expected)
        reason = "it passes twist to its attention, which the op does not know"
        assert all(row.fallbacks == {reason: 1} and not row.calls for row in report.rows)
        assert reason in caplog.text
        assert float((model(**text(RIGHT)).logits - expected).detach().abs().max()) > 1e-3
        assert all(row.calls == 1 for row in report.rows)


def test_the_function_that_a_class_names_is_its_eager_one():
    from transformers.models.llama4 import modeling_llama4
    from transformers.models.timesfm import modeling_timesfm

    from accel.patches.transformers_classes import eager_function, read_by_eager

    assert eager_function(modeling_llama4.Llama4VisionAttention) is modeling_llama4.vision_eager_attention_forward
    assert eager_function(modeling_timesfm.TimesFmAttention) is modeling_timesfm.simple_eager_attention_forward
    assert eager_function(torch.nn.Linear) is None
    assert read_by_eager(torch.nn.Linear) is None
    reads = read_by_eager(modeling_llama4.Llama4VisionAttention)
    assert {"scaling", "dropout"} <= reads
    assert not {"position_bias", "token_type_ids"} & reads


def test_a_sink_for_each_query():
    model = randomize(inkling2())
    model.set_attn_implementation("eager")
    inputs = text(LEFT)
    expected = model(**inputs, use_cache=False).logits
    report = accel.patch(model)
    found = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(found[LEFT.bool()], expected[LEFT.bool()], rtol=1e-4, atol=2e-5)
    rows = [row for row in report.replaced if row.old_class.endswith("Attention")]
    assert len(rows) == 2
    assert all(row.calls and not row.fallbacks for row in rows), str(report)


def bridgetower():
    config = {"share_cross_modal_transformer_layers": True, "hidden_size": 32, "num_attention_heads": 4,
              "num_hidden_layers": 2, "text_config": TEXT,
              "vision_config": {**IMAGE, "hidden_size": 64}}  # fmt: skip
    return transformers.BridgeTowerModel(transformers.BridgeTowerConfig(**config))


def test_encoders_that_are_called_causal_see_everything():
    model = eager(bridgetower)
    inputs = {**text(RIGHT), "pixel_values": PICTURE["pixel_values"].repeat(2, 1, 1, 1)[:3]}
    expected = model(**inputs)
    report = accel.patch(model, skip=torch.nn.MultiheadAttention)
    found = model(**inputs)
    assert_same([found.image_features, found.pooler_output], [expected.image_features, expected.pooler_output])
    assert report.replaced
    assert not report.uncalled()


def test_pages_of_several_requests_are_refused():
    q = torch.zeros(1, 1, 2, 8)
    module = randomize(bert()).bert.encoder.layer[0].attention.self

    class PagedAttentionCache:
        pass

    for extra in ({"cache": PagedAttentionCache()}, {"read_index": [q]}, {"block_table": q}, {"indices": q}):
        with pytest.raises(NotImplementedError, match=f"BertSelfAttention passes {next(iter(extra))}="):
            transformers_interface.attention(module, q, q, q, None, **extra)
    out, _ = transformers_interface.attention(module, q, q, q, None, cache=object(), scaling=1.0)
    assert out.shape == (1, 2, 1, 8)


# --- tracing ---


@pytest.mark.parametrize("make", [bert, llama])
def test_a_traced_model_is_the_class(make):
    model = eager(make).requires_grad_(False)
    model.config.use_cache = False
    expected = model(IDS, attention_mask=LEFT).logits
    report = accel.patch(model)
    with pytest.warns():
        traced = torch.jit.trace(model, (IDS, LEFT), strict=False, check_trace=False)
    torch.testing.assert_close(traced(IDS, LEFT)["logits"], expected, rtol=1e-4, atol=2e-5)
    assert all(row.fallbacks == {"torch.jit.trace records the class's own operations": 1} for row in report.rows)
