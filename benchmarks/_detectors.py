"""Detectors of transformers with random weights, a photograph for them, and what of their output is compared."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from accel.benchmarks._torchvision import allow_import
from accel.benchmarks.harness import UnavailableError

HEIGHT, WIDTH = 416, 640  # multiples of 32, which RT-DETR needs
SHAPE = f"B1 {HEIGHT}×{WIDTH}"
STAGES = ["stage2", "stage3", "stage4"]


def photograph() -> Tensor:
    """One photograph that ships inside scikit-image or scikit-learn, ``(1, 3, 416, 640)``."""
    try:
        from skimage import data

        picture = data.rocket()
    except ImportError:
        try:
            from sklearn.datasets import load_sample_image
        except ImportError as error:
            raise UnavailableError(f"the photograph needs scikit-image or scikit-learn: {error}") from None
        picture = load_sample_image("china.jpg")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = torch.from_numpy(picture[:HEIGHT, :WIDTH].copy()).float() / 255
    return ((x - mean) / std).permute(2, 0, 1)[None].contiguous()


def _transformers() -> Any:
    with contextlib.suppress(ModuleNotFoundError):  # transformers does without
        allow_import()
    try:
        import transformers
    except ImportError as error:
        raise UnavailableError(f"transformers cannot be imported: {error}") from None
    return transformers


def deformable_detr() -> nn.Module:
    """The configuration of the paper, on a ResNet-50: 6 layers of encoder, and of decoder with 300 queries."""
    transformers = _transformers()
    backbone = transformers.ResNetConfig(out_features=STAGES)
    return transformers.DeformableDetrForObjectDetection(transformers.DeformableDetrConfig(backbone_config=backbone))


def rt_detr() -> nn.Module:
    """The configuration of the paper, on a ResNet-50: deformable attention in 6 layers of decoder alone."""
    transformers = _transformers()
    backbone = transformers.RTDetrResNetConfig(out_features=STAGES)
    return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(backbone_config=backbone))


@torch.no_grad()
def enliven(net: nn.Module, x: Tensor) -> nn.Module:
    """Give every layer outputs of size 1 or so: with the weights a detector starts from, its features fade to nothing
    on their way, and which queries it picks is decided by rounding."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear | nn.LayerNorm | nn.BatchNorm2d):
            module.reset_parameters()
    for name, parameter in net.named_parameters():
        if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            parameter.normal_(std=0.1)  # offsets and logits of 1.6 for queries of size 1
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    net(pixel_values=x)  # fills in what the norms divide by
    for norm in norms:
        norm.eval()
    return net


def outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Hidden states, logits and boxes of the queries, each column sorted: two queries whose scores differ by rounding
    may change places, and the constant that logits of new weights have is taken off."""
    out = net(pixel_values=x)
    found = [out.last_hidden_state, out.logits - out.logits.mean(), out.pred_boxes]
    return [x.sort(dim=1).values for x in found]
