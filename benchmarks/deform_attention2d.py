"""Deformable attention of DCNv3 and DCNv4: rows, rivals and costs.

The rival is what InternImage runs where its extension is not built: pad the map, normalise positions, ``grid_sample``.
In half precision it samples in float32, as under autocast: positions in bfloat16 would be off by tenths of a pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import accel
from accel import dispatch
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import MODES, ONE_THREAD, Case, Cost, Pick, Provider, Short, compiled, one_thread
from accel.ops.deformable.deform_attention2d import OP

NAME = "deform_attention2d"
PROVIDERS = ("accel", "eager", ONE_THREAD, "compile")
TAPS = 9
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """A stage of InternImage-T on an image of 800×1333: 3×3, stride 1, groups of 16 channels."""

    stage: int
    softmax: bool  # DCNv3 does, DCNv4 does not
    batch: int = 1

    @property
    def group(self) -> str:
        many = "" if self.batch == 1 else f"B{self.batch} "
        return f"{many}stage {self.stage}"

    @property
    def variant(self) -> str:
        return "DCNv3" if self.softmax else "DCNv4"

    @property
    def channels(self) -> int:
        return 32 << self.stage

    @property
    def groups(self) -> int:
        return self.channels // 16

    @property
    def size(self) -> tuple[int, int]:
        return ((200, 334), (100, 167), (50, 84), (25, 42))[self.stage - 1]

    def __str__(self) -> str:
        height, width = self.size
        return f"B{self.batch} {height}×{width} C{self.channels} G{self.groups} 3×3"


def costs(shape: Shape, itemsize: int, modes: Sequence[str]) -> dict[str, Cost]:
    """Four pixels of each sample are multiplied and added forward; backward, once for the gradient of the map and once
    for those of offsets and mask.

    Forward reads map, offsets and mask and writes a map; backward reads these and the upstream gradient and writes
    three gradients.
    """
    positions = shape.batch * shape.size[0] * shape.size[1]
    flops = 2 * 4 * positions * TAPS * shape.channels
    one_map, places = positions * shape.channels * itemsize, 3 * 4 * positions * shape.groups * TAPS
    forward = Cost(flops, 2 * one_map + places)
    backward = Cost(2 * flops, 3 * one_map + 2 * places)
    both = Cost(forward.flops + backward.flops, forward.moved + backward.moved)
    known = {"forward": forward, "backward": backward, "forward+backward": both}
    return {mode: known[mode] for mode in modes}


# --- what is computed ---


def ours(shape: Shape, backend: str | None = None) -> Function:
    def function(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return accel.deform_attention2d(
            x, offset, mask, kernel_size=3, padding=1, softmax=shape.softmax, backend=backend
        )

    return function


def eager(shape: Shape) -> Function:
    def function(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        groups = offset.shape[3]
        padded = F.pad(x.float().permute(0, 3, 1, 2), (1, 1, 1, 1))
        near = torch.arange(3, device=x.device)
        taps = torch.cartesian_prod(near, near)  # x outside, y inside
        rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
        base = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)[:, :, None, None]
        at = base + taps + offset  # (N, H, W, G, K, 2)
        grid = (at + 0.5) / torch.tensor([width + 2, height + 2], device=x.device) * 2 - 1
        samples = F.grid_sample(
            padded.reshape(batch * groups, channels // groups, height + 2, width + 2),
            grid.permute(0, 3, 1, 2, 4, 5).reshape(batch * groups, height * width, TAPS, 2),
            align_corners=False,
        )
        weights = mask.softmax(-1) if shape.softmax else mask
        weights = weights.permute(0, 3, 1, 2, 4).reshape(batch * groups, 1, height * width, TAPS)
        out = (samples * weights).sum(-1).view(batch, channels, height, width)
        return out.permute(0, 2, 3, 1).to(x.dtype).contiguous()

    return function


def _inputs(shape: Shape, device: str, dtype: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        places = (shape.batch, *shape.size, shape.groups, TAPS)
        offset = normal(*places, 2)
        # away from integers, where a derivative jumps and a rounding of the position chooses the side
        offset = offset.floor() + 1 / 16 + (offset - offset.floor()) * 7 / 8
        mask = normal(*places) if shape.softmax else torch.sigmoid(normal(*places))
        return normal(shape.batch, *shape.size, shape.channels).to(dtype), offset, mask  # these two stay in fp32

    return make


def _case(shape: Shape, device: str, dtype: torch.dtype, modes: Sequence[str]) -> Case:
    def backend(*inputs: Tensor) -> str:
        return dispatch.select(OP, OP.prepare(*inputs, kernel_size=3, padding=1, softmax=shape.softmax)).name

    providers = [Provider("accel", lambda: ours(shape), backend), Provider("eager", lambda: eager(shape))]
    if device == "cpu":
        providers.append(one_thread(lambda: ours(shape), backend))
    providers.append(Provider("compile", lambda: compiled(eager(shape)), lambda *inputs: "inductor"))
    return Case(
        op=NAME,
        group=shape.group,
        variant=shape.variant,
        shape=str(shape),
        dtype=dtype,
        inputs=_inputs(shape, device, dtype),
        reference=ours(shape, "reference"),
        providers=tuple(providers),
        costs=costs(shape, dtype.itemsize, modes),
        family="sample_wide",
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op."""
    batch = 1 if device == "cpu" else 4
    for dtype in dtypes:
        for stage in (3, 2, 4, 1):
            for softmax in (True, False):
                yield _case(Shape(stage, softmax, batch), device, dtype, MODES)


SHORT = Short(
    rivals=("eager",),
    cpu=(Pick("DCNv3, InternImage stage 3", "stage 3", "DCNv3", ("forward", "forward+backward")),),
    cuda=(Pick("DCNv3, InternImage stage 3", "B4 stage 3", "DCNv3", ("forward", "backward")),),
)

GOALS: tuple[Goal, ...] = ()  # nobody has published a figure for a CPU, and torchvision has no such operator
