"""Softmax attention with the masks, biases and packed batches that models really have, and the gradients of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accel import backends, dispatch, library, philox
from accel.backends import HALF_DTYPES, KERNEL_DTYPES, inner_dtype
from accel.ops.attention import cudnn, flash_cpu
from accel.ops.layout import empty_like_layout, finite, rows_contiguous
from accel.ops.pairs import (
    add_biases,
    adds,
    check_numbers,
    check_per_head,
    check_qkv,
    read_pairs,
    visible,
)
from accel.ops.rules import BiasIndex, Pattern
from accel.ops.tables import INT32_MAX


class Args(NamedTuple):
    """The checked arguments every backend receives. Relative positions and rules have become short tensors, those of
    :class:`accel.ops.pairs.Pairs`."""

    q: Tensor  # (B, Hq, T, D), the last axis contiguous, as in k and v
    k: Tensor  # (B, Hkv, S, D)
    v: Tensor  # (B, Hkv, S, E)
    bias: Tensor | None  # (B or 1, Hq or 1, T or 1, S or 1) floating, added
    line: Tensor | None  # (Hq, L) fp32 (fp64 beside fp64), added
    table: Tensor | None  # (R, Hq) fp32 (fp64 beside fp64), added at index or grid
    sinks: Tensor | None  # (Hq,) fp32 (fp64 beside fp64)
    mask: Tensor | None  # (B or 1, Hq or 1, T or 1, S or 1) bool
    bias_index: Tensor | None  # (T, S) int32 or int64 contiguous, rows of the table
    rows: Tensor | None  # (B or 1, T, 5) int32: keys [r0, r1) and [r2, r3) are seen, r0 <= r1, r2 <= r3; then shift_i
    seed: Tensor | None  # (1,) int64 where dropout_p > 0
    grid: list[int]  # [h, w, extra] of Grid2D in place of bias_index, else empty
    rule: str  # what rows says: "all" (rows is None), "causal" (key <= query position, T = S or top-left), "other"
    scale: float
    softcap: float  # 0: none
    dropout_p: float


# --- the definition ---


def reference(*given: Any) -> tuple[Tensor, Tensor]:
    """The op in plain torch, fp32 or fp64 inside: output ``(B, Hq, T, E)`` and log-sum-exp ``(B, Hq, T)``.

    What is not finite reaches only the rows that may see it, as NaN.
    """
    args = Args(*given)
    inner = inner_dtype(args.q)
    heads, queries, keys = args.q.shape[1], args.q.shape[2], args.k.shape[2]
    group = heads // args.k.shape[1] if args.k.shape[1] else 1
    q, bad_q = finite(args.q.to(inner))
    k, bad_k = finite(args.k.to(inner).repeat_interleave(group, 1))
    v, bad_v = finite(args.v.to(inner).repeat_interleave(group, 1))
    logits = (q * args.scale) @ k.transpose(-2, -1)
    logits = torch.where(bad_q[..., :, None] | bad_k[..., None, :], math.nan, logits)
    if args.softcap:
        logits = args.softcap * torch.tanh(logits / args.softcap)
    logits = add_biases(logits, args, queries, keys)
    seen = visible(args, keys, logits.device)
    if seen is not None:
        logits = torch.where(seen, logits, -math.inf)
    every = logits
    if args.sinks is not None:
        every = torch.cat([logits, args.sinks.to(inner)[:, None, None].expand(*logits.shape[:-1], 1)], -1)
    if every.shape[-1] == 0:  # no key at all
        every = F.pad(every, (0, 1), value=-math.inf)
    nothing = (every == -math.inf).all(-1, keepdim=True)
    # relative to the largest logit: near −1e30 a log-sum-exp has no digits left for the number of keys
    top = torch.where(nothing, 0.0, every.detach().amax(-1, keepdim=True))
    weight = torch.exp(every - top)
    total = torch.where(nothing, 1.0, weight.sum(-1, keepdim=True))
    p = torch.where(logits == -math.inf, 0.0, weight[..., :keys] / total)  # also where the row's sum is NaN
    lse = torch.where(nothing, -math.inf, top + torch.log(total))
    if args.dropout_p > 0.0:
        assert args.seed is not None
        p = p * philox.keep_mask(args.seed, tuple(p.shape), args.dropout_p) / (1.0 - args.dropout_p)
    reached = bad_v[..., None, :].expand(p.shape)
    if seen is not None:
        reached = reached & seen
    out = torch.where(reached.any(-1, keepdim=True), math.nan, p @ v)
    return out.to(args.q.dtype), lse.squeeze(-1)


# --- backends, fastest first for each device ---

MAX_HEAD_SIZE = 256


def _why_not_size(args: Args, unit: int) -> str | None:
    """Which sizes a kernel of ours does not take, whose head sizes are multiples of ``unit``."""
    for size in (args.q.shape[3], args.v.shape[3]):
        if size % unit or not unit <= size <= MAX_HEAD_SIZE:
            return f"it takes head sizes that are a multiple of {unit} up to {MAX_HEAD_SIZE}, not {size}"
    if max(args.q.shape[2], args.k.shape[2]) > INT32_MAX // 2:
        return f"it takes up to {INT32_MAX // 2} tokens, not {max(args.q.shape[2], args.k.shape[2])}"
    return None


def _row_sums(grad_out: Tensor, out: Tensor) -> Tensor:
    if out.device.type == "cuda" and dispatch.leaf_reason(_TRITON) is None:
        sums: Tensor = dispatch.leaf(_TRITON)[0].row_sums(grad_out, out)
        return sums
    return (grad_out.float() * out.float()).sum(-1)


def _around(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A whole backward: what all backends share is the row's sum Σ p·dp = dO·O, less the gradient of the log-sum-exp,
    and the sinks."""

    def whole(grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any) -> Any:
        peak, *given, needs = rest
        args = Args(*given)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        delta = _row_sums(grad_out, out)
        if grad_lse is not None:  # which may be infinite where nothing is seen
            delta = torch.where(lse == -math.inf, 0.0, delta - grad_lse)
        grad_sinks = lse.new_empty(0)
        if needs[3] and args.sinks is not None:
            weight = torch.exp(args.sinks.float()[:, None] - lse)
            # rows that see nothing and whose sink is −∞ weigh nothing
            grad_sinks = -(torch.where(lse == -math.inf, 0.0, weight) * delta).sum((0, 2))
        return *backward(grad_out, delta, lse, peak, *given, needs[:3]), grad_sinks

    return whole


