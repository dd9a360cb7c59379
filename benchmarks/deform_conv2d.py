"""Deformable convolution: rows, rivals, costs and goals.

The rival is torchvision's operator, where it loads. The yardsticks compute something else of the same inputs: the plain
convolution of that shape, and the bare product of its weight with a matrix of columns that is already there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import accel
from accel import dispatch
from accel.benchmarks._torchvision import operator
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import ONE_THREAD, Case, Cost, Pick, Provider, Short, one_thread
from accel.ops.deformable.deform_conv2d import OP

NAME = "deform_conv2d"
ON_A_GPU = ("triton", "cuda")
"""Backends that are measured beside the one chosen."""
PROVIDERS = ("accel", ONE_THREAD, *ON_A_GPU, "torchvision", "conv2d", "matmul")
TAPS = 9
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """A layer of ResNet with its offsets and masks: 3×3, padding 1."""

    channels: int
    height: int
    width: int
    batch: int = 1
    last: bool = False  # channels_last

    @property
    def group(self) -> str:
        many = "" if self.batch == 1 else f"B{self.batch} "
        return f"{many}C{self.channels} {self.height}×{self.width}"

    @property
    def variant(self) -> str:
        return "channels last" if self.last else ""

    def __str__(self) -> str:
        return f"B{self.batch} C{self.channels} {self.height}×{self.width} 3×3"


LAYERS = (Shape(128, 100, 168), Shape(256, 50, 84), Shape(512, 25, 42))


def costs(shape: Shape, itemsize: int, modes: Sequence[str]) -> dict[str, Cost]:
    """One product forward, two backward. Forward reads map, offsets, masks and weight and writes a map; backward
    reads those and the gradient and writes theirs."""
    positions = shape.batch * shape.height * shape.width
    product = 2 * positions * TAPS * shape.channels**2
    maps, weight = positions * shape.channels * itemsize, TAPS * shape.channels**2 * itemsize
    spots = positions * TAPS * 3 * 4
    forward = Cost(product, 2 * maps + weight + spots)
    backward = Cost(2 * product, 3 * maps + 2 * weight + 2 * spots)
    both = Cost(forward.flops + backward.flops, forward.moved + backward.moved)
    known = {"forward": forward, "backward": backward, "forward+backward": both}
    return {mode: known[mode] for mode in modes}


# --- what is computed ---


def ours(backend: str | None = None) -> Function:
    def function(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor, *columns: Tensor) -> Tensor:
        return accel.deform_conv2d(x, offset, weight, padding=1, mask=mask, backend=backend)

    return function


def _torchvision() -> Function:
    deform_conv2d = operator("deform_conv2d")

    def function(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor, *columns: Tensor) -> Tensor:
        half = x.dtype in (torch.bfloat16, torch.float16)  # it takes one dtype, and no bfloat16
        parts = [t.float() if half else t for t in (x, offset, weight, mask)]
        out: Tensor = deform_conv2d(*parts[:3], padding=1, mask=parts[3])
        return out.to(x.dtype)

    return function


def conv2d(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor, *columns: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def matmul(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor, columns: Tensor) -> Tensor:
    return weight.flatten(1) @ columns


def _backend(*inputs: Tensor) -> str:
    x, offset, weight, mask, *_ = inputs
    return dispatch.select(OP, OP.prepare(x, offset, weight, padding=1, mask=mask)).name


def _inputs(shape: Shape, device: str, dtype: torch.dtype, with_columns: bool) -> Callable[..., tuple[Tensor, ...]]:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        size, C = (shape.height, shape.width), shape.channels
        x = normal(shape.batch, C, *size).to(dtype)
        if shape.last:
            x = x.to(memory_format=torch.channels_last)
        # fp32 beside half inputs, and in steps of 1/256: positions are exact in fp32 then, and nobody is judged by the
        # digits that they have in the reference's fp64
        offset = (512 * normal(shape.batch, 2 * TAPS, *size)).round() / 256
        weight = (normal(C, C, 3, 3) / (TAPS * C) ** 0.5).to(dtype)
        made = [x, offset, weight, torch.sigmoid(normal(shape.batch, TAPS, *size))]
        if with_columns:
            made.append(normal(TAPS * C, shape.batch * shape.height * shape.width).to(dtype))
        return tuple(made)

    return make


def _case(shape: Shape, device: str, dtype: torch.dtype, modes: Sequence[str]) -> Case:
    providers = [
        Provider("accel", ours, _backend),
        *([one_thread(ours, _backend)] if device == "cpu" else []),
        *(Provider(name, functools.partial(ours, name)) for name in ON_A_GPU if device == "cuda"),
        Provider("torchvision", _torchvision),
        Provider("conv2d", lambda: conv2d, computes=conv2d),
    ]
    with_columns = list(modes) == ["forward"]
    if with_columns:
        providers.append(Provider("matmul", lambda: matmul, computes=matmul))
    return Case(
        op=NAME,
        group=shape.group,
        variant=shape.variant,
        shape=str(shape),
        dtype=dtype,
        inputs=_inputs(shape, device, dtype, with_columns),
        reference=ours("reference"),
        providers=tuple(providers),
        costs=costs(shape, dtype.itemsize, modes),
        family="deform_conv",
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op, those that goals are about first."""
    for dtype in dtypes:
        for batch in (1,) if device == "cpu" else (1, 8, 16):
            for layer in LAYERS:
                shape = Shape(layer.channels, layer.height, layer.width, batch)
                yield _case(shape, device, dtype, ["forward"])
                yield _case(shape, device, dtype, ["backward", "forward+backward"])
    for dtype in dtypes:
        for layer in LAYERS:
            shape = Shape(layer.channels, layer.height, layer.width, 4, last=True)
            yield _case(shape, device, dtype, ["forward", "forward+backward"])


