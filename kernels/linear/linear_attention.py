"""Linear attention in Triton: one sum over columns, with different tensors, is the output and each gradient.

``arguments.py`` says which; ``sweep.py`` computes it, ``states.py`` what surrounds it, ``sums.py`` and ``plans.py`` put
their launches in order. Where heads, sequences and tiles of channels are too few to fill a GPU, sequences are cut into
parts: the state of each, then those before each, then the rows. Nothing of size T × T is stored, and states only where
there are parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.backends import why_not_gpu
from accel.kernels import _launch
from accel.kernels.linear.arguments import LARGEST
from accel.kernels.linear.cases import compile_cases as compile_cases
from accel.kernels.linear.plans import backward_plan, decay_gradient, forward_plan, over_groups
from accel.kernels.linear.sums import Sum, call_of, kind_of_decay
from accel.ops.layout import empty_like_layout
from accel.ops.linear.linear_attention import Args


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtype is judged by the op.

    ``torch.compile`` traces through this, which bars generator expressions and Triton's helpers.
    """
    reason = why_not_gpu(args.q, _launch.INTERPRETING)
    if reason is not None:
        return reason
    features, values = args.q.shape[3], args.v.shape[3]
    largest = LARGEST.get(args.q.dtype, 0)
    if largest and max(features, values) > largest:
        return f"it takes up to {largest} features and values a head in {args.q.dtype}, not {features} and {values}"
    heads = max(args.q.shape[1], args.k.shape[1], args.v.shape[1])
    sequences = args.q.shape[0] if args.cu_q is None else args.cu_q.shape[0] - 1
    tokens = max(args.q.shape[2], args.k.shape[2])
    if sequences * heads * 16 * -(-tokens // 16) >= 2**31:
        return f"{sequences} sequences of {tokens} tokens with {heads} heads are more than one launch can number"
    return None


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, state and denominators; arguments are the fields of ``accel.ops.linear.linear_attention.Args``."""
    given = Args(*args)
    d, e = given.q.shape[3], given.v.shape[3]
    with _launch.device_of(given.q):
        out, plan = forward_plan(given, _launch.capability(given.q))
        if plan.den is not None and given.cu_q is not None:
            plan.den.zero_()
        for step in plan.launches:
            step.run()
        kv, k_sum, den = (out.new_empty(0, dtype=torch.float32) for _ in range(3))
        if given.return_state:
            assert plan.final is not None
            kv = plan.final[..., : d * e].unflatten(-1, (d, e)).contiguous()
            if given.normalize:
                k_sum = plan.final[..., d * e :].contiguous()
    return out.to(given.q.dtype), kv, k_sum, den if plan.den is None else plan.den


def backward(
    grad_out: Tensor | None,
    grad_kv: Tensor | None,
    grad_k_sum: Tensor | None,
    out: Tensor,
    den: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and, where needed, of decay, kv and k_sum (fp32, else empty)."""
    *fields, needs = rest
    args = Args(*fields)
    q, state_heads, d, e = args.q, args.state_heads, args.q.shape[3], args.v.shape[3]
    if not args.return_state:  # compiled code sends gradients of empty states
        grad_kv = grad_k_sum = None
    with _launch.device_of(q):
        plan = backward_plan(grad_out, grad_kv, grad_k_sum, out, den, args, needs, _launch.capability(q))
        for step in plan.launches:
            step.run()
        grads = [_in_layout_of(x, grad) for x, grad in zip((args.q, args.k, args.v), plan.grads, strict=True)]
        decay, kv, k_sum = (out.new_empty(0, dtype=torch.float32) for _ in range(3))
        if args.decay is not None and needs[0]:
            decay, step = decay_gradient(plan, args, call_of(args).cu_q)
            step.run()
            if kind_of_decay(args) == "head":
                decay = decay.double().sum((0, 2))[None, :, None].float()
        if args.kv is not None and needs[1]:
            kv = over_groups(_final_of(plan.sums[2])[..., : d * e].unflatten(-1, (d, e)), state_heads).contiguous()
        if args.k_sum is not None and needs[2]:
            k_sum = over_groups(_final_of(plan.sums[1])[..., d * e :], state_heads).contiguous()
    return *grads, decay, kv, k_sum


def _final_of(made: Sum) -> Tensor:
    assert made.final is not None
    return made.final


def _in_layout_of(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of ``x``, of each head or already of those of ``x``, in its dtype and in the layout of results."""
    if grad.shape == x.shape:
        return grad.to(x.dtype)
    return empty_like_layout(x, tuple(x.shape)).copy_(over_groups(grad, x.shape[1]))
