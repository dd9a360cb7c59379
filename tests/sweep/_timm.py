"""One small model of every module of ``timm.models``, before and after :func:`accel.patch`."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

import accel

NO_ATTENTION = "no attention"

_ATTENTION = re.compile(r"attn|attention|gpsa|m[hq]?sa$|sh[sm]a$|xca$|mla$", re.IGNORECASE)

_FOUR = {"depths": (1, 1, 1, 1)}
_VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}

FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "beit": ("beit_base_patch16_224", _VIT, 32),
    "byoanet": ("botnet26t_256", {}, 256),
    "byobnet": ("repvgg_a0", {}, 64),
    "cait": ("cait_xxs24_224", _VIT, 32),
    "coat": ("coat_lite_tiny", {"img_size": 64}, 64),
    "convit": ("convit_tiny", {"depth": 3, "embed_dim": 8, "num_heads": 4, "local_up_to_layer": 1, "img_size": 32}, 32),
    "convmixer": ("convmixer_768_32", {}, 64),
    "convnext": ("test_convnext", {}, 64),
    "cpubone": ("cpubone_nano", {}, 64),
    "crossvit": ("crossvit_9_240", {"depth": ((1, 1, 0), (1, 1, 0))}, 240),
    "csatv2": ("csatv2", {}, 128),
    "cspnet": ("darknet17", {}, 64),
    "cspnext": ("cspnext_tiny", {}, 64),
    "davit": ("davit_tiny", {**_FOUR, "embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2)}, 64),
    "deepseek_vit": ("deepseek_vit_412m", {**_VIT, "img_size": 84}, 84),
    "deit": ("deit_tiny_distilled_patch16_224", _VIT, 32),
    "densenet": ("densenet121", {}, 64),
    "dla": ("dla46x_c", {}, 64),
    "dpn": ("dpn48b", {}, 64),
    "edgenext": ("edgenext_xx_small", {}, 64),
    "efficientformer": ("efficientformer_l1", {**_FOUR, "embed_dims": (16, 16, 32, 32)}, 224),
    "efficientformer_v2": ("efficientformerv2_s0", {"img_size": 128}, 128),
    "efficientnet": ("mobilenetv2_035", {}, 64),
    "efficientvim": ("efficientvim_m1", {}, 64),
    "efficientvit_mit": ("efficientvit_b0", {}, 64),
    "efficientvit_msra": ("efficientvit_m0", {}, 64),
    "eva": ("eva02_tiny_patch14_224", {**_VIT, "img_size": 28}, 28),
    "fasternet": ("fasternet_t0", {}, 64),
    "fastvit": ("fastvit_sa12", {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 64)}, 64),
    "focalnet": ("focalnet_tiny_srf", {}, 64),
    "gcvit": ("gcvit_xxtiny", {"img_size": 64, "embed_dim": 16}, 64),
    "gemma4_vit": (
        "gemma4_vit_167m", {"depth": 2, "embed_dim": 32, "num_heads": 2, "head_dim": 16, "intermediate_size": 64}, 96,
    ),
    "ghostnet": ("ghostnet_050", {}, 64),
    "hardcorenas": ("hardcorenas_a", {}, 64),
    "hgnet": ("hgnetv2_b0", {}, 64),
    "hiera": ("hiera_tiny_224", {"stages": (1, 1, 1, 1), "embed_dim": 16, "img_size": (64, 64)}, 64),
    "hieradet_sam2": (
        "hieradet_small", {"stages": (1, 1, 2, 1), "embed_dim": 16, "global_att_blocks": (3,)}, 64,
    ),
    "hrnet": ("hrnet_w18_small", {}, 64),
    "iformer": ("iformer_t", {"dims": (16, 16, 32, 64), "depths": (1, 1, 9, 6)}, 64),
    "inception_next": ("inception_next_atto", {}, 64),
    "inception_resnet_v2": ("inception_resnet_v2", {}, 128),
    "inception_v3": ("inception_v3", {}, 128),
    "inception_v4": ("inception_v4", {}, 128),
    "lcnetv2": ("lcnetv2_small", {}, 64),
    "levit": (
        "levit_128s",
        {"depth": (1, 1, 1), "embed_dim": (16, 32, 32), "num_heads": (2, 2, 2), "key_dim": 8, "img_size": 64},
        64,
    ),
    "lowformer": ("lowformer_b0", {}, 64),
    "mambaout": ("test_mambaout", {}, 64),
    "maxxvit": ("maxvit_rmlp_pico_rw_256", {**_FOUR, "embed_dim": (32, 32, 32, 32), "img_size": 64}, 64),
    "metaformer": ("caformer_s18", {}, 64),
    "mlp_mixer": ("mixer_s32_224", {}, 224),
    "mobilenetv3": ("mobilenetv4_hybrid_medium_075", {}, 64),
    "mobilenetv5": ("mobilenetv5_base", {}, 64),
    "mobilevit": ("mobilevit_xxs", {}, 64),
    "mvitv2": ("mvitv2_tiny", {}, 224),
    "naflexvit": ("naflexvit_base_patch16_gap", {"depth": 2, "embed_dim": 32, "num_heads": 2}, 32),
    "nasnet": ("nasnetalarge", {}, 64),
    "nest": ("nest_tiny", {"img_size": 64}, 64),
    "nextvit": ("nextvit_small", {}, 64),
    "nfnet": ("test_nfnet", {}, 64),
    "pit": ("pit_ti_224", {"img_size": 64, "depth": (1, 1, 1), "base_dims": (16, 16, 16)}, 64),
    "pnasnet": ("pnasnet5large", {}, 64),
    "pvt_v2": ("pvt_v2_b0", {**_FOUR, "embed_dims": (8, 16, 32, 32), "num_heads": (1, 2, 2, 2)}, 64),
    "qwen3_vit": ("qwen3_vit_88m", {**_VIT, "img_size": 64}, 64),
    "rdnet": ("rdnet_tiny", {}, 64),
    "regnet": ("regnetx_002", {}, 64),
    "repghost": ("repghostnet_050", {}, 64),
    "repvit": ("repvit_m0_9", {}, 64),
    "res2net": ("res2net50_26w_4s", {}, 64),
    "resnest": ("resnest14d", {}, 64),
    "resnet": ("resnet10t", {}, 64),
    "resnetv2": ("resnetv2_18", {}, 64),
    "rexnet": ("rexnet_100", {}, 64),
    "selecsls": ("selecsls42", {}, 64),
    "senet": ("legacy_seresnet18", {}, 64),
    "sequencer": ("sequencer2d_s", {}, 224),
    "shvit": ("shvit_s1", {}, 128),
    "sknet": ("skresnet18", {}, 64),
    "starnet": ("starnet_s050", {}, 64),
    "swiftformer": ("swiftformer_xs", {}, 64),
    "swin_transformer": (
        "swin_tiny_patch4_window7_224",
        {"depths": (2, 2), "embed_dim": 16, "num_heads": (2, 2), "window_size": 4, "img_size": 52},
        52,
    ),
    "swin_transformer_v2": (
        "swinv2_tiny_window8_256",
        {"depths": (2, 2), "embed_dim": 16, "num_heads": (2, 2), "window_size": 4, "img_size": 52},
        52,
    ),
    "swin_transformer_v2_cr": (
        "swinv2_cr_tiny_ns_224",
        {"depths": (2, 2), "embed_dim": 16, "num_heads": (2, 2), "window_size": 4, "img_size": 52},
        52,
    ),
    "tiny_vit": ("tiny_vit_5m_224", {**_FOUR, "embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2)}, 72),
    "tnt": ("tnt_s_patch16_224", {"depth": 2, "embed_dim": 64, "num_heads_outer": 4, "img_size": 32}, 32),
    "tresnet": ("tresnet_m", {}, 64),
    "twins": (
        "twins_svt_small",
        {"depths": (2, 2, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (2, 2, 2, 2), "img_size": 64},
        64,
    ),
    "vgg": ("vgg11", {}, 64),
    "visformer": ("visformer_tiny", {"depth": (1, 1, 1), "embed_dim": 48, "img_size": 64}, 64),
    "vision_transformer": ("vit_tiny_patch16_224", _VIT, 32),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", {**_VIT, "img_size": 64}, 64),
    "vision_transformer_relpos": ("test_vit_relpos", _VIT, 32),
    "vision_transformer_sam": (
        "samvit_base_patch16_224", {**_VIT, "img_size": 80, "window_size": 3, "global_attn_indexes": (1,)}, 80,
    ),
    "vitamin": ("vitamin_small_224", {"depth": 2, "img_size": 64}, 64),
    "volo": ("volo_d1_224", {"img_size": 64}, 64),
    "vovnet": ("ese_vovnet19b_slim_dw", {}, 64),
    "xception": ("legacy_xception", {}, 96),
    "xception_aligned": ("xception41", {}, 64),
    "xcit": ("xcit_nano_12_p16_224", {**_VIT, "img_size": 32}, 32),
}  # fmt: skip
"""By module of ``timm.models``: its smallest model with attention, or its smallest; arguments that make it tiny; and
the size of its image. Attention that no entry of the table serves needs no image."""

QUICK = (
    "beit",
    "eva",
    "hiera",
    "levit",
    "maxxvit",
    "resnet",
    "swin_transformer_v2_cr",
    "tiny_vit",
    "twins",
    "vision_transformer",
    "vision_transformer_relpos",
    "vision_transformer_sam",
    "xcit",
)


class Row(NamedTuple):
    """What became of one model."""

    name: str
    replaced: int
    calls: int
    difference: float
    """Largest difference of an output or a gradient, as part of its largest value; infinity where the model is neither
    served nor refused by a sentence that names its attention."""
    refused: str
    """Why nothing, or not all, is replaced or served."""


def attention_like(model: nn.Module) -> list[str]:
    """Names of the classes in a model that look like attention."""
    return sorted({type(m).__name__ for m in model.modules() if _ATTENTION.search(type(m).__name__)})


def run(family: str) -> Row:
    """Patch the family's model and compare outputs and gradients of parameters, in eval mode and float32."""
    name, options, size = FAMILIES[family]
    title = f"{family}: {name}"
    torch.manual_seed(0)
    model = _scattered(timm.create_model(name, num_classes=5, **options))
    model.eval()
    try:
        accel.patch(model)
    except ValueError as error:
        names = attention_like(model)
        if not names:
            return Row(title, 0, 0, 0.0, NO_ATTENTION)
        named = any(n in str(error) for n in names)
        return Row(title, 0, 0, 0.0 if named else float("inf"), str(error))
    accel.unpatch(model)
    x = torch.randn(2, 3, size, size)
    _settle(model, x)
    expected = _run(model, x)
    report = accel.patch(model)
    found = _run(model, x)
    left = [row.reason for row in report.skipped] + [reason for row in report.rows for reason in row.fallbacks]
    calls = sum(row.calls for row in report.rows)
    difference = _difference(expected, found) if calls or left else float("inf")
    return Row(title, len(report.replaced), calls, difference, "; ".join(dict.fromkeys(left)))


