"""The CUDA binding of deform_conv2d, over kernels and products that run on the CPU: layouts, groups, what is wanted,
images that do not fit together, against autograd of the reference in float64."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import _cuda_host as host
import pytest
import torch
from _deform_conv2d_cases import P1, case, offsets_on_integers
from torch import Tensor

from accel import dispatch
from accel.ops.deformable.deform_conv2d import OP, Args, lay_out, memory_format
from accel.testing import Case, assert_close

FOLDER = host.ROOT / "csrc" / "cuda" / "deformable"
NAMES = ("input", "offset", "weight", "bias", "mask")
EVERY = (True,) * 5

CASES = [
    case("plain", (64, 40), (5, 6), **P1),
    case("channels_last", (64, 40), (5, 6), last=True, **P1),
    case("v1_no_bias", (64, 40), (5, 6), bias=False, mask=False, **P1),
    case("groups", (128, 48), (5, 6), groups=2, **P1),
    case("groups_last", (128, 48), (5, 6), groups=2, last=True, offset_groups=2, **P1),
    case("all_different", (128, 16), (10, 9), (2, 3), stride=(3, 2), padding=(2, 1), dilation=(2, 3), offset_groups=2),
    case("one_output", (64, 8), (3, 3)),
    case("many_outputs", (64, 8), (17, 19), batch=3, **P1),
    case("no_image", (64, 8), (5, 6), batch=0, **P1),
    case("no_border", (64, 8), (5, 6), change=offsets_on_integers, border_gradient=False, **P1),
]


class Call:
    def __init__(self, of: Case, dtype: torch.dtype) -> None:
        tensors, kwargs = of.make(dtype, "cpu", 3)
        self.args: Args = OP.prepare(**tensors, **kwargs)
        leaves = [None if x is None else x.detach().double().requires_grad_() for x in self.args[:5]]
        out = OP.backend("reference").forward(*leaves, *self.args[5:])
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        self.grad_out = lay_out(upstream, memory_format(self.args.input))
        self.out = out.detach()
        given = [x for x in leaves if x is not None]
        self.grads = iter(torch.autograd.grad(out, given, upstream.double()))
        self.expected = {n: None if x is None else next(self.grads) for n, x in zip(NAMES, leaves, strict=True)}


@functools.cache
def library() -> Any:
    # columns of one or of two images, as the case has it
    defines = [f"-DACCEL_COLUMNS_AT_ONCE={100 << 10}"]
    return host.binding(
        FOLDER / "deform_conv2d.cpp", [FOLDER / "deform_conv2d.cu", FOLDER / "conv_forward.cu"], defines
    )


def schema(name: str) -> str:
    reason = dispatch.leaf_reason("accel._C")
    assert reason is None, reason
    return str(getattr(torch.ops.accel_native, name).default._schema)


@functools.cache
def results(dtype: torch.dtype) -> dict[str, tuple[Call, Tensor, tuple[Tensor, ...]]]:
    """Output and gradients of every case, by name, from one process."""
    calls = {str(of): Call(of, dtype) for of in CASES}
    asked = []
    for call in calls.values():
        asked.append((schema("deform_conv2d_forward"), tuple(call.args)))
        asked.append((schema("deform_conv2d_backward"), (call.grad_out, *call.args, EVERY)))
    done = host.call_ops(library(), asked)
    return {name: (call, *done[2 * i : 2 * i + 2]) for i, (name, call) in enumerate(calls.items())}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of", CASES, ids=str)
def test_values(of: Case, dtype: torch.dtype) -> None:
    call, out, grads = results(dtype)[str(of)]
    assert_close(out, call.out, of.family, dtype, "output")
    assert memory_format(out) == memory_format(call.args.input) or out.shape[1] == 1
    for name, given, got in zip(NAMES, call.args, grads, strict=False):
        if given is None:
            assert got.numel() == 0
            continue
        assert got.dtype == given.dtype
        assert got.shape == given.shape
        assert name != "input" or memory_format(got) == memory_format(given)
        expected = call.expected[name]
        assert expected is not None
        assert_close(got, expected, of.gradient_family(name), dtype, f"gradient of {name}")


def test_only_what_is_wanted_is_computed() -> None:
    call, _, full = results(torch.bfloat16)["channels_last"]
    wishes = [tuple(i in some for i in range(5)) for n in (0, 1, 2) for some in itertools.combinations(range(5), n)]
    asked = [(schema("deform_conv2d_backward"), (call.grad_out, *call.args, wish)) for wish in wishes]
    for wish, grads in zip(wishes, host.call_ops(library(), asked), strict=True):
        for wanted, got, whole in zip(wish, grads, full, strict=True):
            assert torch.equal(got, whole) if wanted else got.numel() == 0, wish
