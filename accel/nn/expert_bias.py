"""Experts kept busy alike without a loss: a bias of the choice that follows their load."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accel.ops.moe.balance import moe_load
from accel.ops.moe.plan import at_least

__all__ = ["ExpertBias"]


class ExpertBias(nn.Module):
    r"""The bias b that :func:`accel.moe_route` adds to the scores where experts are compared. After each step of the
    optimizer it falls for experts that were chosen more often than the mean, and rises for the others:

    .. math:: b \leftarrow b + u - \bar u, \qquad u_x = \gamma\, \mathrm{sign}(\bar n - n_x)

    with :math:`n_x` the choices of expert x since the last update, of all processes. The mean of u is taken off, since
    otherwise all biases drift together. Without any choice b stays.

    Choices are counted by calling the module while it trains. A forward that activation checkpointing repeats inside
    the backward is not counted again, and gradient accumulation counts all its parts.

    Args:
        num_experts: X.
        rate: γ, at least 0 and finite; 0.001 in DeepSeek-V3.
        group: processes whose choices are added, the default group if None. Where ``torch.distributed`` is not
            initialised, this process is all.
        device: where the buffers are made.

    Attributes:
        bias: ``(X,)`` float32, a buffer in the ``state_dict``.
        counts: ``(X,)`` int64, choices of this process since the last update; a buffer, not in the ``state_dict``.

    Raises:
        ValueError: a number out of range; the message holds it.

    Example:
        >>> balance = accel.nn.ExpertBias(64)
        >>> handle = balance.follow(optimizer)
        >>> weights, indices = accel.moe_route(logits, 8, score="sigmoid", bias=balance.bias)
        >>> balance(indices)

    Follows Wang et al., Auxiliary-Loss-Free Load Balancing (2024).
    """

    bias: Tensor
    counts: Tensor

    def __init__(self, num_experts: int, rate: float = 1e-3, *, group: Any = None, device: Any = None) -> None:
        super().__init__()
        self.num_experts = at_least(num_experts, "num_experts", 1)
        if not 0.0 <= rate < math.inf:
            raise ValueError(f"rate must be at least 0 and finite, got {rate=}")
        self.rate = rate
        self.group = group
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32, device=device))
        self.register_buffer("counts", torch.zeros(num_experts, dtype=torch.int64, device=device), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> ExpertBias:
        """A model that is cast keeps the bias in float32: steps of 0.001 are lost in half precision."""
        before = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != torch.float32:
            self.bias = before.to(self.bias.device)
        return self

    @torch.no_grad()
    def forward(self, indices: Tensor, mask: Tensor | None = None) -> None:
        """Count the choices ``(T, K)``, of the tokens in ``mask`` if one is given, while the module trains."""
        if self.training and not _repeated():
            self.counts += moe_load(indices, self.num_experts, mask=mask).counts

    @torch.no_grad()
    def update(self) -> None:
        """Move the bias by the choices since the last update, and begin to count anew. Every process of the group must
        call it."""
        counts = self.counts.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts, group=self.group)
        total = counts.sum()
        step = self.rate * torch.sign(total - counts * self.num_experts).to(self.bias.dtype)  # in integers: no rounding
        self.bias += step - step.mean()
        self.counts.zero_()

    def follow(self, optimizer: torch.optim.Optimizer) -> Any:
        """Update after every step of ``optimizer``. Returns a handle whose ``remove()`` ends that."""
        return optimizer.register_step_post_hook(lambda *_: self.update())

    def extra_repr(self) -> str:
        return f"{self.num_experts}, rate={self.rate}"


def _repeated() -> bool:
    """Whether this is inside a backward, where a forward can only be one that checkpointing runs again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
