"""timm: ``forward`` of attention with a bias by relative position, whose table is handed on instead of the bias.

The modules that hold a table (``rel_pos``) are read, not called, so they must be plain.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from accel.ops.rules import Grid2D
from accel.patches import decomposed
from accel.patches.entry import class_path, why_not_bypass
from accel.patches.timm_heads import (
    Attend,
    as_map,
    attended,
    by_head,
    entry,
    entry_without_dropout,
    heads_of,
    joined,
    projected,
    split,
    why_not_drop,
    why_not_drop_call,
)

REL_POS = "timm.layers.pos_embed_rel"
BIAS, MLP, TF = f"{REL_POS}.RelPosBias", f"{REL_POS}.RelPosMlp", f"{REL_POS}.RelPosBiasTf"


# --- rel_pos: a module with a table, or with an MLP that makes one ---


def _why_not_relative(attn: Any) -> str | None:
    reason = why_not_drop(attn)
    rel_pos = attn.rel_pos
    if reason is not None or rel_pos is None:
        return reason
    found = class_path(type(rel_pos))
    if found not in (BIAS, MLP, TF):
        return f"rel_pos is {found}, not the plain {BIAS}, RelPosMlp or RelPosBiasTf"
    if "get_bias" in vars(rel_pos):
        return "rel_pos has a get_bias of its own"
    return why_not_bypass(attn, rel_pos=found)


def _table(rel_pos: Any) -> Tensor:
    """``(R, H)`` in the order of :class:`Grid2D`."""
    kind = class_path(type(rel_pos))
    if kind == BIAS:
        table: Tensor = rel_pos.relative_position_bias_table
    elif kind == TF:  # which counts from the query to the key
        table = rel_pos.relative_position_bias_table.flip(1, 2).flatten(1).t()
    else:
        table = rel_pos.bias_act(rel_pos.mlp(rel_pos.rel_coords_log).view(-1, rel_pos.num_heads))
        table = table if rel_pos.bias_gain is None else rel_pos.bias_gain * table
        if rel_pos.prefix_tokens:
            table = F.pad(table, (0, 0, 0, 3))  # tokens without a place on the map get no bias
    return table


def _bias(attn: Any, shared: Tensor | None) -> dict[str, Any]:
    """The op's arguments for the module's own bias or else for the one that all layers share."""
    rel_pos = attn.rel_pos
    if rel_pos is None:
        return {"bias": shared}
    h, w = rel_pos.window_size
    return {"bias_table": _table(rel_pos), "bias_index": Grid2D(h, w, getattr(rel_pos, "prefix_tokens", 0))}


def _rel_pos_vit(attn: Any, attend: Attend, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
    q, k, v = heads_of(attn, x)
    how = _bias(attn, shared_rel_pos)
    return projected(attn, joined(attn, attend, attn.q_norm(q), attn.k_norm(k), v, **how))


# --- MaxViT and CoAtNet: tokens of a window with channels last, or a map ---


def _channels_last(attn: Any, attend: Attend, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
    qkv = attn.qkv(x).flatten(1, -2)
    if attn.head_first:
        q, k, v = by_head(qkv, attn.num_heads).chunk(3, 3)
    else:
        q, k, v = split(qkv, 3, attn.num_heads)
    out = joined(attn, attend, q, k, v, **_bias(attn, shared_rel_pos))
    return projected(attn, out.unflatten(1, x.shape[1:-1]))


def _map(attn: Any, attend: Attend, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
    qkv = attn.qkv(x).flatten(2).transpose(1, 2)
    if attn.head_first:
        q, k, v = by_head(qkv, attn.num_heads).chunk(3, 3)
    else:
        q, k, v = split(qkv, 3, attn.num_heads)
    out = attended(attn, attend, q, k, v, **_bias(attn, shared_rel_pos))
    return projected(attn, as_map(out, x.shape[2:]))


# --- GCViT: windows whose queries may come from the whole image ---


def _global(attn: Any, attend: Attend, x: Tensor, q_global: Tensor | None = None) -> Tensor:
    if attn.use_global and q_global is not None:
        k, v = split(attn.qkv(x), 2, attn.num_heads)
        q = by_head(q_global.repeat_interleave(x.shape[0] // q_global.shape[0], 0).reshape(x.shape), attn.num_heads)
    else:
        q, k, v = split(attn.qkv(x), 3, attn.num_heads)
    return projected(attn, joined(attn, attend, q, k, v, **_bias(attn, None)))


# --- TinyViT, LeViT, EfficientFormer: a table by distance along each axis, with an index of its rows ---


def _offsets(attn: Any) -> dict[str, Any]:
    return {"bias_table": attn.attention_biases.t(), "bias_index": attn.attention_bias_idxs}


def _qkv_by_head(attn: Any, qkv: Tensor) -> tuple[Tensor, ...]:
    return by_head(qkv, attn.num_heads).split([attn.key_dim, attn.key_dim, attn.val_dim], 3)


def _tiny(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    q, k, v = _qkv_by_head(attn, attn.qkv(attn.norm(x)))
    return attn.proj(joined(attn, attend, q, k, v, **_offsets(attn)))


def _efficientformer(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    return attn.proj(joined(attn, attend, *_qkv_by_head(attn, attn.qkv(x)), **_offsets(attn)))


def _tokens(x: Tensor, is_map: bool) -> Tensor:
    return x.flatten(2).transpose(1, 2) if is_map else x


def _levit(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    q, k, v = _qkv_by_head(attn, _tokens(attn.qkv(x), attn.use_conv))
    out = attended(attn, attend, q, k, v, **_offsets(attn))
    return attn.proj(as_map(out, x.shape[2:]) if attn.use_conv else out.transpose(1, 2).flatten(2))


def _levit_down(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    k, v = by_head(_tokens(attn.kv(x), attn.use_conv), attn.num_heads).split([attn.key_dim, attn.val_dim], 3)
    down = attn.q(x)
    q = by_head(_tokens(down, attn.use_conv), attn.num_heads)
    out = attended(attn, attend, q, k, v, **_offsets(attn))
    return attn.proj(as_map(out, down.shape[2:]) if attn.use_conv else out.transpose(1, 2).flatten(2))


def _efficientformer_down(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    v = attn.v(x)
    local = attn.v_local(v)
    q, k, v = [by_head(_tokens(y, True), attn.num_heads) for y in (attn.q(x), attn.k(x), v)]
    out = attended(attn, attend, q, k, v, **_offsets(attn))
    return attn.proj(attn.act(as_map(out, attn.resolution2) + local))


# --- SAM: relative positions decomposed by axis, or rotary ones ---


def _why_not_sam_call(attn: Any, x: Tensor) -> str | None:
    if attn.use_rel_pos:
        reason = decomposed.why_not(attn.head_dim, *x.shape[1:3])
        if reason is not None:
            return reason
    return why_not_drop_call(attn)


def _sam(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    q, k, v = heads_of(attn, x.flatten(1, 2))
    q, k = attn.q_norm(q), attn.k_norm(k)
    how: dict[str, Any] = {}
    if attn.use_rel_pos:
        from timm.models.vision_transformer_sam import get_rel_pos

        h, w = x.shape[1:3]
        axes = get_rel_pos(h, h, attn.rel_pos_h), get_rel_pos(w, w, attn.rel_pos_w)
        q, k = decomposed.with_positions(q, k, attn.scale, *axes)
        how["scale"] = 1.0
    elif attn.rope is not None:
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat

        rope = attn.rope.get_embed()
        q, k = [apply_rot_embed_cat(y, rope).type_as(v) for y in (q, k)]
    return projected(attn, joined(attn, attend, q, k, v, **how).unflatten(1, x.shape[1:3]))


ENTRIES = (
    entry("models.vision_transformer_relpos.RelPosAttention", _rel_pos_vit, _why_not_relative),
    entry("models.maxxvit.AttentionCl", _channels_last, _why_not_relative),
    entry("models.maxxvit.Attention2d", _map, _why_not_relative),
    entry("models.gcvit.WindowAttentionGlobal", _global, _why_not_relative),
    entry_without_dropout("models.tiny_vit.Attention", _tiny),
    entry_without_dropout("models.levit.Attention", _levit),
    entry_without_dropout("models.levit.AttentionDownsample", _levit_down),
    entry_without_dropout("models.efficientformer.Attention", _efficientformer),
    entry_without_dropout("models.efficientformer_v2.Attention2dDownsample", _efficientformer_down),
    entry("models.vision_transformer_sam.Attention", _sam, why_not_call=_why_not_sam_call),
)
