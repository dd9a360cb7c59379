"""One line of the table of replacements, and the checks its predicates are made of."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def accepts_any_call(module: Any, **given: Any) -> str | None:
    return None


def accepts_any_arguments(**given: Any) -> str | None:
    return None


def every_function(function: Any) -> str | None:
    return None


def every_module(module: Any) -> bool:
    return True


def itself(x: Any) -> Any:
    return x


@dataclass(frozen=True)
class Entry:
    """How one method of one library's class is computed by one of our ops.

    The predicates answer in a sentence that begins with a noun, or with ``None`` for "it can". ``why_not`` is asked
    when a model is patched and again at every call, since children can be wrapped later. ``why_not_call`` and
    ``compute`` receive the call's arguments by the names the class gives them.
    """

    target: str
    """Full path of the class; it is compared with the classes of a model, so the library is never imported. Where
    modules of one class compute by different ops, a kind is named behind it."""
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
    tensor_of: Callable[[Any], Any] = itself
    """The tensor in its first argument, where that holds several: its device and dtype decide who computes."""
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
    why_not_call: Callable[..., str | None] = accepts_any_arguments
    """Given the same arguments: why a call goes to the original."""
    why_not: Callable[[Any], str | None] = every_function
    """Why an original is left in its place."""
    computes_in: torch.dtype | None = None
    """The dtype of the tensors that the op gets. Where only its reference takes that, the original computes; None where
    the reference serves too, since the original may not load."""

    @property
    def home(self) -> str:
        return self.target.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.target.rpartition(".")[2]


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def plain_class(cls: type) -> type:
    """The class below those that torch makes on the fly when it parametrizes or shards a module, and that leave its
    forward as it is."""
    while _made_by_torch(cls) and "forward" not in vars(cls):
        cls = cls.__bases__[-1]
    return cls


def _made_by_torch(cls: type) -> bool:
    module = sys.modules.get(cls.__module__)
    return cls.__module__.startswith(_WRAPPING) and getattr(module, cls.__name__, None) is not cls


_WRAPPING = ("torch.nn.utils.parametrize", "torch.distributed.")

LINEAR = class_path(nn.Linear)
DROPOUT = class_path(nn.Dropout)
SOFTMAX = class_path(nn.Softmax)


def why_not_bypass(owner: nn.Module, **children: str) -> str | None:
    """Why one of ``owner``'s ``children`` (name to class path) must be called instead of being read.

    A subclass (LoRA, quantization, a parametrization), a hook or a forward set on the instance may compute anything,
    and so may a parameter that is no plain tensor (quantized, sharded).
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
        if _hooked_everywhere():
            return f"a hook for all modules is registered, and would not see {name}"
        if covers(child, "forward") is not None:
            return f"{name} has a forward of its own"
        if (reason := why_not_plain(child, name)) is not None:
            return reason
    return None


def why_not_plain(module: nn.Module, name: str | None = None) -> str | None:
    """Why a parameter of ``module`` is not what an op of torch takes it for."""
    of = "" if name is None else f" of {name}"
    for key, x in module._parameters.items():
        if x is not None and not _is_plain(type(x)):
            return f"{key}{of} is a {class_path(type(x))}, not a plain parameter{_order(type(x))}"
    return None


def _hooked_everywhere() -> bool:
    """Whether torch calls hooks around every module, which what is read instead of called passes by."""
    there = torch.nn.modules.module
    return bool(
        there._global_forward_hooks
        or there._global_forward_pre_hooks
        or there._global_backward_hooks
        or there._global_backward_pre_hooks
    )


def covers(module: nn.Module, attribute: str) -> Any:
    """What stands in the instance in place of its class's method; None also for that method itself, bound."""
    present = vars(module).get(attribute)
    if isinstance(present, types.MethodType) and present.__self__ is module:
        return None if present.__func__ is getattr(type(module), attribute, None) else present
    return present


def _is_plain(cls: type) -> bool:
    """Whether a tensor of this class is what an op of torch takes it for; fake ones stand for such when traced."""
    return cls is nn.Parameter or cls is Tensor or cls.__module__.startswith("torch._subclasses.")


def _order(cls: type) -> str:
    return ": patch the model before it is sharded" if cls.__module__.startswith("torch.distributed.") else ""


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
