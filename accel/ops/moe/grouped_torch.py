"""The backend ``torch`` of both products of experts: torch's grouped product, where the processor has AMX.

Tokens are sorted and brought back by our own kernels, and the activation is plain torch between the two products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel import dispatch
from accel.ops.amx import WITHOUT, has_amx
from accel.ops.moe.activations import ExpertActivation, activate
from accel.ops.moe.moe_permute import moe_permute
from accel.ops.moe.moe_unpermute import moe_unpermute

LEAST_ROWS = 32
"""How many rows an expert has on average, at least. In bf16 on two cores of a Sapphire Rapids torch's products took a
third to a sixth of the time of ours for 512 tokens, of which 64 and more met each expert; for the few rows of a step of
decoding ours read the weights at the bandwidth of the memory. What is between was not measured."""


def _why_not(weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], rows: int) -> str | None:
    first = weights[0]
    if first.device.type != "cpu":
        return f"it is for CPUs, and the tensors are on {first.device.type}"
    if not has_amx():
        return WITHOUT
    if not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} has no _grouped_mm"
    if first.dtype != torch.bfloat16:
        return f"on a CPU it is for bfloat16, which torch multiplies in AMX, not {first.dtype}"
    if dispatch.deterministic():
        return "determinism is asked for, and the bits of torch's sums depend on the number of threads"
    if any([bias is not None for bias in biases]):
        return "torch's grouped product takes no bias"
    if any([size % 8 for w in weights for size in w.shape[1:]]):
        return f"torch's grouped product takes sizes that 8 divides, not {[tuple(w.shape[1:]) for w in weights]}"
    if rows < LEAST_ROWS * first.shape[0]:
        return f"it is for {LEAST_ROWS} rows an expert and more, and here are {rows} for {first.shape[0]}"
    return None


def _product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows of each group times ``weight`` (X, K, O); 0 behind the last offset, where torch leaves what was there."""
    out: Tensor = torch._grouped_mm(rows, weight, offs=offsets[1:].to(torch.int32))
    out[int(offsets[-1]) :].zero_()
    return out


def _outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """``(X, A, B)`` of rows ``(N, A)`` and ``(N, B)``: the sum over each group's rows of their products."""
    return torch._grouped_mm(left.t(), right, offs=offsets[1:].to(torch.int32))


def _turned(weight: Tensor, turn: bool) -> Tensor:
    return weight.transpose(1, 2) if turn else weight


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float32)


# --- grouped_linear ---


def why_not_linear(args: Any) -> str | None:
    return _why_not((args.weight,), (args.bias,), args.x.shape[0])


def linear_forward(x: Tensor, weight: Tensor, bias: None, offsets: Tensor, transposed: bool) -> Tensor:
    return _product(x, _turned(weight, not transposed), offsets)


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: None, offsets: Tensor, transposed: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = _product(grad, _turned(weight, transposed), offsets) if needs[0] else _nothing(x)
    left, right = (x, grad) if transposed else (grad, x)
    return grad_x, _outer(left, right, offsets) if needs[1] else _nothing(x), _nothing(x)


# --- moe_experts; ``args`` are those of that op ---


def why_not_experts(args: Any) -> str | None:
    weights, biases = (args.gate_up_proj, args.down_proj), (args.gate_up_bias, args.down_bias)
    return _why_not(weights, biases, args.indices.numel())


def _activated(hidden: Tensor, args: Any) -> Tensor:
    if args.activation == ExpertActivation("silu") and args.gated and not args.interleaved:
        gate, up = hidden.chunk(2, -1)
        return F.silu(gate) * up  # in fp32 inside
    return activate(hidden.float(), args.activation, args.gated, args.interleaved).to(hidden.dtype)


def experts_forward(args: Any) -> tuple[Tensor, Tensor]:
    """The output and, where a backward will want it, the first product."""
    rows, plan = moe_permute(args.x, args.indices, args.gate_up_proj.shape[0])
    hidden = _product(rows, _turned(args.gate_up_proj, not args.transposed), plan.offsets)
    made = _product(_activated(hidden, args), _turned(args.down_proj, not args.transposed), plan.offsets)
    return moe_unpermute(made, plan, args.weights), hidden if args.keep else args.x.new_empty(0)


def experts_backward(grad: Tensor, hidden: Tensor, args: Any, needs: list[bool]) -> tuple[Tensor, ...]:
    x, experts = args.x, args.gate_up_proj.shape[0]
    into_rows, plan = moe_permute(grad, args.indices, experts)
    offsets, found = plan.offsets, [_nothing(x)] * 6
    there = plan.source >= 0
    weights = torch.where(there, args.weights.flatten()[plan.source.clamp_min(0)], 0.0)[:, None]
    behind = None
    if needs[0] or needs[1] or needs[2]:
        behind = _product(into_rows, _turned(args.down_proj, args.transposed), offsets).float()
    with torch.enable_grad():
        inside = hidden.float().requires_grad_()
        made = activate(inside, args.activation, args.gated, args.interleaved)
    if needs[1] and behind is not None:
        each = args.weights.new_zeros(args.weights.numel())
        found[1] = each.index_add_(0, plan.source[there], (made.detach() * behind).sum(-1)[there]).view_as(args.weights)
    if (needs[0] or needs[2]) and behind is not None:
        (through,) = torch.autograd.grad(made, inside, behind * weights)
        through = through.to(x.dtype)
        if needs[0]:
            into = _product(through, _turned(args.gate_up_proj, args.transposed), offsets)
            found[0] = moe_unpermute(into, plan)
        if needs[2]:
            rows = moe_permute(x, args.indices, experts)[0]
            found[2] = _outer(*((rows, through) if args.transposed else (through, rows)), offsets)
    if needs[3]:
        weighed = (made.detach() * weights).to(x.dtype)
        found[3] = _outer(*((weighed, into_rows) if args.transposed else (into_rows, weighed)), offsets)
    return tuple(found)
