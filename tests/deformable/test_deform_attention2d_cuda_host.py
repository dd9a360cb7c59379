"""The CUDA kernels of deform_attention2d, run on the CPU by the shim of csrc/testing: values against the float64
reference, the same bits in every order of warps, memory and races under sanitizers."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import _cuda_host as host
import pytest
import torch
from _deform_attention2d_cases import CASES, case, some_not_finite
from torch import Tensor

from accel.ops.deformable.deform_attention2d import OP, Args, reference
from accel.testing import Case, assert_close, assert_same

SOURCE = host.ROOT / "csrc" / "cuda" / "deformable" / "deform_attention2d.cu"
P1 = {"padding": 1}


class Params(ctypes.Structure):
    """csrc/cuda/deformable/deform_attention2d.h"""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("input", "offset", "mask", "out")],
        *[(name, ctypes.c_void_p) for name in ("grad_out", "grad_input", "grad_offset", "grad_mask", "scratch")],
        ("scratch_bytes", ctypes.c_int64),
        *[(name, ctypes.c_int32) for name in ("batch", "height", "width", "channels", "out_height", "out_width")],
        *[(name, ctypes.c_int32) for name in ("groups", "taps", "dtype")],
        *[(name, ctypes.c_int32 * 2) for name in ("kernel", "stride", "padding", "dilation")],
        *[(name, ctypes.c_int32) for name in ("remove_center", "softmax")],
        ("offset_scale", ctypes.c_float),
    ]


class Grads(NamedTuple):
    input: Tensor
    offset: Tensor
    mask: Tensor


def params_of(args: Args) -> Params:
    n, h, w, c = args.input.shape
    _, ho, wo, groups, taps = args.mask.shape
    return Params(
        batch=n, height=h, width=w, channels=c, out_height=ho, out_width=wo, groups=groups, taps=taps,
        dtype=host.DTYPES.index(args.input.dtype), kernel=tuple(args.kernel_size), stride=tuple(args.stride),
        padding=tuple(args.padding), dilation=tuple(args.dilation), remove_center=args.remove_center,
        softmax=args.softmax, offset_scale=args.offset_scale,
    )  # fmt: skip


def inputs_of(args: Args) -> dict[str, Tensor]:
    return {"input": args.input, "offset": args.offset, "mask": args.mask}


def forward(args: Args, mode: str = "plain", **options: Any) -> Tensor:
    out = torch.full((*args.offset.shape[:3], args.input.shape[3]), float("nan"), dtype=args.input.dtype)
    tensors = {**inputs_of(args), "out": out}
    ran = host.run(host.program(SOURCE, mode), "accel_deform_attention2d_forward", params_of(args), tensors, **options)
    assert ran.code == 0, ran.report
    return ran.buffers["out"]


def backward(args: Args, grad_out: Tensor, mode: str = "plain", needs: str = "iom", **options: Any) -> Grads:
    params = params_of(args)
    n, h, w, _ = args.input.shape
    _, ho, wo, groups, taps = args.mask.shape
    scratch = host.scratch(n, groups, ho * wo * taps, h * w, mode)
    params.scratch_bytes = scratch.numel()
    tensors = {**inputs_of(args), "grad_out": grad_out, "scratch": scratch}
    for name in Grads._fields:
        if name[0] in needs:
            tensors[f"grad_{name}"] = torch.full_like(getattr(args, name), float("nan"))
    ran = host.run(host.program(SOURCE, mode), "accel_deform_attention2d_backward", params, tensors, **options)
    assert ran.code == 0, ran.report
    return Grads(*(ran.buffers.get(f"grad_{name}", torch.empty(0)) for name in Grads._fields))


@functools.lru_cache(maxsize=4)
def prepared(of: Case, dtype: torch.dtype) -> tuple[Args, Tensor]:
    tensors, kwargs = of.make(dtype, "cpu", 3)
    args = OP.prepare(**tensors, **kwargs)
    args = args._replace(offset=args.offset.float(), mask=args.mask.float())
    generator = torch.Generator().manual_seed(4)
    grad_out = torch.randn((*args.offset.shape[:3], args.input.shape[3]), generator=generator)
    if of.family == "exact":
        grad_out = (grad_out * 1.2).round().clamp(-2, 2)
    return args, grad_out.to(dtype)


def check(of: Case, dtype: torch.dtype, mode: str = "plain", **options: Any) -> None:
    args, grad_out = prepared(of, dtype)
    leaves = [x.double().requires_grad_() for x in args[:3]]
    out = reference(*leaves, *args[3:])
    grads = torch.autograd.grad(out, leaves, grad_out.double())
    assert_close(forward(args, mode, **options), out.detach(), of.family, dtype, "output")
    got = backward(args, grad_out, mode, **options)
    for name, a, e in zip(Grads._fields, got, grads, strict=True):
        # a sum of products of rounded inputs in fp32; only grad_input is rounded to the dtype of input
        assert_close(a, e, of.family, dtype if name == "input" else torch.float32, f"gradient of {name}")


KERNEL_CASES = [
    case("2_groups_of_8", (5, 6), group_channels=8, **P1),
    case("1_group_of_264", (3, 4), groups=1, group_channels=264, batch=1, **P1),
    case("2_groups_of_33", (3, 4), group_channels=33, batch=1, **P1),
    case("kernel_9x9_softmax", (4, 5), kernel_size=9, padding=4, groups=1, group_channels=32, batch=1, softmax=True),
    case("gathered", (1, 2), kernel_size=7, padding=6, groups=1, group_channels=16, batch=1, reach=0.3),
]


@pytest.mark.parametrize("dtype", host.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("of", [*CASES, *KERNEL_CASES], ids=str)
def test_values(of: Case, dtype: torch.dtype) -> None:
    if dtype not in of.dtypes:
        pytest.skip("this case is not exact in that dtype")
    check(of, dtype)


@pytest.mark.parametrize("of", KERNEL_CASES, ids=str)
def test_every_order_of_warps_gives_the_same_bits(of: Case) -> None:
    args, grad_out = prepared(of, torch.bfloat16)
    first = [forward(args), *backward(args, grad_out)]
    for seed in range(1, 4):
        for a, e in zip([forward(args, seed=seed), *backward(args, grad_out, seed=seed)], first, strict=True):
            assert_same(a, e, f"{seed=}")


@pytest.mark.parametrize(
    "of",
    [
        *KERNEL_CASES,
        case("prime", (5, 7), groups=3, group_channels=7, remove_center=True, softmax=True, offset_scale=1.5, **P1),
        case("odd_end", (5, 6), change=some_not_finite, stride=2, **P1),
    ],
    ids=str,
)
def test_address_and_undefined_behaviour(of: Case) -> None:
    check(of, torch.bfloat16, "asan", seed=1)


def test_races() -> None:
    check(case("tiny", (2, 3), group_channels=8, batch=1, softmax=True, **P1), torch.float32, "tsan", seed=1)


@pytest.mark.parametrize("needs", ["i", "o", "m", "om", ""])
def test_only_what_is_wanted_is_computed(needs: str) -> None:
    args, grad_out = prepared(case("softmax", (5, 6), softmax=True, **P1), torch.float32)
    full = backward(args, grad_out)
    for name, a, e in zip(Grads._fields, backward(args, grad_out, needs=needs), full, strict=True):
        if name[0] in needs:
            assert_same(a, e, name)
        else:
            assert a.numel() == 0


@pytest.mark.parametrize("change", [{"taps": 8}, {"groups": 3}, {"height": 0}, {"dtype": 3}, {"kernel": (0, 3)}])
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    args, _ = prepared(case("small", (5, 6), **P1), torch.float32)
    params = params_of(args)
    for name, value in change.items():
        setattr(params, name, value)
    tensors = {"input": args.input, "out": torch.zeros(1000)}
    ran = host.run(host.program(SOURCE, "plain"), "accel_deform_attention2d_forward", params, tensors)
    assert ran.code == 3
    assert "returned 1" in ran.report


def test_empty_batch() -> None:
    args, grad_out = prepared(case("small", (5, 6), **P1), torch.float32)
    empty = args._replace(input=args.input[:0], offset=args.offset[:0], mask=args.mask[:0])
    assert forward(empty, "asan").shape[0] == 0
    assert all(grad.shape[0] == 0 for grad in backward(empty, grad_out[:0], "asan"))
