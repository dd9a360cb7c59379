"""What was done to a model, module by module, as a table; the proof that it computes the same; and the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from accel.patches.stand import Stand, replaced_again, stands_in, take_out

__all__ = ["PatchReport", "Row", "table", "uncalled"]


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

    @property
    def kept(self) -> str | None:
        """Why the module keeps its own code on the device and in the dtype that its parameters have now: only the
        reference could compute it there. None where a kernel can."""
        return self.replacement.kept() if self.replacement is not None else None


class PatchReport:
    """What :func:`accel.patch` did, module by module; prints as a table, and shows backends and calls once the model
    ran.

    As a context manager it takes back at exit what its own call put in.
    """

    def __init__(
        self, model: nn.Module, rows: list[Row], put_in: list[tuple[str, Stand]], unserved: Sequence[str] = ()
    ) -> None:
        self.model = model
        self.rows = rows
        self.unserved = list(unserved)
        """A sentence for each class of attention that is known and that no kernel computes."""
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

        What was put around a patched module since, such as accelerate's hooks, stays there and runs both times.

        Returns:
            The largest absolute difference between the two outputs, over every tensor in them; infinity where one
            is NaN and the other is not.

        Raises:
            ValueError: nothing is patched (any more), or the outputs differ in structure or hold no tensor.
            RuntimeError: something has taken the place of a replacement that can only be taken out.
        """
        if not any(row.active or (row.replacement is not None and row.replacement.covered) for row in self.rows):
            raise ValueError(f"nothing is patched in {type(self.model).__name__}, so there is nothing to verify")
        training = {m: m.training for m in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad():
                with self._without():
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
    def _without(self) -> Iterator[None]:
        """The whole model without patches: what prepares a call and what serves it belong together."""
        named = [(name, stand) for name, module in self.model.named_modules() for stand in stands_in(module)]
        covered = [(name, stand) for name, stand in named if stand.covered]
        fixed = [f"{name}.{stand.attribute}".removeprefix(".") for name, stand in covered if not stand.steps_aside]
        if fixed:
            raise replaced_again(fixed)
        out = [stand for _, stand in named if stand.in_place]
        for stand in out:
            stand.remove(for_good=False)
        for _, stand in covered:
            stand.aside = True
        try:
            yield
        finally:
            for stand in out:
                stand.put()
            for _, stand in covered:
                stand.aside = False

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(self, *exception: Any) -> None:
        take_out(self._put_in)

    def __str__(self) -> str:
        lines = [table(type(self.model).__name__, ("module", "class"), self.rows)]
        return "\n".join(lines + [f"not served: {sentence}" for sentence in self.unserved])


_STATUSES = ("replaced", "already patched", "would be replaced", "skipped")


def uncalled(rows: list[Row]) -> list[str]:
    return [r.name for r in rows if r.replacement is not None and not r.calls and not r.replacement.compiled]


def table(title: str, names: tuple[str, str], rows: list[Row]) -> str:
    """The rows of a report as text; ``names`` head the first two columns."""
    counts = {status: sum(row.status == status for row in rows) for status in _STATUSES}
    head = f"{title}: " + ", ".join(f"{n} {s}" for s, n in counts.items() if n)
    lines = [(*names, "op", "backend", "calls", "note")]
    for row in rows:
        calls = str(row.calls) if row.replacement is not None else "-"
        name = row.name or "(the model)"
        lines.append((name, row.old_class, row.op, row.backend or "-", calls, "; ".join(_notes(row))))
    widths = [max(len(line[i]) for line in lines) for i in range(5)] + [0]
    texts = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([head, *texts])


def _notes(row: Row) -> list[str]:
    notes = [] if row.status == "replaced" else [row.status + (f": {row.reason}" if row.reason else "")]
    notes += [f"{n} calls not served: {reason}" for reason, n in row.fallbacks.items()]
    if row.kept is not None and row.kept not in row.fallbacks:
        notes.append(f"keeps its own code: {row.kept}")
    if row.replacement is not None and row.replacement.compiled:
        notes.append("compiled")
    return notes


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
