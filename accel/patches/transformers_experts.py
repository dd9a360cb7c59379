"""The experts function that transformers' registry knows as ``"accel"``.

A module says in flags how its weights lie, and in ``_apply_gate`` what stands between its products. That method is
tried once a module on a few numbers: where an :class:`accel.ExpertActivation` gives the same, both products and the
activation are one call of :func:`accel.moe_experts`; where none does, or a norm follows each expert, the class's own
gate and norm stand between two calls of :func:`accel.grouped_linear`. In a graph that is traced nothing is tried.
"""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from accel import dispatch
from accel.ops.moe import moe_experts as op
from accel.ops.moe.activations import FUNCTIONS, ExpertActivation, activate
from accel.ops.moe.grouped_linear import grouped_linear
from accel.ops.moe.moe_permute import moe_permute
from accel.ops.moe.moe_unpermute import moe_unpermute
from accel.patches.stand import say_once

NAME = "accel"


class Between(NamedTuple):
    """What was found to stand between a module's products, for the attributes that it was tried with."""

    tried: tuple[Any, ...]
    activation: ExpertActivation | None  # None: nothing that the op knows
    layout: str


_found: weakref.WeakKeyDictionary[nn.Module, Between] = weakref.WeakKeyDictionary()


def experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts function over :func:`accel.moe_experts`: tokens ``(T, C)``, their experts ``(T, K)`` and
    weights ``(T, K)``; ``(T, C)`` in the dtype of the tokens. An index that is no expert of the module contributes
    nothing. Where no kernel of ours runs, transformers' "grouped_mm" does, and it is said once.
    """
    first: Any = self.gate_up_proj if self.has_gate else self.up_proj
    if (reason := why_not(hidden_states.device.type, first.dtype)) is not None:
        say_once(type(self).__name__, reason)
        made: Tensor = _grouped_mm()(self, hidden_states, top_k_index, top_k_weights)
        return made
    return compute(self, op.moe_experts, hidden_states, top_k_index, top_k_weights)


def compute(
    self: Any, attend: Callable[..., Tensor], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The same where a kernel runs; ``attend`` is the op where one call of it is enough."""
    first: Any = self.gate_up_proj if self.has_gate else self.up_proj
    second: Any = self.down_proj
    biases: tuple[Any, Any] = (None, None)
    if self.has_bias:
        biases = (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias, self.down_proj_bias)
    tokens = hidden_states.to(first.dtype)
    between = _between(self)
    if between.activation is not None and not self.has_post_expert_norm:
        out = attend(
            tokens,
            top_k_index,
            top_k_weights,
            first,
            second,
            activation=between.activation,
            gated=bool(self.has_gate),
            layout=between.layout,
            transposed=bool(self.is_transposed),
            gate_up_bias=biases[0],
            down_bias=biases[1],
        )
    else:
        out = _in_parts(self, tokens, top_k_index, top_k_weights, (first, second), biases)
    return out.to(hidden_states.dtype)


