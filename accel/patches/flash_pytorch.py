"""flash-pytorch: its gated attention unit and its FLASH layer.

Norms, projections, scales and rotary embeddings are called as the modules they are; bypassed are the activation, the
dropout of weights and the bias by distance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.ops.rules import T5Buckets
from accel.patches.entry import DROPOUT, Entry, why_not_bypass, why_not_dropout, why_not_version

MODULE = "flash_pytorch.flash_pytorch"
ACTIVATIONS = {f"{MODULE}.ReLUSquared": "relu2", f"{MODULE}.LaplacianAttnFn": "laplace"}
Attend = Callable[..., Tensor]


def _activation(layer: Any) -> str | None:
    found = type(layer.attn_fn)
    return ACTIVATIONS.get(f"{found.__module__}.{found.__qualname__}")


def _why_not(layer: Any) -> str | None:
    if _activation(layer) is None:
        return f"attn_fn is {type(layer.attn_fn).__name__}, not one of {', '.join(ACTIVATIONS)}"
    return why_not_bypass(layer, dropout=DROPOUT, rel_pos_bias=f"{MODULE}.T5RelativePositionBias")


def _why_not_flash(layer: Any) -> str | None:
    reason = why_not_version(layer, "group_size", "reduce_group_non_causal_attn", "shift_tokens")
    if reason is None and not layer.causal and not layer.reduce_group_non_causal_attn:
        return "reduce_group_non_causal_attn is off: a chunk sees no other in the linear part"
    return reason or _why_not(layer)


def _why_not_call(layer: Any, x: Tensor, **given: Any) -> str | None:
    if x.dim() != 3:
        return f"x has {x.dim()} axes, not (B, T, channels)"
    mask = given.get("mask")
    if mask is not None and mask.shape != x.shape[:2]:
        return f"mask is {tuple(mask.shape)}, not (B, T)"
    return why_not_dropout(layer.dropout.p, layer.dropout.training)


def _rules(layer: Any, scale: float) -> dict[str, Any]:
    bias = layer.rel_pos_bias
    return {
        "bias_table": bias.relative_attention_bias.weight * (bias.scale * scale),
        "bias_index": T5Buckets(bidirectional=not bias.causal, max_distance=bias.max_distance),
        "dropout_p": layer.dropout.p if layer.dropout.training else 0.0,
    }


def _unit(
    layer: Any, attend: Attend, x: Tensor, rel_pos_bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    scale = 1.0 / max(x.shape[-2], 1)  # of the biased logits
    hidden = layer.norm(x)
    v, gate = layer.to_hidden(hidden).chunk(2, dim=-1)
    q, k = layer.offsetscale(layer.to_qk(hidden))
    rules = _rules(layer, scale)
    if rel_pos_bias is not None:
        rules["bias"] = rel_pos_bias * scale
    if mask is not None:
        rules["mask"] = mask[:, None]
    activation = _activation(layer)
    out = layer.to_out(attend(q, k, v, gate, activation=activation, scale=scale, causal=layer.causal, **rules))
    return out + x if layer.add_residual else out


def _flash(layer: Any, attend: Attend, x: Tensor, mask: Tensor | None = None) -> Tensor:
    hidden = layer.norm(x)
    if layer.shift_tokens:
        moved, kept = hidden.chunk(2, dim=-1)
        hidden = torch.cat([F.pad(moved, (0, 0, 1, -1)), kept], -1)
    v, gate = layer.to_hidden(hidden).chunk(2, dim=-1)
    uses = layer.qk_offset_scale(layer.to_qk(hidden))
    if layer.rotary_pos_emb is not None:
        uses = [layer.rotary_pos_emb.rotate_queries_or_keys(use) for use in uses]
    quad_q, lin_q, quad_k, lin_k = uses
    out = attend(
        *(quad_q, quad_k, lin_q, lin_k, v, gate),
        chunk_size=layer.group_size,
        causal=layer.causal,
        activation=_activation(layer),
        key_mask=mask,
        **_rules(layer, 1.0),
    )
    return layer.to_out(out) + x


ENTRIES = (
    Entry(f"{MODULE}.GAU", "forward", _why_not, _unit, _why_not_call, op="gau_attention"),
    Entry(f"{MODULE}.FLASH", "forward", _why_not_flash, _flash, _why_not_call, op="flash_mix"),
)
