"""The table of replacements: a file per library, none of which imports it."""

from __future__ import annotations

from torch import nn

from accel.patches import (
    diffusers,
    flash_pytorch,
    fp8,
    mmcv,
    mmpose,
    mossformer,
    timm,
    torch_nn,
    torchvision,
    transformers,
    transformers_mamba2,
    transformers_vision,
)
from accel.patches.entry import Entry, Function, class_path, plain_class

__all__ = ["FUNCTIONS", "TABLE", "Entry", "Function", "class_path", "target_of"]

LIBRARIES = (
    *(torch_nn, torchvision, timm, transformers, transformers_vision, diffusers, mmcv),
    *(flash_pytorch, mmpose, mossformer, fp8),
)
TABLE: dict[str, Entry] = {e.target: e for library in LIBRARIES for e in library.ENTRIES}
FUNCTIONS: dict[str, Function] = {f.target: f for f in (*torchvision.FUNCTIONS, *transformers_mamba2.FUNCTIONS)}


def target_of(module: nn.Module) -> str:
    """What the entry of such a module is found by: the path of its class, with its kind where a class has several."""
    path = class_path(plain_class(type(module)))
    kind = diffusers.KINDS.get(path)
    return path if kind is None else path + kind(module)
