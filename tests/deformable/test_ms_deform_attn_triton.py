"""The Triton backend of multi-scale deformable attention by itself, without a GPU under Triton's interpreter."""

import math

import pytest
import torch

pytest.importorskip("triton")
import test_ms_deform_attn as common
from _ms_deform_attn_cases import CASES, case
from _triton_checks import DEVICE, on_the_cpu, params

import accel
from accel import testing
from accel.kernels import _launch
from accel.kernels.deformable import ms_deform_attn as kernels
from accel.kernels.deformable import rows_launch as rows
from accel.kernels.deformable import sampling
from accel.ops.deformable import ms_deform_attn as op
from accel.testing import assert_close

FP32, BF16, FP16 = "float32", "bfloat16", "float16"
TINY = [
    case("tiny", [(3, 4), (2, 2)], 3, points=2, heads=2, dim=4, dtypes=(torch.float32,)),
    case("tiny_points", [(3, 4), (2, 2)], 3, points=[2, 1], heads=1, dim=5, tensors_for_shapes=True),
]
QUICK = {
    "one_of_each": FP32,
    "one_level": FP16,
    "one_row_and_column": BF16,
    "a_level_without_points": FP16,
    "points_by_level_tensors": BF16,
    "head_size_130": FP16,
    "not_finite": BF16,
    "exact": BF16,
    "exact_no_border": FP16,
    "tiny": FP32,
    "tiny_points": FP16,
}


@pytest.mark.parametrize("check", params(accel.ms_deform_attn, [*CASES, *TINY], TINY, QUICK))
def test_op(check):
    check()


def prepared(made, dtype=torch.float32):
    tensors, kwargs = made.make(dtype, DEVICE, 0)
    return op._prepare(**tensors, **kwargs)


def random_grad(args):
    size = (*args.sampling_locations.shape[:2], args.value.shape[2] * args.value.shape[3])
    return torch.randn(size, generator=torch.Generator().manual_seed(7)).to(args.value)


def test_heads_may_be_sorted_one_by_one(monkeypatch):
    args = prepared(TINY[0])
    whole = kernels.backward(random_grad(args), *args, [True, False, False])[0]
    monkeypatch.setattr(sampling, "SORTED_AT_ONCE", 1)
    assert torch.equal(kernels.backward(random_grad(args), *args, [True, False, False])[0], whole)


@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_partial_sums_of_a_pixel(monkeypatch, lanes):
    """All queries look at one place, so that every lane has a list, and only some an equal one."""
    tensors, kwargs = case("", [(4, 4), (2, 2)], 9, points=2, heads=2, batch=1).make(torch.float32, DEVICE, 0)
    tensors["sampling_locations"] = 0.4 + 0.02 * tensors["sampling_locations"]
    monkeypatch.setattr(rows, "value_tile", lambda length, size: rows.Tile(16 * lanes, 4, 4, lanes=lanes))
    out = accel.ms_deform_attn(**tensors, **kwargs, backend="reference")
    grad_out = testing.random_like(out)
    doubled = testing.double(tensors)
    want = testing.run(accel.ms_deform_attn, doubled, kwargs, "reference", ["value"], grad_out.double())
    got = testing.run(accel.ms_deform_attn, tensors, kwargs, "triton", ["value"], grad_out)
    assert_close(got.grads["value"], want.grads["value"], "sample_grad", torch.float32, "gradient of value")


def inside_nan(x):
    """The values of ``x`` in the middle of memory full of NaN."""
    wide = torch.full((3 * x.numel(),), math.nan, dtype=x.dtype, device=x.device)
    middle = wide[x.numel() : 2 * x.numel()].view(x.shape)
    middle.copy_(x)
    return middle, wide


@pytest.mark.parametrize(
    ("shapes", "starts"),
    [
        ([[1000, 1000], [2**40, 3]], [0, 4]),
        ([[3, 4], [2, 2]], [-7, 10**12]),
        ([[-3, 4], [2, -2]], [0, 12]),
        ([[0, 0], [0, 5]], [0, 0]),
        ([[4, 4], [4, 4]], [0, 0]),
    ],
)
def test_wrong_shapes_reach_no_foreign_memory(shapes, starts):
    args = prepared(TINY[0])
    value, _ = inside_nan(args.value)
    args = args._replace(
        value=value,
        spatial_shapes=torch.tensor(shapes, device=DEVICE),
        level_start_index=torch.tensor(starts, device=DEVICE),
    )
    assert kernels.forward(*args).isfinite().all()
    for grad in kernels.backward(random_grad(args), *args, [True] * 3):
        assert grad.isfinite().all()


def test_levels_may_overlap():
    """Two levels that are the same pixels: both add to their gradient."""
    args = prepared(case("", [(2, 2), (2, 2)], 3, heads=1))
    args = args._replace(level_start_index=torch.zeros_like(args.level_start_index))
    leaf = args.value.double().requires_grad_()
    grad_out = random_grad(args)
    out = op.reference(leaf, *(x.double() for x in args[1:3]), *args[3:])
    (want,) = torch.autograd.grad(out, leaf, grad_out.double())
    got = kernels.backward(grad_out, *args, [True, False, False])[0]
    assert_close(got, want, "sample_grad", torch.float32, "gradient of value")


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
def test_locations_that_are_not_finite_take_their_samples_out(value):
    common.test_a_location_that_is_not_finite_takes_its_sample_out(*on_the_cpu("triton", torch.float32, value))


@pytest.mark.slow
@pytest.mark.parametrize("pixel", [0, 9 * 13 - 1, 9 * 13 + 2 * 7 + 3])
def test_what_is_not_finite_in_the_map(pixel):
    common.test_what_is_not_finite_in_the_map_stays_where_it_is_sampled(*on_the_cpu("triton", math.nan, pixel))


@pytest.mark.slow
def test_levels_may_lie_in_any_order():
    common.test_levels_may_lie_in_any_order(*on_the_cpu("triton"))


# --- refusals and tiles, which need no kernel ---


def test_why_not(monkeypatch):
    args = prepared(TINY[0])
    assert kernels.why_not(args) is None
    assert "meta" in kernels.why_not(args._replace(value=args.value.to("meta")))
    assert "points" in kernels.why_not(args._replace(num_points=[2**15]))
    huge = args.value.new_empty(1, 1, 1, 4).expand(2, 2**30, 2, 4)
    assert "keys" in kernels.why_not(args._replace(value=huge))
    many = args.value.new_empty(1, 1, 1, 4).expand(2, 2**20, 2**11, 4)
    assert "launch" in kernels.why_not(args._replace(value=many))
    monkeypatch.setattr(_launch, "INTERPRETING", False)
    assert "cpu" in kernels.why_not(args._replace(value=args.value.cpu()))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_size", [1, 3, 16, 32, 40, 64, 128, 130, 512])
@pytest.mark.parametrize("points", [1, 2, 3, 5, 8, 9, 16, 17])
def test_tiles(itemsize, head_size, points):
    for count in (1, 2**10, 2**22):
        for table in (rows.forward_tile, rows.points_tile):
            tile = table(count, head_size, points, itemsize)
            assert points % tile.at_once == 0
            assert tile.rows & (tile.rows - 1) == tile.d & (tile.d - 1) == 0
            assert tile.rows * tile.d <= 2048
        tile = rows.value_tile(4.0 * count / 1000, head_size)
        assert tile.rows % tile.lanes == 0
        assert tile.lanes & (tile.lanes - 1) == 0
