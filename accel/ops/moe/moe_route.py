"""Routing of a mixture of experts: the K experts of each token, and the weight of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accel import backends, dispatch, library
from accel.backends import KERNEL_DTYPES, check_beside, check_floating, inner_dtype, integer


class Args(NamedTuple):
    """The checked arguments every backend receives."""

    logits: Tensor  # (T, X) contiguous
    bias: Tensor | None  # (X,) contiguous fp32 (fp64 beside fp64): of the choice alone
    top_k: int
    score: str  # one of SCORES, or SOFTMAX_TOPK
    num_groups: int  # 1 where experts have none
    topk_groups: int
    group_score: str  # one of GROUP_SCORES
    renormalize: bool
    eps: float
    scale: float


# --- the definition ---


def _sqrt_softplus(x: Tensor) -> Tensor:
    """sqrt(ln(1 + e^x)); far below 0, where it is e^(x/2) to the last bit, without a quotient of two zeros in its
    derivative."""
    low = x < -40.0
    return torch.where(
        low, (torch.where(low, x, 0.0) / 2).exp(), F.softplus(torch.where(low, 0.0, x), threshold=40.0).sqrt()
    )


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": _sqrt_softplus,
}
"""From the logits of all experts to their scores."""

SOFTMAX_TOPK = "softmax_topk"
GROUP_SCORES = ("top2_sum", "max")


def descending(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values and places of the last axis from the largest on; of equal ones the first comes first, NaN last."""
    ordered, places = (-x).sort(dim=-1, stable=True)
    return -ordered, places


def choice_scores(logits: Tensor, score: str) -> Tensor:
    """What is compared where scores are: a NaN makes no other expert's NaN."""
    if score != "softmax":
        return logits if score == SOFTMAX_TOPK else SCORES[score](logits)
    bad = logits.isnan()
    return torch.where(bad, math.nan, torch.where(bad, -math.inf, logits).softmax(-1))


def _choose(logits: Tensor, bias: Tensor | None, args: Args) -> Tensor:
    """The K experts of each token, the best first."""
    by = scores = logits  # of which every score is an increasing function
    if bias is not None or args.num_groups > 1:
        scores = choice_scores(logits, args.score)
    if bias is not None:
        by = scores = scores + bias
    if args.num_groups == 1:
        return descending(by)[1][..., : args.top_k]
    size = logits.shape[-1] // args.num_groups
    best = descending(scores.unflatten(-1, (args.num_groups, size)))[0]
    groups = best[..., 0] if args.group_score == "max" else best[..., :2].sum(-1)
    chosen = descending(groups)[1][..., : args.topk_groups].sort(dim=-1)[0]
    experts = (chosen[..., None] * size + torch.arange(size, device=logits.device)).flatten(-2)
    places = descending(by.gather(-1, experts))[1][..., : args.top_k]
    return experts.gather(-1, places)


def reference(*given: Any) -> tuple[Tensor, Tensor]:
    """The op in plain torch, fp32 or fp64 inside."""
    args = Args(*given)
    logits = args.logits.to(inner_dtype(args.logits))
    indices = _choose(logits.detach(), None if args.bias is None else args.bias.detach(), args)
    if args.score == SOFTMAX_TOPK:
        weights = logits.gather(-1, indices).softmax(-1)
        return weights * args.scale, indices
    if args.score == "softmax":
        weights = logits.softmax(-1).gather(-1, indices)
    else:  # of the chosen alone: a NaN among the others must not reach the gradient
        weights = SCORES[args.score](logits.gather(-1, indices))
    if args.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + args.eps)
    return weights * args.scale, indices


# --- backends, fastest first for each device ---


_native = backends.native("moe_route")
_triton = backends.triton(__name__)


# --- declaration ---


def _fake(args: Args) -> tuple[Tensor, Tensor]:
    shape = (args.logits.shape[0], args.top_k)
    return args.logits.new_empty(shape, dtype=torch.float32), args.logits.new_empty(shape, dtype=torch.int64)


def _flops(args: Args) -> int:
    """One a logit: what is compared and what is raised to a power is not counted apart."""
    logits: int = args.logits.shape[0] * args.logits.shape[1]
    return logits


# --- the public function ---


def check_logits(logits: Any, name: str = "logits") -> None:
    check_floating(logits, name)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{name} must be (T, X) with at least one expert, got {tuple(logits.shape)}")


