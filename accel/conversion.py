"""Whole models in eight bits: their linear layers as :class:`accel.nn.FP8Linear`, and back to parameters to train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from accel.nn.fp8 import FP8Linear
from accel.ops.fp8.recipe import FP8Recipe
from accel.patch import named_in
from accel.patches.entry import LINEAR, class_path, why_not_plain
from accel.patches.fp8 import FP8_EXPERTS, FP8_LINEAR, why_not_codes
from accel.patches.linears import left_alone
from accel.patches.replacement import Replacement
from accel.patches.stand import stands_in

STORAGES = ("fp8", "master")


@dataclass
class Conversion:
    """What :func:`accel.fp8_convert` did; prints as a table."""

    converted: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    """Why a linear layer was left as it is, by its name."""
    bytes_before: int = 0
    """Of the parameters and buffers of the layers that were converted."""
    bytes_after: int = 0

    def __str__(self) -> str:
        mega = [f"{size / 2**20:.1f} MiB" for size in (self.bytes_before, self.bytes_after)]
        lines = [f"{len(self.converted)} linear layers converted, {mega[0]} before, {mega[1]} after"]
        return "\n".join([*lines, *[f"  {name or '(the model)'}: {reason}" for name, reason in self.left.items()]])


def fp8_convert(
    model: nn.Module,
    storage: str = "fp8",
    *,
    dtype: torch.dtype | None = None,
    skip: str | type | Iterable[str | type] = (),
    recipe: FP8Recipe | None = None,
) -> Conversion:
    """Make the linear layers of ``model`` :class:`accel.nn.FP8Linear`, in place and one after the other, so that not
    more than one layer is held twice.

    ``"fp8"`` keeps codes and scales, half the bytes of bfloat16, under the names that DeepSeek's checkpoints have,
    ``weight`` and ``weight_scale_inv``; inputs and biases get gradients, weights none. ``"master"`` keeps a parameter
    to train, and computes in eight bits all the same: an optimizer steps it, which it cannot do with codes. To
    fine-tune an FP8 checkpoint load it (:func:`accel.fp8_checkpoints`), convert to ``"master"``, train, convert back
    and save; what was not trained comes back to the same bits.

    Plain ``torch.nn.Linear``, :class:`accel.nn.FP8Linear` and ``FP8Linear`` of transformers are converted. Output
    layers, routers, shared weights, subclasses and layers with hooks are left as they are, each with its reason in the
    report. Make the optimizer afterwards: what comes from codes is a new parameter.

    Args:
        model: any module that holds linear layers. Where it is one itself it cannot be converted in place:
            :meth:`accel.nn.FP8Linear.from_linear` converts one.
        storage: ``"fp8"`` or ``"master"``.
        dtype: of the weights to train; if None that of a plain layer's own, and float32 of what comes from codes. For
            ``"master"`` alone.
        skip: layers to leave alone with all they contain: patterns of names (``"model.layers.0.*"``) or classes.
        recipe: how the layers compute, :class:`accel.FP8Recipe`; None for that of DeepSeek-V3, and for a layer that has
            one its own.

    Returns:
        The names of the layers converted, those left with the reason, and the bytes before and after; ``print`` it.

    Raises:
        ValueError: an unknown storage, a dtype that belongs to the other one, or nothing to convert.
        TypeError: ``dtype`` is no floating dtype of 16 bits or more.
    """
    _check(storage, dtype)
    skip = (skip,) if isinstance(skip, str | type) else tuple(skip)
    report, kept = Conversion(), left_alone(model)
    made: dict[int, nn.Module] = {}  # of a layer that stands in several places
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.Linear) and class_path(type(module)) != FP8_EXPERTS:
            continue
        reason = "named in skip" if _skipped(model, name, skip) else _why_not(module, name, kept)
        if reason is not None:
            report.left[name] = reason
            continue
        if id(module) not in made:
            report.bytes_before += _bytes(module)
            made[id(module)] = _converted(module, storage, dtype, recipe)
            report.bytes_after += _bytes(made[id(module)])
        model.set_submodule(name, made[id(module)])
        report.converted.append(name)
    if not report.converted:
        raise ValueError(f"nothing to convert in {type(model).__name__}\n{report}")
    return report


def _check(storage: str, dtype: torch.dtype | None) -> None:
    if storage not in STORAGES:
        raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r:.80}")
    if dtype is None:
        return
    if storage != "master":
        raise ValueError(f"codes have no other dtype: dtype={dtype} belongs to storage='master'")
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"parameters to train are float32, bfloat16 or float16, got {dtype=}")


def _skipped(model: nn.Module, name: str, skip: tuple[str | type, ...]) -> bool:
    """Whether the layer, or a module around it, is named."""
    parts = name.split(".")
    around = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(named_in(one, model.get_submodule(one), skip) for one in around)


def _why_not(module: Any, name: str, kept: dict[str, str]) -> str | None:
    path = class_path(type(module))
    if not name:
        return "it is the model itself: accel.nn.FP8Linear.from_linear makes another of it"
    if path == FP8_EXPERTS:
        return "experts in FP8 stay as they are: products of groups in eight bits are not there yet"
    if path == LINEAR and name in kept:
        return kept[name]
    if path not in (LINEAR, FP8_LINEAR, class_path(FP8Linear)):
        return f"it is a {path}, which may compute something else"
    if next(stands_in(module), None) is not None and path != FP8_LINEAR:
        return "it is patched: call accel.unpatch first"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it carries hooks, which would be lost"
    return why_not_plain(module) or (why_not_codes(module, module.weight, "its weight") if path == FP8_LINEAR else None)


def _converted(module: Any, storage: str, dtype: torch.dtype | None, recipe: FP8Recipe | None) -> nn.Module:
    made = FP8Linear.from_linear(module, recipe=recipe or _recipe_of(module), storage=storage)
    if dtype is not None:
        made.weight = nn.Parameter(made.weight.detach().to(dtype))
    return made


def _recipe_of(module: Any) -> FP8Recipe | None:
    """That of a layer of ours, or of what serves one of transformers'."""
    if isinstance(module, FP8Linear):
        return module.recipe
    served = next((stand for stand in stands_in(module) if isinstance(stand, Replacement)), None)
    found: FP8Recipe | None = None if served is None else served.how.get("recipe")
    return found


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
