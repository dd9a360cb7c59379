"""Tiny detectors of transformers with random weights, for float64 on the reference backend."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- models ---

RESNET = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "layer_type": "basic"}
STAGES = {"out_features": ["stage2", "stage3", "stage4"]}
DETR = {
    "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "num_queries": 5, "decoder_layers": 2,
}  # fmt: skip
HYBRID = {
    **DETR, "num_labels": 3, "encoder_hidden_dim": 32, "encoder_in_channels": [8] * 3, "decoder_in_channels": [32] * 3,
    "num_denoising": 0,
}  # fmt: skip
MASKS = {
    "hidden_dim": 32, "encoder_feedforward_dim": 48, "encoder_layers": 2, "num_attention_heads": 4,
    "dim_feedforward": 48, "num_queries": 5, "num_labels": 3,
}  # fmt: skip
LIGHT = {
    "d_model": 32, "decoder_ffn_dim": 48, "decoder_layers": 2, "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 4, "num_queries": 5, "group_detr": 2, "num_labels": 3, "dropout": 0.0,
}  # fmt: skip
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "out_indices": [1, 2]}


def deformable_detr(**options):
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.ResNetConfig(**RESNET, **STAGES), **DETR, encoder_layers=2, num_labels=3,
        dropout=0.0, **options,
    )  # fmt: skip
    return transformers.DeformableDetrForObjectDetection(config)


def rt_detr(name="RTDetr", **options):
    backbone = transformers.RTDetrResNetConfig(**RESNET, **STAGES)
    config = getattr(transformers, f"{name}Config")(backbone_config=backbone, **HYBRID, **options)
    return getattr(transformers, f"{name}ForObjectDetection")(config)


def d_fine(name="DFine", **options):
    """Levels with 3, 6 and 2 points."""
    backbone = transformers.HGNetV2Config(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, stem_channels=[3, 8, 8], stage_in_channels=[8] * 4,
        stage_mid_channels=[8] * 4, stage_out_channels=[8] * 4, stage_num_blocks=[1] * 4, stage_numb_of_layers=[1] * 4,
        **STAGES,
    )  # fmt: skip
    options = {"decoder_n_points": [3, 6, 2], **options}
    config = getattr(transformers, f"{name}Config")(backbone_config=backbone, **HYBRID, **options)
    return getattr(transformers, f"{name}ForObjectDetection")(config)


def swin(first=1):
    return transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, drop_path_rate=0.0,
        out_features=[f"stage{i}" for i in range(first, 5)],
    )  # fmt: skip


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=swin(), feature_size=32, mask_feature_size=32, decoder_layers=2, **MASKS
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def oneformer():
    config = transformers.OneFormerConfig(
        backbone_config=swin(), conv_dim=32, mask_dim=32, decoder_layers=3, task_seq_len=7, text_encoder_width=32,
        text_encoder_context_length=7, text_encoder_num_layers=1, text_encoder_vocab_size=50, text_encoder_n_ctx=1,
        dropout=0.0, **MASKS,
    )  # fmt: skip
    return transformers.OneFormerForUniversalSegmentation(config)


def grounding_dino(name="GroundingDino"):
    text = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=1100
    )
    config = getattr(transformers, f"{name}Config")(
        backbone_config=swin(2), text_config=text, **DETR, encoder_layers=2, max_text_len=8, dropout=0.0,
        fusion_droppath=0.0,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForObjectDetection")(config)


def lw_detr():
    backbone = transformers.LwDetrViTConfig(
        **VIT, image_size=64, pretrain_image_size=64, num_windows=4, window_block_indices=[0]
    )
    config = transformers.LwDetrConfig(backbone_config=backbone, projector_scale_factors=[2.0, 0.5], **LIGHT)
    return transformers.LwDetrForObjectDetection(config)


def rf_detr():
    backbone = transformers.RfDetrDinov2Config(**VIT, image_size=56, patch_size=14, num_windows=2)
    return transformers.RfDetrForObjectDetection(transformers.RfDetrConfig(backbone_config=backbone, **LIGHT))


PICTURE = {"pixel_values": noise(2, 3, 64, 32)}
SQUARE = {"pixel_values": noise(2, 3, 64, 64)}
PART = torch.ones(2, 64, 32, dtype=torch.long)
PART[1, :, 21:] = 0
PADDED = {**PICTURE, "pixel_mask": PART}
IDS = torch.tensor([[101, 7, 8, 1012, 102]] * 2)

# name: model, arguments, modules that are replaced
MODELS = {
    "Deformable DETR": (deformable_detr, PICTURE, 4),
    "Deformable DETR, padded, two stages": (
        lambda: deformable_detr(two_stage=True, with_box_refine=True, two_stage_num_proposals=5), PADDED, 4,
    ),
    "RT-DETR": (rt_detr, PICTURE, 2),
    "RT-DETRv2": (lambda: rt_detr("RTDetrV2", decoder_n_points=3), PICTURE, 2),
    "D-FINE": (d_fine, PICTURE, 2),
    "DEIMv2": (lambda: d_fine("Deimv2", decoder_n_points=3), PICTURE, 2),
    "Mask2Former": (mask2former, PICTURE, 2),
    "OneFormer": (
        oneformer,
        {**PICTURE, "task_inputs": torch.arange(14).view(2, 7) % 50},
        2,
    ),
    "Grounding DINO": (grounding_dino, {**PADDED, "input_ids": IDS}, 4),
    "MM Grounding DINO": (lambda: grounding_dino("MMGroundingDino"), {**PICTURE, "input_ids": IDS}, 4),
    "LW-DETR": (lw_detr, SQUARE, 2),
    "RF-DETR": (rf_detr, {"pixel_values": noise(2, 3, 56, 56)}, 2),
}  # fmt: skip


def randomize(model, dtype=torch.float64):
    """Every parameter away from its initial value: offsets start on the centres of pixels, where derivatives jump."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, std=0.2)
    return model.to(dtype).eval()


def build(name):
    make, inputs, count = MODELS[name]
    return randomize(make()), inputs, count


def floats(output):
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [x for value in values for x in floats(value)]


def gradients(model, inputs):
    model.zero_grad()
    out = [x for x in floats(model(**inputs)) if x.requires_grad]
    total = sum((x * noise(*x.shape, seed=9)).where(x.isfinite(), 0.0).mean() for x in out)
    total.backward()
    return [x.detach() for x in out], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def near(found, expected, limit):
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        error = float((found[name] - gradient).abs().max())
        assert error <= limit * max(float(gradient.abs().max()), 1e-3), f"{name}: {error}"


def same_outputs(found, expected, limit=1e-10):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)
