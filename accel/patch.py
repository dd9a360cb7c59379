"""Putting the kernels into a model that already exists, with a report of what was done, and taking them out again."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from accel import dispatch
from accel.patches import TABLE, Entry, class_path

__all__ = ["PatchReport", "Replacement", "Row", "patch", "unpatch"]


class Replacement:
    """Stands in for one method of one module, as an attribute of that instance; the class is left as it is.

    It computes with what the module holds at the time of the call. A call that the kernel does not serve goes to the
    class's own method and is counted with the reason. It is copied and pickled with its module and bound to the copy.
    """

    def __init__(self, module: nn.Module, target: str) -> None:
        self.module = module
        self.target = target
        self.calls = 0
        self.compiled = False
        self.fallbacks: dict[str, int] = {}
        self.backend: str | None = None
        self._asked: Any = None
        self._names = _parameter_names(type(module), self.entry.attribute)

    @property
    def entry(self) -> Entry:
        return TABLE[self.target]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        entry, module = self.entry, self.module
        given = dict(zip(self._names, args, strict=False))
        given.update(kwargs)
        first = given.get(self._names[0])
        if len(args) > len(self._names):
            reason: str | None = f"it is given {len(args)} arguments, and takes {len(self._names)}"
        elif not isinstance(first, Tensor):  # torch.fx traces with proxies, which the class's own code may know
            reason = f"its input is a {type(first).__name__}, not a tensor"
        else:
            reason = entry.why_not(module) or entry.why_not_call(module, **given)
        if torch.compiler.is_compiling():
            self.compiled = True  # no counting: a number that changes would be compiled anew at every call
        elif reason is None:
            self.calls += 1
        else:
            self._count_fallback(reason)
        if reason is not None:
            return getattr(type(module), entry.attribute)(module, *args, **kwargs)
        return entry.compute(module, self._attend, **given)

    def _attend(self, first: Tensor, *args: Any, **how: Any) -> Any:
        """The op, and a note of the backend it runs on."""
        op = dispatch.OPS[self.entry.op]
        if not torch.compiler.is_compiling():
            asked = (first.dtype, first.device, dispatch._settings.backend)
            if asked != self._asked:  # the choice depends on nothing else that changes from call to call
                prepared = op.prepare(first, *args, **{**how, "dropout_p": 0.0})
                self.backend, self._asked = dispatch.select(op, prepared).name, asked
        return op.function(first, *args, **how)

    def _count_fallback(self, reason: str) -> None:
        if reason not in self.fallbacks:
            dispatch.log.warning("%r is not used for this call: %s", self, reason)
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1

    def __repr__(self) -> str:
        return f"<accel {self.entry.op} for {type(self.module).__name__}.{self.entry.attribute}>"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_names", "_asked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._asked = None
        self._names = _parameter_names(type(self.module), self.entry.attribute)  # of the library that is here now


def _parameter_names(cls: type, attribute: str) -> tuple[str, ...]:
    parameters = list(inspect.signature(getattr(cls, attribute)).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


@dataclasses.dataclass
class Row:
    """What became of one module."""

    name: str
    old_class: str
    op: str
    status: str
    """``replaced``, ``already patched``, ``would be replaced`` (dry run) or ``skipped``."""
    reason: str = ""
    replacement: Replacement | None = dataclasses.field(default=None, repr=False)

    @property
    def backend(self) -> str | None:
        """The backend that ran last; None before the first call outside torch.compile."""
        return self.replacement.backend if self.replacement is not None else None

    @property
    def calls(self) -> int:
        """Calls that the kernel served, those inside compiled code not counted."""
        return self.replacement.calls if self.replacement is not None else 0

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls that went to the class's own method, by reason."""
        return self.replacement.fallbacks if self.replacement is not None else {}

    @property
    def active(self) -> bool:
        """Whether the replacement still stands in its module."""
        r = self.replacement
        return r is not None and vars(r.module).get(r.entry.attribute) is r


