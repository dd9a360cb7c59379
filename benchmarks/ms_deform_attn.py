"""Multi-scale deformable attention: rows, rivals, costs and goals.

The rival is what transformers computes where no extension loads: ``grid_sample`` on each level, then a weighted sum
over the stacked samples. In half precision it samples in float32, as under autocast: positions in bfloat16 would be off
by tenths of a pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import accel
from accel import dispatch
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import MODES, ONE_THREAD, Case, Cost, Pick, Provider, Short, compiled, one_thread
from accel.ops.deformable.ms_deform_attn import OP

NAME = "ms_deform_attn"
PROVIDERS = ("accel", "eager", ONE_THREAD, "compile")  # ours never after ours, whose inputs would be in the caches yet
POINTS = 4
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """Queries on the feature pyramid of an image of 800×1333."""

    group: str
    variant: str
    queries: int = 0  # one for each pixel, if 0
    batch: int = 1
    heads: int = 8
    size: int = 32  # of a head
    levels: tuple[tuple[int, int], ...] = ((100, 167), (50, 84), (25, 42), (13, 21))

    @property
    def pixels(self) -> int:
        return sum(h * w for h, w in self.levels)

    @property
    def count(self) -> int:
        """Of queries."""
        return self.queries or self.pixels

    def __str__(self) -> str:
        return f"B{self.batch} Q{self.count} S{self.pixels} h{self.heads} D{self.size} {len(self.levels)}×{POINTS}"


def _shapes(batch: int) -> Iterator[Shape]:
    yield Shape("encoder", "uniform", batch=batch)
    yield Shape("encoder", "local", batch=batch)
    yield Shape("decoder", "uniform", queries=300, batch=batch)


def costs(shape: Shape, itemsize: int, modes: Sequence[str]) -> dict[str, Cost]:
    """Four pixels of each sample are multiplied and added forward; backward, once for the gradient of the value and
    once for those of locations and weights.

    Forward reads the value, as far as there are samples of it, locations and weights and writes the output; backward
    reads these and the upstream gradient and writes three gradients.
    """
    heads = shape.batch * shape.heads
    samples = heads * shape.count * len(shape.levels) * POINTS
    flops = 2 * 4 * samples * shape.size
    read = min(heads * shape.pixels, 4 * samples) * shape.size * itemsize
    value, out = (n * heads * shape.size * itemsize for n in (shape.pixels, shape.count))
    places = 3 * 4 * samples
    forward = Cost(flops, read + places + out)
    backward = Cost(2 * flops, read + value + 2 * places + out)
    both = Cost(forward.flops + backward.flops, forward.moved + backward.moved)
    known = {"forward": forward, "backward": backward, "forward+backward": both}
    return {mode: known[mode] for mode in modes}


# --- what is computed ---


def ours(shape: Shape, backend: str | None = None) -> Function:
    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return accel.ms_deform_attn(value, shape.levels, None, locations, weights, backend=backend)

    return function


def reference(shape: Shape, at_once: int = 1024) -> Function:
    """Our reference, which keeps the samples of some queries and no more."""
    function = ours(shape, "reference")

    def by_queries(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        parts = zip(locations.split(at_once, 1), weights.split(at_once, 1), strict=True)
        return torch.cat([checkpoint(function, value, *part, use_reentrant=False) for part in parts], 1)

    return by_queries


def eager(shape: Shape) -> Function:
    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        n, _, heads, size = value.shape
        queries = locations.shape[1]
        grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (N·M, Q, L, P, 2)
        samples = []
        for level, part in enumerate(value.split([h * w for h, w in shape.levels], 1)):
            image = part.flatten(2).transpose(1, 2).reshape(n * heads, size, *shape.levels[level])
            # contiguous: torch 2.13 reads beyond strided views of half precision
            image, grid = image.float().contiguous(), grids[:, :, level].contiguous()
            samples.append(F.grid_sample(image, grid, align_corners=False))
        spread = weights.transpose(1, 2).reshape(n * heads, 1, queries, -1)
        out = (torch.stack(samples, -2).flatten(-2) * spread).sum(-1).view(n, heads * size, queries)
        return out.transpose(1, 2).to(value.dtype).contiguous()

    return function


def _inputs(shape: Shape, device: str, dtype: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        places = (shape.batch, shape.count, shape.heads, len(shape.levels), POINTS)
        size = torch.tensor([[w, h] for h, w in shape.levels], device=device)[:, None]
        if shape.variant == "local":
            at = torch.cat([_centres(h, w, device) for h, w in shape.levels])[:, None, None, None] * size - 0.5
            at = at + 2 * normal(*places, 2)
        else:
            at = torch.rand((*places, 2), generator=generator, device=device) * size - 0.5
        # away from integers, where a derivative jumps and a rounding of the position chooses the side
        at = at.floor() + 1 / 16 + (at - at.floor()) * 7 / 8
        value = normal(shape.batch, shape.pixels, shape.heads, shape.size).to(dtype)
        weights = normal(*places).flatten(3).softmax(-1).view(places)
        return value, (at + 0.5) / size, weights  # the last two in fp32 beside half inputs, too

    return make


def _centres(height: int, width: int, device: str) -> Tensor:
    """Of a level's pixels, x before y, as fractions of its size: the reference points of an encoder's queries."""
    y, x = (torch.arange(n, device=device) + 0.5 for n in (height, width))
    return torch.cartesian_prod(y / height, x / width).flip(-1)


def _case(shape: Shape, device: str, dtype: torch.dtype, modes: Sequence[str]) -> Case:
    def backend(*inputs: Tensor) -> str:
        value, locations, weights = inputs
        return dispatch.select(OP, OP.prepare(value, shape.levels, None, locations, weights)).name

    providers = [Provider("accel", lambda: ours(shape), backend), Provider("eager", lambda: eager(shape))]
    if device == "cpu" and shape.group == "encoder":  # the others have little to share out
        providers.append(one_thread(lambda: ours(shape), backend))
    providers.append(Provider("compile", lambda: compiled(eager(shape)), lambda *inputs: "inductor"))
    return Case(
        op=NAME,
        group=shape.group,
        variant=shape.variant,
        shape=str(shape),
        dtype=dtype,
        inputs=_inputs(shape, device, dtype),
        reference=reference(shape),
        providers=tuple(providers),
        costs=costs(shape, dtype.itemsize, modes),
        family="sample_wide",
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op, those that goals are about first."""
    for dtype in dtypes:
        for shape in _shapes(1 if device == "cpu" else 4):
            yield _case(shape, device, dtype, MODES)


