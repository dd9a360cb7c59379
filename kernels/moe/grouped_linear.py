"""The products of all experts in Triton; the kernels are in ``products.py``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from accel.backends import KERNEL_DTYPES
from accel.kernels import _launch
from accel.kernels.moe import products

__all__ = ["backward", "compile_cases", "forward", "why_not"]


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtypes are judged by the op. ``torch.compile`` traces through this."""
    return products.why_not(args, (args.weight,), args.x.shape[0])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, transposed: bool) -> Tensor:
    """Arguments are the fields of ``accel.ops.moe.grouped_linear.Args``."""
    with _launch.device_of(x):
        return products.product(x, weight, not transposed, bias, offsets, x.shape[0])


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, transposed: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, empty where they are not needed."""
    rows, nothing = x.shape[0], x.new_empty(0, dtype=torch.float32)
    found = [nothing] * 3
    with _launch.device_of(x):
        if needs[0]:
            found[0] = products.product(grad, weight, transposed, None, offsets, rows)
        if needs[1]:
            left, right = (x, grad) if transposed else (grad, x)
            found[1] = products.outer(left, right, offsets, rows)
        if needs[2]:
            found[2] = products.sums(grad, offsets, rows)
    return found[0], found[1], found[2]


SIZES = ((32768 * 8, 2048, 1536, 128), (96, 40, 24, 4))  # N, C, O, X


def compile_cases() -> Iterator[_launch.CompileCase]:
    for dtype, (N, C, O, X), inner in itertools.product(KERNEL_DTYPES, SIZES, (True, False)):  # noqa: E741
        x, weight = torch.empty((N, C), dtype=dtype, device="meta"), torch.empty((X, O, C), dtype=dtype, device="meta")
        out, bias = torch.empty((N, O), dtype=dtype, device="meta"), torch.empty((X, O), device="meta")
        given = weight if inner else weight.transpose(1, 2)
        tile = products.config(dtype, products.average(N, X), O, C, products.unit_of(O, C), inner_first=inner)
        name = f"{str(dtype)[6:]} {C} to {O}{'' if inner else ' transposed'}"
        of, edges = products.Tiles(*[torch.empty(N, dtype=torch.int64, device="meta")] * 3), out.new_empty(X + 2).long()
        yield products.product_launch(out, x, given, inner, bias, of, products.AS_THEY_LIE, tile).case(name)
        if inner:
            yield products.product_launch(out, x, given, inner, None, of, products.AS_THEY_LIE, tile).case(
                f"{name} without bias"
            )
            tile = products.config(dtype, O, C, products.average(N, X), products.unit_of(O, C))
            yield products.outer_launch(weight, out, x, edges, products.AS_THEY_LIE, tile).case(name)
            yield products.sums_launch(bias, out, None, edges, products.AS_THEY_LIE).case(name)
