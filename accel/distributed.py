"""Experts of a mixture spread over processes: each keeps some of them, and tokens travel to their experts and back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accel.nn.moe import Experts
from accel.ops.moe.groups import check_indices
from accel.ops.moe.moe_permute import moe_permute
from accel.ops.moe.moe_unpermute import moe_unpermute
from accel.ops.moe.plan import Plan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ExpertParallel", "expert_parallel"]

BIASES = ("gate_up_bias", "down_bias", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
_FLAGS = ("has_gate", "is_transposed", "has_post_expert_norm", "num_experts", "down_proj")
"""By which experts that go through the registry of transformers are known."""


# --- the exchange ---


class Splits(NamedTuple):
    """How many rows go to each process and come from each, known to the host."""

    send: list[int]
    receive: list[int]
    group: Any

    def reversed(self) -> Splits:
        return Splits(self.receive, self.send, self.group)


def _all_to_all(x: Tensor, splits: Splits, rows: int) -> Tensor:
    """The rows of ``x`` sent and others received, with zeros behind them up to ``rows``."""
    sent, received = sum(splits.send), sum(splits.receive)
    out = x.new_empty((rows, *x.shape[1:]))
    out[received:].zero_()
    dist.all_to_all_single(out[:received], x[:sent].contiguous(), splits.receive, splits.send, splits.group)
    return out


class _Exchange(torch.autograd.Function):
    """Several tensors exchanged in one node, so that backward every process meets the others in the same order;
    ``rows`` are those that each result has."""

    @staticmethod
    def forward(ctx: Any, splits: Splits, rows: Sequence[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.splits, ctx.rows = splits, [x.shape[0] for x in tensors]
        return tuple([_all_to_all(x, splits, n) for x, n in zip(tensors, rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *_exchange(ctx.splits.reversed(), ctx.rows, *grads)


def _exchange(splits: Splits, rows: Sequence[int], *tensors: Tensor) -> tuple[Tensor, ...]:
    made: tuple[Tensor, ...] = _Exchange.apply(splits, rows, *tensors)  # type: ignore[no-untyped-call]
    return made


class Journey(NamedTuple):
    """What brings the results of tokens back, kept while their experts compute."""

    plan: Plan
    splits: Splits
    shape: torch.Size  # of the tokens as they came
    tied: tuple[Tensor, ...]  # what the results depend on, whether or not a token came


class _Local:
    """The experts of one module that this process keeps, first to last, and what happens around their forward."""

    def __init__(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        self.name, self.module, self.mesh = name, module, mesh
        self.total: int = module.down_proj.shape[0]  # type: ignore[union-attr, assignment, index]
        ranks = mesh.size()
        self.bounds = [self.total * r // ranks for r in range(ranks + 1)]
        rank = mesh.get_local_rank()
        self.first, self.last = self.bounds[rank], self.bounds[rank + 1]
        self.names = [n for n in (*PROJECTIONS, *BIASES) if module._parameters.get(n) is not None]
        self.signature = inspect.signature(type(module).forward)
        self.journey: Journey | None = None
        self.before: dict[str, Any] = {}

    def put(self) -> None:
        """Keep this process's slices, and stand around the forward."""
        for name in self.names:
            whole: Any = self.module._parameters[name]
            self._set(name, whole.detach()[self.first : self.last].clone(), whole.requires_grad)
        if not isinstance(self.module, Experts):  # transformers' functions read both of the module that they serve
            now = {"num_experts": self.last - self.first, "_is_expert_parallel": True}
            self.before = {name: getattr(self.module, name, False) for name in now}
            for name, value in now.items():
                setattr(self.module, name, value)
        self.hooks = (
            self.module.register_forward_pre_hook(self._leave, with_kwargs=True),
            self.module.register_forward_hook(self._return),
        )

    def take_out(self) -> None:
        """Every process has all experts again."""
        for hook in self.hooks:
            hook.remove()
        for name in self.names:
            part: Any = self.module._parameters[name]
            whole = part.new_empty((self.total, *part.shape[1:]), requires_grad=False)
            whole[self.first : self.last] = part.detach()
            for rank, (a, b) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
                dist.broadcast(whole[a:b], group=self.mesh.get_group(), group_src=rank)
            self._set(name, whole, part.requires_grad)
        for name, value in self.before.items():
            setattr(self.module, name, value)

    def _set(self, name: str, value: Tensor, requires_grad: bool) -> None:
        setattr(self.module, name, nn.Parameter(value, requires_grad))

    # --- a call ---

    @torch.compiler.disable  # how many rows there are is in the values
    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The tokens of all processes that chose an expert of this one, in place of this one's tokens."""
        given = self.signature.bind(module, *args, **kwargs).arguments
        values = list(given.values())[1:]
        if len(values) != 3:
            raise TypeError(f"{self.name} must be called with tokens, indices and weights, got {list(given)[1:]}")
        hidden, indices, weights = values
        x = hidden.reshape(-1, hidden.shape[-1])
        check_indices(indices, x.shape[0], x)
        ranks = self._ranks_of(indices)
        rows, plan = moe_permute(x, ranks, self.mesh.size())
        splits = self._counted(plan.counts)
        sent, received = sum(splits.send), sum(splits.receive)
        tokens = plan.source[:sent] // ranks.shape[1]
        came, their_weights = _exchange(splits, [received] * 2, rows, weights[tokens])
        chosen = _all_to_all(indices[tokens].to(torch.int32), splits, received).to(torch.int64)
        here = (chosen >= self.first) & (chosen < self.last)
        chosen = torch.where(here, chosen - self.first, self.last - self.first)
        self.journey = Journey(plan, splits, hidden.shape, (came, their_weights))
        return (came, chosen, their_weights), {}

    @torch.compiler.disable
    def _return(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """The sum of what the processes made of this one's tokens."""
        journey, self.journey = self.journey, None
        assert journey is not None
        if torch.is_grad_enabled() and out.shape[0] == 0:
            # A class whose loop met no token depends on nothing, and others would wait for its part of the backward.
            out = out + sum([x.flatten()[:0].sum().to(out.dtype) for x in (*journey.tied, *module.parameters())])
        plan = journey.plan
        rows = _exchange(journey.splits.reversed(), [plan.source.shape[0]], out)[0]
        return moe_unpermute(rows, plan).view(journey.shape)

    def _ranks_of(self, indices: Tensor) -> Tensor:
        """``(T, min(K, R))``: the processes that have an expert of a token, each once, and R where there is no more."""
        ranks = self.mesh.size()
        bounds = torch.tensor(self.bounds, device=indices.device)
        found = torch.bucketize(indices.to(torch.int64).contiguous(), bounds, right=True) - 1
        found = torch.where((found < 0) | (found >= ranks), ranks, found).sort(-1).values
        again = torch.cat([torch.zeros_like(found[:, :1], dtype=torch.bool), found[:, 1:] == found[:, :-1]], 1)
        found = torch.where(again, ranks, found).sort(-1).values
        return found[:, :ranks]

    def _counted(self, counts: Tensor) -> Splits:
        """The counts of both directions on the host, which is waited for once."""
        group, theirs = self.mesh.get_group(), torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=group)
        send, receive = torch.stack([counts, theirs]).tolist()
        return Splits(send, receive, group)


