"""What stands in a module in place of its own code: it counts what it serves, and can be taken out again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from accel import dispatch

_said: set[tuple[str, str]] = set()


class Stand:
    """One piece of a patch, kept in ``vars(module)[attribute]`` of the module that it serves.

    It is copied and pickled with its module and then belongs to the copy.
    """

    attribute: str
    op: str
    listed = True
    """Whether it has a row in the report; what only prepares the work of others has none."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls = 0
        self.compiled = False
        self.fallbacks: dict[str, int] = {}
        self.backend: str | None = None
        self._asked: Any = None

    @property
    def active(self) -> bool:
        """Whether it stands in its module now."""
        return vars(self.module).get(self.attribute) is self

    def put(self) -> None:
        setattr(self.module, self.attribute, self)

    def remove(self, for_good: bool = True) -> None:
        """Take it out; ``for_good`` unless it is put back at once."""
        delattr(self.module, self.attribute)

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
            asked = (first.dtype, first.device, dispatch._settings.backend)
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
    """The pieces that stand in this module itself."""
    for value in list(vars(module).values()):
        if isinstance(value, Stand) and value.module is module:
            yield value


def say_once(what: str, reason: str) -> None:
    """Log a fallback of something that no patch stands in, the first time it happens."""
    if (what, reason) not in _said:
        _said.add((what, reason))
        dispatch.log.warning("%s", f"{what} is not served by accel: {reason}")
