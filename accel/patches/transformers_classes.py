"""What the code of transformers' classes says: who asks the registry, who computes attention alone, who reads what."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

REGISTRY = "ALL_ATTENTION_FUNCTIONS"

FOREIGN = frozenset({"indices", "block_indices"})
"""Keywords of sparse attention, which a class hands on to functions that it does not know the name of."""

_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
_ADDS_TO_MASKS = {"DeepseekV4Attention"}
"""Classes that ask the registry and join columns to the mask that eager gets, which is added."""


def is_config(x: Any) -> bool:
    module = sys.modules.get("transformers.configuration_utils")
    return module is not None and isinstance(x, module.PreTrainedConfig)


def goes_through_the_registry(module: nn.Module) -> bool:
    """Whether the module's class asks transformers' registry which function computes its attention."""
    return REGISTRY in words(type(module)) and is_config(vars(module).get("config"))


def words(cls: type) -> frozenset[str]:
    """The registry, if the class's forward reads it, and the keywords and strings in that forward."""
    if cls not in _words:
        code = _code(_forward(cls))
        consts = () if code is None else code.co_consts
        parts = [part for x in consts for part in (x if isinstance(x, tuple) else (x,))]
        names = [REGISTRY] if code is not None and REGISTRY in code.co_names else []
        _words[cls] = frozenset([*names, *(x for x in parts if isinstance(x, str))])
    return _words[cls]


def why_not(module: nn.Module) -> str | None:
    """Why a module that goes through the registry cannot have its attention from here."""
    foreign = sorted(FOREIGN & words(type(module)))
    return f"it passes {', '.join(foreign)} to its attention, which the op does not know" if foreign else None


def eager_function(cls: type) -> Callable[..., Any] | None:
    """The function by which the class computes its attention where it is set to eager: its forward names it."""
    forward = _forward(cls)
    code = _code(forward)
    for name in () if code is None else code.co_names:
        if name.endswith("eager_attention_forward"):
            found = forward.__globals__.get(name)
            return found if callable(found) else None
    return None


def read_by_eager(cls: type) -> frozenset[str] | None:
    """The keywords that the class's eager function reads, of the others that are passed on; None where it has none."""
    if cls not in _read:
        function = eager_function(cls)
        _read[cls] = None if function is None else _keywords(function)
    return _read[cls]


def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    code = _code(inspect.unwrap(function))
    taken = () if code is None else code.co_consts  # kwargs["name"], kwargs.get("name")
    return frozenset(named) | {x for x in taken if isinstance(x, str) and x.isidentifier()}


def _forward(cls: type) -> Any:
    return inspect.unwrap(getattr(cls, "forward", _forward))


def _code(function: Any) -> Any:
    return getattr(function, "__code__", None)


_words: dict[type, frozenset[str]] = {}
_read: dict[type, frozenset[str] | None] = {}


# --- whole models ---


@dataclass
class Seen:
    """The attention of a model, by the names of its modules."""

    registry: dict[str, nn.Module] = field(default_factory=dict)
    own: dict[str, nn.Module] = field(default_factory=dict)
    """Modules called attention that ask no registry, and hold no other such module."""
    configs: dict[str, Any] = field(default_factory=dict)
    """The configuration that each module goes by: its own, or that of the nearest module around it; or None."""

    def eager_masks(self) -> dict[int, Any]:
        """The configurations, by id, whose masks some attention needs as eager gets them: added, and never left out.

        These are those of attention that adds the mask by itself, and of decoders that do not say that they are
        causal and so cannot be given "no mask" for a causal one.
        """
        found = [self.configs[name] for name, module in self.own.items() if _takes_mask(module)]
        causal: dict[int, bool] = {}
        for name, module in self.registry.items():
            config = self.configs[name]
            if type(module).__name__ in _ADDS_TO_MASKS:
                found.append(config)
            if getattr(module, "is_decoder", False) is True:
                causal[id(config)] = causal.get(id(config), False) or bool(getattr(module, "is_causal", False))
        found += [c for c in (self.configs[name] for name in self.registry) if causal.get(id(c)) is False]
        return {id(config): config for config in found if config is not None}


def look(model: nn.Module) -> Seen:
    """Every module of ``model`` that computes attention, as far as its class's name and code say so."""
    seen = Seen()
    around: set[str] = set()
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0] if name else None
        config = vars(module).get("config")
        inherited = None if parent is None else seen.configs.get(parent)
        seen.configs[name] = config if is_config(config) else inherited
        through = goes_through_the_registry(module)
        if not through and not _ATTENTION.search(type(module).__name__):
            continue
        while parent is not None:  # what holds attention is no attention itself
            around.add(parent)
            parent = parent.rpartition(".")[0] if parent else None
        (seen.registry if through else seen.own)[name] = module
    seen.own = {name: module for name, module in seen.own.items() if name not in around}
    return seen


def _takes_mask(module: nn.Module) -> bool:
    """Whether a module takes a mask that the model around it made, and adds it to scores. torch's own attention has
    masks that are made for it, deformable attention masks values, and linear attention has no scores."""
    cls = type(module)
    if cls.__module__.startswith("torch.") or hasattr(module, "sampling_offsets"):
        return False
    if not any("mask" in name for name in inspect.signature(_forward(cls)).parameters):
        return False
    own = [function for c in cls.__mro__ if c is not nn.Module for function in vars(c).values()]
    codes = [_code(inspect.unwrap(f)) for f in own if callable(f)]
    return any(name.lower() in _SCORES for code in codes if code is not None for name in code.co_names)


_SCORES = {"softmax", "scaled_dot_product_attention"}
