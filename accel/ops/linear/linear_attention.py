"""Linear attention: weights are products of features, so that a state of fixed size remembers all tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library
from accel.backends import KERNEL_DTYPES, inner_dtype
from accel.ops.layout import empty_like_layout, finite, rows_contiguous
from accel.ops.linear import feature_maps
from accel.ops.linear.arguments import State, check_decay, check_heads, check_key_mask, check_state, to_heads
from accel.ops.packed import read_packed


class Args(NamedTuple):
    """The checked arguments every backend receives. H = max(Hq, Hk, Hv), Hs = max(Hk, Hv); N is B, or the number of
    packed sequences. Head h reads q's head h·Hq/H and state head h·Hs/H; state head s reads k's head s·Hk/Hs, likewise
    v's."""

    q: Tensor  # (B, Hq, T, D), the last axis contiguous, as in k and v
    k: Tensor  # (B, Hk, S, D)
    v: Tensor  # (B, Hv, S, E)
    decay: Tensor | None  # (1, Hs, 1) or (B, Hs, T) fp32 (fp64 beside fp64) contiguous; causal only
    kv: Tensor | None  # (N, Hs, D, E) fp32 (fp64 beside fp64) contiguous: the state before the first token
    k_sum: Tensor | None  # (N, Hs, D) the same, where the output is normalized
    key_mask: Tensor | None  # (B, S) bool contiguous
    cu_q: Tensor | None  # (N + 1,) int32
    cu_k: Tensor | None  # None where keys are packed as queries are
    features: str  # one of feature_maps.ELEMENTWISE, applied to q and k
    causal: bool
    normalize: bool
    return_state: bool
    keep: bool  # the denominators, which a backward starts from
    scale: float
    eps: float

    @property
    def heads(self) -> int:
        return max(self.q.shape[1], self.k.shape[1], self.v.shape[1])

    @property
    def state_heads(self) -> int:
        return max(self.k.shape[1], self.v.shape[1])

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_q is None else self.cu_q.shape[0] - 1


# --- the definition ---


def _members(offsets: Tensor, tokens: int) -> Tensor:
    """Whether token t is of sequence n, ``(N, 1, tokens, 1)``."""
    at = torch.arange(tokens, device=offsets.device)
    return ((offsets[:-1, None] <= at) & (at < offsets[1:, None]))[:, None, :, None]