def _why_not_cpu(args: Args) -> str | None:
    return backends.why_not_cpu(args) or _why_not_size(args, 4)


def _cpu_forward(*args: Any) -> Any:
    return torch.ops.accel_native.softmax_attention_forward.default(*args)


@_around
def _cpu_backward(*args: Any) -> Any:
    *args_, needs = args
    return torch.ops.accel_native.softmax_attention_backward.default(*args_, *needs)


_TRITON = dispatch.leaf_of(__name__)
_triton = backends.triton(__name__)
_triton_backward = _around(_triton.backward)


def _why_not_triton(args: Args) -> str | None:
    return _triton.why_not(args) or _why_not_size(args, 8)


def _cudnn_forward(*args: Any) -> Any:
    given = Args(*args)
    out, lse = cudnn.forward(given.q, given.k, given.v, given.rule == "causal", given.scale)
    out, lse = _as_promised(out, given.q), lse.contiguous()
    if given.rule == "causal":
        dispatch.leaf(_TRITON)[0].forward_again(cudnn.largest(out), out, lse, given)
    return out, lse, lse.new_empty(0)


def _cudnn_backward(grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any) -> Any:
    if grad_out is None or grad_lse is not None or dispatch.deterministic():
        return _triton_backward(grad_out, grad_lse, out, lse, *rest)
    args = Args(*rest[1:-1])
    found = cudnn.backward(grad_out, out, lse, args.q, args.k, args.v, args.rule == "causal", args.scale)
    grads = [_as_promised(grad, x) for grad, x in zip(found, args[:3], strict=True)]
    if args.rule == "causal":
        dispatch.leaf(_TRITON)[0].backward_again(cudnn.largest(*grads), grads, grad_out, out, lse, args)
    return *grads, *[lse.new_empty(0) for _ in range(4)]


def _flash_forward(*args: Any) -> Any:
    given = Args(*args)
    causal = given.rule == "causal"
    out, lse = flash_cpu.forward(given.q, given.k, given.v, causal, given.scale)
    if not flash_cpu.finite(lse) or (causal and not flash_cpu.finite(out)):
        return _cpu_forward(*args)
    return _as_promised(out, given.q), lse.contiguous(), lse.new_empty(0)


def _flash_backward(grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any) -> Any:
    args = Args(*rest[1:-1])
    through_lse = grad_lse is not None and bool(grad_lse.any())  # compiled code hands over zeros for none
    ours = through_lse or dispatch.deterministic() or not flash_cpu.backward_is_faster(args)
    if grad_out is None or ours or not flash_cpu.finite(lse):
        return _cpu_backward(grad_out, grad_lse, out, lse, *rest)
    found = flash_cpu.backward(grad_out, out, lse, args.q, args.k, args.v, args.scale)
    grads = [_as_promised(grad, x) for grad, x in zip(found, args[:3], strict=True)]
    return *grads, *[lse.new_empty(0) for _ in range(4)]


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _torch_forward(*args: Any) -> Any:
    return _flash_forward(*args) if _on_cpu(args[0]) else _cudnn_forward(*args)


