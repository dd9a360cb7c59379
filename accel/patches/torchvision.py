"""torchvision: the three attention modules of Swin, whose ``forward`` pads, rolls and partitions; MaxViT's attention;
and deformable convolution.

Under autocast a deformable convolution computes in half precision, as a convolution does; torchvision's computes in
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from accel.nn import shifted_window_attention, shifted_window_attention_3d, shifted_window_attention_v2
from accel.ops.rules import Grid2D
from accel.patches.entry import (
    LINEAR,
    Entry,
    Function,
    accepts_any_call,
    why_not_bypass,
    why_not_dropout,
    why_not_version,
)

DEFORM = "torchvision.ops.deform_conv"


def _why_not(module: Any) -> str | None:
    return why_not_bypass(module, qkv=LINEAR, proj=LINEAR)


def _why_not_call(module: Any, x: Tensor) -> str | None:
    return why_not_dropout(module.attention_dropout, module.training)


def _entry(target: str, function: Callable[..., Tensor]) -> Entry:
    def compute(module: Any, attend: Callable[..., Tensor], x: Tensor) -> Tensor:
        return function(module, x, attend)

    return Entry(f"torchvision.models.{target}", "forward", _why_not, compute, _why_not_call)


# --- MaxViT: attention within a window, or across windows among tokens of one place ---


def _why_not_maxvit(attn: Any) -> str | None:
    return why_not_version(attn, "to_qkv", "merge", "scale_factor", "size")


def _maxvit(attn: Any, attend: Callable[..., Tensor], x: Tensor) -> Tensor:
    q, k, v = attn.to_qkv(x.flatten(0, 1)).unflatten(-1, (3, attn.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    table, grid = attn.relative_position_bias_table, Grid2D(attn.size, attn.size)
    out = attend(q, k, v, scale=attn.scale_factor, bias_table=table, bias_index=grid)
    return attn.merge(out.transpose(1, 2).flatten(2).unflatten(0, x.shape[:2]))


# --- deformable convolution: no child is bypassed, and groups follow from shapes as in the op ---


def _conv(
    conv: Any, attend: Callable[..., Tensor], input: Tensor, offset: Tensor, mask: Tensor | None = None
) -> Tensor:
    return attend(input, offset, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, mask)


def _function(attend: Callable[..., Tensor], **given: Any) -> Tensor:
    return attend(given.pop("input"), **given)


ENTRIES = (
    _entry("swin_transformer.ShiftedWindowAttention", shifted_window_attention),
    _entry("swin_transformer.ShiftedWindowAttentionV2", shifted_window_attention_v2),
    _entry("video.swin_transformer.ShiftedWindowAttention3d", shifted_window_attention_3d),
    Entry(
        "torchvision.models.maxvit.RelativePositionalMultiHeadAttention",
        "forward",
        _why_not_maxvit,
        _maxvit,
        op="softmax_attention",
    ),
    Entry(f"{DEFORM}.DeformConv2d", "forward", accepts_any_call, _conv, op="deform_conv2d"),
)
FUNCTIONS = (Function(f"{DEFORM}.deform_conv2d", "deform_conv2d", _function),)
