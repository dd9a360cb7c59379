"""The Triton backend of deformable convolution by itself, where there is no GPU under Triton's interpreter."""

import math

import pytest
import torch

pytest.importorskip("triton")
import test_deform_conv2d as common
from _deform_conv2d_cases import CASES, by_name, case
from _triton_checks import DEVICE, on_the_cpu, params

import accel
from accel import testing
from accel.kernels import _launch
from accel.kernels.deformable import conv_tiles as tiles
from accel.kernels.deformable import deform_conv2d as kernels
from accel.kernels.deformable import layout, sampling
from accel.ops.deformable import deform_conv2d as op
from accel.testing import assert_close, assert_same

FP32, BF16, FP16 = "float32", "bfloat16", "float16"
TINY = [
    case("tiny", (4, 2), (3, 3), (1, 2), groups=2, dtypes=(torch.float32,)),
    case("tiny_last", (3, 2), (3, 3), (2, 1), mask=False, bias=False, last=True, padding=1),
    case("tiny_groups", (4, 4), (3, 4), (2, 2), offset_groups=2, padding=1),
    case("tiny_across", (6, 4), (3, 2), (1, 2), groups=2, offset_groups=3, batch=1),
    case("tiny_all_different", (2, 3), (5, 6), (2, 1), stride=(2, 3), padding=(1, 2), dilation=(2, 1), batch=1),
]
QUICK = {
    "v1_no_bias": FP16,
    "one_pixel_one_tap": FP16,
    "one_tap": FP32,
    "not_finite": FP32,
    "exact_channels_last": BF16,
    "exact_17_channels": FP32,
    "exact_no_border": FP16,
    "tiny_last": FP16,
    "tiny_across": FP32,
    "tiny_all_different": BF16,
}


@pytest.mark.parametrize("check", params(accel.deform_conv2d, [*CASES, *TINY], TINY[:3], QUICK))
def test_op(check):
    check()


def prepared(name, dtype=torch.float32):
    tensors, kwargs = by_name(name).make(dtype, DEVICE, 0)
    return op._prepare(**tensors, **kwargs)


def random_grad(args):
    size = (args.input.shape[0], args.weight.shape[0], *args.offset.shape[2:])
    return torch.randn(size, generator=torch.Generator().manual_seed(7)).to(args.input)


def input_alone(args):
    return kernels.backward(random_grad(args), *args, [True, False, False, False, False])[0]


# --- the gradient of the input, which is made of sorted samples ---


def test_units_may_be_sorted_one_by_one(monkeypatch):
    tensors, kwargs = TINY[2].make(torch.float32, DEVICE, 0)
    args = op._prepare(**tensors, **kwargs)
    whole = input_alone(args)
    monkeypatch.setattr(sampling, "SORTED_AT_ONCE", 1)
    assert len(sampling.chunks(4, 4 * 20, 4 * 20)) == 4
    assert torch.equal(input_alone(args), whole)


@pytest.mark.parametrize(
    ("units", "samples", "cells", "most"), [(1, 5, 7, 3), (6, 10, 5, 20), (7, 3, 10, 35), (5, 1, 1, 99)]
)
def test_chunks_cover_all_units_once(monkeypatch, units, samples, cells, most):
    monkeypatch.setattr(sampling, "SORTED_AT_ONCE", most)
    found = sampling.chunks(units, samples, cells)
    assert [unit for first, count in found for unit in range(first, first + count)] == list(range(units))
    assert all(count * max(samples, cells) <= most or count == 1 for _, count in found)


def test_sorted_samples_are_stable_and_every_cell_has_its_own():
    keys = torch.tensor([[3, 0, 3, 4, 0], [1, 4, 0, 3, 1]], dtype=torch.int32) + torch.tensor(
        [[0], [5]], dtype=torch.int32
    )
    order, starts = sampling.sort_samples(keys, 2, 4)
    lists = [order[a:b].tolist() for a, b in zip(starts.tolist(), [*starts.tolist()[1:], 10], strict=True)]
    assert lists == [[1, 4], [], [], [0, 2], [3], [7], [5, 9], [], [8], [6]]


