"""diffusers: ``Attention`` of the UNets of Stable Diffusion and its kin, while it has the default processor; and the
linear attention of Sana, whose ``Attention`` has a processor of its own, and of its autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accel.patches.entry import Entry, class_path, why_not_version

MODULE = "diffusers.models.attention_processor"
PROCESSOR = f"{MODULE}.AttnProcessor2_0"
SANA = f"{MODULE}.SanaLinearAttnProcessor2_0"


def kind_of(attn: Any) -> str:
    """What the target of a module of class ``Attention`` says behind the class: its processor decides what it is."""
    return f" with {SANA}" if class_path(type(attn.processor)) == SANA else ""


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


# --- Sana: relu as the feature map, float32 inside ---


def _why_not_sana(attn: Any) -> str | None:
    found = class_path(type(attn.processor))
    if found != SANA:
        return f"its processor is {found}, not {SANA}"
    return why_not_version(attn, "to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "heads")


def _sana(
    attn: Any,
    attend: Callable[..., Tensor],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,  # which the processor takes and does not read
    temb: Tensor | None = None,
) -> Tensor:
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
    q = q if attn.norm_q is None else attn.norm_q(q)
    k = k if attn.norm_k is None else attn.norm_k(k)
    q, k, v = [x.unflatten(-1, (attn.heads, -1)).transpose(1, 2).float() for x in (q, k, v)]
    out = attend(q, k, v, feature_map="relu", eps=1e-15)
    out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)
    out = attn.to_out[1](attn.to_out[0](out))
    return out.clip(-65504, 65504) if hidden_states.dtype == torch.float16 else out


def _why_not_multiscale(attn: Any) -> str | None:
    return why_not_version(attn, "eps")


def _why_not_multiscale_call(attn: Any, query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if query.dim() != 4 or not query.dtype == key.dtype == value.dtype:
        return f"its query is {tuple(query.shape)} in {query.dtype} beside {key.dtype} and {value.dtype}"
    return None


def _multiscale(attn: Any, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = [x.transpose(-1, -2) for x in (query, key, value)]  # maps are applied before
    return attend(q, k, v, feature_map="identity", eps=attn.eps).transpose(-1, -2).float()


ENTRIES = (
    Entry(f"{MODULE}.Attention", "forward", _why_not, _attention, _why_not_call, op="softmax_attention"),
    Entry(f"{MODULE}.Attention with {SANA}", "forward", _why_not_sana, _sana, _why_not_call, op="linear_attention"),
    Entry(
        f"{MODULE}.SanaMultiscaleLinearAttention", "apply_linear_attention", _why_not_multiscale, _multiscale,
        _why_not_multiscale_call, op="linear_attention",
    ),
)  # fmt: skip
KINDS = {f"{MODULE}.Attention": kind_of}
