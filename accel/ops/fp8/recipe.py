"""How a linear layer goes through eight bits: which numbers share a scale, and what is kept for the backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accel.ops.fp8 import formats

SCALINGS = ("block", "row", "tensor", "weight_only")
SAVES = ("fp8", "input")


@dataclass(frozen=True)
class FP8Recipe:
    """How :func:`accel.fp8_linear` quantises.

    Args:
        scaling: which numbers of an operand share a scale. ``"block"``, the recipe of DeepSeek-V3: 128 x 128 of the
            weight, 1 x 128 of everything else; ``"row"``: a row each, along which the product sums; ``"tensor"``: all;
            ``"weight_only"``: blocks of 128 x 128 of the weight, and everything else stays as it is.
        scale_format: ``"fp32"``, or powers of two, ``"pow2"`` and ``"e8m0"``, which differ where scales are stored.
        grad_dtype: of gradients, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``; x and weights are e4m3.
        save: what is kept of x for the gradient of a weight: ``"fp8"``, a byte an element, or ``"input"``, x itself,
            which is for free where something else keeps it. No bit of a result depends on it.
        cache_weight: :class:`accel.nn.FP8Linear` keeps the quantised weight until an optimizer has stepped: for
            several batches to a step, and for inference with a weight that is not stored in eight bits.
        size_rule: take plain products where those in eight bits are slower.

    Raises:
        TypeError: a flag that is not a bool.
        ValueError: a name or a dtype that is none of these; the message holds it.

    Follows DeepSeek-AI, DeepSeek-V3 (2024), §3.3.
    """

    scaling: str = "block"
    scale_format: str = "fp32"
    grad_dtype: torch.dtype = torch.float8_e4m3fn
    save: str = "fp8"
    cache_weight: bool = False
    size_rule: bool = True

    def __post_init__(self) -> None:
        for name, known in (("scaling", SCALINGS), ("scale_format", formats.SCALE_FORMATS), ("save", SAVES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r:.80}")
        if self.grad_dtype not in formats.NAMES:
            raise ValueError(f"grad_dtype must be one of {', '.join(map(str, formats.NAMES))}, got {self.grad_dtype}")
        for name in ("cache_weight", "size_rule"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r:.80}")


BLOCKS = {"block": (1, 128), "row": (1, 0), "tensor": (0, 0)}
"""Rows and columns to a scale of what a product sums along its rows, 0 for all."""

WEIGHT_BLOCKS = {**BLOCKS, "block": (128, 128), "weight_only": (128, 128)}
