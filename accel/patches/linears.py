"""Linear layers that a change of their numbers must leave alone, and why: what a whole model says of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from accel.patches.entry import class_path

HEADS = ("lm_head", "classifier", "score", "cls", "qa_outputs", "head")
"""Names of output layers, where a model does not say itself which it is."""
ROUTERS = ("gate", "router", "shared_expert_gate", "gate_linear", "wg")
_FAST_PATH = "torch.nn.modules.transformer.TransformerEncoderLayer"


def left_alone(model: nn.Module) -> dict[str, str]:
    """The reason by name, of every Linear of ``model`` that is best left in full precision or cannot be read alone."""
    reasons: dict[str, str] = {}
    heads = [id(head) for head in _output_layers(model)]
    shared = _shared_parameters(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        last = name.rpartition(".")[2]
        others = shared.get(id(module.weight), [])
        if id(module) in heads or last in HEADS:
            reasons[name] = "it is an output layer, which stays in full precision"
        elif last in ROUTERS:
            reasons[name] = "it is a router, whose choices eight bits would change"
        elif len(others) > 1:
            reasons[name] = f"its weight is shared: {', '.join(sorted(others))}"
        elif (owner := _owner(model, name)) is not None and class_path(type(owner)) == _FAST_PATH:
            reasons[name] = "its weight is read by the fast path of TransformerEncoderLayer"
    return reasons


def _owner(model: nn.Module, name: str) -> nn.Module | None:
    parent = name.rpartition(".")[0]
    return model.get_submodule(parent) if name else None


def _output_layers(model: nn.Module) -> Iterable[Any]:
    """What transformers, timm and diffusers call the output layer, of the model and of the models inside it."""
    for module in model.modules():
        for ask in ("get_output_embeddings", "get_classifier"):
            method = getattr(module, ask, None)
            if not callable(method):
                continue
            try:
                found = method()
            except (NotImplementedError, AttributeError, TypeError):  # a model that has none says so in these words
                continue
            yield from found if isinstance(found, tuple | list) else (found,)


def _shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter that several modules hold."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{name}.{key}".removeprefix("."))
    return {key: found for key, found in names.items() if len(found) > 1}
