"""Window attention: rows, rivals, costs and goals.

The core is everything between the qkv projection's output and the output projection's input: ``(B, Y, X, 3·C)`` to
``(B, Y, X, C)``, the bias table's lookup included. The eager rival is torchvision's sequence of operations on that
stretch. (torchvision rolls and partitions before it projects, where there is a third of the data to move; the rows
``block``, with both projections inside, and the models keep that order.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import accel
from accel import dispatch
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import Case, Cost, Pick, Provider, Short, compiled
from accel.ops.windows.window_attention import LN_100, OP, relative_position_index

NAME = "window_attention"
PROVIDERS = ("accel", "eager", "compile", "sdpa")


@dataclass(frozen=True)
class Shape:
    """A map and how it is cut."""

    group: str
    batch: int
    size: tuple[int, ...]
    channels: int
    heads: int
    window: tuple[int, ...]
    shift: tuple[int, ...]
    cosine: bool = False

    @property
    def tokens(self) -> int:
        """Of a window."""
        return math.prod(self.window)

    @property
    def padded(self) -> tuple[int, ...]:
        return tuple(-(-n // w) * w for n, w in zip(self.size, self.window, strict=True))

    @property
    def clamped(self) -> tuple[int, ...]:
        """The shift with torchvision's exception for windows that cover the map."""
        return tuple(0 if w >= p else s for s, w, p in zip(self.shift, self.window, self.padded, strict=True))

    def __str__(self) -> str:
        size, window = ("×".join(map(str, axis)) for axis in (self.size, self.window))
        kind = " cosine" if self.cosine else ""
        return f"B{self.batch} {size} C{self.channels} h{self.heads} w{window}{kind}"


STAGES = (("stage 1", 56, 96, 3), ("stage 2", 28, 192, 6), ("stage 3", 14, 384, 12), ("stage 4", 7, 768, 24))


def _stages(batch: int, prefix: str = "") -> Iterator[Shape]:
    for (group, n, channels, heads), shift in product(STAGES, (0, 3)):
        if n > 7 or shift == 0:  # a window that covers the map has its shift taken away: the same row twice
            yield Shape(prefix + group, batch, (n, n), channels, heads, (7, 7), (shift, shift))


