"""Putting the kernels into a model that already exists, with a report of what was done, and taking them out again."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from accel.patches import TABLE, Entry, class_path, transformers_switch, transformers_unpad
from accel.patches.stand import Stand, stands_in

__all__ = ["PatchReport", "Replacement", "Row", "patch", "unpatch"]


class Replacement(Stand):
    """Stands in for one method of one module, as an attribute of that instance; the class is left as it is.

    It computes with what the module holds at the time of the call. A call that the kernel does not serve goes to the
    class's own method and is counted with the reason. It is copied and pickled with its module and bound to the copy.
    """

    def __init__(self, module: nn.Module, target: str) -> None:
        super().__init__(module)
        self.target = target
        self._names = _parameter_names(type(module), self.entry.attribute)

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
        entry, module = self.entry, self.module
        given = dict(zip(self._names, args, strict=False))
        given.update(kwargs)
        first = given.get(self._names[0])
        if len(args) > len(self._names):
            reason: str | None = f"it is given {len(args)} arguments, and takes {len(self._names)}"
        elif entry.takes_tensor and not isinstance(first, Tensor):
            # torch.fx traces with proxies, which the class's own code may know
            reason = f"its input is a {type(first).__name__}, not a tensor"
        else:
            reason = entry.why_not(module) or entry.why_not_call(module, **given)
        self.count(reason)
        if reason is not None:
            return getattr(type(module), entry.attribute)(module, *args, **kwargs)
        return entry.compute(module, self.attend, **given)

    def __repr__(self) -> str:
        return f"<accel {self.entry.op} for {type(self.module).__name__}.{self.entry.attribute}>"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_names"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
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
    replacement: Stand | None = dataclasses.field(default=None, repr=False)

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
        return self.replacement is not None and self.replacement.active


class PatchReport:
    """What :func:`patch` did, module by module; prints as a table, and shows backends and calls once the model ran.

    As a context manager it takes back at exit what its own call to :func:`patch` put in.
    """

    def __init__(self, model: nn.Module, rows: list[Row], put_in: list[tuple[str, Stand]]) -> None:
        self.model = model
        self.rows = rows
        self._put_in = put_in

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
        return uncalled(self.rows)

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
        """The whole model without patches: what prepares a call and what serves it belong together."""
        stands = [stand for module in self.model.modules() for stand in stands_in(module)]
        for stand in stands:
            stand.remove(for_good=False)
        try:
            yield
        finally:
            for stand in stands:
                stand.put()

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(self, *exception: Any) -> None:
        covered = []
        for name, stand in self._put_in:
            if vars(stand.module).get(stand.attribute) is stand:
                stand.remove()
            elif stand.attribute in vars(stand.module):
                covered.append(f"{name}.{stand.attribute}")
        if covered:
            raise RuntimeError(f"replaced again since they were patched, undo that first: {', '.join(covered)}")

    def __str__(self) -> str:
        return table(type(self.model).__name__, ("module", "class"), self.rows)


_STATUSES = ("replaced", "already patched", "would be replaced", "skipped")


def uncalled(rows: list[Row]) -> list[str]:
    return [r.name for r in rows if r.replacement is not None and not r.calls and not r.replacement.compiled]


def table(title: str, names: tuple[str, str], rows: list[Row]) -> str:
    """The rows of a report as text; ``names`` head the first two columns."""
    counts = {status: sum(row.status == status for row in rows) for status in _STATUSES}
    head = f"{title}: " + ", ".join(f"{n} {s}" for s, n in counts.items() if n)
    lines = [(*names, "op", "backend", "calls", "note")]
    for row in rows:
        note = [] if row.status == "replaced" else [row.status + (f": {row.reason}" if row.reason else "")]
        note += [f"{n} calls not served: {reason}" for reason, n in row.fallbacks.items()]
        if row.replacement is not None and row.replacement.compiled:
            note.append("compiled")
        calls = str(row.calls) if row.replacement is not None else "-"
        name = row.name or "(the model)"
        lines.append((name, row.old_class, row.op, row.backend or "-", calls, "; ".join(note)))
    widths = [max(len(line[i]) for line in lines) for i in range(5)] + [0]
    texts = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([head, *texts])


def patch(
    model: nn.Module,
    *,
    ops: str | Iterable[str] | None = None,
    skip: str | type | Iterable[str | type] = (),
    recipe: str | Mapping[str, bool] | None = None,
    dry_run: bool = False,
    strict: bool = False,
    allow_none: bool = False,
    unpad: bool = False,
) -> PatchReport:
    """Let the kernels compute inside ``model``, in place, wherever they compute the same function.

    A patched module stays an instance of its class and keeps its parameters, buffers and ``state_dict``: one method is
    covered by an attribute of the instance. What the kernel would bypass is bypassed only while it is the plain class
    without hooks, adapters or parametrizations, at the time of patching and at every call; otherwise the class's own
    code runs. Copies and pickles of a patched model are patched too. ``torch.nn.DataParallel``, whose replicas share
    the attributes of an instance, is not supported. A function that a model's own code calls is not found here:
    :func:`accel.patch_functions` replaces it for the whole process.

    Models of transformers whose attention goes through its registry are switched to ``"accel"`` there, each attention
    module with a row of its own. While they are patched their configuration is a copy, so that another model with the
    same one is untouched.

    Args:
        model: any module; classes of torch.nn, torchvision, timm, transformers, diffusers and mmcv are known.
        ops: take the replacements of these ops and no others, also such as change numerics by design. None takes all
            that compute the same function.
        skip: modules to leave alone with all they contain: patterns of names (``"features.1*"``) or classes.
        recipe: ``"exact"``, which is what None means, or ops switched on (as if named in ``ops``) and off over it:
            ``{"window_attention": False}``.
        dry_run: change nothing, report what would be done.
        strict: raise if a module of a known class cannot be replaced, before anything is changed.
        allow_none: return an empty report where nothing was replaced, instead of raising.
        unpad: also take the padding out of every batch that comes with an ``attention_mask``, before the first layer
            of a transformers encoder or decoder-only model, and put it back behind the last one: hidden states there
            are 0 where the mask is 0, and all that reads them (heads, losses) sees the padded batch. Calls that cannot
            be flattened, with a cache for instance, raise.

    Returns:
        A report; ``print`` it, before or after the model ran. ``with accel.patch(model) as report:`` undoes the
        patch at exit.

    Raises:
        ValueError: an unknown op or recipe, both ``ops`` and ``recipe``, nothing to replace, or ``strict`` and a
            module that had to be skipped. The message lists what was found.
        NotImplementedError: ``unpad``, and the model cannot run on flattened batches.
    """
    wanted = _wanted(ops, recipe)
    plan = _plan(model, wanted, (skip,) if isinstance(skip, str | type) else tuple(skip))
    if unpad:
        plan.add_unpadding(model)
    report = PatchReport(model, plan.rows, [] if dry_run else [(name, stand) for name, stand, _ in plan.taken])
    refused = [row for row in report.skipped if row.reason != _LEFT_OUT]
    if strict and refused:
        raise ValueError("strict: modules that had to be skipped\n" + _listing(refused))
    if not report.replaced and not dry_run and not allow_none:
        raise ValueError(_nothing(model, wanted, report.skipped))
    for _, stand, row in plan.taken:
        if dry_run and row is not None:
            row.status = "would be replaced"
        elif not dry_run:
            stand.put()
            if row is not None:
                row.replacement = stand
    return report


def unpatch(model: nn.Module) -> list[str]:
    """Undo every :func:`patch` of ``model``, in place, and return the names of the modules restored.

    Their methods are those of their classes again, so outputs are bit-identical to those before the patch.
    """
    restored = []
    for name, module in model.named_modules():
        stands = list(stands_in(module))
        for stand in stands:
            stand.remove()
        if any(stand.listed for stand in stands):
            restored.append(name)
    return restored


_LEFT_OUT = "named in skip"


def _wanted(ops: str | Iterable[str] | None, recipe: str | Mapping[str, bool] | None) -> _Wanted:
    """The part of the table that the caller asks for."""
    known = sorted({e.op for e in TABLE.values()} | {transformers_switch.OP})
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
    table = {t: e for t, e in TABLE.items() if switches.get(e.op, e.same_function)}
    return _Wanted(table, switches.get(transformers_switch.OP, True))


@dataclasses.dataclass
class _Wanted:
    table: dict[str, Entry]
    registry: bool
    """Whether attention that goes through transformers' registry is switched."""


