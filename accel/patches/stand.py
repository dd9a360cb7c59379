"""What stands in a module in place of its own code: it counts what it serves, and can be taken out again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from accel import dispatch

_said: set[tuple[str, str]] = set()


class Stands(dict[str, "Stand"]):
    """What stands in one module, by the attribute that it covers, also while something else covers that.

    It is kept under the name of what torch.jit.script calls before it reads a module, which is refused here.
    """

    PLACE = "__prepare_scriptable__"

    @classmethod
    def of(cls, module: nn.Module) -> Stands:
        found = vars(module).get(cls.PLACE)
        return found if isinstance(found, Stands) else cls()

    def __call__(self) -> nn.Module:
        name = type(next(iter(self.values())).module).__name__
        raise NotImplementedError(
            f"torch.jit.script compiles the code of classes, and {name} is patched: call accel.unpatch on the model "
            "first, or use torch.compile or torch.jit.trace"
        )


class Stand:
    """One piece of a patch, kept in ``vars(module)[attribute]`` of the module that it serves.

    It is copied and pickled with its module and then belongs to the copy. A shallow copy shares it at first, and gets
    its own when it is called or looked at.
    """

    attribute: str
    op: str
    listed = True
    """Whether it has a row in the report; what only prepares the work of others has none."""
    steps_aside = False
    """Whether ``aside`` sends its calls to the class, so that it need not be taken out for that."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls = 0
        self.compiled = False
        self.fallbacks: dict[str, int] = {}
        self.backend: str | None = None
        self.aside = False
        self._asked: Any = None

    @property
    def in_place(self) -> bool:
        return vars(self.module).get(self.attribute) is self

    @property
    def active(self) -> bool:
        """Whether it stands in its module now."""
        return self.in_place

    @property
    def covered(self) -> bool:
        """Whether something else has taken its place since it was put in, which may still call it."""
        noted = Stands.of(self.module).get(self.attribute) is self
        return noted and not self.in_place and self.attribute in vars(self.module)

    def put(self) -> None:
        setattr(self.module, self.attribute, self)
        vars(self.module)[Stands.PLACE] = Stands({**Stands.of(self.module), self.attribute: self})

    def remove(self, for_good: bool = True) -> None:
        """Take it out; ``for_good`` unless it is put back at once."""
        delattr(self.module, self.attribute)
        self.forget()

    def forget(self) -> None:
        """Leave no note of it in its module."""
        attributes = vars(self.module)
        noted = [(n, s) for n, s in Stands.of(self.module).items() if s is not self]
        left = Stands({n: s for n, s in noted if s.module is self.module or attributes.get(n) is s})
        if left:
            attributes[Stands.PLACE] = left
        elif isinstance(attributes.get(Stands.PLACE), Stands):
            del attributes[Stands.PLACE]

    def of_caller(self, frame: FrameType) -> Stand | None:
        """The piece of a shallow copy that shares this one and is called in ``frame``; None for the module itself."""
        caller = frame.f_locals.get("self")
        if caller is self.module or not isinstance(caller, nn.Module) or vars(caller).get(self.attribute) is not self:
            return None
        return self._handed_to(caller)

    def _handed_to(self, module: nn.Module) -> Stand:
        own = copy.copy(self)
        own.module, own.fallbacks = module, dict(self.fallbacks)
        vars(module)[self.attribute] = own
        vars(module)[Stands.PLACE] = Stands({**Stands.of(module), self.attribute: own})
        return own

    def why_not_here(self, x: Tensor, dtype: torch.dtype | None = None) -> str | None:
        """Why a call with ``x`` is left to the class: no kernel could compute it, and the reference is no faster.
        ``dtype``: what the op gets, where that is not the dtype of ``x``."""
        asked = dispatch._settings.backend
        known = [] if asked is None else [b.name for b in dispatch.OPS[self.op].backends]
        if dispatch._settings.strict or asked in known:
            return None
        if x.device.type == "meta" or not x.is_floating_point():
            return None
        return only_reference(self.op, str(x.device), dtype or x.dtype)

    def kept(self) -> str | None:
        """Why the class's own code would run if the module were called as it stands, on tensors like its parameters."""
        x = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        return None if x is None or self.op not in dispatch.OPS else self.why_not_here(x)

    def count(self, reason: str | None) -> None:
        """Note a call: served, or left to the class for ``reason``."""
        if torch.compiler.is_compiling():
            self.compiled = True  # no counting: a number that changes would be compiled anew at every call
        elif reason is None:
            self.calls += 1
        else:
            if reason not in self.fallbacks:
                dispatch.log.warning("%r is not used for this call: %s", self, reason)
            self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1

    def attend(self, first: Tensor, *args: Any, **how: Any) -> Any:
        """The op, and a note of the backend it runs on."""
        op = dispatch.OPS[self.op]
        if not torch.compiler.is_compiling():
            asked = (first.dtype, first.device, dispatch._settings.backend, dispatch.deterministic())
            if asked != self._asked:  # the choice depends on nothing else that changes from call to call
                with torch.no_grad():  # what checkpointing sees of a call must be the same each time
                    drawn = {"dropout_p": 0.0} if "dropout_p" in how else {}  # no seed is drawn for the look
                    prepared = op.prepare(first, *args, **{**how, **drawn})
                self.backend, self._asked = dispatch.select(op, prepared).name, asked
        return op.function(first, *args, **how)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_asked"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._asked = None


