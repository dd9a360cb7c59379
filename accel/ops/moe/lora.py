"""Experts with adapters of low rank: their products stand beside those of the frozen weights, which nothing is added
to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from accel import backends, library
from accel.backends import inner_dtype
from accel.ops.moe.activations import activate
from accel.ops.moe.grouped_linear import grouped_linear
from accel.ops.moe.moe_permute import moe_permute
from accel.ops.moe.moe_unpermute import moe_unpermute

Lora = tuple[Tensor, Tensor, float]
"""A (X, r, inputs), B (X, outputs, r), and the factor of their product."""


def check_lora(lora: Any, args: Any) -> tuple[Lora | None, Lora | None]:
    """The adapters of both projections, that they fit."""
    if not isinstance(lora, Sequence) or len(lora) != 2:
        raise TypeError(f"lora must be an adapter (A, B, scale) or None for each of the projections, got {lora!r:.80}")
    experts, channels = args.gate_up_proj.shape[0], args.x.shape[1]
    sizes = (("gate_up_proj", channels, args.hidden), ("down_proj", args.inner, channels))
    return tuple([  # type: ignore[return-value]
        _check_one(given, name, experts, inputs, outputs, args.x)
        for given, (name, inputs, outputs) in zip(lora, sizes, strict=True)
    ])  # fmt: skip


def _check_one(given: Any, name: str, experts: int, inputs: int, outputs: int, x: Tensor) -> Lora | None:
    if given is None:
        return None
    if not isinstance(given, Sequence) or len(given) != 3:
        raise TypeError(f"the adapter of {name} must be (A, B, scale), got {given!r:.80}")
    a, b, scale = given
    for w, letter in ((a, "A"), (b, "B")):
        backends.check_beside(w, f"{letter} of {name}", x, "x")
    if a.dim() != 3 or b.dim() != 3 or (a.shape[0], a.shape[2], b.shape[0], b.shape[1], b.shape[2]) != (
        experts, inputs, experts, outputs, a.shape[1]
    ):  # fmt: skip
        raise ValueError(
            f"A and B of {name} must be (X, r, {inputs}) and (X, {outputs}, r) with X = {experts}, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"the scale of {name} must be a finite number, got {scale!r:.80}")
    return a, b, float(scale)


def experts_with_lora(args: Any, lora: tuple[Lora | None, Lora | None], backend: str | None) -> Tensor:
    """Both layers of checked arguments, each the sum of its frozen product and its adapter's."""

    def layer(rows: Tensor, weight: Tensor, bias: Tensor | None, adapter: Lora | None) -> Tensor:
        out = grouped_linear(rows, weight, offsets, bias, transposed=args.transposed, backend=backend)
        if adapter is None:
            return out
        a, b, scale = adapter
        narrow = grouped_linear(rows, a.to(rows.dtype), offsets, backend=backend)
        beside = grouped_linear(narrow * scale, b.to(rows.dtype), offsets, backend=backend)
        return out.to(inner) + beside.to(inner)  # rounded once, behind the activation or the sum over choices

    inner = inner_dtype(args.x)
    with library.without_autocast(args.x):
        rows, plan = moe_permute(args.x, args.indices, args.gate_up_proj.shape[0])
        offsets = plan.offsets
        hidden = layer(rows, args.gate_up_proj, args.gate_up_bias, lora[0])
        made = activate(hidden.to(inner), args.activation, args.gated, args.interleaved).to(args.x.dtype)
        out = moe_unpermute(layer(made, args.down_proj, args.down_bias, lora[1]), plan, args.weights)
        return out.to(args.x.dtype)
