"""What stands between the two products of experts in Triton: the first product with the activation behind it, and the
activation's way back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.kernels import _launch
from accel.kernels._launch import Launch
from accel.kernels.moe import products
from accel.kernels.moe.products import Source, Tiles, multiplied, row_of

INTS = [*products.INTS, "inner", "rows"]


class Numbers(NamedTuple):
    """Of the activation, as in ``accel.ExpertActivation``."""

    alpha: float
    limit: float
    shift: float


@dataclass(frozen=True)
class Gate:
    """How the first product's outputs are read: gate and up one behind the other or in turn, or no gate."""

    function: str
    gated: bool
    interleaved: bool
    limited: bool

    @staticmethod
    def of(args: Any) -> Gate:
        return Gate(args.function, args.gated, args.interleaved, args.limit < math.inf)

    @property
    def step(self) -> int:
        return 2 if self.interleaved else 1


@triton.jit
def _places(j, inner, GATE: tl.constexpr):
    """Where the gate and the up of each of the ``inner`` outputs stand."""
    if GATE.interleaved:
        gate, up = 2 * j, 2 * j + 1
    else:
        gate, up = j, j + inner
    return gate, up


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def _function(x, alpha, FUNCTION: tl.constexpr):
    """f(x) and its derivative."""
    if FUNCTION == "silu":
        z = alpha * x
        e = tl.exp(-tl.abs(z))
        s = tl.where(z < 0.0, e, 1.0) / (1.0 + e)
        value, slope = x * s, s + z * s * (1.0 - s)
    elif FUNCTION == "gelu":
        half = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value, slope = x * half, half + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif FUNCTION == "gelu_tanh":
        t = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        inside = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
        value, slope = 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inside
    else:
        r = tl.where(x < 0.0, 0.0, x)  # a NaN stays
        if FUNCTION == "relu":
            value, slope = r, tl.where(x > 0.0, 1.0, 0.0)
        else:
            value, slope = r * r, 2.0 * r
    return value, slope


@triton.jit
def _limited(gate, up, limit):
    """Both within the limit; a NaN stays."""
    return tl.where(gate > limit, limit, gate), tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))


