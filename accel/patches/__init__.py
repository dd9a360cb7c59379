"""The table of replacements: a file per library, none of which imports it."""

from __future__ import annotations

from accel.patches import diffusers, timm, torch_nn, torchvision, transformers
from accel.patches.entry import Entry, class_path

__all__ = ["TABLE", "Entry", "class_path"]

LIBRARIES = (torch_nn, torchvision, timm, transformers, diffusers)
TABLE: dict[str, Entry] = {e.target: e for library in LIBRARIES for e in library.ENTRIES}
