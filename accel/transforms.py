"""What is at work around a call: tracers, modes, and transforms of ``torch.func``, which ``torch.compile`` traces in
its own way."""

from __future__ import annotations

import torch
from torch._C._functorch import TransformType, get_interpreter_stack


def untraced() -> bool:
    """Whether no tracer, mode or transform is to see the call."""
    return not (torch.compiler.is_compiling() or _modes() or _active() or torch.jit.is_tracing())


_modes, _active = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active


def transformed() -> bool:
    """Whether any is. A tensor that is made now belongs to it and must not outlive it."""
    return not torch.compiler.is_compiling() and bool(_active())


def batched() -> bool:
    """Whether ``vmap`` is one of them, as it is inside ``jacrev``, ``jacfwd`` and ``hessian`` too."""
    return transformed() and TransformType.Vmap in _kinds()


def batched_derivative() -> bool:
    """Whether ``vmap`` is one of them and something may be differentiated, inside of it or around."""
    return batched() and (torch.is_grad_enabled() or {TransformType.Vmap} != set(_kinds()))


def _kinds() -> list[TransformType]:
    return [level.key() for level in get_interpreter_stack()]
