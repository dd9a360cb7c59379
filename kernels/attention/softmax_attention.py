"""Softmax attention in Triton: online softmax forward, and backward kernels in which every sum has one owner.

A program of the forward and of the dq kernel owns a tile of queries, one of the dk/dv kernel a tile of keys of a
key head. Each visits only tiles that its rule lets it see, first those seen in part, then the full ones without masks.
Here are their tiles and launches; the kernels stand in ``forward.py`` and ``backward.py``, and the gradients of biases
have kernels that other ops share (``_biases.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from accel.backends import why_not_gpu
from accel.kernels import _launch
from accel.kernels._biases_launch import Gradient, plan_biases
from accel.kernels._pairs import Tile, head_block, launch, weight_of_a_logit, why_not_addressed
from accel.kernels._spans import span_launches
from accel.kernels.attention import backward as backwards
from accel.kernels.attention import forward as forwards
from accel.kernels.attention.arguments import Upstream, config, launch_call, plain, shared
from accel.kernels.attention.weights import tile_gradient
from accel.ops.attention.softmax_attention import Args
from accel.ops.pairs import adds

# --- tiles ---


Tiles = dict[tuple[int, int], Tile]
"""By head size and weight of a logit."""


@dataclass(frozen=True)
class _Choice:
    """The tiles of one kernel: on Hopper those of ``hopper`` first, a small one for what is in no table."""

    every: Tiles
    hopper: Tiles
    fp32: tuple[Tile, Tile]  # for heads up to 64 and wider ones

    def of(self, args: Args, capability: tuple[int, int]) -> Tile:
        """For the wider of both head sizes and the weight of a logit."""
        widest = max(64, triton.next_power_of_2(max(args.q.shape[3], args.v.shape[3])))
        key = (widest, weight_of_a_logit(args, args.softcap > 0.0))
        if args.q.element_size() == 4:
            tile = self.fp32[0] if widest == 64 else self.fp32[1]
        elif capability[0] == 9 and key in self.hopper:
            tile = self.hopper[key]
        else:
            tile = self.every.get(key, Tile(32, 32, 8, 1))
        return tile.within(args.q.shape[2], args.k.shape[2])


# Those for every GPU were chosen by the registers that the compile gate reports. Those for Hopper were measured on an
# H200, with 8192 tokens (weight 0), 2048 (1) and 577 (2): the fastest that do not spill, or one that spills and is
# faster by a tenth or more.
FORWARD = _Choice(
    every={
        (64, 0): Tile(128, 64, 4, 3),
        (64, 1): Tile(64, 64, 4, 2),
        (64, 2): Tile(64, 64, 8, 2),
        (128, 0): Tile(128, 64, 8, 3),
        (128, 1): Tile(64, 64, 8, 2),
        (128, 2): Tile(64, 64, 8, 2),
        (256, 0): Tile(64, 32, 8, 2),
        (256, 1): Tile(64, 32, 8, 2),
    },
    hopper={
        (64, 1): Tile(64, 64, 4, 2),
        (64, 2): Tile(64, 64, 4, 2, spill=48),
        (128, 0): Tile(128, 128, 8, 3),
        (128, 1): Tile(64, 64, 4, 2, spill=320),
    },
    fp32=(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
)
KEYS = _Choice(
    every={
        (64, 0): Tile(32, 64, 8, 2),
        (64, 1): Tile(32, 64, 8, 1),
        (64, 2): Tile(32, 32, 4, 1),
        (128, 0): Tile(32, 64, 8, 2),
        (128, 1): Tile(32, 64, 8, 1),
        (256, 0): Tile(32, 32, 8, 1),
        (256, 1): Tile(32, 32, 8, 1),
    },
    hopper={
        (64, 0): Tile(64, 64, 4, 2),
        (64, 1): Tile(64, 64, 4, 1),
        (64, 2): Tile(64, 64, 4, 1),
        (128, 0): Tile(64, 128, 8, 2, spill=256),
        (128, 1): Tile(64, 64, 4, 1, spill=320),
    },
    fp32=(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
)
QUERIES = _Choice(
    every={
        (64, 0): Tile(128, 64, 8, 2),
        (64, 1): Tile(64, 32, 4, 2),
        (64, 2): Tile(64, 32, 8, 2),
        (128, 0): Tile(128, 64, 8, 2),
        (128, 1): Tile(64, 32, 8, 2),
        (256, 0): Tile(32, 32, 8, 1),
        (256, 1): Tile(32, 32, 8, 1),
    },
    hopper={
        (64, 0): Tile(128, 64, 8, 3),
        (64, 1): Tile(64, 64, 4, 1),
        (64, 2): Tile(64, 64, 4, 1),
        (128, 0): Tile(128, 64, 8, 3),
        (128, 1): Tile(64, 64, 4, 2),
    },
    fp32=(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
)


def _gradient_of_logits(args: Args, given: dict[str, Any], capability: tuple[int, int]) -> Gradient:
    """For kernels that hold the gradient of a tile and what it comes from."""
    widest = max(args.q.shape[3], args.v.shape[3])
    index_tile = Tile(16, 16, 16 if args.q.element_size() == 4 else 8, 1)
    if args.q.element_size() == 4:  # products without tensor cores: many warps, or their operands fill the registers
        tile = Tile(16, 16, 8 if widest <= 64 else 16, 1)
    elif widest > 128:
        tile = Tile(16, 32, 8, 1)
    elif widest > 64 or args.dropout_p > 0.0:
        tile = Tile(32, 32, 8, 1)
    else:
        tile = Tile(64, 64, 4 if capability[0] == 9 else 8, 1)
    tile = tile.within(args.q.shape[2], args.k.shape[2])
    return Gradient(tile_gradient, given, lambda tile: config(args, tile, given["unit"]), tile, index_tile)


# --- launches ---


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtype and head sizes are judged by the op.

    ``torch.compile`` traces through this, which bars generator expressions and Triton's helpers.
    """
    return why_not_gpu(args.q, _launch.INTERPRETING) or why_not_addressed(args)