def reference(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op in plain torch, fp32 or fp64 inside, in memory quadratic in the tokens: output ``(B, H, T, E)``, state
    ``(N, Hs, D, E)`` and ``(N, Hs, D)``, empty where none is asked for, and the denominator ``(B, H, T)``.

    What is not finite makes the rows and the state that see it NaN, and reaches no other.
    """
    args = Args(*given)
    inner = inner_dtype(args.q)
    feature = feature_maps.ELEMENTWISE[args.features]
    q, bad_q = finite(feature(args.q.to(inner).contiguous()))  # sums must not depend on strides
    k = feature(args.k.to(inner).contiguous())
    v = args.v.to(inner).contiguous()
    decay = args.decay
    seen: Tensor | None = None  # (N, 1, S, 1)
    own: Tensor | None = None  # queries, (N, 1, T, 1)
    if args.key_mask is not None:
        seen = args.key_mask[:, None, :, None]
    if args.cu_q is not None:  # each sequence alone, among the tokens of all
        own = _members(args.cu_q, args.q.shape[2])
        seen = own if args.cu_k is None else _members(args.cu_k, args.k.shape[2])
        if decay is not None:
            decay = torch.where(own[..., 0], decay, 0.0)
    if seen is not None:
        k, v = torch.where(seen, k, 0.0), torch.where(seen, v, 0.0)
    k, bad_k = finite(k)
    v, bad_v = finite(v)
    bad = to_heads(bad_k, args.state_heads) | to_heads(bad_v, args.state_heads)  # (N, Hs, S)

    weights = args.scale * to_heads(q, args.heads) @ to_heads(k, args.heads).transpose(-2, -1)
    past = torch.ones(weights.shape[-2:], dtype=torch.bool, device=q.device)
    if args.causal:
        past = past.tril()
        weights = torch.where(past, weights, 0.0)
    from_start = to_end = None
    if decay is not None:
        total = decay.double().expand(-1, -1, args.q.shape[2]).cumsum(-1)
        # a token with itself depends on no decay: left out, or rounding would leave it a gradient
        between = torch.where(past.tril(-1), total[..., :, None] - total[..., None, :], 0.0)
        weights = weights * to_heads(torch.exp(between).to(inner), args.heads)
        from_start, to_end = torch.exp(total).to(inner), torch.exp(total[..., -1:] - total).to(inner)
    num, den = weights @ to_heads(v, args.heads), weights.sum(-1)
    if args.kv is not None:
        before = args.scale * q
        if from_start is not None:
            before = to_heads(before, args.heads) * to_heads(from_start, args.heads)[..., None]
        num = num + to_heads(before, args.heads) @ to_heads(args.kv.to(inner), args.heads)
        if args.k_sum is not None:
            den = den + (to_heads(before, args.heads) * to_heads(args.k_sum.to(inner), args.heads)[:, :, None]).sum(-1)
    if args.normalize:
        den = den + args.eps
        out = torch.where((den == 0.0)[..., None], 0.0, num / torch.where(den == 0.0, 1.0, den)[..., None])
    else:
        out = num
    reached = to_heads((past & bad[..., None, :]).any(-1), args.heads) | to_heads(bad_q, args.heads)
    out = torch.where(reached[..., None], math.nan, out)
    out = out.flatten().view(out.shape)  # whose gradient is contiguous: sums must not depend on its strides
    if own is not None:
        out, den = [torch.where(of, x, 0.0).sum(0, keepdim=True) for of, x in ((own, out), (own[..., 0], den))]
    kv = k_sum = out.new_empty(0, dtype=inner)
    if args.return_state:
        weighed = to_heads(k, args.state_heads)
        if to_end is not None:
            weighed = weighed * to_end[..., None]
        kv, k_sum = weighed.transpose(-2, -1) @ to_heads(v, args.state_heads), weighed.sum(-2)
        if args.kv is not None:
            shrink = 1.0 if from_start is None else from_start[..., -1, None, None]
            kv = kv + shrink * args.kv.to(inner)
        if args.k_sum is not None:
            k_sum = k_sum + (1.0 if from_start is None else from_start[..., -1, None]) * args.k_sum.to(inner)
        lost = bad.any(-1)
        kv = torch.where(lost[..., None, None], math.nan, kv)
        k_sum = torch.where(lost[..., None], math.nan, k_sum) if args.normalize else k_sum.new_empty(0)
    return out.to(args.q.dtype), kv, k_sum, den.detach()


# --- backends, fastest first for each device ---

MAX_SIZE = 512
"""Of a head's features and of its values, in the CPU kernel."""


def _why_not_cpu(args: Args) -> str | None:
    largest = max(args.q.shape[3], args.v.shape[3])
    if largest > MAX_SIZE:
        return f"it takes up to {MAX_SIZE} features and values a head, not {largest}"
    return backends.why_not_cpu(args)


_cpu_forward, _cpu_backward = backends.native("linear_attention")
_triton = backends.triton(__name__)


# --- declaration ---


def _fake(args: Args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, n, hs, d, e = args.q, args.sequences, args.state_heads, args.q.shape[3], args.v.shape[3]
    out = empty_like_layout(q, (q.shape[0], args.heads, q.shape[2], e))
    kv = q.new_empty((n, hs, d, e) if args.return_state else (0,), dtype=torch.float32)
    k_sum = q.new_empty((n, hs, d) if args.return_state and args.normalize else (0,), dtype=torch.float32)
    kept = (q.shape[0], args.heads, q.shape[2]) if args.normalize and args.keep else (0,)
    den = q.new_empty(kept, dtype=torch.float32)
    return out, kv, k_sum, den


def _backward_fake(args: Args, made: Sequence[bool]) -> tuple[Tensor, ...]:
    small = [x.shape if x is not None and wanted else (0,) for x, wanted in zip(args[3:6], made[3:], strict=True)]
    main = [empty_like_layout(x, x.shape) for x in args[:3]]
    return *main, *[args.q.new_empty(shape, dtype=torch.float32) for shape in small]


def _flops(args: Args) -> int:
    """Of the state's two products, with q and with v: what the recurrence costs."""
    features = args.q.shape[3] * args.v.shape[3]
    states = args.k.shape[0] * args.state_heads * args.k.shape[2]
    return 2 * features * (args.q.shape[0] * args.heads * args.q.shape[2] + states)


# --- the public function ---


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | tuple[Any, ...] | Callable[[Tensor], Tensor] = "elu1",
    causal: bool = False,
    normalize: bool = True,
    scale: float = 1.0,
    log_decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    position: int = 0,
    eps: float = 1e-6,
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    if all([isinstance(x, Tensor) for x in (q, k, v)]) and q.device == k.device == v.device:
        q, k, v = library.autocast(q), library.autocast(k), library.autocast(v)
    check_heads(q, k, v)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale=}")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, got {eps=}")
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal needs as many queries as keys, got {tuple(q.shape)=}, {tuple(k.shape)=}")
    if key_mask is not None and cu_seqlens_q is not None:
        raise ValueError(f"in packed form there is no padding to mask, got key_mask and {tuple(cu_seqlens_q.shape)=}")
    packed = read_packed(cu_seqlens_q, cu_seqlens_k, q, k)
    if causal and packed is not None and not packed.same:
        raise ValueError("causal needs queries and keys packed alike: leave cu_seqlens_k out")
    key_mask = check_key_mask(key_mask, k)
    has_state = initial_state is not None or return_state
    name = feature_maps.check(
        feature_map, q, causal=causal, packed=packed is not None, has_state=has_state, position=position
    )
    if name not in feature_maps.ELEMENTWISE:

        def places(x: Tensor) -> Tensor:
            """The position of each token of q or k."""
            at = torch.arange(x.shape[2], device=x.device)
            if packed is not None:
                offsets = packed.q if x is q else packed.k
                at = at - offsets[torch.searchsorted(offsets, at, right=True).clamp(1, packed.sequences) - 1]
            return at + position

        q, k = feature_maps.apply(feature_map, name, q, k, key_mask, places)
        name = "identity"
        if q.shape[3] != k.shape[3]:
            raise ValueError(f"feature_map gave {q.shape[3]} features of q and {k.shape[3]} of k")
    inner, hs = inner_dtype(q), max(k.shape[1], v.shape[1])
    sequences = q.shape[0] if packed is None else packed.sequences
    kv, k_sum = check_state(initial_state, (sequences, hs, q.shape[3], v.shape[3]), normalize, q, inner)
    return Args(
        q=rows_contiguous(q),
        k=rows_contiguous(k),
        v=rows_contiguous(v),
        decay=check_decay(log_decay, (q.shape[0], hs, q.shape[2]), causal, q, inner),
        kv=kv,
        k_sum=k_sum,
        key_mask=key_mask,
        cu_q=None if packed is None else packed.q,
        cu_k=None if packed is None or packed.same else packed.k,
        features=name,
        causal=bool(causal),
        normalize=bool(normalize),
        return_state=bool(return_state),
        keep=True,
        scale=float(scale),
        eps=float(eps) if normalize else 0.0,
    )