@dataclasses.dataclass
class _Plan:
    rows: list[Row] = dataclasses.field(default_factory=list)
    taken: list[tuple[str, Stand, Row | None]] = dataclasses.field(default_factory=list)
    """Every piece to put in, with its module's name and its row, if it has one."""

    def add(self, row: Row, reason: str | None, stand: Callable[[], Stand]) -> None:
        self.rows.append(row)
        row.reason = reason or ""
        if not row.reason:
            row.status = "replaced"
            self.taken.append((row.name, stand(), row))

    def add_unpadding(self, model: nn.Module) -> None:
        name, base = transformers_unpad.base_of(model)
        row = Row(name, type(base).__name__, transformers_unpad.OP, "skipped")
        present = next((s for s in stands_in(base) if isinstance(s, transformers_unpad.Unpadding)), None)
        if present is not None:
            self.rows.append(row)
            row.status, row.replacement = "already patched", present
        else:
            self.add(row, None, lambda: transformers_unpad.Unpadding(base))


def _plan(model: nn.Module, wanted: _Wanted, skip: tuple[str | type, ...]) -> _Plan:
    plan = _Plan()
    left_out: set[str] = set()
    owned: set[str] = set()  # what stands below a module of the table is that module's business
    attention = {}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if (name and parent in left_out) or _named(name, module, skip):
            left_out.add(name)
        below = name and parent in owned
        if below or any(class_path(c) in wanted.table for c in type(module).__mro__):
            owned.add(name)
        if wanted.registry and not below and transformers_switch.goes_through_the_registry(module):
            reason = _LEFT_OUT if name in left_out else transformers_switch.why_not(module) or ""
            attention[name] = Row(name, type(module).__name__, transformers_switch.OP, "skipped", reason)
            plan.rows.append(attention[name])
            _note_present(attention[name], module, transformers_switch.Attention)
        _plan_entry(plan, wanted.table, name, module, name in left_out)
    free = {name for name, row in attention.items() if not row.reason}
    for name, switch in transformers_switch.plan(model, free, left_out) if free else ():
        row = attention.get(name)
        if row is not None:
            row.status = "replaced"
        plan.taken.append((name, switch, row))
    return plan


