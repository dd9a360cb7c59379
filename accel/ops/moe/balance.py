"""What keeps the experts of a mixture busy alike: losses of the router, and how loaded experts are. Plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from accel.backends import inner_dtype
from accel.library import without_autocast
from accel.ops.moe.groups import check_indices
from accel.ops.moe.moe_route import SCORES, check_logits
from accel.ops.moe.plan import at_least

__all__ = ["MoeLoad", "moe_balance_loss", "moe_load", "moe_z_loss"]

KINDS = ("switch", "sequence", "global")


# --- arguments ---


def _joined(given: Any, name: str) -> Tensor:
    """One tensor, or those of several layers one behind the other."""
    if isinstance(given, Tensor):
        return given
    if not isinstance(given, Sequence) or not given or not all([isinstance(x, Tensor) for x in given]):
        raise TypeError(f"{name} must be a tensor, or a list with one for each layer, got {type(given).__name__}")
    return torch.cat([x.to(given[0].device) for x in given], 0)


def _token_weights(mask: Any, tokens: int, like: Tensor) -> Tensor:
    """``(T,)``, 1 where a token counts. A mask of one layer's tokens, in any shape, serves every layer."""
    if mask is None:
        return torch.ones(tokens, dtype=like.dtype, device=like.device)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    count = mask.numel()
    if count != tokens and (count == 0 or tokens % count != 0):
        raise ValueError(f"mask has {count} tokens, of which the {tokens} there are are no multiple")
    return mask.to(like.device, like.dtype).flatten().repeat(tokens // max(count, 1))


def _counts(indices: Tensor, experts: int, weights: Tensor) -> Tensor:
    """Weighted choices of each expert; ``(..., T, K)`` and ``(..., T)`` to ``(..., X)``."""
    flat = indices.flatten(-2).to(torch.int64)
    valid = (flat >= 0) & (flat < experts)
    each = weights.unsqueeze(-1).expand(indices.shape).flatten(-2) * valid
    counts = torch.zeros((*flat.shape[:-1], experts), dtype=weights.dtype, device=weights.device)
    return counts.scatter_add(-1, torch.where(valid, flat, 0), each)


def _summed(x: Tensor, group: Any) -> Tensor:
    """The sum over the processes of ``group``, the default one if None; ``x`` where there are none."""
    if not dist.is_available() or not dist.is_initialized():
        return x
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total


# --- losses ---


def moe_balance_loss(
    logits: Tensor | Sequence[Tensor],
    indices: Tensor | Sequence[Tensor],
    *,
    kind: str = "switch",
    score: str = "softmax",
    mask: Tensor | None = None,
    batch: int | None = None,
    group: Any = None,
) -> Tensor:
    r"""The loss that is least where every expert is chosen equally often. With p the scores of a token, divided by
    their sum, and :math:`n_x` the choices of expert x, both over T tokens of K choices,

    .. math:: f_x = n_x / T, \quad P_x = \frac{1}{T} \sum_t p_{tx}, \qquad L = X \sum_x f_x P_x

    - ``"switch"`` takes them over all tokens, and is K where the load is even; transformers'
      ``load_balancing_loss_func`` with its mask, over the layers as one (Switch Transformer, equations 4 to 6).
    - ``"sequence"`` takes them over each sequence and divides by K, so that it is 1 where the load is even; the mean
      over sequences that have a token (DeepSeek-V3, equations 17 to 20).
    - ``"global"`` is ``"switch"`` with :math:`f_x` over the tokens of all processes of ``group``, and P over this
      one's: experts need to be balanced over the whole batch alone (Qiu et al., 2025). Averaged over the processes, as
      data parallelism averages gradients, it is the loss of the whole batch where all have as many tokens.

    The gradient goes through p; n is a number. A choice outside of [0, X) counts for no expert. Without any token the
    loss is 0.

    Args:
        logits: ``(T, X)``, floating, or a list of such for several layers, whose tokens are taken together.
        indices: ``(T, K)`` int64 or int32, as :func:`accel.moe_route` chose, or a list.
        kind: ``"switch"``, ``"sequence"`` or ``"global"``.
        score: ``"softmax"``, ``"sigmoid"`` or ``"sqrt_softplus"``, what p is made of.
        mask: which tokens count, True or 1; T of them in any shape, or those of one layer if there are several.
        batch: the number of sequences, with ``"sequence"`` alone: tokens are ``(batch, T / batch)``, and likewise in
            every layer, where each layer has sequences of its own.
        group: the processes, with ``"global"`` alone; the default group if None. Where ``torch.distributed`` is not
            initialised, this process is all.

    Returns:
        A number, float32 (float64 beside float64).

    Raises:
        TypeError: a tensor of a wrong dtype, or none.
        ValueError: shapes, sizes or names that do not fit; the message holds them.
    """
    logits, indices = _joined(logits, "logits"), _joined(indices, "indices")
    check_logits(logits)
    tokens, experts = logits.shape
    check_indices(indices, tokens)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r:.80}")
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r:.80}")
    if (batch is not None) != (kind == "sequence"):
        raise ValueError(f"batch goes with kind='sequence', and only with it, got {kind=}, {batch=}")
    if group is not None and kind != "global":
        raise ValueError(f"group goes with kind='global', got {kind=}")
    with without_autocast(logits):
        scores = SCORES[score](logits.to(inner_dtype(logits)))
        if score != "softmax":
            scores = scores / scores.sum(-1, keepdim=True)
        weights = _token_weights(mask, tokens, scores)
        if kind == "sequence":
            number = at_least(batch, "batch", 1)
            if tokens % number != 0:
                raise ValueError(f"{tokens} tokens are no multiple of {batch=}")
            return _of_sequences(*[x.unflatten(0, (number, tokens // number)) for x in (scores, indices, weights)])
        total = weights.sum()
        counts = _counts(indices, experts, weights)
        mean = (scores * weights[:, None]).sum(0) / total.clamp_min(1)
        if kind == "global":
            counts, total = _summed(counts, group), _summed(total, group)
        return experts * (counts / total.clamp_min(1) * mean).sum()


def _of_sequences(scores: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    total = weights.sum(-1, keepdim=True)  # (B, 1)
    fraction = _counts(indices, scores.shape[-1], weights) / (total.clamp_min(1) * indices.shape[-1])
    mean = (scores * weights[..., None]).sum(-2) / total.clamp_min(1)
    losses = scores.shape[-1] * (fraction * mean).sum(-1)
    return losses.sum() / (total > 0).sum().clamp_min(1)


def moe_z_loss(logits: Tensor | Sequence[Tensor], *, mask: Tensor | None = None) -> Tensor:
    r"""The mean over tokens of :math:`(\ln \sum_x e^{l_{tx}})^2`, which keeps the router's logits small.

    Args:
        logits: ``(T, X)``, floating, or a list of such for several layers, whose tokens are taken together.
        mask: which tokens count, as in :func:`accel.moe_balance_loss`.

    Returns:
        A number, float32 (float64 beside float64); 0 without any token.

    Raises:
        TypeError: ``logits`` is not floating, or ``mask`` no tensor.
        ValueError: shapes that do not fit; the message holds them.

    Follows Zoph et al., ST-MoE (2022).
    """
    logits = _joined(logits, "logits")
    check_logits(logits)
    with without_autocast(logits):
        squares = logits.to(inner_dtype(logits)).logsumexp(-1).square()
        weights = _token_weights(mask, logits.shape[0], squares)
        return (squares * weights).sum() / weights.sum().clamp_min(1)


# --- load ---


class MoeLoad(NamedTuple):
    """How loaded experts are. All of it stays on the device."""

    counts: Tensor
    """``(X,)`` int64: choices of each expert."""
    nobody: Tensor
    """int64: choices of no expert, outside of [0, X)."""
    imbalance: Tensor
    """The largest count over the mean one: 1 where the load is even, X where one expert has it all; float32."""
    idle: Tensor
    """The share of experts that nobody chose, float32."""


def moe_load(indices: Tensor, num_experts: int, *, mask: Tensor | None = None, group: Any = None) -> MoeLoad:
    """How often each expert was chosen, and how unevenly; over all processes of ``group`` where one is given.

    Args:
        indices: ``(T, K)`` int64 or int32, as :func:`accel.moe_route` gives them.
        num_experts: X.
        mask: which tokens count, True or 1; T of them in any shape.
        group: processes whose choices are added (``torch.distributed.group.WORLD`` for all); None for this one's.

    Returns:
        The named tuple :class:`accel.MoeLoad`. Without any choice its ``imbalance`` is 0.

    Raises:
        TypeError: a tensor of a wrong dtype, or a number that is no integer.
        ValueError: shapes or sizes that do not fit; the message holds them.
    """
    check_indices(indices, indices.shape[0] if isinstance(indices, Tensor) and indices.dim() else 0)
    experts = at_least(num_experts, "num_experts", 1)
    weights = (_token_weights(mask, indices.shape[0], indices) != 0).to(torch.int64)
    counts = _counts(indices, experts, weights)
    nobody = weights.sum() * indices.shape[1] - counts.sum()
    if group is not None:
        counts, nobody = _summed(counts, group), _summed(nobody, group)
    mean = counts.sum() / experts
    imbalance = torch.where(mean > 0, counts.max() / mean.clamp_min(torch.finfo(mean.dtype).tiny), 0.0)
    return MoeLoad(counts, nobody, imbalance, (counts == 0).float().mean())
