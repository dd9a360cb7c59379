"""Putting the kernels into a model that already exists, with a report of what was done, and taking them out again."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from accel import patch_seen
from accel.ops.fp8.recipe import FP8Recipe
from accel.patch_report import PatchReport, Row
from accel.patches import TABLE, Entry, class_path, fp8, linears, target_of, transformers_switch, transformers_unpad
from accel.patches.entry import LINEAR, covers, plain_class
from accel.patches.replacement import Replacement
from accel.patches.stand import Stand, stands_in, take_out

__all__ = ["PatchReport", "Replacement", "Row", "patch", "unpatch"]


def patch(
    model: nn.Module,
    *,
    ops: str | Iterable[str] | None = None,
    skip: str | type | Iterable[str | type] = (),
    recipe: str | Mapping[str, bool | FP8Recipe] | None = None,
    dry_run: bool = False,
    strict: bool = False,
    allow_none: bool = False,
    unpad: bool = False,
) -> PatchReport:
    """Let the kernels compute inside ``model``, in place, wherever they compute the same function.

    A patched module stays an instance of its class and keeps its parameters, buffers and ``state_dict``: one method is
    covered by an attribute of the instance. What the kernel would bypass is bypassed only while it is the plain class
    without hooks, adapters or parametrizations, at the time of patching and at every call; otherwise the class's own
    code runs, and so it does on a device and in a dtype where only the reference could compute. Copies and pickles of a
    patched model are patched too. A shallow copy of a patched module is as well, but must be called or patched once
    before torch.compile sees it. ``torch.nn.DataParallel`` is not supported. A function that a model's own code calls
    is not found here: :func:`accel.patch_functions` replaces it for the whole process.

    Patch first, and then wrap: what is put around a patched module (accelerate's hooks, adapters, FSDP) stays when the
    model is verified, and must be taken off before :func:`unpatch`. ``torch.jit.trace`` and ``torch.fx`` record the
    classes' own code, and ``torch.jit.script`` is refused.

    Models of transformers whose attention goes through its registry are switched to ``"accel"`` there, each attention
    module with a row of its own. While they are patched their configuration is a copy, so that another model with the
    same one is untouched. Mixtures of experts compute by :func:`accel.moe_experts`, and their routers by
    :func:`accel.moe_route` where that has their score.

    Args:
        model: any module; classes of torch.nn, torchvision, timm, transformers, diffusers, mmcv, mmpose,
            flash-pytorch, modelscope and clearvoice are known.
        ops: take the replacements of these ops and no others, also such as change numerics by design. None takes all
            that compute the same function.
        skip: modules to leave alone with all they contain: patterns of names (``"features.1*"``) or classes.
        recipe: ``"exact"``, which is what None means, or ops switched on (as if named in ``ops``) and off over it:
            ``{"window_attention": False}``. ``{"fp8_linear": accel.FP8Recipe(...)}`` also says how Linear layers
            compute in eight bits; output layers, routers and shared weights are left in full precision, and so is a
            Linear whose weight another replacement reads.
        dry_run: change nothing, report what would be done.
        strict: raise if a module of a known class cannot be replaced, before anything is changed.
        allow_none: return an empty report where nothing was replaced, instead of raising.
        unpad: also take the padding out of every batch that comes with an ``attention_mask``, before the first layer
            of a transformers encoder or decoder-only model, and put it back behind the last one: hidden states there
            are 0 where the mask is 0, and all that reads them (heads, losses) sees the padded batch. The first call of
            a kind tries the model on a few tokens and raises ``NotImplementedError`` where anything but attention mixes
            them. Calls that cannot be flattened, with a cache for instance, raise too. Padding on the left predicts the
            first token of its row, from 0 here and from what the model makes of padding otherwise: give it no label.

    Returns:
        A report; ``print`` it, before or after the model ran. ``with accel.patch(model) as report:`` undoes the
        patch at exit.

    Raises:
        ValueError: an unknown op or recipe, both ``ops`` and ``recipe``, nothing to replace, or ``strict`` and a
            module that had to be skipped. The message lists what was found: attention that no op computes, too.
        NotImplementedError: ``unpad``, and the model cannot run on flattened batches.
    """
    wanted = _wanted(ops, recipe)
    plan = _plan(model, wanted, (skip,) if isinstance(skip, str | type) else tuple(skip))
    if unpad:
        plan.add_unpadding(model)
    put_in = [] if dry_run else [(name, stand) for name, stand, _ in plan.taken]
    report = PatchReport(model, plan.rows, put_in, patch_seen.unserved(model, plan.left_out) if wanted.registry else ())
    refused = [row for row in report.skipped if row.reason != _LEFT_OUT]
    if strict and refused:
        raise ValueError("strict: modules that had to be skipped\n" + _listing(refused))
    if not report.replaced and not dry_run and not allow_none:
        raise ValueError(_nothing(model, wanted, report))
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

    Raises:
        RuntimeError: something has been put around a patched method since, such as a hook of accelerate, and would go
            on calling it: take that off first. Everything else is undone.
    """
    return take_out((name, stand) for name, module in model.named_modules() for stand in list(stands_in(module)))


_LEFT_OUT = "named in skip"


def _wanted(ops: str | Iterable[str] | None, recipe: str | Mapping[str, bool | FP8Recipe] | None) -> _Wanted:
    """The part of the table that the caller asks for."""
    known = sorted({e.op for e in TABLE.values()} | {transformers_switch.OP})
    if ops is not None and recipe is not None:
        raise ValueError(f"give ops or recipe, not both: {ops=}, {recipe=}")
    if isinstance(recipe, str) and recipe != "exact":
        raise ValueError(f"unknown recipe {recipe!r}: it is 'exact' or a mapping of ops to True or False")
    switches: dict[str, bool | FP8Recipe] = {}
    if ops is not None:
        ops = (ops,) if isinstance(ops, str) else tuple(ops)
        switches = {**dict.fromkeys(known, False), **dict.fromkeys(ops, True)}
    elif isinstance(recipe, Mapping):
        switches = dict(recipe)
    for op, value in switches.items():
        if op not in known:
            raise ValueError(f"no replacement uses an op {op!r}; known: {', '.join(known)}")
        if not isinstance(value, bool) and not (op == fp8.OP and isinstance(value, FP8Recipe)):
            raise TypeError(f"a recipe says True or False of an op, and an FP8Recipe of {fp8.OP}, got {op}={value!r}")
    table = {t: e for t, e in TABLE.items() if switches.get(e.op, e.same_function)}
    eight_bits = switches.get(fp8.OP)
    how = {fp8.OP: {"recipe": eight_bits}} if isinstance(eight_bits, FP8Recipe) else {}
    return _Wanted(table, bool(switches.get(transformers_switch.OP, True)), how)


@dataclasses.dataclass
class _Wanted:
    table: dict[str, Entry]
    registry: bool
    """Whether attention that goes through transformers' registry is switched."""
    how: Mapping[str, Mapping[str, Any]]
    """What an op is told beside the arguments of its calls."""


@dataclasses.dataclass
class _Plan:
    rows: list[Row] = dataclasses.field(default_factory=list)
    taken: list[tuple[str, Stand, Row | None]] = dataclasses.field(default_factory=list)
    """Every piece to put in, with its module's name and its row, if it has one."""
    left_out: set[str] = dataclasses.field(default_factory=set)
    """Names of the modules that are to be left alone."""
    kept: dict[str, str] = dataclasses.field(default_factory=dict)
    """Names of Linear layers that keep their numbers, with the reason."""

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
    left_out = plan.left_out
    owned: set[str] = set()  # what stands below a module of the table is that module's business
    attention = {}
    if fp8.OP in {entry.op for entry in wanted.table.values()}:
        plan.kept = linears.left_alone(model)
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if (name and parent in left_out) or named_in(name, module, skip):
            left_out.add(name)
        below = name and parent in owned
        if below and isinstance(module, nn.Linear):
            plan.kept.setdefault(
                name, f"its weight may be read by {parent or 'the model'}, which is replaced as a whole"
            )
        if below or any(class_path(c) in wanted.table for c in type(module).__mro__):
            owned.add(name)
        if wanted.registry and not below and transformers_switch.goes_through_the_registry(module):
            reason = _LEFT_OUT if name in left_out else transformers_switch.why_not(module) or ""
            attention[name] = Row(name, type(module).__name__, transformers_switch.OP, "skipped", reason)
            plan.rows.append(attention[name])
            _note_present(attention[name], module, transformers_switch.Attention)
        _plan_entry(plan, wanted, name, module, name in left_out)
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


def _plan_entry(plan: _Plan, wanted: _Wanted, name: str, module: nn.Module, left_out: bool) -> None:
    cls, target, table = plain_class(type(module)), target_of(module), wanted.table
    entry = table.get(target)
    if entry is None and target in TABLE and target != class_path(cls):
        return  # a kind whose op is not asked for
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
        kept = plan.kept.get(name) if entry.target == LINEAR else None
        how = wanted.how.get(entry.op)
        plan.add(row, kept or _why_not_replace(module, entry), lambda: Replacement(module, entry.target, how))


def _why_not_replace(module: nn.Module, entry: Entry) -> str | None:
    present = covers(module, entry.attribute)
    if present is not None and not isinstance(present, Replacement):
        return f"its {entry.attribute} has been replaced by {type(present).__name__}: patch before that is done"
    if not hasattr(type(module), entry.attribute):
        return f"the class has no {entry.attribute}: not the version of the library that is known here"
    return entry.why_not(module)


def named_in(name: str, module: nn.Module, skip: tuple[str | type, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, s) if isinstance(s, str) else isinstance(module, s) for s in skip)


def _listing(rows: list[Row]) -> str:
    return "\n".join(f"  {row.name or '(the model)'} ({row.old_class}): {row.reason}" for row in rows)


def _nothing(model: nn.Module, wanted: _Wanted, report: PatchReport) -> str:
    text = f"nothing to replace in {type(model).__name__}"
    if report.skipped:
        unserved = [f"\n  {sentence}" for sentence in report.unserved]
        return f"{text}; modules that had to be skipped\n" + _listing(report.skipped) + "".join(unserved)
    if not wanted.table and not wanted.registry:
        return f"{text}: no op is switched on"
    return f"{text}: {patch_seen.nothing_to_replace(model, wanted.table, wanted.registry)}"
