"""The launches of a call: of its output, or of all its gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accel.kernels import _launch
from accel.kernels._launch import Launch, launch
from accel.kernels.linear import states as around
from accel.kernels.linear.arguments import STEEP
from accel.kernels.linear.sums import Call, Sum, call_of, kind_of_decay, sum_of, upstream_of
from accel.ops.layout import empty_like_layout
from accel.ops.linear.linear_attention import Args


def _flat(kv: Tensor, vector: Tensor | None, transposed: bool) -> Tensor:
    """A state as the sweeps have it."""
    matrix = (kv.mT if transposed else kv).flatten(2)
    return matrix.contiguous() if vector is None else torch.cat([matrix, vector], -1)


def _results(args: Args, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty buffer in the layout of ``x``, or full of zeros where tokens may be of no sequence."""
    made = torch.empty_like(empty_like_layout(x, shape), dtype=_launch.store_dtype(x.dtype))
    return made if args.cu_q is None else made.zero_()


def forward_plan(args: Args, capability: tuple[int, int]) -> tuple[Tensor, Sum]:
    q = args.q
    out = _results(args, q, (q.shape[0], args.heads, q.shape[2], args.v.shape[3]))
    init = None if args.kv is None else _flat(args.kv, args.k_sum, False)
    return out, sum_of("out", call_of(args, out), out, init, args.return_state, capability)


@dataclass(frozen=True)
class Backward:
    """The launches of a backward pass in order, and the sums that they make. ``grads``: of q, k and v for each head."""

    launches: list[Launch]
    grads: list[Tensor]
    sums: list[Sum]
    init: Tensor | None  # the state before the first token, as the gradient of q has it


def backward_plan(
    grad: Tensor | None,
    grad_kv: Tensor | None,
    grad_k_sum: Tensor | None,
    out: Tensor,
    den: Tensor,
    args: Args,
    needs: list[bool],
    capability: tuple[int, int],
) -> Backward:
    q, k, v, heads = args.q, args.k, args.v, args.heads
    grads = []
    for x in (q, k, v):
        if x.shape[1] == heads:
            grads.append(_results(args, x, tuple(x.shape)))
        else:  # those of each head are summed
            made = x.new_zeros if args.cu_q is not None else x.new_empty
            grads.append(made((x.shape[0], heads, *x.shape[2:]), dtype=torch.float32))
    fine = grad is not None and args.normalize and q.dtype != torch.float32 and args.features in STEEP
    if fine:
        out = torch.empty_like(out, dtype=torch.float32)
    call = call_of(args, out, *grads, *([] if grad is None else [grad]))
    by_decay = args.decay is not None and needs[0]
    launches: list[Launch] = []
    if fine:
        den, launches = _made_again(args, call, out, capability)
    upstream, more = upstream_of(call, grad, out, den, by_decay)
    launches += more
    start = None if args.kv is None else _flat(args.kv, args.k_sum, True)
    final = _final_gradient(args, grad_kv, grad_k_sum)
    to_start = needs[2] or (by_decay and start is not None)
    sums = [
        sum_of("grad_q", call, grads[0], start, False, capability, upstream, by_decay, fine),
        sum_of("grad_k", call, grads[1], _of_heads(final, args), to_start, capability, upstream, by_decay),
        sum_of("grad_v", call, grads[2], _of_heads(grad_kv, args), needs[1], capability, upstream),
    ]
    for found in sums:
        launches += found.launches
    return Backward(launches, grads, sums, start)


def _made_again(args: Args, call: Call, out: Tensor, capability: tuple[int, int]) -> tuple[Tensor, list[Launch]]:
    """Denominators and what fills ``out`` in fp32: the rounded ones may be all there is of a query's gradient."""
    init = None if args.kv is None else _flat(args.kv, args.k_sum, False)
    made = sum_of("out", call, out, init, False, capability, fine=True)
    assert made.den is not None
    if args.cu_q is not None:
        out.zero_()
        made.den.zero_()
    return made.den, made.launches


def _final_gradient(args: Args, grad_kv: Tensor | None, grad_k_sum: Tensor | None) -> Tensor | None:
    """The gradient of the final state as the sums of the gradients of q and k have it."""
    if grad_kv is None and grad_k_sum is None:
        return None
    n, heads, d, e = args.sequences, args.state_heads, args.q.shape[3], args.v.shape[3]
    kv = args.q.new_zeros((n, heads, d, e), dtype=torch.float32) if grad_kv is None else grad_kv
    if not args.normalize:
        return _flat(kv, None, True)
    return _flat(kv, kv.new_zeros((n, heads, d)) if grad_k_sum is None else grad_k_sum, True)


def _of_heads(state: Tensor | None, args: Args) -> Tensor | None:
    """``(N, Hs, ...)`` with a state for each head: the first of a group has that of the group, the others zeros."""
    if state is None:
        return None
    flat = state.flatten(2)
    group = args.heads // args.state_heads
    if group == 1:
        return flat.contiguous()
    every = flat.new_zeros((flat.shape[0], args.heads, flat.shape[2]))
    every[:, ::group] = flat
    return every


def over_groups(x: Tensor, heads: int) -> Tensor:
    """The sums over the heads that share one of ``heads``."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)


def decay_gradient(plan: Backward, args: Args, cu: Tensor | None) -> tuple[Tensor, Launch]:
    """``(B, Hs, T)`` fp32, or ``(N, Hs, parts)`` that is summed over sequences and parts; after the sums were made."""
    decay, of_queries, of_keys = args.decay, plan.sums[0], plan.sums[1]
    assert decay is not None
    assert of_queries.dots is not None
    assert of_keys.dots is not None
    token, parts = kind_of_decay(args) == "token", of_queries.parts
    shape = decay.shape if token else (args.sequences, decay.shape[1], parts)
    grad = decay.new_zeros(shape)
    return grad, launch(
        around.decay_gradient_kernel,
        args.sequences * args.state_heads * parts,
        4,
        grad_ptr=grad,
        queries_ptr=of_queries.dots,
        keys_ptr=of_keys.dots,
        starts_ptr=_through_starts(plan, args),
        cu_ptr=cu,
        heads=args.state_heads,
        group=args.heads // args.state_heads,
        batches=args.q.shape[0],
        rows=args.q.shape[2],
        parts=parts,
        tiles=of_queries.dots.shape[0],
        flags=of_keys.dots.shape[0],
        TOKEN=token,
        CHUNK=of_queries.chunk,
        BLOCK=256,
    )


def _through_starts(plan: Backward, args: Args) -> Tensor | None:
    """``(N, Hs, parts)``: the state where a part starts times its gradient, what all pairs give that are on both sides
    of it."""
    before, behind, first = plan.sums[0].each, plan.sums[1].each, plan.sums[1].final
    at_first = None
    if plan.init is not None:
        assert first is not None
        at_first = (over_groups(first, args.state_heads).double() * plan.init).sum(-1).float()[..., None]
    if before is None:
        return at_first
    assert behind is not None
    behind = over_groups(behind, args.state_heads)
    starts = (behind[:, :, :-1] * before[:, :, 1:]).sum(-1)
    return torch.cat([starts.new_zeros((*starts.shape[:2], 1)) if at_first is None else at_first, starts], -1)
