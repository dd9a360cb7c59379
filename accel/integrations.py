"""Making ``"accel"`` a name that transformers knows, whichever of the two is imported first.

Nothing is imported for it: where transformers is not there yet, a finder waits for the modules that hold the registries
and the base classes that check the name, and lets everyone else find them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

log = logging.getLogger("accel")


def _register_attention(module: ModuleType) -> None:
    from accel.patches import transformers_by_name, transformers_interface

    for name in transformers_interface.NAMES:
        module.AttentionInterface.register(name, transformers_interface.attention)
    if hasattr(module, "PreTrainedModel"):
        transformers_by_name.install(module.PreTrainedModel)


def _register_mask(module: ModuleType) -> None:
    from accel.patches import transformers_interface

    module.AttentionMaskInterface.register(transformers_interface.NAME, transformers_interface.mask)
    module.AttentionMaskInterface.register(transformers_interface.EAGER_MASKS, transformers_interface.eager_mask)


def _register_experts(module: ModuleType) -> None:
    from accel.patches import transformers_experts

    module.ExpertsInterface.register(transformers_experts.NAME, transformers_experts.experts)


def _register_weights(module: ModuleType) -> None:
    from accel.patches import transformers_by_name

    transformers_by_name.let_weights_be_asked_for(module.PreTrainedConfig)


_REGISTRIES = {
    "transformers.configuration_utils": _register_weights,
    "transformers.modeling_utils": _register_attention,
    "transformers.masking_utils": _register_mask,
    "transformers.integrations.moe": _register_experts,
}
"""What to do once a module has been executed."""


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds a module of the table through the other finders, and registers once it has been executed."""

    def __init__(self) -> None:
        self._asked: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _REGISTRIES or name in self._asked:
            return None
        self._asked.add(name)  # one of the others may ask everyone in turn, as this does
        try:
            for finder in list(sys.meta_path):
                find = getattr(finder, "find_spec", None)
                spec = find(name, path, target) if find is not None else None
                if spec is not None:
                    _after_execution(spec.loader, name)
                    return spec
        finally:
            self._asked.discard(name)
        return None


def _after_execution(loader: Any, name: str) -> None:
    """Have ``loader``, which belongs to this one module, register when it is done."""
    execute = getattr(loader, "exec_module", None)
    if execute is None:
        return

    def exec_module(module: ModuleType) -> None:
        loader.__dict__.pop("exec_module", None)
        execute(module)
        _register(name, module)

    try:
        loader.exec_module = exec_module
    except AttributeError:  # a loader without attributes of its own: patch() registers later
        log.debug("%s has no place to wait in", loader)


def _register(name: str, module: ModuleType) -> None:
    try:
        _REGISTRIES[name](module)
    except Exception as error:  # another version of the library must not fail to import for our sake
        log.debug("accel is not registered in %s: %s: %s", name, type(error).__name__, error)


def register() -> None:
    """Register in every registry that is imported; safe to repeat."""
    for name in _REGISTRIES:
        if name in sys.modules:
            _register(name, sys.modules[name])


def install() -> None:
    """Register where transformers is imported, and wait for it where it is not."""
    register()
    if not all(name in sys.modules for name in _REGISTRIES) and not any(isinstance(f, _Waiting) for f in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
