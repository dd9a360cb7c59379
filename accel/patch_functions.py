"""Putting kernels behind functions of other libraries, for the whole process, and taking them out again."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from accel.patch_report import Row, table, uncalled
from accel.patches import FUNCTIONS, Function
from accel.patches.stand import Stand, replaced_again

__all__ = ["FunctionReport", "FunctionStand", "patch_functions", "unpatch_functions"]


class FunctionStand(Stand):
    """Stands in for one function wherever a module holds it under its own name."""

    def __init__(self, entry: Function, original: Callable[..., Any]) -> None:
        self.entry = entry
        self.original = original
        self.attribute, self.op = entry.name, entry.op
        super().__init__(sys.modules[entry.home])  # type: ignore[arg-type]
        parameters = inspect.signature(original).parameters.values()
        self._names = tuple([p.name for p in parameters if p.kind is not p.VAR_KEYWORD])
        self._takes_any = len(self._names) < len(parameters)
        self._needs = {p.name for p in parameters if p.default is p.empty and p.name in self._names}

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        self.function = function

    @property
    def in_place(self) -> bool:
        return vars(self.module).get(self.attribute) is self.function

    def kept(self) -> str | None:
        return None  # it is also there for where the original does not load

    def put(self) -> None:
        _rebind(self.attribute, self.original, self.function)

    def remove(self, for_good: bool = True) -> None:
        _rebind(self.attribute, self.function, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        first = given.get(self._names[0])
        reason = None
        if not isinstance(first, Tensor):  # torch.fx traces with proxies
            reason = f"its {self._names[0]} is a {type(first).__name__}, not a tensor"
        elif torch.jit.is_tracing():
            reason = "torch.jit.trace is running, which records the library's own code"
        elif not self._reads(given, len(args)):
            reason = f"it is not called with its arguments, {', '.join(self._names)}"
        else:
            reason = self.entry.why_not_call(**given) or self._why_not_here(first)
        self.count(reason)
        if reason is not None:
            return self.original(*args, **kwargs)
        return self.entry.compute(self.attend, **given)

    def _reads(self, given: dict[str, Any], positional: int) -> bool:
        taken = self._takes_any or given.keys() <= set(self._names)
        return taken and positional <= len(self._names) and self._needs <= given.keys()

    def _why_not_here(self, first: Tensor) -> str | None:
        dtype = self.entry.computes_in
        return None if dtype is None else self.why_not_here(first, dtype)

    def __repr__(self) -> str:
        return f"<accel {self.op} for {self.entry.target}>"


def _rebind(name: str, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Let ``name`` mean ``new`` in every module where it means ``old``: others import the function by its name."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and vars(module).get(name) is old:
            vars(module)[name] = new


_standing: dict[str, FunctionStand] = {}


class FunctionReport:
    """What :func:`patch_functions` did; prints as a table with calls and backends.

    As a context manager it takes back at exit what its own call put in.
    """

    def __init__(self, rows: list[Row], put_in: list[FunctionStand]) -> None:
        self.rows = rows
        self._put_in = put_in

    @property
    def replaced(self) -> list[Row]:
        """Rows of functions that run a kernel."""
        return [row for row in self.rows if row.status != "skipped"]

    def uncalled(self) -> list[str]:
        """Paths of the functions whose kernel has never run."""
        return uncalled(self.rows)

    def __enter__(self) -> FunctionReport:
        return self

    def __exit__(self, *exception: Any) -> None:
        _take_out(self._put_in)

    def __str__(self) -> str:
        return table("functions", ("function", "kind"), self.rows)


def patch_functions() -> FunctionReport:
    """Let the kernels compute inside known functions of other libraries, for every caller in the process.

    These are ``torchvision.ops.deform_conv2d``, which then also works where torchvision's own operator does not load,
    and the scans of Mamba-2 in six families of transformers. It is a call of its own, and not a part of
    :func:`accel.patch`, because it reaches beyond any one model: a model's report and its undo could not answer for it.
    ``with accel.patch_functions() as report:`` bounds it in time.

    A function is replaced in the module that defines it and in every module that imported it under its own name,
    before or after; references under another name, in a closure or in a default argument keep the original. Calls that
    the op does not take, such as those of a ``torch.fx`` tracer, go to the original and are counted with the reason.
    TorchScript compiles the original only: undo first. Libraries that are not imported are left alone.

    Returns:
        A report with a row for each function.

    Raises:
        ValueError: none of the libraries is imported.
    """
    rows, put_in = [], []
    for target, entry in FUNCTIONS.items():
        row = Row(target, "function", entry.op, "skipped")
        rows.append(row)
        present = _standing.get(target)
        found = vars(sys.modules[entry.home]).get(entry.name) if entry.home in sys.modules else None
        if present is not None and present.active:
            row.status, row.replacement = "already patched", present
        elif entry.home not in sys.modules:
            row.reason = f"{entry.home} is not imported"
        elif not inspect.isfunction(found) or found.__module__ != entry.home:
            row.reason = f"it has been replaced by {found!r}"
        elif (reason := entry.why_not(found)) is not None:
            row.reason = reason
        else:
            stand = _standing[target] = FunctionStand(entry, found)
            stand.put()
            put_in.append(stand)
            row.status, row.replacement = "replaced", stand
    report = FunctionReport(rows, put_in)
    if not report.replaced:
        raise ValueError(
            "no function to replace; known:\n" + "\n".join(f"  {row.name}: {row.reason}" for row in report.rows)
        )
    return report


def unpatch_functions() -> list[str]:
    """Undo :func:`patch_functions`, and return the paths of the functions restored, the same objects as before.

    Raises:
        RuntimeError: something else has replaced a function since.
    """
    return _take_out(list(_standing.values()))


def _take_out(stands: list[FunctionStand]) -> list[str]:
    restored, covered = [], []
    for stand in stands:
        target = stand.entry.target
        if _standing.get(target) is not stand:
            continue  # taken out already
        if stand.active:
            stand.remove()
            del _standing[target]
            restored.append(target)
        else:
            covered.append(target)
    if covered:
        raise replaced_again(covered)
    return restored