SHORT = Short(
    rivals=("eager",),
    cpu=(
        Pick("encoder of Deformable DETR", "encoder", "local", ("forward", "forward+backward")),
        Pick("its decoder, 300 queries", "decoder", "uniform", ("forward",)),
    ),
    cuda=(
        Pick("encoder of Deformable DETR", "encoder", "local", ("forward", "backward")),
        Pick("its decoder, 300 queries", "decoder", "uniform", ("forward", "backward")),
    ),
)


# --- goals ---


def _cpu_goals() -> Iterator[Goal]:
    bounds = {("encoder", "uniform"): (10, 7), ("encoder", "local"): (15, 10), ("decoder", "uniform"): (4, 4)}
    for dtype in ("fp32", "bf16"):
        for (group, variant), pair in bounds.items():
            for mode, bound in zip(("forward", "forward+backward"), pair, strict=True):
                where = {"group": group, "variant": variant, "dtype": dtype, "mode": mode}
                name = f"{group} {variant}, {mode}, {dtype}, against grid_sample"
                yield Goal(name, NAME, "speedup", "cpu", where, "eager", at_least=bound)
                if group == "encoder":
                    name = f"{group} {variant}, {mode}, {dtype}, from one thread to two or more"
                    yield Goal(name, NAME, "speedup", "cpu", where, ONE_THREAD, at_least=1.7)


def _cuda_goals() -> Iterator[Goal]:
    decoder = next(shape for shape in _shapes(4) if shape.group == "decoder")
    for mode, microseconds in (("forward", 8), ("backward", 56)):
        cost = costs(decoder, 2, [mode])[mode]
        where = {"group": "decoder", "variant": "uniform", "dtype": "bf16", "mode": mode}
        name = f"decoder, {mode}, bf16, TFLOP/s, which are those of {microseconds} µs"
        yield Goal(name, NAME, "rate", "cuda", where, at_least=cost.flops / microseconds / 1e6)


GOALS = (*_cpu_goals(), *_cuda_goals())
