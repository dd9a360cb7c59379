"""The table of replacements: a file per library, none of which imports it."""

from __future__ import annotations

from accel.patches import diffusers, flash_pytorch, mmcv, timm, torch_nn, torchvision, transformers, transformers_vision
from accel.patches.entry import Entry, Function, class_path

__all__ = ["FUNCTIONS", "TABLE", "Entry", "Function", "class_path"]

LIBRARIES = (torch_nn, torchvision, timm, transformers, transformers_vision, diffusers, mmcv, flash_pytorch)
TABLE: dict[str, Entry] = {e.target: e for library in LIBRARIES for e in library.ENTRIES}
FUNCTIONS: dict[str, Function] = {f.target: f for f in torchvision.FUNCTIONS}
