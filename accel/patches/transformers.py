"""transformers: ``forward`` of the Swin and Swin v2 layers and of their copies in other models.

There is no smaller method that sees the map before it is padded, rolled and partitioned. Norms, stochastic depth and
the MLP are called as the modules they are; only what stands between roll and roll back is bypassed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.patches import (
    transformers_bias,
    transformers_decoders,
    transformers_deform,
    transformers_linear,
    transformers_moe,
)
from accel.patches.entry import DROPOUT, LINEAR, Entry, why_not_bypass, why_not_dropout

SWIN = "transformers.models.swin.modeling_swin"

# What transformers' sdpa function would act upon; any other keyword passes it by unread.
_SDPA_ARGUMENTS = ("cache", "is_causal", "position_bias", "softcap")


def _project(x: Tensor, q: Any, k: Any, v: Any) -> tuple[Tensor, Tensor | None]:
    """The projections side by side as the op wants them, and their biases."""
    bias = None
    if q.bias is not None or k.bias is not None or v.bias is not None:
        zeros = torch.zeros(q.out_features, dtype=q.weight.dtype, device=q.weight.device)
        bias = torch.cat([zeros if p.bias is None else p.bias for p in (q, k, v)])
    if x.numel() // x.shape[-1] < x.shape[-1]:  # join the smaller of outputs and weights
        return torch.cat([q(x), k(x), v(x)], -1), bias
    return F.linear(x, torch.cat([q.weight, k.weight, v.weight]), bias), bias


def _as_map(hidden_states: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
    return hidden_states.view(hidden_states.shape[0], *input_dimensions, hidden_states.shape[-1])


def _wants_weights(given: dict[str, Any]) -> str | None:
    if given.get("output_attentions"):
        return "attention weights are asked for"
    if given.get("head_mask") is not None:
        return "a head mask is given"
    return None


# --- Swin since transformers 5.9: q_proj, k_proj, v_proj, o_proj ---


def _why_not_swin(layer: Any) -> str | None:
    if hasattr(getattr(layer, "attention", None), "self"):
        return _why_not_copy(f"{SWIN}.Swin")(layer)
    bypassed = why_not_bypass(layer, attention=f"{SWIN}.SwinAttention", dropout=DROPOUT) or why_not_bypass(
        layer.attention,
        relative_position_bias=f"{SWIN}.SwinRelativePositionBias",
        q_proj=LINEAR,
        k_proj=LINEAR,
        v_proj=LINEAR,
        o_proj=LINEAR,
    )
    if bypassed is not None:
        return bypassed
    implementation = layer.attention.config._attn_implementation
    if implementation not in ("eager", "sdpa", "accel"):
        return f"its attention is set to {implementation!r}, not to eager, sdpa or accel"
    return None


def _why_not_swin_call(layer: Any, **given: Any) -> str | None:
    if hasattr(layer.attention, "self"):
        return _why_not_copy_call(layer, **given)
    if getattr(layer.attention.config, "output_attentions", False):
        return "attention weights are asked for"
    for name in _SDPA_ARGUMENTS:
        if given.get(name) is not None:
            return f"{name} is given"
    return _wants_weights(given) or why_not_dropout(layer.attention.attention_dropout, layer.training)


def _swin(layer: Any, attend: Callable[..., Tensor], hidden_states: Tensor, **given: Any) -> Any:
    if hasattr(layer.attention, "self"):
        return _copy(layer, attend, hidden_states, **given)
    run = partial(_swin_layer, layer, attend, given["input_dimensions"], given.get("always_partition", False))
    if layer.gradient_checkpointing and layer.training:  # what the class's forward does around its own body
        return layer._gradient_checkpointing_func(run, hidden_states)
    return run(hidden_states)


def _swin_layer(
    layer: Any,
    attend: Callable[..., Tensor],
    input_dimensions: tuple[int, int],
    always_partition: bool,
    hidden_states: Tensor,
) -> tuple[Tensor, None]:
    if not always_partition:
        layer.set_shift_and_window_size(input_dimensions)
    attention = layer.attention
    x = _as_map(layer.layernorm_before(hidden_states), input_dimensions)
    qkv, bias = _project(x, attention.q_proj, attention.k_proj, attention.v_proj)
    out = attend(
        qkv,
        attention.relative_position_bias.relative_position_bias_table,
        num_heads=attention.num_attention_heads,
        window_size=(layer.window_size, layer.window_size),
        shift_size=(layer.shift_size, layer.shift_size),
        scale=attention.scaling,
        qkv_bias=bias,
        clamp_shift=False,
        dropout_p=attention.attention_dropout if attention.training else 0.0,
    )
    out = layer.dropout(attention.o_proj(out)).view(hidden_states.shape)
    hidden_states = hidden_states + layer.drop_path(out)
    out = layer.dropout(layer.mlp(layer.layernorm_after(hidden_states))) + hidden_states
    return out, None


# --- the older layout: attention.self with query, key, value; attention.output with dense ---


def _why_not_old_layout(layer: Any, prefix: str) -> str | None:
    reason = why_not_bypass(layer, attention=f"{prefix}Attention") or why_not_bypass(
        layer.attention, self=f"{prefix}SelfAttention", output=f"{prefix}SelfOutput"
    )
    if reason is not None:
        return reason
    if getattr(layer.attention, "pruned_heads", None):
        return "heads of its attention were pruned"
    return why_not_bypass(
        layer.attention.self, query=LINEAR, key=LINEAR, value=LINEAR, dropout=DROPOUT
    ) or why_not_bypass(layer.attention.output, dense=LINEAR, dropout=DROPOUT)


def _why_not_copy(prefix: str) -> Callable[[Any], str | None]:
    def why_not(layer: Any) -> str | None:
        return _why_not_old_layout(layer, prefix)

    return why_not


def _why_not_copy_call(layer: Any, **given: Any) -> str | None:
    dropout = layer.attention.self.dropout
    return _wants_weights(given) or why_not_dropout(dropout.p, dropout.training)


def _attention(
    layer: Any,
    attend: Callable[..., Tensor],
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    table: Tensor,
    **how: Any,
) -> Tensor:
    attention = layer.attention.self
    qkv, bias = _project(_as_map(hidden_states, input_dimensions), attention.query, attention.key, attention.value)
    out = attend(
        qkv,
        table,
        num_heads=attention.num_attention_heads,
        window_size=(layer.window_size, layer.window_size),
        shift_size=(layer.shift_size, layer.shift_size),
        qkv_bias=bias,
        clamp_shift=False,
        dropout_p=attention.dropout.p if attention.dropout.training else 0.0,
        **how,
    )
    output = layer.attention.output
    return output.dropout(output.dense(out)).view(hidden_states.shape)


def _copy(
    layer: Any,
    attend: Callable[..., Tensor],
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    always_partition: bool | None = False,
    **unused: Any,
) -> tuple[Tensor]:
    if not always_partition and hasattr(layer, "set_shift_and_window_size"):  # MaskFormer's copy never clamps
        layer.set_shift_and_window_size(input_dimensions)
    table = layer.attention.self.relative_position_bias_table
    out = _attention(layer, attend, layer.layernorm_before(hidden_states), input_dimensions, table)
    hidden_states = hidden_states + layer.drop_path(out)
    out = layer.output(layer.intermediate(layer.layernorm_after(hidden_states)))
    return (hidden_states + out,)


def _swinv2(
    layer: Any,
    attend: Callable[..., Tensor],
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    **unused: Any,
) -> tuple[Tensor]:
    attention = layer.attention.self
    coords = attention.continuous_position_bias_mlp(attention.relative_coords_table)
    out = _attention(
        layer,
        attend,
        hidden_states,
        input_dimensions,
        16 * torch.sigmoid(coords.view(-1, attention.num_attention_heads)),
        logit_scale=attention.logit_scale,
        mask_value=-200.0,  # the library adds its mask of −100 twice
    )
    hidden_states = hidden_states + layer.drop_path(layer.layernorm_before(out))
    out = layer.output(layer.intermediate(hidden_states))
    return (hidden_states + layer.drop_path(layer.layernorm_after(out)),)


def _entry(prefix: str, compute: Callable[..., Any]) -> Entry:
    prefix = f"transformers.models.{prefix}"
    return Entry(f"{prefix}Layer", "forward", _why_not_copy(prefix), compute, _why_not_copy_call)


ENTRIES = (
    *transformers_bias.ENTRIES,
    Entry(f"{SWIN}.SwinLayer", "forward", _why_not_swin, _swin, _why_not_swin_call),
    _entry("donut.modeling_donut_swin.DonutSwin", _copy),
    _entry("maskformer.modeling_maskformer_swin.MaskFormerSwin", _copy),
    _entry("clap.modeling_clap.ClapAudio", _copy),
    _entry("swinv2.modeling_swinv2.Swinv2", _swinv2),
    _entry("swin2sr.modeling_swin2sr.Swin2SR", _swinv2),
    *transformers_decoders.ENTRIES,
    *transformers_deform.ENTRIES,
    *transformers_linear.ENTRIES,
    *transformers_moe.ENTRIES,
)
