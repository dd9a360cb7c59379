"""FP8 checkpoints of transformers, kept in FP8 where its own classes would need a certain GPU or turn all into bf16."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from accel.ops.fp8.recipe import FP8Recipe
from accel.patches.entry import class_path, plain_class
from accel.patches.fp8 import ENTRIES, FP8_EXPERTS, FP8_LINEAR, MODULE
from accel.patches.replacement import Replacement

QUANTIZER = "transformers.quantizers.quantizer_finegrained_fp8"
_SERVED = {entry.target: entry for entry in ENTRIES if entry.target in (FP8_LINEAR, FP8_EXPERTS)}
_LOADED = "_is_hf_initialized"
"""What transformers marks the parameters with that it found in a checkpoint."""
_REFUSED = {f"{MODULE}.FP8GroupedLinear": "linear layers of groups have no kernel yet"}


@contextlib.contextmanager
def fp8_checkpoints(recipe: FP8Recipe | None = None) -> Iterator[None]:
    """Within the block ``from_pretrained`` of transformers keeps FP8 checkpoints in FP8, on a CPU and on any GPU.

    ::

        with accel.fp8_checkpoints():
            model = AutoModelForCausalLM.from_pretrained("deepseek-ai/DeepSeek-V3")

    transformers itself computes such a model on GPUs from compute capability 8.9 on, with a kernel from its hub, and
    turns it into bf16 elsewhere. Here every linear layer calls :func:`accel.fp8_linear` with the codes and scales as
    they were stored, also inside experts; neither accelerate nor kernels is needed. What was loaded stays served
    behind the block, until :func:`accel.unpatch`; it generates, trains adapters, and is saved as it was loaded. To
    train the weights themselves see :func:`accel.fp8_convert`.

    Args:
        recipe: how linear layers compute, :class:`accel.FP8Recipe`; None for the recipe of DeepSeek-V3. With
            ``scaling="weight_only"`` activations are not quantised.

    Raises (from ``from_pretrained``):
        NotImplementedError: FP4 weights, static scales of activations, blocks that no product takes, or a checkpoint
            that is not in FP8 yet; the message names the module.
        ValueError: a weight or its scale is missing from the checkpoint.
        ImportError: transformers is not installed, or has no such quantizer.
    """
    quantizer = importlib.import_module(QUANTIZER).FineGrainedFP8HfQuantizer
    before = {name: vars(quantizer)[name] for name in ("validate_environment", "_process_model_after_weight_loading")}
    quantizer.validate_environment = _validate
    quantizer._process_model_after_weight_loading = _serving(before["_process_model_after_weight_loading"], recipe)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(quantizer, name, method)


def _validate(quantizer: Any, *args: Any, **kwargs: Any) -> None:
    """What takes the place of looking for a GPU: whether the checkpoint is of a kind that is known."""
    config = quantizer.quantization_config
    if not quantizer.pre_quantized:
        raise NotImplementedError(
            "accel.fp8_checkpoints keeps checkpoints that are in FP8, and this one is not: load it outside of the "
            "block and call accel.fp8_convert on the model"
        )
    if config.activation_scheme != "dynamic":
        raise NotImplementedError(
            f"the checkpoint has static scales for activations (activation_scheme={config.activation_scheme!r}), which "
            "accel.fp8_linear does not take"
        )
    if getattr(config, "expert_dtype", "fp8") == "fp4":
        raise NotImplementedError("the checkpoint has experts in FP4, which no kernel takes")


def _serving(own: Callable[..., Any], recipe: FP8Recipe | None) -> Callable[..., Any]:
    """``_process_model_after_weight_loading``, and then every layer that holds codes is served."""

    def process(quantizer: Any, model: nn.Module, **kwargs: Any) -> Any:
        made = own(quantizer, model, **kwargs)
        if not quantizer.quantization_config.dequantize:
            serve(model, recipe)
        return made

    return process


def serve(model: nn.Module, recipe: FP8Recipe | None) -> None:
    """Put a replacement into every layer that holds codes, all or none."""
    found = []
    marked = any(hasattr(parameter, _LOADED) for parameter in model.parameters())
    for name, module in model.named_modules():
        path = class_path(plain_class(type(module)))
        if path in _REFUSED:
            raise NotImplementedError(f"{name} ({type(module).__name__}): {_REFUSED[path]}")
        if (entry := _SERVED.get(path)) is None:
            continue
        if marked:
            _check_loaded(name, module)
        if (reason := entry.why_not(module)) is not None:
            raise NotImplementedError(f"{name} ({type(module).__name__}) cannot be kept in FP8: {reason}")
        found.append(Replacement(module, entry.target, {} if recipe is None else {"recipe": recipe}))
    for replacement in found:
        replacement.put()


def _check_loaded(name: str, module: nn.Module) -> None:
    """transformers fills what a checkpoint lacks with whatever memory holds, and only says so."""
    for key, parameter in module.named_parameters(recurse=False):
        if not getattr(parameter, _LOADED, False):
            raise ValueError(f"{name}.{key} is missing from the checkpoint, and FP8 codes mean nothing without it")
