"""Linear layers in eight bits: torch's own, when that is asked for by name, and those of transformers' FP8 checkpoints,
whose classes compute on certain GPUs alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accel.ops.moe.groups import sort_choices
from accel.patches.entry import LINEAR, Entry, why_not_plain, why_not_version

OP = "fp8_linear"
MODULE = "transformers.integrations.finegrained_fp8"
FP8_LINEAR, FP8_EXPERTS = f"{MODULE}.FP8Linear", f"{MODULE}.FP8Experts"

# --- torch.nn.Linear ---


def _not_ours(module: Any) -> bool:
    """accel.nn.FP8Linear is a Linear that computes in eight bits by itself."""
    return not type(module).__module__.startswith("accel.")


def _why_not_linear(module: Any) -> str | None:
    if (reason := why_not_plain(module)) is not None:
        return reason
    if module.weight.dtype.itemsize == 1:
        return f"its weight is {module.weight.dtype} and has no scales here"
    return None


def _linear(module: Any, attend: Callable[..., Tensor], input: Tensor) -> Tensor:
    return attend(input, module.weight, module.bias)


# --- transformers' layers that hold codes and scales ---


def why_not_codes(module: Any, codes: Tensor, what: str) -> str | None:
    """Why a checkpoint's weight is of no kind that the op takes."""
    if module.activation_scheme != "dynamic":
        return f"its activations have static scales (activation_scheme={module.activation_scheme!r}), which no op takes"
    if codes.dtype != torch.float8_e4m3fn:
        packed = ", packed FP4" if codes.dtype == torch.int8 else ""
        return f"{what} is {codes.dtype}{packed}, not float8_e4m3fn"
    if module.block_size is not None and tuple(module.block_size) not in ((128, 128), (1, 128), (1, 32)):
        return f"its weight has scales for blocks of {tuple(module.block_size)}, which no product takes"
    return None


def _why_not_fp8_linear(module: Any) -> str | None:
    reason = why_not_version(module, "weight_scale_inv", "block_size", "activation_scheme")
    return reason or why_not_plain(module) or why_not_codes(module, module.weight, "its weight")


def _fp8_linear(module: Any, attend: Callable[..., Tensor], input: Tensor) -> Tensor:
    return attend(input, module.weight, module.bias, weight_scale=module.weight_scale_inv)


_EXPERTS = ("down_proj", "down_proj_scale_inv", "block_size", "activation_scheme", "has_gate", "act_fn", "_apply_gate")


def _why_not_fp8_experts(module: Any) -> str | None:
    if (reason := why_not_version(module, *_EXPERTS)) is not None:
        return reason
    for name in (_first(module), "down_proj"):
        if (reason := why_not_codes(module, getattr(module, name), name)) is not None:
            return reason
    return why_not_plain(module)


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _fp8_experts(
    module: Any, attend: Callable[..., Tensor], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """One expert after the other, each with its rows of all tokens; a choice of none, or of another rank, adds 0."""
    experts, choices = module.down_proj.shape[0], top_k_index.shape[1]
    order, offsets, _ = sort_choices(top_k_index, experts)
    rows = hidden_states[order // choices]
    edges = offsets.tolist()
    made = [
        _expert(module, attend, rows[edges[e] : edges[e + 1]], e) for e in range(experts) if edges[e] < edges[e + 1]
    ]
    used = edges[-1]
    weights = top_k_weights.flatten()[order[:used]].to(hidden_states.dtype)
    weighed = (torch.cat(made) if made else rows[:0]) * weights[:, None]
    # fp32, since a token's choices are summed in it
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    return out.index_add(0, order[:used] // choices, weighed.float()).to(hidden_states.dtype)


def _expert(module: Any, attend: Callable[..., Tensor], rows: Tensor, e: int) -> Tensor:
    first = _first(module)
    up = attend(rows, getattr(module, first)[e], None, weight_scale=getattr(module, f"{first}_scale_inv")[e])
    hidden = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    return attend(hidden, module.down_proj[e], None, weight_scale=module.down_proj_scale_inv[e])


ENTRIES = (
    Entry(LINEAR, "forward", _why_not_linear, _linear, op=OP, applies=_not_ours, same_function=False),
    # their own code needs a GPU and a kernel that is loaded from the net: here the reference serves, too
    Entry(FP8_LINEAR, "forward", _why_not_fp8_linear, _fp8_linear, op=OP, takes_tensor=False, same_function=False),
    Entry(FP8_EXPERTS, "forward", _why_not_fp8_experts, _fp8_experts, op=OP, takes_tensor=False, same_function=False),
)
