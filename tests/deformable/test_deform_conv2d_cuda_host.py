"""The CUDA kernels of deform_conv2d's backward, run on the CPU by the shim of csrc/testing: what gradients of the
columns mean for input, offset and mask, against autograd in float64; orders of warps; sanitizers."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import _cuda_host as host
import pytest
import torch
from _deform_conv2d_cases import CASES, case, offsets_on_integers
from torch import Tensor

from accel.ops.deformable.deform_conv2d import OP, Args
from accel.ops.deformable.sampling import bilinear
from accel.testing import Case, assert_close, assert_same

SOURCE = host.ROOT / "csrc" / "cuda" / "deformable" / "deform_conv2d.cu"
P1 = {"padding": 1}


class Params(ctypes.Structure):
    """csrc/cuda/deformable/deform_conv2d.h"""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("columns", "input", "offset", "mask")],
        *[(name, ctypes.c_void_p) for name in ("grad_input", "grad_offset", "grad_mask", "scratch")],
        ("scratch_bytes", ctypes.c_int64),
        *[(name, ctypes.c_int32) for name in ("batch", "height", "width", "channels", "out_height", "out_width")],
        *[(name, ctypes.c_int32) for name in ("groups", "dtype", "sample", "border_gradient")],
        *[(name, ctypes.c_int32 * 2) for name in ("kernel", "stride", "padding", "dilation")],
    ]


class Grads(NamedTuple):
    input: Tensor  # (N, H, W, C)
    offset: Tensor
    mask: Tensor
    columns: Tensor  # as they are left


class Call(NamedTuple):
    args: Args
    image: Tensor  # (N, H, W, C)
    grad_col: Tensor  # (N, Ho·Wo, K, C)


@functools.lru_cache(maxsize=4)
def prepared(of: Case, dtype: torch.dtype) -> Call:
    tensors, kwargs = of.make(dtype, "cpu", 3)
    args = OP.prepare(**tensors, **kwargs)
    args = args._replace(offset=args.offset.float(), mask=None if args.mask is None else args.mask.float())
    n, c = args.input.shape[:2]
    ho, wo = args.offset.shape[2:]
    taps = args.weight.shape[2] * args.weight.shape[3]
    grad_col = torch.randn((n, ho * wo, taps, c), generator=torch.Generator().manual_seed(4))
    if of.family == "exact":
        grad_col = (grad_col * 1.2).round().clamp(-2, 2)
    return Call(args, args.input.permute(0, 2, 3, 1).contiguous(), grad_col.to(dtype))


def columns(image: Tensor, offset: Tensor, mask: Tensor | None, args: Args) -> Tensor:
    """The sampled values times the mask, ``(N, Ho·Wo, K, C)``, by the definition of a sample."""
    n, h, w, c = image.shape
    kh, kw = args.weight.shape[2:]
    taps, (ho, wo) = kh * kw, offset.shape[2:]
    groups = offset.shape[1] // (2 * taps)
    tap = torch.arange(taps)
    rows = torch.arange(ho) * args.stride[0] - args.padding[0] + (tap // kw * args.dilation[0])[:, None]
    across = torch.arange(wo) * args.stride[1] - args.padding[1] + (tap % kw * args.dilation[1])[:, None]
    shift = offset.reshape(n * groups, taps, 2, ho, wo)
    flat = image.permute(0, 3, 1, 2).reshape(n * groups, c // groups, h * w)
    y, x = rows[:, :, None] + shift[:, :, 0], across[:, None, :] + shift[:, :, 1]
    if not args.border_gradient:
        y, x = (torch.where((y == -1) | (x == -1), at.detach(), at) for at in (y, x))
    samples = bilinear(flat, y, x, h, w)
    if mask is not None:
        samples = samples * mask.reshape(n * groups, 1, taps, ho, wo)
    return samples.reshape(n, c, taps, ho * wo).permute(0, 3, 2, 1)


def backward(call: Call, mode: str = "plain", needs: str = "iomc", images: int | None = None, **options: Any) -> Grads:
    """``needs``: first letters of the gradients, and c for the samples in place of ``columns``."""
    args = call.args
    n, h, w, c = call.image.shape
    kernel, (ho, wo) = tuple(args.weight.shape[2:]), args.offset.shape[2:]
    groups = args.offset.shape[1] // (2 * kernel[0] * kernel[1])
    samples = ho * wo * kernel[0] * kernel[1]
    scratch = host.scratch(n if images is None else images, groups, samples, h * w, mode)
    params = Params(
        batch=n, height=h, width=w, channels=c, out_height=ho, out_width=wo, groups=groups,
        dtype=host.DTYPES.index(call.image.dtype), kernel=kernel, stride=tuple(args.stride),
        padding=tuple(args.padding), dilation=tuple(args.dilation), scratch_bytes=scratch.numel(), sample="c" in needs,
        border_gradient=args.border_gradient,
    )  # fmt: skip
    tensors = {"columns": call.grad_col, "input": call.image, "offset": args.offset, "scratch": scratch}
    wanted = {"input": call.image, "offset": args.offset}
    if args.mask is not None:
        tensors["mask"] = wanted["mask"] = args.mask
    for name, like in wanted.items():
        if name[0] in needs:
            tensors[f"grad_{name}"] = torch.full_like(like, float("nan"))
    ran = host.run(host.program(SOURCE, mode), "accel_deform_conv2d_backward", params, tensors, **options)
    assert ran.code == 0, ran.report
    grads = (ran.buffers.get(f"grad_{name}", torch.empty(0)) for name in Grads._fields[:-1])
    return Grads(*grads, ran.buffers["columns"])


def check(of: Case, dtype: torch.dtype, mode: str = "plain", **options: Any) -> None:
    call = prepared(of, dtype)
    given = {"input": call.image, "offset": call.args.offset, "mask": call.args.mask}
    leaves = {n: x.double().requires_grad_() for n, x in given.items() if x is not None}
    out = columns(leaves["input"], leaves["offset"], leaves.get("mask"), call.args)
    grads = torch.autograd.grad(out, list(leaves.values()), call.grad_col.double())
    got = backward(call, mode, **options)
    # a sample's sum in fp32, rounded once
    assert_close(got.columns, out.detach(), of.family if of.family == "exact" else "sample", dtype, "columns")
    for name, e in zip(leaves, grads, strict=True):
        # a sum of products of rounded inputs in fp32; only grad_input is rounded to the dtype of input
        family = of.family if of.family == "exact" else "sample"
        assert_close(getattr(got, name), e, family, dtype if name == "input" else torch.float32, f"gradient of {name}")


KERNEL_CASES = [
    case("16_channels", (16, 4), (5, 6), **P1),
    case("264_channels", (264, 4), (3, 4), batch=1, **P1),
    case("4_groups_of_33", (132, 4), (3, 4), offset_groups=4, batch=1, **P1),
    case("gathered", (16, 4), (1, 2), (7, 7), padding=6, batch=1, reach=0.3),
    case("no_border", (16, 4), (4, 5), change=offsets_on_integers, border_gradient=False, **P1),
]


@pytest.mark.parametrize("dtype", host.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("of", [*CASES, *KERNEL_CASES], ids=str)
def test_values(of: Case, dtype: torch.dtype) -> None:
    if dtype not in of.dtypes:
        pytest.skip("this case is not exact in that dtype")
    check(of, dtype)


@pytest.mark.parametrize("of", KERNEL_CASES, ids=str)
def test_every_order_of_warps_gives_the_same_bits(of: Case) -> None:
    call = prepared(of, torch.bfloat16)
    first = backward(call)
    for seed in range(1, 4):
        for a, e in zip(backward(call, seed=seed), first, strict=True):
            assert_same(a, e, f"{seed=}")


@pytest.mark.parametrize(
    "of",
    [
        *KERNEL_CASES,
        case("prime", (7, 4), (5, 7), stride=2, **P1),
        case("no_mask", (8, 4), (5, 6), offset_groups=2, mask=False, **P1),
    ],
    ids=str,
)
def test_address_and_undefined_behaviour(of: Case) -> None:
    check(of, torch.bfloat16, "asan", seed=1)


def test_races() -> None:
    check(case("tiny", (16, 4), (2, 3), offset_groups=2, batch=1, **P1), torch.float32, "tsan", seed=1)


@pytest.mark.parametrize("needs", ["i", "o", "m", "om", "c", "ic", ""])
def test_only_what_is_wanted_is_computed(needs: str) -> None:
    call = prepared(case("small", (8, 4), (5, 6), **P1), torch.float32)
    full = backward(call)
    for name, a, e in zip(Grads._fields, backward(call, needs=needs), full, strict=True):
        if name[0] in needs:
            assert_same(a, e, name)
        elif name == "columns":
            assert_same(a, call.grad_col, name)
        else:
            assert a.numel() == 0


def test_little_scratch_memory_gives_the_same_bits() -> None:
    call = prepared(case("batch_5", (8, 4), (4, 5), batch=5, **P1), torch.float32)
    full = backward(call, needs="i")
    for images in (1, 2):
        assert_same(backward(call, needs="i", images=images).input, full.input, f"{images=}")
