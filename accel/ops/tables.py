"""Biases from tables and slopes: what they become for kernels, a short line by distance or a table with its index."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accel import memo
from accel.backends import check_beside
from accel.ops.packed import Packed
from accel.ops.rules import BiasIndex, Grid2D, T5Buckets

INT32_MAX = 2**31 - 1

_recent = memo.Recent()


class _IndexFacts(NamedTuple):
    low: int
    high: int
    line: Tensor | None  # the values along i − j = −(S−1) .. T−1 where nothing else matters
    small: Tensor | None  # int32, where the index is of another type than the kernels read


_index_facts: memo.Facts[_IndexFacts] = memo.Facts()


def _along_diagonals(index: Tensor) -> Tensor:
    """The value on each diagonal of ``(T, S)``, int64, by i − j from −(S−1) on."""
    return torch.cat([index[0].flip(0), index[1:, 0]]).to(torch.int64)


def _as_kernels_read(index: Tensor) -> Tensor:
    return (index if index.dtype == torch.int64 else index.to(torch.int32)).contiguous()


def _read_index(index: Tensor) -> _IndexFacts:
    """Range and structure of an index."""
    with torch.inference_mode(False):  # a later call may save it for a backward
        toeplitz = torch.equal(index[1:, 1:], index[:-1, :-1])
        low, high = (int(x) for x in torch.aminmax(index))
        line = _along_diagonals(index) if toeplitz else None
        other = line is None and not (index.dtype in (torch.int32, torch.int64) and index.is_contiguous())
        fits = other and low > -INT32_MAX and high < INT32_MAX
        return _IndexFacts(low, high, line, index.to(torch.int32).contiguous() if fits else None)


class Turn(NamedTuple):
    """What a query's place in the line has added, so that key j finds its element at ``place − j``."""

    add: int
    by_length: bool = False  # and the keys of its sequence less the queries


def _bucket_rows(rule: T5Buckets, table: Tensor, length: int, keys: int) -> Tensor:
    """The table's row for each element of a line; the same tensor again for the same rule and sizes."""

    def make() -> Tensor:
        return rule.rows_of(torch.arange(length, device=table.device) - (keys - 1), table.shape[0])

    if not memo.may_remember(table):
        return make()
    return _recent.get_or_make((table.device, rule, table.shape[0], length, keys), make)


def distance_bias(
    table: Tensor | None,
    index: BiasIndex | None,
    slopes: Tensor | None,
    queries: int,
    keys: int,
    packed: Packed | None,
    inner: torch.dtype,
) -> tuple[Tensor | None, Turn]:
    """The line, and the turn that a query's place gets in it: ``shift = position + first key + turn``.

    Element m of the line is for query − key = m − (keys − 1), of the longest sequences in packed form; ALiBi counts
    from the last query beside the last key instead.
    """
    long_q, long_k = (queries, keys) if packed is None else (packed.longest_q, packed.longest_k)
    length = max(1, long_q + long_k - 1)
    device = table.device if table is not None else slopes.device if slopes is not None else None
    line = None
    ragged = packed is not None and not packed.same
    distance = torch.arange(length, device=device) - (long_k - 1)
    if table is not None:
        if isinstance(index, str):
            row = distance + (table.shape[0] - 1) // 2
            row = torch.arange(length, device=device) if packed is None else row.clamp(0, table.shape[0] - 1)
        elif isinstance(index, T5Buckets):
            row = _bucket_rows(index, table, length, long_k)
        else:
            assert isinstance(index, Tensor)
            row = index
        line = F.embedding(row, table.to(inner)).t()  # whose backward adds up in a fixed order
    if slopes is not None:
        if ragged and line is not None:
            raise NotImplementedError(
                "alibi_slopes with bias_table in packed form need queries and keys packed alike: where lengths differ, "
                "the two count distances from different ends"
            )
        if packed is None:
            distance = distance + (keys - queries)
        elif ragged:
            distance = torch.arange(length, device=device) - (long_q - 1)
        alibi = -slopes.to(inner)[:, None] * distance.abs().to(inner)
        line = alibi if line is None else line + alibi
    if packed is None:
        return line, Turn(keys - 1)
    if ragged and slopes is not None:
        return line, Turn(long_q - 1, by_length=True)
    return line, Turn(long_k - 1)


