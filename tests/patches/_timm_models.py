"""Attention of timm, torchvision's MaxViT and transformers' SAM, alone and in models, small enough for float64."""

from functools import partial

import pytest
import torch
from _attention_models import noise
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from timm.layers.attention2d import Attention2d, MultiQueryAttention2d
from timm.layers.pos_embed_rel import RelPosBias, RelPosBiasTf, RelPosMlp
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models import (
    convit,
    cpubone,
    davit,
    efficientformer,
    efficientformer_v2,
    fastvit,
    gcvit,
    gemma4_vit,
    hiera,
    hieradet_sam2,
    iformer,
    levit,
    lowformer,
    maxxvit,
    metaformer,
    mvitv2,
    nest,
    nextvit,
    pvt_v2,
    shvit,
    swin_transformer_v2_cr,
    tiny_vit,
    tnt,
    twins,
    visformer,
    vision_transformer_relpos,
    vision_transformer_sam,
    volo,
)
from torchvision.models import maxvit


class With(nn.Module):
    """A module that is called with more than tensors."""

    def __init__(self, module, **given):
        super().__init__()
        self.module, self.given = module, given

    def forward(self, *tensors):
        return self.module(*tensors, **self.given)


class First(nn.Module):
    """A module that returns more than its output."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *tensors):
        return self.module(*tensors)[0]


# A map of 4 x 3 places with 16 channels: in tokens, with channels last and first. One of 5 x 4, which strides leave.
TOKENS, LAST, MAP = (2, 12, 16), (2, 4, 3, 16), (2, 16, 4, 3)
MORE_TOKENS, MORE, MORE_LAST = (2, 20, 16), (2, 16, 5, 4), (2, 5, 4, 16)
WINDOW = {"window_size": (4, 3)}
MLP = partial(RelPosMlp, **WINDOW, hidden_dim=8)
BIAS = partial(RelPosBias, **WINDOW)
TF = partial(RelPosBiasTf, **WINDOW)


def rel_pos(rel_pos_cls=None):
    return vision_transformer_relpos.RelPosAttention(16, 2, qkv_bias=True, qk_norm=True, rel_pos_cls=rel_pos_cls)


def channels_last(rel_pos_cls=None, **options):
    return maxxvit.AttentionCl(16, dim_head=8, rel_pos_cls=rel_pos_cls, **options)


def on_map(rel_pos_cls=None, **options):
    return maxxvit.Attention2d(16, dim_head=8, rel_pos_cls=rel_pos_cls, **options)


def sam(**options):
    return vision_transformer_sam.Attention(16, 2, **options)


def sam_with_rope():
    rope = RotaryEmbeddingCat(8, in_pixels=False, feat_shape=(4, 3))
    return sam(rope=rope)


def mvit(**options):
    return First(With(mvitv2.MultiScaleAttention(16, 16, (4, 4), num_heads=2, **options), feat_size=(4, 4)))


def transformers_sam(model, name, **options):
    transformers = pytest.importorskip("transformers")
    models = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    config = transformers.SamVisionConfig(hidden_size=16, num_attention_heads=2, image_size=32, patch_size=8, **options)
    return First(getattr(models, name)(config, 0))


def seggpt():
    models = pytest.importorskip("transformers.models.seggpt.modeling_seggpt")
    config = models.SegGptConfig(hidden_size=16, num_attention_heads=2, image_size=(32, 32), patch_size=8)
    return First(models.SegGptAttention(config))


# name: module, shapes of its inputs
MODULES = {
    "RelPos": (rel_pos, (TOKENS,)),
    "RelPos, bias and a class token": (lambda: rel_pos(partial(BIAS, prefix_tokens=1)), ((2, 13, 16),)),
    "RelPos, MLP and a class token": (lambda: rel_pos(partial(MLP, prefix_tokens=1)), ((2, 13, 16),)),
    "RelPos, MLP as in Swin v2": (lambda: rel_pos(partial(MLP, mode="swin")), (TOKENS,)),
    "RelPos, one bias for all": (rel_pos, (TOKENS, (1, 2, 12, 12))),
    "MaxViT": (lambda: channels_last(BIAS), (LAST,)),
    "MaxViT, TensorFlow's": (lambda: channels_last(TF, head_first=False), (LAST,)),
    "MaxViT, tokens": (channels_last, (TOKENS, (1, 2, 12, 12))),
    "CoAtNet": (lambda: on_map(MLP), (MAP,)),
    "CoAtNet, TensorFlow's": (lambda: on_map(TF, head_first=False, dim_out=24, expand_first=False), (MAP,)),
    "CoAtNet, one bias for all": (on_map, (MAP, (1, 2, 12, 12))),
    "GCViT": (lambda: gcvit.WindowAttentionGlobal(16, 2, (4, 3), use_global=False), ((4, 12, 16),)),
    "GCViT, global": (lambda: gcvit.WindowAttentionGlobal(16, 2, (4, 3)), ((4, 12, 16), TOKENS)),
    "TinyViT": (lambda: tiny_vit.Attention(16, 8, 2, attn_ratio=1, resolution=(4, 3)), (TOKENS,)),
    "LeViT": (lambda: levit.Attention(16, 8, 2, 2.0, resolution=(4, 3)), (TOKENS,)),
    "LeViT, map": (lambda: levit.Attention(16, 8, 2, 2.0, resolution=(4, 3), use_conv=True), (MAP,)),
    "LeViT, down": (lambda: levit.AttentionDownsample(16, 24, 8, 2, resolution=(5, 4)), (MORE_TOKENS,)),
    "LeViT, down, map": (
        lambda: levit.AttentionDownsample(16, 24, 8, 2, resolution=(5, 4), use_conv=True), (MORE,),
    ),
    "EfficientFormer": (lambda: efficientformer.Attention(16, 8, 2, 2, resolution=(4, 3)), (TOKENS,)),
    "EfficientFormer v2, down": (
        lambda: efficientformer_v2.Attention2dDownsample(16, 8, 2, 2, resolution=(5, 4)), (MORE,),
    ),
    "SAM": (lambda: sam(use_rel_pos=True, input_size=(4, 3)), (LAST,)),
    "SAM, another size": (lambda: sam(use_rel_pos=True, input_size=(3, 5), qk_norm=True), (LAST,)),
    "SAM, no positions": (sam, (LAST,)),
    "SAM, rotary": (sam_with_rope, (LAST,)),
    "MViTv2": (lambda: mvit(stride_kv=(2, 2), kernel_kv=(3, 3)), ((2, 17, 16),)),
    "MViTv2, fewer queries": (
        lambda: mvit(stride_q=(2, 2), kernel_q=(3, 3), has_cls_token=False, residual_pooling=False), ((2, 16, 16),),
    ),
    "MViTv2, no positions": (lambda: mvit(rel_pos_type="", kernel_q=(3, 3)), ((2, 17, 16),)),
    "ConViT": (lambda: convit.MHSA(16, 2), (TOKENS,)),
    "MetaFormer": (lambda: metaformer.Attention(16, head_dim=8), (TOKENS,)),
    "VOLO": (lambda: volo.Attention(16, 2), (LAST,)),
    "FastViT": (lambda: fastvit.Attention(16, head_dim=8), (MAP,)),
    "Visformer": (lambda: visformer.Attention(16, 2), (MAP,)),
    "on a map": (lambda: Attention2d(16, num_heads=2), (MAP,)),
    "on a map, head first": (lambda: Attention2d(16, num_heads=2, head_first=True), (MAP,)),
    "many queries": (lambda: MultiQueryAttention2d(16, num_heads=2), (MAP,)),
    "many queries, strides": (
        lambda: MultiQueryAttention2d(16, num_heads=2, key_dim=16, query_strides=2, kv_stride=2), ((2, 16, 6, 4),),
    ),
    "TNT": (lambda: tnt.Attention(16, 32, 2), (TOKENS,)),
    "DaViT": (lambda: davit.WindowAttention(16, (4, 3), 2), (TOKENS,)),
    "NesT": (lambda: nest.Attention(16, 2, qkv_bias=True), ((2, 3, 5, 16),)),
    "Twins, windows": (lambda: With(twins.LocallyGroupedAttn(16, 2, ws=3), size=(5, 4)), (MORE_TOKENS,)),
    "Twins, fewer keys": (lambda: With(twins.GlobalSubSampleAttn(16, 2, sr_ratio=2), size=(5, 4)), (MORE_TOKENS,)),
    "Twins, all keys": (lambda: With(twins.GlobalSubSampleAttn(16, 2), size=(5, 4)), (MORE_TOKENS,)),
    "PVT v2": (lambda: With(pvt_v2.Attention(16, 2, sr_ratio=2), feat_size=(5, 4)), (MORE_TOKENS,)),
    "PVT v2, linear": (lambda: With(pvt_v2.Attention(16, 2, linear_attn=True), feat_size=(5, 4)), (MORE_TOKENS,)),
    "NextViT": (lambda: nextvit.EfficientAttention(16, head_dim=8, sr_ratio=2), (TOKENS,)),
    "Hiera, windows": (
        lambda: hiera.MaskUnitAttention(16, 32, 4, q_stride=2, window_size=4, use_mask_unit_attn=True), ((2, 24, 16),),
    ),
    "Hiera": (lambda: hiera.MaskUnitAttention(16, 32, 4, q_stride=2), (TOKENS,)),
    "SAM 2": (lambda: hieradet_sam2.MultiScaleAttention(16, 32, 4, q_pool=nn.MaxPool2d(2)), (MORE_LAST,)),
    "SAM 2, no pool": (lambda: hieradet_sam2.MultiScaleAttention(16, 16, 2), (MORE_LAST,)),
    "SHViT": (lambda: shvit.SHSA(24, 8, 16), ((2, 24, 4, 3),)),
    "iFormer": (lambda: iformer.SHMA(16), (MAP,)),
    "iFormer, windows": (lambda: iformer.SHMA(16, window_size=3), (MORE,)),
    "LowFormer": (lambda: lowformer.ConvAttention(32, att_stride=2, att_kernel=3), ((2, 32, 5, 4),)),
    "CPUBone": (lambda: cpubone.ConvAttention(32, 0.5, att_stride=2, small_kernels=True), ((2, 32, 5, 4),)),
    "Gemma 4": (
        lambda: gemma4_vit.Gemma4Attention(16, 2, 8, num_kv_heads=1),
        (TOKENS, (2, 12, 8), (2, 12, 8), (2, 1, 12, 12)),
    ),
    "torchvision MaxViT": (lambda: maxvit.RelativePositionalMultiHeadAttention(16, 8, 9), ((2, 3, 9, 16),)),
    "transformers SAM": (lambda: transformers_sam("sam", "SamVisionAttention"), (LAST,)),
    "transformers SAM, sdpa": (lambda: transformers_sam("sam", "SamVisionSdpaAttention"), (LAST,)),
    "transformers SAM, no positions": (
        lambda: transformers_sam("sam", "SamVisionAttention", use_rel_pos=False), (LAST,),
    ),
    "transformers SAM-HQ": (lambda: transformers_sam("sam_hq", "SamHQVisionSdpaAttention"), (LAST,)),
    "SegGPT": (seggpt, (LAST,)),
}  # fmt: skip


def maxxvit_model(block_type, **options):
    options = {"dim_head": 8, "window_size": (4, 2), "rel_pos_dim": 8, **options}
    cfg = maxxvit.MaxxVitCfg(
        embed_dim=(16,) * len(block_type),
        depths=(1,) * len(block_type),
        block_type=block_type,
        stem_width=8,
        transformer_cfg=maxxvit.MaxxVitTransformerCfg(**options),
    )
    return maxxvit.MaxxVit(cfg, img_size=(32, 16) if len(block_type) == 1 else (32, 24), num_classes=5)


def transformers_sam_model(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.SamVisionConfig(
        hidden_size=16, num_attention_heads=2, image_size=24, patch_size=4, num_hidden_layers=2, window_size=4,
        global_attn_indexes=[1], output_channels=8, mlp_dim=16, **options,
    )  # fmt: skip
    return transformers.SamVisionModel(config)


SWIN_CR = {"patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}
TWINS = {"embed_dims": (16, 16), "num_heads": (2, 2), "mlp_ratios": (1, 1), "depths": (2, 2), "num_classes": 5}

# name: model, size of its image, modules that are replaced
MODELS = {
    "SwinV2-CR": (lambda: swin_transformer_v2_cr.SwinTransformerV2Cr(img_size=(26, 22), **SWIN_CR), (26, 22), 4),
    "SwinV2-CR, any size": (
        lambda: swin_transformer_v2_cr.SwinTransformerV2Cr(
            img_size=(26, 22), dynamic_img_size=True, always_partition=True, **SWIN_CR
        ),
        (30, 18),
        4,
    ),
    "ViT with relative positions": (
        lambda: vision_transformer_relpos.VisionTransformerRelPos(
            img_size=(16, 12), patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5, class_token=True,
            global_pool="token", rel_pos_type="bias", block_fn=vision_transformer_relpos.ResPostRelPosBlock,
        ),
        (16, 12),
        2,
    ),
    "ViT with one bias for all": (
        lambda: vision_transformer_relpos.VisionTransformerRelPos(
            img_size=(16, 12), patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5, shared_rel_pos=True,
            rel_pos_type="mlp", rel_pos_dim=8,
        ),
        (16, 12),
        2,
    ),
    "MaxViT": (lambda: maxxvit_model(("M",)), (32, 16), 2),
    "MaxViT, maps": (lambda: maxxvit_model(("M",), use_nchw_attn=True, rel_pos_type="mlp"), (32, 16), 2),
    "MaxViT, parallel": (lambda: maxxvit_model(("PM",), rel_pos_type="bias_tf"), (32, 16), 2),
    "CoAtNet": (lambda: maxxvit_model(("C", "T"), rel_pos_type="bias_tf"), (32, 24), 1),
    "TinyViT": (
        lambda: tiny_vit.TinyVit(
            embed_dims=(8, 16), depths=(1, 2), num_heads=(1, 2), window_sizes=(4, 3), drop_path_rate=0.0,
            num_classes=5,
        ),
        (40, 32),
        2,
    ),
    "NesT": (
        lambda: nest.Nest(
            img_size=16, patch_size=2, num_levels=2, embed_dims=(16, 16), num_heads=(2, 2), depths=(1, 1),
            drop_path_rate=0.0, num_classes=5,
        ),
        (16, 16),
        2,
    ),
    "Twins-PCPVT": (lambda: twins.Twins(img_size=(32, 24), sr_ratios=(4, 2), **TWINS), (32, 24), 4),
    "Twins-SVT": (lambda: twins.Twins(img_size=(32, 24), sr_ratios=(4, 2), wss=(3, 3), **TWINS), (32, 24), 4),
    "Hiera": (
        lambda: hiera.Hiera(
            img_size=(64, 32), embed_dim=16, num_heads=2, num_classes=5, stages=(1, 1, 1, 1),
        ),
        (64, 32),
        4,
    ),
    "SAM": (
        lambda: vision_transformer_sam.VisionTransformerSAM(
            img_size=24, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5, use_rel_pos=True,
            window_size=4, global_attn_indexes=(1,), neck_chans=8,
        ),
        (24, 24),
        2,
    ),
    "torchvision MaxViT": (
        lambda: maxvit.MaxVit((16, 16), 8, 2, [16, 16], [1, 1], 8, 0.0, num_classes=5), (16, 16), 4,
    ),
    "transformers SAM": (transformers_sam_model, (24, 24), 2),
}  # fmt: skip


def module_inputs(name, dtype=torch.float64):
    return [noise(*shape, seed=i).to(dtype) for i, shape in enumerate(MODULES[name][1])]
