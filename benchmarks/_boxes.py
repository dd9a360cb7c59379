"""What the benchmarks of ps_roi_align and ps_roi_pool share: heads of detectors, rivals, costs.

A bin's value is a sum over pixels whose weights are products of one for the row and one for the column, so in plain
torch it is two products of matrices for every bin, one an axis. That is the rival that runs
everywhere, and, in float64, the truth; a test holds it against the op's own reference. Where torchvision's native part
loads, its operator is the rival.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accel import dispatch
from accel.benchmarks._torchvision import operator
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import MODES, ONE_THREAD, Case, Cost, Provider, compiled, one_thread

PROVIDERS = ("accel", "torchvision", "eager", ONE_THREAD, "compile")
BINS = 7
SCALE = 1 / 16
Function = Callable[..., Tensor]
Axis = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""The two ends (K,) of boxes on an axis, in pixels, and its length: the weight of each pixel in each bin
``(K, 7, size)``, and what sums are divided by ``(K, 7)``."""


@dataclass(frozen=True)
class Shape:
    """The head of a detector: maps of a sixteenth of the image, a channel for each class (or feature) and bin."""

    group: str
    features: int
    batch: int
    boxes: int  # in all
    height: int
    width: int

    @property
    def channels(self) -> int:
        return self.features * BINS * BINS

    def __str__(self) -> str:
        return f"B{self.batch} C{self.channels} {self.height}×{self.width}, {self.boxes} boxes, {BINS}×{BINS}"


SHAPES = (
    Shape("Light-Head R-CNN", 10, 2, 1000, 50, 84),
    Shape("R-FCN", 21, 1, 300, 38, 63),
)


@functools.lru_cache(maxsize=4)
def boxes(shape: Shape, device: str) -> Tensor:
    """``(K, 5)`` inside the image, sides of 32 to 448 of its pixels, in the order of the images.

    Sides are whole pixels of the map, at most 28: a seventh of 29 or 31, times seven, is above that in one precision
    and not in another, and then the last bin of pooling has a pixel more.
    """
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([shape.width, shape.height]) / SCALE
    sides = (2 * 14 ** torch.rand(shape.boxes, 2, generator=generator)).round() / SCALE
    first = (torch.rand(shape.boxes, 2, generator=generator) * (size - 1 - sides)).floor()
    corners = torch.cat([first, first + sides], 1)  # exact in fp32, as are their sixteenths
    image = torch.arange(shape.boxes) * shape.batch // shape.boxes
    return torch.cat([image[:, None], corners], 1).to(device)


def _axes(axis: Axis, shape: Shape, device: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Weights and divisors of rows and of columns."""
    _, x1, y1, x2, y2 = (boxes(shape, device).to(dtype) * SCALE).unbind(1)
    return [axis(y1, y2, shape.height), axis(x1, x2, shape.width)]


def composition(axis: Axis, shape: Shape) -> Function:
    """In plain torch: columns by a product of matrices, then rows."""

    def function(x: Tensor) -> Tensor:
        inner = torch.float64 if x.dtype == torch.float64 else torch.float32
        (rows, row_divisors), (columns, column_divisors) = _axes(axis, shape, str(x.device), inner)
        # taken apart at once: the gradient of one bin's channels alone would be a map of all of them, for every bin
        maps = iter(x.to(inner).unflatten(1, (-1, BINS, BINS)).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).unbind())
        images = []
        for n in range(shape.batch):
            mine = slice(*(-(-m * shape.boxes // shape.batch) for m in (n, n + 1)))
            parts = []
            for i in range(BINS):
                for j in range(BINS):
                    lines = (columns[mine, j] @ next(maps).flatten(0, 1).T).unflatten(1, (-1, shape.height))
                    parts.append((lines @ rows[mine, i, :, None]).squeeze(-1))
            images.append(torch.stack(parts, -1).unflatten(-1, (BINS, BINS)))
        divisors = row_divisors[:, :, None] * column_divisors[:, None]
        return (torch.cat(images) / divisors[:, None]).to(x.dtype)

    return function


def costs(axis: Axis, shape: Shape, device: str, itemsize: int, modes: Sequence[str]) -> dict[str, Cost]:
    """A pixel that has a weight is multiplied and added once for each channel. Forward reads the map and writes the
    bins, backward the other way round."""
    (rows, _), (columns, _) = _axes(axis, shape, device, torch.float32)
    pixels = int(((rows > 0).sum((1, 2)) * (columns > 0).sum((1, 2))).sum())
    moved = (shape.batch * shape.height * shape.width + shape.boxes) * shape.channels * itemsize
    one_way = Cost(2 * pixels * shape.features, moved)
    known = {"forward": one_way, "backward": one_way, "forward+backward": Cost(2 * one_way.flops, 2 * moved)}
    return {mode: known[mode] for mode in modes}


def cases(op: dispatch.Op, axis: Axis, device: str, dtypes: Sequence[torch.dtype], *sampling: int) -> Iterator[Case]:
    """All rows of either op; ``sampling`` is what it takes beside the scale."""
    for dtype in dtypes:
        for shape in SHAPES:
            yield _case(op, axis, shape, device, dtype, *sampling)


def _case(op: dispatch.Op, axis: Axis, shape: Shape, device: str, dtype: torch.dtype, *sampling: int) -> Case:
    def given() -> tuple[Tensor, int, float, *tuple[int, ...]]:
        return boxes(shape, device), BINS, SCALE, *sampling

    def ours() -> Function:
        return lambda x: op.function(x, *given())

    def torchvisions() -> Function:
        theirs = operator(op.name)
        half = dtype == torch.bfloat16 or (dtype == torch.float16 and device == "cpu")  # which it does not take
        return lambda x: theirs(x.float() if half else x, *given()).to(x.dtype)

    def backend(x: Tensor) -> str:
        return dispatch.select(op, op.prepare(x, *given())).name

    def make(generator: torch.Generator) -> tuple[Tensor]:
        size = (shape.batch, shape.channels, shape.height, shape.width)
        return (torch.randn(size, generator=generator, device=device).to(dtype),)

    plain = composition(axis, shape)
    providers = [
        Provider("accel", ours, backend),
        Provider("torchvision", torchvisions),
        Provider("eager", lambda: plain),
        *([one_thread(ours, backend)] if device == "cpu" else []),
        Provider("compile", lambda: compiled(plain), lambda *inputs: "inductor"),
    ]
    return Case(
        op=op.name,
        group=shape.group,
        variant="",
        shape=str(shape),
        dtype=dtype,
        inputs=make,
        reference=plain,
        providers=tuple(providers),
        costs=costs(axis, shape, device, dtype.itemsize, MODES),
        family="sample_wide",
    )


def no_slower(name: str) -> tuple[Goal, ...]:
    """The goals of either op: never slower than what it replaces."""
    return tuple(
        Goal(
            f"{shape.group}, {mode}, fp32, against torchvision",
            name,
            "speedup",
            device,
            {"group": shape.group, "dtype": "fp32", "mode": mode},
            "torchvision",
            at_least=1.0,
        )
        for device, modes in (("cpu", ("forward", "forward+backward")), ("cuda", ("forward", "backward")))
        for shape in SHAPES
        for mode in modes
    )
