"""Deformable convolution in Triton: an implicit matrix product, the samples are made tile by tile where it needs them.

No column buffer exists in either direction. The forward is one kernel (``conv_forward.py``), the backward has one for
each sum (``conv_backward.py``): every sum has one owner and a fixed order. Here are their launches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from accel.backends import why_not_gpu
from accel.kernels import _launch
from accel.kernels._launch import Launch, launch
from accel.kernels.deformable import conv_backward as backwards
from accel.kernels.deformable import conv_forward as forwards
from accel.kernels.deformable import conv_tiles as cut
from accel.kernels.deformable import sampling
from accel.kernels.deformable.conv_taps import Config, Inputs
from accel.kernels.deformable.layout import channels_last, transpose_launch
from accel.ops.deformable.deform_conv2d import Args, memory_format

PARTS_BYTES = 32 << 20
"""What parts of the weight's gradient may take together, where they are more than one."""
WEIGHT_PROGRAMS = 528
"""Programs of the weight's gradient: four for each of an H100's 132 processors."""


# --- launches ---


def _shape(args: Args, capability: tuple[int, int]) -> cut.Shape:
    out_channels, per_group, _, _ = args.weight.shape
    channels = args.input.shape[1]
    return cut.Shape(
        segment=math.gcd(channels // _offset_groups(args), per_group),
        o_per_group=out_channels // (channels // per_group),
        itemsize=args.input.element_size(),
        capability=capability,
    )


def _offset_groups(args: Args) -> int:
    return args.offset.shape[1] // (2 * args.weight.shape[2] * args.weight.shape[3])


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtypes are judged by the op. ``torch.compile`` traces through this."""
    reason = why_not_gpu(args.input, _launch.INTERPRETING)
    if reason is not None:
        return reason
    n, channels, height, width = args.input.shape
    taps = args.weight.shape[2] * args.weight.shape[3]
    outputs = args.offset.shape[2] * args.offset.shape[3]
    reach = [
        args.stride[i] * args.offset.shape[2 + i] + args.padding[i] + args.dilation[i] * args.weight.shape[2 + i]
        for i in range(2)
    ]
    if max(reach) >= 2**31:
        return f"{args.stride=}, {args.padding=} and {args.dilation=} reach further than 32 bits can count"
    if max(height * width * channels, outputs * args.weight.shape[0]) >= 2**31:
        return f"images of {tuple(args.input.shape[1:])} or of its result are more than 32 bits can address"
    if taps * ((height + 1) * (width + 1) + 1) >= 2**31 or taps * outputs >= 2**31:
        return f"{taps} taps of {height} x {width} pixels are more than 32-bit keys can number"
    out_channels, per_group = args.weight.shape[:2]
    offset_groups = _offset_groups(args)
    groups = channels // per_group
    # at most: sizes that torch.compile lets vary have no greatest common divisor
    segments = max(groups, offset_groups) if groups == 1 or offset_groups == 1 else channels
    channel_blocks = segments + channels // 16
    out_blocks = groups * -(-out_channels // groups // 16)
    tiles = n * -(-max(outputs, height * width) // 16)
    if tiles * max(channel_blocks, out_blocks, taps * offset_groups) >= 2**30:
        return f"{tuple(args.input.shape)=} and {tuple(args.offset.shape)=} are more than one launch can number"
    return None


def _pack(weight: Tensor) -> Tensor:
    """``(K, C/g, O)``: a tap's tile has output channels side by side."""
    return weight.permute(2, 3, 1, 0).contiguous()


def _shared(args: Args, input: Tensor, weight: Tensor, capability: tuple[int, int]) -> dict[str, Any]:
    """The arguments that kernels of a call have in common but for ``CONFIG``, and what tiles are chosen by."""
    return {
        "shape": _shape(args, capability),
        "inputs": Inputs(input, args.offset, args.mask, weight),
        "input_ptr": input,
        "offset_ptr": args.offset,
        "mask_ptr": args.mask,
        "weight_ptr": weight,
        "bias_ptr": args.bias,
        "height": args.input.shape[2],
        "width": args.input.shape[3],
        "out_height": args.offset.shape[2],
        "out_width": args.offset.shape[3],
        "stride_y": args.stride[0],
        "stride_x": args.stride[1],
        "padding_y": args.padding[0],
        "padding_x": args.padding[1],
        "dilation_y": args.dilation[0],
        "dilation_x": args.dilation[1],
        "KH": args.weight.shape[2],
        "KW": args.weight.shape[3],
        "LAST": memory_format(args.input) == torch.channels_last,
        "BORDER": args.border_gradient,
    }


def _config(args: Args, segment: int, tile: cut.Tile, height: int, width: int) -> tuple[Config, int]:
    """What is compiled in, and how many tiles an image of outputs (or pixels) has."""
    tile_h, tile_w = sampling.output_block(height, width, tile.outputs)
    out_channels, per_group, kh, kw = args.weight.shape
    config = Config(
        channels=args.input.shape[1],
        out_channels=out_channels,
        groups=args.input.shape[1] // per_group,
        offset_groups=_offset_groups(args),
        segment=segment,
        kh=kh,
        kw=kw,
        tile_h=tile_h,
        tile_w=tile_w,
        block_c=tile.c,
        block_o=tile.o,
        dot=_launch.dot_dtype(args.input.dtype),
    )
    return config, triton.cdiv(height, tile_h) * triton.cdiv(width, tile_w)


def _result(args: Args) -> Tensor:
    size = (args.input.shape[0], args.weight.shape[0], *args.offset.shape[2:])
    return torch.empty(
        size,
        dtype=_launch.store_dtype(args.input.dtype),
        device=args.input.device,
        memory_format=memory_format(args.input),
    )


def _forward_launch(out: Tensor, args: Args, shared: dict[str, Any]) -> Launch:
    shape = shared["shape"]
    tile = cut.forward_tile(shape)
    config, tiles = _config(args, shape.segment, tile, *args.offset.shape[2:])
    programs = args.input.shape[0] * tiles * config.groups * config.o_blocks
    return launch(forwards.forward_kernel, programs, *tile.how, out_ptr=out, **shared, CONFIG=config)


def forward(*args: Any) -> Tensor:
    """The output; arguments are the fields of ``accel.ops.deformable.deform_conv2d.Args``."""
    given = Args(*args)
    with _launch.device_of(given.input):
        out = _result(given)
        shared = _shared(given, channels_last(given.input), _pack(given.weight), _launch.capability(given.input))
        _forward_launch(out, given, shared).run()
    return out.to(given.input.dtype)


def _shifts_launch(
    grad_offset: Tensor | None, grad_mask: Tensor | None, grad_out: Tensor, args: Args, shared: dict[str, Any]
) -> Launch:
    tile = cut.shifts_tile(shared["shape"])
    config, tiles = _config(args, shared["shape"].segment, tile, *args.offset.shape[2:])
    programs = args.input.shape[0] * tiles * config.offset_groups * config.taps
    pointers = {"grad_offset_ptr": grad_offset, "grad_mask_ptr": grad_mask, "grad_out_ptr": grad_out}
    return launch(backwards.shifts_kernel, programs, *tile.how, **pointers, **shared, CONFIG=config)


def _weight_launch(grad_out: Tensor, args: Args, shared: dict[str, Any]) -> tuple[Launch, Tensor]:
    """The launch and the parts ``(parts, K, O, C/g)`` it fills; only shapes decide how many, and with it the order of
    the sum."""
    shape = shared["shape"]
    tile = cut.weight_tile(shape)
    config, tiles = _config(args, shape.segment, tile, *args.offset.shape[2:])
    tiles *= args.input.shape[0]
    blocks = config.o_blocks * config.c_blocks * (config.channels // shape.segment) * config.taps
    parts = min(triton.cdiv(WEIGHT_PROGRAMS, blocks), max(1, PARTS_BYTES // (4 * args.weight.numel())))
    per_part = max(4, triton.cdiv(tiles, parts))  # fewer, and a part costs as many bytes as what it sums
    parts = triton.cdiv(tiles, per_part)
    out_channels, per_group = args.weight.shape[:2]
    filled = args.offset.new_empty((parts, config.taps, out_channels, per_group))
    pointers = {"parts_ptr": filled, "grad_out_ptr": grad_out, "tiles": tiles, "tiles_per_part": per_part}
    return launch(backwards.weight_kernel, parts * blocks, *tile.how, **shared, **pointers, CONFIG=config), filled


def _sample_launches(
    keys: Tensor, order: Tensor, row: Tensor, record: Tensor, unit0: int, shared: dict[str, Any]
) -> tuple[Launch, Launch]:
    """What writes the keys of samples, and what writes their records once they are sorted."""
    pointers = {"keys_ptr": keys, "order_ptr": order, "row_ptr": row, "record_ptr": record}
    given = {**shared, **pointers, "unit0": unit0, "samples": keys.numel(), "BLOCK": 256}
    return (
        launch(backwards.sample_keys_kernel, keys.shape[0] * triton.cdiv(keys.shape[1], 256), 4, **given),
        launch(backwards.sample_records_kernel, triton.cdiv(keys.numel(), 256), 4, **given),
    )


def _input_launch(
    grad_input: Tensor, grad_out: Tensor, row: Tensor, record: Tensor, starts: Tensor, units: tuple[int, int],
    args: Args, shared: dict[str, Any],
) -> Launch:  # fmt: skip
    shape = shared["shape"]
    tile = cut.input_tile(shape)
    config, tiles = _config(args, shape.segment, tile, *args.input.shape[2:])
    programs = units[1] * tiles * (config.c_shared // shape.segment) * config.c_blocks
    pointers = {"grad_input_ptr": grad_input, "grad_out_ptr": grad_out, "row_ptr": row, "record_ptr": record}
    given = {**shared, **pointers, "starts_ptr": starts, "unit0": units[0], "CONFIG": config}
    return launch(backwards.input_kernel, programs, *tile.how, **given)


def _grad_input(grad_out: Tensor, args: Args, shared: dict[str, Any]) -> Tensor:
    grad_input = torch.empty_like(args.input, dtype=_launch.store_dtype(args.input.dtype))
    cells = (args.input.shape[2] + 1) * (args.input.shape[3] + 1)
    outputs = args.offset.shape[2] * args.offset.shape[3]
    taps = shared["KH"] * shared["KW"]
    for first, count in sampling.chunks(args.input.shape[0] * _offset_groups(args), taps * outputs, taps * cells):
        keys, row = (args.offset.new_empty((count * taps, outputs), dtype=torch.int32) for _ in range(2))
        record, order = args.offset.new_empty((count * taps, outputs, 4)), args.offset.new_empty(0, dtype=torch.int64)
        _sample_launches(keys, order, row, record, first, shared)[0].run()
        order, starts = sampling.sort_samples(keys, count * taps, cells)
        _sample_launches(keys, order, row, record, first, shared)[1].run()
        _input_launch(grad_input, grad_out, row, record, starts, (first, count), args, shared).run()
    return grad_input.to(args.input.dtype)


def backward(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of input, offset, weight, bias and mask, those of offset, bias and mask in fp32; an empty tensor for
    one that is not needed."""
    given = Args(*args[:-1])
    need_input, need_offset, need_weight, need_bias, need_mask = args[-1]
    grad_input, grad_offset, grad_weight, grad_bias, grad_mask = (given.offset.new_empty(0) for _ in range(5))
    with _launch.device_of(given.input):
        upstream = channels_last(grad_out)
        shared = _shared(given, channels_last(given.input), _pack(given.weight), _launch.capability(given.input))
        need_mask = need_mask and given.mask is not None
        if need_offset:
            grad_offset = torch.empty_like(given.offset)
        if need_mask and given.mask is not None:
            grad_mask = torch.empty_like(given.mask)
        if need_offset or need_mask:
            pointers = (grad_offset if need_offset else None, grad_mask if need_mask else None)
            _shifts_launch(*pointers, upstream, given, shared).run()
        if need_input:
            grad_input = _grad_input(upstream, given, shared)
        if need_weight:
            step, parts = _weight_launch(upstream, given, shared)
            step.run()
            summed = parts.sum(0).view(*given.weight.shape[2:], *given.weight.shape[:2])
            grad_weight = summed.permute(2, 3, 0, 1).to(given.weight.dtype).contiguous()
        if need_bias and given.bias is not None:
            grad_bias = upstream.sum((0, 1, 2), dtype=torch.float32)
    return grad_input, grad_offset, grad_weight, grad_bias, grad_mask


# --- what the compile gate builds ---


def compile_cases() -> Iterator[_launch.CompileCase]:
    """Every tile of the tables, with aligned and odd channels."""
    return _launch.once(case for call in _calls() for case in _cases(*call[:3], **call[3]))


def _calls() -> Iterator[tuple[torch.dtype, int, int, dict[str, Any]]]:
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    yield bf16, 128, 128, {"last": True}
    yield bf16, 256, 256, {"last": True}
    yield bf16, 256, 256, {"last": True, "border": False}
    yield bf16, 256, 256, {}
    yield bf16, 64, 64, {"mask": False, "kernel": 5, "groups": 1, "offset_groups": 2}
    yield bf16, 17, 19, {}
    yield fp16, 128, 128, {"last": True}
    yield fp32, 128, 128, {"last": True}
    yield fp32, 40, 72, {"groups": 2, "offset_groups": 4}


def _cases(
    dtype: torch.dtype,
    channels: int,
    out_channels: int,
    last: bool = False,
    mask: bool = True,
    kernel: int = 3,
    groups: int = 1,
    offset_groups: int = 1,
    border: bool = True,
) -> Iterator[_launch.CompileCase]:
    """The launches of one call, forward and backward, on tensors that have shapes only."""
    n, height, width, taps = 8, 100, 168, kernel**2
    name = f"{str(dtype)[6:]} {channels} to {out_channels} {kernel}x{kernel}"
    name += f" groups {groups}, {offset_groups}" * (groups + offset_groups > 2)
    name += " channels-last" * last + " v1" * (not mask) + " without border" * (not border)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    input = empty(n, channels, height, width, dtype=dtype)
    args = Args(
        input=input.to(memory_format=torch.channels_last) if last else input,
        offset=empty(n, 2 * offset_groups * taps, height, width),
        weight=empty(out_channels, channels // groups, kernel, kernel, dtype=dtype),
        bias=empty(out_channels),
        mask=empty(n, offset_groups * taps, height, width) if mask else None,
        stride=[1, 1],
        padding=[kernel // 2] * 2,
        dilation=[1, 1],
        border_gradient=border,
    )
    out = _result(args)
    integers, long = empty(n * offset_groups * taps, height * width, dtype=torch.int32), empty(1, dtype=torch.int64)

    def of(capability: tuple[int, int]) -> Iterator[_launch.CompileCase]:
        shared = _shared(args, input, args.weight, capability)
        yield _forward_launch(out, args, shared).case(name)
        yield _shifts_launch(args.offset, args.mask, out, args, shared).case(name)
        yield _weight_launch(out, args, shared)[0].case(name)
        for step in _sample_launches(integers, long, integers, args.offset, 0, shared):
            yield step.case(name)
        units = (0, n * offset_groups)
        yield _input_launch(input, out, integers, args.offset, integers, units, args, shared).case(name)
        if not last:
            yield transpose_launch(out, input).case(name)

    yield from _launch.by_generation(of((8, 0)), of((9, 0)))
