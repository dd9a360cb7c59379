"""Quantised weights that are kept between calls, until an optimizer has stepped or the weight has changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from accel import memo
from accel.ops.fp8.fp8_linear import Weight

_quantized: memo.Facts[Weight] = memo.Facts()


class _Steps:
    """``latest`` is another object after each step of any optimizer: fused ones change weights and no version."""

    latest: object = object()


def _stepped(*_: Any) -> None:
    _Steps.latest = object()


@functools.cache
def _watch_optimizers() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(_stepped)


def remember(weight: Tensor, key: Any, make: Callable[[], Weight]) -> Weight:
    """``make()``, or what it made for the same ``key`` since the last step of an optimizer, if the weight is the same:
    its version, and where its numbers lie."""
    _watch_optimizers()

    def read() -> Weight:
        with torch.inference_mode(False), torch.no_grad():  # a later call may save it for a backward
            return make()

    return _quantized.get_or_read((weight,), (_Steps.latest, weight.data_ptr(), *key), read)


def forget(weight: Tensor | None) -> None:
    if weight is not None:
        _quantized.forget(weight)


def check_not_sharded(module: nn.Module, weight: Tensor) -> None:
    """FSDP gathers a weight for each call, with version 0 and at addresses that recur, even those of other layers.

    Raises:
        NotImplementedError: it does.
    """
    hooks = module._state_dict_pre_hooks.values()  # how FSDP2 is known where it has gathered the weight
    sharded = any([getattr(hook, "__module__", "").startswith("torch.distributed.fsdp") for hook in hooks])
    if sharded or hasattr(weight, "_fsdp_flattened") or hasattr(weight, "device_mesh"):
        raise NotImplementedError(
            "FP8Linear: cache_weight=True cannot be used under FSDP or with sharded weights, of which no change can be "
            "seen: use a recipe with cache_weight=False"
        )
