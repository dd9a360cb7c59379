"""Deformable attention of DCNv3 and DCNv4 in Triton.

The kernels are those of every op that sums samples channel by channel (``rows.py``), with the positions of a
convolution's window. The forward softmaxes the mask where it reads it. The backward softmaxes it once beforehand, into
a tensor of its size, because three kernels need it.
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
from accel.ops.deformable.deform_attention2d import Args


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtypes are judged by the op. ``torch.compile`` traces through this."""
    reason = why_not_gpu(args.input, _launch.INTERPRETING)
    if reason is not None:
        return reason
    n, height, width, channels = args.input.shape
    groups, taps = args.mask.shape[3:]
    for i in range(2):
        reach = args.stride[i] * args.mask.shape[1 + i] + args.padding[i] + args.dilation[i] * args.kernel_size[i]
        if reach >= 2**31:
            return f"{args.stride=}, {args.padding=} and {args.dilation=} reach further than 32 bits can count"
    samples = args.mask.shape[1] * args.mask.shape[2] * taps
    cells = (height + 1) * (width + 1)
    return rows.too_large(n * groups, samples, cells, height * width, channels // groups)


def _call(args: Args, softmax: bool) -> Call:
    n, height, width, channels = args.input.shape
    _, out_height, out_width, groups, taps = args.mask.shape
    return Call(
        value=args.input.view(n, height * width, groups, channels // groups),
        locations=args.offset.view(n, out_height * out_width, groups, taps, 2),
        weights=args.mask.view(n, out_height * out_width, groups, taps),
        queries=(out_height, out_width),
        map=(height, width),
        cells=(height + 1) * (width + 1),
        levels=Levels(None, None),
        samples_of_query=Samples(taps, kh=args.kernel_size[0], kw=args.kernel_size[1]),
        stride=tuple(args.stride),
        padding=tuple(args.padding),
        dilation=tuple(args.dilation),
        scale=args.offset_scale,
        softmax=softmax,
    )


def forward(*args: Any) -> Tensor:
    """The output; arguments are the fields of ``accel.ops.deformable.deform_attention2d.Args``."""
    given = Args(*args)
    with _launch.device_of(given.input):
        return rows.forward(_call(given, given.softmax)).view(*given.mask.shape[:3], given.input.shape[3])


def backward(grad_out: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, offset and mask, the last two in fp32; an empty tensor for one that is not needed."""
    given = Args(*args[:-1])
    need_input, need_offset, need_mask = args[-1]
    with _launch.device_of(given.input):
        if given.softmax:
            given = given._replace(mask=given.mask.softmax(-1))
        call = _call(given, False)
        offset, weight = rows.grad_points(grad_out, call, need_offset, need_mask)
        offset = offset.view_as(given.offset) if need_offset else offset
        mask = weight.view_as(given.mask) if need_mask else weight
        if need_mask and given.softmax:
            mask = torch._softmax_backward_data(mask, given.mask, -1, torch.float32)
        input = rows.grad_value(grad_out, call).view_as(given.input) if need_input else offset.new_empty(0)
    return input, offset, mask


# --- what the compile gate builds ---


def compile_cases() -> Iterator[_launch.CompileCase]:
    """Every tile of the tables, with aligned and odd head sizes."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    calls = (
        _cases(bf16, 4, 32, 3, softmax=True),
        _cases(bf16, 8, 16, 3, remove_center=True),
        _cases(bf16, 3, 20, 5),
        _cases(fp16, 4, 32, 3),
        _cases(fp32, 4, 32, 3, softmax=True),
    )
    return _launch.once(case for call in calls for case in call)


def _cases(
    dtype: torch.dtype,
    groups: int,
    group_channels: int,
    kernel: int,
    softmax: bool = False,
    remove_center: bool = False,
) -> Iterator[_launch.CompileCase]:
    """The launches of one call, forward and backward, on tensors that have shapes only."""
    n, size, taps = 64, 56, kernel**2 - int(remove_center)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    args = Args(
        input=empty(n, size, size, groups * group_channels, dtype=dtype),
        offset=empty(n, size, size, groups, taps, 2),
        mask=empty(n, size, size, groups, taps),
        kernel_size=[kernel] * 2,
        stride=[1, 1],
        padding=[kernel // 2] * 2,
        dilation=[1, 1],
        offset_scale=1.0,
        remove_center=remove_center,
        softmax=softmax,
    )
    name = f"{str(dtype)[6:]} {groups} groups of {group_channels} {taps} taps" + " softmax" * softmax
    yield from rows.compile_cases(_call(args, softmax), name)