def _others(batch: int) -> Iterator[Shape]:
    for shift in (0, 4):
        yield Shape("v2 window 8", batch, (64, 64), 96, 3, (8, 8), (shift, shift), cosine=True)
    for side, n in ((12, 48), (16, 64)):
        for shift in (0, side // 2):
            yield Shape(f"window {side}", batch, (n, n), 128, 4, (side, side), (shift, shift))
    for shifts in ((0, 0, 0), (4, 3, 3)):
        yield Shape("video 8×7×7", max(1, batch // 4), (16, 28, 28), 96, 3, (8, 7, 7), shifts)
    for shift in (0, 3):
        yield Shape("map 50×53", batch, (50, 53), 96, 3, (7, 7), (shift, shift))


# --- rivals ---


def _gather(x: Tensor, shape: Shape) -> Tensor:
    """Pad, roll, partition: ``(B·windows, N, F)``."""
    short = [p - n for p, n in zip(shape.padded, shape.size, strict=True)]
    if any(short):
        x = F.pad(x, [0, 0, *(n for s in reversed(short) for n in (0, s))])
    axes = list(range(1, len(shape.size) + 1))
    if any(shape.clamped):
        x = torch.roll(x, [-s for s in shape.clamped], axes)
    cut = [n for p, w in zip(shape.padded, shape.window, strict=True) for n in (p // w, w)]
    x = x.view(x.shape[0], *cut, x.shape[-1])
    rank = len(axes)
    order = [0, *(2 * i + 1 for i in range(rank)), *(2 * i + 2 for i in range(rank)), 2 * rank + 1]
    return x.permute(order).reshape(-1, shape.tokens, x.shape[-1])


def _scatter(x: Tensor, shape: Shape) -> Tensor:
    """Reverse the partition, roll back, unpad."""
    counts = [p // w for p, w in zip(shape.padded, shape.window, strict=True)]
    rank, features = len(counts), x.shape[-1]
    x = x.view(-1, *counts, *shape.window, features)
    order = [0, *(n for i in range(rank) for n in (i + 1, i + 1 + rank)), 2 * rank + 1]
    x = x.permute(order).reshape(x.shape[0], *shape.padded, features)
    if any(shape.clamped):
        x = torch.roll(x, list(shape.clamped), list(range(1, rank + 1)))
    return x[(slice(None), *(slice(n) for n in shape.size))].contiguous()


def _mask(x: Tensor, shape: Shape) -> Tensor:
    """torchvision's shift mask ``(windows, N, N)``, made in every call as there."""
    label = x.new_zeros(shape.padded)
    cuts = [
        ((0, -w), (-w, -s), (-s, None)) if s else ((0, None),) for w, s in zip(shape.window, shape.clamped, strict=True)
    ]
    for count, region in enumerate(product(*cuts)):
        label[tuple(slice(*bounds) for bounds in region)] = count
    cut = [n for p, w in zip(shape.padded, shape.window, strict=True) for n in (p // w, w)]
    rank = len(shape.window)
    label = label.view(cut).permute([*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]).reshape(-1, shape.tokens)
    apart = label.unsqueeze(1) - label.unsqueeze(2)
    return apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)


def _bias(table: Tensor, index: Tensor, tokens: int) -> Tensor:
    return table[index].view(tokens, tokens, -1).permute(2, 0, 1).contiguous().unsqueeze(0)


def _heads(x: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    width = shape.channels // shape.heads
    x = x.reshape(x.size(0), x.size(1), 3, shape.heads, width).permute(2, 0, 3, 1, 4)
    return x[0], x[1], x[2]


def _attend(x: Tensor, table: Tensor, logit_scale: Tensor | None, index: Tensor, shape: Shape) -> Tensor:
    """``(B·windows, N, 3·C)`` to ``(B·windows, N, C)``, every intermediate stored."""
    q, k, v = _heads(x, shape)
    if logit_scale is not None:
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        logits = logits * torch.clamp(logit_scale, max=LN_100).exp()
    else:
        logits = (q * (shape.channels // shape.heads) ** -0.5).matmul(k.transpose(-2, -1))
    logits = logits + _bias(table, index, shape.tokens)
    if any(shape.clamped):
        mask = _mask(x, shape)
        logits = logits.view(-1, mask.size(0), shape.heads, shape.tokens, shape.tokens)
        logits = logits + mask.unsqueeze(1).unsqueeze(0)
        logits = logits.view(-1, shape.heads, shape.tokens, shape.tokens)
    weights = F.softmax(logits, dim=-1)
    return weights.matmul(v).transpose(1, 2).reshape(x.size(0), x.size(1), shape.channels)


def _attend_sdpa(x: Tensor, table: Tensor, logit_scale: Tensor | None, index: Tensor, shape: Shape) -> Tensor:
    """The same through ``scaled_dot_product_attention``, bias and mask in one dense tensor as timm hands it over."""
    q, k, v = _heads(x, shape)
    scale = None
    if logit_scale is not None:
        q = F.normalize(q, dim=-1) * torch.clamp(logit_scale, max=LN_100).exp()
        k, scale = F.normalize(k, dim=-1), 1.0
    bias = _bias(table, index, shape.tokens)
    if any(shape.clamped):
        mask = _mask(x, shape)
        bias = bias + mask.unsqueeze(1)
        bias = bias.repeat(x.size(0) // mask.size(0), 1, 1, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2).reshape(x.size(0), x.size(1), shape.channels)


def core(shape: Shape, device: str, attend: Callable[..., Tensor] = _attend) -> Callable[..., Tensor]:
    """``(qkv, table[, logit_scale]) -> out`` in torchvision's operations."""
    index = relative_position_index(shape.window, torch.device(device)).flatten()

    def function(qkv: Tensor, table: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        return _scatter(attend(_gather(qkv, shape), table, logit_scale, index, shape), shape)

    return function


def block(shape: Shape, device: str, attend: Callable[..., Tensor] = _attend) -> Callable[..., Tensor]:
    """``(x, table, qkv weight, qkv bias, proj weight, proj bias) -> y`` in torchvision's operations and order."""
    index = relative_position_index(shape.window, torch.device(device)).flatten()

    def function(x: Tensor, table: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        x = F.linear(_gather(x, shape), w1, b1)
        return _scatter(F.linear(attend(x, table, None, index, shape), w2, b2), shape)

    return function


def _options(shape: Shape) -> dict[str, Any]:
    return {"num_heads": shape.heads, "window_size": shape.window, "shift_size": shape.shift}


def ours(shape: Shape, backend: str | None = None) -> Callable[..., Tensor]:
    options = _options(shape)

    def function(qkv: Tensor, table: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        return accel.window_attention(qkv, table, logit_scale=logit_scale, **options, backend=backend)

    return function


def ours_block(shape: Shape, backend: str | None = None) -> Callable[..., Tensor]:
    options = _options(shape)

    def function(x: Tensor, table: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        qkv = F.linear(x, w1, b1)
        return F.linear(accel.window_attention(qkv, table, qkv_bias=b1, **options, backend=backend), w2, b2)

    return function


# --- cases ---


def _providers(
    mine: Callable[..., Callable[..., Tensor]],
    theirs: Callable[..., Callable[..., Tensor]],
    shape: Shape,
    device: str,
) -> tuple[Provider, ...]:
    def backend(*inputs: Tensor) -> str:
        qkv = inputs[0]
        if qkv.shape[-1] == shape.channels:  # a block: the op sees what the projection makes of it
            qkv = qkv.new_empty((*qkv.shape[:-1], 3 * shape.channels))
        scale = {"logit_scale": inputs[2]} if shape.cosine else {}
        return dispatch.select(OP, OP.prepare(qkv, inputs[1], **_options(shape), **scale)).name

    return (
        Provider("accel", lambda: mine(shape), backend),
        Provider("eager", lambda: theirs(shape, device)),
        Provider("compile", lambda: compiled(theirs(shape, device)), lambda *inputs: "inductor"),
        Provider("sdpa", lambda: theirs(shape, device, _attend_sdpa)),
    )


def _inputs(shape: Shape, device: str, dtype: torch.dtype, with_block: bool) -> Callable[..., tuple[Tensor, ...]]:
    C, rows = shape.channels, math.prod(2 * w - 1 for w in shape.window)

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        def normal(*size: int, std: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=generator, device=device) * std).to(dtype)

        table = normal(rows, shape.heads, std=0.5)
        if with_block:
            x = normal(shape.batch, *shape.size, C)
            # projections that keep the variance, so that the softmax is neither flat nor a single one
            return (
                x, table, normal(3 * C, C, std=C**-0.5), normal(3 * C, std=0.1), normal(C, C, std=C**-0.5), normal(C)
            )  # fmt: skip
        qkv = normal(shape.batch, *shape.size, 3 * C)
        if not shape.cosine:
            return qkv, table
        return qkv, table, (torch.full((shape.heads, 1, 1), math.log(10.0), device=device)).to(dtype)

    return make


def costs(shape: Shape, itemsize: int, modes: Sequence[str], with_block: bool = False) -> dict[str, Cost]:
    """Forward reads q, k, v and writes the output; backward reads them and the output's gradient and writes theirs.

    Windows are multiplied twice forward (q·k, p·v) and five times backward. A block adds its two projections.
    """
    C, T = shape.channels, shape.batch * math.prod(shape.size)
    matmul = 2 * shape.batch * math.prod(shape.padded) * shape.tokens * C
    forward, backward = Cost(2 * matmul, 4 * T * C * itemsize), Cost(5 * matmul, 7 * T * C * itemsize)
    if with_block:  # the least traffic of a block: x in and y out; backward x, dy in and dx out; the weights beside
        weights = 4 * C * C
        forward = Cost(forward.flops + 2 * T * weights, (2 * T * C + weights) * itemsize)
        backward = Cost(backward.flops + 4 * T * weights, (3 * T * C + 2 * weights) * itemsize)
    both = Cost(forward.flops + backward.flops, forward.moved + backward.moved)
    known = {"forward": forward, "backward": backward, "forward+backward": both}
    return {mode: known[mode] for mode in modes}


def _case(shape: Shape, device: str, dtype: torch.dtype, modes: Sequence[str], with_block: bool) -> Case:
    mine, theirs = (ours_block, block) if with_block else (ours, core)
    return Case(
        op=NAME,
        group=shape.group,
        variant="shift " + ("0" if not any(shape.shift) else "×".join(map(str, dict.fromkeys(shape.shift)))),
        shape=str(shape),
        dtype=dtype,
        inputs=_inputs(shape, device, dtype, with_block),
        reference=mine(shape, "reference"),
        providers=_providers(mine, theirs, shape, device),
        costs=costs(shape, dtype.itemsize, modes, with_block),
        family="softmax",
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op, those that goals are about first."""
    modes = ["forward", "backward", *(["forward+backward"] if device == "cpu" else [])]
    batches = (4,) if device == "cpu" else (64, 128, 256)
    for dtype in dtypes:
        for batch in batches:
            for shape in _stages(batch, "" if device == "cpu" else f"B{batch} "):
                yield _case(shape, device, dtype, modes, with_block=False)
        for shape in _stages(batches[0], "block "):
            yield _case(shape, device, dtype, modes, with_block=True)
    for dtype in dtypes:
        for shape in _others(batches[0]):
            yield _case(shape, device, dtype, modes, with_block=False)


SHORT = Short(
    rivals=("eager",),
    cpu=(
        Pick("Swin stage 1, shifted", "stage 1", "shift 3", ("forward", "forward+backward")),
        Pick("Swin stage 1, not shifted", "stage 1", "shift 0", ("forward", "forward+backward")),
    ),
    cuda=(
        Pick("Swin stage 1, batch 64", "B64 stage 1", "shift 3"),
        Pick("the block around it", "block stage 1", "shift 3"),
    ),
)


# --- goals ---


def _cpu_goals() -> Iterator[Goal]:
    """Against eager; bf16 is held to more, for dot products of bf16 are twice as fast as fp32's where they are used."""
    forward = {("stage 1", "fp32"): 2.5, ("stage 2", "fp32"): 2.0, ("stage 1", "bf16"): 3.0, ("stage 2", "bf16"): 3.0}
    both = {"fp32": 1.7, "bf16": 2.0}
    for (group, dtype), bound in forward.items():
        for mode, least, stretch in (("forward", bound, 3.0), ("forward+backward", both[dtype], 2.0)):
            where = {"group": group, "dtype": dtype, "mode": mode}
            name = f"core {mode}, {group}, {dtype}"
            further = None if dtype == "bf16" else stretch
            yield Goal(f"{name}, against eager", NAME, "speedup", "cpu", where, "eager", least, stretch=further)
            yield Goal(f"{name}, against compile", NAME, "speedup", "cpu", where, "compile", 1.0)


def _cuda_goals() -> Iterator[Goal]:
    for batch, (group, *_), (mode, bound) in product((64, 128, 256), STAGES[:2], (("forward", 1.5), ("backward", 2.0))):
        where = {"group": f"B{batch} {group}", "dtype": "bf16", "mode": mode}
        name = f"core {mode}, B{batch} {group}, bf16, times the memory floor"
        yield Goal(name, NAME, "floor", "cuda", where, at_most=bound)
    for (group, *_), (rival, bound) in product(STAGES[:2], (("eager", 3.0), ("compile", 1.5))):
        where = {"group": f"block {group}", "dtype": "bf16", "mode": "forward"}
        yield Goal(f"block {group}, bf16, against {rival}", NAME, "speedup", "cuda", where, rival, bound)


GOALS = (*_cpu_goals(), *_cuda_goals())
