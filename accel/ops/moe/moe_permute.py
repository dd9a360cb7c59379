"""Tokens sorted by expert, so that each expert of a mixture finds its own in one block of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library
from accel.backends import KERNEL_DTYPES, check_floating, inner_dtype
from accel.ops.moe import plan
from accel.ops.moe.plan import Plan


class Args(NamedTuple):
    """The checked arguments every backend receives: the tokens, and those of their plan."""

    x: Tensor  # (T, C) contiguous
    indices: Tensor
    weights: Tensor | None
    num_experts: int
    capacity: int
    align: int
    rows: int


# --- the definition ---


def reference(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op in plain torch, fp32 or fp64 inside: the rows and the four tensors of the plan."""
    args = Args(*given)
    made = plan.make(*args[1:])
    x = args.x.to(inner_dtype(args.x))  # in which the rows of a token are summed backward
    rows = torch.where((made.source >= 0)[:, None], x[made.source.clamp_min(0) // args.indices.shape[1]], 0.0)
    return rows.to(args.x.dtype), *made


# --- backends, fastest first for each device ---


_native = backends.native("moe_permute")
_triton = backends.triton(__name__)


# --- declaration ---


def _fake(args: Args) -> tuple[Tensor, ...]:
    integers = [(args.rows,), tuple(args.indices.shape), (args.num_experts,), (args.num_experts + 1,)]
    rows = args.x.new_empty((args.rows, args.x.shape[1]))
    return rows, *[args.indices.new_empty(shape) for shape in integers]


def _backward_flops(args: Args, made: Sequence[bool]) -> int:
    """A sum over K."""
    sums: int = args.indices.shape[0] * args.indices.shape[1] * args.x.shape[1]
    return sums


# --- the public function ---


def _prepare(
    x: Tensor,
    indices: Tensor,
    num_experts: int,
    *,
    weights: Tensor | None = None,
    capacity: int | None = None,
    drop: str = "order",
    align: int = 1,
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    check_floating(x, "x")
    if x.dim() != 2:
        raise ValueError(f"x must be (T, C), got {tuple(x.shape)}")
    return Args(x.contiguous(), *plan.prepare_plan(x, indices, num_experts, weights, capacity, drop, align))


_run = library.differentiable(
    "moe_permute",
    Args,
    reference,
    gradients=1,
    always=1,
    sizes_only=["x"],
    outputs=["rows_of_experts", "source", "destination", "counts", "offsets"],
    keep_outputs=["destination"],
    fake=_fake,
    flops=lambda args: 0,
    backward_flops=_backward_flops,
)


def moe_permute(
    x: Tensor,
    indices: Tensor,
    num_experts: int,
    *,
    weights: Tensor | None = None,
    capacity: int | None = None,
    drop: str = "order",
    align: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Plan]:
    r"""The tokens of every expert in one block of rows: expert 0's, then expert 1's, and so on, each in the order of
    tokens (and of a token's choices), with the plan that leads back (:func:`accel.moe_unpermute`).

    A choice outside of [0, X) is of another rank, or of nobody: it has no row. By default no other is dropped; with
    ``capacity`` an expert keeps so many, the first in order or those of the largest ``weights``, and the others have no
    row, either. Each expert's rows are padded with zeros to a multiple of ``align``, none where it has no token.

    How many rows are used is only known on the device. N, the size of the result, is a bound of it that follows from
    sizes alone: T·K; with ``align`` a as much more as min(X, T·K) experts need at most, rounded down to a multiple of
    a; with ``capacity`` at most X times that, rounded up to one. Nothing is waited for, and shapes depend on no value.

    Args:
        x: ``(T, C)``; float32, bfloat16, float16, and float64 on the reference. Autocast casts nothing here.
        indices: ``(T, K)`` int64 or int32, as :func:`accel.moe_route` gives them.
        num_experts: X.
        weights: ``(T, K)``, any floating dtype: with ``drop="score"`` who keeps a row, and nothing else. It scales
            nothing here and has no gradient; :func:`accel.moe_unpermute` weights the results.
        capacity: the most rows of an expert, from 0 on, or None for no limit.
        drop: ``"order"`` keeps an expert's first choices, ``"score"`` those of the largest ``weights``; of equal ones
            the first, and a NaN after every number.
        align: what the number of rows of each expert is a multiple of, padding included.
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(rows, plan)``: ``(N, C)`` in the dtype of ``x``, and the named tuple ``source`` (N,), ``destination``
        (T, K), ``counts`` (X,), ``offsets`` (X + 1,) of int64: ``rows[n]`` is ``x[source[n] // K]``, or zero where
        ``source[n]`` is −1; choice (t, k) is row ``destination[t, k]``, or none where that is −1; expert x has
        ``counts[x]`` rows from ``offsets[x]`` on.

    The gradient of ``x`` sums the rows of a token in float32 in the order of its choices, without atomics, so that it
    is the same bits every time. Second and forward-mode derivatives are the reference's; a kernel refuses them.

    Raises:
        TypeError: a tensor of a wrong dtype, or a number that is no integer.
        ValueError: shapes, sizes or devices that do not fit; the message holds them.
        NotImplementedError: ``backend`` cannot run this call; the message says why.

    Capacity follows Lepikhin et al., GShard (2020); dropless rows Gale et al., MegaBlocks (2022).
    """
    args = _prepare(x, indices, num_experts, weights=weights, capacity=capacity, drop=drop, align=align)
    rows, *made = _run(args, backend)
    return rows, Plan(*made)


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    indices = torch.tensor([[0, 2], [2, 1], [-1, 0]], device=device)
    return (torch.zeros(3, 4, device=device, dtype=dtype), indices, 3), {"align": 2}


OP = dispatch.register(
    dispatch.Op(
        name="moe_permute",
        function=moe_permute,
        prepare=_prepare,
        example=_example,
        backends=(
            dispatch.Backend("cpu", backends.why_not_cpu, *_native, frozenset({"cpu"}), KERNEL_DTYPES),
            dispatch.Backend("triton", *_triton, frozenset({"cuda"}), KERNEL_DTYPES),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
    )
)
