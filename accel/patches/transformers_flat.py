"""The forward of a transformers model on the real tokens of a batch alone, one behind the other, and the way back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accel import packing
from accel.patches import transformers_interface
from accel.patches.stand import stands_in

TOKENS = ("input_ids", "inputs_embeds")
_CACHES = ("cache", "past_key_values", "use_cache")
_NEVER = (*_CACHES, "output_attentions", "encoder_hidden_states")

Path = tuple[Any, ...]
Layout = dict[Path, str]
"""How each tensor in a model's output is laid out, by where it stands there."""

BY_TOKEN, BY_ROW, AS_IT_IS, POOLED = "by token", "by row", "as it is", "pooled"


def cannot(module: nn.Module, reason: str) -> str:
    """The sentence in which every call and every model is refused: which class, of all that a program runs, and why."""
    return f"{type(module).__name__} cannot run on flattened batches: {reason}"


# --- what goes in ---


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [n for n, p in inspect.signature(type(module).forward).parameters.items() if p.kind is not p.VAR_KEYWORD]
    return dict(zip(names[1:], args, strict=False)) | kwargs


def tokens_of(module: nn.Module, given: dict[str, Any]) -> tuple[str, Tensor]:
    """The argument that holds the tokens, with its name."""
    for name in TOKENS:
        if given.get(name) is not None:
            return name, given[name]
    raise ValueError(cannot(module, f"neither {' nor '.join(TOKENS)} is given"))


def check(module: nn.Module, given: dict[str, Any]) -> Tensor:
    """Where the tokens are real, ``(B, S)`` boolean; raises where the call cannot be flattened."""
    mask = given["attention_mask"]
    tokens = tokens_of(module, given)[1]
    size = tokens.shape[:2]
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != size:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(
            cannot(module, f"they need an attention_mask (B, S) as long as the tokens {tuple(size)}, got {shape}")
        )
    config: Any = module.config
    for name in _NEVER:
        asked = given.get(name)
        if name == "output_attentions":
            asked = asked or getattr(config, name, False)
        if asked is not None and asked is not False:
            advice = "generate without a cache or " if name in _CACHES else ""
            raise NotImplementedError(cannot(module, f"they have no {name}; {advice}unpatch the model for such calls"))
    for name, x in given.items():
        if name == "position_ids" and isinstance(x, Tensor):
            fits = x.shape[-1:] == size[1:] and x.shape[:-1] in ((), (1,), size[:1])
        else:
            fits = not isinstance(x, Tensor) or x.dim() == 0 or x.shape[:2] == size
        if not fits:
            words = f"{name} {tuple(x.shape)} is not laid out as the tokens {tuple(size)} are"
            raise NotImplementedError(cannot(module, words))
    return (mask != 0).to(tokens.device)


def _flattened(x: Any, indices: Tensor) -> Any:
    return x.flatten(0, 1)[indices][None] if isinstance(x, Tensor) and x.dim() > 0 else x


# --- positions that a model makes by itself ---


def _columns(module: nn.Module, given: dict[str, Any], real: Tensor) -> Tensor:
    return torch.arange(real.shape[1], device=real.device).expand(real.shape)


def _counted(module: nn.Module, given: dict[str, Any], real: Tensor) -> Tensor:
    return (real.cumsum(1) - 1).clamp_min(0)


def _by_token(module: nn.Module, given: dict[str, Any], real: Tensor) -> Tensor | None:
    padding = _padding_index(module)
    ids = given.get("input_ids")
    if padding is None or ids is None:
        return None
    counted = ids != padding
    return counted.cumsum(1) * counted + padding


def _behind_padding(module: nn.Module, given: dict[str, Any], real: Tensor) -> Tensor | None:
    padding = _padding_index(module)
    return None if padding is None else _columns(module, given, real) + padding + 1


def _padding_index(module: Any) -> int | None:
    """That of embeddings which count from it on, as RoBERTa's do."""
    found = getattr(getattr(module, "embeddings", None), "padding_idx", None)
    return found if isinstance(found, int) else None


POSITIONS: dict[str, Callable[[nn.Module, dict[str, Any], Tensor], Tensor | None]] = {
    "by tokens other than padding": _by_token,
    "by column behind the padding index": _behind_padding,
    "by column": _columns,
    "by real tokens": _counted,
}
"""Ways in which models count positions where none are given."""

GIVEN = "given"


def ways(module: nn.Module, given: dict[str, Any], real: Tensor) -> Iterator[str]:
    """The ways of counting that are possible for this call."""
    if given.get("position_ids") is not None:
        yield GIVEN
    else:
        yield from (way for way, count in POSITIONS.items() if count(module, given, real) is not None)


def _positions(module: nn.Module, given: dict[str, Any], real: Tensor, way: str) -> Tensor:
    """The positions of the padded call, ``(B, S)``."""
    if way == GIVEN:
        return given["position_ids"].expand(real.shape)
    positions = POSITIONS[way](module, given, real)
    assert positions is not None
    return positions


