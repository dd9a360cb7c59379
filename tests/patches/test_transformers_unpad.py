"""Flattened batches of transformers: models whose positions mix are refused, all others give the padded numbers."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from _transformers_models import (
    BATCH,
    DECODER,
    GAPS,
    IDS,
    IMAGE,
    LENGTH,
    RIGHT,
    TEXT,
    assert_same,
    assert_same_gradients,
    bert,
    gemma2,
    gpt_oss,
    gradients,
    llama,
    modernbert,
    outputs,
    qwen3,
    randomize,
    text,
)
from _unpad_models import BOTH, MIXTURES, padded

import accel

pytestmark = pytest.mark.usefixtures("on_reference")


def assert_flattens(model, inputs):
    """Outputs and gradients of the flattened batch are those of the padded one."""
    randomize(model)
    expected, expected_gradients = gradients(model, inputs)
    report = accel.patch(model, unpad=True)
    found, found_gradients = gradients(model, inputs)
    assert_same(found, expected)
    assert_same_gradients(found_gradients, expected_gradients)
    assert (report.rows[-1].op, report.rows[-1].calls) == ("unpad", 1)


# --- positions that mix outside attention ---


def mobilebert():
    config = transformers.MobileBertConfig(**TEXT, embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16)
    return transformers.MobileBertModel(config)


def esm(**options):
    config = {**TEXT, "pad_token_id": 1, "mask_token_id": 4, "position_embedding_type": "rotary", **options}
    return transformers.EsmForMaskedLM(transformers.EsmConfig(**config))


@pytest.mark.parametrize("make", [mobilebert, lambda: esm(token_dropout=True)], ids=["MobileBERT", "ESM"])
def test_a_model_whose_positions_mix_is_refused(make):
    model = randomize(make())
    accel.patch(model, unpad=True)
    sentence = (
        r"(MobileBert|Esm)Model cannot run on flattened batches: on a trial of 12 tokens last_hidden_state differs "
        r"by up to \S+ of its size, on \d tokens, where rounding explains 1e-05; the tokens of one sequence change "
        "those of another: positions mix outside attention"
    )
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=sentence):
            model(**padded(model, RIGHT))
    accel.unpatch(model)
    model(**padded(model, RIGHT))


MIXERS = {
    "roll": lambda x: x + x.roll(1, 1),
    "pad": lambda x: x + nn.functional.pad(x, (0, 0, 0, 1))[:, 1:],
    "cumulative sum": lambda x: x.cumsum(1),
    "cumulative maximum": lambda x: x.cummax(1).values,
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "pooling": lambda x: nn.functional.avg_pool1d(x.mT, 3, 1, 1).mT,
    "sort": lambda x: x.sort(1).values,
    "length": lambda x: x * x.shape[1] ** 0.5,
    "a little": lambda x: x + 0.05 * x.roll(1, 1),
}


class Mixing(nn.Embedding):
    mix = None

    def forward(self, ids):
        return self.mix(super().forward(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MIXERS)
def test_mixing_of_any_kind_is_seen(name, dtype):
    model = llama()
    model.model.embed_tokens = Mixing(50, 32)
    model.model.embed_tokens.mix = MIXERS[name]
    randomize(model).to(dtype)
    accel.patch(model, unpad=True)
    with pytest.raises(NotImplementedError, match="LlamaModel cannot run on flattened batches: on a trial of 12"):
        model(**text(RIGHT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("make", [llama, gpt_oss, bert, gemma2], ids=["Llama", "GPT-OSS", "BERT", "Gemma2"])
def test_rounding_is_not_taken_for_mixing(make, dtype):
    model = randomize(make()).to(dtype)
    report = accel.patch(model, unpad=True)
    model(**text(RIGHT))
    assert report.rows[-1].calls == 1


def test_rounding_under_autocast_is_not_taken_for_mixing():
    """And what is cast for the trial has no gradient, so the call may not find it in autocast's cache."""
    model = randomize(llama()).train()
    report = accel.patch(model, unpad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**text(RIGHT)).logits.sum().backward()
    assert report.rows[-1].calls == 1
    assert all(p.grad is not None for p in model.parameters())


