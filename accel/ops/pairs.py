"""Which keys a query sees and what is added to its logits, for every op that weighs pairs of queries and keys: the
checks of a public call, rules as the tensors kernels read, and the definition of both in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import memo
from accel.backends import check_beside, inner_dtype
from accel.ops.packed import Packed, read_packed
from accel.ops.rules import (
    BiasIndex,
    BlockCausal,
    BlockDiffusion,
    Pattern,
    PrefixLM,
    Queries,
    at_most,
    grid_index,
    key_intervals,
)
from accel.ops.tables import Turn, check_table, distance_bias

_recent = memo.Recent()


def broadcast(x: Tensor, name: str, full: Sequence[int]) -> Tensor:
    """``x`` as a 4-D tensor whose sizes are those of ``full`` or 1."""
    if x.dim() > 4:
        raise ValueError(f"{name} must broadcast to {tuple(full)} (B, Hq, T, S), got {tuple(x.shape)=}")
    asked = x.requires_grad and x.is_leaf  # for the gradient of each of its elements
    x = x.reshape([1] * (4 - x.dim()) + list(x.shape))
    if any([n not in (1, m) for n, m in zip(x.shape, full, strict=True)]):
        raise ValueError(f"{name} must broadcast to {tuple(full)} (B, Hq, T, S), got {tuple(x.shape)}")
    # an axis that was expanded is read and differentiated once
    for axis in range(0 if asked else 4):
        if x.shape[axis] > 1 and x.stride(axis) == 0:
            x = x.narrow(axis, 0, 1)
    return x


class Rule(NamedTuple):
    left: int
    right: int
    top_left: bool
    patterns: tuple[Pattern, ...]

    @property
    def everything(self) -> bool:
        return self.left < 0 and self.right < 0 and not self.patterns


def read_rule(causal: bool | str, window: Sequence[int] | None, pattern: Any) -> Rule:
    if causal not in (False, True, "top_left", "bottom_right"):
        raise ValueError(f"causal must be True, False, 'top_left' or 'bottom_right', got {causal=}")
    left, right = -1, -1
    if window is not None:
        if isinstance(window, int) or len(window) != 2 or any([not isinstance(n, int) or n < -1 for n in window]):
            raise ValueError(f"window must be (left, right), each at least 0, or -1 for no bound, got {window=}")
        left, right = window
    if causal:
        right = 0
    patterns = () if pattern is None else tuple(pattern) if isinstance(pattern, list | tuple) else (pattern,)
    for p in patterns:
        if not isinstance(p, PrefixLM | BlockCausal | BlockDiffusion):
            raise TypeError(f"pattern must be PrefixLM, BlockCausal or BlockDiffusion, got {p!r}")
    if sum([isinstance(p, BlockDiffusion) for p in patterns]) > 1:
        raise ValueError(f"at most one BlockDiffusion, got {patterns}")
    return Rule(left, right, causal == "top_left", patterns)


def check_patterns(rule: Rule, batch: int, queries: int, keys: int, packed: Packed | None) -> None:
    for p in rule.patterns:
        if isinstance(p, BlockDiffusion):
            if queries != keys or (packed is not None and not packed.same):
                raise ValueError(f"{p} needs as many queries as keys, got T={queries}, S={keys}")
            odd = queries % 2
            if packed is not None and packed.q.device.type == "cpu" and not torch.compiler.is_compiling():
                odd = int((packed.q % 2).any())
            if odd:
                raise ValueError(f"{p} needs sequences of a noised and a clean half, of even length, got {queries}")
        if isinstance(p, PrefixLM):
            _check_prefix(p, batch if packed is None else packed.sequences)


def _check_prefix(p: PrefixLM, count: int) -> None:
    if isinstance(p.lengths, int):
        if p.lengths < 0:
            raise ValueError(f"the lengths of PrefixLM must be at least 0, got {p.lengths}")
        return
    given = torch.as_tensor(p.lengths)
    if tuple(given.shape) != (count,):
        raise ValueError(f"PrefixLM needs a length for each of {count} sequences, got {tuple(given.shape)}")
    if given.device.type == "cpu" and not torch.compiler.is_compiling() and count and int(given.min()) < 0:
        raise ValueError(f"the lengths of PrefixLM must be at least 0, got {int(given.min())}")


def make_rows(rule: Rule, q: Tensor, keys: int, packed: Packed | None, turn: Turn, last: int) -> Tensor:
    """The tensor ``rows`` of :class:`Pairs`; the same one again for the same rule, sizes and offsets."""
    fixed = all([not isinstance(p, PrefixLM) or isinstance(p.lengths, int) for p in rule.patterns])
    if not fixed or not memo.may_remember(q.detach() if q.requires_grad else q):
        return _make_rows(rule, q, keys, packed, turn, last)
    patterns = tuple([(type(p), p.lengths if isinstance(p, PrefixLM) else p.n) for p in rule.patterns])
    key = (q.device, q.shape[2], keys, rule[:3], patterns, turn, last)
    recent = _recent if packed is None else packed.recent
    return recent.get_or_make(key, lambda: _make_rows(rule, q, keys, packed, turn, last))


def _make_rows(rule: Rule, q: Tensor, keys: int, packed: Packed | None, turn: Turn, last: int) -> Tensor:
    batch, queries = q.shape[0], q.shape[2]
    at = torch.arange(queries, device=q.device, dtype=torch.int32)[None]
    first_key: Any = 0
    add: Any = turn.add
    if packed is None:
        sequence = torch.arange(batch, device=q.device)[:, None]
        aligned = at if rule.top_left else at + (keys - queries)
        where = Queries(at, aligned, queries, keys, sequence)
        real = None
    else:
        sequence = (torch.searchsorted(packed.q, at[0], right=True) - 1).clamp(0, packed.sequences - 1)[None]
        start, first_key = packed.q[sequence], packed.k[sequence]
        count, key_count = packed.q[sequence + 1] - start, packed.k[sequence + 1] - first_key
        real = at < packed.q[-1]
        position = at - start
        aligned = position if rule.top_left else position + (key_count - count)
        where = Queries(position, aligned, count, key_count, sequence)
        add = add + key_count - count if turn.by_length else add
    bounds = [
        (at_most(b.clamp_min(0), where.keys) + first_key).clamp(0, keys)
        for b in key_intervals(where, rule.left, rule.right, rule.patterns)
    ]
    if real is not None:
        bounds = [torch.where(real, b, 0) for b in bounds]
    shift = where.position + first_key + add
    return torch.stack(torch.broadcast_tensors(*bounds, shift.clamp(0, last)), -1).to(torch.int32).contiguous()


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_beside(x, name, q if isinstance(q, Tensor) else x, "q")
        if x.dim() != 4:
            raise ValueError(f"{name} must be (B, H, tokens, head size), got {tuple(x.shape)=}")
    if not (q.dtype == k.dtype == v.dtype):
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    b, h, _, d = q.shape
    problem = ""
    if k.shape[:3] != v.shape[:3] or b != k.shape[0] or d != k.shape[3]:
        problem = "q (B, Hq, T, D), k (B, Hkv, S, D) and v (B, Hkv, S, E) do not fit"
    elif h != 0 and (k.shape[1] == 0 or h % k.shape[1]):
        problem = "the heads of k and v must divide those of q"
    if problem:
        raise ValueError(f"{problem}: {tuple(q.shape)=}, {tuple(k.shape)=}, {tuple(v.shape)=}")


def check_per_head(x: Tensor | None, name: str, q: Tensor) -> None:
    if x is None:
        return
    check_beside(x, name, q, "q")
    if tuple(x.shape) != (q.shape[1],):
        raise ValueError(f"{name} must be ({q.shape[1]},), one per query head, got {tuple(x.shape)=}")


def check_numbers(scale: float | None, dropout_p: float) -> None:
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale=}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p=}")


class Pairs(NamedTuple):
    """The masks and biases of a call as backends receive them: fields of the same names in the op's ``Args``.

    A bias that depends on query − key only (Toeplitz, T5, ALiBi, together) is ``line``; query i and key j take
    ``line[h, shift_i − j]``, with ``shift_i`` from ``rows`` or, where that is None, ``i + S − 1``.
    """

    bias: Tensor | None  # (B or 1, Hq or 1, T or 1, S or 1) floating, added
    line: Tensor | None  # (Hq, L) fp32 (fp64 beside fp64), added
    table: Tensor | None  # (R, Hq) fp32 (fp64 beside fp64), added at index or grid
    mask: Tensor | None  # (B or 1, Hq or 1, T or 1, S or 1) bool
    bias_index: Tensor | None  # (T, S) int32 or int64 contiguous, rows of the table
    rows: Tensor | None  # (B or 1, T, 5) int32: keys [r0, r1) and [r2, r3) are seen, r0 <= r1, r2 <= r3; then shift_i
    grid: list[int]  # [h, w, extra] of Grid2D in place of bias_index, else empty
    rule: str  # what rows says: "all" (rows is None), "causal" (key <= query position, T = S or top-left), "other"


def read_pairs(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool | str,
    window: Sequence[int] | None,
    mask: Tensor | None,
    pattern: Pattern | Sequence[Pattern] | None,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: BiasIndex | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None = None,
) -> Pairs:
    """Check what a public call says of the pairs of ``q (B, Hq, T, ·)`` and ``k (B, Hkv, S, ·)``."""
    batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    full = (batch, heads, queries, keys)
    rule = read_rule(causal, window, pattern)
    packed = read_packed(cu_seqlens_q, cu_seqlens_k, q, k)
    check_patterns(rule, batch, queries, keys, packed)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = getattr(mask, "dtype", type(mask).__name__)
            raise TypeError(f"mask must be boolean, True where a key takes part; what is added is bias; got {kind}")
        if mask.device != q.device:
            raise ValueError(f"mask is on {mask.device} but q is on {q.device}")
        mask = broadcast(mask, "mask", full)
    if bias is not None:
        check_beside(bias, "bias", q, "q")
        bias = broadcast(bias, "bias", full)
    if packed is not None and (mask is not None or bias is not None):
        given = {n: tuple(x.shape) for n, x in (("mask", mask), ("bias", bias)) if x is not None}
        raise ValueError(f"in packed form pairs are given by rules, not by dense tensors: {given}")
    check_per_head(alibi_slopes, "alibi_slopes", q)
    by_distance, index, grid = check_table(bias_table, bias_index, q, keys, packed)

    inner = inner_dtype(q)
    table = bias_table if by_distance is None else None
    turn = Turn(keys - 1)
    line = None
    if by_distance is not None or alibi_slopes is not None:
        ranked = bias_table if by_distance is not None else None
        line, turn = distance_bias(ranked, by_distance, alibi_slopes, queries, keys, packed, inner)
    elif packed is not None:
        turn = Turn(0)  # nothing reads the place, only where it jumps
    last = max(queries + keys - 2, 0) if line is None else line.shape[1] - 1 + keys
    plain = rule.everything and packed is None
    causal_only = rule.right == 0 and rule.left < 0 and not rule.patterns and packed is None
    return Pairs(
        bias=bias,
        line=line,
        table=None if table is None else table.to(inner).contiguous(),
        mask=mask,
        bias_index=index,
        rows=None if plain else make_rows(rule, q, keys, packed, turn, last),
        grid=grid,
        rule="all" if plain else "causal" if causal_only and (rule.top_left or queries == keys) else "other",
    )


# --- the definition; ``given`` has the fields of Pairs ---

ALL = slice(None)


def adds(given: Any) -> bool:
    """Whether something is added to the logits: then all keys of a row may carry one huge number, or be hidden."""
    return given.bias is not None or given.line is not None or given.table is not None


def part(x: Tensor, queries: slice, keys: slice) -> Tensor:
    """Of a tensor that broadcasts to ``(B, Hq, T, S)`` what belongs to some queries and keys."""
    return x[:, :, queries if x.shape[2] > 1 else ALL, keys if x.shape[3] > 1 else ALL]


def line_places(given: Any, queries: int, keys: int, i: slice, j: slice, device: torch.device) -> Tensor:
    """Where in its line the pair of query ``i`` and key ``j`` finds its bias, ``(B or 1, T, S)`` int64."""
    rows: Tensor | None = given.rows
    every = torch.arange(queries, device=device)[None] + keys - 1 if rows is None else rows[..., 4].to(torch.int64)
    at = every[:, i, None] - torch.arange(keys, device=device)[j]
    return at.clamp(0, given.line.shape[1] - 1)


def table_places(given: Any, i: slice, j: slice, device: torch.device) -> Tensor:
    """The row of the table of each pair, ``(T, S)`` int64."""
    if given.grid:
        return grid_index(given.grid, device, i, j)
    index: Tensor = given.bias_index[i, j]
    return index.to(torch.int64)


def add_biases(logits: Tensor, given: Any, queries: int, keys: int, i: slice = ALL, j: slice = ALL) -> Tensor:
    """``logits`` of queries ``i`` and keys ``j``, of so many in all, with what the call adds to them."""
    if given.bias is not None:
        logits = logits + part(given.bias, i, j).to(logits.dtype)
    if given.line is not None:
        places = line_places(given, queries, keys, i, j, logits.device)
        logits = logits + given.line.to(logits.dtype)[:, places].transpose(0, 1)
    if given.table is not None:
        places = table_places(given, i, j, logits.device)
        logits = logits + given.table.to(logits.dtype)[places].permute(2, 0, 1)
    return logits


def visible(given: Any, keys: int, device: torch.device, i: slice = ALL, j: slice = ALL) -> Tensor | None:
    """Whether a query may see a key, ``(B or 1, H or 1, T or 1, S or 1)``; None where all is seen."""
    seen = None if given.mask is None else part(given.mask, i, j)
    if given.rows is not None:
        key = torch.arange(keys, device=device, dtype=torch.int32)[j]
        first0, end0, first1, end1 = [given.rows[:, None, i, n : n + 1] for n in range(4)]
        ruled = ((key >= first0) & (key < end0)) | ((key >= first1) & (key < end1))
        seen = ruled if seen is None else seen & ruled
    return seen