SHORT = Short(
    rivals=("torchvision", "conv2d"),
    cpu=(Pick("deformable 3×3, 256 channels", "C256 50×84", modes=("forward", "forward+backward")),),
    cuda=tuple(
        Pick(f"deformable 3×3, {layer.channels} channels", f"B8 C{layer.channels} {layer.height}×{layer.width}")
        for layer in LAYERS[:2]
    ),
)


# --- goals ---


def _cpu_goals() -> Iterator[Goal]:
    bounds = (
        ("fp32", "forward", "conv2d|matmul", 1.2),
        ("fp32", "forward+backward", "conv2d", 1.8),
        ("bf16", "forward", "conv2d", 1.5),
    )
    for dtype, mode, rival, bound in bounds:
        for shape in LAYERS:
            where = {"group": shape.group, "dtype": dtype, "mode": mode}
            than = rival.replace("|", " or ")
            name = f"{shape.group}, {mode}, {dtype}: against {than}, in {bound:g} of its time"
            yield Goal(name, NAME, "speedup", "cpu", where, rival, at_least=1 / bound)
            name = f"{shape.group}, {mode}, {dtype}, from one thread to two or more"
            yield Goal(name, NAME, "speedup", "cpu", where, ONE_THREAD, at_least=1.7)


def _cuda_goals() -> Iterator[Goal]:
    for shape in LAYERS:
        for batch in (8, 16):
            group = Shape(shape.channels, shape.height, shape.width, batch).group
            where = {"group": group, "dtype": "bf16", "mode": "forward"}
            yield Goal(f"{group}, forward, bf16, times the floor", NAME, "floor", "cuda", where, at_most=2.0)
            for mode in ("forward", "backward"):
                where = {"group": group, "dtype": "bf16", "mode": mode}
                yield Goal(f"{group}, {mode}, bf16", NAME, "speedup", "cuda", where, "torchvision", at_least=5.0)


GOALS = (*_cpu_goals(), *_cuda_goals())
