"""Tiny random-weight models of transformers' real classes, and inputs with padding."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

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


def randomize(model, deviation=0.2):
    """Every parameter away from its initial value: tables and sinks that start at zero hide mistakes."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, deviation)
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


def checkpointing(model, options=None):
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(options)
