"""Deformable attention of DCNv3 and DCNv4: a depthwise sum of samples whose positions and weights are predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library
from accel.backends import KERNEL_DTYPES, check_beside, check_floating, inner_dtype, pair
from accel.ops.deformable import sampling


class Args(NamedTuple):
    """The checked arguments every backend receives. Taps run along the width outside and the height inside."""

    input: Tensor  # (N, H, W, C) contiguous
    offset: Tensor  # (N, Ho, Wo, G, K, 2) contiguous fp32 (fp64 beside fp64), x before y
    mask: Tensor  # (N, Ho, Wo, G, K) contiguous fp32 (fp64 beside fp64)
    kernel_size: list[int]  # (y, x), as the next three
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    offset_scale: float
    remove_center: bool  # K = kh·kw − 1: the middle tap is left out
    softmax: bool  # the mask is softmaxed over K


# --- the definition ---


def _axis(out: int, tap: Tensor, kernel: int, stride: int, padding: int, dilation: int, scale: float) -> Tensor:
    """Where each tap of each output stands on one axis before it is shifted, ``(out, K)``."""
    middle = (dilation * (kernel - 1)) // 2
    base = torch.arange(out, device=tap.device, dtype=tap.dtype) * stride - padding + middle
    return base[:, None] + (tap * dilation - middle) * scale


def reference(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
) -> Tensor:
    """The op in plain torch, fp32 or fp64 inside."""
    inner = inner_dtype(input)
    n, h, w, c = input.shape
    _, ho, wo, groups, taps, _ = offset.shape
    tap = torch.arange(taps, device=input.device)
    if remove_center:
        tap = tap + (tap >= taps // 2)
    kh, kw = kernel_size
    rows = _axis(ho, (tap % kh).to(inner), kh, stride[0], padding[0], dilation[0], offset_scale)[:, None, None, :]
    columns = _axis(wo, (tap // kh).to(inner), kw, stride[1], padding[1], dilation[1], offset_scale)[:, None, :]
    y, x = rows + offset[..., 1] * offset_scale, columns + offset[..., 0] * offset_scale  # (N, Ho, Wo, G, K)
    y, x, weights = (
        t.permute(0, 3, 1, 2, 4).reshape(n * groups, ho * wo, taps)
        for t in (y, x, torch.softmax(mask, -1) if softmax else mask)
    )
    image = input.to(inner).reshape(n, h * w, groups, c // groups).permute(0, 2, 3, 1)
    samples = sampling.bilinear(image.reshape(n * groups, c // groups, h * w), y, x, h, w)  # (N·G, C/G, Ho·Wo, K)
    out = (samples * weights.unsqueeze(1)).sum(-1)
    return out.reshape(n, c, ho, wo).permute(0, 2, 3, 1).to(input.dtype).contiguous()


# --- backends, fastest first for each device ---


def _why_not_cuda(args: Args) -> str | None:
    batch, height, width, channels = args.input.shape
    _, rows, columns, groups, taps = args.mask.shape
    sizes = {"batch": batch, "pixels": height * width, "heads": groups, "channels": channels // groups}
    reason = sampling.why_not_cuda(args, sizes, rows * columns, taps)
    line = max(height + 2 * args.padding[0], width + 2 * args.padding[1])
    if reason is None and line >= 2**30:
        return f"it takes padded lines of fewer than 2^30 pixels, not {line}"
    return reason


_native = backends.native("deform_attention2d")
_triton = backends.triton(__name__)


# --- declaration ---


def _fake(args: Args) -> Tensor:
    return args.input.new_empty((*args.offset.shape[:3], args.input.shape[3]))


def _flops(args: Args) -> int:
    """FLOPs of the weighted sum of four pixels for every tap and channel."""
    n, ho, wo, _, taps = args.mask.shape
    return 2 * 4 * n * ho * wo * taps * args.input.shape[3]


def _backward_flops(args: Args, made: Sequence[bool]) -> int:
    return (int(made[0]) + int(made[1] or made[2])) * _flops(args)


# --- the public function ---


def _prepare(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    check_floating(input, "input")
    check_beside(offset, "offset", input, "input")
    check_beside(mask, "mask", input, "input")
    if input.dim() != 4 or input.shape[1] == 0 or input.shape[2] == 0 or input.shape[3] == 0:
        raise ValueError(f"input must be (N, H, W, C) with at least one pixel and channel, got {tuple(input.shape)=}")
    kernel = pair(kernel_size, "kernel_size", 1)
    strides = pair(stride, "stride", 1)
    paddings = pair(padding, "padding", 0)
    dilations = pair(dilation, "dilation", 1)
    if not -math.inf < offset_scale < math.inf:
        raise ValueError(f"offset_scale must be finite, got {offset_scale=}")
    taps = kernel[0] * kernel[1]
    if remove_center:
        if kernel[0] % 2 == 0 or kernel[1] % 2 == 0 or taps == 1:
            raise ValueError(f"remove_center needs an odd kernel of more than one tap, got {kernel_size=}")
        taps -= 1
    ho, wo = sampling.output_size(input.shape[1:3], kernel, strides, paddings, dilations)
    n, _, _, channels = input.shape

    def shown() -> str:  # only where something is wrong: torch.compile cannot print sizes that vary
        return f"for {tuple(input.shape)=}, {kernel_size=}, {stride=}, {padding=}, {dilation=}, {remove_center=}"

    if offset.dim() != 6 or (*offset.shape[:3], *offset.shape[4:]) != (n, ho, wo, taps, 2):
        raise ValueError(f"offset must be ({n}, {ho}, {wo}, G, {taps}, 2) {shown()}, got {tuple(offset.shape)=}")
    groups = offset.shape[3]
    if groups == 0 or channels % groups:
        raise ValueError(
            f"the groups of offset must divide {channels} channels, got G = {groups} in {tuple(offset.shape)=}"
        )
    if tuple(mask.shape) != (n, ho, wo, groups, taps):
        raise ValueError(f"mask must be ({n}, {ho}, {wo}, {groups}, {taps}) {shown()}, got {tuple(mask.shape)=}")

    input = library.autocast(input)
    inner = inner_dtype(input)
    return Args(
        input=input.contiguous(),
        offset=offset.to(inner).contiguous(),
        mask=mask.to(inner).contiguous(),
        kernel_size=kernel,
        stride=strides,
        padding=paddings,
        dilation=dilations,
        offset_scale=float(offset_scale),
        remove_center=bool(remove_center),
        softmax=bool(softmax),
    )


_run = library.differentiable(
    "deform_attention2d", Args, reference, gradients=3, fake=_fake, flops=_flops, backward_flops=_backward_flops
)


def deform_attention2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""The core of DCNv3 and DCNv4: each output channel sums samples of its own input channel.

    With tap k = (e, a), stride s, padding p, dilation d and the middle of the window :math:`h = ⌊d (kh − 1) / 2⌋`
    (likewise in x), output (i, j) of a channel in group g is

    .. math:: o(i, j) = \sum_k m_{g k}(i, j)\; x(y_k, x_k), \qquad
              y_k = i s - p + h + (a d - h + \Delta y_{g k}(i, j))\, \sigma

    where ``x`` between pixels is the bilinear mean of the four around, each pixel outside of the map counts 0 and
    σ is ``offset_scale``. The window is spread from its middle. There is no division by the sum of the weights.

    Taps run along the width outside and the height inside, as in DCNv3: tap k stands at column k // kh and row k % kh
    of the kernel, counted before ``remove_center`` takes the middle one out.

    A position that is NaN, infinite or beyond the border gives a sample of 0, and no gradient to offset, mask or
    input. At integer positions, where a sample has two derivatives, the one from the right is taken. Positions are
    computed and sums made in float32 (float64 beside float64).

    DCNv4 packs offsets and mask into one tensor ``(N, Ho, Wo, ⌈3·G·K / 8⌉·8)``: for each group 2·K offsets, then K
    weights, and zeros to fill up. It is taken apart by

    .. code-block:: python

        packed = offset_mask[..., : 3 * G * K].unflatten(-1, (G, 3 * K))
        offset, mask = packed[..., : 2 * K].unflatten(-1, (K, 2)), packed[..., 2 * K :]

    DCNv3 gives ``(N, Ho, Wo, G·K·2)`` and ``(N, Ho, Wo, G·K)``, which need only ``unflatten``.

    Args:
        input: ``(N, H, W, C)``; float32, bfloat16, float16, and float64 on the reference. Under autocast it is cast
            as a matrix product's operand would be. N may be 0.
        offset: ``(N, Ho, Wo, G, K, 2)``, the shift of each tap in x, then y, in units of ``offset_scale`` pixels; G
            divides C, K = kh·kw, less one with ``remove_center``. Any floating dtype; never cast by autocast.
        mask: ``(N, Ho, Wo, G, K)``, the factor of each sample, any floating dtype.
        kernel_size: one integer or two (y, x), at least 1.
        stride: likewise.
        padding: likewise, at least 0.
        dilation: likewise, at least 1.
        offset_scale: finite factor of a tap's distance from the middle of its window.
        remove_center: leave out the middle tap; both sides of the kernel must be odd.
        softmax: softmax ``mask`` over K first, in float32; DCNv3 does, DCNv4 does not.
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(N, Ho, Wo, C)`` in the dtype of ``input``, contiguous, with Ho = ⌊(H + 2p − d·(kh−1) − 1) / s⌋ + 1.

    Gradients exist for the three tensors. A kernel's are the same bits every time: what reaches a pixel is summed in a
    fixed order, without atomics. Second and forward-mode derivatives are the reference's; a kernel refuses them.

    Raises:
        TypeError: a tensor that must be floating is not.
        ValueError: shapes, sizes or devices that do not fit; the message holds them.
        NotImplementedError: ``backend`` cannot run this call; the message says why.

    Follows Wang et al., InternImage (2022), and Xiong et al., Efficient Deformable ConvNets (2024).
    """
    args = _prepare(
        input,
        offset,
        mask,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        offset_scale=offset_scale,
        remove_center=remove_center,
        softmax=softmax,
    )
    return _run(args, backend)


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    input = torch.zeros(1, 6, 6, 16, device=device, dtype=dtype)
    offset, mask = torch.zeros(1, 6, 6, 2, 9, 2, device=device), torch.ones(1, 6, 6, 2, 9, device=device)
    return (input, offset, mask), {"kernel_size": 3, "padding": 1}


OP = dispatch.register(
    dispatch.Op(
        name="deform_attention2d",
        function=deform_attention2d,
        prepare=_prepare,
        example=_example,
        backends=(
            dispatch.Backend("cpu", backends.why_not_cpu, *_native, frozenset({"cpu"}), KERNEL_DTYPES),
            # the faster of these two on an H200; a library without it, built where nvcc is not, lacks nothing
            dispatch.Backend("cuda", _why_not_cuda, *_native, frozenset({"cuda"}), KERNEL_DTYPES, extra=True),
            dispatch.Backend("triton", *_triton, frozenset({"cuda"}), KERNEL_DTYPES),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
    )
)
