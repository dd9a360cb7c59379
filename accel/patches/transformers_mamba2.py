"""transformers: the scans of Mamba-2, two functions of which six model families hold a copy each.

Read as linear attention, q is C, k is B, v is dt·x, log_decay is A·dt, and the state is the transpose of the op's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel import library
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


# --- one token ---


def _why_not_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor | None = None,
    **given: Any,
) -> str | None:
    if state.dtype != torch.float32:
        return f"its state is {state.dtype}, and that of the op is torch.float32"
    tensors = [state, hidden_states, dt, A, B, dt_bias, *given.values()]
    if library.requires_gradient(tensors):
        return "a gradient is asked for, and the op has none"
    if hidden_states.dim() != 3 or state.numel() == 0 or B.shape[1] == 0 or state.shape[1] % B.shape[1]:
        return f"there is nothing to divide: {tuple(state.shape)}, {tuple(hidden_states.shape)}, {tuple(B.shape)}"
    alike = A.dim() == 3 and dt.dim() == 3 and _same_along(A, 1) and _same_along(A, 2) and _same_along(dt, 2)
    if not alike or (dt_bias is not None and (dt_bias.dim() != 2 or not _same_along(dt_bias, 1))):
        return "its A, dt and dt_bias are not expanded from a number a head"
    return _why_not_packed(given)


def _same_along(x: Tensor, axis: int) -> bool:
    return x.stride(axis) == 0 or x.shape[axis] == 1


def _update(
    attend: Callable[..., Any],
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **given: Any,  # which the function takes and does not read
) -> Tensor:
    dt = _step_size(dt[..., :1], None if dt_bias is None else dt_bias[:, :1], dt_softplus).float()
    x = hidden_states.float()
    q, k, v = [token.unsqueeze(2) for token in (C.float(), B.float(), x * dt)]
    how: dict[str, Any] = {"feature_map": "identity", "normalize": False, "log_decay": A[:, :1, 0].float() * dt}
    out = attend(q, k, v, (state.transpose(-1, -2), None), **how).squeeze(2)
    if D is not None:
        out = out + x * D
    out = out.to(C.dtype)
    if z is not None:
        out = out * F.silu(z)
    return out.to(hidden_states.dtype)  # type: ignore[no-any-return]


def _functions(family: str) -> tuple[Function, ...]:
    home = f"transformers.models.{family}.modeling_{family}"
    return (
        Function(
            f"{home}.mamba2_chunk_scan", "linear_attention", _scan, _why_not_scan, _why_not, computes_in=torch.float32
        ),
        Function(
            f"{home}.mamba2_selective_state_update", "linear_attention_step", _update, _why_not_update, _why_not,
            computes_in=torch.float32,
        ),
    )  # fmt: skip


FUNCTIONS = tuple([function for family in FAMILIES for function in _functions(family)])
