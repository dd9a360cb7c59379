"""Experts of a mixture spread over processes: tokens go to the processes that hold their experts, and come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accel.ops.moe.moe_permute import moe_permute
from accel.ops.moe.moe_unpermute import moe_unpermute

__all__ = ["expert_parallel"]

FIRST = ("gate_up_proj", "up_proj")
"""Of which experts have one, beside ``down_proj``."""
PARAMETERS = (*FIRST, "down_proj", "gate_up_bias", "down_bias", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


def expert_parallel(module: nn.Module, mesh: Any) -> nn.Module:
    """Let every process of ``mesh`` hold a part of the experts in ``module``, in place.

    Experts are the modules called as ``experts(x, indices, weights)`` that keep their weights in ``gate_up_proj`` (or
    ``up_proj``) and ``down_proj``, an expert a row: :class:`accel.nn.Experts`, those of transformers, and either as
    :func:`accel.patch` left them. Process r of R keeps X / R of them, the first ones one more where R does not divide
    X: its parameters are new ones, so make the optimizer afterwards. Routers and all else stay as they are in every
    process.

    Each process calls the model on tokens of its own, as many as it has, none included. A call sorts its tokens by
    process, exchanges how many there are (which the host waits for), exchanges tokens by ``all_to_all_single``, runs
    the experts that are here, and brings the results back the same way, where they are weighed and added up. The
    backward goes through the same exchanges. So all processes must make the same calls in the same order, forward and
    backward, and agree in what requires a gradient.

    Gradients of experts are sums over the tokens of all processes, as if one process had seen them all: divide the
    loss by the number of processes where each takes the mean of its own tokens, and leave these parameters out of
    data parallelism over the same processes. A choice outside of [0, X) is of no expert anywhere.

    Args:
        module: a module of experts, or a model that holds some.
        mesh: a ``torch.distributed.DeviceMesh`` of one axis; slice a larger one, as in ``mesh["expert"]``.

    Returns:
        ``module``.

    Raises:
        ValueError: a mesh of several axes, more processes than experts, no experts in ``module``, or experts that are
            spread already; the message holds the numbers.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one axis, got {mesh.ndim}: {tuple(mesh.shape)}")
    found = {name: experts for name, experts in module.named_modules() if _are_experts(experts)}
    if not found:
        raise ValueError(f"{type(module).__name__} holds no experts: no gate_up_proj or up_proj beside a down_proj")
    for name, experts in found.items():
        if isinstance(vars(experts).get("forward"), _Spread):
            raise ValueError(f"the experts {name or type(module).__name__!r} are spread already")
        if experts.down_proj.shape[0] < mesh.size():
            raise ValueError(f"{name} has {experts.down_proj.shape[0]} experts for {mesh.size()} processes")
    for experts in found.values():
        _spread(experts, mesh)
    return module


def _are_experts(module: nn.Module) -> bool:
    def weight(name: str) -> bool:
        x = getattr(module, name, None)
        return isinstance(x, nn.Parameter) and x.dim() == 3

    return weight("down_proj") and any([weight(name) for name in FIRST])


def _spread(experts: Any, mesh: Any) -> None:
    number, rank, size = experts.down_proj.shape[0], mesh.get_local_rank(), mesh.size()
    starts = [0]
    for i in range(size):
        starts.append(starts[-1] + number // size + int(i < number % size))
    mine = slice(starts[rank], starts[rank + 1])
    for name in PARAMETERS:
        parameter = experts._parameters.get(name)
        if parameter is not None:
            kept = parameter.detach()[mine].clone()
            experts._parameters[name] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
    if hasattr(experts, "num_experts"):
        experts.num_experts = starts[rank + 1] - starts[rank]
    own = vars(experts).get("forward") or experts.forward
    experts.forward = _Spread(own, mesh.get_group(), starts, rank)


class _Spread:
    """Stands in for the ``forward`` of experts, of which this process has some."""

    def __init__(self, own: Callable[..., Tensor], group: Any, starts: list[int], rank: int) -> None:
        self.own, self.group, self.starts, self.rank = own, group, starts, rank

    @torch.compiler.disable  # sizes of the exchange are in the values
    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        starts = torch.tensor(self.starts, device=top_k_index.device)
        size = len(self.starts) - 1
        indices = top_k_index.to(torch.int64)
        home = torch.searchsorted(starts, indices, right=True) - 1  # −1 below 0, R from X on
        rows, plan = moe_permute(hidden_states, home, size)
        send = plan.counts
        receive = _exchanged(send, [1] * size, [1] * size, self.group)
        out, into = send.tolist(), receive.tolist()
        used = sum(out)
        wanted = indices.flatten()[plan.source[:used]] if used else indices.new_zeros(0)
        here = _exchanged(wanted, out, into, self.group) - self.starts[self.rank]
        tokens = _Exchange.apply(rows[:used], out, into, self.group)
        made = self.own(tokens, here[:, None], torch.ones_like(here, dtype=top_k_weights.dtype)[:, None])
        back = _Exchange.apply(made, into, out, self.group)
        back = torch.cat([back, back.new_zeros(rows.shape[0] - used, back.shape[1])])
        return moe_unpermute(back, plan, top_k_weights)


def _exchanged(x: Tensor, out: list[int], into: list[int], group: Any) -> Tensor:
    """Rows of ``x``, so many to each process, for those that each sends here."""
    found = x.new_empty((sum(into), *x.shape[1:]))
    dist.all_to_all_single(found, x.contiguous(), into, out, group=group)
    return found


class _Exchange(torch.autograd.Function):
    """The same with a gradient, which goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: list[int], into: list[int], group: Any) -> Tensor:
        ctx.how = into, out, group
        return _exchanged(x, out, into, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _exchanged(grads[0], *ctx.how), None, None, None
