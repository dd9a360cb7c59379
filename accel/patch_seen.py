"""What a model holds that looks like attention and is not replaced, in sentences."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping

from torch import nn

from accel.patches import TABLE, Entry, class_path, transformers_switch
from accel.patches.unserved import UNSERVED

__all__ = ["nothing_to_replace", "unserved"]

_EXACT = {target: entry for target, entry in TABLE.items() if entry.same_function}
"""What is replaced unless it is switched off: a Linear, which may be computed in eight bits, is no news."""

_LOOKS = re.compile("attention|attn|deform|m[hq]?sa$|mla$", re.IGNORECASE)


def unserved(model: nn.Module, left_out: set[str]) -> list[str]:
    """A sentence for each class in ``model`` of which it is known that no op computes it."""
    names = [name for name, module in model.named_modules() if name not in left_out and _path(module) in UNSERVED]
    return [f"{text}: {UNSERVED[path]}" for path, text in _by_class(model, names).items()]


def nothing_to_replace(model: nn.Module, table: Mapping[str, Entry], registry: bool) -> str:
    """What there is instead: each class that looks like attention, with what is known of it.

    ``table`` and ``registry`` are what the caller asked for.
    """
    names = [name for name, module in model.named_modules() if _looks(module)]
    known = [name for name in names if _path(model.get_submodule(name)) in _EXACT]
    names = [name for name in names if not any(_is_below(name, other) for other in known)]
    innermost = [name for name in names if not any(_is_below(other, name) for other in names)]
    found = _by_class(model, innermost)
    if not found:
        return "no class in it looks like attention or like deformable convolution"
    of_class = {_path(module): module for module in model.modules()}
    return "it holds\n" + "\n".join(
        f"  {text}: {_said_of(of_class[path], table, registry)}" for path, text in found.items()
    )


def _is_below(name: str, other: str) -> bool:
    return name != other and (not other or name.startswith(f"{other}."))


def _path(module: nn.Module) -> str:
    return class_path(type(module))


def _by_class(model: nn.Module, names: list[str]) -> dict[str, str]:
    """By the path of each class: the path with the first of its modules and the number of the others."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_path(model.get_submodule(name)), []).append(name or "the model")
    more = {path: f" and {len(all_) - 1} more" if len(all_) > 1 else "" for path, all_ in found.items()}
    return {path: f"{path} ({all_[0]}{more[path]})" for path, all_ in found.items()}


def _looks(module: nn.Module) -> bool:
    """Whether a module is attention by what is known, by its name, or because it is called almost as what is known."""
    name = type(module).__name__
    return (
        _path(module) in _EXACT
        or _path(module) in UNSERVED
        or transformers_switch.goes_through_the_registry(module)
        or _LOOKS.search(name) is not None
        or _near(name) is not None
    )


@functools.cache
def _near(name: str) -> str | None:
    """The known class whose name is almost this one."""
    targets = {target.rpartition(".")[2]: target for target in _EXACT}
    found = difflib.get_close_matches(name, targets, n=1, cutoff=0.85)
    return targets[found[0]] if found else None


def _said_of(module: nn.Module, table: Mapping[str, Entry], registry: bool) -> str:
    path = _path(module)
    if path in UNSERVED:
        return UNSERVED[path]
    if path in _EXACT:
        return "it has nothing to replace" if path in table else f"{_EXACT[path].op} is not switched on"
    if transformers_switch.goes_through_the_registry(module) and not registry:
        return f"{transformers_switch.OP} is not switched on"
    near = _near(type(module).__name__)
    return "it is not known here" + (f", as {near} is" if near is not None else "")