# --- models that are proven ---

FAMILIES = {
    "BERT": bert,
    "RoBERTa": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**{**TEXT, "pad_token_id": 1})),
    "ESM": esm,
    "ESM, absolute": lambda: esm(position_embedding_type="absolute"),
    "OPT": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**{**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1, "dropout": 0})
    ),
    "BioGPT": lambda: transformers.BioGptForCausalLM(transformers.BioGptConfig(**{**DECODER, "pad_token_id": 1})),
    "ModernBERT": modernbert,
    "Llama": llama,
    "Qwen3": qwen3,
    "GPT-OSS": gpt_oss,
    "Gemma2": gemma2,
}
WINDOWS = ("ModernBERT", "Qwen3", "GPT-OSS", "Gemma2")


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_on_both_sides(name):
    model = FAMILIES[name]()
    assert_flattens(model, padded(model, BOTH))


@pytest.mark.parametrize("name", FAMILIES)
def test_gaps(name):
    model = randomize(FAMILIES[name]())
    inputs = padded(model, GAPS)
    expected = outputs(model, inputs)
    accel.patch(model, unpad=True)
    if name in WINDOWS:
        with pytest.raises(ValueError, match="padding stands between real tokens, where a sliding window"):
            model(**inputs)
        return
    assert_same(outputs(model, inputs), expected)


@pytest.mark.parametrize("name", ["BERT", "Llama", "Qwen3", "GPT-OSS"])
def test_a_row_of_padding_alone(name):
    model = randomize(FAMILIES[name]())
    mask = RIGHT.clone()
    mask[1] = 0
    expected = outputs(model, padded(model, mask))
    report = accel.patch(model, unpad=True)
    assert_same(outputs(model, padded(model, mask)), expected)
    model(IDS, attention_mask=torch.zeros_like(IDS))
    assert report.rows[-1].fallbacks == {"no token is real": 1}


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "OPT", "Llama"])
@pytest.mark.parametrize("positions", [False, True], ids=["own positions", "given positions"])
def test_embeddings_in_place_of_ids(name, positions):
    model = randomize(FAMILIES[name]())
    embeds = torch.randn(BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(4))
    inputs = {"inputs_embeds": embeds, "attention_mask": BOTH}
    if positions:
        inputs["position_ids"] = torch.arange(2, LENGTH + 2)[None]
    expected = outputs(model, inputs)
    accel.patch(model, unpad=True)
    assert_same(outputs(model, inputs), expected)


def test_each_kind_of_call_is_proven_once(monkeypatch):
    model = randomize(bert())
    report = accel.patch(model, unpad=True)
    rows = []
    forward = type(model.bert.encoder).forward
    monkeypatch.setattr(
        type(model.bert.encoder), "forward", lambda self, x, *a, **k: rows.append(len(x)) or forward(self, x, *a, **k)
    )
    kinds = torch.zeros_like(IDS)
    kinds[:, 4:] = 1
    for inputs in ({}, {}, {"token_type_ids": kinds}, {}, {"token_type_ids": kinds}):
        rows.clear()
        model(**text(RIGHT), **inputs)
        assert rows[-1] == 1
    assert len(model.bert.forward.proven) == 2
    assert rows == [1], "a trial for each kind of call, and no more"
    assert report.rows[-1].calls == 5


# --- mixtures of experts ---


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("mask", [RIGHT, BOTH], ids=["right", "both"])
def test_the_auxiliary_loss_is_that_of_the_padded_model(name, mask):
    model = randomize(MIXTURES[name]())
    behind_padding = torch.nn.functional.pad(mask[:, :-1] == 0, (1, 0))  # what would predict these tokens is padding
    labels = IDS.masked_fill((mask == 0) | behind_padding, -100)
    inputs = {**padded(model, mask), "labels": labels, "output_router_logits": True}

    def run():
        model.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, expected_gradients = run()
    report = accel.patch(model, unpad=True)
    found, found_gradients = run()
    assert report.rows[-1].calls == 1
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss, rtol=1e-5, atol=1e-6)
    assert_same_gradients(found_gradients, expected_gradients)
    real = mask.bool().flatten()
    for a, b in zip(found.router_logits, expected.router_logits, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=2e-5)
        assert not a[~real].any()


