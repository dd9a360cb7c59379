"""timm: ``_attn`` of the Swin v1 and v2 blocks, which rolls, then pads, then partitions; and ``forward`` of attention.

Of the plain attentions only the dropout of weights is bypassed: projections, norms and gates are called as the modules
they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.ops.attention.rules import Grid2D
from accel.patches.entry import DROPOUT, LINEAR, SOFTMAX, Entry, why_not_bypass, why_not_dropout

V1 = "timm.models.swin_transformer"
V2 = "timm.models.swin_transformer_v2"


# --- Swin ---


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


# --- ViT, EVA and their kin: self-attention, with rotary positions or without ---


def _why_not_drop(attn: Any) -> str | None:
    return why_not_bypass(attn, attn_drop=DROPOUT)


def _why_not_attention(attn: Any) -> str | None:
    for name in ("q_norm", "k_norm", "norm"):
        if not hasattr(attn, name):
            return f"{type(attn).__name__} has no {name}: not the version of the library that is known here"
    return _why_not_drop(attn)


def _why_not_attention_call(
    attn: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **others: Any
) -> str | None:
    if attn_mask is not None and is_causal:
        return "a mask and is_causal are given, of which the class may take one or none"
    return why_not_dropout(attn.attn_drop.p, _drops(attn))


def _attention(
    attn: Any,
    attend: Callable[..., Tensor],
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    gate = None if getattr(attn, "gate", None) is None else attn.gate(x).sigmoid()
    q, k, v = _heads(attn, x)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = _rotated(attn, q, rope).type_as(v), _rotated(attn, k, rope).type_as(v)
    how: dict[str, Any] = {"causal": "top_left"} if is_causal else {}
    if attn_mask is not None:
        how["mask" if attn_mask.dtype == torch.bool else "bias"] = attn_mask
    out = attn.norm(_joined(attn, attend, q, k, v, **how))
    out = out if gate is None else out * gate
    return attn.proj_drop(attn.proj(out))


def _heads(attn: Any, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v as ``(B, H, N, D)``, from one projection or from three."""
    if getattr(attn, "qkv", None) is None:
        projected = (attn.q_proj(x), attn.k_proj(x), attn.v_proj(x))
        return tuple(
            [y.unflatten(-1, (-1, projected[0].shape[-1] // attn.num_heads)).transpose(1, 2) for y in projected]
        )
    return _qkv(attn, x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _qkv(attn: Any, x: Tensor) -> Tensor:
    """The joint projection; BEiT and EVA hold its bias beside it, in parts."""
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv(x)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if attn.qkv_bias_separate:
        return attn.qkv(x) + bias
    return F.linear(x, attn.qkv.weight, bias)  # as the class does


def _rotated(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    prefix = attn.num_prefix_tokens
    rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, half=getattr(attn, "rotate_half", False))
    return torch.cat([x[:, :, :prefix], rotated], 2)


def _joined(attn: Any, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """The op, with its heads side by side again, ``(B, N, H·D)``."""
    scale = None if attn.fused_attn else attn.scale
    dropout = attn.attn_drop.p if _drops(attn) else 0.0
    return attend(q, k, v, scale=scale, dropout_p=dropout, **how).transpose(1, 2).flatten(2)


# --- BEiT: a table of relative positions, or a bias that all layers share ---


def _beit(attn: Any, attend: Callable[..., Tensor], x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    how: dict[str, Any] = {}
    if attn.relative_position_bias_table is not None:
        h, w = attn.window_size
        how = {"bias_table": attn.relative_position_bias_table, "bias_index": Grid2D(h, w, extra=1)}
    out = _joined(attn, attend, *_heads(attn, x), bias=shared_rel_pos_bias, **how)
    return attn.proj_drop(attn.proj(out))


def _entry(target: str, why_not: Callable[[Any], str | None], compute: Callable[..., Tensor]) -> Entry:
    return Entry(f"timm.{target}", "forward", why_not, compute, _why_not_attention_call, op="softmax_attention")


ENTRIES = (
    Entry(f"{V1}.SwinTransformerBlock", "_attn", _why_not(f"{V1}.WindowAttention"), _block, _why_not_call),
    Entry(f"{V2}.SwinTransformerV2Block", "_attn", _why_not(f"{V2}.WindowAttention"), _block_v2, _why_not_call),
    _entry("layers.attention.Attention", _why_not_attention, _attention),
    _entry("layers.attention.AttentionRope", _why_not_attention, _attention),
    _entry("models.eva.EvaAttention", _why_not_attention, _attention),
    _entry("models.beit.Attention", _why_not_drop, _beit),
)
