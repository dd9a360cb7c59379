"""Gated attention in Triton: launches of the kernels in ``gau_sums.py`` and their tiles, each sum with one owner.

Nothing of size T × T is stored: weights are computed again for each block of channels of the values, and by each
kernel of the backward pass. Gradients of biases have kernels that other ops share (``_biases.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from accel.backends import why_not_gpu
from accel.kernels import _launch, _pairs
from accel.kernels._biases_launch import Gradient, plan_biases
from accel.kernels._launch import Launch
from accel.kernels._pairs import Tile, head_block, launch, weight_of_a_logit, why_not_addressed
from accel.kernels._spans import span_launches
from accel.kernels.linear import gau_rows, gau_sums
from accel.kernels.linear.arguments import products_of
from accel.kernels.linear.gau_arguments import Factors, Operands, Upstream, config, operand_dtype
from accel.kernels.linear.gau_weights import tile_gradient
from accel.ops.linear.gau_attention import MAX_VALUE_SIZE, Args, gate_gradient
from accel.ops.linear.gau_strips import BY_ROW

MAX_HEAD_SIZE = 256


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtype is judged by the op.

    ``torch.compile`` traces through this, which bars generator expressions and Triton's helpers.
    """
    reason = why_not_gpu(args.q, _launch.INTERPRETING)
    if reason is not None:
        return reason
    s, e = args.q.shape[3], args.v.shape[3]
    if s % 8 or not 8 <= s <= MAX_HEAD_SIZE:
        return f"it takes q and k of a size that is a multiple of 8 up to {MAX_HEAD_SIZE}, not {s}"
    if e % 8 or not 8 <= e <= MAX_VALUE_SIZE:
        return f"it takes v of a size that is a multiple of 8 up to {MAX_VALUE_SIZE}, not {e}"
    tiles = -(-max(args.q.shape[2], args.k.shape[2]) // 16)
    blocks = -(-e // 16)
    if args.q.shape[0] * args.q.shape[1] * tiles * blocks >= 2**31:
        return f"{tuple(args.q.shape)} queries with values of {e} are more tiles than one launch can number"
    return why_not_addressed(args)


# --- tiles ---


@dataclass(frozen=True)
class _Blocks:
    """A tile, and how many channels of values go with it at a time."""

    tile: Tile
    channels: int


def _blocks(mode: str, args: Args) -> _Blocks:
    """Chosen by the registers that the compile gate reports."""
    heavy = weight_of_a_logit(args) > 1 or args.activation != "relu2"
    wide = args.q.shape[3] > 128
    products = mode in ("grad_q", "grad_k", "delta")  # sums over all channels, and two tiles of logits
    if args.q.element_size() == 4:  # without tensor cores operands fill the registers
        found = _Blocks(Tile(16, 16, 8, 1), 32) if products or wide else _Blocks(Tile(32, 32, 8, 1), 64)
    elif args.q.dtype == torch.float16:  # whose operands are TF32
        found = _Blocks(Tile(32, 64, 8, 1), 64) if mode == "grad_k" and not wide else _Blocks(Tile(32, 32, 8, 1), 64)
    elif products:
        few = mode == "grad_k" and (args.activation in BY_ROW or weight_of_a_logit(args) > 0)
        found = _Blocks(Tile(32, 32, 8, 1) if wide else Tile(32 if few else 64, 64, 8, 2), 64)
    elif wide:
        found = _Blocks(Tile(64, 32, 8, 2), 128) if mode == "out" else _Blocks(Tile(32, 64, 8, 1), 128)
    elif mode == "out" and not heavy:
        found = _Blocks(Tile(128, 64, 8, 3), 128)
    elif mode == "grad_v" and weight_of_a_logit(args) > 0:
        found = _Blocks(Tile(32, 64, 8, 2), 128)
    else:
        found = _Blocks(Tile(64, 64, 8, 2), 128)
    tile = found.tile.within(args.q.shape[2], args.k.shape[2])
    return _Blocks(tile, min(found.channels, head_block(args.v.shape[3])))


# --- launches ---


@dataclass(frozen=True)
class _Call:
    args: Args

    def given(self, upstream: Upstream, **buffers: Tensor) -> dict[str, Any]:
        """What the kernels of a call have in common."""
        args = self.args
        factors = Factors(1.0 / (1.0 - args.dropout_p), args.scale)
        grad = {} if upstream.grad is None else {"grad": upstream.grad}
        return {**_pairs.shared(args, {**grad, **buffers}), "factors": factors, "upstream": upstream}

    def launch(
        self,
        mode: str,
        upstream: Upstream,
        out: Tensor,
        more: Tensor | None = None,
        spans: dict[str, Any] | None = None,
    ) -> Launch:
        """One sum, into ``out``: see the modes of the kernels."""
        args, found = self.args, _blocks(mode, self.args)
        tile = found.tile
        blocks = triton.cdiv(args.v.shape[3], found.channels) if mode in ("out", "grad_v") else 1
        buffers = {"out": out} if out.dim() == 4 else {}
        if args.gate is not None:
            buffers["gate"] = args.gate
        given = self.given(upstream, **buffers)
        for name in ("out", "gate", "grad"):
            given = {**{f"{name}_{axis}": 0 for axis in "bht"}, **given}
        if mode in ("grad_k", "grad_v"):
            kernel, owners = gau_sums.by_keys_kernel, args.k.shape[1] * triton.cdiv(args.k.shape[2], tile.keys)
        else:
            kernel, owners = gau_sums.by_queries_kernel, args.q.shape[1] * triton.cdiv(args.q.shape[2], tile.queries)
        return launch(
            kernel,
            args.q.shape[0] * owners * blocks,
            tile,
            **given,
            **(spans or {}),
            out_ptr=out,
            more_ptr=more,
            gate_ptr=args.gate if mode == "out" else None,
            blocks=blocks,
            CONFIG=config(args, tile, found.channels, given["unit"]),
            MODE=mode,
        )

    def rows_launch(
        self, x: Tensor, gate: Tensor | None = None, grad: Tensor | None = None, rest: Tensor | None = None
    ) -> tuple[Launch, Tensor]:
        """What finds the rows of x, times the gate, that are not finite, and makes ``grad`` and ``rest`` of it."""
        batches, heads, tokens, size = x.shape
        bad = x.new_empty((batches, heads, tokens), dtype=torch.float32)
        block = min(128, head_block(size))
        rows = 4096 // block
        both = (("x", x), ("gate", gate))
        steps = {f"{name}_{axis}": _pairs.strides(t)[n] for name, t in both for n, axis in enumerate("bht")}
        step = _launch.launch(
            gau_rows.rows_kernel,
            batches * heads * triton.cdiv(tokens, rows),
            4,
            bad_ptr=bad,
            grad_ptr=grad,
            rest_ptr=rest,
            x_ptr=x,
            gate_ptr=gate,
            heads=heads,
            tokens=tokens,
            CONFIG=Operands(**products_of(self.args.q.dtype)),
            SIZE=size,
            BLOCK=block,
            BLOCK_M=rows,
            **steps,
        )
        return step, bad

    def row_launches(self) -> tuple[list[Launch], Upstream]:
        """What the weights of an activation by row need to know of each row."""
        if self.args.activation not in BY_ROW:
            return [], Upstream()
        factor, top, inverse = (self.args.q.new_empty(self.args.q.shape[:3], dtype=torch.float32) for _ in range(3))
        known = Upstream(factor=factor, top=top)
        launches = [self.launch("peak", Upstream(), factor, top), self.launch("total", known, inverse)]
        return launches, known._replace(inverse=inverse)


@dataclass(frozen=True)
class _Plan:
    """Launches in order, and the buffers they fill."""

    launches: list[Launch]
    made: list[Tensor]
    parts: list[Tensor | None]  # of bias, line and table, summed over the first axis


def _forward_plan(args: Args) -> _Plan:
    call = _Call(args)
    launches, known = call.row_launches()
    step, bad_v = call.rows_launch(args.v)
    shape = (*args.q.shape[:3], args.v.shape[3])
    out = _launch.result(args.q, shape)
    sums = _launch.result(args.q, shape) if args.keep_sums else None
    launches += [step, call.launch("out", known._replace(bad_v=bad_v), out, sums)]
    return _Plan(launches, [out] if sums is None else [out, sums], [])


FEW = 64
"""With no more queries than these what rounding takes from the upstream gradients shows in the sums."""


def _upstream(call: _Call, grad_out: Tensor, exact: bool) -> tuple[list[Launch], Upstream]:
    """What the sums of a backward pass start from; with ``exact`` also what rounding left."""
    args = call.args
    launches, known = call.row_launches()
    grad, rest = grad_out, None
    if args.gate is None:
        step, bad_grad = call.rows_launch(grad_out)
    else:
        grad = torch.empty(grad_out.shape, dtype=operand_dtype(args.q.dtype), device=grad_out.device)
        rest = torch.empty_like(grad) if exact else None
        step, bad_grad = call.rows_launch(grad_out, args.gate, grad, rest)
    step_q, bad_q = call.rows_launch(args.q)
    step_k, bad_k = call.rows_launch(args.k)
    launches += [step, step_q, step_k]
    return launches, known._replace(grad=grad, rest=rest, bad_q=bad_q, bad_k=bad_k, bad_grad=bad_grad)


def _backward_plan(grad_out: Tensor, args: Args, needs: list[bool]) -> _Plan:
    """``needs``: of bias, line and table."""
    call = _Call(args)
    small = any(wanted and x is not None for wanted, x in zip(needs, (args.bias, args.line, args.table), strict=True))
    few = args.q.shape[2] <= FEW or args.activation in BY_ROW  # these take differences of nearly equal numbers
    launches, upstream = _upstream(call, grad_out, args.q.dtype != torch.float32 and (small or few))
    if args.activation in BY_ROW:
        delta = args.q.new_empty(args.q.shape[:3], dtype=torch.float32)
        launches.append(call.launch("delta", upstream, delta))
        upstream = upstream._replace(delta=delta)
    rounded = upstream if few else upstream._replace(rest=None)
    grads = [_launch.result(x, x.shape) for x in (args.q, args.k, args.v)]
    launches.append(call.launch("grad_q", rounded, grads[0]))
    for mode, out in (("grad_k", grads[1]), ("grad_v", grads[2])):
        found, spans, spans_b = span_launches(args, _blocks(mode, args).tile)
        launches += found
        launches.append(call.launch(mode, rounded, out, spans={"spans_ptr": spans, "spans_b": spans_b}))
    plans = plan_biases(args, needs, _gradient_of_logits(call, upstream))
    launches += [plan[0] for plan in plans if plan is not None]
    return _Plan(launches, grads, [None if plan is None else plan[1] for plan in plans])


def _gradient_of_logits(call: _Call, upstream: Upstream) -> Gradient:
    args = call.args
    single = args.q.dtype == torch.float32
    large = args.q.dtype == torch.bfloat16 and args.activation not in BY_ROW
    tile = Tile(16, 16, 8, 1) if single else Tile(32 if large else 16, 32, 8, 1)
    given = call.given(upstream)
    channels = min(64, head_block(args.v.shape[3]))
    return Gradient(
        tile_gradient,
        given,
        lambda tile: config(args, tile, channels, given["unit"]),
        tile.within(args.q.shape[2], args.k.shape[2]),
        Tile(16, 16, 16 if single else 8, 1),
    )


# --- the leaf ---


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """Output and, where ``keep_sums``, the weighted sums of values without the gate.

    Arguments are the fields of ``accel.ops.linear.gau_attention.Args``.
    """
    given = Args(*args)
    with _launch.device_of(given.q):
        plan = _forward_plan(given)
        for step in plan.launches:
            step.run()
    out, *sums = [x.to(given.q.dtype) for x in plan.made]
    return out, sums[0] if sums else out.new_empty(0)


def backward(grad_out: Tensor, sums: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and, where needed, of gate, bias, line and table (the last three fp32, else empty)."""
    *args, needs = rest
    given = Args(*args)
    with _launch.device_of(given.q):
        plan = _backward_plan(grad_out, given, needs[1:])
        for step in plan.launches:
            step.run()
        small = [
            grad_out.new_empty(0, dtype=torch.float32) if part is None else part.sum(0).contiguous()
            for part in plan.parts
        ]
    grads = [g.to(x.dtype) for g, x in zip(plan.made, (given.q, given.k, given.v), strict=True)]
    return *grads, gate_gradient(grad_out, sums, given, needs[0]), *small


# --- what the compile gate builds ---


def compile_cases() -> Iterator[_launch.CompileCase]:
    """Every tile, plain and in the heaviest calls that reach it; what the compiler sees twice, once."""
    return _launch.once(case for dtype, sizes, flags in _calls() for case in _cases(dtype, sizes, **flags))


def _calls() -> Iterator[tuple[torch.dtype, tuple[int, int], dict[str, Any]]]:
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    everything = {"rule": "other", "mask": True, "bias": True, "line": True, "dropout": True}
    for dtype in (fp32, bf16, fp16):
        yield dtype, (128, 1024), {"rule": "causal"}
        yield dtype, (128, 1024), {"activation": "laplace", **everything}
        yield dtype, (64, 64), {"activation": "softmax_plus", **everything}
        yield dtype, (256, 1024), {"activation": "laplace", **everything}
    yield bf16, (64, 64), {"rule": "causal"}
    yield bf16, (256, 1024), {"rule": "causal"}
    yield bf16, (128, 1024), {"line": True, "rule": "causal"}
    yield bf16, (128, 1000), {"activation": "softmax", "gate": False}
    yield bf16, (64, 64), {"table": "grid", "activation": "silu"}
    yield fp16, (128, 1024), {"table": "index", "activation": "sigmoid", "aligned": False}


def _cases(
    dtype: torch.dtype,
    sizes: tuple[int, int],
    rule: str = "all",
    activation: str = "relu2",
    gate: bool = True,
    mask: bool = False,
    bias: bool = False,
    line: bool = False,
    table: str = "",
    dropout: bool = False,
    aligned: bool = True,
) -> Iterator[_launch.CompileCase]:
    """The launches of one call, forward and backward, on tensors that have shapes only."""
    name = f"{str(dtype)[6:]} D={sizes[0]} E={sizes[1]} {activation} {rule}"
    for flag in ("gate", "mask", "bias", "line", "table", "dropout"):
        name += f" {flag}" if locals()[flag] else ""
    tokens = 1024

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def heads(count: int, size: int) -> Tensor:
        return empty(2, count, tokens, size + (0 if aligned else 1), dtype=dtype)[..., :size]

    args = Args(
        q=heads(2, sizes[0]),
        k=heads(1, sizes[0]),
        v=heads(1, sizes[1]),
        gate=heads(2, sizes[1]) if gate else None,
        bias=empty(1, 2, tokens, tokens, dtype=dtype) if bias else None,
        line=empty(2, 2 * tokens - 1) if line else None,
        table=empty(63 * 63, 2) if table else None,
        mask=empty(2, 1, 1, tokens, dtype=torch.bool) if mask else None,
        bias_index=empty(tokens, tokens, dtype=torch.int32) if table == "index" else None,
        rows=empty(2, tokens, 5, dtype=torch.int32) if rule != "all" else None,
        seed=empty(1, dtype=torch.int64) if dropout else None,
        grid=[32, 32, 0] if table == "grid" else [],
        rule=rule,
        packed=False,
        activation=activation,
        scale=0.125,
        dropout_p=0.1 if dropout else 0.0,
        keep_sums=gate,
    )

    backward = _backward_plan(heads(2, sizes[1]), args, [True] * 3)
    for step in (*_forward_plan(args).launches, *backward.launches):
        given = step.arguments
        kind = [str(given[key]) for key in ("MODE", "SIZE", "BLOCK_M", "BLOCK_N") if key in given]
        product = ["times gate"] if given.get("gate_ptr") is not None and "SIZE" in given else []
        yield step.case(" ".join([*kind, *product, name]))
