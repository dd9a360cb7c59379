"""Sending one transformers model's attention through ``"accel"``: its modules read a configuration of their own.

What an attention module calls is written in its configuration, which other models may share. So every module of the
model gets a copy of its configuration with that one field changed; what is set on the copy later is kept at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from accel import integrations
from accel.patches.stand import Stand, stands_in
from accel.patches.transformers_classes import (
    goes_through_the_registry,
    is_config,
    look,
    read_by_eager,
    why_not,
)
from accel.patches.transformers_interface import FIELD, NAME, STAND

__all__ = ["OP", "Attention", "Switch", "goes_through_the_registry", "plan", "why_not"]

OP = "softmax_attention"


class Switch(Stand):
    """Holds a module's own configuration while a copy stands in its place."""

    attribute = STAND
    op = OP
    listed = False

    def __init__(self, module: nn.Module, twins: dict[int, Any]) -> None:
        super().__init__(module)
        configs = {name: value for name, value in vars(module).items() if id(value) in twins}
        self.twins = {name: twins[id(value)] for name, value in configs.items()}
        self.originals = configs
        self.before = {name: dict(vars(twin)) for name, twin in self.twins.items()}

    def put(self) -> None:
        super().put()
        for name, twin in self.twins.items():
            vars(self.module)[name] = twin

    def remove(self, for_good: bool = True) -> None:
        """Give the module its configuration back, with what was set on the copy meanwhile."""
        super().remove(for_good)
        for name, original in self.originals.items():
            if vars(self.module).get(name) is self.twins[name]:
                if for_good:
                    _carry_over(self.twins[name], self.before[name], original)
                vars(self.module)[name] = original

    def __repr__(self) -> str:
        return f"<accel {self.op} for {type(self.module).__name__}>"


class Attention(Switch):
    """The same for a module that computes attention, which counts its calls here."""

    listed = True

    @property
    def own(self) -> Any:
        """transformers' function that computed this attention before, where that was sdpa's."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        return ALL_ATTENTION_FUNCTIONS["sdpa"] if self.originals["config"]._attn_implementation == "sdpa" else None

    @property
    def active(self) -> bool:
        return super().active and vars(self.module)["config"]._attn_implementation == NAME


def _carry_over(twin: Any, before: dict[str, Any], original: Any) -> None:
    for name, value in vars(twin).items():
        new = name not in before or before[name] is not value
        if new and name != FIELD and not is_config(value):
            vars(original)[name] = value


def plan(model: nn.Module, taken: set[str], left_out: set[str]) -> Iterator[tuple[str, Switch]]:
    """The pieces that switch the attention modules named in ``taken`` and all that prepares their masks.

    What is named in ``left_out`` keeps its configuration.
    """
    integrations.register()
    named = list(model.named_modules())
    attention = {name: module for name, module in named if goes_through_the_registry(module)}
    wanted = {id(vars(attention[name])["config"]) for name in taken}
    # A mask that was made to be added fits no other attention than the one it was made for.
    kept = [vars(module)["config"] for name, module in attention.items() if name not in taken]
    fixed = {id(config) for config in kept if config._attn_implementation not in ("sdpa", NAME)}
    fixed |= look(model).eager_masks().keys()
    twins: dict[int, Any] = {}
    for _, module in named:
        for value in vars(module).values():
            if is_config(value):
                _twin(value, wanted, twins)
    twins = {key: twin for key, twin in twins.items() if twin is not None}
    for name, module in named:
        if any(isinstance(stand, Switch) for stand in stands_in(module)):
            continue
        if name in taken:
            read_by_eager(type(module))  # while nothing is being traced
            yield name, Attention(module, twins)
        elif name not in attention and name not in left_out:
            switch = Switch(module, twins)
            if switch.twins and not any(id(config) in fixed for config in switch.originals.values()):
                yield name, switch


def _twin(config: Any, wanted: set[int], twins: dict[int, Any]) -> Any:
    """A copy of ``config`` that is switched, with the copies of those in it; None where nothing in it is wanted."""
    if id(config) in twins:
        return twins[id(config)]
    inside = {key: _twin(value, wanted, twins) for key, value in vars(config).items() if is_config(value)}
    inside = {key: twin for key, twin in inside.items() if twin is not None}
    if id(config) not in wanted and not inside:
        twins[id(config)] = None
        return None
    copy = object.__new__(type(config))
    vars(copy).update(vars(config), **inside)
    vars(copy)[FIELD] = NAME
    twins[id(config)] = copy
    return copy
