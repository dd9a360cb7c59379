"""The weights of gated attention, and the op strip by strip: 256 queries at a time with torch's own products, so that
memory is linear in the tokens. Weights are kept in fp32, since those of 1/T² have no digits in fp16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accel import philox
from accel.backends import inner_dtype
from accel.ops.layout import empty_like_layout, finite
from accel.ops.pairs import ALL, add_biases, adds, line_places, part, table_places, visible

ROWS = 256

# --- activations ---


class Activation(NamedTuple):
    """A weight that depends on its own logit alone, and its derivative."""

    weight: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _laplace_argument(x: Tensor) -> Tensor:
    return (x - math.sqrt(0.5)) * math.sqrt(2 * math.pi)  # (x − μ) / (σ√2) for σ = √(1/4π)


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _sigmoid_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


BY_PAIR = {
    "relu2": Activation(lambda x: torch.relu(x).square(), lambda x: 2 * torch.relu(x)),
    # erfc, not 1 + erf, which leaves small weights no digits
    "laplace": Activation(
        lambda x: torch.special.erfc(-_laplace_argument(x)) / 2,
        lambda x: math.sqrt(2) * torch.exp(-_laplace_argument(x).square()),
    ),
    "silu": Activation(F.silu, _silu_slope),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_slope),
}
BY_ROW = ("softmax", "softmax_plus")
ACTIVATIONS = (*BY_PAIR, *BY_ROW)


def row_factor(name: str, hidden: Tensor | None, x: Tensor) -> Tensor | float:
    """What ``softmax_plus`` multiplies the logits of a row by: ln l / ln 512 for l live keys."""
    if name == "softmax":
        return 1.0
    if hidden is None:
        return math.log(max(x.shape[-1], 1)) / math.log(512)
    live = x.shape[-1] - hidden.expand(x.shape).sum(-1, keepdim=True)
    return torch.log(live.clamp_min(1).to(x.dtype)) / math.log(512)


def weigh(name: str, x: Tensor, hidden: Tensor | None) -> Tensor:
    """Logits to weights; those of ``hidden`` pairs, whose logits are finite, are 0."""
    if name in BY_PAIR:
        w = BY_PAIR[name].weight(x)
        return w if hidden is None else torch.where(hidden, 0.0, w)
    x = x * row_factor(name, hidden, x)
    if x.shape[-1] == 0:
        return x
    x = x if hidden is None else torch.where(hidden, -math.inf, x)
    top = x.detach().amax(-1, keepdim=True)
    nothing = top == -math.inf
    w = torch.exp(x - torch.where(nothing, 0.0, top))
    w = w / torch.where(nothing, 1.0, w.sum(-1, keepdim=True))
    return w if hidden is None else torch.where(hidden, 0.0, w)  # also where the row's sum is NaN


# --- pairs of some queries with some keys ---


def times(a: Tensor, b: Tensor) -> Tensor:
    """``(B, Hq, n, x)`` by ``(B, Hkv, x, m)``, a head of the second for several of the first."""
    heads = b.shape[1]
    if a.shape[1] == heads:
        return a @ b
    made = a.reshape(a.shape[0], heads, -1, a.shape[3]) @ b
    return made.view(*a.shape[:3], b.shape[3])


def logits(args: Any, q: Tensor, k: Tensor, bad: Tensor | None, i: slice = ALL, j: slice = ALL) -> Tensor:
    """Of the queries ``i`` and the keys ``j`` of finite ``q`` and ``k``, NaN where a pair is ``bad``."""
    x = times(q[:, :, i] * args.scale, k[:, :, j].mT)
    if bad is not None:
        x = torch.where(bad, math.nan, x)
    return add_biases(x, args, args.q.shape[2], args.k.shape[2], i, j)


def hide(args: Any, x: Tensor, i: slice = ALL, j: slice = ALL) -> Tensor | None:
    """Which pairs weigh nothing: that are not seen, or to which a bias of −∞ was added. None where all weigh."""
    seen = visible(args, args.k.shape[2], x.device, i, j)
    hidden = None if seen is None else ~seen
    if adds(args):
        hidden = x == -math.inf if hidden is None else hidden | (x == -math.inf)
    return hidden


def keep(args: Any, i: slice, j: slice) -> Tensor | None:
    """What dropout multiplies the weights by."""
    if args.dropout_p == 0.0:
        return None
    (b, h, t), s = args.q.shape[:3], args.k.shape[2]
    at = [torch.arange(n, device=args.q.device) for n in (b * h, t, s)]
    position = (at[0].view(b, h, 1, 1) * t + at[1][i, None]) * s + at[2][j]
    kept = philox.bits_at(args.seed, position) >= philox.threshold(args.dropout_p)
    return kept.to(inner_dtype(args.q)) / (1.0 - args.dropout_p)


# --- strips ---


def _spans(args: Any) -> Iterator[tuple[slice, slice]]:
    """Strips of queries, each with the keys outside of which it sees none, as far as the host knows."""
    queries, keys = args.q.shape[2], args.k.shape[2]
    for start in range(0, queries, ROWS):
        i = slice(start, min(start + ROWS, queries))
        j = slice(0, keys)
        if args.rule == "causal":
            j = slice(0, min(keys, i.stop))
        elif args.rows is not None and args.rows.device.type == "cpu":
            ends = args.rows[:, i, :4].reshape(-1, 2)
            live = ends[ends[:, 0] < ends[:, 1]]
            j = slice(int(live[:, 0].min()), int(live[:, 1].max())) if len(live) else slice(0, 0)
        yield i, j


class _Clean(NamedTuple):
    """A main tensor in fp32 with what is not finite as 0, and which rows held such; None where none did."""

    values: Tensor
    bad: Tensor | None

    @staticmethod
    def of(x: Tensor, inner: torch.dtype) -> _Clean:
        x = x.to(inner)
        if x.device.type == "cpu" and math.isfinite(x.sum()):  # one pass; a sum that overflows costs time alone
            return _Clean(x, None)
        return _Clean(*finite(x))

    def of_query_heads(self, heads: int) -> Tensor | None:
        return None if self.bad is None else self.bad.repeat_interleave(heads // self.bad.shape[1], 1)


class _Strip(NamedTuple):
    """What forward and backward need alike of one strip."""

    logits: Tensor
    hidden: Tensor | None
    weights: Tensor  # before dropout
    keep: Tensor | None

    @property
    def kept(self) -> Tensor:
        return self.weights if self.keep is None else self.weights * self.keep


class _Call(NamedTuple):
    args: Any
    q: _Clean
    k: _Clean
    v: _Clean

    @staticmethod
    def of(args: Any) -> _Call:
        inner = inner_dtype(args.q)
        return _Call(args, *[_Clean.of(x, inner) for x in (args.q, args.k, args.v)])

    def strip(self, i: slice, j: slice) -> _Strip:
        bad = None
        heads = self.args.q.shape[1]
        bad_k = self.k.of_query_heads(heads)
        if self.q.bad is not None:
            bad = self.q.bad[:, :, i, None]
        if bad_k is not None:
            bad = bad_k[:, :, None, j] if bad is None else bad | bad_k[:, :, None, j]
        x = logits(self.args, self.q.values, self.k.values, bad, i, j)
        hidden = hide(self.args, x, i, j)
        if hidden is not None:
            x.masked_fill_(hidden, 0.0)
        return _Strip(x, hidden, weigh(self.args.activation, x, hidden), keep(self.args, i, j))

    def spoiled(self, strip: _Strip, j: slice) -> Tensor | None:
        """Which pairs bring a value that is not finite."""
        bad = self.v.of_query_heads(self.args.q.shape[1])
        if bad is None:
            return None
        bad = bad[:, :, None, j].expand(strip.weights.shape)
        return bad if strip.hidden is None else bad & ~strip.hidden


def forward(args: Any) -> tuple[Tensor, Tensor]:
    call = _Call.of(args)
    shape = (*args.q.shape[:3], args.v.shape[3])
    out = empty_like_layout(args.q, shape)
    sums = empty_like_layout(args.q, shape) if args.keep_sums else out.new_empty(0)
    for i, j in _spans(args):
        strip = call.strip(i, j)
        made = times(strip.kept, call.v.values[:, :, j])
        spoiled = call.spoiled(strip, j)
        if spoiled is not None:
            made = torch.where(spoiled.any(-1, keepdim=True), math.nan, made)
        if args.keep_sums:
            sums[:, :, i] = made
        out[:, :, i] = made if args.gate is None else made * args.gate[:, :, i]
    return out, sums


def _slopes(args: Any, strip: _Strip, grad: Tensor) -> Tensor:
    """The gradient of the logits, from that of the weights before dropout."""
    if args.activation in BY_PAIR:
        grad = grad * BY_PAIR[args.activation].slope(strip.logits)
    else:
        grad = strip.weights * (grad - (strip.weights * grad).sum(-1, keepdim=True))
        grad = grad * row_factor(args.activation, strip.hidden, grad)
    return grad if strip.hidden is None else grad.masked_fill_(strip.hidden, 0.0)


def _along_diagonals(x: Tensor) -> Tensor:
    """Sums of ``(H, n, m)`` over pairs of one i − j, from −(m − 1) on: ``(H, n + m − 1)``."""
    heads, n, m = x.shape
    skewed = F.pad(x.flip(-1), (0, n)).flatten(1)[:, : n * (m + n - 1)]  # rows one longer than they are read
    return skewed.view(heads, n, m + n - 1).sum(1)


def _sum_at(grad: Tensor, places: Tensor, rows: int) -> Tensor:
    """Sums of ``(N, H)`` over the rows with one place, in a fixed order: ``(rows, H)``."""
    made: Tensor = torch.ops.aten.embedding_dense_backward(grad, places, rows, -1, False)
    return made


class _Biases:
    """The gradients of bias, line and table; those that are not asked for stay empty."""

    def __init__(self, args: Any, needs: Sequence[bool]) -> None:
        small = (args.bias, args.line, args.table)
        shapes = [x.shape if x is not None and wanted else (0,) for x, wanted in zip(small, needs, strict=True)]
        self.args = args
        self.grads = [args.q.new_zeros(shape, dtype=inner_dtype(args.q)) for shape in shapes]

    def add(self, grad: Tensor, i: slice, j: slice) -> None:
        args, (bias, line, table) = self.args, self.grads
        if bias.numel():
            axes = [axis for axis in range(4) if bias.shape[axis] == 1]
            part(bias, i, j).add_(grad.sum(axes, keepdim=True) if axes else grad)
        if line.numel():
            queries, keys = args.q.shape[2], args.k.shape[2]
            if args.packed:
                places = line_places(args, queries, keys, i, j, grad.device).flatten()
                line.add_(_sum_at(grad.sum(0).flatten(1).t(), places, line.shape[1]).t())
            else:
                first = i.start - j.stop + keys
                made = _along_diagonals(grad.sum(0))
                line[:, first : first + made.shape[1]].add_(made)
        if table.numel():
            places = table_places(args, i, j, grad.device).flatten()
            table.add_(_sum_at(grad.sum(0).flatten(1).t(), places, table.shape[0]))


def backward(grad_out: Tensor, args: Any, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """The gradients of q, k, v, and of bias, line and table where ``needs`` says so."""
    call = _Call.of(args)
    inner = inner_dtype(args.q)
    grad_q = empty_like_layout(args.q, args.q.shape)
    # contiguous, so that products can be added to a part of them
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=inner).flatten(0, 1) for x in (args.k, args.v))
    biases = _Biases(args, needs)

    def add_turned(to: Tensor, a: Tensor, b: Tensor, j: slice) -> None:
        """Adds aᵀ·b, summed over the query heads of a key head, to the rows ``j``."""
        a, b = (x.reshape(to.shape[0], -1, x.shape[3]) for x in (a, b))
        to[:, j].baddbmm_(a.mT, b)

    for i, j in _spans(args):
        if j.stop <= j.start:
            grad_q[:, :, i] = 0.0
            continue
        strip = call.strip(i, j)
        upstream = grad_out[:, :, i].to(inner)
        if args.gate is not None:
            upstream = upstream * args.gate[:, :, i]
        add_turned(grad_v, strip.kept, upstream, j)
        grad = times(upstream, call.v.values[:, :, j].mT)
        spoiled = call.spoiled(strip, j)
        if spoiled is not None:
            grad = torch.where(spoiled, math.nan, grad)
        grad = _slopes(args, strip, grad if strip.keep is None else grad * strip.keep)
        biases.add(grad, i, j)
        grad_q[:, :, i] = times(grad, call.k.values[:, :, j]) * args.scale
        add_turned(grad_k, grad, call.q.values[:, :, i] * args.scale, j)
    made_k, made_v = (
        empty_like_layout(x, x.shape).copy_(grad.view(x.shape)) for x, grad in ((args.k, grad_k), (args.v, grad_v))
    )
    return grad_q, made_k, made_v, *biases.grads
