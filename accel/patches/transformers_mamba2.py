"""transformers: the scans of Mamba-2, two functions of which six model families hold a copy each.

Read as linear attention, q is C, k is B, v is dt·x, log_decay is A·dt, and the state is the transpose of the op's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.patches.entry import Function

FAMILIES = ("mamba2", "bamba", "zamba2", "falcon_h1", "nemotron_h", "granitemoehybrid")


def _why_not(function: Any) -> str | None:
    names = getattr(function, "__code__", _why_not.__code__).co_freevars
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if dict(zip(names, cells, strict=False)).get("is_new_implementation"):
        return "the kernel of mamba_ssm stands behind it"
    return None


def _why_not_packed(given: dict[str, Any]) -> str | None:
    name = next((name for name in ("seq_idx", "cu_seqlens") if given.get(name) is not None), None)
    return None if name is None else f"{name} is given, and without mamba_ssm the function refuses packed sequences"


def _step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    return F.softplus(dt) if dt_softplus else dt


# --- all tokens ---


def _why_not_scan(
    hidden_states: Tensor,
    A: Tensor,
    B: Tensor,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **given: Any,
) -> str | None:
    if given.get("z") is not None:
        return "z is given, which the function passes over"
    if hidden_states.dim() != 4 or A.shape != hidden_states.shape[2:3]:
        return f"its A is {tuple(A.shape)} beside {tuple(hidden_states.shape)}, not a number a head"
    if hidden_states.numel() == 0 or B.shape[2] == 0 or hidden_states.shape[2] % B.shape[2]:
        return f"there is nothing to divide: {tuple(hidden_states.shape)}, {tuple(B.shape)}"
    if dt_limit[0] < 0.0 or (A.device.type == "cpu" and not torch.compiler.is_compiling() and bool((A > 0.0).any())):
        return "its states may grow, which the op does not allow"
    return _why_not_packed(given)


def _scan(
    attend: Callable[..., Any],
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **given: Any,  # which the function takes and does not read
) -> Any:
    dt = _step_size(dt, dt_bias, dt_softplus).clamp(*dt_limit).float()
    x = hidden_states.float()
    q, k, v = [tokens.transpose(1, 2) for tokens in (C.float(), B.float(), x * dt[..., None])]
    decay = (A.float() * dt).transpose(1, 2)
    before = None if initial_states is None else (initial_states.to(x).transpose(-1, -2), None)
    how = {"feature_map": "identity", "causal": True, "normalize": False, "log_decay": decay, "initial_state": before}
    made = attend(q, k, v, return_state=return_final_states, **how)
    out = (made[0] if return_final_states else made).transpose(1, 2).float()
    if D is not None:
        out = out + D[..., None] * x
    out = out.contiguous()
    return (out, made[1][0].transpose(-1, -2).contiguous()) if return_final_states else out


def _functions(family: str) -> tuple[Function, ...]:
    home = f"transformers.models.{family}.modeling_{family}"
    return (
        Function(
            f"{home}.mamba2_chunk_scan", "linear_attention", _scan, _why_not_scan, _why_not, computes_in=torch.float32
        ),
    )


FUNCTIONS = tuple([function for family in FAMILIES for function in _functions(family)])
