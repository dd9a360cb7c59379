"""Deformable convolution, v1 and v2: a convolution whose taps are sampled at positions that a tensor shifts."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library
from accel.backends import HALF_DTYPES, KERNEL_DTYPES, check_beside, check_floating, inner_dtype, pair
from accel.ops.deformable import sampling


class Args(NamedTuple):
    """The checked arguments every backend receives. K = kh·kw taps, tap (a, e) is the (a·kw + e)-th."""

    input: Tensor  # (N, C, H, W), contiguous or channels_last
    offset: Tensor  # (N, 2·G·K, Ho, Wo) contiguous fp32 (fp64 beside fp64): y of tap k at 2k of its group, then x
    weight: Tensor  # (O, C/g, kh, kw) contiguous, dtype of input
    bias: Tensor | None  # (O,) fp32 (fp64 beside fp64)
    mask: Tensor | None  # (N, G·K, Ho, Wo) contiguous fp32 (fp64 beside fp64)
    stride: list[int]  # (y, x), as the next two
    padding: list[int]
    dilation: list[int]
    border_gradient: bool  # at exactly −1 the offset has the gradient from the right; else none


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout a result takes from ``x``: channels_last where that is what it has and contiguous is not."""
    last = x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def lay_out(x: Tensor, format: torch.memory_format) -> Tensor:
    """``x.contiguous(memory_format=format)``, which vmap does not know."""
    if format == torch.channels_last:
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return x.contiguous()


# --- the definition ---

COLUMNS_AT_ONCE = 1 << 24
"""Sampled values the reference holds at once, in whole images."""


