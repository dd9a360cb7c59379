"""``nn.Linear`` through eight bits: with a weight to train, or one that is stored in eight bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accel.nn import fp8_cache
from accel.ops.fp8 import formats, fp8_linear
from accel.ops.fp8.fp8_quantize import fp8_dequantize, fp8_quantize, read_scale
from accel.ops.fp8.recipe import WEIGHT_BLOCKS, FP8Recipe

__all__ = ["FP8Linear"]

STORAGES = ("master", "fp8")
SCALE = "weight_scale_inv"
STATIC = ("activation_scale", "input_scale")


class FP8Linear(nn.Linear):
    r"""``torch.nn.Linear`` whose products are of eight-bit numbers: :func:`accel.fp8_linear` with a recipe.

    The weight is stored in one of two ways. As ``"master"`` it is the parameter of ``nn.Linear``, trained as any other
    and quantised at each call. As ``"fp8"`` it is float8 beside ``weight_scale_inv``, half the bytes of bfloat16, as
    DeepSeek's checkpoints hold it: gradients exist for the input and the bias alone.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        device: where the parameters are made.
        dtype: of the parameters; ``torch.float8_e4m3fn`` for a weight stored in eight bits.
        recipe: an :class:`accel.FP8Recipe`, or None for that of DeepSeek-V3. With ``cache_weight=True`` the quantised
            weight is kept between calls until an optimizer steps or the weight changes. Not seen are changes through
            ``.data`` and the like, which leave a tensor's version as it is: call :meth:`invalidate` behind them.
            Compiled code quantises at every call, and under FSDP a call is refused.

    Attributes:
        weight: ``(N, K)``, a parameter; float8_e4m3fn and without gradient where stored in eight bits.
        weight_scale_inv: the scales by which its numbers are multiplied, a buffer: ``(ceil(N / 128), ceil(K / 128))``
            for blocks, ``(N, 1)`` for rows, ``(1, 1)`` for the whole; float32, or float8_e8m0fnu where the recipe or a
            checkpoint has those. None of a master.
        bias: ``(N,)``, a parameter, or None.

    The ``state_dict`` of a master is that of ``nn.Linear``, and it loads the weight of an FP8 checkpoint too, without
    loss; one in eight bits loads FP8 checkpoints alone, whose scales may be float32, e8m0 or bytes of e8m0. Casting a
    module moves neither the codes nor their scales out of their dtypes.

    Raises:
        TypeError: a recipe that is none.

    Example:
        >>> layer = accel.nn.FP8Linear(256, 128)
        >>> layer(torch.randn(4, 256)).shape
        torch.Size([4, 128])
        >>> stored = accel.nn.FP8Linear.from_linear(layer, storage="fp8")
    """

    weight_scale_inv: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: FP8Recipe | None = None,
    ) -> None:
        if recipe is not None and not isinstance(recipe, FP8Recipe):
            raise TypeError(f"recipe must be an accel.FP8Recipe or None, got {type(recipe).__name__}")
        stored = dtype == torch.float8_e4m3fn
        super().__init__(in_features, out_features, bias, device=device, dtype=None if stored else dtype)
        self.recipe = recipe
        self.register_buffer(SCALE, None)
        if stored:
            self._store(self.weight)

    # --- from and to others ---

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: FP8Recipe | None = None, storage: str = "master") -> FP8Linear:
        """A layer with the weight and the bias of ``linear``: the same parameters, or, where the other storage is asked
        for, a weight that is quantised or dequantised (to float32).

        Args:
            linear: ``nn.Linear``, this class, or another whose ``weight`` is float8 beside ``weight_scale_inv``.
            recipe: of the new layer.
            storage: ``"master"`` or ``"fp8"``.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear``, or its weight no plain tensor.
            ValueError: an unknown storage, or a float8 weight without scales or with some that do not fit.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        if storage not in STORAGES:
            raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r:.80}")
        weight: Tensor = linear.weight
        if type(weight) is not nn.Parameter:
            raise TypeError(f"{type(linear).__name__}.weight must be a plain parameter, got {type(weight).__name__}")
        made = cls(linear.in_features, linear.out_features, bias=False, device="meta", recipe=recipe)
        made.bias = linear.bias
        made.weight = weight
        if weight.dtype in formats.NAMES:
            scale = _check_scale(getattr(linear, SCALE, None), weight, recipe, f"{type(linear).__name__}.")
            made.weight_scale_inv = scale
            if storage == "master":
                made.weight, made.weight_scale_inv = nn.Parameter(fp8_dequantize(weight.detach(), scale)), None
        elif storage == "fp8":
            made._store(weight)
        return made.train(linear.training)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """``nn.Linear`` with the same bias and weight; of one stored in eight bits its numbers, in ``dtype`` (None
        is float32, from which the same codes and scales can be made again)."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.bias, made.weight = self.bias, self.weight
        if self.weight_scale_inv is not None:
            made.weight = nn.Parameter(fp8_dequantize(self.weight.detach(), self.weight_scale_inv, dtype=dtype))
        return made.train(self.training)

    @property
    def storage(self) -> str:
        return "master" if self.weight_scale_inv is None else "fp8"

    def _store(self, weight: Tensor) -> None:
        """Keep these numbers in eight bits."""
        recipe = self.recipe or FP8Recipe()
        rows, cols = WEIGHT_BLOCKS[recipe.scaling]
        block = (rows or None, cols or None)
        codes, scale = fp8_quantize(weight.detach(), block=block, scale_format=recipe.scale_format)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale_inv = scale

    # --- at work ---

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., K) to ``(..., N)``. See :func:`accel.fp8_linear`."""
        keeps = self.recipe is not None and self.recipe.cache_weight and self.weight_scale_inv is None
        if keeps and not torch.compiler.is_compiling():
            fp8_cache.check_not_sharded(self, self.weight)
        else:
            keeps = False
        remember = fp8_cache.remember if keeps else None
        return fp8_linear.call(x, self.weight, self.bias, self.weight_scale_inv, self.recipe, remember=remember)

    def invalidate(self) -> None:
        """Forget the quantised weight that ``cache_weight`` keeps, once the weight has changed through ``.data``."""
        fp8_cache.forget(self._parameters.get("weight"))

    def reset_parameters(self) -> None:
        """As ``nn.Linear`` does."""
        if getattr(self, SCALE, None) is None:
            super().reset_parameters()
            return
        fresh = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.weight.device)
        self._store(fresh.weight)
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(fresh.bias)

    # --- casts, and checkpoints ---

    def _apply(self, fn: Any, recurse: bool = True) -> FP8Linear:
        """Codes and their scales are moved and not cast."""
        self.invalidate()
        scale = self.weight_scale_inv
        if scale is None:
            super()._apply(fn, recurse)
            return self

        def moved(t: Tensor) -> Tensor:
            kind = torch.uint8 if t.element_size() == 1 else torch.int32 if t is scale else None
            found: Tensor = fn(t) if kind is None else fn(t.view(kind)).view(t.dtype)
            return found

        super()._apply(moved, recurse)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.invalidate()
        try:
            self._read_checkpoint(state_dict, prefix)
        except (TypeError, ValueError) as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _read_checkpoint(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Bring what a checkpoint holds of this layer to the form of its own tensors."""
        for name in STATIC:
            if f"{prefix}{name}" in state_dict:
                raise ValueError(
                    f"{prefix}{name} is a static scale of activations, which are scaled anew at every call"
                )
        weight = state_dict.get(f"{prefix}weight")
        if not isinstance(weight, Tensor):
            return
        if not weight.is_floating_point() or weight.element_size() * 8 < 8 or weight.dtype == formats.E8M0:
            raise TypeError(f"{prefix}weight is {weight.dtype}, and this layer holds floating numbers of eight bits on")
        if weight.dtype not in formats.NAMES:
            if self.weight_scale_inv is not None:
                raise TypeError(
                    f"{prefix}weight is {weight.dtype} and this layer stores float8: quantise with "
                    "accel.nn.FP8Linear.from_linear(..., storage='fp8')"
                )
            return
        key = f"{prefix}{SCALE}"
        scale = _check_scale(state_dict.get(key), weight, None, prefix)
        if self.weight_scale_inv is None:
            state_dict[f"{prefix}weight"] = fp8_dequantize(weight, scale, dtype=self.weight.dtype)
            del state_dict[key]
            return
        if scale.shape != self.weight_scale_inv.shape:
            raise ValueError(f"{key} is {tuple(scale.shape)} and must be {tuple(self.weight_scale_inv.shape)}")
        if scale.dtype != self.weight_scale_inv.dtype:
            self.weight_scale_inv = torch.empty_like(self.weight_scale_inv, dtype=scale.dtype)
        state_dict[key] = scale

    def extra_repr(self) -> str:
        storage = "" if self.weight_scale_inv is None else ", storage='fp8'"
        recipe = "" if self.recipe is None else f", recipe={self.recipe}"
        return f"{super().extra_repr()}{storage}{recipe}"


def _check_scale(scale: Any, weight: Tensor, recipe: FP8Recipe | None, prefix: str) -> Tensor:
    """Scales of a checkpoint as a matrix, float32 or e8m0 as they were; errors begin with the layer's name."""
    if scale is None:
        raise ValueError(f"{prefix}weight is {weight.dtype} and there is no {prefix}{SCALE}")
    read_scale(scale, f"{prefix}{SCALE}")  # says what is wrong with its dtype
    kept: Tensor = scale.detach().view(formats.E8M0) if scale.dtype == torch.uint8 else scale.detach()
    kept = kept.view(1, 1) if kept.numel() == 1 else kept
    fp8_linear.scaling_of((weight.shape[0], weight.shape[1]), kept, recipe, f"{prefix}{SCALE}")
    return kept