def test_all_samples_in_one_cell():
    """Lists as long as there are outputs, and pixels that no sample reaches."""
    tensors, kwargs = by_name("one_tap").make(torch.float32, DEVICE, 0)
    tensors["offset"] = tensors["offset"].clone()
    rows = torch.arange(5.0, device=DEVICE).view(-1, 1)
    columns = torch.arange(6.0, device=DEVICE)
    tensors["offset"][:, 0], tensors["offset"][:, 1] = 2.25 - rows, 3.5 - columns
    grad_out = testing.random_like(tensors["input"])
    want = testing.run(accel.deform_conv2d, testing.double(tensors), kwargs, "reference", grad_out=grad_out.double())
    got = testing.run(accel.deform_conv2d, tensors, kwargs, "triton", grad_out=grad_out)
    for name, expected in want.named().items():
        assert_close(got.named()[name], expected, "deform_conv_grad", torch.float32, name)
    assert got.grads["input"].count_nonzero() == 2 * 8 * 4


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_in_mask_or_gradient_stays_at_its_pixels(value):
    tensors, kwargs = by_name("v1_no_bias").make(torch.float32, DEVICE, 0)
    tensors["mask"] = torch.ones(2, 9, 3, 3, device=DEVICE)
    tensors["mask"][1, 4, 1, 2] = value
    grad_out = torch.ones(2, 4, 3, 3, device=DEVICE)
    grad_out[0, 2, 0, 1] = value
    want, got = (
        testing.run(accel.deform_conv2d, tensors, kwargs, backend, ["input"], grad_out)
        for backend in ("reference", "triton")
    )
    assert_same(got.out.isfinite(), want.out.isfinite(), "finite outputs")
    assert_same(got.grads["input"].isfinite(), want.grads["input"].isfinite(), "finite gradients of the input")
    assert not want.grads["input"].isfinite().all()


# --- what the tests of all backends ask ---


@pytest.mark.parametrize("border", [True, False])
def test_positions_at_the_border_and_beyond(border):
    common.test_positions_at_the_border_and_beyond(*on_the_cpu("triton", torch.bfloat16, 1, border))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("border", [True, False])
def test_more_positions_at_the_border(dtype, border):
    common.test_positions_at_the_border_and_beyond(*on_the_cpu("triton", dtype, 19, border))


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e38])
def test_offsets_that_are_not_finite_take_their_samples_out(value):
    common.test_an_offset_that_is_not_finite_takes_its_sample_out(*on_the_cpu("triton", torch.float32, value))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["groups_across", "v2_channels_last"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_in_the_map(name, value):
    common.test_what_is_not_finite_in_the_map_stays_where_it_is_sampled(*on_the_cpu("triton", name, value, (2, 3)))


@pytest.mark.slow
def test_memory_format_follows_the_input():
    common.test_memory_format_follows_the_input(*on_the_cpu("triton"))


# --- refusals and tiles, which need no kernel ---


def test_why_not(monkeypatch):
    args = prepared("one_tap")
    assert kernels.why_not(args) is None
    assert "meta" in kernels.why_not(args._replace(input=args.input.to("meta")))
    for changed in (
        {"dilation": [2**31, 1]},
        {"input": args.input.new_empty(1, 8, 1, 1).expand(1, 8, 2**16, 2**15)},
        {"offset": args.offset.new_empty(1, 2, 1, 1).expand(1, 2, 2**16, 2**15)},
        {"input": args.input.new_empty(1, 8, 1, 1).expand(2**20, 8, 2**7, 2**9)},
    ):
        assert "32" in kernels.why_not(args._replace(**changed)) or "launch" in kernels.why_not(
            args._replace(**changed)
        )
    monkeypatch.setattr(_launch, "INTERPRETING", False)
    assert "cpu" in kernels.why_not(args._replace(input=args.input.cpu()))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("segment", [1, 16, 17, 128, 512])
@pytest.mark.parametrize("o", [1, 16, 24, 64, 128, 256, 2048])
def test_tiles_are_what_a_product_takes(itemsize, segment, o):
    for capability in ((8, 0), (9, 0), (10, 0)):
        shape = tiles.Shape(segment, o, itemsize, capability)
        for table in (tiles.forward_tile, tiles.shifts_tile, tiles.weight_tile, tiles.input_tile):
            tile = table(shape)
            for size in (tile.outputs, tile.c, tile.o):
                assert size >= 16
                assert size & (size - 1) == 0
            assert tile.warps in (4, 8)


@pytest.mark.parametrize("outputs", [16, 32, 64, 128])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (3, 7), (25, 42), (50, 84), (100, 168)])
def test_blocks_of_outputs_fit_the_map(height, width, outputs):
    tile_h, tile_w = sampling.output_block(height, width, outputs)
    assert 16 <= tile_h * tile_w <= max(16, outputs)
    tiles = -(-height // tile_h) * -(-width // tile_w)
    assert tiles * tile_h * tile_w <= 2 * height * width + 2 * outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(2, 70, 9, 11), (1, 1, 1, 1), (3, 64, 8, 16), (1, 130, 1, 65)])
def test_channels_are_moved_last(size, dtype):
    x = torch.randn(size, dtype=dtype, device=DEVICE)
    out = x.new_empty((size[0], *size[2:], size[1])).fill_(math.nan)
    layout.transpose_launch(out, x).run()
    assert torch.equal(out, x.permute(0, 2, 3, 1))
