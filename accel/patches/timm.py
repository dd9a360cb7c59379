"""timm: ``_attn`` of the Swin v1 and v2 blocks, which rolls, then pads, then partitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.patches.entry import DROPOUT, LINEAR, SOFTMAX, Entry, why_not_bypass, why_not_dropout

V1 = "timm.models.swin_transformer"
V2 = "timm.models.swin_transformer_v2"


def _why_not(attention: str) -> Callable[[Any], str | None]:
    def why_not(block: Any) -> str | None:
        return why_not_bypass(block, attn=attention) or why_not_bypass(
            block.attn, qkv=LINEAR, attn_drop=DROPOUT, softmax=SOFTMAX, proj=LINEAR, proj_drop=DROPOUT
        )

    return why_not


def _drops(attn: Any) -> bool:
    """Whether attention weights are dropped: timm's fused path asks the attention module, the other one the child."""
    return attn.training if getattr(attn, "fused_attn", False) else attn.attn_drop.training


def _why_not_call(block: Any, x: Tensor) -> str | None:
    static_mask = any(block.shift_size) and not getattr(block, "dynamic_mask", False)
    if static_mask and tuple(block.input_resolution) != tuple(x.shape[1:3]):
        return "its static mask was built for a map of another size"
    return why_not_dropout(block.attn.attn_drop.p, _drops(block.attn))


def _attend(block: Any, attend: Callable[..., Tensor], qkv: Tensor, table: Tensor, **how: Any) -> Tensor:
    attn = block.attn
    out = attend(
        qkv,
        table,
        num_heads=attn.num_heads,
        window_size=block.window_size,
        shift_size=block.shift_size,
        pad_order="roll_then_pad",
        clamp_shift=False,  # the block has clamped its own, and keeps it where always_partition is set
        dropout_p=attn.attn_drop.p if _drops(attn) else 0.0,
        **how,
    )
    return attn.proj_drop(attn.proj(out))


def _block(block: Any, attend: Callable[..., Tensor], x: Tensor) -> Tensor:
    attn = block.attn
    scale = None if attn.fused_attn else attn.scale
    table = attn.relative_position_bias_table
    return _attend(block, attend, attn.qkv(x), table, scale=scale, qkv_bias=attn.qkv.bias)


def _block_v2(block: Any, attend: Callable[..., Tensor], x: Tensor) -> Tensor:
    attn = block.attn
    # qkv_bias_separate adds this bias after the projection instead of within, which is the same sum.
    bias = attn.qkv.bias if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    qkv = F.linear(x, attn.qkv.weight, bias)
    table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads))
    return _attend(block, attend, qkv, table, logit_scale=attn.logit_scale, qkv_bias=bias)


ENTRIES = (
    Entry(f"{V1}.SwinTransformerBlock", "_attn", _why_not(f"{V1}.WindowAttention"), _block, _why_not_call),
    Entry(f"{V2}.SwinTransformerV2Block", "_attn", _why_not(f"{V2}.WindowAttention"), _block_v2, _why_not_call),
)
