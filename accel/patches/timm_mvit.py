"""timm: ``forward`` of MViTv2's attention: queries, keys and values pooled apart, positions decomposed by axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from accel.patches import decomposed
from accel.patches.entry import Entry, accepts_any_call
from accel.patches.timm_heads import Attend, split


def _pooled(attn: Any, name: str, x: Tensor, size: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
    from timm.models.mvitv2 import reshape_post_pool, reshape_pre_pool

    pool, norm = getattr(attn, f"pool_{name}"), getattr(attn, f"norm_{name}")
    if pool is not None:
        on_map, class_token = reshape_pre_pool(x, size, attn.has_cls_token)
        x, size = reshape_post_pool(pool(on_map), attn.num_heads, class_token)
    return (x if norm is None else norm(x)), size


def _why_not_call(attn: Any, x: Tensor, feat_size: Sequence[int]) -> str | None:
    if attn.rel_pos_type != "spatial":
        return None
    return decomposed.why_not(attn.head_dim, *feat_size)  # the keys are pooled, and need less


def _multi_scale(attn: Any, attend: Attend, x: Tensor, feat_size: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
    q, k, v = split(attn.qkv(x), 3, attn.num_heads)
    q, q_size = _pooled(attn, "q", q, feat_size)
    k, k_size = _pooled(attn, "k", k, feat_size)
    v, _ = _pooled(attn, "v", v, feat_size)
    asked, scale = q, attn.scale
    if attn.rel_pos_type == "spatial":
        rows = decomposed.stretched(attn.rel_pos_h, q_size[0], k_size[0])
        columns = decomposed.stretched(attn.rel_pos_w, q_size[1], k_size[1])
        asked, k = decomposed.with_positions(q, k, scale, rows, columns, prefix=int(attn.has_cls_token))
        scale = 1.0
    out = attend(asked, k, v, scale=scale)
    out = out + q if attn.residual_pooling else out
    return attn.proj(out.transpose(1, 2).flatten(2)), q_size


ENTRIES = (
    Entry(
        "timm.models.mvitv2.MultiScaleAttention",
        "forward",
        accepts_any_call,
        _multi_scale,
        _why_not_call,
        op="softmax_attention",
    ),
)
