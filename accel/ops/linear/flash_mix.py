"""The mixed chunk attention of FLASH: gated attention within chunks, and linear attention across them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library, philox
from accel.backends import KERNEL_DTYPES, check_beside, inner_dtype, integer
from accel.ops.layout import finite, rows_contiguous
from accel.ops.linear import flash_chunks, gau_attention
from accel.ops.linear.flash_chunks import Chunks, sums_before
from accel.ops.linear.gau_strips import ACTIVATIONS, BY_ROW
from accel.ops.packed import read_packed
from accel.ops.pairs import check_numbers, read_pairs
from accel.ops.rules import BiasIndex, Grid2D
from accel.ops.tables import INT32_MAX


class Args(NamedTuple):
    """The checked arguments every backend receives; N is B, or the number of packed sequences. Relative positions and
    the order of a chunk are those of :class:`accel.ops.pairs.Pairs`, of as many queries as keys, ``span``."""

    quad_q: Tensor  # (B, T, s), the last axis contiguous, as in all up to gate
    quad_k: Tensor  # (B, T, s)
    lin_q: Tensor  # (B, T, s'), and so lin_k
    lin_k: Tensor
    v: Tensor  # (B, T, E)
    gate: Tensor | None  # (B, T, E)
    line: Tensor | None  # (1, L) fp32 (fp64 beside fp64), added
    table: Tensor | None  # (R, 1) fp32 (fp64 beside fp64), added at index or grid
    state: Tensor | None  # (N, s', E) fp32 (fp64 beside fp64) contiguous: the sum before the first chunk; causal only
    key_mask: Tensor | None  # (B, T) bool contiguous
    bias_index: Tensor | None  # (span, span) int32 or int64 contiguous, rows of the table
    rows: Tensor | None  # (1, span, 5) int32: where causal, keys [0, i] of query i
    cu_seqlens: Tensor | None  # (N + 1,) int32
    seed: Tensor | None  # (1,) int64 where dropout_p > 0
    grid: list[int]  # [h, w, extra] of Grid2D in place of bias_index, else empty
    chunk_size: int
    causal: bool
    activation: str
    quad_scale: float
    lin_scale: float
    by_length: bool  # whether lin_scale is divided by the tokens of a sequence
    dropout_p: float
    return_state: bool
    keep_sums: bool  # whether the backward will want the output before the gate, for its gradient

    @property
    def span(self) -> int:
        """Tokens of the longest chunk there can be."""
        return min(self.chunk_size, max(self.v.shape[1], 1))

    @property
    def sequences(self) -> int:
        return self.v.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


# --- the definition ---


def reference(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain torch, fp32 or fp64 inside: output ``(B, T, E)``, the state or nothing, and nothing in place of
    the output before the gate.

    What is not finite makes the rows and the state that see it NaN, and reaches no other.
    """
    args = Args(*given)
    chunks, inner = Chunks.of(args), inner_dtype(args.v)
    quad_q, quad_k, lin_q, lin_k, v = (chunks.cut(x.to(inner)) for x in args[:5])
    within, _ = gau_attention.reference(*chunks.pairs(quad_q, quad_k, v))
    lin_q, bad_q = finite(lin_q)
    lin_k, bad_k = finite(chunks.shown(lin_k))
    v, bad_v = finite(chunks.shown(v))
    state = bad_state = None
    if args.state is not None:
        state, bad_rows = finite(args.state.to(inner))
        bad_state = bad_rows.any(1)[:, None, None].to(inner)
    before, after = sums_before(chunks, lin_k.mT @ v, state)
    lost, lost_after = sums_before(chunks, (bad_k | bad_v).any(1)[:, None, None].to(inner), bad_state)
    out = within[:, 0] + chunks.scaled(lin_q) @ before
    out = chunks.join(torch.where((lost > 0) | bad_q[..., None], math.nan, out))
    if args.gate is not None:
        out = out * args.gate.to(inner)
    after = torch.where(lost_after > 0, math.nan, after) if args.return_state else out.new_empty(0)
    # through one axis and back: an upstream gradient in any layout gives the same bits
    return out.to(args.v.dtype).flatten().view(out.shape), after, args.v.new_empty(0)


# --- backends, fastest first for each device ---

MAX_SIZE, MAX_VALUE_SIZE = 512, 8192


def _why_not_cpu(args: Args) -> str | None:
    if args.activation in BY_ROW:
        return f"it computes weights that depend on their own pair alone, not {args.activation}"
    s, e = max(args.quad_q.shape[2], args.lin_q.shape[2]), args.v.shape[2]
    if s > MAX_SIZE or e > MAX_VALUE_SIZE:
        return f"it takes queries of up to {MAX_SIZE} and values of up to {MAX_VALUE_SIZE} numbers, not {s} and {e}"
    if args.v.shape[1] > INT32_MAX // 2:
        return f"it takes up to {INT32_MAX // 2} tokens, not {args.v.shape[1]}"
    return backends.why_not_cpu(args)