# --- modules ---


def _why_not(name: str, module: nn.Module) -> str | None:
    """Why these experts cannot be spread, if they cannot."""
    wrong = [n for n in module._parameters if n not in (*PROJECTIONS, *BIASES)]
    tensors = [getattr(module, n, None) for n in (*PROJECTIONS, *BIASES)]
    plain = [type(t) for t in tensors if t is not None and type(t) is not nn.Parameter]
    if getattr(module, "_is_expert_parallel", False) or any(isinstance(h, _Local) for h in _owners(module)):
        return "its experts are spread already"
    if "down_proj" not in module._parameters or plain:
        kinds = ", ".join(dict.fromkeys(t.__name__ for t in plain)) or "none"
        return f"its projections must be parameters of the module itself, got {kinds}"
    if wrong:
        return f"its parameters {', '.join(wrong)} are not known"
    experts = {n: p.shape[0] for n, p in module._parameters.items() if p is not None}
    return f"its parameters differ in their number of experts: {experts}" if len(set(experts.values())) > 1 else None


def _owners(module: nn.Module) -> Iterator[Any]:
    return (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())


def _experts_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name or type(module).__name__, m)
        for name, m in module.named_modules()
        if isinstance(m, Experts) or all(hasattr(m, flag) for flag in _FLAGS)
    ]


