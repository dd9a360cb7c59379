"""The Triton backend of deformable attention by itself, where there is no GPU under Triton's interpreter."""

import math

import pytest
import torch

pytest.importorskip("triton")
import test_deform_attention2d as common
from _deform_attention2d_cases import CASES, by_name, case
from _triton_checks import DEVICE, on_the_cpu, params

import accel
from accel import testing
from accel.kernels import _launch
from accel.kernels.deformable import deform_attention2d as kernels
from accel.kernels.deformable import sampling
from accel.ops.deformable import deform_attention2d as op

FP32, BF16, FP16 = "float32", "bfloat16", "float16"
TINY = [
    case("tiny", (3, 4), kernel_size=(1, 3), softmax=True, padding=(0, 1), remove_center=True, offset_scale=1.5,
         dtypes=(torch.float32,)),
    case("tiny_strided", (4, 4), kernel_size=(2, 1), stride=(1, 2), groups=1, group_channels=3),
]  # fmt: skip
QUICK = {
    "v4": BF16,
    "without_centre_softmax": FP16,
    "one_tap": FP32,
    "one_row": FP16,
    "all_different": BF16,
    "1_group_of_130": FP16,
    "not_finite_softmax": FP32,
    "exact_without_centre": BF16,
    "exact_strided": FP32,
    "tiny_strided": FP32,
}


@pytest.mark.parametrize("check", params(accel.deform_attention2d, [*CASES, *TINY], TINY, QUICK))
def test_op(check):
    check()


def prepared(made, dtype=torch.float32):
    tensors, kwargs = made.make(dtype, DEVICE, 0)
    return op._prepare(**tensors, **kwargs)


def test_groups_may_be_sorted_one_by_one(monkeypatch):
    args = prepared(TINY[0])
    grad_out = testing.random_like(args.input)
    whole = kernels.backward(grad_out, *args, [True, False, False])[0]
    monkeypatch.setattr(sampling, "SORTED_AT_ONCE", 1)
    assert torch.equal(kernels.backward(grad_out, *args, [True, False, False])[0], whole)


# --- what the tests of all backends ask ---


def test_positions_at_the_border_and_beyond():
    common.test_positions_at_the_border_and_beyond(*on_the_cpu("triton", torch.bfloat16, 1, 4.0))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES, ids=str)
def test_more_positions_at_the_border(dtype):
    common.test_positions_at_the_border_and_beyond(*on_the_cpu("triton", dtype, 19, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e38])
def test_offsets_that_are_not_finite_take_their_samples_out(value, softmax):
    args = on_the_cpu("triton", torch.float32, value, softmax)
    common.test_an_offset_that_is_not_finite_takes_its_sample_out(*args)


# --- refusals, which need no kernel ---


def test_why_not(monkeypatch):
    args = prepared(by_name("one_tap"))
    assert kernels.why_not(args) is None
    assert "meta" in kernels.why_not(args._replace(input=args.input.to("meta")))
    assert "32 bits" in kernels.why_not(args._replace(dilation=[1, 2**31]))
    huge = args.input.new_empty(1, 1, 1, 8).expand(2, 2**16, 2**15, 8)
    assert "keys" in kernels.why_not(args._replace(input=huge))
    many = args.input.new_empty(1, 1, 1, 8).expand(2**20, 2**7, 2**9, 8)
    assert "launch" in kernels.why_not(args._replace(input=many))
    monkeypatch.setattr(_launch, "INTERPRETING", False)
    assert "cpu" in kernels.why_not(args._replace(input=args.input.cpu()))