def test_outputs_are_asked_for_in_any_order():
    model = randomize(MIXTURES["Mixtral"]())
    expected = model(**text(RIGHT), output_router_logits=True, output_hidden_states=True)
    accel.patch(model, unpad=True)
    model(**text(RIGHT))
    found = model(**text(RIGHT), output_router_logits=True, output_hidden_states=True)
    assert [x.shape for x in found.router_logits] == [x.shape for x in expected.router_logits]
    assert [x.shape for x in found.hidden_states] == [x.shape for x in expected.hidden_states]
    model.config.output_router_logits = True
    torch.testing.assert_close(model(**text(RIGHT)).aux_loss, expected.aux_loss)


def test_a_mask_that_no_layer_reads_refuses_nothing():
    """Qwen2-MoE always makes a mask of windows of no width; only its layers with windows would read it."""
    model = MIXTURES["Qwen2-MoE"]()
    assert_flattens(model, padded(model, GAPS))


def test_a_projection_that_pools():
    """ALBERT applies it to the first token itself."""
    config = transformers.AlbertConfig(**TEXT, embedding_size=16)
    model = randomize(transformers.AlbertForSequenceClassification(config))
    expected = model(**padded(model, RIGHT)).logits
    accel.patch(model, unpad=True)
    assert_same([model(**padded(model, RIGHT)).logits], [expected])


# --- what wraps a model ---


class Adapted(nn.Module):
    """As PEFT wraps a model: what it lacks is looked up in the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Outer(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.base_model = Adapted(model)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


def test_a_wrapped_model_is_found():
    model = Outer(randomize(llama()))
    expected = outputs(model, text(BOTH))
    report = accel.patch(model, unpad=True)
    assert report.rows[-1].name == "base_model.model.model"
    assert_same(outputs(model, text(BOTH)), expected)


# --- models of text beside pictures ---


def llava():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**DECODER), vision_config=transformers.CLIPVisionConfig(**IMAGE)
    )
    return transformers.LlavaForConditionalGeneration(config)


def test_text_alone_in_a_model_of_pictures():
    """The convolutions of its vision tower mix no tokens; a call with pictures is refused."""
    model = randomize(llava())
    inputs = {"input_ids": IDS, "attention_mask": BOTH}
    expected = outputs(model, inputs)
    report = accel.patch(model, unpad=True)
    assert_same(outputs(model, inputs), expected)
    assert report.rows[-1].calls == 1
    with pytest.raises(
        NotImplementedError, match=r"LlavaModel .* pixel_values \(2, 3, 16, 16\) is not laid out as the tokens"
    ):
        model(**inputs, pixel_values=torch.zeros(2, 3, 16, 16))


def test_a_convolution_over_text_is_refused_at_once():
    config = transformers.ConvBertConfig(**TEXT, embedding_size=16, head_ratio=2, conv_kernel_size=3)
    with pytest.raises(NotImplementedError, match=r"depthwise is a Conv1d, which would mix sequences"):
        accel.patch(transformers.ConvBertModel(config), unpad=True, allow_none=True)


def test_the_loss_of_a_head_is_that_of_the_padded_batch():
    """Llama 4's calls itself its base; flattened, its labels would be shifted over the ends of sequences."""
    config = transformers.Llama4TextConfig(
        **DECODER, num_local_experts=2, intermediate_size_mlp=48, layer_types=["full_attention"] * 2
    )
    model = randomize(transformers.Llama4ForCausalLM(config))
    inputs = {**text(RIGHT), "labels": IDS.masked_fill(RIGHT == 0, -100)}
    expected = model(**inputs).loss
    report = accel.patch(model, unpad=True)
    torch.testing.assert_close(model(**inputs).loss, expected)
    assert (report.rows[-1].name, report.rows[-1].calls) == ("model", 1)
