"""timm: what its attention classes have in common: heads from projections, the dropout of weights, the way out.

Only the dropout of weights is bypassed: projections, norms and gates are called as the modules they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.patches.entry import DROPOUT, Entry, accepts_any_call, why_not_bypass, why_not_dropout

Attend = Callable[..., Tensor]


def drops(attn: Any) -> bool:
    """Whether attention weights are dropped: timm's fused path asks the attention module, the other one the child."""
    return attn.training if getattr(attn, "fused_attn", False) else attn.attn_drop.training


def dropout_of(attn: Any) -> float:
    if getattr(attn, "attn_drop", None) is None:
        return 0.0
    return attn.attn_drop.p if drops(attn) else 0.0


def why_not_drop(attn: Any) -> str | None:
    return why_not_bypass(attn, attn_drop=DROPOUT)


def why_not_drop_call(attn: Any, **given: Any) -> str | None:
    return why_not_dropout(attn.attn_drop.p, drops(attn))


def split(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """``(B, N, parts·H·D)`` as that many ``(B, H, N, D)``."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def by_head(x: Tensor, heads: int) -> Tensor:
    """``(B, N, H·D)`` as ``(B, H, N, D)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def heads_of(attn: Any, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v as ``(B, H, N, D)``, from one projection or from three."""
    if getattr(attn, "qkv", None) is None:
        projected = (attn.q_proj(x), attn.k_proj(x), attn.v_proj(x))
        size = projected[0].shape[-1] // attn.num_heads
        return tuple([y.unflatten(-1, (-1, size)).transpose(1, 2) for y in projected])
    return split(_qkv(attn, x), 3, attn.num_heads)


def _qkv(attn: Any, x: Tensor) -> Tensor:
    """The joint projection; BEiT and EVA hold its bias beside it, in parts."""
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv(x)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if attn.qkv_bias_separate:
        return attn.qkv(x) + bias
    return F.linear(x, attn.qkv.weight, bias)  # as the class does


def attended(attn: Any, attend: Attend, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """The op with the class's scale and dropout, ``(B, H, N, D)``."""
    how.setdefault("scale", None if getattr(attn, "fused_attn", False) else getattr(attn, "scale", None))
    return attend(q, k, v, dropout_p=dropout_of(attn), **how)


def joined(attn: Any, attend: Attend, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """The same with its heads side by side again, ``(B, N, H·D)``."""
    return attended(attn, attend, q, k, v, **how).transpose(1, 2).flatten(2)


def as_map(out: Tensor, size: Any) -> Tensor:
    """``(B, H, N, D)`` as the map of channels ``(B, H·D, h, w)``."""
    return out.transpose(-1, -2).flatten(1, 2).unflatten(2, size)


def projected(attn: Any, out: Tensor) -> Tensor:
    return attn.proj_drop(attn.proj(out))


def entry(
    target: str,
    compute: Callable[..., Tensor],
    why_not: Callable[[Any], str | None] = why_not_drop,
    why_not_call: Callable[..., str | None] = why_not_drop_call,
    op: str = "softmax_attention",
) -> Entry:
    return Entry(f"timm.{target}", "forward", why_not, compute, why_not_call, op=op)


def entry_without_dropout(target: str, compute: Callable[..., Tensor]) -> Entry:
    """For a class that drops no weights: nothing of it is bypassed."""
    return entry(target, compute, accepts_any_call, accepts_any_call)
