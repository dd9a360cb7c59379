"""What stands between an expert's two products: names as transformers has them, or a description of four numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _silu(x: Tensor, alpha: float) -> Tensor:
    return x * torch.sigmoid(alpha * x)  # F.silu has another gradient, in the last bit, where a second is wanted


FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "silu": _silu,
    "gelu": lambda x, alpha: F.gelu(x),
    "gelu_tanh": lambda x, alpha: F.gelu(x, approximate="tanh"),
    "relu": lambda x, alpha: x.relu(),
    "relu2": lambda x, alpha: x.relu().square(),
}
"""The functions that every backend knows; C++ counts them in this order."""


@dataclasses.dataclass(frozen=True)
class ExpertActivation:
    r"""The activation of an expert: :math:`a = f(\min(g, l)) · (\mathrm{clamp}(u, -l, l) + s)` of gate g and up u.

    Without a gate it is :math:`a = f(h)`, and ``limit`` and ``shift`` have no place.

    Args:
        function: "silu", "gelu" (by the error function), "gelu_tanh", "relu" or "relu2" (its square).
        alpha: of silu, f(x) = x · sigmoid(alpha · x); 1.702 is the quick GELU.
        limit: l, at least 0; None for none.
        shift: s.

    GPT-OSS has ``ExpertActivation("silu", alpha=1.702, limit=7.0, shift=1.0)``.

    Raises:
        ValueError: an unknown function, numbers that are not finite, a negative limit, or an alpha beside another
            function.
    """

    function: str = "silu"
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise ValueError(f"function must be one of {', '.join(FUNCTIONS)}, got {self.function!r}")
        if not math.isfinite(self.alpha) or (self.alpha != 1.0 and self.function != "silu"):
            raise ValueError(f"alpha must be finite, and 1 beside any function but silu, got {self}")
        if not math.isfinite(self.shift):
            raise ValueError(f"shift must be finite, got {self}")
        if self.limit is not None and not 0.0 <= self.limit < math.inf:
            raise ValueError(f"limit must be None or at least 0 and finite, got {self}")


NAMES: dict[str, ExpertActivation] = {
    **{name: ExpertActivation(name) for name in FUNCTIONS},
    "swish": ExpertActivation("silu"),
    "gelu_pytorch_tanh": ExpertActivation("gelu_tanh"),
    "gelu_new": ExpertActivation("gelu_tanh"),
    "squared_relu": ExpertActivation("relu2"),
    "quick_gelu": ExpertActivation("silu", alpha=1.702),
}
"""What may be asked for by name."""


def check_activation(activation: Any, gated: bool) -> ExpertActivation:
    found = NAMES.get(activation) if isinstance(activation, str) else activation
    if found is None:
        raise ValueError(f"activation must be an ExpertActivation or one of {', '.join(NAMES)}, got {activation!r}")
    if not isinstance(found, ExpertActivation):
        raise TypeError(f"activation must be a name or an ExpertActivation, got {type(activation).__name__}")
    if not gated and (found.limit is not None or found.shift != 0.0):
        raise ValueError(f"limit and shift are of the gate, which gated=False leaves out, got {found}")
    return found


def activate(h: Tensor, activation: ExpertActivation, gated: bool, interleaved: bool) -> Tensor:
    """The definition, of ``(..., 2I)`` with the gate first or in the even places, or of ``(..., I)`` without a gate."""
    f = FUNCTIONS[activation.function]
    if not gated:
        return f(h, activation.alpha)
    gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return f(gate, activation.alpha) * (up + activation.shift)