def _check_largest(module: nn.Module, padded: Tensor, flat: Tensor) -> None:
    """Some rotary embeddings take their frequencies from the largest position there is, be it one of padding."""
    original = [x for m in module.modules() for x in _original_lengths(m)]
    if not original or not flat.numel():
        return
    longest, real = int(padded.max()) + 1, int(flat.max()) + 1
    if longest > real and longest > min(original):
        words = (
            f"its rotary embedding changes with the largest position from {min(original)} on, and the batch is padded "
            f"to {longest} where its longest sequence ends at {real}; pad it less"
        )
        raise NotImplementedError(cannot(module, words))


def _original_lengths(module: Any) -> Iterator[int]:
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, Mapping) else (kinds,)
    if not any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds):
        return
    parameters = getattr(module.config, "rope_parameters", None) or {}
    for entry in (parameters, *parameters.values()):
        if isinstance(entry, Mapping) and isinstance(entry.get("original_max_position_embeddings"), int):
            yield entry["original_max_position_embeddings"]
    if isinstance(getattr(module, "original_max_seq_len", None), int):
        yield module.original_max_seq_len


# --- the run ---


@dataclass
class Flat:
    """What a model gave for a flattened batch."""

    out: Any
    indices: Tensor
    """``(total,)`` int64, the places of the tokens in the flattened ``B·S``."""


def run(module: nn.Module, given: dict[str, Any], real: Tensor, way: str) -> Flat:
    """The forward of the module's class on the real tokens of the padded call ``given``.

    Raises:
        NotImplementedError: the model's masks or attention are not those that know of flattened batches, or its
            positions reach further than the real tokens.
    """
    padded = _positions(module, given, real, way)
    _, indices, cu_seqlens, _ = packing.unpad(tokens_of(module, given)[1], real)
    flat = {name: _flattened(x, indices) for name, x in given.items() if name != "position_ids"}
    flat |= {"position_ids": _flattened(padded, indices), "attention_mask": None}
    flat |= {"use_cache": False, "return_dict": True}
    _check_largest(module, padded, flat["position_ids"])
    packed = transformers_interface.Packing(cu_seqlens, indices.numel(), type(module).__name__, _has_gaps(real))
    before = _attended(module)
    with transformers_interface.packed(packed):
        out = type(module).forward(module, **flat)
    if not packed.masks or _attended(module) == before:
        raise NotImplementedError(cannot(module, "it computed attention without accel's masks or function"))
    return Flat(out, indices)


def _attended(module: nn.Module) -> int:
    """Calls of the attention that reads the masks made here, by a kernel or by what the model had before."""
    return sum(s.calls + s.compiled + sum(s.fallbacks.values()) for m in module.modules() for s in stands_in(m))


def _has_gaps(real: Tensor) -> bool:
    """Whether padding stands between real tokens: a row without gaps turns once at each end that is padded."""
    turns = (real[:, 1:] != real[:, :-1]).sum(1)
    return bool(turns.gt((~real[:, 0]).to(torch.int64) + ~real[:, -1]).any())


# --- what comes out ---


def leaves(out: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors in a model's output, each with where it stands."""
    if isinstance(out, Tensor):
        yield path, out
    elif isinstance(out, Mapping):
        for name, value in out.items():
            yield from leaves(value, (*path, name))
    elif isinstance(out, list | tuple):
        for i, value in enumerate(out):
            yield from leaves(value, (*path, i))


def kind(path: Path, padded: tuple[int, ...], flat: tuple[int, ...], real: Tensor, pools: bool) -> str | None:
    """How a tensor of the shape ``flat`` belongs to one of the shape ``padded``; None where it is not known here."""
    batch, length = real.shape
    total = int(real.sum())
    if pools and path == ("pooler_output",):
        return POOLED
    if padded[:2] == (batch, length) and flat == (1, total, *padded[2:]):
        return BY_TOKEN
    if padded[:1] == (batch * length,) and flat == (total, *padded[1:]):
        return BY_ROW
    return AS_IT_IS if padded == flat else None


def padded_again(module: nn.Module, flat: Flat, layout: Layout, batch: int, length: int) -> Any:
    """The output with its tokens where they stood, zeros where there was padding."""

    def restore(x: Any, path: Path) -> Any:
        if isinstance(x, Tensor):
            if path not in layout:
                raise NotImplementedError(cannot(module, f"it returns {name_of(path)}, which is not known here"))
            if layout[path] == BY_TOKEN:
                return packing.pad(x[0], flat.indices, batch, length)
            return packing.pad(x, flat.indices, batch, length).flatten(0, 1) if layout[path] == BY_ROW else x
        if isinstance(x, Mapping):
            made: Any = copy.copy(x)  # also of what is no field of its class
            for name, value in x.items():
                made[name] = restore(value, (*path, name))
            return made
        if isinstance(x, list | tuple):
            return type(x)(restore(value, (*path, i)) for i, value in enumerate(x))
        return x

    out = restore(flat.out, ())
    if POOLED in layout.values():
        out["pooler_output"] = _pooled(module, out["last_hidden_state"])
    return out


def _pooled(module: Any, hidden: Tensor) -> Any:
    activation = getattr(module, "pooler_activation", None)  # ALBERT's pooler is a projection alone
    return module.pooler(hidden) if activation is None else activation(module.pooler(hidden[:, 0]))


def name_of(path: Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
