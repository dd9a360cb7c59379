"""Mixed chunk attention by other kernels: tokens as a batch of chunks, gated attention of each by its op, and products
of torch across them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.backends import inner_dtype
from accel.ops.linear import gau_attention as gau

# --- tokens as chunks ---


@dataclass(frozen=True)
class Group:
    """Sequences of one length, whose chunks follow each other."""

    sequences: int
    chunks: int  # of each
    whole: int  # of these, as many as are no shorter than the others
    scale: float  # of their linear part


@dataclass(frozen=True)
class Chunks:
    """``(B, T, size)`` as ``(chunks, span, size)``, zeros behind a chunk that is shorter."""

    args: Any
    groups: list[Group]
    slots: Tensor | None = None  # packed: where in the chunks each token lies
    seen: Tensor | None = None  # (chunks, span), False where a key takes no part; None where all do

    @staticmethod
    def of(args: Any) -> Chunks:
        def group(sequences: int, tokens: int) -> Group:
            scale = args.lin_scale / max(tokens, 1) if args.by_length else args.lin_scale
            chunks = (tokens + args.span - 1) // args.span
            return Group(sequences, chunks, tokens // args.chunk_size, scale)

        batch, tokens = args.v.shape[:2]
        if args.cu_seqlens is None:
            whole = Chunks(args, [group(batch, tokens)])
            return whole if args.key_mask is None and tokens % args.span == 0 else whole._with_mask()
        edges = args.cu_seqlens.tolist()
        groups = [group(1, end - first) for first, end in itertools.pairwise(edges)]
        begin = itertools.accumulate([g.chunks * args.span for g in groups], initial=0)
        at = [
            torch.arange(first, first + end - a)
            for first, (a, end) in zip(begin, itertools.pairwise(edges), strict=False)
        ]
        return Chunks(args, groups, torch.cat(at).to(args.v.device))._with_mask()

    def _with_mask(self) -> Chunks:
        mask = self.args.key_mask
        if mask is None:
            mask = self.args.v.new_ones(self.args.v.shape[:2], dtype=torch.bool)
        return replace(self, seen=self.cut(mask[..., None])[..., 0])

    @property
    def count(self) -> int:
        return sum([g.sequences * g.chunks for g in self.groups])

    def cut(self, x: Tensor) -> Tensor:
        span = self.args.span
        if self.slots is not None:
            return x.new_zeros((self.count * span, x.shape[2])).index_copy(0, self.slots, x[0]).unflatten(0, (-1, span))
        rest = -x.shape[1] % span
        return F.pad(x, (0, 0, 0, rest)).reshape(self.count, span, x.shape[2])

    def join(self, x: Tensor) -> Tensor:
        """The way back."""
        if self.slots is not None:
            return x.flatten(0, 1).index_select(0, self.slots)[None]
        batch, tokens = self.args.v.shape[:2]
        return x.reshape(batch, self.groups[0].chunks * self.args.span, x.shape[2])[:, :tokens]

    def shown(self, x: Tensor) -> Tensor:
        """Chunks with zeros in place of keys that take no part."""
        return x if self.seen is None else torch.where(self.seen[..., None], x, 0.0)

    def by_group(self, x: Tensor) -> list[Tensor]:
        """``(chunks, ...)`` as ``(sequences, chunks, ...)`` of each group."""
        parts = x.split([g.sequences * g.chunks for g in self.groups])
        return [part.unflatten(0, (g.sequences, g.chunks)) for part, g in zip(parts, self.groups, strict=True)]

    def scaled(self, x: Tensor) -> Tensor:
        """Chunks times the scale of their sequence's linear part."""
        parts = [part * g.scale for part, g in zip(self.by_group(x), self.groups, strict=True)]
        return torch.cat([part.flatten(0, 1) for part in parts])

    def pairs(self, q: Tensor, k: Tensor, v: Tensor) -> gau.Args:
        """The gated attention of all chunks."""
        args = self.args
        return gau.Args(
            q=q[:, None],
            k=k[:, None],
            v=v[:, None],
            gate=None,
            bias=None,
            line=args.line,
            table=args.table,
            mask=None if self.seen is None else self.seen[:, None, None],
            bias_index=args.bias_index,
            rows=args.rows,
            seed=args.seed,
            grid=args.grid,
            rule="causal" if args.causal else "all",
            packed=False,
            activation=args.activation,
            scale=args.quad_scale,
            dropout_p=args.dropout_p,
            keep_sums=False,
        )


# --- the linear part ---


