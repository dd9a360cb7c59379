"""One line of the table of replacements, and the checks its predicates are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


def accepts_any_call(module: Any, **given: Any) -> str | None:
    return None


def every_module(module: Any) -> bool:
    return True


@dataclass(frozen=True)
class Entry:
    """How one method of one library's class is computed by one of our ops.

    The predicates answer in a sentence that begins with a noun, or with ``None`` for "it can". ``why_not`` is asked
    when a model is patched and again at every call, since children can be wrapped later. ``why_not_call`` and
    ``compute`` receive the call's arguments by the names the class gives them.
    """

    target: str
    """Full path of the class; it is compared with the classes of a model, so the library is never imported."""
    attribute: str
    """The method that is replaced: the smallest in which roll and partition are visible."""
    why_not: Callable[[Any], str | None]
    compute: Callable[..., Any]
    """``compute(module, attend, **given)``, where ``attend`` is the op."""
    why_not_call: Callable[..., str | None] = accepts_any_call
    op: str = "window_attention"
    applies: Callable[[Any], bool] = every_module
    """Whether the method has work to do in this module at all; if not, the module is no news."""
    takes_tensor: bool = True
    """Whether its first argument is a tensor; a tracer's proxy in its place is left to the class."""
    same_function: bool = True
    """False for what changes numerics by design: such an entry is taken only when its op is named."""


@dataclass(frozen=True)
class Function:
    """How one function of a library's module is computed by one of our ops, for :func:`accel.patch_functions`."""

    target: str
    """Full path of the function, in the module that defines it."""
    op: str
    compute: Callable[..., Any]
    """``compute(attend, **given)``, where ``attend`` is the op and the arguments come by the function's names."""

    @property
    def home(self) -> str:
        return self.target.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.target.rpartition(".")[2]


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


LINEAR = class_path(nn.Linear)
DROPOUT = class_path(nn.Dropout)
SOFTMAX = class_path(nn.Softmax)


def why_not_bypass(owner: nn.Module, **children: str) -> str | None:
    """Why one of ``owner``'s ``children`` (name to class path) must be called instead of being read.

    A subclass (LoRA, quantization, a parametrization), a hook or a forward set on the instance may compute anything.
    """
    for name, expected in children.items():
        child = getattr(owner, name, None)
        if child is None:
            return f"{type(owner).__name__} has no {name}: not the version of the library that is known here"
        found = class_path(type(child))
        if found != expected:
            return f"{name} is {found}, not the plain {expected}"
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
            return f"{name} carries hooks"
        if "forward" in child.__dict__:
            return f"{name} has a forward of its own"
    return None


def why_not_dropout(p: float, training: bool) -> str | None:
    if training and p >= 1.0:
        return f"attention dropout is {p}, and a kernel takes less than 1"
    return None


def why_not_version(module: nn.Module, *names: str) -> str | None:
    """Why a class that lacks one of these attributes is not the one that is known here."""
    missing = next((name for name in names if not hasattr(module, name)), None)
    if missing is None:
        return None
    return f"{type(module).__name__} has no {missing}: not the version of the library that is known here"