_cpu_forward, _cpu_backward = backends.native("flash_mix")


def _torch_forward(*given: Any) -> Any:
    args = Args(*given)
    with library.without_autocast(args.v):
        return flash_chunks.forward(args)


def _torch_backward(grad_out: Tensor | None, grad_state: Tensor | None, sums: Tensor, *rest: Any) -> Any:
    *given, needs = rest
    args = Args(*given)
    with library.without_autocast(args.v):
        return flash_chunks.backward(grad_out, grad_state, sums, args, needs)


# --- declaration ---


def _fake(args: Args) -> tuple[Tensor, Tensor, Tensor]:
    state = (args.sequences, args.lin_k.shape[2], args.v.shape[2])
    return (
        args.v.new_empty(args.v.shape),
        args.v.new_empty(state if args.return_state else (0,), dtype=torch.float32),
        args.v.new_empty(args.v.shape if args.keep_sums else (0,)),
    )


def _backward_fake(args: Args, made: Sequence[bool]) -> tuple[Tensor, ...]:
    main = [x.new_empty(x.shape) for x in args[:5]]
    wanted = [x is not None and asked for x, asked in zip(args[5:9], made[5:], strict=True)]
    gate = args.v.new_empty(args.v.shape) if wanted[0] else args.v.new_empty(0, dtype=torch.float32)
    small = [
        args.v.new_empty(x.shape if x is not None and asked else (0,), dtype=torch.float32)
        for x, asked in zip(args[6:9], wanted[1:], strict=True)
    ]
    return *main, gate, *small


def _product_flops(args: Args) -> tuple[int, int, int]:
    """FLOPs of q·k and of the weighted sums of values over the pairs of whole chunks, masked ones too, and of one
    product of tokens with a state."""
    tokens = 2 * args.v.shape[0] * args.v.shape[1]
    return (
        tokens * args.span * args.quad_q.shape[2],
        tokens * args.span * args.v.shape[2],
        tokens * args.lin_q.shape[2] * args.v.shape[2],
    )


def _flops(args: Args) -> int:
    logits, values, state = _product_flops(args)
    return logits + values + 2 * state


def _backward_flops(args: Args, made: Sequence[bool]) -> int:
    logits, values, state = _product_flops(args)
    return 3 * logits + 2 * values + 4 * state


# --- the public function ---

MAIN = ("quad_q", "quad_k", "lin_q", "lin_k", "v", "gate")


def _check_main(main: list[Tensor]) -> None:
    for name, x in zip(MAIN, main, strict=False):
        check_beside(x, name, main[0], MAIN[0])
        if x.dim() != 3:
            raise ValueError(f"{name} must be (B, T, size), got {tuple(x.shape)=}")

    def shapes() -> str:  # which torch.compile cannot make of sizes that vary, and is asked for in an error alone
        return ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(MAIN, main, strict=False))

    if len({x.dtype for x in main}) > 1:
        raise TypeError(f"all main tensors have one dtype, got {[x.dtype for x in main]}")
    quad_q, quad_k, lin_q, lin_k, v, *gates = main
    if any([x.shape[:2] != v.shape[:2] for x in main]) or any([x.shape != v.shape for x in gates]):
        raise ValueError(f"tokens, or the sizes of v and gate, do not fit: {shapes()}")
    if quad_q.shape != quad_k.shape or lin_q.shape != lin_k.shape:
        raise ValueError(f"queries and keys do not fit: {shapes()}")


def _check_mask(mask: Tensor | None, v: Tensor, packed: bool) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"key_mask must be boolean, True where a key takes part, got {kind}")
    if mask.shape != v.shape[:2] or mask.device != v.device:
        raise ValueError(f"key_mask must be (B, T) beside v {tuple(v.shape)}, got {tuple(mask.shape)=}")
    if packed:
        raise ValueError(f"in packed form there is no padding to mask, got {tuple(mask.shape)=}")
    return mask.contiguous()


def _check_state(state: Tensor | None, causal: bool, return_state: bool, shape: tuple[int, ...], v: Tensor) -> Any:
    if (state is not None or return_state) and not causal:
        raise ValueError("a state is carried in causal order only: without, every token sees all")
    if state is None:
        return None
    check_beside(state, "initial_state", v, "v")
    if state.dtype not in (torch.float32, inner_dtype(v)) or tuple(state.shape) != shape:
        raise ValueError(f"initial_state must be float32 {shape}, got {state.dtype} {tuple(state.shape)}")
    return state.to(inner_dtype(v)).contiguous()


def _shortened(
    table: Tensor | None, index: BiasIndex | None, chunk_size: int, tokens: int
) -> tuple[Tensor | None, BiasIndex | None]:
    """The table and index of a chunk of fewer tokens."""
    if table is not None and isinstance(index, str) and table.dim() == 2 and table.shape[0] == 2 * chunk_size - 1:
        return table[chunk_size - tokens : chunk_size + tokens - 1], index
    if isinstance(index, Tensor) and index.dim() == 2:
        return table, index[:tokens, :tokens]
    return table, index