def sums_before(chunks: Chunks, made: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of ``made (chunks, s, E)`` the sum over the chunks before each, that of all where there is no order; and the sum
    after the whole chunks of each sequence, ``(N, s, E)``."""
    if not chunks.args.causal:
        totals = [part.sum(1, keepdim=True) for part in chunks.by_group(made)]
        each = [x.expand(-1, g.chunks, -1, -1) for x, g in zip(totals, chunks.groups, strict=True)]
        return torch.cat([x.flatten(0, 1) for x in each]), torch.cat([x[:, 0] for x in totals])
    before, after, first = [], [], 0
    for part, g in zip(chunks.by_group(made), chunks.groups, strict=True):
        begin = made.new_zeros((g.sequences, *made.shape[1:]))
        if state is not None:
            begin = state[first : first + g.sequences].to(made.dtype)
        running = torch.cat([begin[:, None], part], 1).cumsum(1)
        before.append(running[:, :-1].flatten(0, 1))
        after.append(running[:, g.whole])
        first += g.sequences
    return torch.cat(before), torch.cat(after)


def _sums_after(chunks: Chunks, made: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same from behind: the sum over the chunks after each, with ``state`` behind the whole ones; and that before
    the first chunk."""
    if not chunks.args.causal:
        return sums_before(chunks, made, None)
    after, first_of_all, first = [], [], 0
    for part, g in zip(chunks.by_group(made), chunks.groups, strict=True):
        end = made.new_zeros((g.sequences, 1, *made.shape[1:]))
        running = torch.cat([part, end], 1).flip(1).cumsum(1).flip(1)
        if state is not None:
            running[:, : g.whole + 1] += state[first : first + g.sequences, None].to(made.dtype)
        after.append(running[:, 1:].flatten(0, 1))
        first_of_all.append(running[:, 0])
        first += g.sequences
    return torch.cat(after), torch.cat(first_of_all)


# --- forward and backward ---


def _within(args: gau.Args) -> Any:
    """The first backend of gated attention that computes forward and backward of these chunks."""
    return next(b for b in gau.OP.backends if b.backward is not None and b.why_not(args) is None)


def forward(args: Any) -> tuple[Tensor, Tensor, Tensor]:
    chunks, inner = Chunks.of(args), inner_dtype(args.v)
    v = chunks.cut(args.v)
    pairs = chunks.pairs(chunks.cut(args.quad_q), chunks.cut(args.quad_k), v)
    made = _within(pairs).forward(*pairs)[0][:, 0].to(inner)
    k, v = (chunks.shown(x).to(inner) for x in (chunks.cut(args.lin_k), v))
    before, after = sums_before(chunks, k.mT @ v, args.state)
    made = chunks.join(made + chunks.scaled(chunks.cut(args.lin_q).to(inner)) @ before)
    out = made if args.gate is None else made * args.gate
    nothing = args.v.new_empty(0)
    return (
        out.to(args.v.dtype).contiguous(),
        after.contiguous() if args.return_state else nothing.to(inner),
        made.to(args.v.dtype).contiguous() if args.keep_sums else nothing,
    )


def backward(
    grad_out: Tensor | None, grad_state: Tensor | None, sums: Tensor, args: Any, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    chunks, inner = Chunks.of(args), inner_dtype(args.v)
    if grad_out is None:
        grad_out = torch.zeros_like(args.v)
    if not args.return_state:
        grad_state = None
    upstream = grad_out.to(inner) if args.gate is None else grad_out.to(inner) * args.gate
    g, v = chunks.cut(upstream), chunks.cut(args.v)
    pairs = chunks.pairs(chunks.cut(args.quad_q), chunks.cut(args.quad_k), v)
    wanted = [False, False, *needs[1:3]]
    found = _within(pairs).backward(g.to(args.v.dtype)[:, None], sums.new_empty(0), *pairs, wanted)
    quad_q, quad_k, of_v, _, _, line, table = found
    k, v = (chunks.shown(x).to(inner) for x in (chunks.cut(args.lin_k), v))
    scaled = chunks.scaled(g)
    before, _ = sums_before(chunks, k.mT @ v, args.state)
    after, initial = _sums_after(chunks, chunks.cut(args.lin_q).to(inner).mT @ scaled, grad_state)
    gradients = (
        (quad_q[:, 0], args.quad_q),
        (quad_k[:, 0], args.quad_k),
        (scaled @ before.mT, args.lin_q),
        (chunks.shown(v @ after.mT), args.lin_k),
        (chunks.shown(of_v[:, 0].to(inner) + k @ after), args.v),
    )
    nothing = args.v.new_empty(0, dtype=inner)
    return (
        *[chunks.join(made).to(x.dtype).contiguous() for made, x in gradients],
        (grad_out * sums).contiguous() if args.gate is not None and needs[0] else nothing,
        line,
        table,
        initial.contiguous() if args.state is not None and needs[3] else nothing,
    )
