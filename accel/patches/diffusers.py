"""diffusers: ``Attention`` of the UNets of Stable Diffusion and its kin, while it has the default processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accel.patches.entry import Entry, class_path

MODULE = "diffusers.models.attention_processor"
PROCESSOR = f"{MODULE}.AttnProcessor2_0"


def _why_not(attn: Any) -> str | None:
    # Projections and norms are called as the modules they are; what is bypassed is the processor.
    found = class_path(type(attn.processor))
    if found != PROCESSOR:
        return f"its processor is {found}, not {PROCESSOR}"
    if attn.inner_kv_dim != attn.inner_dim:
        return "its keys have fewer heads than its queries, for which the processor is not made"
    return None


def _why_not_call(attn: Any, hidden_states: Tensor, temb: Tensor | None = None, **given: Any) -> str | None:
    known = ("encoder_hidden_states", "attention_mask")
    others = [name for name in given if name not in known]
    return f"its processor is handed {', '.join(others)}" if others else None


def _attention(
    attn: Any,
    attend: Callable[..., Tensor],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    temb: Tensor | None = None,
) -> Tensor:
    x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
    size = x.shape[2:] if x.dim() == 4 else None
    if size is not None:
        x = x.flatten(2).transpose(1, 2)
    context = x if encoder_hidden_states is None else encoder_hidden_states
    how = _mask(attn, attention_mask, len(context), context.shape[1])
    if attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    if encoder_hidden_states is None:
        context = x
    elif attn.norm_cross is not None:
        context = attn.norm_encoder_hidden_states(context)
    projected = (attn.to_q(x), attn.to_k(context), attn.to_v(context))
    q, k, v = [y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in projected]
    q = q if attn.norm_q is None else attn.norm_q(q)
    k = k if attn.norm_k is None else attn.norm_k(k)
    out = attend(q, k, v, **how).transpose(1, 2).flatten(2)
    for module in attn.to_out:  # projection and dropout
        out = module(out)
    if size is not None:
        out = out.transpose(1, 2).unflatten(2, size)
    if attn.residual_connection:
        out = out + hidden_states
    return out / attn.rescale_output_factor


def _mask(attn: Any, attention_mask: Tensor | None, batch: int, keys: int) -> dict[str, Tensor]:
    """The op's argument for the class's mask, which the class pads and repeats for the heads."""
    mask = attn.prepare_attention_mask(attention_mask, keys, batch)
    if mask is None:
        return {}
    name = "mask" if mask.dtype == torch.bool else "bias"
    return {name: mask.view(batch, attn.heads, -1, mask.shape[-1])}


ENTRIES = (Entry(f"{MODULE}.Attention", "forward", _why_not, _attention, _why_not_call, op="softmax_attention"),)