def _results(args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Empty out, lse and peak."""
    lse = args.q.new_empty(args.q.shape[:3], dtype=torch.float32)
    return (
        _launch.result(args.q, (*lse.shape, args.v.shape[3])),
        lse,
        lse.new_empty((2, *lse.shape) if adds(args) else (0,)),
    )


def _forward_launch(
    out: Tensor, lse: Tensor, peak: Tensor, args: Args, capability: tuple[int, int], worst: Tensor | None = None
) -> Any:
    tile = FORWARD.of(args, capability)
    programs = lse.shape[0] * lse.shape[1] * triton.cdiv(lse.shape[2], tile.queries)
    given = shared(args, {"out": out})
    peak_ptr = peak if adds(args) else None
    more = {"out_ptr": out, "lse_ptr": lse, "peak_ptr": peak_ptr, "sinks_ptr": args.sinks, "worst_ptr": worst}
    return launch_call(forwards.forward_kernel, programs, tile, args, given, PLAIN=plain(args), **more)


def _sums_launch(sums: Tensor, grad_out: Tensor, out: Tensor, worst: Tensor | None = None) -> Any:
    sides = (("out", out), ("grad", grad_out))
    steps = {f"{name}_{axis}": x.stride(n) for name, x in sides for n, axis in enumerate("bht")}
    batches, heads, queries, size = out.shape
    tile = Tile(max(1, 2048 // head_block(size)), 16, 4, 1)
    given: dict[str, Any] = {"sums_ptr": sums, "out_ptr": out, "grad_ptr": grad_out, "worst_ptr": worst}
    given.update(heads=heads, queries=queries, E=size)
    programs = batches * heads * triton.cdiv(queries, tile.queries)
    given.update(steps, BLOCK_E=head_block(size), BLOCK_M=tile.queries)
    return launch(backwards.row_sums_kernel, programs, tile, **given)


def row_sums(grad_out: Tensor, out: Tensor) -> Tensor:
    """``(B, H, T)`` fp32: the sum of ``out`` · ``grad_out``, both ``(B, H, T, E)``, over the last axis.

    torch would write both in fp32 first, which takes as long as a tenth of the backward pass at 8192 tokens.
    """
    sums = out.new_empty(out.shape[:3], dtype=torch.float32)
    with _launch.device_of(out):
        _sums_launch(sums, grad_out, out).run()
    return sums


@dataclass(frozen=True)
class _Backward:
    """The launches of a backward pass in order, and the buffers they fill."""

    launches: list[Any]
    grads: tuple[Tensor, Tensor, Tensor]
    parts: list[Tensor | None]  # of bias, line and table, summed over the first axis


def _backward_plan(
    grads: tuple[Tensor, Tensor, Tensor],
    upstream: Upstream,
    args: Args,
    needs: list[bool],
    capability: tuple[int, int],
    worst: Tensor | None = None,
) -> _Backward:
    q, k = args.q, args.k
    grad_q, grad_k, grad_v = grads
    given = {
        **shared(args, {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v, "grad": upstream.grad}),
        "grad_q_ptr": grad_q,
        "grad_k_ptr": grad_k,
        "grad_v_ptr": grad_v,
        "upstream": upstream,
        "worst_ptr": worst,
    }
    tile = KEYS.of(args, capability)
    launches, spans, spans_b = span_launches(args, tile)
    programs = k.shape[0] * k.shape[1] * triton.cdiv(k.shape[2], tile.keys)
    more = {"spans_ptr": spans, "spans_b": spans_b}
    launches.append(launch_call(backwards.keys_kernel, programs, tile, args, given, **more))
    tile = QUERIES.of(args, capability)
    programs = q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], tile.queries)
    launches.append(launch_call(backwards.queries_kernel, programs, tile, args, given))
    plans = plan_biases(args, needs, _gradient_of_logits(args, given, capability))
    launches += [plan[0] for plan in plans if plan is not None]
    return _Backward(launches, grads, [None if plan is None else plan[1] for plan in plans])


def _grads(args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients of q, k and v."""
    grad_q, grad_k, grad_v = (_launch.result(x, x.shape) for x in (args.q, args.k, args.v))
    return grad_q, grad_k, grad_v


def _upstream(grad_out: Tensor, delta: Tensor, lse: Tensor, peak: Tensor, args: Args) -> Upstream:
    if not adds(args):
        return Upstream(grad_out, lse.contiguous(), delta.contiguous())
    share = peak[1].to(grad_out.dtype)  # 1 in rows whose largest logit is not far from 0
    return Upstream(grad_out * share[..., None], peak[0], delta * share)


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and, where something is added to the logits, what the backward computes a row's weights from:
    ``(2, B, H, T)``, the number they are relative to, in the units of the logits, and what they are multiplied by then.

    Arguments are the fields of ``accel.ops.attention.softmax_attention.Args``.
    """
    given = Args(*args)
    out, lse, peak = _results(given)
    with _launch.device_of(given.q):
        _forward_launch(out, lse, peak, given, _launch.capability(given.q)).run()
    return out.to(given.q.dtype), lse, peak


def backward(grad_out: Tensor, delta: Tensor, lse: Tensor, peak: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and, where needed, of bias, line and table (fp32, else empty).

    ``delta`` is the sum of weight · gradient over each row, less the gradient of the log-sum-exp.
    """
    *args, needs = rest
    given = Args(*args)
    upstream = _upstream(grad_out, delta, lse, peak, given)
    with _launch.device_of(given.q):
        plan = _backward_plan(_grads(given), upstream, given, needs, _launch.capability(given.q))
        for step in plan.launches:
            step.run()
        small = [lse.new_empty(0) if part is None else part.sum(0).contiguous() for part in plan.parts]
    grads = [g.to(x.dtype) for g, x in zip(plan.grads, (given.q, given.k, given.v), strict=True)]
    return *grads, *small


# --- the same into what another kernel computed, where ``worst``, a number on the device, is not finite ---


def forward_again(worst: Tensor, out: Tensor, lse: Tensor, args: Args) -> None:
    """Compute ``out`` and ``lse`` of a call to which nothing is added; both stay as they are if ``worst`` is finite."""
    with _launch.device_of(out):
        _forward_launch(out, lse, lse, args, _launch.capability(out), worst).run()


def backward_again(
    worst: Tensor, grads: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, out: Tensor, lse: Tensor, args: Args
) -> None:
    """The same for the gradients of q, k and v."""
    delta = torch.empty_like(lse)
    upstream = _upstream(grad_out, delta, lse, lse, args)
    with _launch.device_of(out):
        plan = _backward_plan(grads, upstream, args, [False] * 3, _launch.capability(out), worst)
        for step in (_sums_launch(delta, grad_out, out, worst), *plan.launches):
            step.run()


# --- what the compile gate builds ---


def compile_cases() -> Iterator[_launch.CompileCase]:
    """Every tile of the tables, plain and in the heaviest calls that reach it; what the compiler sees twice, once."""
    return _launch.once(case for dtype, sizes, flags in _calls() for case in _cases(dtype, sizes, **flags))


def _calls() -> Iterator[tuple[torch.dtype, tuple[int, int], dict[str, Any]]]:
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    everything = {"rule": "other", "mask": True, "bias": True, "line": True, "dropout": True, "softcap": True}
    for size in (64, 128):
        yield bf16, (size, size), {"rule": "causal"}
        yield bf16, (size, size), {"rule": "causal", "again": True}
        yield bf16, (size, size), {"rule": "other", "mask": True}
        yield bf16, (size, size), {"bias": True}
        yield fp32, (size, size), everything
    yield bf16, (64, 64), everything
    yield bf16, (256, 256), everything
    yield bf16, (192, 128), {"rule": "other", "softcap": True}
    yield bf16, (64, 64), {"table": "grid", "rule": "all"}
    yield bf16, (64, 64), {"line": True, "rule": "all"}
    yield bf16, (128, 128), {"table": "grid", "rule": "all"}
    yield fp16, (64, 64), {"table": "index", "rule": "causal", "aligned": False}


def _cases(
    dtype: torch.dtype,
    head_sizes: tuple[int, int],
    rule: str = "all",
    mask: bool = False,
    bias: bool = False,
    line: bool = False,
    table: str = "",
    dropout: bool = False,
    softcap: bool = False,
    aligned: bool = True,
    again: bool = False,
) -> Iterator[_launch.CompileCase]:
    """The launches of one call, forward and backward, on tensors that have shapes only."""
    name = f"{str(dtype)[6:]} D={head_sizes[0]} E={head_sizes[1]} {rule}"
    for flag in ("mask", "bias", "line", "table", "dropout", "softcap", "again"):
        name += f" {flag}" if locals()[flag] else ""
    tokens = 1024

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def heads(count: int, size: int) -> Tensor:
        return empty(2, count, tokens, size + (0 if aligned else 1), dtype=dtype)[..., :size]

    args = Args(
        q=heads(4, head_sizes[0]),
        k=heads(2, head_sizes[0]),
        v=heads(2, head_sizes[1]),
        bias=empty(1, 4, tokens, tokens, dtype=dtype) if bias else None,
        line=empty(4, 2 * tokens - 1) if line else None,
        table=empty(63 * 63, 4) if table else None,
        sinks=empty(4) if softcap else None,
        mask=empty(2, 1, 1, tokens, dtype=torch.bool) if mask else None,
        bias_index=empty(tokens, tokens, dtype=torch.int32) if table == "index" else None,
        rows=empty(2, tokens, 5, dtype=torch.int32) if rule != "all" else None,
        seed=empty(1, dtype=torch.int64) if dropout else None,
        grid=[32, 32, 0] if table == "grid" else [],
        rule=rule,
        scale=0.125,
        softcap=30.0 if softcap else 0.0,
        dropout_p=0.1 if dropout else 0.0,
    )
    out, lse, peak = _results(args)
    worst = empty() if again else None
    upstream = _upstream(out, lse, lse, peak, args)

    def of(capability: tuple[int, int]) -> Iterator[_launch.CompileCase]:
        yield _forward_launch(out, lse, peak, args, capability, worst).case(name)
        yield _sums_launch(lse, out, out, worst).case(name)
        for step in _backward_plan(_grads(args), upstream, args, [True] * 3, capability, worst).launches:
            yield step.case(name)

    yield from _launch.by_generation(of((8, 0)), of((9, 0)))
