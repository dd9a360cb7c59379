"""transformers: MiniMax's lightning attention, which is linear and decays by a number a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accel import library
from accel.backends import inner_dtype
from accel.ops.linear.linear_attention_step import linear_attention_step
from accel.patches.entry import Entry, why_not_version

_PARTS = ("act_fn", "norm", "qkv_proj", "out_proj", "output_gate", "slope_rate", "num_attention_heads", "head_dim")


def _why_not_lightning(module: Any) -> str | None:
    return why_not_version(module, *_PARTS)


def _why_not_lightning_call(module: Any, hidden_states: Tensor, cache: Any = None, **given: Any) -> str | None:
    if given.get("past_key_values") is not None:
        return "past_key_values is given, which the class renames"
    if cache is not None and not hasattr(cache, "get_linear_cache"):
        return f"its cache is a {type(cache).__name__}, which keeps no states"
    return None if hidden_states.dim() == 3 and hidden_states.numel() else "there are no tokens to attend to"


def _lightning(
    module: Any,
    attend: Callable[..., Any],
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    **given: Any,  # which the class takes and does not read
) -> tuple[Tensor, Tensor]:
    qkv = module.act_fn(module.qkv_proj(hidden_states))
    if attention_mask is not None:
        qkv = (qkv * attention_mask[:, :, None]).to(qkv.dtype)
    heads = qkv.unflatten(-1, (module.num_attention_heads, 3 * module.head_dim)).transpose(1, 2)
    q, k, v = heads.split(module.head_dim, -1)
    before = None if cache is None else cache.get_linear_cache(module.layer_idx)
    how: dict[str, Any] = {"feature_map": "identity", "normalize": False, "log_decay": -module.slope_rate.flatten()}
    if before is not None and q.shape[2] == 1 and not library.requires_gradient([q, before]):
        state = before.to(inner_dtype(q), copy=True)  # the class leaves the old one as it was
        out = linear_attention_step(q, k, v, (state, None), **how)
    else:
        start = None if before is None else (before.to(inner_dtype(q)), None)
        out, (state, _) = attend(q, k, v, causal=True, return_state=True, initial_state=start, **how)
    state = state.to(torch.promote_types(v.dtype, module.slope_rate.dtype))  # as the class keeps it
    out = module.norm(out.transpose(1, 2).flatten(2))
    out = module.out_proj(torch.sigmoid(module.output_gate(hidden_states)) * out)
    if cache is not None:
        cache.set_linear_cache(module.layer_idx, state)
    return out, state


ENTRIES = (
    Entry(
        "transformers.models.minimax.modeling_minimax.MiniMaxLightningAttention", "forward", _why_not_lightning,
        _lightning, _why_not_lightning_call, "linear_attention",
    ),
)  # fmt: skip
