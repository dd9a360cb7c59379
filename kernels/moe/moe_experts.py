"""The experts of a mixture in Triton: the first product gathers tokens as it reads them and has the activation behind
it, the second brings its rows back to the tokens by ``rows.combine``, in the order of a token's choices.

The plan is made by torch's own stable sort, on the device; nothing waits for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from accel.backends import KERNEL_DTYPES
from accel.kernels import _launch
from accel.kernels.moe import gates, products
from accel.kernels.moe import rows as rows_of
from accel.kernels.moe.gates import Gate, Numbers
from accel.kernels.moe.products import Source
from accel.ops.moe import moe_experts as op
from accel.ops.moe import plan

__all__ = ["backward", "compile_cases", "forward", "why_not"]


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtypes are judged by the op. ``torch.compile`` traces through this."""
    return products.why_not(args, (args.gate_up_proj, args.down_proj), args.indices.numel())


def _sorted(args: op.Args) -> tuple[plan.Plan, Source]:
    choices = args.indices.numel()
    made = plan.make(args.indices, None, args.gate_up_proj.shape[0], -1, 1, choices)
    return made, Source(made.source, *args.indices.shape)


def forward(*given: Any) -> tuple[Tensor, Tensor]:
    """The output and, where it is kept, the first product; arguments are the fields of ``Args``."""
    args = op.Args(*given)
    x, count = args.x, args.indices.numel()
    with _launch.device_of(x):
        sorted_, source = _sorted(args)
        made = gates.empty(x, count, args.inner)
        hidden = gates.empty(x, count, args.hidden) if args.keep else None
        tile = gates.hidden_tile(args, count)
        of = products.tiles(sorted_.offsets, count, tile[0].rows)
        numbers = Numbers(args.alpha, args.limit, args.shift)
        gates.hidden_launch(
            made, hidden, x, args.gate_up_proj, args.gate_up_bias, of, source, Gate.of(args), numbers, tile
        ).run()
        made = made.to(x.dtype)
        out = products.product(
            made, args.down_proj, not args.transposed, args.down_bias, sorted_.offsets, count
        )  # fmt: skip
        result = rows_of.combine(out, args.weights, sorted_.destination)
    return result, x.new_empty(0) if hidden is None else hidden.to(x.dtype)


def backward(grad: Tensor, hidden: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """Gradients of the tensors of ``Args`` but the indices, empty where they are not needed."""
    *fields, needs = given
    args = op.Args(*fields)
    x, count, first, second = args.x, args.indices.numel(), args.gate_up_proj, args.down_proj
    nothing = x.new_empty(0, dtype=torch.float32)
    found = [nothing] * 6
    through = needs[0] or needs[2] or needs[4]
    with _launch.device_of(x):
        sorted_, source = _sorted(args)
        offsets = sorted_.offsets
        weighed = gates.empty(x, count, args.inner) if needs[3] else None
        grad_hidden = gates.empty(x, count, args.hidden) if through else None
        if needs[1]:
            found[1] = torch.zeros(args.weights.shape, dtype=torch.float32, device=x.device)
        if through or needs[1] or needs[3]:
            behind = products.product(grad, second, args.transposed, None, offsets, count, source)
            owner = torch.searchsorted(offsets, torch.arange(count, device=x.device), right=True) - 1
            bias = args.down_bias if needs[1] else None
            gates.back_launch(
                grad_hidden, weighed, found[1] if needs[1] else None, hidden, behind, args.weights, grad, bias,
                None if bias is None else owner, source, first.shape[0], Gate.of(args),
                Numbers(args.alpha, args.limit, args.shift),
            ).run()  # fmt: skip
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(x.dtype)
            if needs[0]:
                into = products.product(grad_hidden, first, args.transposed, None, offsets, count)
                found[0] = rows_of.combine(into, None, sorted_.destination)
            if needs[2] and args.transposed:
                found[2] = products.outer(x, grad_hidden, offsets, count, source, gather_left=True)
            elif needs[2]:
                found[2] = products.outer(grad_hidden, x, offsets, count, source, gather_right=True)
            if needs[4]:
                found[4] = products.sums(grad_hidden, offsets, count)
        if weighed is not None:
            weighed = weighed.to(x.dtype)
            if args.transposed:
                found[3] = products.outer(weighed, grad, offsets, count, source, gather_right=True)
            else:
                found[3] = products.outer(grad, weighed, offsets, count, source, gather_left=True)
        if needs[5]:
            found[5] = products.sums(grad, offsets, count, args.weights, source)
    return tuple(found)


# tokens, choices, channels, inner, experts
SIZES = ((32768, 8, 2048, 768, 128), (5, 2, 40, 24, 4))
GATES = (
    Gate("silu", True, False, False),
    Gate("silu", True, True, True),
    Gate("gelu", True, False, False),
    Gate("gelu_tanh", False, False, False),
    Gate("relu2", False, False, False),
)


def compile_cases() -> Iterator[_launch.CompileCase]:
    for dtype, size in itertools.product(KERNEL_DTYPES, SIZES):
        for gate in GATES if size == SIZES[0] else GATES[1:2]:
            yield from _cases(dtype, size, gate)


def _cases(dtype: torch.dtype, size: tuple[int, ...], gate: Gate) -> Iterator[_launch.CompileCase]:
    T, K, C, I, X = size  # noqa: E741

    def meta(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    J, N = 2 * I if gate.gated else I, T * K
    x, made, hidden, numbers = meta(T, C), meta(N, I), meta(N, J), Numbers(1.0, 7.0, 0.0)
    source, each = Source(meta(N, kind=torch.int64), T, K), meta(N, kind=torch.int64)
    of, bias = products.Tiles(each, each, each), meta(X, J, kind=torch.float32)
    factors, down_bias = meta(T, K, kind=torch.float32), meta(X, C, kind=torch.float32)
    turns = "in turn" if gate.interleaved else "gate and up" if gate.gated else "no gate"
    name = f"{str(dtype)[6:]} {C} to {I} {gate.function} {turns}"
    first = gate == GATES[0]
    for transposed in (False, True) if first else (gate.interleaved,):
        tile = products.config(dtype, products.average(N, X), I, C, products.unit_of(I, C), inner_first=not transposed)
        weight = meta(X, C, J) if transposed else meta(X, J, C)
        given = bias if gate.limited else None
        launched = gates.hidden_launch(made, hidden, x, weight, given, of, source, gate, numbers, tile)
        yield launched.case(f"{name}{' transposed' if transposed else ''}")
    owner, given = (each, down_bias) if gate.limited else (None, None)
    yield gates.back_launch(
        hidden, made, factors, hidden, made, factors, x, given, owner, source, X, gate, numbers
    ).case(name)  # fmt: skip
    if first:
        tile = products.config(dtype, products.average(N, X), I, C, products.unit_of(I, C))
        yield products.product_launch(made, x, meta(X, C, I), False, None, of, source, tile).case(f"{name} gathered")
        edges = meta(X + 2, kind=torch.int64)
        for left in (True, False):
            a, b = (C, I) if left else (I, C)
            how = {"gather_left": left, "gather_right": not left}
            tile = products.config(dtype, a, b, products.average(N, X), products.unit_of(a, b), **how)
            pair = (x, made) if left else (made, x)
            yield products.outer_launch(meta(X, a, b), *pair, edges, source, tile).case(f"{name} gathered {left}")
        yield products.sums_launch(down_bias, x, factors, edges, source).case(f"{name} gathered")
