"""One token of linear attention, for decoding: the state is updated in place, and nothing has a gradient."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library, transforms
from accel.backends import check_beside, inner_dtype
from accel.ops.linear import feature_maps
from accel.ops.linear.arguments import State, check_heads, to_heads

_CODES = {name: code for code, name in enumerate(feature_maps.ELEMENTWISE)}
"""As csrc/cpu/linear/linear_attention/params.h numbers them."""


class Args(NamedTuple):
    """The checked arguments every backend receives. Heads are numbered as in linear_attention."""

    q: Tensor  # (B, Hq, 1, D), any strides, as k and v
    k: Tensor  # (B, Hk, 1, D)
    v: Tensor  # (B, Hv, 1, E)
    kv: Tensor  # (B, Hs, D, E) fp32 (fp64 beside fp64), any strides: updated
    k_sum: Tensor | None  # (B, Hs, D) the same, where the output is normalized
    decay: Tensor | None  # (Hs,) or (B, Hs, 1) in the dtype of kv
    features: str  # one of feature_maps.ELEMENTWISE
    normalize: bool
    scale: float
    eps: float

    @property
    def heads(self) -> int:
        return max(self.q.shape[1], self.kv.shape[1])


# --- the definition ---


def reference(*given: Any) -> Tensor:
    """The op in plain torch, in the dtype of the state: the output ``(B, H, 1, E)``."""
    args = Args(*given)
    kv, k_sum, heads, inner = args.kv, args.k_sum, args.heads, args.kv.dtype
    feature, state_heads = feature_maps.ELEMENTWISE[args.features], kv.shape[1]
    q, k = feature(args.q.to(inner)) * args.scale, to_heads(feature(args.k.to(inner)), state_heads)
    if args.decay is not None:
        shrink = torch.exp(args.decay).view(-1, state_heads, 1)
        kv.mul_(shrink[..., None])
        if k_sum is not None:
            k_sum.mul_(shrink)
    kv.addcmul_(k.transpose(-2, -1), to_heads(args.v.to(inner), state_heads))
    asked = to_heads(q, heads).view(q.shape[0], state_heads, heads // state_heads, q.shape[3])
    out = asked @ kv
    if k_sum is not None:
        k_sum.add_(k[:, :, 0])
        den = asked @ k_sum[..., None] + args.eps
        out = torch.where(den == 0.0, 0.0, out / torch.where(den == 0.0, 1.0, den))
    return out.reshape(out.shape[0], heads, 1, out.shape[3]).to(args.q.dtype)


# --- backends ---


def why_not_state(args: Args) -> str | None:
    """Why kernels cannot update the state in place."""
    if not _is_dense(args.kv) or (args.k_sum is not None and args.k_sum.stride(-1) != 1):
        return f"the state is laid out with strides {args.kv.stride()}: not a matrix a head, one behind the other"
    if 0 in args.kv.shape:
        return f"the state is empty: {tuple(args.kv.shape)}"
    return None


def _why_not_cpu(args: Args) -> str | None:
    return why_not_state(args) or backends.why_not_cpu(args)


def _is_dense(kv: Tensor) -> bool:
    """Whether the state of a head is a matrix without gaps, stored by rows or by columns, and no two overlap."""
    (batch, heads, d, e), (by_batch, by_head, by_d, by_e) = kv.shape, kv.stride()
    inner = (by_e == 1 and by_d == e) or (by_d == 1 and by_e == d)
    return inner and (heads == 1 or by_head >= d * e) and (batch == 1 or by_batch >= (heads - 1) * by_head + d * e)


def _cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    k_sum: Tensor | None,
    decay: Tensor | None,
    features: str,
    normalize: bool,
    scale: float,
    eps: float,
) -> Tensor:
    out: Tensor = _native()(q, k, v, kv, k_sum, decay, _CODES[features], scale, eps)
    _count_changes(kv, k_sum)
    return out


def _triton_forward(*given: Any) -> Tensor:
    out: Tensor = _triton.forward(*given)
    _count_changes(given[3], given[4])
    return out


_triton = backends.triton(__name__)


def _count_changes(kv: Tensor, k_sum: Tensor | None) -> None:
    """Which torch does for its own ops alone."""
    if not kv.is_inference():
        _increment_version([kv] if k_sum is None or k_sum.is_inference() else [kv, k_sum])
    elif k_sum is not None and not k_sum.is_inference():
        _increment_version([k_sum])


_increment_version = torch._C._increment_version


@functools.cache
def _native() -> Any:
    """The op in accel._C, which has been loaded: three look-ups, beside a kernel that may take as long."""
    return torch.ops.accel_native.linear_attention_step.default


def _lean(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    feature_map: Any,
    normalize: bool,
    scale: float,
    log_decay: Tensor | None,
    eps: float,
) -> Tensor | None:
    """The CPU kernel without a look at the arguments: a token of a small model costs less than looking at them does.

    The kernel's binding refuses, before it writes, whatever it cannot take. None where it did, or where something has
    to be seen to first: the long way says what is wrong, or finds another backend.
    """
    features = _CODES.get(feature_map) if type(feature_map) is str else None
    if features is None or type(state) is not tuple or len(state) != 2 or dispatch.leaf_reason("accel._C"):
        return None
    kv, k_sum = state
    if not normalize:
        k_sum = None
    elif k_sum is None:
        return None
    try:
        if not q.is_cpu or torch.is_autocast_enabled("cpu"):
            return None
        if torch.is_grad_enabled() and (
            q.requires_grad
            or k.requires_grad
            or v.requires_grad
            or kv.requires_grad
            or (k_sum is not None and k_sum.requires_grad)
            or (log_decay is not None and log_decay.requires_grad)
        ):
            return None
        if log_decay is not None and log_decay.dtype is not torch.float32:
            log_decay = log_decay.float()
        return _cpu(q, k, v, kv, k_sum, log_decay, feature_map, normalize, scale, eps)
    except (RuntimeError, TypeError, AttributeError):
        return None


# --- declaration: a registered op for tracers, which a call from Python need not go through ---


def _fake(args: Args) -> Tensor:
    return args.q.new_empty((args.q.shape[0], args.heads, 1, args.v.shape[3]))


_op = library.register(
    "linear_attention_step",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) kv, Tensor(b!)? k_sum, Tensor? decay, str features, bool normalize, "
    "Scalar scale, Scalar eps, str backend) -> Tensor",
    lambda *given: dispatch.OPS["linear_attention_step"].backend(given[-1]).forward(*given[:-1]),
    lambda *given: _fake(Args(*given[:-1])),
    lambda *given: 2 * given[3].numel() * (1 + Args(*given[:-1]).heads // given[3].shape[1]),
)


# --- the public function ---


def _check(
    q: Tensor, k: Tensor, v: Tensor, state: State, log_decay: Tensor | None, normalize: bool, scale: float, eps: float
) -> None:
    check_heads(q, k, v)
    if q.shape[2] != 1 or k.shape[2] != 1:
        raise ValueError(f"a step is of one token, (B, H, 1, D), got {tuple(q.shape)=}, {tuple(k.shape)=}")
    if not -math.inf < scale < math.inf or not 0.0 <= eps < math.inf:
        raise ValueError(f"scale must be finite and eps at least 0 and finite, got {scale=}, {eps=}")
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"state must be a pair (kv, k_sum), got {type(state).__name__}")
    kv, k_sum = state
    heads, inner = max(k.shape[1], v.shape[1]), inner_dtype(q)
    shape = (q.shape[0], heads, q.shape[3], v.shape[3])
    if normalize and k_sum is None:
        raise ValueError("state has k_sum=None, which normalize=True needs")
    for name, x, wanted in [("kv", kv, shape)] + ([("k_sum", k_sum, shape[:3])] if normalize else []):
        check_beside(x, f"{name} of state", q, "q")
        assert x is not None
        if x.dtype != inner:
            raise TypeError(f"{name} of state must be {inner} beside {q.dtype}, got {x.dtype}")
        if tuple(x.shape) != wanted:
            raise ValueError(f"{name} of state must be {tuple(wanted)}, got {tuple(x.shape)}")
    if log_decay is not None:
        check_beside(log_decay, "log_decay", q, "q")
        if tuple(log_decay.shape) not in ((heads,), (*shape[:2], 1)):
            raise ValueError(
                f"log_decay must be (Hs,) = ({heads},) or (B, Hs, 1) = {(*shape[:2], 1)}, got {tuple(log_decay.shape)}"
            )


def _refuse_gradients(tensors: tuple[Tensor | None, ...]) -> None:
    wanted = [x for x in tensors if x is not None and x.requires_grad]
    if wanted:
        raise NotImplementedError(
            f"linear_attention_step has no gradient, and {len(wanted)} of its tensors require one: call it under "
            "torch.no_grad(), or linear_attention with initial_state and return_state"
        )


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    *,
    feature_map: str | Callable[[Tensor], Tensor] = "elu1",
    normalize: bool = True,
    scale: float = 1.0,
    log_decay: Tensor | None = None,
    eps: float = 1e-6,
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        q, k, v = library.autocast(q), library.autocast(k), library.autocast(v)
    name = feature_map
    if not isinstance(name, str) or name not in feature_maps.ELEMENTWISE:
        if not callable(name):
            names = ", ".join(_CODES)
            raise ValueError(f"feature_map must be one of {names}, or a callable, got {feature_map!r:.80}")
        q, k, name = name(q), name(k), "identity"
    _check(q, k, v, state, log_decay, normalize, scale, eps)
    kv, k_sum = state
    return Args(
        q, k, v, kv, k_sum if normalize else None, None if log_decay is None else log_decay.to(kv.dtype), name,
        normalize, scale, eps,
    )  # fmt: skip


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    *,
    feature_map: str | Callable[[Tensor], Tensor] = "elu1",
    normalize: bool = True,
    scale: float = 1.0,
    log_decay: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    r"""One token of causal :func:`accel.linear_attention`, for decoding: updates the state in place.

    .. math:: S \leftarrow e^g S + \varphi(k)^T v, \qquad z \leftarrow e^g z + \varphi(k), \qquad
        y = \frac{a\, \varphi(q) S}{a\, \varphi(q) \cdot z + \epsilon}

    with a the ``scale``, g the ``log_decay`` and φ the ``feature_map``. Without ``normalize`` y is the numerator alone,
    and there is no z. Where the denominator is 0, y is 0. What is not finite spreads as in plain arithmetic.

    It has no gradient, and only the values of the state change: who kept a state elsewhere must have copied it.

    Args:
        q: ``(B, Hq, 1, D)``, any strides; float32, bfloat16, float16, and float64 on the reference. Under autocast
            q, k and v are cast as a matrix product's operands would be.
        k: ``(B, Hk, 1, D)``.
        v: ``(B, Hv, 1, E)``. Heads are shared as in :func:`accel.linear_attention`: of H = max(Hq, Hk, Hv) output
            heads each number is a divisor, and Hk and Hv of Hs = max(Hk, Hv).
        state: ``(kv, k_sum)``, as :func:`accel.linear_attention` returns it: float32 ``(B, Hs, F, E)`` and
            ``(B, Hs, F)``, F the number of features; float64 beside float64. k_sum is None where nothing is normalized.
            Each head of kv may be stored by rows or by columns.
        feature_map: ``"identity"``, ``"elu1"``, ``"relu"``, ``"squared_relu"``, ``"exp"``, or a callable from
            ``(B, H, 1, D)`` to any number of features.
        normalize: divide by the sum of the weights.
        scale: factor of the weights.
        log_decay: ``(Hs,)`` or ``(B, Hs, 1)``; any floating dtype. Its values are not checked.
        eps: added to the denominator.
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(B, H, 1, E)`` in the dtype of q.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: shapes, sizes, names or devices that do not fit; the message holds them.
        NotImplementedError: something requires a gradient, or ``backend`` cannot run this call.
    """
    untraced = transforms.untraced()
    if backend is None and dispatch._settings.backend is None and untraced:
        out = _lean(q, k, v, state, feature_map, normalize, scale, log_decay, eps)
        if out is not None:
            return out
    args = _prepare(
        q, k, v, state, feature_map=feature_map, normalize=normalize, scale=scale, log_decay=log_decay, eps=eps
    )
    if torch.is_grad_enabled():
        _refuse_gradients(args[:6])
    chosen = dispatch.select(OP, args, backend)
    if chosen.name == "reference" or untraced:
        return chosen.forward(*args)  # type: ignore[no-any-return]
    return _op(*args, chosen.name)  # type: ignore[no-any-return]


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    q = torch.zeros(1, 1, 1, 32, device=device, dtype=dtype)
    kv = torch.zeros(1, 1, 32, 32, device=device, dtype=inner_dtype(q))
    return (q, q, q, (kv, kv[..., 0].clone())), {}


OP = dispatch.register(
    dispatch.Op(
        name="linear_attention_step",
        function=linear_attention_step,
        prepare=_prepare,
        example=_example,
        backends=(
            dispatch.Backend("cpu", _why_not_cpu, _cpu, devices=frozenset({"cpu"}), dtypes=backends.KERNEL_DTYPES),
            dispatch.Backend(
                "triton", _triton.why_not, _triton_forward, devices=frozenset({"cuda"}), dtypes=backends.KERNEL_DTYPES
            ),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
        differentiable=False,
    )
)
