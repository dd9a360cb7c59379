"""transformers: decoders that compute attention without the registry: BLOOM with its ALiBi, and copies of BART's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accel import memo
from accel.patches import transformers_calls
from accel.patches.entry import DROPOUT, Entry, why_not_bypass, why_not_dropout
from accel.patches.transformers_unseeing import fill, unseeing

_BART = ("hidden_states", "key_value_states", "cache", "attention_mask")
_BLOOM = ("hidden_states", "residual", "alibi", "attention_mask", "layer_past")
_OTHER_VERSION = "its forward takes other arguments: not the version of the library that is known here"


def _why_not_signature(module: Any, names: tuple[str, ...]) -> str | None:
    found = tuple(inspect.signature(type(module).forward).parameters)[1:]
    return None if found[: len(names)] == names else _OTHER_VERSION


# --- masks that are added ---

_seen: memo.Facts[Tensor | None] = memo.Facts()


def _visible(added: Tensor) -> Tensor | None:
    """The boolean mask that an added one stands for, read once for all layers; None where it adds other numbers."""
    if not memo.may_remember(added) or added.requires_grad:
        return None
    return _seen.get_or_read((added,), None, lambda: _read(added))


def _read(added: Tensor) -> Tensor | None:
    visible = added == 0
    return visible if bool((visible | (added <= torch.finfo(added.dtype).min)).all()) else None


def _attend(
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    added: Tensor | None,
    bias: Tensor | None,
    **how: Any,
) -> Tensor:
    """``(B, T, H · E)``, as softmax(scores + bias + added) gives it."""
    mask = None if added is None else _visible(added)
    if added is not None and mask is None:
        bias = added if bias is None else bias + added
    given: dict[str, Any] = {"bias": bias, "mask": mask}
    out = attend(q, k, v, **{name: x for name, x in given.items() if x is not None}, **how)
    rows = unseeing(mask)
    if rows is not None:
        out = fill(out, rows, q, k, v, how["scale"], linear=True)
    return out.transpose(1, 2).flatten(2)


# --- BART's attention, copied by MVP, XGLM and TrOCR ---


def _why_not_bart(module: Any) -> str | None:
    return _why_not_signature(module, _BART)


def _why_not_bart_call(module: Any, **given: Any) -> str | None:
    if transformers_calls.weights_wanted(module, given):
        return transformers_calls.WEIGHTS
    for name in ("attn_prompt", "past_key_values"):
        if given.get(name) is not None:
            return f"{name} is given"
    return why_not_dropout(module.dropout, module.training)


def _bart(
    module: Any,
    attend: Callable[..., Tensor],
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    crossing = key_value_states is not None
    both = cache is not None and hasattr(cache, "is_updated")  # a cache for each of the two attentions
    part = (cache.cross_attention_cache if crossing else cache.self_attention_cache) if both else cache
    if crossing and both and cache.is_updated.get(module.layer_idx):
        k, v = part.layers[module.layer_idx].keys, part.layers[module.layer_idx].values
    else:
        source = hidden_states if key_value_states is None else key_value_states
        k, v = [_heads(module, project(source)) for project in (module.k_proj, module.v_proj)]
        if part is not None:
            k, v = part.update(k, v, module.layer_idx, kwargs=given)
            if crossing and both:
                cache.is_updated[module.layer_idx] = True
    q = _heads(module, module.q_proj(hidden_states))
    dropout = module.dropout if module.training else 0.0
    out = _attend(attend, q, k, v, attention_mask, None, scale=module.scaling, dropout_p=dropout)
    return module.out_proj(out), None


def _heads(module: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)


def _bart_entry(target: str) -> Entry:
    path = f"transformers.models.{target}"
    return Entry(path, "forward", _why_not_bart, _bart, _why_not_bart_call, "softmax_attention")


# --- BLOOM ---


def _why_not_bloom(module: Any) -> str | None:
    return _why_not_signature(module, _BLOOM) or why_not_bypass(module, attention_dropout=DROPOUT)


def _why_not_bloom_call(module: Any, **given: Any) -> str | None:
    if transformers_calls.weights_wanted(module, given):
        return transformers_calls.WEIGHTS
    if module.pretraining_tp > 1 and module.slow_but_exact:
        return "its last product is taken in slices"
    return why_not_dropout(module.attention_dropout.p, module.training)


def _bloom(
    module: Any,
    attend: Callable[..., Tensor],
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    **given: Any,
) -> tuple[Tensor, None]:
    fused = module.query_key_value(hidden_states).unflatten(-1, (module.num_heads, 3, module.head_dim))
    q, k, v = fused.permute(3, 0, 2, 1, 4).unbind(0)
    if layer_past is not None:
        k, v = layer_past.update(k, v, module.layer_idx)
    bias = alibi.view(q.shape[0], module.num_heads, 1, -1)
    bias = bias if module.beta == 1.0 else bias * module.beta
    dropout = module.attention_dropout.p if module.training else 0.0
    out = _attend(attend, q, k, v, attention_mask, bias, scale=module.inv_norm_factor, dropout_p=dropout)
    out = torch.nn.functional.dropout(module.dense(out), p=module.hidden_dropout, training=module.training)
    return residual + out, None


ENTRIES = (
    _bart_entry("mvp.modeling_mvp.MvpAttention"),
    _bart_entry("xglm.modeling_xglm.XGLMAttention"),
    _bart_entry("trocr.modeling_trocr.TrOCRAttention"),
    Entry(
        "transformers.models.bloom.modeling_bloom.BloomAttention", "forward", _why_not_bloom, _bloom,
        _why_not_bloom_call, "softmax_attention",
    ),
)  # fmt: skip
