"""Tiny models of real classes whose attention is linear, and the backends that can compute it here."""

import pytest
import torch

from accel import dispatch


def backends(op):
    """Those of the op that run on a CPU."""
    args, how = dispatch.OPS[op].example("cpu", torch.float32)
    found = dispatch.reasons(dispatch.OPS[op], dispatch.OPS[op].prepare(*args, **how))
    # Triton's interpreter is slow, and the op's own tests run it
    return [name for name, reason in found.items() if reason is None and name != "triton"]


every_backend = pytest.mark.parametrize("backend", backends("linear_attention"))


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(call, tensors):
    """What ``call(*tensors)`` gives, and the gradient of every tensor, by noise on every output."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    made = call(*leaves)
    made = [made] if isinstance(made, torch.Tensor) else [x for x in made if x is not None]
    total = sum((x * noise(*x.shape, seed=20 + i, dtype=x.dtype)).sum() for i, x in enumerate(made))
    return [x.detach() for x in made], list(torch.autograd.grad(total, leaves))