def check_table(
    table: Tensor | None, index: BiasIndex | None, q: Tensor, keys: int, packed: Packed | None
) -> tuple[BiasIndex | None, Tensor | None, list[int]]:
    """Check ``bias_table`` with ``bias_index``: a rule by distance, or ``None`` with an index tensor or a grid."""
    heads, queries = q.shape[1], q.shape[2]
    if table is None:
        if index is not None:
            raise ValueError(f"bias_index needs bias_table, got {index!r:.80}")
        return None, None, []
    check_beside(table, "bias_table", q, "q")
    if table.dim() != 2 or table.shape[1] != heads or table.shape[0] < 1:
        raise ValueError(f"bias_table must be (R, {heads}), a column per query head, got {tuple(table.shape)=}")
    rows = table.shape[0]
    if isinstance(index, str):
        if index != "toeplitz":
            raise ValueError(f"bias_index must be 'toeplitz', a rule or an integer tensor (T, S), got {index!r}")
        if packed is None and rows != queries + keys - 1:
            raise ValueError(f"a 'toeplitz' table has T + S − 1 = {queries + keys - 1} rows, got {tuple(table.shape)=}")
        if packed is not None:
            if rows % 2 == 0:
                raise ValueError(f"in packed form a 'toeplitz' table has its middle row at distance 0, got {rows} rows")
            far = max(packed.longest_q, packed.longest_k) - 1
            if packed.q.device.type == "cpu" and rows // 2 < far:
                raise ValueError(f"distances reach {far}, the {rows} rows of bias_table reach {rows // 2}")
        return index, None, []
    if isinstance(index, T5Buckets):
        return index, None, []
    if isinstance(index, Grid2D):
        if packed is not None:
            raise ValueError(f"{index} has one size: give sequences of {index.tokens} tokens as a batch, not packed")
        if (queries, keys) != (index.tokens, index.tokens) or rows != index.rows:
            raise ValueError(
                f"{index} is for T = S = {index.tokens} and a bias_table of {index.rows} rows, "
                f"got T={queries}, S={keys}, {tuple(table.shape)=}"
            )
        return None, None, [index.h, index.w, index.extra]
    if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        kind = getattr(index, "dtype", type(index).__name__)
        raise TypeError(f"bias_index must be an integer tensor, 'toeplitz', T5Buckets or Grid2D, got {kind}")
    if packed is not None:
        raise ValueError(f"in packed form bias_index is a rule, not a tensor of {tuple(index.shape)}")
    if tuple(index.shape) != (queries, keys):
        raise ValueError(f"bias_index must be ({queries}, {keys}), got {tuple(index.shape)=}")
    if index.device != q.device:
        raise ValueError(f"bias_index is on {index.device} but q is on {q.device}")
    if index.numel() == 0 or torch.compiler.is_compiling():
        return None, _as_kernels_read(index), []
    captured = memo.capturing(index)
    facts: _IndexFacts | None
    if captured:
        facts = _index_facts.known((index,))
    else:
        facts = _index_facts.get_or_read((index,), None, lambda: _read_index(index))
    if facts is not None and (facts.low < 0 or facts.high >= rows):
        raise ValueError(f"bias_index reaches from {facts.low} to {facts.high}, bias_table has rows 0 to {rows - 1}")
    line = None if facts is None else facts.line
    if captured:  # a graph reads the index at each replay, and outlives tensors that are remembered for it
        return (None, _as_kernels_read(index), []) if line is None else (_along_diagonals(index), None, [])
    assert facts is not None
    if line is not None:
        return line, None, []
    return None, index if facts.small is None else facts.small, []
