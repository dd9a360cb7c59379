"""The results of experts brought back to their tokens: a weighted sum over each token's choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library
from accel.backends import KERNEL_DTYPES, check_beside, check_floating, inner_dtype
from accel.ops.moe.plan import Plan


class Args(NamedTuple):
    """The checked arguments every backend receives."""

    y: Tensor  # (N, C) contiguous
    weights: Tensor | None  # (T, K) contiguous fp32 (fp64 beside fp64); 1 where there are none
    source: Tensor  # (N,) int64 contiguous
    destination: Tensor  # (T, K) int64 contiguous


# --- the definition ---


def reference(y: Tensor, weights: Tensor | None, source: Tensor, destination: Tensor) -> Tensor:
    """The op in plain torch, fp32 or fp64 inside."""
    rows, dtype = y.to(inner_dtype(y)), y.dtype
    if rows.shape[0] == 0:  # nothing came back
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
    there = ((destination >= 0) & (destination < y.shape[0]))[..., None]
    picked = torch.where(there, rows[torch.where(there[..., 0], destination, 0)], 0.0)  # (T, K, C)
    if weights is not None:
        picked = torch.where(there, picked * weights.to(rows.dtype)[..., None], 0.0)
    return picked.sum(1).to(dtype)


# --- backends, fastest first for each device ---


_native = backends.native("moe_unpermute")
_triton = backends.triton(__name__)


# --- declaration ---


def _fake(args: Args) -> Tensor:
    return args.y.new_empty((args.destination.shape[0], args.y.shape[1]))


def _flops(args: Args) -> int:
    products: int = 2 * args.destination.shape[0] * args.destination.shape[1] * args.y.shape[1]
    return products


def _backward_flops(args: Args, made: Sequence[bool]) -> int:
    """Of the rows as many products as forward, half of that without a sum, and of the weights as many."""
    return _flops(args) // 2 + (_flops(args) if made[1] else 0)


# --- the public function ---


def _check_plan(plan: Any, y: Tensor) -> None:
    if not isinstance(plan, tuple) or len(plan) != len(Plan._fields):
        raise TypeError(f"plan must be what accel.moe_permute returns, got {type(plan).__name__}")
    for name, x, dims in (("source", plan[0], 1), ("destination", plan[1], 2)):
        if not isinstance(x, Tensor) or x.dtype != torch.int64:
            raise TypeError(f"plan.{name} must be int64, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.dim() != dims:
            raise ValueError(f"plan.{name} must have {dims} axes, got {tuple(x.shape)}")
        if x.device != y.device:
            raise ValueError(f"plan.{name} is on {x.device} but y is on {y.device}")
    if plan[0].shape[0] != y.shape[0]:
        raise ValueError(f"y must have the plan's {plan[0].shape[0]} rows, got {tuple(y.shape)}")


def _prepare(y: Tensor, plan: Plan, weights: Tensor | None = None) -> Args:
    """Check a public call and bring it to the form the backends take."""
    check_floating(y, "y")
    if y.dim() != 2:
        raise ValueError(f"y must be (N, C), got {tuple(y.shape)}")
    _check_plan(plan, y)
    source, destination = plan[0].contiguous(), plan[1].contiguous()
    if weights is not None:
        check_beside(weights, "weights", y, "y")
        if tuple(weights.shape) != tuple(destination.shape):
            raise ValueError(f"weights must be (T, K) = {tuple(destination.shape)}, got {tuple(weights.shape)}")
        weights = weights.to(inner_dtype(y)).contiguous()
    return Args(y.contiguous(), weights, source, destination)


_run = library.differentiable(
    "moe_unpermute",
    Args,
    reference,
    gradients=2,
    always=1,
    fake=_fake,
    flops=_flops,
    backward_flops=_backward_flops,
)


def moe_unpermute(y: Tensor, plan: Plan, weights: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    r"""What the experts made of the rows of :func:`accel.moe_permute`, summed for each token:

    .. math:: o_t = \sum_k w_{tk}\, y_{d(t, k)}

    with d the plan's ``destination``; a choice without a row adds nothing. The sum is made in float32 in the order of
    k, and rounded once. Rows of no choice, padding and the tail, are not read.

    Args:
        y: ``(N, C)``, a row for each of the plan's; float32, bfloat16, float16, and float64 on the reference. C need
            not be that of the tokens. Autocast casts nothing here.
        plan: as :func:`accel.moe_permute` returns it.
        weights: ``(T, K)``, any floating dtype, as :func:`accel.moe_route` gives them; None for 1.
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(T, C)`` in the dtype of ``y``.

    Gradients exist for ``y`` (zero where a row is of no choice) and ``weights`` (zero where a choice has no row),
    without atomics, so that they are the same bits every time. Second and forward-mode derivatives are the
    reference's; a kernel refuses them.

    Raises:
        TypeError: ``plan`` is none, or a tensor has a wrong dtype.
        ValueError: shapes or devices that do not fit; the message holds them. A destination that is no row of ``y``
            is no error: it counts as −1.
        NotImplementedError: ``backend`` cannot run this call; the message says why.
    """
    args = _prepare(y, plan, weights)
    out: Tensor = _run(args, backend)
    return out


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    source = torch.tensor([0, 5, 3, -1, 1, 2], device=device)
    destination = torch.tensor([[0, 4], [5, 2], [-1, 1]], device=device)
    counts = torch.tensor([2, 1, 2], device=device)
    plan = Plan(source, destination, counts, torch.tensor([0, 2, 4, 6], device=device))
    weights = torch.full((3, 2), 0.5, device=device)
    return (torch.zeros(6, 4, device=device, dtype=dtype), plan, weights), {}


OP = dispatch.register(
    dispatch.Op(
        name="moe_unpermute",
        function=moe_unpermute,
        prepare=_prepare,
        example=_example,
        backends=(
            dispatch.Backend("cpu", backends.why_not_cpu, *_native, frozenset({"cpu"}), KERNEL_DTYPES),
            dispatch.Backend("triton", *_triton, frozenset({"cuda"}), KERNEL_DTYPES),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
    )
)
