"""Swin models of torchvision, timm and transformers, small enough for float64 on one core."""

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("transformers")

import torchvision.models.swin_transformer as tv
import transformers
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from torchvision.models.video.swin_transformer import SwinTransformer3d
from transformers.models.clap.modeling_clap import ClapAudioConfig, ClapAudioEncoder
from transformers.models.donut.modeling_donut_swin import DonutSwinConfig, DonutSwinModel
from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinConfig, MaskFormerSwinModel

# Maps of 13 x 11 and 7 x 6: no multiple of any window here, and in the second stage smaller than the largest.
IMAGE = (26, 22)
SIZES = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}


def torchvision_v1(window=(4, 4), **options):
    return tv.SwinTransformer(
        [2, 2], 8, [2, 2], [2, 4], list(window), stochastic_depth_prob=0.0, num_classes=5, **options
    )


def torchvision_v2():
    return torchvision_v1(block=tv.SwinTransformerBlockV2, downsample_layer=tv.PatchMergingV2)


def torchvision_3d():
    return SwinTransformer3d([2, 2, 2], 8, [2, 2], [2, 4], [4, 3, 7], stochastic_depth_prob=0.0, num_classes=5)


def timm_v1(window=(4, 3), **options):
    options = {"img_size": IMAGE, "patch_size": 2, "window_size": window, "drop_path_rate": 0.0, **SIZES, **options}
    return TimmSwin(num_classes=5, **options)


def timm_v2(**options):
    return TimmSwinV2(
        img_size=IMAGE, patch_size=2, window_size=4, num_classes=5, drop_path_rate=0.0, **SIZES, **options
    )


def timm_v2_separate():
    model = timm_v2()
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
    return model


def config(cls, **options):
    options = {"window_size": 4, "image_size": IMAGE, "patch_size": 2, "drop_path_rate": 0.0, **SIZES, **options}
    return cls(**options)


def swin(**options):
    return transformers.SwinModel(config(transformers.SwinConfig, **options))


def swinv2():
    return transformers.Swinv2Model(config(transformers.Swinv2Config))


class Clap(nn.Module):
    """The audio encoder on a spectrogram of the size it is made for."""

    def __init__(self):
        super().__init__()
        self.encoder = ClapAudioEncoder(
            ClapAudioConfig(
                window_size=4, num_mel_bins=8, spec_size=32, patch_size=[4, 4], patch_stride=[4, 4], depths=[2, 2],
                num_attention_heads=[2, 4], patch_embeds_hidden_size=8, hidden_size=16, drop_path_rate=0.0,
                hidden_dropout_prob=0.0,
            )
        )  # fmt: skip

    def forward(self, x):
        return self.encoder(x).last_hidden_state


def image(dtype=torch.float64, size=IMAGE, channels=3):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


MODELS = {
    "torchvision v1": (torchvision_v1, image),
    "torchvision v2": (torchvision_v2, image),
    "torchvision 3d": (torchvision_3d, lambda: image(size=(6, 14, 18))),
    "timm v1": (timm_v1, image),
    "timm v1, window as large as the second map": (lambda: timm_v1((7, 6)), image),
    "timm v1, attention wider than the block": (lambda: timm_v1(head_dim=12), image),
    "timm v1, always partition": (lambda: timm_v1(8, always_partition=True), image),
    "timm v1, any size": (lambda: timm_v1(strict_img_size=False), lambda: image(size=(30, 18))),
    "timm v2": (timm_v2, image),
    "timm v2, separate bias": (timm_v2_separate, image),
    "timm v2, no bias": (lambda: timm_v2(qkv_bias=False), image),
    "Swin": (swin, image),
    "Swin, no bias": (lambda: swin(qkv_bias=False), image),
    "Swin, wide": (
        lambda: swin(embed_dim=192, depths=(2,), num_heads=(4,), image_size=(14, 10)),
        lambda: image(size=(14, 10)),
    ),
    "Swinv2": (swinv2, image),
    "Donut": (lambda: DonutSwinModel(config(DonutSwinConfig)), image),
    "MaskFormer": (lambda: MaskFormerSwinModel(config(MaskFormerSwinConfig)), image),
    "CLAP": (Clap, lambda: image(size=(120, 8), channels=1)),
    "Swin2SR": (
        lambda: transformers.Swin2SRModel(
            config(transformers.Swin2SRConfig, image_size=16, patch_size=1, embed_dim=8, num_channels=3)
        ),
        lambda: image(size=(16, 12)),
    ),
}
BLOCKS = {"Swin, wide": 2}


def randomize(model, dtype=torch.float64):
    """Every parameter away from its initial value: tables and biases that start at zero hide mistakes."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.2)
    return model.to(dtype)


def build(name):
    make, inputs = MODELS[name]
    return randomize(make()), inputs()


def tensor(output):
    if isinstance(output, torch.Tensor):
        return output
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state
    return output[0]


def gradients(model, x):
    model.zero_grad()
    out = tensor(model(x))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (out * weight.to(out.dtype)).sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