def _grid(out: int, taps: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """Where each tap of each output stands on one axis before it is shifted, ``(K, out)``."""
    base = torch.arange(out, device=taps.device, dtype=taps.dtype) * stride - padding
    return taps[:, None] * dilation + base


def _images(
    image: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], border_gradient: bool,
) -> Tensor:  # fmt: skip
    n, c, h, w = image.shape
    o, per_group, kh, kw = weight.shape
    ho, wo = offset.shape[2:]
    taps = kh * kw
    offset_groups, groups = offset.shape[1] // (2 * taps), c // per_group
    tap = torch.arange(taps, device=image.device)
    rows = _grid(ho, (tap // kw).to(image.dtype), stride[0], padding[0], dilation[0])[:, :, None]
    columns = _grid(wo, (tap % kw).to(image.dtype), stride[1], padding[1], dilation[1])[:, None, :]
    shift = offset.reshape(n * offset_groups, taps, 2, ho, wo)
    flat = image.reshape(n * offset_groups, c // offset_groups, h * w)
    y, x = rows + shift[:, :, 0], columns + shift[:, :, 1]
    samples = sampling.bilinear(flat, y, x, h, w, 0, border_gradient)  # (N·G, C/G, K, Ho, Wo)
    if mask is not None:
        samples = samples * mask.reshape(n * offset_groups, 1, taps, ho, wo)
    out = weight.reshape(groups, o // groups, -1) @ samples.reshape(n, groups, per_group * taps, ho * wo)
    return out.reshape(n, o, ho * wo)


def reference(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    border_gradient: bool,
) -> Tensor:
    """The op in plain torch, fp32 or fp64 inside."""
    image, kernel = input.to(inner_dtype(input)).contiguous(), weight.to(inner_dtype(input))
    n, taps = input.shape[0], weight.shape[2] * weight.shape[3]

    def part(some: slice) -> Tensor:
        part_mask = None if mask is None else mask[some]
        return _images(image[some], offset[some], kernel, part_mask, stride, padding, dilation, border_gradient)

    if torch.compiler.is_compiling():  # a loop would make constants of the sizes
        out = part(slice(None))
    else:
        step = max(1, COLUMNS_AT_ONCE // (input.shape[1] * taps * offset.shape[2] * offset.shape[3]))
        out = torch.cat([part(slice(at, at + step)) for at in range(0, max(n, 1), step)])
    if bias is not None:
        out = out + bias[:, None]
    out = out.reshape(n, weight.shape[0], *offset.shape[2:])
    return lay_out(out.to(input.dtype), memory_format(input))


# --- backends, fastest first for each device ---


CUDA_CHANNELS = 64  # as csrc/cuda/_product.cuh is deep


@torch.compiler.assume_constant_result  # the environment cannot be traced
def _cublas_repeats() -> bool:
    """Whether torch's deterministic mode lets cuBLAS run."""
    return "CUBLAS_WORKSPACE_CONFIG" in os.environ


def _why_not_cuda(args: Args) -> str | None:
    n, channels, height, width = args.input.shape
    out_channels, per_group, kh, kw = args.weight.shape
    outputs, offset_groups = args.offset.shape[2] * args.offset.shape[3], args.offset.shape[1] // (2 * kh * kw)
    sizes = {"batch": n, "pixels": height * width, "heads": offset_groups, "channels": channels // offset_groups}
    reason = sampling.why_not_cuda(args, sizes, outputs, kh * kw)
    if reason is not None:
        return reason
    if args.input.dtype == torch.float32:
        return "it computes bfloat16 and float16, not torch.float32"
    if per_group % CUDA_CHANNELS or channels // offset_groups % CUDA_CHANNELS:
        return (
            f"it takes input channels in multiples of {CUDA_CHANNELS}, not {per_group} of a weight group and "
            f"{channels // offset_groups} of an offset group"
        )
    if out_channels // (channels // per_group) % 8:
        return f"it takes output channels in multiples of 8, not {out_channels // (channels // per_group)} of a group"
    vectors, shifts = (height + 1) * width * channels // 8, args.offset.shape[1] * outputs
    padded = max(height + 2 * args.padding[0], width + 2 * args.padding[1])
    if max(max(n, 1) * max(vectors, shifts), 16 * kh * kw * outputs, padded) >= 2**31:
        return (
            f"{tuple(args.input.shape)=}, {tuple(args.offset.shape)=} and {args.padding=} are more than it can number"
        )
    if torch.are_deterministic_algorithms_enabled() and not _cublas_repeats():
        return "its backward needs cuBLAS, which torch's deterministic mode refuses without CUBLAS_WORKSPACE_CONFIG"
    return None


_native = backends.native("deform_conv2d")
_triton = backends.triton(__name__)


# --- declaration ---


def _fake(args: Args) -> Tensor:
    shape = (args.input.shape[0], args.weight.shape[0], args.offset.shape[2], args.offset.shape[3])
    format = memory_format(args.input)
    return torch.empty(shape, dtype=args.input.dtype, device=args.input.device, memory_format=format)


def _flops(args: Args) -> int:
    """FLOPs of the product of the weight and the samples."""
    out: int = 2 * args.offset.shape[0] * args.offset.shape[2] * args.offset.shape[3]
    return out * math.prod(args.weight.shape)


def _backward_flops(args: Args, made: Sequence[bool]) -> int:
    return (int(made[0] or made[1] or made[4]) + int(made[2])) * _flops(args)


# --- the public function ---


def _prepare(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
    *,
    border_gradient: bool = True,
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    check_floating(input, "input")
    for name, x in (("offset", offset), ("weight", weight), ("bias", bias), ("mask", mask)):
        if x is not None or name in ("offset", "weight"):
            check_beside(x, name, input, "input")
    if input.dim() != 4 or input.shape[1] == 0 or input.shape[2] == 0 or input.shape[3] == 0:
        raise ValueError(f"input must be (N, C, H, W) with at least one channel and pixel, got {tuple(input.shape)=}")
    if weight.dim() != 4 or weight.numel() == 0:
        raise ValueError(f"weight must be (O, C/groups, kh, kw) and not empty, got {tuple(weight.shape)=}")
    n, channels = input.shape[:2]
    out_channels, per_group, kh, kw = weight.shape
    groups = channels // per_group
    if channels % per_group or out_channels % groups:
        raise ValueError(
            f"weight must be (O, C/groups, kh, kw) with groups that divide {channels} input channels and the output "
            f"channels O, got {tuple(weight.shape)=} for {tuple(input.shape)=}: {channels / per_group:g} groups"
        )
    strides, paddings, dilations = (
        pair(stride, "stride", 1),
        pair(padding, "padding", 0),
        pair(dilation, "dilation", 1),
    )
    ho, wo = sampling.output_size(input.shape[2:], (kh, kw), strides, paddings, dilations)
    taps = kh * kw

    def shown() -> str:  # only where something is wrong: torch.compile cannot print sizes that vary
        return f"for {tuple(input.shape)=}, {tuple(weight.shape)=}, {stride=}, {padding=}, {dilation=}"

    if offset.dim() != 4 or offset.shape[0] != n or offset.shape[2] != ho or offset.shape[3] != wo:
        raise ValueError(f"offset must be ({n}, 2*G*{taps}, {ho}, {wo}) {shown()}, got {tuple(offset.shape)=}")
    offset_groups = offset.shape[1] // (2 * taps)
    if offset_groups == 0 or offset.shape[1] % (2 * taps) or channels % offset_groups:
        raise ValueError(
            f"offset must have 2*G*{taps} channels with a number of offset groups G that divides {channels} input "
            f"channels, got {tuple(offset.shape)=}: {offset.shape[1]} channels are {offset.shape[1] / (2 * taps):g} "
            f"groups for {tuple(weight.shape)=}"
        )
    if mask is not None and tuple(mask.shape) != (n, offset_groups * taps, ho, wo):
        raise ValueError(
            f"mask must be ({n}, {offset_groups * taps}, {ho}, {wo}), one for each of {offset_groups} x {taps} taps, "
            f"{shown()}, got {tuple(mask.shape)=}"
        )
    if bias is not None and tuple(bias.shape) != (out_channels,):
        raise ValueError(f"bias must be ({out_channels},), got {tuple(bias.shape)=}")

    input, weight = library.autocast(input), library.autocast(weight)
    if input.dtype != weight.dtype:
        raise TypeError(f"input and weight must have one dtype, got {input.dtype=}, {weight.dtype=}")
    inner = inner_dtype(input)
    return Args(
        input=lay_out(input, memory_format(input)),
        offset=offset.to(inner).contiguous(),
        weight=weight.contiguous(),
        bias=None if bias is None else bias.to(inner).contiguous(),
        mask=None if mask is None else mask.to(inner).contiguous(),
        stride=strides,
        padding=paddings,
        dilation=dilations,
        border_gradient=bool(border_gradient),
    )


_run = library.differentiable(
    "deform_conv2d",
    Args,
    reference,
    gradients=5,
    fake=_fake,
    flops=_flops,
    backward_flops=_backward_flops,
    lay_out=lambda grad, args: lay_out(grad, memory_format(args.input)),
)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
    *,
    border_gradient: bool = True,
    backend: str | None = None,
) -> Tensor:
    r"""Deformable convolution: v1 without ``mask``, v2 with it. The signature and meaning are torchvision's.

    With tap k = (a, e) of the kernel, output position (i, j), stride s, padding p and dilation d,

    .. math:: y_o(i, j) = b_o + \sum_{c, k} w_{o c k}\; m_k(i, j)\;
              x_c(i s - p + a d + \Delta y_k(i, j),\; j s - p + e d + \Delta x_k(i, j))

    where ``x`` between pixels is the bilinear mean of the four around and each pixel outside of the map counts 0.
    ``padding`` moves the positions only. Channels in G equal groups may have offsets and masks of their own, and
    weights in g equal groups, as in a convolution. G follows from the channels of ``offset``, g from ``weight``.

    A position that is NaN, infinite or beyond the border gives a sample of 0, and no gradient to the offset, the mask
    or the input. At integer positions, where a sample has two derivatives, the gradient of ``offset`` is the one from
    the right. At exactly −1 the sample is 0 and that gradient is not, as in torchvision; ``border_gradient=False``
    leaves it out, as mmcv does. Fresh layers start there: offsets are 0, and taps reach one pixel past the map.

    Positions are computed in float32 and products summed in float32, whatever the dtypes (float64 beside float64).
    Kernels round a sample, times its mask, to the dtype of ``input`` once before it enters the product.

    Args:
        input: ``(N, C, H, W)``, contiguous or channels_last; float32, bfloat16, float16, and float64 on the
            reference. Under autocast it is cast as a convolution's operand would be. N may be 0.
        offset: ``(N, 2·G·K, Ho, Wo)`` with K = kh·kw: of group q and tap k, the shift in y at channel q·2K + 2k and
            in x at the next, in pixels. G divides C. Any floating dtype; never cast by autocast.
        weight: ``(O, C/g, kh, kw)`` in the dtype of ``input`` and cast with it; g divides C and O.
        bias: ``(O,)``, any floating dtype.
        stride: one integer or two (y, x), at least 1.
        padding: likewise, at least 0.
        dilation: likewise, at least 1.
        mask: ``(N, G·K, Ho, Wo)``, the factor of each sample, any floating dtype; all 1 if None.
        border_gradient: whether a position at exactly −1, in y or x, moves its sample. False takes both gradients of
            its ``offset`` for 0.
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(N, O, Ho, Wo)`` in the dtype and memory format of ``input``, with Ho = ⌊(H + 2p − d·(kh−1) − 1) / s⌋ + 1.

    Gradients exist for all five tensors. A kernel's are the same bits every time: what reaches a pixel is summed in a
    fixed order, without atomics; in the backward of ``cuda`` this rests on cuBLAS, which repeats its products on one
    stream. Second and forward-mode derivatives are the reference's; a kernel refuses them.

    Raises:
        TypeError: a tensor that must be floating is not, or ``input`` and ``weight`` differ in dtype.
        ValueError: shapes, sizes or devices that do not fit; the message holds them.
        NotImplementedError: ``backend`` cannot run this call; the message says why.

    Follows Dai et al., Deformable Convolutional Networks (2017), and Zhu et al., Deformable ConvNets v2 (2018).
    """
    args = _prepare(input, offset, weight, bias, stride, padding, dilation, mask, border_gradient=border_gradient)
    return _run(args, backend)


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    input = torch.zeros(1, 8, 6, 6, device=device, dtype=dtype)
    offset, mask = torch.zeros(1, 18, 6, 6, device=device), torch.ones(1, 9, 6, 6, device=device)
    return (input, offset, torch.zeros(8, 8, 3, 3, device=device, dtype=dtype)), {"padding": 1, "mask": mask}


OP = dispatch.register(
    dispatch.Op(
        name="deform_conv2d",
        function=deform_conv2d,
        prepare=_prepare,
        example=_example,
        backends=(
            dispatch.Backend("cpu", backends.why_not_cpu, *_native, frozenset({"cpu"}), KERNEL_DTYPES),
            dispatch.Backend("triton", *_triton, frozenset({"cuda"}), KERNEL_DTYPES),
            # behind until it has been measured; only half precision, only where nvcc was at build time
            dispatch.Backend("cuda", _why_not_cuda, *_native, frozenset({"cuda"}), HALF_DTYPES, extra=True),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
    )
)
