"""Models that ask for ``"accel"`` by name: when one is built or set, it is told if that name means nothing in it.

transformers takes any registered name for any model. A class that computes its attention by itself then runs on with
masks that were made for another function. So around three methods of its base class stands a look at the whole model,
which costs nothing where another name is asked for.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from accel.patches.stand import say_once
from accel.patches.transformers_classes import Seen, is_config, look, read_by_eager, why_not
from accel.patches.transformers_interface import EAGER_MASKS, FIELD, NAME, NAMES

_OURS = "_accel_stands_around"


def install(base: type) -> None:
    """Look at models of ``base``, transformers' PreTrainedModel, that ask for the name; safe to repeat."""
    _around(base, "_check_and_adjust_attn_implementation", _begin)
    _around(base, "post_init", _built)
    _around(base, "set_attn_implementation", _set)


def let_weights_be_asked_for(base: type) -> None:
    """Take ``output_attentions = True`` in configurations, of the class ``base``, that have the name.

    transformers takes it for eager only, the one function of its own that gives weights; from here they come as well.
    """
    known = vars(base).get("output_attentions")
    if isinstance(known, property) and known.fset is not None and not hasattr(known.fset, _OURS):
        base.output_attentions = known.setter(_as_if_eager(known.fset))  # type: ignore[attr-defined]
    _around(base, "validate_output_attentions", _as_if_eager)