def _scattered(model: nn.Module) -> nn.Module:
    """Parameters away from where training begins: tables of zeros and layer scales of 1e-6 would hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                around = 1.0 if name.endswith("weight") or "gamma" in name else 0.0
                parameter.normal_(around, 0.2)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
    return model


def _settle(model: nn.Module, x: Tensor) -> None:
    """Let batch norms take on what they see: values that grow from layer to layer would drown all in rounding."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = 0.5
    model.train()
    with torch.no_grad():
        model(x)
    model.eval()


def _run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs, then the gradient of every parameter."""
    model.train()
    model.eval()  # some keep a bias, and its graph, from one call in eval mode to the next
    model.zero_grad()
    outputs = model(x)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    sum((y * torch.randn(y.shape, generator=generator)).sum() for y in outputs).backward()
    return [y.detach() for y in outputs] + [p.grad for p in model.parameters() if p.grad is not None]


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """A gradient far smaller than the largest is rounding (a bias of keys has none), and is measured by that."""
    if [x.shape for x in expected] != [x.shape for x in found]:
        return float("inf")
    largest = torch.stack([x.abs().max() for x in expected])
    apart = torch.stack([(a - b).abs().max() for a, b in zip(expected, found, strict=True)])
    return float((apart / largest.clamp_min(1e-3 * largest.max())).max())
