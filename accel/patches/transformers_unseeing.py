"""Queries that see no key: transformers' eager attention gives them the mean of all values, where the op gives 0.

Its masks add the smallest number of the dtype to every score of such a query. The scores are lost in it and all weights
are equal, but their gradient is not lost: it goes on to the query and the keys as if the scores stood there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel import memo
from accel.patches.transformers_rules import LazyMask, MaskRule

_known: memo.Facts[Tensor | None] = memo.Facts()


def unseeing(mask: Any) -> Tensor | None:
    """The queries that see no key, boolean and broadcasting to ``(B, H, T, 1)``; None where it is known to be none.

    Masks that are added are not looked at: the op adds them as eager does.
    """
    if isinstance(mask, LazyMask):
        mask = mask.rule
    if isinstance(mask, MaskRule):
        return mask.unseeing
    if mask is None or mask.dtype != torch.bool:
        return None
    if not memo.may_remember(mask):
        return ~mask.any(-1, keepdim=True)
    return _known.get_or_read((mask,), None, lambda: _of_dense(mask))


def _of_dense(mask: Tensor) -> Tensor | None:
    none = ~mask.any(-1, keepdim=True)
    return none if bool(none.any()) else None


def fill(out: Tensor, rows: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None, linear: bool) -> Tensor:
    """``out`` ``(B, Hq, T, E)`` with the mean of ``v`` in ``rows``, and with eager's gradient there.

    ``linear`` says that the scores are q·k and nothing bends them; of bent ones only the gradient in v is given. No
    weight of such a row is dropped.
    """
    group = q.shape[1] // k.shape[1]
    inner = torch.promote_types(v.dtype, torch.float32)
    mean = v.to(inner).mean(2, keepdim=True)
    given = mean.repeat_interleave(group, 1)
    if linear and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        # of softmax at equal weights: the covariance of keys and values, which is what a score's change would move
        spread = k.to(inner).transpose(-2, -1) @ (v.to(inner) - mean).detach() / k.shape[2]
        asking = torch.where(rows, q.to(inner), 0.0) * (q.shape[-1] ** -0.5 if scale is None else scale)
        moved = asking @ spread.repeat_interleave(group, 1)
        given = given + (moved - moved.detach())
    return torch.where(rows, given.to(out.dtype), out)