def _torch_backward(grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, *rest: Any) -> Any:
    return (_flash_backward if _on_cpu(out) else _cudnn_backward)(grad_out, grad_lse, out, *rest)


def _why_not_torch(args: Args) -> str | None:  # our kernels compute what torch's do not
    if _on_cpu(args.q):
        return flash_cpu.why_not(args) or _why_not_cpu(args)
    return cudnn.why_not(args) or _why_not_triton(args)


# --- declaration ---


def _as_promised(out: Tensor, q: Tensor) -> Tensor:
    """``out`` in the layout that callers of the registered op rely on."""
    promised = empty_like_layout(torch.empty_strided(q.shape, q.stride(), device="meta"), tuple(out.shape))
    return out if out.stride() == promised.stride() else empty_like_layout(q, tuple(out.shape)).copy_(out)


def _fake(args: Args) -> tuple[Tensor, Tensor, Tensor]:
    out = empty_like_layout(args.q, (*args.q.shape[:3], args.v.shape[3]))
    lse = args.q.new_empty(args.q.shape[:3], dtype=torch.float32)
    return out, lse, lse.new_empty((2, *lse.shape) if adds(args) else (0,))


def _backward_fake(args: Args, made: Sequence[bool]) -> tuple[Tensor, ...]:
    small = [x.shape if x is not None and wanted else (0,) for x, wanted in zip(args[3:7], made[3:], strict=True)]
    main = [empty_like_layout(x, x.shape) for x in args[:3]]
    return *main, *[args.q.new_empty(shape, dtype=torch.float32) for shape in small]


def _product_flops(args: Args) -> tuple[int, int]:
    """FLOPs of q·k and of p·v over all pairs, masked ones too."""
    pairs = 2 * args.q.shape[0] * args.q.shape[1] * args.q.shape[2] * args.k.shape[2]
    return pairs * args.q.shape[3], pairs * args.v.shape[3]


# --- the public function ---


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool | str = False,
    window: Sequence[int] | None = None,
    mask: Tensor | None = None,
    pattern: Pattern | Sequence[Pattern] | None = None,
    bias: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: BiasIndex | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    if all([isinstance(x, Tensor) for x in (q, k, v)]) and q.device == k.device == v.device:
        q, k, v = library.autocast(q), library.autocast(k), library.autocast(v)
    check_qkv(q, k, v)
    check_numbers(scale, dropout_p)
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive, or None for none, got {softcap=}")
    check_per_head(sinks, "sinks", q)
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
        alibi_slopes=alibi_slopes,
    )
    return Args(
        q=rows_contiguous(q),
        k=rows_contiguous(k),
        v=rows_contiguous(v),
        sinks=None if sinks is None else sinks.to(inner_dtype(q)).contiguous(),
        seed=philox.new_seed(q.device) if dropout_p > 0.0 else None,
        scale=(q.shape[3] ** -0.5 if q.shape[3] else 1.0) if scale is None else float(scale),
        softcap=0.0 if softcap is None else float(softcap),
        dropout_p=float(dropout_p),
        **pairs._asdict(),
    )


