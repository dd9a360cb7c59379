"""timm: ``_attn`` of the Swin blocks, which rolls, then pads, then partitions; and ``forward`` of attention.

Attention of ViT, EVA, BEiT and EfficientViT stands here; that with relative positions in :mod:`timm_relative` and
:mod:`timm_mvit`, and what needs its tokens arranged in :mod:`timm_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.ops.rules import Grid2D
from accel.patches import timm_mvit, timm_relative, timm_tokens
from accel.patches.entry import (
    DROPOUT,
    LINEAR,
    SOFTMAX,
    Entry,
    class_path,
    why_not_bypass,
    why_not_dropout,
    why_not_version,
)
from accel.patches.timm_heads import (
    Attend,
    dropout_of,
    drops,
    entry,
    heads_of,
    joined,
    projected,
    why_not_drop,
    why_not_drop_call,
)

V1 = "timm.models.swin_transformer"
V2 = "timm.models.swin_transformer_v2"
CR = "timm.models.swin_transformer_v2_cr"


# --- Swin ---


def _why_not(attention: str, **more: str) -> Callable[[Any], str | None]:
    def why_not(block: Any) -> str | None:
        return why_not_bypass(block, attn=attention) or why_not_bypass(
            block.attn, qkv=LINEAR, attn_drop=DROPOUT, proj=LINEAR, proj_drop=DROPOUT, **more
        )

    return why_not


def _why_not_call(block: Any, x: Tensor) -> str | None:
    size = block.feat_size if hasattr(block, "feat_size") else block.input_resolution
    static_mask = any(block.shift_size) and not getattr(block, "dynamic_mask", False)
    if static_mask and tuple(size) != tuple(x.shape[1:3]):
        return "its static mask was built for a map of another size"
    return why_not_dropout(block.attn.attn_drop.p, drops(block.attn))


def _attend(block: Any, attend: Attend, qkv: Tensor, table: Tensor | None, **how: Any) -> Tensor:
    attn = block.attn
    out = attend(
        qkv,
        table,
        num_heads=attn.num_heads,
        window_size=block.window_size,
        shift_size=block.shift_size,
        pad_order="roll_then_pad",
        clamp_shift=False,  # the block has clamped its own, and keeps it where always_partition is set
        dropout_p=dropout_of(attn),
        **how,
    )
    return projected(attn, out)


def _block(block: Any, attend: Attend, x: Tensor) -> Tensor:
    attn = block.attn
    scale = None if attn.fused_attn else attn.scale
    table = attn.relative_position_bias_table
    return _attend(block, attend, attn.qkv(x), table, scale=scale, qkv_bias=attn.qkv.bias)


def _block_v2(block: Any, attend: Attend, x: Tensor) -> Tensor:
    attn = block.attn
    # qkv_bias_separate adds this bias after the projection instead of within, which is the same sum.
    bias = attn.qkv.bias if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    qkv = F.linear(x, attn.qkv.weight, bias)
    table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads))
    return _attend(block, attend, qkv, table, logit_scale=attn.logit_scale, qkv_bias=bias)


def _block_cr(block: Any, attend: Attend, x: Tensor) -> Tensor:
    attn = block.attn
    # The MLP sees every pair, and in training drops other units for each: its dense bias is what the class adds.
    how = {"bias": attn._relative_positional_encodings().squeeze(0), "logit_scale": attn.logit_scale}
    return _attend(block, attend, attn.qkv(x), None, qkv_bias=attn.qkv.bias, **how)


# --- ViT, EVA and their kin: self-attention, with rotary positions or without ---


def _why_not_attention(attn: Any) -> str | None:
    return why_not_version(attn, "q_norm", "k_norm", "norm") or why_not_drop(attn)


def _why_not_attention_call(
    attn: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **others: Any
) -> str | None:
    if attn_mask is not None and is_causal:
        return "a mask and is_causal are given, of which the class may take one or none"
    return why_not_drop_call(attn)


def _attention(
    attn: Any,
    attend: Attend,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    gate = None if getattr(attn, "gate", None) is None else attn.gate(x).sigmoid()
    q, k, v = heads_of(attn, x)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = _rotated(attn, q, rope).type_as(v), _rotated(attn, k, rope).type_as(v)
    how: dict[str, Any] = {"causal": "top_left"} if is_causal else {}
    if attn_mask is not None:
        how["mask" if attn_mask.dtype == torch.bool else "bias"] = attn_mask
    out = attn.norm(joined(attn, attend, q, k, v, **how))
    out = out if gate is None else out * gate
    return projected(attn, out)


def _rotated(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    prefix = attn.num_prefix_tokens
    rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, half=getattr(attn, "rotate_half", False))
    return torch.cat([x[:, :, :prefix], rotated], 2)


# --- BEiT: a table of relative positions, or a bias that all layers share ---


def _beit(attn: Any, attend: Attend, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    how: dict[str, Any] = {}
    if attn.relative_position_bias_table is not None:
        h, w = attn.window_size
        how = {"bias_table": attn.relative_position_bias_table, "bias_index": Grid2D(h, w, extra=1)}
    return projected(attn, joined(attn, attend, *heads_of(attn, x), bias=shared_rel_pos_bias, **how))


# --- EfficientViT: relu as the feature map, float32 inside, whatever autocast asks for ---


def _why_not_lite(module: Any) -> str | None:
    return why_not_version(module, "qkv", "aggreg", "kernel_func", "proj", "dim", "eps") or (
        "its _attn has been replaced" if "_attn" in vars(module) else None
    )


def _lite(module: Any, attend: Attend, x: Tensor) -> Tensor:
    qkv = module.qkv(x)
    scales = torch.cat([qkv, *[aggregate(qkv) for aggregate in module.aggreg]], 1)
    tokens = scales.reshape(x.shape[0], -1, 3 * module.dim, x.shape[2] * x.shape[3]).transpose(-1, -2)
    q, k, v = tokens.contiguous().chunk(3, -1)
    plain = why_not_bypass(module, kernel_func=class_path(torch.nn.ReLU)) is None
    if not plain:
        q, k = module.kernel_func(q), module.kernel_func(k)
    with torch.autocast(x.device.type, enabled=False):
        feature_map = "relu" if plain else "identity"
        out = attend(q.float(), k.float(), v.float(), feature_map=feature_map, eps=module.eps).to(v.dtype)
    return module.proj(out.transpose(-1, -2).reshape(x.shape[0], -1, *x.shape[2:]))  # type: ignore[no-any-return]


ENTRIES = (
    Entry(
        f"{V1}.SwinTransformerBlock", "_attn", _why_not(f"{V1}.WindowAttention", softmax=SOFTMAX), _block, _why_not_call
    ),
    Entry(
        f"{V2}.SwinTransformerV2Block",
        "_attn",
        _why_not(f"{V2}.WindowAttention", softmax=SOFTMAX),
        _block_v2,
        _why_not_call,
    ),
    Entry(
        f"{CR}.SwinTransformerV2CrBlock",
        "_shifted_window_attn",
        _why_not(f"{CR}.WindowMultiHeadAttention"),
        _block_cr,
        _why_not_call,
    ),
    entry("layers.attention.Attention", _attention, _why_not_attention, _why_not_attention_call),
    entry("layers.attention.AttentionRope", _attention, _why_not_attention, _why_not_attention_call),
    entry("models.eva.EvaAttention", _attention, _why_not_attention, _why_not_attention_call),
    entry("models.beit.Attention", _beit),
    Entry("timm.models.efficientvit_mit.LiteMLA", "forward", _why_not_lite, _lite, op="linear_attention"),
    *timm_relative.ENTRIES,
    *timm_tokens.ENTRIES,
    *timm_mvit.ENTRIES,
)
