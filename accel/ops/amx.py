"""Whether torch multiplies bfloat16 in the matrix units of this processor, which our kernels do not use."""

from __future__ import annotations

import torch

WITHOUT = "on a CPU it is for those with AMX, in which torch multiplies bfloat16, and this one has none in use"


@torch.compiler.assume_constant_result  # it cannot be traced, and its answer does not change
def has_amx() -> bool:
    if not getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return False
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
