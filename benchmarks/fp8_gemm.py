"""Products of eight-bit numbers with their scales, against torch's own scaled product where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import accel
from accel import dispatch
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import Case, Cost, Pick, Provider, Short, UnavailableError
from accel.ops.fp8.fp8_gemm import OP

NAME = "fp8_gemm"
PROVIDERS = ("accel", "scaled_mm", "dequantised")
BLOCKS, WEIGHTS, ROWS = "1 x 128 by 128 x 128", "1 x 128 by 1 x 128", "scales of rows"
SCALES: dict[str, tuple[tuple[int, int | None], tuple[int, int | None]]] = {
    BLOCKS: ((1, 128), (128, 128)),
    WEIGHTS: ((1, 128), (1, 128)),
    ROWS: ((1, None), (1, None)),
}
Function = Callable[..., Tensor]


def ours(dtype: torch.dtype, backend: str | None = None) -> Function:
    def function(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
        wanted = a_scale.dtype if a_scale.dtype == torch.float64 else dtype
        return accel.fp8_gemm(a, a_scale.float(), b, b_scale.float(), out_dtype=wanted, backend=backend)

    return function


def scaled_mm(group: str, dtype: torch.dtype) -> Function:
    """torch's, which on a CPU knows scales of rows alone."""
    if group != ROWS:
        raise UnavailableError("torch's block modes need a GPU of compute capability 9.0, and are not measured here")

    def function(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
        return torch._scaled_mm(a, b.t(), a_scale, b_scale.t(), out_dtype=dtype)

    return function


def dequantised(group: str, dtype: torch.dtype) -> Function:
    """What one does without a kernel: both operands in the dtype, then a product."""
    blocks = SCALES[group]

    def function(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
        both = zip((a, b), (a_scale, b_scale), blocks, strict=True)
        x, w = [accel.fp8_dequantize(q, s.float(), block=block, dtype=dtype) for q, s, block in both]
        return x @ w.t()

    return function


def _case(group: str, M: int, N: int, K: int, device: str, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        both = [torch.randn(size, K, generator=generator, device=device) for size in (M, N)]
        (a, a_scale), (b, b_scale) = [
            accel.fp8_quantize(x, block=block) for x, block in zip(both, SCALES[group], strict=True)
        ]
        return a, b, a_scale, b_scale

    def backend(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> str:
        return dispatch.select(OP, OP.prepare(a, a_scale, b, b_scale, out_dtype=dtype)).name

    return Case(
        op=NAME,
        group=group,
        variant=f"{M} rows",
        shape=f"{M} x {N} x {K}",
        dtype=dtype,
        inputs=make,
        reference=ours(dtype, "reference"),
        providers=(
            Provider("accel", lambda: ours(dtype), backend),
            Provider("scaled_mm", lambda: scaled_mm(group, dtype)),
            Provider("dequantised", lambda: dequantised(group, dtype)),
        ),
        costs={"forward": Cost(2 * M * N * K, M * K + N * K + M * N * dtype.itemsize)},
        family="fp8",
        cold=(1,),
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op: in bf16, in which FP8 is used."""
    if torch.bfloat16 not in dtypes:
        return
    sizes = ((16, 4096, 4096), (512, 4096, 4096)) if device == "cpu" else ((4096, 4096, 7168), (4096, 7168, 4096))
    for group in SCALES:
        for M, N, K in sizes:
            yield _case(group, M, N, K, device, torch.bfloat16)


SHORT = Short(
    rivals=("dequantised",),
    cpu=(Pick("512 rows of codes", BLOCKS, "512 rows"),),
    cuda=(Pick("4096 x 4096 x 7168", BLOCKS, "4096 rows"),),
)

GOALS = (
    *[
        Goal(f"{rows} rows against dequantising first", NAME, "speedup", "cpu",
             {"group": BLOCKS, "variant": f"{rows} rows"}, "dequantised", at_least=1.0)
        for rows in (16, 512)
    ],
    Goal("block product, TFLOP/s", NAME, "rate", "cuda", {"group": BLOCKS, "variant": "4096 rows"}, at_least=900.0,
         stretch=1250.0),
    Goal("product of gradients of weights, TFLOP/s", NAME, "rate", "cuda",
         {"group": WEIGHTS, "variant": "4096 rows"}, at_least=873.0),
)  # fmt: skip
