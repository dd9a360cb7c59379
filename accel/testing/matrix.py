"""The support matrix of the README, made from the code: ``python -m accel.testing.matrix``."""

from __future__ import annotations

import torch

from accel import dispatch, patches
from accel.patches import transformers_switch, transformers_unpad

DEVICES = {"cpu": "CPU", "cuda": "GPU"}
DTYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def backends() -> str:
    """A row per op and backend: where it runs and what it computes, forward and backward alike."""
    lines = ["| op | backend | runs on | dtypes |", "|---|---|---|---|"]
    for op in dispatch.OPS.values():
        for backend in op.backends:
            where = " and ".join(DEVICES[d] for d in sorted(backend.devices or DEVICES))
            dtypes = ", ".join(DTYPES[d] for d in DTYPES if d in backend.dtypes)
            lines.append(f"| `{op.name}` | {backend.name} | {where} | {dtypes} |")
    return "\n".join(lines)


REGISTRY = "any attention of transformers that goes through `AttentionInterface`"
FUNCTION = "the function `{}`, with `accel.patch_functions()`"
FLATTENED = "encoders and decoder-only models of transformers, with `unpad=True`"


MANY = {"moe_experts": "experts of transformers: {}", "moe_route": "routers of transformers: {}"}
"""Of which the classes fill a row together."""


def replacements() -> str:
    """A row per class that ``accel.patch`` knows, and what it knows without a class."""
    lines = ["| class | method | op |", "|---|---|---|"]
    many: dict[str, list[str]] = {op: [] for op in MANY}
    for entry in patches.TABLE.values():
        if entry.op in many:
            many[entry.op].append(entry.target.rpartition(".")[2])
            continue
        lines.append(f"| `{entry.target}` | `{entry.attribute}` | `{entry.op}` |")
    for op, names in many.items():
        lines.append(f"| {MANY[op].format(', '.join(f'`{name}`' for name in names))} | `forward` | `{op}` |")
    for function in patches.FUNCTIONS.values():
        lines.append(f"| {FUNCTION.format(function.target)} | itself | `{function.op}` |")
    lines.append(f"| {REGISTRY} | its configuration | `{transformers_switch.OP}` |")
    lines.append(f"| {FLATTENED} | `{transformers_unpad.Unpadding.attribute}` | `unpad` and `pad` |")
    return "\n".join(lines)


def markdown() -> str:
    return f"{backends()}\n\n{replacements()}\n"


if __name__ == "__main__":
    print(markdown(), end="")
