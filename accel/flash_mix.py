"""The mixed chunk attention of FLASH: gated attention within chunks, by its op, and linear attention across them, by
products of torch."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel import library
from accel.backends import check_beside, inner_dtype, integer
from accel.ops.linear.gau_attention import gau_attention
from accel.ops.packed import read_packed
from accel.ops.rules import BiasIndex, Grid2D


def flash_mix(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    chunk_size: int = 256,
    causal: bool = False,
    activation: str = "relu2",
    quad_scale: float | None = None,
    lin_scale: float | None = None,
    bias_table: Tensor | None = None,
    bias_index: BiasIndex | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Mixed chunk attention: every pair within a chunk by its logit, and all chunks through one sum of fixed size.

    .. math:: o_i = u_i \odot \Big( \sum_{j \in C(i)} f(a\, q_i \cdot k_j + t_{y(i,j)})\, v_j
        + b\, q'_i \sum_{j \in P(i)} k_j'^{\,T} v_j \Big)

    with q, k the quadratic and q', k' the linear queries and keys, C(i) the chunk of i (up to i itself where
    ``causal``) and P(i) the tokens of all earlier chunks where ``causal``, else all tokens; a is ``quad_scale``, b
    ``lin_scale``, t the ``bias_table`` and y its ``bias_index``, f the ``activation`` and u the ``gate``. Chunks are
    counted from the first token; the last may be shorter.

    Args:
        quad_q: ``(B, T, s)``; float32, bfloat16, float16, or float64. Under autocast all main tensors are cast.
        quad_k: ``(B, T, s)``.
        lin_q: ``(B, T, s)``, or any other size that it shares with ``lin_k``.
        lin_k: ``(B, T, s)``.
        v: ``(B, T, E)``.
        gate: ``(B, T, E)``; has a gradient, as all before.
        chunk_size: tokens of a chunk, at least 1.
        causal: query i sees tokens j <= i.
        activation: of :func:`accel.gau_attention`.
        quad_scale: 1 / ``chunk_size`` if None.
        lin_scale: if None, 1 / ``chunk_size`` where causal, else 1 / T, for a packed sequence its length.
        bias_table: ``(R, 1)``, has a gradient.
        bias_index: as for :func:`accel.gau_attention`, of a chunk: ``"toeplitz"`` takes 2·chunk_size − 1 rows, a tensor
            is ``(chunk_size, chunk_size)``. A shorter chunk uses the part for its distances.
        key_mask: boolean ``(B, T)``, True where a token takes part as a key, in both parts.
        cu_seqlens: int32 or int64 ``(N + 1,)``, rising from 0 to the number of tokens: the packed form, with a batch of
            1. Each sequence begins a chunk. Its values are read on the host.
        dropout_p: of the weights within chunks.
        initial_state: fp32 ``(B, s, E)``, ``(N, s, E)`` in packed form: :math:`\sum k'^T v` of chunks before the first
            token; causal only; has a gradient.
        return_state: also return that sum after the last whole chunk.
        backend: of :func:`accel.gau_attention`, for the part within chunks.

    Returns:
        ``(B, T, E)`` in the dtype of ``v``, or a pair with the state.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: shapes, sizes, names or devices that do not fit; the message holds them.

    Follows Hua et al., Transformer Quality in Linear Time (2022).
    """
    quad: dict[str, Any] = {
        "quad_scale": quad_scale,
        "bias_table": bias_table,
        "bias_index": bias_index,
        "dropout_p": dropout_p,
    }
    out, state = mix(
        functools.partial(gau_attention, backend=backend),
        *(quad_q, quad_k, lin_q, lin_k, v, gate, chunk_size, causal, activation, lin_scale, key_mask, cu_seqlens),
        *(initial_state, return_state),
        **quad,
    )
    return (out, state) if return_state else out


