"""torch.nn: ``MultiheadAttention``, and ``TransformerEncoderLayer``, whose fast path would pass its attention by.

The decoder layer calls its two attentions as the modules they are and needs no entry. Two results differ on purpose
from those of the class: a query whose keys are all hidden gets the bias of the output projection where the class gives
NaN, and a floating mask is added to the logits in eval mode as in training, where the encoder layer's fast path takes
every number but 0 for hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accel.nn.attention import attend_heads, linear
from accel.patches.entry import Entry, class_path, why_not_dropout

ATTENTION = "torch.nn.modules.activation.MultiheadAttention"
LAYER = "torch.nn.modules.transformer.TransformerEncoderLayer"

# --- MultiheadAttention ---


def _why_not(attn: Any) -> str | None:
    # Its only child is out_proj, whose weight and bias the class reads without calling it. So do we.
    return None


def _why_not_call(
    attn: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> str | None:
    if need_weights:
        return "attention weights are asked for"
    if is_causal and attn_mask is None:
        return "is_causal is a hint about a mask, and no mask is given"
    if is_causal and (attn.bias_k is not None or attn.add_zero_attn):
        return "is_causal is given, and further keys have no position"
    if query.is_nested or key.is_nested or value.is_nested:
        if query is not key or key is not value:
            return "nested tensors are taken as self-attention alone"
        if query.size(0) == 0:
            return "a nested tensor without sequences is given"
        if key_padding_mask is not None or attn_mask is not None:
            return "a nested tensor and a mask are given"
        if attn.bias_k is not None or attn.add_zero_attn:
            return "a nested tensor is given, and further keys belong to every sequence"
    return why_not_dropout(attn.dropout, attn.training)


def _attention(
    attn: Any,
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    if query.is_nested:
        return _nested_attention(attn, attend, query), None
    masks: dict[str, Any] = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "is_causal": is_causal}
    return _project(attn, attend_heads(attn, query, key, value, attend, **masks)), None


def _project(attn: Any, x: Tensor) -> Tensor:
    return linear(x, attn.out_proj.weight, attn.out_proj.bias)


def _nested_attention(attn: Any, attend: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Self-attention of sequences of different lengths, packed one behind the other."""
    sequences = x.unbind()
    lengths = [len(s) for s in sequences]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=x.device)
    packed = torch.cat(sequences)
    out = _project(attn, attend_heads(attn, packed, packed, packed, attend, cu_seqlens_q=starts))
    return torch.nested.as_nested_tensor(list(out.split(lengths)), layout=x.layout)


# --- TransformerEncoderLayer ---


def _why_not_layer(layer: Any) -> str | None:
    found = class_path(type(layer.self_attn))
    return None if found == ATTENTION else f"self_attn is {found}, not the plain {ATTENTION}"


def _why_not_layer_call(
    layer: Any,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> str | None:
    # The layer only sees to it that its attention is called; there must be a replacement there that takes the call.
    if getattr(layer.self_attn.__dict__.get("forward"), "target", None) != ATTENTION:
        return "self_attn is not patched"
    return _why_not_call(layer.self_attn, src, src, src, src_key_padding_mask, False, src_mask, is_causal=is_causal)


def _layer(
    layer: Any,
    attend: Callable[..., Tensor],
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Both halves through their modules, which counts the kernel's calls in ``self_attn``."""

    def attention(x: Tensor) -> Tensor:
        return layer._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal)

    if layer.norm_first:
        x = src + attention(layer.norm1(src))
        return x + layer._ff_block(layer.norm2(x))
    x = layer.norm1(src + attention(src))
    return layer.norm2(x + layer._ff_block(x))


ENTRIES = (
    Entry(ATTENTION, "forward", _why_not, _attention, _why_not_call, op="softmax_attention"),
    Entry(LAYER, "forward", _why_not_layer, _layer, _why_not_layer_call, op="softmax_attention"),
)