class PatchReport:
    """What :func:`patch` did, module by module; prints as a table, and shows backends and calls once the model ran.

    As a context manager it takes back at exit what its own call to :func:`patch` put in.
    """

    def __init__(self, model: nn.Module, rows: list[Row]) -> None:
        self.model = model
        self.rows = rows

    @property
    def replaced(self) -> list[Row]:
        """Rows of modules that run a kernel, or would in a dry run."""
        return [row for row in self.rows if row.status != "skipped"]

    @property
    def skipped(self) -> list[Row]:
        """Rows of modules of a known class that were left alone, each with its reason."""
        return [row for row in self.rows if row.status == "skipped"]

    def uncalled(self) -> list[str]:
        """Names of the patched modules whose kernel has never run."""
        return [
            row.name
            for row in self.rows
            if row.replacement is not None and not row.replacement.calls and not row.replacement.compiled
        ]

    def verify(self, *args: Any, **kwargs: Any) -> float:
        """Run ``model(*args, **kwargs)`` without and with the replacements, in eval mode, and compare.

        Returns:
            The largest absolute difference between the two outputs, over every tensor in them; infinity where one
            is NaN and the other is not.

        Raises:
            ValueError: nothing is patched (any more), or the outputs differ in structure or hold no tensor.
        """
        if not any(row.active for row in self.rows):
            raise ValueError(f"nothing is patched in {type(self.model).__name__}, so there is nothing to verify")
        training = {m: m.training for m in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad():
                with self._taken_out():
                    expected = list(_tensors(self.model(*args, **kwargs)))
                found = list(_tensors(self.model(*args, **kwargs)))
        finally:
            for module, was in training.items():
                module.training = was
        if not expected or [x.shape for x in expected] != [x.shape for x in found]:
            raise ValueError(
                "the outputs cannot be compared: "
                f"{[tuple(x.shape) for x in expected]} before, {[tuple(x.shape) for x in found]} after"
            )
        return max(_largest_difference(a, b) for a, b in zip(expected, found, strict=True))

    @contextmanager
    def _taken_out(self) -> Iterator[None]:
        replacements = [row.replacement for row in self.rows if row.active and row.replacement is not None]
        for r in replacements:
            delattr(r.module, r.entry.attribute)
        try:
            yield
        finally:
            for r in replacements:
                setattr(r.module, r.entry.attribute, r)

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(self, *exception: Any) -> None:
        covered = []
        for row in self.rows:
            if row.status != "replaced" or row.replacement is None:
                continue
            r = row.replacement
            if row.active:
                delattr(r.module, r.entry.attribute)
            elif r.entry.attribute in vars(r.module):
                covered.append(f"{row.name}.{r.entry.attribute}")
        if covered:
            raise RuntimeError(f"replaced again since they were patched, undo that first: {', '.join(covered)}")

    def __str__(self) -> str:
        counts = {status: sum(row.status == status for row in self.rows) for status in _STATUSES}
        head = f"{type(self.model).__name__}: " + ", ".join(f"{n} {s}" for s, n in counts.items() if n)
        lines = [("module", "class", "op", "backend", "calls", "note")]
        for row in self.rows:
            note = [] if row.status == "replaced" else [row.status + (f": {row.reason}" if row.reason else "")]
            note += [f"{n} calls not served: {reason}" for reason, n in row.fallbacks.items()]
            if row.replacement is not None and row.replacement.compiled:
                note.append("compiled")
            calls = str(row.calls) if row.replacement is not None else "-"
            name = row.name or "(the model)"
            lines.append((name, row.old_class, row.op, row.backend or "-", calls, "; ".join(note)))
        widths = [max(len(line[i]) for line in lines) for i in range(5)] + [0]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([head, *table])


_STATUSES = ("replaced", "already patched", "would be replaced", "skipped")


def patch(
    model: nn.Module,
    *,
    ops: str | Iterable[str] | None = None,
    skip: str | type | Iterable[str | type] = (),
    recipe: str | Mapping[str, bool] | None = None,
    dry_run: bool = False,
    strict: bool = False,
    allow_none: bool = False,
) -> PatchReport:
    """Let the kernels compute inside ``model``, in place, wherever they compute the same function.

    A patched module stays an instance of its class and keeps its parameters, buffers and ``state_dict``: one method is
    covered by an attribute of the instance. What the kernel would bypass is bypassed only while it is the plain class
    without hooks, adapters or parametrizations, at the time of patching and at every call; otherwise the class's own
    code runs. Copies and pickles of a patched model are patched too. ``torch.nn.DataParallel``, whose replicas share
    the attributes of an instance, is not supported.

    Args:
        model: any module; classes of torchvision, timm and transformers are known.
        ops: take the replacements of these ops and no others, also such as change numerics by design. None takes all
            that compute the same function.
        skip: modules to leave alone with all they contain: patterns of names (``"features.1*"``) or classes.
        recipe: ``"exact"``, which is what None means, or ops switched on (as if named in ``ops``) and off over it:
            ``{"window_attention": False}``.
        dry_run: change nothing, report what would be done.
        strict: raise if a module of a known class cannot be replaced, before anything is changed.
        allow_none: return an empty report where nothing was replaced, instead of raising.

    Returns:
        A report; ``print`` it, before or after the model ran. ``with accel.patch(model) as report:`` undoes the
        patch at exit.

    Raises:
        ValueError: an unknown op or recipe, both ``ops`` and ``recipe``, nothing to replace, or ``strict`` and a
            module that had to be skipped. The message lists what was found.
    """
    wanted = _wanted(ops, recipe)
    rows, taken = _plan(model, wanted, (skip,) if isinstance(skip, str | type) else tuple(skip))
    report = PatchReport(model, rows)
    refused = [row for row in report.skipped if row.reason != _LEFT_OUT]
    if strict and refused:
        raise ValueError("strict: modules that had to be skipped\n" + _listing(refused))
    if not report.replaced and not dry_run and not allow_none:
        raise ValueError(_nothing(model, wanted, report.skipped))
    for row, module, entry in taken:
        if dry_run:
            row.status = "would be replaced"
        else:
            row.replacement = Replacement(module, entry.target)
            setattr(module, entry.attribute, row.replacement)
    return report


def unpatch(model: nn.Module) -> list[str]:
    """Undo every :func:`patch` of ``model``, in place, and return the names of the modules restored.

    Their methods are those of their classes again, so outputs are bit-identical to those before the patch.
    """
    restored = []
    for name, module in model.named_modules():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, Replacement):
                delattr(module, attribute)
                restored.append(name)
    return restored