def _check_grid(grid: Grid2D, chunk_size: int, lengths: Sequence[int]) -> None:
    for tokens in lengths:
        if tokens % chunk_size:
            raise ValueError(
                f"{grid} is for whole chunks of {chunk_size} tokens, and the last one has {tokens % chunk_size}"
            )


def _prepare(
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
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    main = [quad_q, quad_k, lin_q, lin_k, v, *([] if gate is None else [gate])]
    if all([isinstance(x, Tensor) and x.device == main[0].device for x in main]):
        main = [library.autocast(x) for x in main]
    _check_main(main)
    quad_q, quad_k, lin_q, lin_k, v, *gates = [rows_contiguous(x) for x in main]
    chunk_size = integer(chunk_size)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size=}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    for name, scale in (("quad_scale", quad_scale), ("lin_scale", lin_scale)):
        if scale is not None and not -math.inf < scale < math.inf:
            raise ValueError(f"{name} must be finite, got {scale=}")
    check_numbers(None, dropout_p)
    packed = read_packed(cu_seqlens, None, quad_q[:, None], quad_k[:, None])
    tokens = v.shape[1]
    sequences = v.shape[0] if packed is None else packed.sequences
    state = _check_state(initial_state, causal, return_state, (sequences, lin_k.shape[2], v.shape[2]), v)
    if isinstance(bias_index, Grid2D):
        _check_grid(bias_index, chunk_size, [tokens] if packed is None else packed.q.diff().tolist())
    span = min(chunk_size, max(tokens, 1))
    if span < chunk_size:
        bias_table, bias_index = _shortened(bias_table, bias_index, chunk_size, span)
    of_chunk = quad_q.new_empty((1, 1, span, 1))
    pairs = read_pairs(
        of_chunk,
        of_chunk,
        causal=causal,
        window=None,
        mask=None,
        pattern=None,
        bias=None,
        bias_table=bias_table,
        bias_index=bias_index,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
    )
    return Args(
        quad_q=quad_q,
        quad_k=quad_k,
        lin_q=lin_q,
        lin_k=lin_k,
        v=v,
        gate=gates[0] if gates else None,
        line=pairs.line,
        table=pairs.table,
        state=state,
        key_mask=_check_mask(key_mask, v, packed is not None),
        bias_index=pairs.bias_index,
        rows=pairs.rows,
        cu_seqlens=None if packed is None else packed.q,
        seed=philox.new_seed(v.device) if dropout_p > 0.0 else None,
        grid=pairs.grid,
        chunk_size=chunk_size,
        causal=bool(causal),
        activation=activation,
        quad_scale=1.0 / chunk_size if quad_scale is None else float(quad_scale),
        lin_scale=(1.0 / chunk_size if causal else 1.0) if lin_scale is None else float(lin_scale),
        by_length=lin_scale is None and not causal,
        dropout_p=float(dropout_p),
        return_state=bool(return_state),
        keep_sums=library.requires_gradient(gates),
    )


_run = library.differentiable(
    "flash_mix",
    Args,
    reference,
    gradients=9,
    always=5,
    outputs=["out", "state_after", "sums"],
    differentiable_outputs=2,
    keep_outputs=["sums"],
    fake=_fake,
    flops=_flops,
    backward_fake=_backward_fake,
    backward_flops=_backward_flops,
    lay_out=lambda grad, args: rows_contiguous(grad),
)


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
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(B, T, E)`` in the dtype of ``v``, or a pair with the state.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: shapes, sizes, names or devices that do not fit; the message holds them.
        NotImplementedError: ``backend`` cannot run this call; the message says why.

    Follows Hua et al., Transformer Quality in Linear Time (2022).
    """
    args = _prepare(
        quad_q,
        quad_k,
        lin_q,
        lin_k,
        v,
        gate,
        chunk_size=chunk_size,
        causal=causal,
        activation=activation,
        quad_scale=quad_scale,
        lin_scale=lin_scale,
        bias_table=bias_table,
        bias_index=bias_index,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        dropout_p=dropout_p,
        initial_state=initial_state,
        return_state=return_state,
    )
    out, state, _ = _run(args, backend, 2 if return_state else 1)
    return (out, state) if return_state else out


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    q, v = (torch.zeros(1, 16, n, device=device, dtype=dtype) for n in (32, 64))
    return (q, q, q, q, v, v), {}


OP = dispatch.register(
    dispatch.Op(
        name="flash_mix",
        function=flash_mix,
        prepare=_prepare,
        example=_example,
        backends=(
            # extra: what it does not take, products of torch compute as fast as anything here does
            dispatch.Backend(
                "cpu", _why_not_cpu, _cpu_forward, _cpu_backward, frozenset({"cpu"}), KERNEL_DTYPES, extra=True
            ),
            dispatch.Backend(
                "torch", backends.why_not_dtype, _torch_forward, _torch_backward, frozenset(), KERNEL_DTYPES
            ),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
    )
)
