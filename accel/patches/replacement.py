"""What stands in for one method of one module, and how it reads a call of that method."""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from accel.patches import TABLE, Entry
from accel.patches.stand import Stand


class Replacement(Stand):
    """Stands in for one method of one module, as an attribute of that instance; the class is left as it is.

    It computes with what the module holds at the time of the call. A call that the kernel does not serve goes to the
    class's own method and is counted with the reason.
    """

    steps_aside = True

    def __init__(self, module: nn.Module, target: str, how: Mapping[str, Any] | None = None) -> None:
        super().__init__(module)
        self.target = target
        self.how = dict(how or {})
        """What the op is told beside the call's arguments."""
        self._method = _method_of(module, self.entry)

    @property
    def entry(self) -> Entry:
        return TABLE[self.target]

    @property
    def attribute(self) -> str:  # type: ignore[override]
        return self.entry.attribute

    @property
    def op(self) -> str:  # type: ignore[override]
        return self.entry.op

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            twin: Any = self.of_caller(sys._getframe(1))
            if twin is not None:
                return twin(*args, **kwargs)
        entry, module = self.entry, self.module
        own = getattr(type(module), entry.attribute)
        if self.aside:
            return own(module, *args, **kwargs)
        given, reason = self._method.read(args, kwargs)
        if reason is None:
            reason = self._why_not(entry.tensor_of(given.get(self._method.positional[0])), given)
        self.count(reason)
        if reason is not None:
            return own(module, *args, **kwargs)
        attend = functools.partial(self.attend, **self.how) if self.how else self.attend
        return entry.compute(module, attend, **given)

    def _why_not(self, first: Any, given: dict[str, Any]) -> str | None:
        entry, module = self.entry, self.module
        if torch.jit.is_tracing():
            return "torch.jit.trace is running, which records the class's own code"
        if entry.takes_tensor and not isinstance(first, Tensor):
            return _not_a_tensor(first, type(module).__name__)
        reason = (
            _unknown(given, self._method.judged)
            or entry.why_not(module)
            or entry.why_not_call(module, **given)
            or _unknown(given, self._method.computed)
        )
        return self.why_not_here(first) if reason is None and entry.takes_tensor else reason

    def kept(self) -> str | None:
        return super().kept() if self.entry.takes_tensor else None

    def __repr__(self) -> str:
        return f"<accel {self.entry.op} for {type(self.module).__name__}.{self.entry.attribute}>"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_method"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._method = _method_of(self.module, self.entry)  # of the library that is here now


def _not_a_tensor(first: Any, name: str) -> str:
    if isinstance(first, torch.fx.Proxy):
        return (
            f"torch.fx is tracing and writes down the code of {name}, so the traced model has no kernel there; "
            f"with {name} among the tracer's leaf modules it keeps it"
        )
    return f"its input is a {type(first).__name__}, not a tensor"


@dataclasses.dataclass(frozen=True)
class _Method:
    """How the method of a class is called, and which arguments our side takes."""

    positional: tuple[str, ...]
    named: frozenset[str]
    """All that the class gives a name to."""
    passes_over: bool
    """Whether the class takes any other keyword, and reads none."""
    refuses: bool
    """Whether it takes no other."""
    judged: frozenset[str] | None
    """What ``why_not_call`` takes; None for everything."""
    computed: frozenset[str] | None
    """What ``compute`` takes."""

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """The arguments by the class's names, and why the call is the class's affair."""
        given = dict(zip(self.positional, args, strict=False))
        given.update(kwargs)
        if len(args) > len(self.positional):
            return given, f"it is given {len(args)} arguments, and takes {len(self.positional)}"
        if len(given) < len(args) + len(kwargs):
            return given, "an argument is given twice"
        for name in kwargs:
            if name in self.named:
                continue
            if self.refuses:
                return given, f"{name} is given, which the class does not take"
            if self.passes_over:
                del given[name]
        return given, None


def _unknown(given: dict[str, Any], known: frozenset[str] | None) -> str | None:
    for name in given:
        if known is not None and name not in known:
            return f"{name} is given, which is not known here"
    return None


def _method_of(module: Any, entry: Entry) -> _Method:
    cls: Any = type(module)  # mypy takes metaclasses for unhashable
    return _read_method(cls, entry)


@functools.cache
def _read_method(cls: type, entry: Entry) -> _Method:
    method = getattr(cls, entry.attribute)
    parameters = list(inspect.signature(method).parameters.values())[1:]
    positional = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    named = frozenset(positional) | {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    others = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    unread = others is not None and not _loads(method, others)
    return _Method(positional, named, unread, others is None, _takes(entry.why_not_call), _takes(entry.compute))


def _takes(function: Callable[..., Any]) -> frozenset[str] | None:
    parameters = inspect.signature(function).parameters.values()
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else frozenset(p.name for p in parameters)


def _loads(function: Callable[..., Any], variable: str) -> bool:
    """Whether the code of ``function`` reads a local variable; what has no code here may, and so may a decorator."""
    code = getattr(function, "__code__", None)
    if code is None or hasattr(function, "__wrapped__"):
        return True
    for instruction in dis.get_instructions(code):
        names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
        if variable in names and instruction.opname.startswith("LOAD"):
            return True
    return False