_LEFT_OUT = "named in skip"


def _wanted(ops: str | Iterable[str] | None, recipe: str | Mapping[str, bool] | None) -> dict[str, Entry]:
    """The part of the table that the caller asks for."""
    known = sorted({e.op for e in TABLE.values()})
    if ops is not None and recipe is not None:
        raise ValueError(f"give ops or recipe, not both: {ops=}, {recipe=}")
    if isinstance(recipe, str) and recipe != "exact":
        raise ValueError(f"unknown recipe {recipe!r}: it is 'exact' or a mapping of ops to True or False")
    switches: dict[str, bool] = {}
    if ops is not None:
        ops = (ops,) if isinstance(ops, str) else tuple(ops)
        switches = dict.fromkeys(known, False) | dict.fromkeys(ops, True)
    elif isinstance(recipe, Mapping):
        switches = dict(recipe)
    for op in switches:
        if op not in known:
            raise ValueError(f"no replacement uses an op {op!r}; known: {', '.join(known)}")
    return {t: e for t, e in TABLE.items() if switches.get(e.op, e.same_function)}


def _plan(
    model: nn.Module, wanted: dict[str, Entry], skip: tuple[str | type, ...]
) -> tuple[list[Row], list[tuple[Row, nn.Module, Entry]]]:
    rows, taken = [], []
    left_out: set[str] = set()
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if (name and parent in left_out) or _named(name, module, skip):
            left_out.add(name)
        cls = type(module)
        entry = wanted.get(class_path(cls))
        base = next((wanted[class_path(c)] for c in cls.__mro__ if class_path(c) in wanted), None)
        if base is None:
            continue
        row = Row(name, cls.__name__, base.op, "skipped")
        rows.append(row)
        if name in left_out:
            row.reason = _LEFT_OUT
        elif entry is None:
            row.reason = f"it is a subclass of {base.target}, which may compute something else"
        else:
            present = vars(module).get(entry.attribute)
            if isinstance(present, Replacement) and present.module is module:
                row.status, row.replacement = "already patched", present
                continue
            if present is not None and not isinstance(present, Replacement):
                row.reason = f"its {entry.attribute} has been replaced by {type(present).__name__}"
            elif not hasattr(cls, entry.attribute):
                row.reason = f"the class has no {entry.attribute}: not the version of the library that is known here"
            else:
                row.reason = entry.why_not(module) or ""
            if not row.reason:
                row.status = "replaced"
                taken.append((row, module, entry))
    return rows, taken


def _named(name: str, module: nn.Module, skip: tuple[str | type, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, s) if isinstance(s, str) else isinstance(module, s) for s in skip)


def _listing(rows: list[Row]) -> str:
    return "\n".join(f"  {row.name or '(the model)'} ({row.old_class}): {row.reason}" for row in rows)


def _nothing(model: nn.Module, wanted: dict[str, Entry], skipped: list[Row]) -> str:
    text = f"nothing to replace in {type(model).__name__}"
    if skipped:
        return f"{text}; modules that had to be skipped\n" + _listing(skipped)
    if not wanted:
        return f"{text}: no op is switched on"
    found = {class_path(type(m)) for m in model.modules()}
    names = {path.rpartition(".")[2]: path for path in sorted(found)}
    near: list[str] = []
    for target in wanted:
        near += difflib.get_close_matches(target.rpartition(".")[2], names, n=2, cutoff=0.6)
    nearest = ", ".join(names[n] for n in dict.fromkeys(near)) or "none comes near"
    return f"{text}: looked for {', '.join(sorted(wanted))}; nearest classes in the model: {nearest}"


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from _tensors(getattr(output, field.name))


def _largest_difference(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs())
    return float(torch.nan_to_num(difference, nan=float("inf"), posinf=float("inf")).max())
