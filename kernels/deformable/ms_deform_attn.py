"""Multi-scale deformable attention in Triton.

The kernels are those of every op that sums samples channel by channel (``rows.py``). The sizes of the levels
stay on the device: kernels read and bound them, and what is allocated has a bound that needs none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from accel.backends import why_not_gpu
from accel.kernels import _launch
from accel.kernels.deformable import rows_launch as rows
from accel.kernels.deformable.rows import Levels, Samples
from accel.kernels.deformable.rows_launch import Call
from accel.ops.deformable.ms_deform_attn import Args


def _cells(args: Any) -> int:
    """No fewer than all levels have: h · w pixels have (h + 1) · (w + 1) cells, at most 2 · h · w + 2."""
    return 2 * args.value.shape[1] + 2 * len(args.num_points)


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtypes are judged by the op. ``torch.compile`` traces through this."""
    reason = why_not_gpu(args.value, _launch.INTERPRETING)
    if reason is not None:
        return reason
    n, pixels, heads, head_size = args.value.shape
    points = sum(args.num_points)
    if points >= 2**15 or len(args.num_points) > 64:
        return f"it takes up to 64 levels and {2**15 - 1} points, not {args.num_points}"
    return rows.too_large(n * heads, args.sampling_locations.shape[1] * points, _cells(args), pixels, head_size)


def _call(args: Args) -> Call:
    ends = total = 0
    for i, count in enumerate(args.num_points):
        total += count
        ends |= total << (16 * i)
    return Call(
        value=args.value,
        locations=args.sampling_locations,
        weights=args.attention_weights,
        queries=(1, args.sampling_locations.shape[1]),
        map=(1, args.value.shape[1]),
        cells=_cells(args),
        samples_of_query=Samples(total, len(args.num_points), ends),
        levels=Levels(args.spatial_shapes, args.level_start_index),
        border_gradient=args.border_gradient,
    )


def forward(*args: Any) -> Tensor:
    """The output; arguments are the fields of ``accel.ops.deformable.ms_deform_attn.Args``."""
    call = _call(Args(*args))
    with _launch.device_of(call.value):
        return rows.forward(call).flatten(2)


def backward(grad_out: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, the last two in fp32; an empty tensor for one that is not needed."""
    call = _call(Args(*args[:-1]))
    need_value, need_location, need_weight = args[-1]
    with _launch.device_of(call.value):
        location, weight = rows.grad_points(grad_out, call, need_location, need_weight)
        value = rows.grad_value(grad_out, call) if need_value else call.locations.new_empty(0)
    return value, location, weight


# --- what the compile gate builds ---


def compile_cases() -> Iterator[_launch.CompileCase]:
    """Every tile of the tables, with aligned and odd head sizes."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    calls = (
        _cases(bf16, 8, 32, 22223, [4, 4, 4, 4]),
        _cases(bf16, 8, 32, 300, [4, 4, 4, 4]),
        _cases(bf16, 8, 32, 300, [4, 4, 4, 4], border=False),
        _cases(bf16, 8, 32, 300, [3, 6, 3]),
        _cases(bf16, 4, 200, 900, [5]),
        _cases(fp16, 8, 32, 22223, [4, 4, 4, 4]),
        _cases(fp32, 8, 32, 22223, [4, 4, 4, 4]),
        _cases(fp32, 3, 20, 300, [4, 4, 4]),
    )
    return _launch.once(case for call in calls for case in call)


def _cases(
    dtype: torch.dtype, heads: int, head_size: int, queries: int, num_points: list[int], border: bool = True
) -> Iterator[_launch.CompileCase]:
    """The launches of one call, forward and backward, on tensors that have shapes only."""
    n, pixels, levels, points = 4, 22223, len(num_points), sum(num_points)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    long = empty(levels, dtype=torch.int64)
    args = Args(
        value=empty(n, pixels, heads, head_size, dtype=dtype),
        sampling_locations=empty(n, queries, heads, points, 2),
        attention_weights=empty(n, queries, heads, points),
        spatial_shapes=long,
        level_start_index=long,
        num_points=num_points,
        border_gradient=border,
    )
    name = f"{str(dtype)[6:]} {heads} heads of {head_size} {queries} queries {num_points}"
    name += " without border" * (not border)
    yield from rows.compile_cases(_call(args), name)
