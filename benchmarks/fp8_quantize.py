"""Quantisation to eight bits in tiles of 1 x 128, against plain torch: which gives the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import accel
from accel import dispatch
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import Case, Cost, Pick, Provider, Short
from accel.ops.fp8.fp8_quantize import OP

NAME = "fp8_quantize"
PROVIDERS = ("accel", "eager")
TILES, BOTH = "1 x 128", "1 x 128, both ways"
SIZE = 4096


def ours(group: str, backend: str | None = None) -> Callable[[Tensor], Tensor]:
    """The codes, as bytes."""

    def function(x: Tensor) -> Tensor:
        made = accel.fp8_quantize(x, transpose=group == BOTH, backend=backend)
        return made[-2].view(torch.uint8)

    return function


def _case(group: str, size: int, device: str, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(size, size, generator=generator, device=device).to(dtype),)

    def backend(x: Tensor) -> str:
        return dispatch.select(OP, OP.prepare(x, transpose=group == BOTH)).name

    written = (2 if group == BOTH else 1) * (size * size + 4 * size * size // 128)
    return Case(
        op=NAME,
        group=group,
        variant=f"{size} x {size}",
        shape=f"{size} x {size}",
        dtype=dtype,
        inputs=make,
        reference=ours(group, "reference"),
        providers=(
            Provider("accel", lambda: ours(group), backend),
            Provider("eager", lambda: ours(group, "reference")),
        ),
        costs={"forward": Cost(2 * size * size, size * size * dtype.itemsize + written)},
        family="exact",
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op."""
    for dtype in dtypes:
        for group in (TILES, BOTH):
            yield _case(group, SIZE if device == "cpu" else 2 * SIZE, device, dtype)


SHORT = Short(
    rivals=("eager",),
    cpu=(Pick("4096 x 4096 numbers", TILES, f"{SIZE} x {SIZE}"),),
    cuda=(Pick("8192 x 8192 numbers", TILES, f"{2 * SIZE} x {2 * SIZE}"),),
)

GOALS = (
    *[
        Goal(f"quantising, {dtype}, against eager torch", NAME, "speedup", "cpu", {"group": TILES, "dtype": dtype},
             "eager", at_least=6.0)
        for dtype in ("bf16", "fp32")
    ],
    *[
        Goal(f"quantising, {dtype}: {share} of the copy bandwidth", NAME, "floor", "cpu",
             {"group": TILES, "dtype": dtype}, at_most=most)
        for dtype, share, most in (("bf16", "40 %", 2.5), ("fp32", "60 %", 1.67))
    ],
    Goal("quantising, bf16: 75 % of the copy bandwidth", NAME, "floor", "cuda", {"group": TILES, "dtype": "bf16"},
         at_most=1.33),
)  # fmt: skip