def _check_groups(experts: int, top_k: int, num_groups: int | None, topk_groups: int | None) -> tuple[int, int]:
    if num_groups is None and topk_groups is None:
        return 1, 1
    if num_groups is None or topk_groups is None:
        raise ValueError(f"num_groups and topk_groups go together, got {num_groups=}, {topk_groups=}")
    groups, chosen = integer(num_groups), integer(topk_groups)
    if groups < 1 or experts % groups != 0:
        raise ValueError(f"num_groups must divide the {experts} experts, got {num_groups=}")
    if not 1 <= chosen <= groups:
        raise ValueError(f"topk_groups must be from 1 to {num_groups=}, got {topk_groups=}")
    if top_k > chosen * (experts // groups):
        raise ValueError(f"{top_k=} is more than the {chosen} x {experts // groups} experts of {topk_groups=}")
    return groups, chosen


def _prepare(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    bias: Tensor | None = None,
    num_groups: int | None = None,
    topk_groups: int | None = None,
    group_score: str = "top2_sum",
    renormalize: bool = True,
    eps: float = 1e-20,
    scale: float = 1.0,
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    check_logits(logits)
    experts = logits.shape[1]
    top_k = integer(top_k)
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be from 1 to the number of experts, {experts}, got {top_k=}")
    if score not in (*SCORES, SOFTMAX_TOPK):
        raise ValueError(f"score must be one of {', '.join([*SCORES, SOFTMAX_TOPK])}, got {score!r:.80}")
    if group_score not in GROUP_SCORES:
        raise ValueError(f"group_score must be one of {', '.join(GROUP_SCORES)}, got {group_score!r:.80}")
    groups, chosen = _check_groups(experts, top_k, num_groups, topk_groups)
    if not 0.0 <= eps < math.inf or not -math.inf < scale < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, and scale finite, got {eps=}, {scale=}")
    if bias is not None:
        check_beside(bias, "bias", logits, "logits")
        if tuple(bias.shape) != (experts,):
            raise ValueError(f"bias must be (X,) = ({experts},), got {tuple(bias.shape)}")
        bias = bias.detach().to(inner_dtype(logits)).contiguous()
    if chosen == groups:  # all of them: no limit
        groups = chosen = 1
    rest = (bool(renormalize), float(eps), float(scale))
    return Args(logits.contiguous(), bias, top_k, score, groups, chosen, group_score, *rest)


_run = library.differentiable(
    "moe_route",
    Args,
    reference,
    gradients=1,
    always=1,
    outputs=["weights", "indices"],
    keep_outputs=["indices"],
    fake=_fake,
    flops=_flops,
    backward_flops=lambda args, made: _flops(args),
)


def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    bias: Tensor | None = None,
    num_groups: int | None = None,
    topk_groups: int | None = None,
    group_score: str = "top2_sum",
    renormalize: bool = True,
    eps: float = 1e-20,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The K experts of each token and their weights, as every router of a mixture of experts gives them.

    With :math:`s_{tx}` the score of expert x for token t, and :math:`C_t` the K experts with the largest
    :math:`s_{tx} + b_x`,

    .. math:: w_{tx} = a\, \frac{s_{tx}}{\epsilon + \sum_{y \in C_t} s_{ty}}, \quad x \in C_t

    or :math:`a\, s_{tx}` without ``renormalize``. Everything is computed in float32.

    - ``"softmax"`` scores by the softmax over all experts (Switch, Mixtral with ``renormalize``, Qwen, OLMoE);
    - ``"softmax_topk"`` by the softmax over the logits of the chosen alone (GPT-OSS, Granite): they are chosen by
      logit, plus ``bias``, and sum to 1 by themselves, so that ``renormalize`` changes nothing;
    - ``"sigmoid"`` by :math:`1 / (1 + e^{-l})` (DeepSeek-V3, Llama 4, GLM);
    - ``"sqrt_softplus"`` by :math:`\sqrt{\ln(1 + e^l)}` (DeepSeek-V4).

    With groups, the X experts are ``num_groups`` runs of equal length, and only those of the ``topk_groups`` best
    groups can be chosen; a group is as good as the sum of its two best :math:`s + b` (``"top2_sum"``, of one expert
    where it has no more) or its best (``"max"``).

    What is equal goes to the lower index, experts and groups alike. Without ``bias`` experts are compared by their
    logits, of which every score is an increasing function, so that scores which round to the same number are told
    apart. In the choice a NaN loses to every number, −∞ included. It is not hidden: where it takes part in a weight, in
    the softmax or as one of the chosen, that weight and its gradients are NaN.

    Args:
        logits: ``(T, X)``; float32, bfloat16, float16, and float64 on the reference. Autocast casts nothing here.
            T may be 0.
        top_k: K, from 1 to X.
        score: one of the above.
        bias: ``(X,)``, any floating dtype: added to the scores where experts are compared, and nowhere else (balancing
            without a loss; see :class:`accel.nn.ExpertBias`). It has no gradient. As any tensor that a backward reads,
            it must not be changed in place between forward and backward.
        num_groups: a divisor of X, or None for no groups.
        topk_groups: how many groups take part, from 1 to ``num_groups``; K experts must be in them.
        group_score: ``"top2_sum"`` or ``"max"``.
        renormalize: divide by the sum over the chosen.
        eps: added to that sum.
        scale: factor a of the weights (``routed_scaling_factor``).
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(weights, indices)``: ``(T, K)`` float32 (float64 beside float64) and ``(T, K)`` int64, the best expert first.

    Gradients exist for ``logits``, of the weights at the choice that was made. Second and forward-mode derivatives are
    the reference's; a kernel refuses them.

    Raises:
        TypeError: a tensor that must be floating is not, or a number is no integer.
        ValueError: shapes, sizes, names or devices that do not fit; the message holds them.
        NotImplementedError: ``backend`` cannot run this call; the message says why.

    Follows Shazeer et al. (2017), Fedus et al., Switch Transformer (2021), DeepSeek-AI, DeepSeek-V3 (2024), and Wang et
    al., Auxiliary-Loss-Free Load Balancing (2024).
    """
    args = _prepare(
        logits, top_k, score=score, bias=bias, num_groups=num_groups, topk_groups=topk_groups, group_score=group_score,
        renormalize=renormalize, eps=eps, scale=scale,
    )  # fmt: skip
    weights, indices = _run(args, backend)
    return weights, indices


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.zeros(3, 6, device=device, dtype=dtype), 2), {"score": "sigmoid"}


OP = dispatch.register(
    dispatch.Op(
        name="moe_route",
        function=moe_route,
        prepare=_prepare,
        example=_example,
        backends=(
            dispatch.Backend("cpu", backends.why_not_cpu, *_native, frozenset({"cpu"}), KERNEL_DTYPES),
            dispatch.Backend("triton", *_triton, frozenset({"cuda"}), KERNEL_DTYPES),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
    )
)
