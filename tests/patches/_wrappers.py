"""What other libraries put around modules and into them, without those libraries."""

import functools

import torch
import torch.nn.functional as F
from torch import nn


def add_hook(module, seen):
    """As accelerate's ``add_hook_to_module``: the old forward is kept beside the new one, which calls it."""
    module._old_forward = module.forward

    def new_forward(module, *args, **kwargs):
        seen.append(type(module).__name__)
        return module._old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), module._old_forward)


def remove_hook(module):
    module.forward = module._old_forward
    del module._old_forward


class Quantized(torch.Tensor):
    """A weight as torchao's: no op but ``linear`` knows what it stands for, which is not what its memory holds."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0], args[1].plain, *args[2:], **(kwargs or {}))
        if func in (torch.cat, torch.matmul):
            raise NotImplementedError(f"{func.__name__} of a quantized weight")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def quantize(linear: nn.Linear):
    plain = linear.weight.detach()
    weight = torch.zeros_like(plain).as_subclass(Quantized)
    weight.plain = plain
    linear._parameters["weight"] = weight
