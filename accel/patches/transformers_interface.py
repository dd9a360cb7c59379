"""The attention and mask functions that transformers' registries know as ``"accel"``.

The mask function hands masks on as rules, so that a padded, causal or windowed batch needs no ``(T, S)`` tensor; the
attention function reads them. What the op does not give is computed by the model's own eager function, and said.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from accel.ops.attention.softmax_attention import softmax_attention
from accel.patches import transformers_calls
from accel.patches.stand import Stand, say_once
from accel.patches.transformers_rules import (
    MASKING,
    Lazy,
    LazyBias,
    LazyMask,
    MaskRule,
    read_mask_function,
    written_out,
)
from accel.patches.transformers_unseeing import fill, unseeing

NAME = "accel"
EAGER_MASKS = "accel_eager_masks"
"""The same attention with the masks that eager gets, for models whose code relies on them."""
NAMES = (NAME, EAGER_MASKS)
FIELD = "_attn_implementation_internal"
"""Where a configuration keeps the name."""
STAND = "_accel"
"""The attribute under which a patched attention module keeps its counts."""


# --- attention ---


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function over :func:`accel.softmax_attention`.

    Queries ``(B, Hq, T, D)``, keys and values ``(B, Hkv, S, D)``, the output ``(B, T, Hq, D)`` without weights. A call
    that asks for weights, or passes what the op does not know and the class's eager function reads, goes to that
    function. What it does not read is not read here. ``s_aux`` is a sink per head, ``sinks`` another that
    broadcasts to ``(B, Hq, T, 1)``. A query that the mask lets see no key gets the mean of the values, as from eager.

    Raises:
        NotImplementedError: sparse indices or a paged cache, a keyword that is not known here, or weights, of a model
            that has no eager function.
    """
    stand = getattr(module, STAND, None)
    mask: Tensor | MaskRule
    if attention_mask is not None:
        mask = attention_mask
    else:
        mask = _without_mask(query, key, _is_causal(module, is_causal), sliding_window)
    reason = transformers_calls.why_not(module, dropout, {"cache": cache, **kwargs})
    kept = stand.why_not_here(query) if isinstance(stand, Stand) and reason is None else None
    reason = reason or kept
    if isinstance(stand, Stand):
        stand.count(reason)
    elif reason is not None and not torch.compiler.is_compiling():
        say_once(type(module).__name__, reason)
    if reason is not None:
        kwargs |= {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux, "sinks": sinks}
        kwargs |= {"position_bias": position_bias}
        kwargs = {k: written_out(v) for k, v in kwargs.items() if v is not None}
        plain = softcap is None and s_aux is None and sinks is None
        own = getattr(stand, "own", None) if kept is not None and plain else None
        if own is not None:  # what the model had before it was patched; the masks that are made for accel fit it
            kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
            made: tuple[Tensor, None] = own(module, query, key, value, written_out(attention_mask), **kwargs)
            return made
        return transformers_calls.eager(
            reason, module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    bias = position_bias if transformers_calls.reads(module, "position_bias") and not _is_zero(module) else None
    cap = softcap if transformers_calls.reads(module, "softcap") else None
    each = sinks if transformers_calls.reads(module, "sinks") else None
    if query.shape[0] != key.shape[0]:  # learned queries without a batch
        batch = max(query.shape[0], key.shape[0])
        query, key, value = [x.expand(batch, -1, -1, -1) for x in (query, key, value)]
    attend: Any = stand.attend if isinstance(stand, Stand) else softmax_attention
    how = {"scale": scaling, "dropout_p": dropout, "softcap": cap, "sinks": s_aux, **pairs(mask, bias)}
    if each is not None:  # a sink of its own for each query takes its share of the weights afterwards
        out, lse = attend(query, key, value, return_lse=True, **how)
        each = each.view(-1, 1, 1) if each.dim() == 1 else each
        out = out * torch.sigmoid(lse.unsqueeze(-1) - each.to(lse.dtype)).to(out.dtype)
    else:
        out = attend(query, key, value, **how)
    rows = unseeing(mask) if s_aux is None and each is None else None
    if rows is not None:
        out = fill(out, rows, query, key, value, scaling, linear=cap is None)
    return out.transpose(1, 2).contiguous(), None


def _is_causal(module: nn.Module, asked: bool | None) -> bool:
    """Whether no mask means causal order. BridgeTower calls the attention of its encoders causal, gives it no mask, and
    runs in eager attention only, which then hides nothing."""
    if asked is not None:
        return asked
    return bool(getattr(module, "is_causal", True)) and getattr(module, "is_decoder", None) is not False


def _without_mask(query: Tensor, key: Tensor, causal: bool, sliding_window: int | None) -> MaskRule:
    """What no mask means: everything, or causal order with the last query beside the last key.

    The mask function leaves the mask out only where there are as many queries as keys, or one; a model may have
    dropped all but the last queries since.
    """
    queries, keys = query.shape[2], key.shape[2]
    window = None
    if sliding_window is not None and keys >= sliding_window:
        window = (sliding_window - 1, -1 if causal else sliding_window - 1)
    return MaskRule(query.shape[0], queries, keys, query.device, causal and queries > 1, window, keys - queries)


def _is_zero(module: nn.Module) -> bool:
    """Whether the bias of this call is the zeros that T5's cross-attention passes for want of one. Not every version
    calls UMT5's own attention causal, but a layer with a table is never the other kind."""
    other = type(module).__name__ in _T5_LIKE and bool(module.is_decoder) and not module.is_causal
    return other and not module.has_relative_attention_bias


_T5_LIKE = {"T5Attention", "MT5Attention", "UMT5Attention", "LongT5Attention", "SwitchTransformersAttention"}
_T5_LIKE |= {"Pop2PianoAttention"}


def pairs(mask: Tensor | MaskRule | None, position_bias: Tensor | None) -> dict[str, Any]:
    """The op's arguments for a mask, boolean, additive or a rule, and a bias, dense or a table."""
    how: dict[str, Any] = {}
    dense: list[Tensor] = []
    for x in (mask, position_bias):
        if isinstance(x, LazyBias) and "bias_table" in how:
            dense.append(x.dense())
        elif isinstance(x, Lazy | MaskRule):
            how |= x.arguments()
        elif x is not None and x.dtype == torch.bool:
            how["mask"] = x
        elif x is not None:  # eager attention adds integers too
            dense.append(x if x.is_floating_point() else x.float())
    if dense:
        how["bias"] = dense[0] if len(dense) == 1 else dense[0] + dense[1]
    return how


# --- masks ---


@dataclass
class Packing:
    """A flattened batch on its way through a model."""

    cu_seqlens: Tensor
    total: int
    model: str
    """The name of its class, for what is said."""
    gaps: bool
    """Whether padding stood between real tokens, where distances are no longer those of the padded batch."""
    masks: int = 0


_packing: ContextVar[Packing | None] = ContextVar("accel_packing", default=None)


@contextmanager
def packed(packing: Packing) -> Iterator[None]:
    """Masks made within the block are those of this flattened batch."""
    token = _packing.set(packing)
    try:
        yield
    finally:
        _packing.reset(token)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function: None where nothing is masked that the attention function does not mask by itself.

    Otherwise a boolean ``(B, 1, T, S)``, as a rule where it is one: causal order, a sliding window, padding, packed
    sequences. Chunks, blocks and masks of the model's own are written out, by transformers.
    """
    if mask_function is None:
        mask_function = sys.modules[MASKING].causal_mask_function  # type: ignore[attr-defined]
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    packing = None if tracing else _packing.get()
    if packing is not None:
        return _packed_mask(packing, q_length, kv_length, mask_function, device)
    rule = None
    if not tracing and isinstance(q_offset, int) and isinstance(kv_offset, int):
        sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
        rule = _rule(sizes, mask_function, attention_mask, torch.device(device))
    if rule is None:
        may_skip = allow_is_causal_skip and q_length in (1, kv_length) and not torch.jit.is_tracing()
        made: Tensor | None = sys.modules[MASKING].sdpa_mask(  # type: ignore[attr-defined]
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, device=device,
            allow_is_causal_skip=may_skip, allow_is_bidirectional_skip=allow_is_bidirectional_skip, **kwargs,
        )  # fmt: skip
        return made
    may_skip = allow_is_causal_skip if rule.causal else allow_is_bidirectional_skip
    plain = rule.key_mask is None and rule.cu_seqlens is None and not rule.narrows
    if may_skip and plain and (not rule.causal or q_length == 1 or q_length == kv_length):
        return None
    return LazyMask(rule)


def eager_mask(**given: Any) -> Tensor | None:
    """transformers' mask function for eager attention, which adds what it makes: under a name of ours."""
    made: Tensor | None = sys.modules[MASKING].eager_mask(**given)  # type: ignore[attr-defined]
    return made


def _rule(
    sizes: tuple[int, int, int, int, int], mask_function: Any, attention_mask: Tensor | None, device: torch.device
) -> MaskRule | None:
    """The mask as a rule, or None where it is none that the op takes."""
    batch, queries, keys, q_offset, kv_offset = sizes
    seen = read_mask_function(mask_function)
    if seen is None or (attention_mask is not None and attention_mask.dim() != 2):
        return None
    rule = MaskRule(batch, queries, keys, device, seen.causal, seen.window, q_offset - kv_offset)
    if attention_mask is not None:
        real = attention_mask[:, kv_offset : kv_offset + keys].to(torch.bool)
        if real.shape[1] < keys:  # keys that a cache has room for
            real = torch.nn.functional.pad(real, (0, keys - real.shape[1]))
        if not bool(real.all()):
            rule = replace(rule, key_mask=real)
    if seen.sequences is not None:
        if batch != 1 or rule.key_mask is not None:
            return None
        lengths = torch.unique_consecutive(seen.sequences[0], return_counts=True)[1]
        ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        rule = replace(rule, cu_seqlens=ends.to(torch.int32))
    if not rule.aligned:
        return None
    _ = rule.unseeing  # looked at while masks are made, not between the layers
    return rule


@dataclass(frozen=True, eq=False)
class _Refused(MaskRule):
    """What has no packed form. Models also make masks that none of their layers reads, so reading it is the error."""

    error: Exception = field(kw_only=True)

    @staticmethod
    def of(rule: MaskRule, error: Exception) -> _Refused:
        return _Refused(rule.batch, rule.queries, rule.keys, rule.device, error=error)

    def arguments(self) -> dict[str, Any]:
        raise self.error

    def dense(self) -> Tensor:
        raise self.error


def _packed_mask(packing: Packing, queries: int, keys: int, mask_function: Any, device: Any) -> Tensor:
    if (queries, keys) != (packing.total, packing.total):
        raise NotImplementedError(
            f"a flattened batch of {packing.total} tokens meets an attention of {queries} queries and {keys} keys in "
            f"{packing.model}"
        )
    packing.masks += 1
    seen = read_mask_function(mask_function)
    rule = MaskRule(1, queries, keys, torch.device(device), cu_seqlens=packing.cu_seqlens)
    if seen is None:
        reason = "masks by more than causal order, a sliding window and padding, which has no packed form here"
        return LazyMask(_Refused.of(rule, NotImplementedError(f"{packing.model} {reason}")))
    rule = replace(rule, causal=seen.causal, window=seen.window)
    if packing.gaps and seen.window is not None:
        reason = f"padding stands between real tokens, where a sliding window of {packing.model} counts over it"
        return LazyMask(_Refused.of(rule, ValueError(reason)))
    return LazyMask(rule)