def mix(
    attend: Callable[..., Tensor],
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    chunk_size: int,
    causal: bool,
    activation: str,
    lin_scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    *,
    quad_scale: float | None = None,
    bias_table: Tensor | None = None,
    bias_index: BiasIndex | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """:func:`flash_mix` with ``attend`` for the part within chunks: the output, and the state."""
    main = [quad_q, quad_k, lin_q, lin_k, v, *([] if gate is None else [gate])]
    if all([isinstance(x, Tensor) and x.device == main[0].device for x in main]):
        main = [library.autocast(x) for x in main]
    _check(main, causal, key_mask, cu_seqlens, initial_state, return_state)
    chunk_size = integer(chunk_size)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size=}")
    for name, scale in (("quad_scale", quad_scale), ("lin_scale", lin_scale)):
        if scale is not None and not -math.inf < scale < math.inf:
            raise ValueError(f"{name} must be finite, got {scale=}")
    quad: dict[str, Any] = {"causal": causal, "activation": activation, "dropout_p": dropout_p}
    quad |= {"scale": 1.0 / chunk_size if quad_scale is None else quad_scale}
    of_all = _Call(functools.partial(attend, **quad), chunk_size, causal, lin_scale, bias_table, bias_index)
    if cu_seqlens is None:
        return of_all.mix(main, key_mask, initial_state)
    read_packed(cu_seqlens, None, quad_q[:, None], quad_k[:, None])
    made = []
    for n, (first, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        before = None if initial_state is None else initial_state[n : n + 1]
        made.append(of_all.mix([x[:, first:end] for x in main], None, before))
    return torch.cat([x for x, _ in made], 1), torch.cat([x for _, x in made])


def _check(
    main: list[Tensor],
    causal: bool,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    return_state: bool,
) -> None:
    names = ("quad_q", "quad_k", "lin_q", "lin_k", "v", "gate")
    for name, x in zip(names, main, strict=False):
        check_beside(x, name, main[0], names[0])
        if x.dim() != 3:
            raise ValueError(f"{name} must be (B, T, size), got {tuple(x.shape)=}")
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(names, main, strict=False))
    if len({x.dtype for x in main}) > 1:
        raise TypeError(f"all main tensors have one dtype, got {[x.dtype for x in main]}")
    quad_q, quad_k, lin_q, lin_k, v, *gates = main
    if any([x.shape[:2] != v.shape[:2] for x in main]) or any([x.shape != v.shape for x in gates]):
        raise ValueError(f"tokens, or the sizes of v and gate, do not fit: {shapes}")
    if quad_q.shape != quad_k.shape or lin_q.shape != lin_k.shape:
        raise ValueError(f"queries and keys do not fit: {shapes}")
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
            kind = getattr(key_mask, "dtype", type(key_mask).__name__)
            raise TypeError(f"key_mask must be boolean, True where a key takes part, got {kind}")
        if key_mask.shape != v.shape[:2] or key_mask.device != v.device:
            raise ValueError(f"key_mask must be (B, T) beside {shapes}, got {tuple(key_mask.shape)=}")
        if cu_seqlens is not None:
            raise ValueError(f"in packed form there is no padding to mask, got {tuple(key_mask.shape)=}")
    if (state is not None or return_state) and not causal:
        raise ValueError("a state is carried in causal order only: without, every token sees all")
    if state is not None:
        check_beside(state, "initial_state", v, "v")
        batch = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        wanted = (batch, lin_k.shape[2], v.shape[2])
        if state.dtype not in (torch.float32, inner_dtype(v)) or tuple(state.shape) != wanted:
            raise ValueError(f"initial_state must be float32 {wanted}, got {state.dtype} {tuple(state.shape)}")


@dataclass(frozen=True)
class _Call:
    attend: Callable[..., Tensor]
    chunk_size: int
    causal: bool
    lin_scale: float | None
    table: Tensor | None
    index: BiasIndex | None

    def mix(self, main: list[Tensor], key_mask: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sequences of one length: output, and the state after the whole chunks."""
        quad_q, quad_k, lin_q, lin_k, v, *gates = main
        within = self._within(quad_q, quad_k, v, key_mask)
        if key_mask is not None:
            lin_k, v = (x.masked_fill(~key_mask[..., None], 0.0) for x in (lin_k, v))
        scale = self.lin_scale
        if scale is None:
            scale = 1.0 / self.chunk_size if self.causal else 1.0 / max(v.shape[1], 1)
        with library.without_autocast(v):
            inner = inner_dtype(v)
            wide = lin_q.to(inner) * scale, lin_k.to(inner), v.to(inner)
            across, state = _across(*wide, self.chunk_size, self.causal, state)
            out = within.to(inner) + across
            for gate in gates:
                out = out * gate.to(inner)
            return out.to(v.dtype), state

    def _within(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Whole chunks as a batch, and a shorter one at the end."""
        whole, parts = v.shape[1] // self.chunk_size * self.chunk_size, []
        if whole:
            pieces = [x[:, :whole].unflatten(1, (-1, self.chunk_size)).flatten(0, 1) for x in (q, k, v)]
            mask = None if key_mask is None else key_mask[:, :whole].reshape(-1, 1, self.chunk_size)
            out = self.attend(*pieces, mask=mask, bias_table=self.table, bias_index=self.index)
            parts.append(out.unflatten(0, (v.shape[0], -1)).flatten(1, 2))
        if whole < v.shape[1] or not parts:
            table, index = _shortened(self.table, self.index, self.chunk_size, v.shape[1] - whole)
            mask = None if key_mask is None else key_mask[:, None, whole:]
            pieces = [x[:, whole:] for x in (q, k, v)]
            parts.append(self.attend(*pieces, mask=mask, bias_table=table, bias_index=index))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _across(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int, causal: bool, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``q`` times the sum of kᵀv over all tokens or, where causal, over the chunks before; and the sum of all."""
    if not causal:
        total = k.mT @ v
        return q @ total, total
    whole = v.shape[1] // chunk_size * chunk_size
    now = k.new_zeros((k.shape[0], k.shape[2], v.shape[2])) if state is None else state.to(k.dtype)
    made = []
    for first in range(0, whole, chunk_size):
        chunk = slice(first, first + chunk_size)
        made.append(q[:, chunk] @ now)
        now = torch.baddbmm(now, k[:, chunk].mT, v[:, chunk])
    if whole < v.shape[1] or not made:
        made.append(q[:, whole:] @ now)
    return torch.cat(made, 1), now


def _shortened(
    table: Tensor | None, index: BiasIndex | None, chunk_size: int, tokens: int
) -> tuple[Tensor | None, BiasIndex | None]:
    """The table and index of a chunk of fewer tokens."""
    if isinstance(index, Grid2D):
        raise ValueError(f"{index} is for whole chunks of {chunk_size} tokens, and the last one has {tokens}")
    if table is not None and isinstance(index, str) and table.shape[0] == 2 * chunk_size - 1:
        return table[chunk_size - tokens : chunk_size + tokens - 1], index
    if isinstance(index, Tensor) and index.dim() == 2:
        return table, index[:tokens, :tokens]
    return table, index