def _note_present(row: Row, module: nn.Module, kind: type[Stand], attribute: str | None = None) -> bool:
    for stand in stands_in(module):
        if isinstance(stand, kind) and (attribute is None or stand.attribute == attribute):
            row.status, row.reason, row.replacement = "already patched", "", stand
            return True
    return False


def _plan_entry(plan: _Plan, table: dict[str, Entry], name: str, module: nn.Module, left_out: bool) -> None:
    cls = type(module)
    entry = table.get(class_path(cls))
    base = entry or next((table[class_path(c)] for c in cls.__mro__ if class_path(c) in table), None)
    if base is None or not base.applies(module):
        return
    whole = base.attribute == "forward" or not transformers_switch.goes_through_the_registry(module)
    row = Row(name, cls.__name__ if whole else f"{cls.__name__}.{base.attribute}", base.op, "skipped")
    if left_out:
        plan.add(row, _LEFT_OUT, lambda: Replacement(module, base.target))
    elif entry is None:
        reason = f"it is a subclass of {base.target}, which may compute something else"
        plan.add(row, reason, lambda: Replacement(module, base.target))
    elif _note_present(row, module, Replacement, entry.attribute):
        plan.rows.append(row)
    else:
        plan.add(row, _why_not_replace(module, entry), lambda: Replacement(module, entry.target))


def _why_not_replace(module: nn.Module, entry: Entry) -> str | None:
    present = vars(module).get(entry.attribute)
    if present is not None and not isinstance(present, Replacement):
        return f"its {entry.attribute} has been replaced by {type(present).__name__}"
    if not hasattr(type(module), entry.attribute):
        return f"the class has no {entry.attribute}: not the version of the library that is known here"
    return entry.why_not(module)


def _named(name: str, module: nn.Module, skip: tuple[str | type, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, s) if isinstance(s, str) else isinstance(module, s) for s in skip)


def _listing(rows: list[Row]) -> str:
    return "\n".join(f"  {row.name or '(the model)'} ({row.old_class}): {row.reason}" for row in rows)


def _nothing(model: nn.Module, wanted: _Wanted, skipped: list[Row]) -> str:
    text = f"nothing to replace in {type(model).__name__}"
    if skipped:
        return f"{text}; modules that had to be skipped\n" + _listing(skipped)
    if not wanted.table and not wanted.registry:
        return f"{text}: no op is switched on"
    found = {class_path(type(m)) for m in model.modules()}
    names = {path.rpartition(".")[2]: path for path in sorted(found)}
    near: list[str] = []
    for target in wanted.table:
        near += difflib.get_close_matches(target.rpartition(".")[2], names, n=2, cutoff=0.6)
    nearest = ", ".join(names[n] for n in dict.fromkeys(near)) or "none comes near"
    looked = sorted(wanted.table) + ["attention that goes through transformers' registry"] * wanted.registry
    return f"{text}: looked for {', '.join(looked)}; nearest classes in the model: {nearest}"


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
