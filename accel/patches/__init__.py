"""The table of replacements: a file per library, none of which imports it."""

from __future__ import annotations

from accel.patches import timm, torchvision, transformers
from accel.patches.entry import Entry, class_path

__all__ = ["TABLE", "Entry", "class_path"]

TABLE: dict[str, Entry] = {e.target: e for e in (*torchvision.ENTRIES, *timm.ENTRIES, *transformers.ENTRIES)}
