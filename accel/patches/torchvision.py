"""torchvision: the three attention modules, whose ``forward`` pads, rolls and partitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from accel.nn import shifted_window_attention, shifted_window_attention_3d, shifted_window_attention_v2
from accel.patches.entry import LINEAR, Entry, why_not_bypass, why_not_dropout


def _why_not(module: Any) -> str | None:
    return why_not_bypass(module, qkv=LINEAR, proj=LINEAR)


def _why_not_call(module: Any, x: Tensor) -> str | None:
    return why_not_dropout(module.attention_dropout, module.training)


def _entry(target: str, function: Callable[..., Tensor]) -> Entry:
    def compute(module: Any, attend: Callable[..., Tensor], x: Tensor) -> Tensor:
        return function(module, x, attend)

    return Entry(f"torchvision.models.{target}", "forward", _why_not, compute, _why_not_call)


ENTRIES = (
    _entry("swin_transformer.ShiftedWindowAttention", shifted_window_attention),
    _entry("swin_transformer.ShiftedWindowAttentionV2", shifted_window_attention_v2),
    _entry("video.swin_transformer.ShiftedWindowAttention3d", shifted_window_attention_3d),
)
