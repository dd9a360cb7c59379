"""Expert choice: each expert of a mixture takes its best tokens, instead of each token its best experts."""

from __future__ import annotations

import torch
from torch import Tensor

from accel.backends import inner_dtype, integer
from accel.library import without_autocast
from accel.ops.moe.moe_route import SCORES, check_logits, choice_scores, descending

__all__ = ["moe_route_experts"]


def moe_route_experts(
    logits: Tensor, capacity: int, *, score: str = "softmax", mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Expert choice: each expert takes the ``capacity`` tokens that it scores best. All experts have the same load,
    and a token has as many experts as want it, none included.

    With :math:`s_{tx}` the score of expert x for token t, as in :func:`accel.moe_route` (the softmax is over experts),
    expert x takes the tokens with the largest :math:`s_{tx}`; of equal ones the first, and a NaN after every number.

    Args:
        logits: ``(T, X)``, floating.
        capacity: tokens an expert takes, from 0 to T; usually T · K / X for K experts a token on average.
        score: ``"softmax"``, ``"sigmoid"`` or ``"sqrt_softplus"``.
        mask: ``(T,)`` bool, True where a token may be taken. Where these are fewer than ``capacity``, an expert takes
            others behind them, with weight 0.

    Returns:
        ``(weights, tokens)``, ``(X, capacity)`` each, float32 (float64 beside float64) and int64, the best token first.
        The rows of expert x are ``x[tokens[x]]``, and its results go to ``out.index_add(0, tokens[x], ...)``; with
        causal attention around it, note that which token is taken depends on those behind it.

    Gradients exist for ``logits``, in any order: it is plain torch.

    Raises:
        TypeError: ``logits`` is not floating, ``mask`` not bool, or ``capacity`` no integer.
        ValueError: shapes or sizes that do not fit; the message holds them.

    Follows Zhou et al., Mixture-of-Experts with Expert Choice Routing (2022).
    """
    check_logits(logits)
    capacity = integer(capacity)
    if not 0 <= capacity <= logits.shape[0]:
        raise ValueError(f"capacity must be from 0 to the number of tokens, {logits.shape[0]}, got {capacity=}")
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r:.80}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if tuple(mask.shape) != (logits.shape[0],) or mask.device != logits.device:
            raise ValueError(
                f"mask must be (T,) = ({logits.shape[0]},) on {logits.device}, got {tuple(mask.shape)} on {mask.device}"
            )
    with without_autocast(logits):
        inner = logits.to(inner_dtype(logits))
        by = choice_scores(inner.detach(), score).transpose(0, 1)  # (X, T)
        tokens = descending(by)[1]
        if mask is not None:
            tokens = tokens.gather(1, (~mask)[tokens].to(torch.int8).sort(dim=1, stable=True)[1])
        tokens = tokens[:, :capacity]
        weights = SCORES[score](inner).transpose(0, 1).gather(1, tokens)
        if mask is not None:
            weights = torch.where(mask[tokens], weights, 0.0)
    return weights, tokens