@triton.jit(do_not_specialize=INTS)
def hidden_kernel(
    made_ptr, hidden_ptr, x_ptr, weight_ptr, bias_ptr, source_ptr, expert_ptr, first_ptr, stop_ptr, tokens, choices,
    experts, depth, inner, numbers, CONFIG: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Some rows of one expert and some of what is behind its activation; 0 in rows of none."""
    UNIT: tl.constexpr = CONFIG.unit
    depth *= UNIT
    inner *= UNIT
    ROWS: tl.constexpr = CONFIG.rows
    OUTPUTS: tl.constexpr = CONFIG.outputs
    blocks = tl.cdiv(inner, OUTPUTS)
    tile = tl.program_id(0) // blocks
    j = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    columns = j < inner
    expert = tl.load(expert_ptr + tile)
    n = tl.load(first_ptr + tile) + tl.arange(0, ROWS)
    inside = n < tl.load(stop_ptr + tile)
    outputs = 2 * inner if GATE.gated else inner
    gate, up = _places(j, inner, GATE)
    a = tl.zeros((ROWS, OUTPUTS), tl.float32)
    b = tl.zeros((ROWS, OUTPUTS), tl.float32)
    if expert < experts:
        row, there = row_of(source_ptr, n, inside, tokens, choices)
        weight_ptr += expert * depth * outputs
        if GATE.gated:
            a = multiplied(a, x_ptr, row, there, weight_ptr, gate, columns, depth, outputs, CONFIG)
            b = multiplied(b, x_ptr, row, there, weight_ptr, up, columns, depth, outputs, CONFIG)
        else:
            a = multiplied(a, x_ptr, row, there, weight_ptr, j, columns, depth, outputs, CONFIG)
        if bias_ptr is not None:
            bias_ptr += expert * outputs
            own = gate if GATE.gated else j
            a += tl.where(there[:, None], tl.load(bias_ptr + own, mask=columns, other=0.0)[None, :], 0.0)
            if GATE.gated:
                b += tl.where(there[:, None], tl.load(bias_ptr + up, mask=columns, other=0.0)[None, :], 0.0)
    mask = inside[:, None] & columns[None, :]
    if hidden_ptr is not None:
        own = gate if GATE.gated else j
        at = hidden_ptr + n[:, None] * outputs
        tl.store(at + own[None, :], a.to(hidden_ptr.dtype.element_ty), mask=mask)
        if GATE.gated:
            tl.store(at + up[None, :], b.to(hidden_ptr.dtype.element_ty), mask=mask)
    if GATE.limited:
        a, b = _limited(a, b, numbers.limit)
    value, _ = _function(a, numbers.alpha, GATE.function)
    if GATE.gated:
        value *= b + numbers.shift
    tl.store(made_ptr + n[:, None] * inner + j[None, :], value.to(made_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=INTS)
def back_kernel(
    grad_hidden_ptr, weighed_ptr, grad_weights_ptr, hidden_ptr, behind_ptr, weights_ptr, grad_ptr, bias_ptr, source_ptr,
    owner_ptr, tokens, choices, experts, rows, inner, depth, numbers, CONFIG: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Some rows, all of their outputs: from the gradient behind the activation to that before it, to the gradient of
    the router's weights, and the activation again, weighed."""
    ROWS: tl.constexpr = CONFIG.rows
    OUTPUTS: tl.constexpr = CONFIG.outputs
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = n < rows
    token, there = row_of(source_ptr, n, inside, tokens, choices)
    choice = tl.load(source_ptr + n, mask=there, other=0)
    weight = tl.load(weights_ptr + choice, mask=there, other=0.0)
    outputs = 2 * inner if GATE.gated else inner
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for j0 in range(0, inner, OUTPUTS):
        j = j0 + tl.arange(0, OUTPUTS)
        columns = (j < inner)[None, :]
        some, mask = there[:, None] & columns, inside[:, None] & columns
        gate, up = _places(j, inner, GATE)
        own = gate if GATE.gated else j
        at = hidden_ptr + n[:, None] * outputs
        a = tl.load(at + own[None, :], mask=some, other=0.0).to(tl.float32)
        behind = tl.load(behind_ptr + n[:, None] * inner + j[None, :], mask=some, other=0.0).to(tl.float32)
        through = behind * weight[:, None]
        if GATE.gated:
            b = tl.load(at + up[None, :], mask=some, other=0.0).to(tl.float32)
            free_a, free_b = a == a, b == b
            if GATE.limited:
                free_a = a <= numbers.limit
                free_b = (b >= -numbers.limit) & (b <= numbers.limit)
                a, b = _limited(a, b, numbers.limit)
            value, slope = _function(a, numbers.alpha, GATE.function)
            into = through * (b + numbers.shift) * slope
            into_up = through * value
            made = value * (b + numbers.shift)
            if GATE.limited:  # what is a number and beyond has no slope
                into = tl.where(free_a | (a != a), into, 0.0)
                into_up = tl.where(free_b | (b != b), into_up, 0.0)
        else:
            made, slope = _function(a, numbers.alpha, GATE.function)
            into = through * slope
        if grad_hidden_ptr is not None:
            to = grad_hidden_ptr + n[:, None] * outputs
            kind = grad_hidden_ptr.dtype.element_ty
            tl.store(to + own[None, :], tl.where(some, into, 0.0).to(kind), mask=mask)
            if GATE.gated:
                tl.store(to + up[None, :], tl.where(some, into_up, 0.0).to(kind), mask=mask)
        if weighed_ptr is not None:
            product = tl.where(some, made * weight[:, None], 0.0).to(weighed_ptr.dtype.element_ty)
            tl.store(weighed_ptr + n[:, None] * inner + j[None, :], product, mask=mask)
        total += tl.where(some, made * behind, 0.0)
    if grad_weights_ptr is not None:
        if bias_ptr is not None:
            expert = tl.load(owner_ptr + n, mask=there, other=0)
            for c0 in range(0, depth, OUTPUTS):
                c = c0 + tl.arange(0, OUTPUTS)
                some = there[:, None] & (c < depth)[None, :]
                g = tl.load(grad_ptr + token[:, None] * depth + c[None, :], mask=some, other=0.0).to(tl.float32)
                total += g * tl.load(bias_ptr + expert[:, None] * depth + c[None, :], mask=some, other=0.0)
        tl.store(grad_weights_ptr + choice, tl.sum(total, 1), mask=there)


# --- launches. Tiles are chosen by registers and shared memory, not measured ---


def hidden_launch(
    made: Tensor, hidden: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, of: Tiles, source: Source,
    gate: Gate, numbers: Numbers, tile: tuple[products.Config, int, int],
) -> Launch:  # fmt: skip
    inner = made.shape[1]
    return _launch.launch(
        hidden_kernel, of.expert.shape[0] * triton.cdiv(inner, tile[0].outputs), tile[1], tile[2], made_ptr=made,
        hidden_ptr=hidden, x_ptr=x, weight_ptr=weight, bias_ptr=bias, source_ptr=source.choice, expert_ptr=of.expert,
        first_ptr=of.first, stop_ptr=of.stop, tokens=source.tokens, choices=source.choices, experts=weight.shape[0],
        depth=x.shape[1] // tile[0].unit, inner=inner // tile[0].unit, numbers=numbers, CONFIG=tile[0], GATE=gate,
    )  # fmt: skip


def hidden_tile(args: Any, rows: int) -> tuple[products.Config, int, int]:
    how = (products.average(rows, args.gate_up_proj.shape[0]), args.inner, args.x.shape[1])
    return products.config(args.x.dtype, *how, products.unit_of(*how[1:]), inner_first=not args.transposed)


def back_launch(
    grad_hidden: Tensor | None, weighed: Tensor | None, grad_weights: Tensor | None, hidden: Tensor, behind: Tensor,
    weights: Tensor, grad: Tensor, bias: Tensor | None, owner: Tensor | None, source: Source, experts: int, gate: Gate,
    numbers: Numbers,
) -> Launch:  # fmt: skip
    rows, inner = behind.shape
    block = _launch.power_of_two(inner, 16, 128)
    tile = products.Config(max(1, 1024 // block), block, 1, tl.float32)
    return _launch.launch(
        back_kernel, triton.cdiv(rows, tile.rows), 4, grad_hidden_ptr=grad_hidden, weighed_ptr=weighed,
        grad_weights_ptr=grad_weights, hidden_ptr=hidden, behind_ptr=behind, weights_ptr=weights, grad_ptr=grad,
        bias_ptr=bias, source_ptr=source.choice, owner_ptr=owner, tokens=source.tokens, choices=source.choices,
        experts=experts, rows=rows, inner=inner, depth=grad.shape[1], numbers=numbers, CONFIG=tile, GATE=gate,
    )  # fmt: skip


def empty(like: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=_launch.store_dtype(like.dtype), device=like.device)