class ExpertParallel:
    """What :func:`expert_parallel` did, which :meth:`remove` undoes.

    Attributes:
        experts: of each module that was spread, by its name, the experts that this process keeps, as a ``range``.
    """

    def __init__(self, local: Sequence[_Local]) -> None:
        self._local = list(local)
        self.experts = {x.name: range(x.first, x.last) for x in local}

    def remove(self) -> None:
        """Give every process all experts again, with the values they have now, and leave nothing behind. Every process
        must call it; the parameters are new ones, without gradients. A second call does nothing."""
        local, self._local = self._local, []
        for x in local:
            x.take_out()

    def __repr__(self) -> str:
        kept = ", ".join([f"{name}: {kept.start} to {kept.stop - 1}" for name, kept in self.experts.items()])
        return f"ExpertParallel({kept})"


def expert_parallel(module: nn.Module, mesh: DeviceMesh) -> ExpertParallel:
    r"""Spread the experts of a model over the processes of ``mesh``: of X experts on R processes, process r keeps
    experts ⌊rX/R⌋ to ⌊(r+1)X/R⌋ − 1 of every mixture in ``module``. All else stays whole on every process.

    Each process calls the model with tokens of its own. Around every experts module, a token travels once to each
    process that has an expert of its choice (:func:`accel.moe_permute`, ``all_to_all_single``), with its choices and
    weights; there the module's own forward runs on what arrived, weighs and sums it; the sums come back and are added
    in float32 in the order of processes (:func:`accel.moe_unpermute`). It is what one process with all experts
    computes, but for a sum that is rounded to the dtype of the tokens once for each process. Processes may have as
    many tokens as they like, none among them, and a choice outside of [0, X) is nobody's as ever.

    Spread are the parameters of :class:`accel.nn.Experts`, in :class:`accel.nn.MoE` or alone, and of the experts of
    transformers that go through its registry, whatever ``experts_implementation`` they are set to; ``"accel"`` and
    :func:`accel.patch` run on this library's kernels. Their parameters are replaced by new ones: make the optimizer
    afterwards. A ``state_dict`` then holds the experts of its process.

    Gradients. That of a token or of a router's weight is what one process would give. That of a kept expert is the sum
    over the tokens of all processes, of the sum of their losses; no process but its own has any, so it is neither to be
    reduced nor averaged over ``mesh``. Where the other gradients are averaged over R processes, as
    ``DistributedDataParallel`` does, divide those of experts by R, and leave them out of what it reduces
    (``_set_params_and_buffers_to_ignore_for_model``).

    One wait. How many tokens go where depends on values, and ``all_to_all_single`` takes its splits from the host. The
    counts of both directions are read at once, so that the host waits for the device once in a forward, and never in a
    backward.

    Every process must call the model equally often, forward and backward, with gradients asked for alike, or the others
    wait for it. Under activation checkpointing the exchange is repeated, too. Derivatives of any order are those of the
    experts. In compiled code the graph is left for the exchange. transformers' "eager" of some classes, GPT-OSS's among
    them, knows no choice of another process and fails on it; all other implementations do.

    Args:
        module: a model, a layer or experts.
        mesh: of one dimension. Of one that has several, take one by its name: ``mesh["experts"]``.

    Returns:
        A handle: ``handle.experts`` tells what this process keeps, ``handle.remove()`` makes all whole again.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        TypeError: ``mesh`` is none.
        ValueError: a mesh of another dimension or without this process, fewer experts than processes, experts that
            cannot be spread, or none; the message holds names and values, and nothing was changed.

    Example:
        >>> mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (8,))
        >>> handle = accel.distributed.expert_parallel(model, mesh)
        >>> optimizer = torch.optim.AdamW(model.parameters())

    Follows Lepikhin et al., GShard (2020).
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        names = "" if mesh.mesh_dim_names is None else f" with dimensions {', '.join(mesh.mesh_dim_names)}"
        raise ValueError(f"mesh must have one dimension, got {tuple(mesh.shape)}{names}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"process {dist.get_rank()} is not in the mesh of {mesh.mesh.tolist()}")
    found = _experts_of(module)
    if not found:
        raise ValueError(
            f"{type(module).__name__} has no experts to spread: neither accel.nn.Experts nor experts of transformers "
            "that go through its registry"
        )
    for name, experts in found:
        if (reason := _why_not(name, experts)) is not None:
            raise ValueError(f"{name}, {type(experts).__name__}, cannot be spread: {reason}")
        number = experts.down_proj.shape[0]  # type: ignore[union-attr, index]
        if number < mesh.size():
            raise ValueError(f"{name} has {number} experts, fewer than the {mesh.size()} processes of the mesh")
    local = [_Local(name, experts, mesh) for name, experts in found]
    for x in local:
        x.put()
    return ExpertParallel(local)
