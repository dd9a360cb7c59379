"""MossFormer in modelscope and clearvoice: FLASH whose weights serve two values, v and u, side by side here.

Rotary embeddings are called as the modules they are, and all around the attention is left to the class; bypassed is the
dropout of weights. A class gives back a pair, or an iterator of one where we give a pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accel.ops.linear.gau_attention import gau_attention
from accel.patches.entry import DROPOUT, Entry, why_not_bypass, why_not_dropout, why_not_version

SHARED = (
    "modelscope.models.audio.separation.mossformer_block.MossFormerBlock",
    "modelscope.models.audio.separation.m2.mossformer_block.FLASH_ShareA_FFConvM",
    "clearvoice.models.mossformer2_ss.mossformer2_block.FLASH_ShareA_FFConvM",
    "clearvoice.models.mossformer2_se.mossformer2_block.FLASH_ShareA_FFConvM",
    "clearvoice.models.mossformer2_sr.mossformer2_block.FLASH_ShareA_FFConvM",
    "clearvoice.models.av_mossformer2_tse.mossformer.utils.Transformer.FLASH_ShareA_FFConvM",
)
ACROSS = "clearvoice.models.mossformer_gan_se.mossformer.MossFormer"
"""A batch of B · T sequences, which also looks along T."""


def _why_not(layer: Any) -> str | None:
    reason = why_not_version(layer, "group_size", "causal", "rotary_pos_emb")
    return reason or why_not_bypass(layer, dropout=DROPOUT)


def _why_not_call(layer: Any, x: Tensor, mask: Tensor | None = None, **given: Any) -> str | None:
    main = [given[name] for name in ("quad_q", "lin_q", "quad_k", "lin_k", "v", "u")]
    if x.dim() != 3 or any(y.dim() != 3 or y.shape[:2] != x.shape[:2] for y in main):
        return f"not all is (B, T, channels): {', '.join(str(tuple(y.shape)) for y in (x, *main))}"
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        return f"mask is {mask.dtype} {tuple(mask.shape)}, not boolean (B, T)"
    return why_not_dropout(layer.dropout.p, layer.dropout.training)


def _mixed(
    layer: Any, attend: Callable[..., Tensor], tokens: int, uses: tuple[Tensor, ...], both: Tensor, mask: Tensor | None
) -> Tensor:
    quad_q, lin_q, quad_k, lin_k = uses
    how = {"chunk_size": tokens, "causal": layer.causal, "key_mask": mask, "dropout_p": _dropout(layer)}
    return attend(quad_q, quad_k, lin_q, lin_k, both, **how)


def _dropout(layer: Any) -> float:
    return float(layer.dropout.p) if layer.dropout.training else 0.0


def _turned(layer: Any, *uses: Tensor) -> tuple[Tensor, ...]:
    if layer.rotary_pos_emb is None:
        return uses
    return tuple(layer.rotary_pos_emb.rotate_queries_or_keys(use) for use in uses)


def _shared(
    layer: Any,
    attend: Callable[..., Tensor],
    x: Tensor,
    quad_q: Tensor,
    lin_q: Tensor,
    quad_k: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    uses = _turned(layer, quad_q, lin_q, quad_k, lin_k)
    out = _mixed(layer, attend, layer.group_size, uses, torch.cat([v, u], -1), mask)
    return out[..., : v.shape[-1]], out[..., v.shape[-1] :]


def _why_not_across(layer: Any, x: Tensor, B: Any, **given: Any) -> str | None:
    reason = _why_not_call(layer, x, **given)
    if reason is not None:
        return reason
    size = {given[name].shape[2] for name in ("quad_q", "v", "u")}
    if len(size) > 1:
        return f"its values are of another size than its keys, {sorted(size)}, and the class would mix up their tokens"
    if layer.causal and layer.group_size != x.shape[1]:
        return f"it is causal, and has {x.shape[1]} tokens where group_size is {layer.group_size}"
    if not isinstance(B, int) or B < 1 or x.shape[0] % B:
        return f"B is {B!r}, which does not divide a batch of {x.shape[0]}"
    return None


def _across(
    layer: Any,
    attend: Callable[..., Tensor],
    x: Tensor,
    quad_q: Tensor,
    lin_q: Tensor,
    quad_k: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor,
    B: int,
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Each sequence whole, as one group; and for each of its places all sequences of a batch but its own."""
    both = torch.cat([v, u], -1)
    uses = _turned(layer, quad_q, lin_q, quad_k, lin_k)
    within = _mixed(layer, attend, max(x.shape[1], 1), uses, both, mask)
    q, k, values = (y.unflatten(0, (B, -1)).transpose(1, 2) for y in (uses[0], uses[2], both))  # places as heads
    others = ~torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
    scale = 1.0 / max(q.shape[2], 1)
    along = gau_attention(q, k, values, activation="relu2", scale=scale, mask=others, dropout_p=_dropout(layer))
    out = within + along.transpose(1, 2).flatten(0, 1)
    return out[..., : v.shape[-1]], out[..., v.shape[-1] :]


ENTRIES = (
    *(Entry(name, "cal_attention", _why_not, _shared, _why_not_call, "flash_mix") for name in SHARED),
    Entry(ACROSS, "cal_attention", _why_not, _across, _why_not_across, "flash_mix"),
)