def _around(base: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = vars(base).get(name)
    if original is not None and not hasattr(original, _OURS):
        setattr(base, name, wrap(original))


def _wraps(original: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def mark(made: Callable[..., Any]) -> Callable[..., Any]:
        made = functools.wraps(original)(made)
        setattr(made, _OURS, True)
        return made

    return mark


def _as_if_eager(original: Callable[..., Any]) -> Callable[..., Any]:
    @_wraps(original)
    def run(config: Any, *args: Any, **kwargs: Any) -> Any:
        name = vars(config).get(FIELD)
        if name not in NAMES:
            return original(config, *args, **kwargs)
        vars(config)[FIELD] = "eager"
        try:
            return original(config, *args, **kwargs)
        finally:
            vars(config)[FIELD] = name

    return run


# --- a model on its way from its base class's __init__ to post_init ---


class _Building(threading.local):
    """The models that are being built in this thread, the outermost first."""

    def __init__(self) -> None:
        self.models: list[weakref.ref[nn.Module]] = []

    def begin(self, model: nn.Module) -> None:
        self.models = [ref for ref in self.models if ref() is not None] + [weakref.ref(model)]

    def end(self, model: nn.Module) -> bool:
        """Whether ``model`` is no part of another that is being built; what failed inside it is forgotten."""
        alive = [outer for outer in (ref() for ref in self.models) if outer is not None]
        at = next((i for i, outer in enumerate(alive) if outer is model), len(alive))
        self.models = [weakref.ref(outer) for outer in alive[:at]]
        kind = type(getattr(model, "config", None))
        return not any(type(x) is kind for outer in alive[:at] for x in _inside(getattr(outer, "config", None)))


_building = _Building()


def _begin(original: Callable[..., Any]) -> Callable[..., Any]:
    @_wraps(original)
    def check(self: nn.Module, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_init_check", args[0] if args else False):
            _building.begin(self)
        if attn_implementation in NAMES:
            _join_tables(type(self))
        return original(self, attn_implementation, *args, **kwargs)

    return check


def _join_tables(cls: type) -> None:
    """Some models look their class of attention up by the name, in tables of their modules: a name of ours is taken as
    "sdpa", for the parts that ask no registry are left as they are."""
    for module in {c.__module__ for c in cls.__mro__ if issubclass(c, nn.Module)}:
        for table in list(vars(sys.modules.get(module)).values()) if module in sys.modules else ():
            if isinstance(table, dict) and _is_table(table):
                for name in NAMES:
                    table.setdefault(name, table.get("sdpa", table["eager"]))


def _is_table(table: dict[Any, Any]) -> bool:
    return "eager" in table and all(isinstance(x, type) and issubclass(x, nn.Module) for x in table.values())


def _built(original: Callable[..., Any]) -> Callable[..., Any]:
    @_wraps(original)
    def post_init(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outermost = _building.end(self)
        if any(_asks(config) for config in _inside(getattr(self, "config", None))):
            settle(self, outermost)  # before any weight is made
        return original(self, *args, **kwargs)

    return post_init


def _set(original: Callable[..., Any]) -> Callable[..., Any]:
    @_wraps(original)
    def set_attn_implementation(self: nn.Module, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        if not _names_ours(attn_implementation):
            return original(self, attn_implementation, *args, **kwargs)
        held = [x for module in self.modules() for x in vars(module).values()]
        before = [(config, vars(config).get(FIELD)) for config in _inside(*held)]
        done = original(self, attn_implementation, *args, **kwargs)
        try:
            settle(self, True)
        except ValueError:
            for config, name in before:
                vars(config)[FIELD] = name
            raise
        return done

    return set_attn_implementation


def _names_ours(implementation: Any) -> bool:
    if isinstance(implementation, dict):
        return any(_names_ours(x) for x in implementation.values())
    return implementation in NAMES


# --- the look ---


def settle(model: nn.Module, whole: bool) -> None:
    """See to it that what asks for the name in ``model`` computes right, or, of a ``whole`` model, refuse it.

    Raises:
        ValueError: no attention of the model asks the registry, or one that does needs what is not known here. The
            message names the class.
    """
    seen = look(model)
    for config in seen.eager_masks().values():
        if _asks(config):
            vars(config)[FIELD] = EAGER_MASKS
    served = {name: module for name, module in seen.registry.items() if _asks(seen.configs[name])}
    for module in served.values():
        read_by_eager(type(module))  # while nothing is being traced
    if not whole:
        return
    for name, module in served.items():
        reason = why_not(module)
        if reason is not None:
            why = f"in its {name} ({type(module).__name__}) {reason}"
            raise ValueError(_refusal(model, why, seen.configs[name]))
    if not served and seen.own:
        raise ValueError(
            _refusal(model, f"no attention of it asks transformers' registry ({_classes(seen.own)})", None)
        )
    _name_what_is_left(model, seen)


def _name_what_is_left(model: nn.Module, seen: Seen) -> None:
    """Say which models inside ``model`` are not served, though they have the name."""
    said: list[str] = []
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if not hasattr(type(module), "post_init") or not is_config(config) or not _asks(config):
            continue
        below = f"{name}." if name else ""
        own = {n: m for n, m in seen.own.items() if n.startswith(below)}
        inside = any(n.startswith(below) for n in seen.registry)
        if own and not inside and not any(name.startswith(f"{other}.") for other in said):
            said.append(name)
            say_once(type(module).__name__, f"its attention ({_classes(own)}) does not ask transformers' registry")


def _refusal(model: nn.Module, why: str, config: Any) -> str:
    own = getattr(model, "config", None)
    parts = [key for key in getattr(own, "sub_configs", {}) if config is not None and getattr(own, key, None) is config]
    instead = f'"eager" or {{"": "{NAME}", "{parts[0]}": "eager"}}' if parts else '"eager"'
    return (
        f'{type(model).__name__} cannot take attn_implementation="{NAME}": {why}. Load it with {instead}; '
        "accel.patch(model) then replaces what can be computed here"
    )


def _classes(modules: dict[str, nn.Module]) -> str:
    names = sorted({type(module).__name__ for module in modules.values()})
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _asks(config: Any) -> bool:
    return config is not None and vars(config).get(FIELD) in NAMES


def _inside(*held: Any) -> Iterator[Any]:
    """Every configuration among ``held``, and those in it, once."""
    known: set[int] = set()
    waiting = list(held)
    while waiting:
        config = waiting.pop()
        if is_config(config) and id(config) not in known:
            known.add(id(config))
            yield config
            waiting += vars(config).values()
