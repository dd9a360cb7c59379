"""Running a transformers model on flattened batches: its tokens one behind the other, padding left out.

The model's base (embeddings and layers, without a head) sees one row that holds every real token. The mask that it
makes carries where each sequence begins, so attention needs no further word of it; its hidden states are padded again
before anything else sees them. Whether anything but attention mixes tokens is tried before the first call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from accel.patches import transformers_flat, transformers_switch, transformers_unpad_proof
from accel.patches.stand import Stand
from accel.patches.transformers_unpad_proof import Proven

OP = "unpad"
_ROWS = {"full_attention", "sliding_attention"}  # layers that mix tokens by attention alone
_MIXERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)


def base_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The part of ``model`` that is run on flattened batches, with its name.

    Raises:
        NotImplementedError: ``model`` cannot be run so; the message says why.
    """
    base = getattr(model, "base_model", None)
    while isinstance(base, nn.Module) and not hasattr(type(base), "get_input_embeddings"):
        inner = getattr(base, "base_model", None)  # of what wraps a model to adapt it
        base = None if inner is base else inner
    if isinstance(base, nn.Module):
        base = _without_head(base)
    reason = _why_not(base) if isinstance(base, nn.Module) else "it is no model of transformers"
    if reason is not None or not isinstance(base, nn.Module):
        raise NotImplementedError(transformers_flat.cannot(model, str(reason)))
    return next((name, module) for name, module in model.named_modules() if module is base)


def _without_head(base: nn.Module) -> nn.Module:
    """What computes hidden states in a model that calls itself its base, or whose heads call a part of it."""
    inside = {name: m for name, m in base.named_children() if hasattr(type(m), "get_input_embeddings")}
    headed = "labels" in inspect.signature(type(base).forward).parameters
    found = [m for name, m in inside.items() if not _missing(m) and (headed or name == "decoder")]  # OPT's decoder
    return found[0] if len(found) == len(inside) == 1 else base


def _missing(module: nn.Module) -> list[str]:
    taken = inspect.signature(type(module).forward).parameters
    return [name for name in ("input_ids", "attention_mask", "position_ids") if name not in taken]


def _why_not(base: nn.Module) -> str | None:
    config: Any = getattr(base, "config", None)
    missing = _missing(base)
    if missing:
        return f"the forward of {type(base).__name__} takes no {', '.join(missing)}"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder and a decoder"
    if "forward" in vars(base) and not isinstance(vars(base)["forward"], Unpadding):
        return f"its forward has been replaced by {type(vars(base)['forward']).__name__}"
    other = set(getattr(config, "layer_types", None) or ()) - _ROWS
    if other:
        return f"it has layers of the kinds {', '.join(sorted(other))}"
    for name, module in _reached_by_text(base):
        if isinstance(module, _MIXERS):
            return f"{name} is a {type(module).__name__}, which would mix sequences"
    if not any(transformers_switch.goes_through_the_registry(m) for m in base.modules()):
        return "its attention does not go through transformers' registry"
    return None


def _reached_by_text(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules in this one, with names, but for models of pictures or sound, whose inputs are no tokens."""
    for name, child in module.named_children():
        a_model = hasattr(type(child), "get_input_embeddings")
        if not a_model or inspect.signature(type(child).forward).parameters.keys() & {*transformers_flat.TOKENS}:
            yield prefix + name, child
            yield from _reached_by_text(child, f"{prefix}{name}.")


class Unpadding(Stand):
    """Stands in for ``forward`` of a model's base."""

    attribute = "forward"
    op = OP

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.proven: dict[frozenset[str], Proven] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module
        given = transformers_flat.by_name(module, args, kwargs)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            words = "their length is not known to torch.compile and torch.jit"
            raise NotImplementedError(transformers_flat.cannot(module, words))
        if given.get("attention_mask") is None:
            self.count("no attention_mask is given")
            return type(module).forward(module, *args, **kwargs)
        with_tuple = given.pop("return_dict", getattr(module.config, "return_dict", True)) is False
        real = transformers_flat.check(module, given)
        if getattr(module, "pooler", None) is not None and not bool(real[:, 0].all()):
            words = "its pooler reads the first token, which is padding here"
            raise NotImplementedError(transformers_flat.cannot(module, words))
        if not bool(real.any()):
            self.count("no token is real")
            return type(module).forward(module, *args, **kwargs)
        proven = self._proof(given, real)
        flat = transformers_flat.run(module, given, real, proven.way)
        out = transformers_flat.padded_again(module, flat, proven.layout, *real.shape)
        self.count(None)
        return out.to_tuple() if with_tuple else out

    def _proof(self, given: dict[str, Any], real: torch.Tensor) -> Proven:
        kind = transformers_unpad_proof.kind_of(self.module, given)
        if kind not in self.proven:
            self.proven[kind] = transformers_unpad_proof.prove(self.module, given, real)
        return self.proven[kind]

    def __repr__(self) -> str:
        return f"<accel {self.op} for {type(self.module).__name__}>"
