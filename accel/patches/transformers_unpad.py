"""Running a transformers model on flattened batches: its tokens one behind the other, padding left out.

The model's base (embeddings and layers, without a head) sees one row that holds every real token. The mask that it
makes carries where each sequence begins, so attention needs no further word of it; its hidden states are padded again
before anything else sees them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from accel import packing
from accel.patches import transformers_interface, transformers_switch
from accel.patches.stand import Stand, stands_in

OP = "unpad"
_ROWS = {"full_attention", "sliding_attention"}  # layers that mix tokens by attention alone
_MIXERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)
_TOKENS = ("input_ids", "inputs_embeds")


def base_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The part of ``model`` that is run on flattened batches, with its name.

    Raises:
        NotImplementedError: ``model`` cannot be run so; the message says why.
    """
    base = getattr(model, "base_model", None)
    reason = _why_not(base) if isinstance(base, nn.Module) else "it is no model of transformers"
    if reason is not None or not isinstance(base, nn.Module):
        raise NotImplementedError(f"{type(model).__name__} cannot run on flattened batches: {reason}")
    return next((name, module) for name, module in model.named_modules() if module is base)


def _why_not(base: nn.Module) -> str | None:
    config: Any = getattr(base, "config", None)
    taken = inspect.signature(type(base).forward).parameters
    missing = [name for name in ("input_ids", "attention_mask", "position_ids") if name not in taken]
    if missing:
        return f"the forward of {type(base).__name__} takes no {', '.join(missing)}"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder and a decoder"
    if "forward" in vars(base) and not isinstance(vars(base)["forward"], Unpadding):
        return f"its forward has been replaced by {type(vars(base)['forward']).__name__}"
    other = set(getattr(config, "layer_types", None) or ()) - _ROWS
    if other:
        return f"it has layers of the kinds {', '.join(sorted(other))}"
    for name, module in base.named_modules():
        if isinstance(module, _MIXERS):
            return f"{name} is a {type(module).__name__}, which would mix sequences"
    if not any(transformers_switch.goes_through_the_registry(m) for m in base.modules()):
        return "its attention does not go through transformers' registry"
    return None


class Unpadding(Stand):
    """Stands in for ``forward`` of a model's base."""

    attribute = "forward"
    op = OP

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module
        given = _by_name(module, args, kwargs)
        mask = given.get("attention_mask")
        if torch.compiler.is_compiling():
            raise NotImplementedError("the length of a flattened batch is not known to torch.compile")
        if mask is None:
            self.count("no attention_mask is given")
            return type(module).forward(module, *args, **kwargs)
        with_tuple = given.pop("return_dict", getattr(module.config, "return_dict", True)) is False
        batch, length = _check(module, given)
        real = mask != 0
        if getattr(module, "pooler", None) is not None and not bool(real[:, 0].all()):
            raise NotImplementedError("the pooler reads the first token, which is padding here")
        any_input = next(given[name] for name in _TOKENS if given.get(name) is not None)
        _, indices, cu_seqlens, _ = packing.unpad(any_input, real)
        given["position_ids"] = _positions(module, given, batch, length, indices.device)
        flat = {name: _flattened(name, x, batch, length, indices) for name, x in given.items()}
        flat |= {"attention_mask": None, "use_cache": False, "return_dict": True}
        gaps = bool((real[:, 1:] != real[:, :-1]).sum(1).gt(_one_turn(real)).any())
        packed = transformers_interface.Packing(cu_seqlens, indices.numel(), gaps)
        self.count(None)
        before = self._attended()
        with transformers_interface.packed(packed):
            out = type(module).forward(module, **flat)
        if not packed.masks or self._attended() == before:
            raise NotImplementedError(f"{type(module).__name__} computed attention without accel's masks or function")
        out = _padded(out, indices, batch, length)
        if getattr(module, "pooler", None) is not None and out.get("pooler_output") is not None:
            out["pooler_output"] = module.pooler(out["last_hidden_state"])
        return out.to_tuple() if with_tuple else out

    def _attended(self) -> int:
        return sum(s.calls + s.compiled for m in self.module.modules() for s in stands_in(m) if s is not self)

    def __repr__(self) -> str:
        return f"<accel {self.op} for {type(self.module).__name__}>"


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [n for n, p in inspect.signature(type(module).forward).parameters.items() if p.kind is not p.VAR_KEYWORD]
    return dict(zip(names[1:], args, strict=False)) | kwargs


def _check(module: nn.Module, given: dict[str, Any]) -> tuple[int, int]:
    """Batch and length of the padded call; raises where it cannot be flattened."""
    mask = given["attention_mask"]
    tokens = next((given[name] for name in _TOKENS if given.get(name) is not None), None)
    if tokens is None:
        raise ValueError("flattened batches need input_ids or inputs_embeds")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != tokens.shape[:2]:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(
            f"a batch is flattened by an attention_mask (B, S) as long as its tokens {tuple(tokens.shape[:2])}, "
            f"got {shape}"
        )
    config: Any = module.config
    for name in ("past_key_values", "use_cache", "output_attentions", "encoder_hidden_states"):
        asked = given.get(name) or (name == "output_attentions" and getattr(config, name, False))
        if asked:
            raise NotImplementedError(f"a flattened batch has no {name}; unpatch the model for such calls")
    return int(tokens.shape[0]), int(tokens.shape[1])


def _positions(module: nn.Module, given: dict[str, Any], batch: int, length: int, device: torch.device) -> Tensor:
    """The positions that the padded model would use, ``(B, S)``."""
    positions = given.get("position_ids")
    if positions is not None:
        return positions.expand(batch, length)
    embeddings: Any = getattr(module, "embeddings", None)
    by_token = getattr(embeddings, "create_position_ids_from_input_ids", None)
    if by_token is not None:
        if given.get("input_ids") is None:
            raise NotImplementedError(f"{type(module).__name__} counts positions by input_ids; give position_ids")
        positions = by_token(given["input_ids"], embeddings.padding_idx)
        assert isinstance(positions, Tensor)
        return positions
    return torch.arange(length, device=device).expand(batch, length)


def _flattened(name: str, x: Any, batch: int, length: int, indices: Tensor) -> Any:
    if not isinstance(x, Tensor) or x.dim() == 0 or name == "attention_mask":
        return x
    if x.shape[:2] != (batch, length):
        raise NotImplementedError(f"{name} {tuple(x.shape)} is not laid out as the tokens {(batch, length)} are")
    return x.flatten(0, 1)[indices][None]


def _one_turn(real: Tensor) -> Tensor:
    """How often a row without gaps turns from padding to tokens or back: at each end that is padded."""
    return (~real[:, 0]).to(torch.int64) + ~real[:, -1]


def _padded(out: Any, indices: Tensor, batch: int, length: int) -> Any:
    """``out`` with every ``(1, total, ...)`` in it padded again."""
    if isinstance(out, Tensor):
        if out.dim() < 2 or out.shape[:2] != (1, indices.numel()):
            return out
        return packing.pad(out[0], indices, batch, length)
    if isinstance(out, Mapping):
        return type(out)(**{k: _padded(v, indices, batch, length) for k, v in out.items()})
    if isinstance(out, list | tuple):
        return type(out)(_padded(x, indices, batch, length) for x in out)
    return out