_run = library.differentiable(
    "linear_attention",
    Args,
    reference,
    gradients=6,
    always=3,
    outputs=["out", "kv", "k_sum", "den"],  # den: the denominators with eps, empty where none are kept
    differentiable_outputs=3,
    keep_outputs=["out", "den"],
    fake=_fake,
    flops=_flops,
    backward_fake=_backward_fake,
    backward_flops=lambda args, made: 3 * _flops(args),  # five products of a state with a token, and one to make it
    lay_out=lambda grad, args: rows_contiguous(grad),
)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | tuple[Any, ...] | Callable[[Tensor], Tensor] = "elu1",
    causal: bool = False,
    normalize: bool = True,
    scale: float = 1.0,
    log_decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    position: int = 0,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, State]:
    r"""Attention by features, in time linear in the tokens and memory for one state, with decay, states and gradients.

    .. math:: w_{ij} = a\, e^{\sum_{t=j+1}^{i} g_t}\, \varphi(q_i) \cdot \varphi(k_j), \qquad
        y_i = \frac{\sum_j w_{ij} v_j}{\epsilon + \sum_j w_{ij}}

    with a the ``scale``, g the ``log_decay`` and φ the ``feature_map``; j runs over all keys, or over j <= i where
    ``causal``. Without ``normalize`` y is the sum alone. Where the denominator is 0, y and its gradient are 0. A state
    S, z enters as keys before the first token do: :math:`S_i = e^{g_i} S_{i-1} + \varphi(k_i)^T v_i`, likewise z
    without v. What is not finite in a token makes the rows that see it NaN, and no others.

    Args:
        q: ``(B, Hq, T, D)``, any strides; float32, bfloat16, float16, and float64 on the reference. Under autocast
            q, k and v are cast as a matrix product's operands would be.
        k: ``(B, Hk, S, D)``.
        v: ``(B, Hv, S, E)``. Of H = max(Hq, Hk, Hv) output heads, each of the three numbers is a divisor, and Hk and
            Hv of Hs = max(Hk, Hv): head h reads q's head ``h·Hq // H``, k's head ``h·Hk // H`` and v's ``h·Hv // H``.
            Grouped queries are Hq > Hk = Hv, Mamba-2's layout is Hq = Hk < Hv.
        feature_map: ``"identity"``, ``"elu1"`` (elu(x) + 1), ``"relu"``, ``"squared_relu"``, ``"exp"``;
            ``"softmax"``, over the features of q and over the tokens of k (not causal, no state);
            ``("cosformer", max_length)``, 2·D features; ``("performer", projection)``, positive random features by
            ``projection (M, D)``, M <= 512, which gets no gradient; or a callable from ``(B, H, tokens, D)`` to any
            number of features. Those up to ``"exp"`` are part of the kernels, the others are computed before them.
        causal: query i sees keys j <= i; needs T = S.
        normalize: divide by the sum of the weights.
        scale: factor of the weights.
        log_decay: at most 0, causal only: ``(Hs,)``, one for all tokens (retention, lightning attention), or
            ``(B, Hs, T)``, one for each (Mamba-2, gated linear attention); any floating dtype; has a gradient. Values
            are checked on a CPU alone.
        key_mask: boolean ``(B, S)``, True where a key takes part. A key that does not still decays the state.
        initial_state: ``(kv, k_sum)``: fp32 ``(N, Hs, F, E)`` and ``(N, Hs, F)``, F the number of features, N = B or
            the number of packed sequences; k_sum is None where nothing is normalized; have gradients.
        return_state: also return the state after the last token.
        cu_seqlens_q: int32 or int64 ``(N + 1,)``, rising from 0 to the number of tokens: the packed form,
            ``(1, H, total, D)``. Sequences do not see each other, and each has a state of its own.
        cu_seqlens_k: the same for keys; those of q if None.
        position: of the first token, for ``"cosformer"``.
        eps: added to the denominator.
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(B, H, T, E)`` in the dtype of q, or a pair with the state ``(kv, k_sum)`` in fp32, k_sum None without
        ``normalize``.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: shapes, sizes, names, values or devices that do not fit; the message holds them.
        NotImplementedError: ``backend`` cannot run this call; the message says why.

    Follows Katharopoulos et al., Transformers are RNNs (2020); Sun et al., Retentive Network (2023), and Dao and Gu,
    Transformers are SSMs (2024), for decay; Shen et al., Efficient Attention (2021); Qin et al., cosFormer (2022);
    Choromanski et al., Rethinking Attention with Performers (2021).
    """
    args = _prepare(
        q,
        k,
        v,
        feature_map=feature_map,
        causal=causal,
        normalize=normalize,
        scale=scale,
        log_decay=log_decay,
        key_mask=key_mask,
        initial_state=initial_state,
        return_state=return_state,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        position=position,
        eps=eps,
    )
    args = args._replace(keep=library.requires_gradient(args[:6]))
    out, kv, k_sum, _ = _run(args, backend, 3 if return_state else 1)
    return (out, (kv, k_sum if args.normalize else None)) if return_state else out


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    q = torch.zeros(1, 1, 16, 32, device=device, dtype=dtype)
    return (q, q, q), {"causal": True}


OP = dispatch.register(
    dispatch.Op(
        name="linear_attention",
        function=linear_attention,
        prepare=_prepare,
        example=_example,
        backends=(
            dispatch.Backend("cpu", _why_not_cpu, _cpu_forward, _cpu_backward, frozenset({"cpu"}), KERNEL_DTYPES),
            dispatch.Backend("triton", *_triton, frozenset({"cuda"}), KERNEL_DTYPES),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
    )
)