def stands_in(module: nn.Module) -> Iterator[Stand]:
    """The pieces that stand in this module itself, also those that something covers since."""
    for attribute, stand in list(Stands.of(module).items()):
        if stand.module is module:
            yield stand
        elif vars(module).get(attribute) is stand:  # a shallow copy, which has its original's until now
            yield stand._handed_to(module)


def take_out(named: Iterable[tuple[str, Stand]]) -> list[str]:
    """Take out every piece that stands in its place, given with its module's name; return the names of those listed.

    Raises:
        RuntimeError: something else has taken the place of a piece since, and may call it. The others are taken out.
    """
    taken: dict[str, None] = {}
    covered = []
    for name, stand in named:
        if stand.in_place:
            stand.remove()
            taken |= {name: None} if stand.listed else {}
        elif stand.attribute in vars(stand.module):
            now = type(vars(stand.module)[stand.attribute]).__name__
            covered.append(f"{name}.{stand.attribute} (now a {now})".removeprefix("."))
        else:
            stand.forget()
    if covered:
        raise replaced_again(covered)
    return list(taken)


def replaced_again(what: list[str]) -> RuntimeError:
    return RuntimeError(f"replaced again since they were patched, undo that first: {', '.join(what)}")


_verdicts: dict[tuple[str, str, torch.dtype], str | None] = {}


@torch.compiler.assume_constant_result  # what kernels there are does not change
def only_reference(op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why nothing but the reference of ``op`` computes tensors of this kind; None where a kernel does.

    It is asked once, of the op's example: what a kernel lacks for a single call is the op's to say.
    """
    if (op, device, dtype) not in _verdicts:
        _verdicts[op, device, dtype] = _only_reference(dispatch.OPS[op], device, dtype)
    return _verdicts[op, device, dtype]


def _only_reference(op: dispatch.Op, device: str, dtype: torch.dtype) -> str | None:
    with torch.no_grad():
        args, how = op.example(device, dtype)
        prepared = op.prepare(*args, **how)
    refused = []
    for backend in op.backends:
        reason = backend.why_not(prepared)
        if reason is None and backend.name != "reference":
            return None
        if torch.device(device).type in backend.devices and not backend.extra:
            refused.append(f"{backend.name}: {reason}")
    lacking = "; ".join(refused) or "there is no kernel for such a device"
    return f"only the reference of {op.name} computes {dtype} on {device}, which is no faster ({lacking})"


def say_once(what: str, reason: str) -> None:
    """Log a fallback of something that no patch stands in, the first time it happens."""
    if (what, reason) not in _said:
        _said.add((what, reason))
        dispatch.log.warning("%s", f"{what} is not served by accel: {reason}")