def _in_parts(
    self: Any,
    tokens: Tensor,
    indices: Tensor,
    weights: Tensor,
    projections: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """With the class's own gate, and its norm behind each expert."""
    rows, plan = moe_permute(tokens, indices, projections[0].shape[0])
    offsets = plan.offsets
    rows = grouped_linear(rows, projections[0], offsets, biases[0], transposed=bool(self.is_transposed))
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = grouped_linear(rows, projections[1], offsets, biases[1], transposed=bool(self.is_transposed))
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    return moe_unpermute(rows, plan, weights)


# --- what stands between ---

_NUMBERS = ("alpha", "swiglu_alpha", "limit", "swiglu_limit")
"""Attributes that gates read."""


def _between(self: Any) -> Between:
    gate = self._apply_gate if self.has_gate else None
    numbers = [getattr(self, name, None) for name in _NUMBERS]
    tried = (getattr(gate, "__func__", gate), getattr(self, "act_fn", None), *numbers)
    known = None if torch.compiler.is_compiling() else _found.get(self)
    if known is None or known.tried != tried:
        if torch.compiler.is_compiling():  # where nothing can be tried
            return Between(tried, None, "concatenated")
        known = _found[self] = Between(tried, *_try(self))
    return known


@torch.no_grad()
def _try(self: Any) -> tuple[ExpertActivation | None, str]:
    """The description that does what the module does, if there is one."""
    function: Callable[[Tensor], Tensor] = self._apply_gate if self.has_gate else self.act_fn
    limits = [float(x) for name in _NUMBERS[2:] if isinstance(x := getattr(self, name, None), int | float)]
    h = _numbers(limits)
    if isinstance(act := getattr(self, "act_fn", None), nn.Module) and list(act.parameters()):
        return None, "concatenated"  # what is learnt changes
    try:
        want = function(h)
        for activation, layout in _candidates(self, limits):
            got = activate(h, activation, bool(self.has_gate), layout == "interleaved")
            if got.shape == want.shape and torch.allclose(got, want.double(), rtol=1e-5, atol=1e-6):  # some are fp32
                return activation, layout
    except Exception as error:  # a gate that takes no such numbers stands between the products as it is
        dispatch.log.debug("the gate of %s cannot be tried: %s: %s", type(self).__name__, type(error).__name__, error)
    return None, "concatenated"


def _numbers(limits: list[float]) -> Tensor:
    """``(M, 4)``: numbers small and large, and on either side of the limits, each beside many others."""
    edges = [sign * factor * limit for limit in limits for sign in (-1.0, 1.0) for factor in (0.9, 1.1, 2.0)]
    some = torch.cat([torch.linspace(-6.0, 6.0, 49, dtype=torch.float64), torch.tensor([-12.0, 12.0, *edges]).double()])
    generator = torch.Generator().manual_seed(0)
    return some[torch.randint(len(some), (4 * len(some), 4), generator=generator)]


def _candidates(self: Any, limits: list[float]) -> Iterator[tuple[ExpertActivation, str]]:
    alphas = [1.0, 1.702, *[x for name in _NUMBERS[:2] if isinstance(x := getattr(self, name, None), int | float)]]
    silus = [("silu", float(alpha)) for alpha in dict.fromkeys(alphas)]
    functions = [*silus, *[(name, 1.0) for name in FUNCTIONS if name != "silu"]]
    if not self.has_gate:
        yield from ((ExpertActivation(name, alpha), "concatenated") for name, alpha in functions)
        return
    bounds = [None, *[x for x in dict.fromkeys(limits) if x >= 0]]
    for layout, limit, shift in itertools.product(("concatenated", "interleaved"), bounds, (0.0, 1.0)):
        yield from ((ExpertActivation(name, alpha, limit, shift), layout) for name, alpha in functions)


# --- where no kernel runs ---


@torch.compiler.assume_constant_result  # it cannot be traced, and its answer does not change
def why_not(device: str, dtype: torch.dtype) -> str | None:
    """Why no kernel computes on such tensors, or none that is known to be as fast as transformers' own; None where one
    does, and for float64, which only the reference has."""
    return _asked(device, dtype)


@functools.cache
def _asked(device: str, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return None
    grouped = device == "cuda" and dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm")
    if grouped and torch.cuda.get_device_capability() >= (9, 0):  # whose figures are published; ours are not measured
        return "on such a GPU torch's grouped product is made for bfloat16"
    args, kwargs = op.OP.example(device, dtype)
    reasons = dispatch.reasons(op.OP, op.OP.prepare(*args, **kwargs))
    if any([reason is None for name, reason in reasons.items() if name != "reference"]):
        return None
    return "no kernel of moe_experts runs: " + "; ".join([f"{n}: {r}" for n, r in reasons.items() if r is not None])


def _grouped_mm() -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = sys.modules["transformers.integrations.moe"].grouped_mm_experts_forward
    return function
