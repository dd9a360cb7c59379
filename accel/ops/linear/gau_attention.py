"""The attention of gated attention units: weights that need no softmax, wide values and a gate, with the masks, biases
and packed batches of softmax attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library, philox
from accel.backends import KERNEL_DTYPES, check_beside, inner_dtype
from accel.ops.layout import empty_like_layout, finite, rows_contiguous
from accel.ops.linear import gau_strips
from accel.ops.linear.gau_strips import ACTIVATIONS, BY_ROW
from accel.ops.pairs import ALL, check_numbers, check_qkv, read_pairs
from accel.ops.rules import BiasIndex, Pattern
from accel.ops.tables import INT32_MAX


class Args(NamedTuple):
    """The checked arguments every backend receives; relative positions and rules are those of
    :class:`accel.ops.pairs.Pairs`."""

    q: Tensor  # (B, Hq, T, s), the last axis contiguous, as in k, v and gate
    k: Tensor  # (B, Hkv, S, s)
    v: Tensor  # (B, Hkv, S, E)
    gate: Tensor | None  # (B, Hq, T, E)
    bias: Tensor | None  # (B or 1, Hq or 1, T or 1, S or 1) floating, added
    line: Tensor | None  # (Hq, L) fp32 (fp64 beside fp64), added
    table: Tensor | None  # (R, Hq) fp32 (fp64 beside fp64), added at index or grid
    mask: Tensor | None  # (B or 1, Hq or 1, T or 1, S or 1) bool
    bias_index: Tensor | None  # (T, S) int32 or int64 contiguous, rows of the table
    rows: Tensor | None  # (B or 1, T, 5) int32: keys [r0, r1) and [r2, r3) are seen, r0 <= r1, r2 <= r3; then shift_i
    seed: Tensor | None  # (1,) int64 where dropout_p > 0
    grid: list[int]  # [h, w, extra] of Grid2D in place of bias_index, else empty
    rule: str  # what rows says: "all" (rows is None), "causal" (key <= query position, T = S or top-left), "other"
    packed: bool  # rows are of several sequences, at whose edges a query's place in the line jumps
    activation: str
    scale: float
    dropout_p: float
    keep_sums: bool  # whether the backward will want the weighted sums of values without the gate, for its gradient


# --- the definition ---


def reference(*given: Any) -> tuple[Tensor, Tensor]:
    """The op in plain torch, fp32 or fp64 inside: output ``(B, Hq, T, E)``, and nothing in place of the sums.

    What is not finite reaches only the rows that may see it, as NaN.
    """
    args = Args(*given)
    inner = inner_dtype(args.q)
    group = args.q.shape[1] // args.k.shape[1] if args.k.shape[1] else 1
    q, bad_q = finite(args.q.to(inner))
    k, bad_k = finite(args.k.to(inner).repeat_interleave(group, 1))
    v, bad_v = finite(args.v.to(inner).repeat_interleave(group, 1))
    logits = gau_strips.logits(args, q, k, bad_q[..., :, None] | bad_k[..., None, :])
    hidden = gau_strips.hide(args, logits)
    if hidden is not None:
        logits = torch.where(hidden, 0.0, logits)
    weights = gau_strips.weigh(args.activation, logits, hidden)
    reached = bad_v[..., None, :].expand(weights.shape)
    if hidden is not None:
        reached = reached & ~hidden
    kept = gau_strips.keep(args, ALL, ALL)
    out = (weights if kept is None else weights * kept) @ v
    if args.gate is not None:
        out = out * args.gate.to(inner)
    out = torch.where(reached.any(-1, keepdim=True), math.nan, out)
    # through one axis and back: an upstream gradient in any layout gives the same bits
    return out.to(args.q.dtype).flatten().view(out.shape), args.q.new_empty(0)


# --- backends, fastest first for each device ---

MAX_HEAD_SIZE, MAX_VALUE_SIZE = 512, 8192


def gate_gradient(grad_out: Tensor, sums: Tensor, args: Args, wanted: bool) -> Tensor:
    """That of the gate, from the weighted sums of values; empty where it is not wanted."""
    if args.gate is None or not wanted:
        return grad_out.new_empty(0, dtype=torch.float32)
    return torch.mul(grad_out, sums, out=empty_like_layout(args.gate, args.gate.shape))


def _why_not_cpu(args: Args) -> str | None:
    if args.activation in BY_ROW:
        return f"it computes weights that depend on their own pair alone, not {args.activation}"
    s, e = args.q.shape[3], args.v.shape[3]
    if s % 4 or not 4 <= s <= MAX_HEAD_SIZE:
        return f"it takes q and k of a size that is a multiple of 4 up to {MAX_HEAD_SIZE}, not {s}"
    if e % 8 or not 8 <= e <= MAX_VALUE_SIZE:
        return f"it takes v of a size that is a multiple of 8 up to {MAX_VALUE_SIZE}, not {e}"
    if max(args.q.shape[2], args.k.shape[2]) > INT32_MAX // 2:
        return f"it takes up to {INT32_MAX // 2} tokens, not {max(args.q.shape[2], args.k.shape[2])}"
    return backends.why_not_cpu(args)


_cpu_forward, _native_backward = backends.native("gau_attention")
_triton = backends.triton(__name__)


def _cpu_backward(grad_out: Tensor, sums: Tensor, *rest: Any) -> Any:
    *given, needs = rest
    q, k, v, *small = _native_backward(grad_out, *given, *needs[1:])
    return q, k, v, gate_gradient(grad_out, sums, Args(*given), needs[0]), *small


def _torch_forward(*given: Any) -> Any:
    args = Args(*given)
    with library.without_autocast(args.q):
        return gau_strips.forward(args)


def _torch_backward(grad_out: Tensor, sums: Tensor, *rest: Any) -> Any:
    *given, needs = rest
    args = Args(*given)
    with library.without_autocast(args.q):
        q, k, v, *small = gau_strips.backward(grad_out, args, needs[1:])
    return q, k, v, gate_gradient(grad_out, sums, args, needs[0]), *small


# --- declaration ---


def _fake(args: Args) -> tuple[Tensor, Tensor]:
    out = empty_like_layout(args.q, (*args.q.shape[:3], args.v.shape[3]))
    return out, torch.empty_like(out) if args.keep_sums else out.new_empty(0)


def _backward_fake(args: Args, made: Sequence[bool]) -> tuple[Tensor, ...]:
    main = [empty_like_layout(x, x.shape) for x in args[:3]]
    gate = args.q.new_empty(0, dtype=torch.float32)
    if args.gate is not None and made[3]:
        gate = empty_like_layout(args.gate, args.gate.shape)
    small = [
        args.q.new_empty(x.shape if x is not None and wanted else (0,), dtype=torch.float32)
        for x, wanted in zip(args[4:7], made[4:], strict=True)
    ]
    return *main, gate, *small


def _product_flops(args: Args) -> tuple[int, int]:
    """FLOPs of q·k and of the weighted sums of values over all pairs, masked ones too."""
    pairs = 2 * args.q.shape[0] * args.q.shape[1] * args.q.shape[2] * args.k.shape[2]
    return pairs * args.q.shape[3], pairs * args.v.shape[3]


# --- the public function ---


def _with_heads(x: Any) -> Any:
    return x.unsqueeze(1) if isinstance(x, Tensor) and x.dim() == 3 else x


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    activation: str = "relu2",
    scale: float | None = None,
    causal: bool | str = False,
    window: Sequence[int] | None = None,
    mask: Tensor | None = None,
    pattern: Pattern | Sequence[Pattern] | None = None,
    bias: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: BiasIndex | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    main = [x for x in (q, k, v, gate) if isinstance(x, Tensor)]
    if len({x.dim() for x in main}) > 1:
        raise ValueError(
            f"q, k, v and gate all have an axis of heads or none has, got {[tuple(x.shape) for x in main]}"
        )
    if main and main[0].dim() == 3:
        q, k, v, gate, mask, bias = (_with_heads(x) for x in (q, k, v, gate, mask, bias))
    if all([isinstance(x, Tensor) for x in (q, k, v)]) and q.device == k.device == v.device:
        q, k, v = library.autocast(q), library.autocast(k), library.autocast(v)
    check_qkv(q, k, v)
    if gate is not None:
        check_beside(gate, "gate", q, "q")
        gate = library.autocast(gate)
        if gate.shape != (*q.shape[:3], v.shape[3]):
            raise ValueError(
                f"gate must be (B, Hq, T, E) = {(*q.shape[:3], v.shape[3])} as the output, got {tuple(gate.shape)=}"
            )
        if gate.dtype != q.dtype:
            raise TypeError(f"q, k, v and gate must have one dtype, got {q.dtype} and {gate.dtype=}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    check_numbers(scale, dropout_p)
    pairs = read_pairs(
        q,
        k,
        causal=causal,
        window=window,
        mask=mask,
        pattern=pattern,
        bias=bias,
        bias_table=bias_table,
        bias_index=bias_index,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    return Args(
        q=rows_contiguous(q),
        k=rows_contiguous(k),
        v=rows_contiguous(v),
        gate=None if gate is None else rows_contiguous(gate),
        seed=philox.new_seed(q.device) if dropout_p > 0.0 else None,
        packed=cu_seqlens_q is not None,
        activation=activation,
        scale=(q.shape[3] ** -0.5 if q.shape[3] else 1.0) if scale is None else float(scale),
        dropout_p=float(dropout_p),
        keep_sums=library.requires_gradient([gate]),
        **pairs._asdict(),
    )


_run = library.differentiable(
    "gau_attention",
    Args,
    reference,
    gradients=7,
    always=3,
    outputs=["out", "sums"],
    keep_outputs=["sums"],
    fake=_fake,
    flops=lambda args: sum(_product_flops(args)),
    backward_fake=_backward_fake,
    backward_flops=lambda args, made: 3 * _product_flops(args)[0] + 2 * _product_flops(args)[1],
    lay_out=lambda grad, args: rows_contiguous(grad),
)


def gau_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    activation: str = "relu2",
    scale: float | None = None,
    causal: bool | str = False,
    window: Sequence[int] | None = None,
    mask: Tensor | None = None,
    pattern: Pattern | Sequence[Pattern] | None = None,
    bias: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: BiasIndex | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    r"""The attention of a gated attention unit with masks and biases, their gradients, and memory linear in the tokens.

    .. math:: x_{ij} = a\, q_i \cdot k_j + b_{ij} + t_{y(i,j)}, \qquad o_i = u_i \odot \sum_j f(x_{ij})\, v_j

    with a the ``scale``, b the ``bias``, t the ``bias_table`` and y its ``bias_index``, f the ``activation`` and u the
    ``gate``, each left out where it is not given; j runs over the keys that query i may see. A query that sees none
    gives 0. What is not finite in a key or value does not reach queries that may not see it. A factor for each query,
    such as 1 over the keys it sees, is a factor of its q, or for ``relu2`` of the square root; rotary embeddings are
    applied before.

    Args:
        q: ``(B, Hq, T, s)``, any strides; float32, bfloat16, float16, and float64 on the reference. Under autocast
            q, k, v and the gate are cast as a matrix product's operands would be. Without heads, as in GAU itself,
            ``(B, T, s)``; then k, v, the gate and the output have no axis of heads either, and a mask or bias of
            three axes is ``(B, T, S)``.
        k: ``(B, Hkv, S, s)``, Hkv dividing Hq: query head h reads head ``h // (Hq / Hkv)``.
        v: ``(B, Hkv, S, E)``.
        gate: ``(B, Hq, T, E)`` in the dtype of q, multiplies the output; has a gradient.
        activation: ``"relu2"``, max(x, 0)²; ``"laplace"``, ½(1 + erf((x − μ) / (σ√2))) with μ = √½ and σ = √(1/4π);
            ``"silu"``; ``"sigmoid"``: in these a key that is not seen weighs 0. ``"softmax"`` over the keys that are
            seen; ``"softmax_plus"``, the softmax of x · ln l / ln 512 where a row sees l keys.
        scale: factor of q·k; s ** −0.5 if None.
        causal: True lets query i see keys j <= i + S − T (bottom-right), ``"top_left"`` keys j <= i.
        window: ``(left, right)``, how far from its own place a query sees, inclusive, −1 without bound; alignment as
            for ``causal``, which makes right 0.
        mask: boolean, broadcasting to ``(B, Hq, T, S)``, True where a key takes part; key padding is ``(B, 1, 1, S)``.
        pattern: :class:`accel.PrefixLM`, :class:`accel.BlockCausal` or :class:`accel.BlockDiffusion`, or several; all
            masks hold together.
        bias: added to the logits; broadcasting to ``(B, Hq, T, S)``, any floating dtype; has a gradient. −∞ hides a
            key, whatever the activation.
        bias_table: ``(R, Hq)``, any floating dtype; has a gradient, added up in a fixed order without a buffer of
            T·S.
        bias_index: which row of the table a pair takes: an integer tensor ``(T, S)``; ``"toeplitz"`` for row
            i − j + S − 1 of T + S − 1; :class:`accel.T5Buckets`; or :class:`accel.Grid2D`. A tensor that depends on
            i − j alone is recognised and costs no more than the rule.
        cu_seqlens_q: int32 or int64 ``(sequences + 1,)``, rising from 0 to the number of tokens: the packed form,
            ``(1, H, total, ·)``. Sequences do not see each other; rules and bias rules use positions within the
            sequence (``"toeplitz"``: the middle row of an odd number is distance 0). Dense masks, biases and index
            tensors are refused.
        cu_seqlens_k: the same for keys; those of q if None.
        dropout_p: probability in [0, 1) that a weight is dropped; drawn anew at each call from torch's generator and
            repeated in the backward.
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(B, Hq, T, E)`` in the dtype of q, or ``(B, T, E)``.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: an unknown activation; shapes, sizes, offsets or devices that do not fit; the message holds them.
            Offsets on a GPU are not looked at, but bounded: wrong ones give wrong results and touch no foreign memory.
        NotImplementedError: ``backend`` cannot run this call; the message says why.

    Follows Hua et al., Transformer Quality in Linear Time (2022); ``laplace`` is that of Ma et al., Mega (2023).
    """
    args = _prepare(
        q,
        k,
        v,
        gate,
        activation=activation,
        scale=scale,
        causal=causal,
        window=window,
        mask=mask,
        pattern=pattern,
        bias=bias,
        bias_table=bias_table,
        bias_index=bias_index,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        dropout_p=dropout_p,
    )
    out: Tensor = _run(args, backend)[0]
    return out.squeeze(1) if q.dim() == 3 else out


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    q, v = (torch.zeros(1, 1, 16, n, device=device, dtype=dtype) for n in (32, 64))
    return (q, q, v, v), {}


OP = dispatch.register(
    dispatch.Op(
        name="gau_attention",
        function=gau_attention,
        prepare=_prepare,
        example=_example,
        backends=(
            # extra: what it does not take, torch's own products compute as fast as anything here does
            dispatch.Backend(
                "cpu", _why_not_cpu, _cpu_forward, _cpu_backward, frozenset({"cpu"}), KERNEL_DTYPES, extra=True
            ),
            dispatch.Backend("triton", *_triton, frozenset({"cuda"}), KERNEL_DTYPES),
            dispatch.Backend(
                "torch", backends.why_not_dtype, _torch_forward, _torch_backward, frozenset(), KERNEL_DTYPES
            ),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
    )
)