_run = library.differentiable(
    "softmax_attention",
    Args,
    reference,
    gradients=7,
    always=3,
    outputs=["out", "lse", "peak"],  # peak: rows for the backward of the same backend; empty if nothing is added
    differentiable_outputs=2,
    keep_outputs=["out", "lse", "peak"],
    fake=_fake,
    flops=lambda args: sum(_product_flops(args)),
    backward_fake=_backward_fake,
    backward_flops=lambda args, made: 3 * _product_flops(args)[0] + 2 * _product_flops(args)[1],
    lay_out=lambda grad, args: rows_contiguous(grad),
)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool | str = False,
    window: Sequence[int] | None = None,
    mask: Tensor | None = None,
    pattern: Pattern | Sequence[Pattern] | None = None,
    bias: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: BiasIndex | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Exact softmax attention with masks, biases and sinks, and the gradient of each, in memory linear in the tokens.

    .. math:: s_{ij} = c\,\tanh(a\, q_i \cdot k_j / c) + b_{ij} + t_{x(i,j)} - m\,|i + S - T - j|, \qquad
        o_i = \sum_j \frac{e^{s_{ij}}}{e^{z} + \sum_l e^{s_{il}}}\, v_j

    with a the ``scale``, c the ``softcap``, b the ``bias``, t the ``bias_table`` and x its ``bias_index``, m the
    ALiBi slope and z the sink, each left out where it is not given; l runs over the keys that query i may see. A
    query that sees none gives 0. What is not finite in a key or value does not reach queries that may not see it.

    Args:
        q: ``(B, Hq, T, D)``, any strides; float32, bfloat16, float16, and float64 on the reference. Under autocast
            q, k and v are cast as a matrix product's operands would be.
        k: ``(B, Hkv, S, D)``, Hkv dividing Hq: query head h reads head ``h // (Hq / Hkv)``.
        v: ``(B, Hkv, S, E)``.
        scale: factor of q·k; D ** −0.5 if None.
        causal: True lets query i see keys j <= i + S − T (bottom-right), ``"top_left"`` keys j <= i.
        window: ``(left, right)``, how far from its own place a query sees, inclusive, −1 without bound; alignment as
            for ``causal``, which makes right 0.
        mask: boolean, broadcasting to ``(B, Hq, T, S)``, True where a key takes part; key padding is ``(B, 1, 1, S)``.
        pattern: :class:`accel.PrefixLM`, :class:`accel.BlockCausal` or :class:`accel.BlockDiffusion`, or several; all
            masks hold together.
        bias: added to the logits; broadcasting to ``(B, Hq, T, S)``, any floating dtype; has a gradient. −∞ hides a
            key, a finite number does not: keys that all carry the same huge one share the weight.
        bias_table: ``(R, Hq)``, any floating dtype; has a gradient, added up in a fixed order without a buffer of
            T·S.
        bias_index: which row of the table a pair takes: an integer tensor ``(T, S)``; ``"toeplitz"`` for row
            i − j + S − 1 of T + S − 1; :class:`accel.T5Buckets`; or :class:`accel.Grid2D`. A tensor that depends on
            i − j alone is recognised and costs no more than the rule.
        alibi_slopes: ``(Hq,)``; has a gradient.
        softcap: positive bound c of the logits before biases.
        sinks: ``(Hq,)``, a logit per head that takes weight and has no value; counts in the log-sum-exp; has a
            gradient.
        cu_seqlens_q: int32 or int64 ``(sequences + 1,)``, rising from 0 to the number of tokens: the packed form,
            ``(1, H, total, D)``. Sequences do not see each other; rules, ALiBi and bias rules use positions within
            the sequence (``"toeplitz"``: the middle row of an odd number is distance 0). Dense masks, biases and
            index tensors are refused.
        cu_seqlens_k: the same for keys; those of q if None.
        dropout_p: probability in [0, 1) that a weight is dropped; drawn anew at each call from torch's generator and
            repeated in the backward.
        return_lse: also return the log-sum-exp, fp32 ``(B, Hq, T)``, −∞ where nothing is seen; has a gradient.
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(B, Hq, T, E)`` in the dtype of q, or a pair with the log-sum-exp.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: shapes, sizes, offsets or devices that do not fit; the message holds them. Offsets on a GPU are
            not looked at, but bounded: wrong ones give wrong results and touch no foreign memory.
        NotImplementedError: ``backend`` cannot run this call; the message says why.

    Follows Dao et al., FlashAttention (2022), for the tiling; Press et al., Train Short, Test Long (2022), for ALiBi.
    """
    args = _prepare(
        q,
        k,
        v,
        scale=scale,
        causal=causal,
        window=window,
        mask=mask,
        pattern=pattern,
        bias=bias,
        bias_table=bias_table,
        bias_index=bias_index,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        dropout_p=dropout_p,
    )
    out, lse, *_ = _run(args, backend, 2 if return_lse else 1)
    return (out, lse) if return_lse else out


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    q = torch.zeros(1, 1, 16, 32, device=device, dtype=dtype)
    return (q, q, q), {}


OP = dispatch.register(
    dispatch.Op(
        name="softmax_attention",
        function=softmax_attention,
        prepare=_prepare,
        example=_example,
        backends=(
            dispatch.Backend(
                "torch",
                _why_not_torch,
                _torch_forward,
                _torch_backward,
                frozenset({"cpu", "cuda"}),
                HALF_DTYPES,
                extra=True,
            ),
            dispatch.Backend("cpu", _why_not_cpu, _cpu_forward, _cpu_backward, frozenset({"cpu"}), KERNEL_DTYPES),
            dispatch.Backend(
                "triton", _why_not_triton, _triton.forward, _triton_backward, frozenset({"cuda"}), KERNEL_DTYPES
            ),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
    )
)
