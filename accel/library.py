"""Registering an op with torch: schema, implementation, fake, FLOP formula; and what autograd may do with it.

Ops are opaque to torch.compile (``define``/``impl``, a third of the per-call cost of the ``custom_op`` decorator)
with the ``autograd.Function`` outside, in the op's own file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

_library = torch.library.Library("accel", "FRAGMENT")


def register(
    name: str,
    signature: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> Any:
    """Define ``accel::<name>`` with ``signature`` (``"(Tensor x, ...) -> Tensor"``) and return its overload.

    ``flops`` receives the call's arguments as the fake does and counts a multiply-add as two.
    """
    _library.define(name + signature)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"accel::{name}", fake, lib=_library)
    packet = getattr(torch.ops.accel, name)
    register_flop_formula(packet, get_raw=True)(lambda *args, out_val=None, **kwargs: flops(*args, **kwargs))
    return packet.default


def _refuse_forward_mode(name: str, tensors: Iterable[torch.Tensor]) -> None:
    """Kernels have no forward-mode derivative, and torch would take it for zero."""
    if forward_ad._current_level >= 0 and any([forward_ad.unpack_dual(x).tangent is not None for x in tensors]):
        raise NotImplementedError(f"{name}: forward-mode derivatives exist only on backend='reference'")


def differentiated(op: str, arguments: Iterable[Any]) -> bool:
    """Whether autograd is to record a call of the kernels of ``op``."""
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    _refuse_forward_mode(op, tensors)
    return torch.is_grad_enabled() and any([x.requires_grad for x in tensors])


class _Once(torch.autograd.Function):
    """Runs a backward op and makes a second derivative an error instead of a silently missing term."""

    @staticmethod
    def forward(op: Any, *args: Any) -> Any:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = str(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{ctx.name} has no derivative of its own: second derivatives exist only on backend='reference'"
        )


def once_differentiable(op: Any, *args: Any) -> Any:
    """Call a backward op from inside ``autograd.Function.backward``."""
    _refuse_forward_mode(str(op), [x for x in args if isinstance(x, torch.Tensor)])
    return _Once.apply(op, *args) if torch.is_grad_enabled() else op(*args)


def _has_autocast(device: str) -> bool:
    return device != "meta"  # torch knows autocast of every other one


def autocast(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype that an enabled autocast asks for, as ``torch.matmul`` would see it; float64 stays."""
    device = x.device.type
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    if _has_autocast(device) and torch.is_autocast_enabled(device) and x.dtype in kinds:
        return x.to(torch.get_autocast_dtype(device))
    return x


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """For a reference, which computes in fp32 on purpose."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _has_autocast(device) else contextlib.nullcontext()
