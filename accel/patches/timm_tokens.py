"""timm: ``forward`` of plain attention among tokens that the class arranges: windows, blocks, maps, fewer keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.patches.entry import DROPOUT, LINEAR, SOFTMAX, accepts_any_call, why_not_bypass
from accel.patches.timm_heads import (
    Attend,
    as_map,
    attended,
    by_head,
    dropout_of,
    entry,
    entry_without_dropout,
    heads_of,
    joined,
    projected,
    split,
    why_not_drop_call,
)


def _tokens(on_map: Tensor) -> Tensor:
    return on_map.flatten(2).transpose(1, 2)


# --- one projection to q, k and v ---


def _plain(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    return projected(attn, joined(attn, attend, *heads_of(attn, x)))


def _channels_last(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    return _plain(attn, attend, x.flatten(1, 2)).unflatten(1, x.shape[1:3])


def _fastvit(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    return _plain(attn, attend, _tokens(x)).transpose(1, 2).unflatten(2, x.shape[2:])


def _map(attn: Any, attend: Attend, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    qkv = _tokens(attn.qkv(x))
    if getattr(attn, "head_first", False):
        q, k, v = by_head(qkv, attn.num_heads).chunk(3, 3)
    else:
        q, k, v = split(qkv, 3, attn.num_heads)
    return projected(attn, as_map(attended(attn, attend, q, k, v), x.shape[2:]))


def _tnt(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    q, k = split(attn.qk(x), 2, attn.num_heads)
    return projected(attn, joined(attn, attend, q, k, by_head(attn.v(x), attn.num_heads)))


# --- windows and blocks ---


def _why_not_davit(attn: Any) -> str | None:
    return why_not_bypass(attn, softmax=SOFTMAX)


def _davit(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    return attn.proj(joined(attn, attend, *heads_of(attn, x)))


def _nest(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    out = attended(attn, attend, *heads_of(attn, x.flatten(0, 1)))
    interleaved = out.permute(0, 2, 3, 1).flatten(2)  # the class lays the heads side by side within each channel
    return projected(attn, interleaved.unflatten(0, x.shape[:2]))


def _why_not_grouped(attn: Any) -> str | None:
    # The projection is read for what it makes of padding, and sees the tokens of the map only.
    return why_not_bypass(attn, qkv=LINEAR, attn_drop=DROPOUT)


def _grouped(attn: Any, attend: Attend, x: Tensor, size: Sequence[int]) -> Tensor:
    out = attend(
        attn.qkv(x).unflatten(1, tuple(size)),
        num_heads=attn.num_heads,
        window_size=(attn.ws, attn.ws),
        scale=None if attn.fused_attn else attn.scale,
        qkv_bias=attn.qkv.bias,
        dropout_p=dropout_of(attn),
    )
    return projected(attn, out.flatten(1, 2))


def _hiera(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    windows = x.shape[1] // (attn.q_stride * attn.window_size) if attn.use_mask_unit_attn else 1
    # Token n of window w stands at n·windows + w.
    qkv = attn.qkv(x).unflatten(1, (-1, windows)).unflatten(-1, (3, attn.heads, -1))
    q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2).unbind(0)
    if attn.q_stride > 1:
        q = q.unflatten(2, (attn.q_stride, -1)).amax(2)
    out = attended(attn, attend, q, k, v).unflatten(0, (x.shape[0], windows))
    return attn.proj(out.permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2))


# --- fewer queries or keys ---


def _pooled_queries(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    h, w = x.shape[1:3]
    q, k, v = split(attn.qkv(x.flatten(1, 2)), 3, attn.num_heads)
    if attn.q_pool is not None:
        pooled = attn.q_pool(as_map(q, (h, w)))
        h, w = pooled.shape[2:]
        q = by_head(_tokens(pooled), attn.num_heads)
    return attn.proj(joined(attn, attend, q, k, v).unflatten(1, (h, w)))


def _subsampled(attn: Any, attend: Attend, x: Tensor, size: Sequence[int]) -> Tensor:
    q = by_head(attn.q(x), attn.num_heads)
    if attn.sr is not None:
        on_map = x.transpose(1, 2).unflatten(2, tuple(size))
        pool = getattr(attn, "pool", None)
        x = attn.norm(_tokens(attn.sr(on_map if pool is None else pool(on_map))))
        x = x if pool is None else attn.act(x)
    k, v = split(attn.kv(x), 2, attn.num_heads)
    return projected(attn, joined(attn, attend, q, k, v))


def _pvt(attn: Any, attend: Attend, x: Tensor, feat_size: Sequence[int]) -> Tensor:
    return _subsampled(attn, attend, x, feat_size)


def _nextvit(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    q = by_head(attn.q(x), attn.num_heads)
    if attn.sr is not None:
        x = attn.norm(attn.sr(x.transpose(1, 2))).transpose(1, 2)
    k, v = by_head(attn.k(x), attn.num_heads), by_head(attn.v(x), attn.num_heads)
    return projected(attn, joined(attn, attend, q, k, v))


def _why_not_unmasked_call(attn: Any, x: Tensor, attn_mask: Tensor | None = None) -> str | None:
    return "a mask is given, whose kind the class does not tell" if attn_mask is not None else why_not_drop_call(attn)


def _multi_query(attn: Any, attend: Attend, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    queries = attn.query(x)
    k, v = _tokens(attn.key(x)).unsqueeze(1), _tokens(attn.value(x)).unsqueeze(1)
    out = attended(attn, attend, by_head(_tokens(queries), attn.num_heads), k, v)
    return attn.output(as_map(out, queries.shape[2:]))


# --- one head beside what is passed by, or a gate; projections by convolution ---


def _single_head(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    attending, passing = x.split([attn.pdim, attn.dim - attn.pdim], 1)
    qkv = _tokens(attn.qkv(attn.pre_norm(attending))).unsqueeze(1)
    out = attended(attn, attend, *qkv.split([attn.qk_dim, attn.qk_dim, attn.pdim], 3))
    return attn.proj(torch.cat([as_map(out, x.shape[2:]), passing], 1))


def _modulated(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    h, w = x.shape[2:]
    size = attn.window_size
    padded = (h + -h % size, w + -w % size) if size else (h, w)
    if size:
        x = attn._window_partition(F.pad(x, (0, padded[1] - w, 0, padded[0] - h)), size)
    v, gate = attn.gate_act(attn.v_gate(x)).chunk(2, 1)
    q, k, v = [_tokens(y).unsqueeze(1) for y in (attn.q(x), attn.k(x), v)]
    out = attn.proj(as_map(attended(attn, attend, q, k, v), x.shape[2:]) * gate)
    if size:
        out = attn._window_reverse(out, size, *padded)[:, :, :h, :w].contiguous()
    return out


def _convolved(attn: Any, attend: Attend, x: Tensor) -> Tensor:
    h, w = x.shape[-2:]
    if getattr(attn, "small_kernels", False):  # whose convolution would leave out the last row and column
        x = F.pad(x, (0, -w % attn.att_stride, 0, -h % attn.att_stride))
    on_map = attn.pwise(attn.conv_proj(x))
    q, k, v = by_head(_tokens(on_map), attn.num_heads).chunk(3, 3)
    out = as_map(attended(attn, attend, q, k, v), on_map.shape[2:])
    return attn.upsampling(attn.o_proj(out))[..., :h, :w]


# --- Gemma 4 ---


def _why_not_gemma_call(attn: Any, attn_mask: Tensor | None = None, **given: Any) -> str | None:
    if attn_mask is not None and attn_mask.dtype == torch.bool and not attn.fused_attn:
        return "a boolean mask is given, which the class would add"
    return why_not_drop_call(attn)


def _gemma(
    attn: Any, attend: Attend, x: Tensor, rope_cos: Tensor, rope_sin: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    from timm.models.gemma4_vit import apply_multidimensional_rope

    q, k, v = [p(x).unflatten(-1, (-1, attn.head_dim)) for p in (attn.q_proj, attn.k_proj, attn.v_proj)]
    q, k, v = attn.q_norm(q), attn.k_norm(k), attn.v_norm(v).transpose(1, 2)
    q, k = [apply_multidimensional_rope(y, rope_cos, rope_sin, ndim=2, unsqueeze_dim=2).transpose(1, 2) for y in (q, k)]
    how: dict[str, Any] = {"scale": 1.0}
    if attn_mask is not None:
        how["mask" if attn_mask.dtype == torch.bool else "bias"] = attn_mask
    return attn.proj_drop(attn.o_proj(joined(attn, attend, q, k, v, **how)))


ENTRIES = (
    entry("models.convit.MHSA", _plain),
    entry("models.metaformer.Attention", _plain),
    entry("models.volo.Attention", _channels_last),
    entry("models.fastvit.Attention", _fastvit),
    entry("models.visformer.Attention", _map),
    entry("layers.attention2d.Attention2d", _map, why_not_call=_why_not_unmasked_call),
    entry("models.tnt.Attention", _tnt),
    entry("models.davit.WindowAttention", _davit, _why_not_davit, accepts_any_call),
    entry("models.nest.Attention", _nest),
    entry("models.twins.LocallyGroupedAttn", _grouped, _why_not_grouped, op="window_attention"),
    entry_without_dropout("models.hiera.MaskUnitAttention", _hiera),
    entry_without_dropout("models.hieradet_sam2.MultiScaleAttention", _pooled_queries),
    entry("models.twins.GlobalSubSampleAttn", _subsampled),
    entry("models.pvt_v2.Attention", _pvt),
    entry("models.nextvit.EfficientAttention", _nextvit),
    entry("layers.attention2d.MultiQueryAttention2d", _multi_query, why_not_call=_why_not_unmasked_call),
    entry_without_dropout("models.shvit.SHSA", _single_head),
    entry("models.iformer.SHMA", _modulated),
    entry_without_dropout("models.lowformer.ConvAttention", _convolved),
    entry_without_dropout("models.cpubone.ConvAttention", _convolved),
    entry("models.gemma4_vit.Gemma4Attention", _gemma, why_not_call=_why_not_gemma_call),
)
