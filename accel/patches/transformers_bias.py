"""transformers: the methods that make a dense relative position bias, T5's and BEiT's, hand on the table instead.

Data2VecVision's attention, a copy of BEiT's that does not go through the registry, is computed here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accel.ops.rules import Grid2D, T5Buckets
from accel.patches import transformers_interface
from accel.patches.entry import DROPOUT, LINEAR, Entry, why_not_bypass, why_not_dropout
from accel.patches.transformers_rules import LazyBias

EMBEDDING = "torch.nn.modules.sparse.Embedding"
_T5_ARGUMENTS = ("query_length", "key_length", "device", "past_seen_tokens")
_BEIT_ARGUMENTS = ("window_size", "interpolate_pos_encoding", "dim_size")
_OTHER_VERSION = "the method takes other arguments: not the version of the library that is known here"


def _takes(method: Any, names: tuple[str, ...]) -> bool:
    return tuple(inspect.signature(method).parameters)[1:] == names


def _compiling() -> str | None:
    return "torch.compile writes the bias out" if torch.compiler.is_compiling() else None


# --- T5 ---


def _has_table(module: Any) -> bool:
    return bool(getattr(module, "has_relative_attention_bias", False))


def _why_not_t5(module: Any) -> str | None:
    if not _takes(type(module).compute_bias, _T5_ARGUMENTS):
        return _OTHER_VERSION
    return why_not_bypass(module, relative_attention_bias=EMBEDDING)


def _why_not_t5_call(
    module: Any, query_length: Any, key_length: Any, device: Any = None, past_seen_tokens: Any = 0
) -> str | None:
    if not all(isinstance(n, int) for n in (query_length, key_length, past_seen_tokens)):
        return "its cache counts tokens on the device"
    return _compiling()


def _t5(
    module: Any,
    attend: Callable[..., Tensor],
    query_length: int,
    key_length: int,
    device: Any = None,
    past_seen_tokens: int = 0,
) -> Tensor:
    buckets = T5Buckets(not module.is_decoder, module.relative_attention_max_distance, past_seen_tokens)
    return LazyBias.of(module.relative_attention_bias.weight, buckets, query_length, key_length)


def _t5_entry(target: str) -> Entry:
    return Entry(
        f"transformers.models.{target}", "compute_bias", _why_not_t5, _t5, _why_not_t5_call, "softmax_attention",
        applies=_has_table, takes_tensor=False,
    )  # fmt: skip


# --- BEiT ---


def _why_not_beit(module: Any) -> str | None:
    return None if _takes(type(module).forward, _BEIT_ARGUMENTS) else _OTHER_VERSION


def _why_not_beit_call(
    module: Any, window_size: Any, interpolate_pos_encoding: bool = False, dim_size: Any = None
) -> str | None:
    h, w = module.window_size
    if interpolate_pos_encoding or tuple(window_size) != (h, w):
        return "the map has another size than the table"
    if h != w:
        return "the library reads the table of a map that is not square with its sides exchanged"
    return _compiling()


def _beit(module: Any, attend: Callable[..., Tensor], window_size: Any, **unused: Any) -> Tensor:
    h, w = module.window_size
    grid = Grid2D(h, w, extra=1)
    return LazyBias.of(module.relative_position_bias_table, grid, grid.tokens, grid.tokens)


# --- Data2VecVision ---


def _why_not_data2vec(module: Any) -> str | None:
    return why_not_bypass(module, query=LINEAR, key=LINEAR, value=LINEAR, dropout=DROPOUT)


def _why_not_data2vec_call(module: Any, hidden_states: Tensor, **given: Any) -> str | None:
    if given.get("output_attentions"):
        return "attention weights are asked for"
    return why_not_dropout(module.dropout.p, module.training)


def _data2vec(
    module: Any,
    attend: Callable[..., Tensor],
    hidden_states: Tensor,
    output_attentions: bool = False,
    relative_position_bias: Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    resolution: Any = None,
) -> tuple[Tensor, None]:
    own = None
    if module.has_relative_position_bias:
        size = tuple(n // module.config.patch_size for n in resolution)
        own = module.relative_position_bias(size, interpolate_pos_encoding, dim_size=hidden_states.shape[1])
    heads = [
        p(hidden_states).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
        for p in (module.query, module.key, module.value)
    ]
    how = transformers_interface.pairs(own, relative_position_bias)
    out = attend(*heads, dropout_p=module.dropout.p if module.training else 0.0, **how)
    return out.transpose(1, 2).flatten(2), None


def _data2vec_entry(name: str) -> Entry:
    target = f"transformers.models.data2vec.modeling_data2vec_vision.Data2VecVision{name}"
    return Entry(target, "forward", _why_not_data2vec, _data2vec, _why_not_data2vec_call, "softmax_attention")


def _grid_entry(target: str) -> Entry:
    return Entry(
        f"transformers.models.{target}", "forward", _why_not_beit, _beit, _why_not_beit_call, "softmax_attention",
        takes_tensor=False,
    )  # fmt: skip


ENTRIES = (
    _t5_entry("t5.modeling_t5.T5Attention"),
    _t5_entry("mt5.modeling_mt5.MT5Attention"),
    _t5_entry("umt5.modeling_umt5.UMT5Attention"),
    _t5_entry("longt5.modeling_longt5.LongT5Attention"),
    _t5_entry("switch_transformers.modeling_switch_transformers.SwitchTransformersAttention"),
    _t5_entry("pop2piano.modeling_pop2piano.Pop2PianoAttention"),
    _grid_entry("beit.modeling_beit.BeitRelativePositionBias"),
    _grid_entry("data2vec.modeling_data2vec_vision.Data2VecVisionRelativePositionBias"),
    _data2vec_entry("SelfAttention"),
    _data2vec_entry("SdpaSelfAttention"),
)
