"""One call of an attention of transformers: what the op can serve, and the class's eager function for the rest."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from accel.patches.entry import why_not_dropout
from accel.patches.transformers_classes import FOREIGN, eager_function, read_by_eager
from accel.patches.transformers_rules import MaskRule, written_out

_PAGED = frozenset({"read_index", "write_index", "block_table"})
"""Keywords of continuous batching, where keys of several requests stand in one sequence."""

_UNREAD = {
    *("position_ids", "cache_position", "seq_idx", "deterministic", "num_items_in_batch", "use_cache"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
}
"""Keywords on their way through a model that say nothing about attention, or what the mask says already; what else a
class's eager function does not read is of this kind too."""

WEIGHTS = "attention weights are asked for"
_CAPTURE = "transformers.utils.output_capturing"


def unknown(module: nn.Module, given: dict[str, Any]) -> list[str]:
    """The keywords of a call that its class's eager function reads and the op does not know.

    Raises:
        NotImplementedError: a keyword that changes the attention though no eager function reads it, or any that is not
            known where the class has no eager function.
    """
    read = read_by_eager(type(module))
    found = []
    for name, value in given.items():
        if name in _UNREAD or value is None or value is False:
            continue
        paged = name == "cache" and "Paged" in type(value).__name__
        if name in FOREIGN or name in _PAGED or paged or read is None:
            raise NotImplementedError(
                f"{type(module).__name__} passes {name}={type(value).__name__} to its attention, which accel's does "
                "not know; choose another attention for this model"
            )
        if name in read:
            found.append(name)
    return found


def reads(module: nn.Module, name: str) -> bool:
    """Whether the class's attention takes notice of a keyword that the op knows; what eager passes over is no news."""
    known = read_by_eager(type(module))
    return known is None or name in known


def why_not(module: nn.Module, dropout: float, given: dict[str, Any]) -> str | None:
    """Why a call goes to the class's eager function."""
    names = unknown(module, given)
    if weights_wanted(module, given):
        return WEIGHTS
    if torch.jit.is_tracing():
        return "torch.jit.trace records the class's own operations"
    if names:
        return f"it passes {', '.join(names)} to its attention, which the op does not know"
    return why_not_dropout(dropout, True)


def weights_wanted(module: nn.Module, given: dict[str, Any]) -> bool:
    """Whether a call is to give attention weights: by a keyword, the configuration, or because transformers collects
    them around it, which not every class hands on."""
    if given.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    collector = getattr(sys.modules.get(_CAPTURE), "_active_collector", None)
    if collector is None:
        return False
    if torch.compiler.is_compiling():  # no context variable can be read there, and transformers sets a global
        collected = collector.global_var if collector.compiling else None
    else:
        collected = collector.get()
    return collected is not None and any("attentions" in key for key in collected)


def eager(
    reason: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **how: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention in plain torch, with the mask as what it adds."""
    function = eager_function(type(module))
    if function is None:
        raise NotImplementedError(f"accel's attention cannot serve {type(module).__name__}: {reason}")
    if isinstance(mask, MaskRule):
        mask = mask.dense() if mask.hides else None
    mask = written_out(mask)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    out: tuple[Tensor, Tensor | None] = function(module, query, key, value, mask, **how)
    return out
