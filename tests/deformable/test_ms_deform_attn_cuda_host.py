"""The CUDA kernels of ms_deform_attn, run on the CPU by the shim of csrc/testing: values against the float64 reference,
the same bits in every order of warps, memory and races under sanitizers, and shapes that do not fit."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import _cuda_host as host
import pytest
import torch
from _ms_deform_attn_cases import CASES, PYRAMID, by_name, case, some_not_finite, whole
from torch import Tensor

from accel.ops.deformable.ms_deform_attn import OP, Args, reference
from accel.testing import Case, assert_close, assert_same

SOURCE = host.ROOT / "csrc" / "cuda" / "deformable" / "ms_deform_attn.cu"


class Params(ctypes.Structure):
    """csrc/cuda/deformable/ms_deform_attn.h"""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("value", "locations", "weights", "shapes", "starts", "out")],
        *[(name, ctypes.c_void_p) for name in ("grad_out", "grad_value", "grad_locations", "grad_weights", "scratch")],
        ("scratch_bytes", ctypes.c_int64),
        *[(name, ctypes.c_int32) for name in ("batch", "pixels", "queries", "heads", "channels", "levels")],
        *[(name, ctypes.c_int32) for name in ("dtype", "border_gradient")],
        ("num_points", ctypes.c_int32 * 16),
    ]


class Grads(NamedTuple):
    value: Tensor
    locations: Tensor
    weights: Tensor


def params_of(args: Args) -> Params:
    n, s, m, d = args.value.shape
    points = (ctypes.c_int32 * 16)(*args.num_points)
    queries, levels, dtype = args.sampling_locations.shape[1], len(args.num_points), host.DTYPES.index(args.value.dtype)
    return Params(
        batch=n,
        pixels=s,
        queries=queries,
        heads=m,
        channels=d,
        levels=levels,
        dtype=dtype,
        num_points=points,
        border_gradient=args.border_gradient,
    )


def inputs_of(args: Args) -> dict[str, Tensor]:
    names = ("value", "locations", "weights", "shapes", "starts")
    return dict(zip(names, args[:5], strict=True))


def forward(args: Args, mode: str = "plain", **options: Any) -> Tensor:
    n, _, m, d = args.value.shape
    out = torch.full((n, args.sampling_locations.shape[1], m * d), float("nan"), dtype=args.value.dtype)
    tensors = {**inputs_of(args), "out": out}
    ran = host.run(host.program(SOURCE, mode), "accel_ms_deform_attn_forward", params_of(args), tensors, **options)
    assert ran.code == 0, ran.report
    for name, x in inputs_of(args).items():
        assert_same(ran.buffers[name], x, f"{name} was written")
    return ran.buffers["out"]


def backward(
    args: Args,
    grad_out: Tensor,
    mode: str = "plain",
    needs: str = "vlw",
    images: int | None = None,
    **options: Any,
) -> Grads:
    params = params_of(args)
    n, s, m, _ = args.value.shape
    samples = args.sampling_locations.shape[1] * sum(args.num_points)
    scratch = host.scratch(n if images is None else images, m, samples, s, mode)
    params.scratch_bytes = scratch.numel()
    tensors = {**inputs_of(args), "grad_out": grad_out, "scratch": scratch}
    wanted = {"v": ("grad_value", args.value), "l": ("grad_locations", args[1]), "w": ("grad_weights", args[2])}
    for key in needs:
        name, like = wanted[key]
        tensors[name] = torch.full_like(like, float("nan"))
    ran = host.run(host.program(SOURCE, mode), "accel_ms_deform_attn_backward", params, tensors, **options)
    assert ran.code == 0, ran.report
    none = torch.empty(0)
    return Grads(*(ran.buffers.get(name, none) for name, _ in wanted.values()))


@functools.lru_cache(maxsize=4)
def prepared(of: Case, dtype: torch.dtype) -> tuple[Args, Tensor]:
    tensors, kwargs = of.make(dtype, "cpu", 3)
    given = OP.prepare(**tensors, **kwargs)
    args = given._replace(sampling_locations=given[1].float(), attention_weights=given[2].float())
    n, _, m, d = args.value.shape
    generator = torch.Generator().manual_seed(4)
    grad_out = torch.randn((n, args[1].shape[1], m * d), generator=generator)
    if of.family == "exact":
        grad_out = (grad_out * 1.2).round().clamp(-2, 2)
    return args, grad_out.to(dtype)


def expected(args: Args, grad_out: Tensor) -> tuple[Tensor, Grads]:
    leaves = [x.double().requires_grad_() for x in args[:3]]
    out = reference(*leaves, *args[3:])
    return out.detach(), Grads(*torch.autograd.grad(out, leaves, grad_out.double()))


def check(of: Case, dtype: torch.dtype, mode: str = "plain", **options: Any) -> None:
    args, grad_out = prepared(of, dtype)
    out, grads = expected(args, grad_out)
    assert_close(forward(args, mode, **options), out, of.family, dtype, "output")
    got = backward(args, grad_out, mode, **options)
    for name, a, e in zip(Grads._fields, got, grads, strict=True):
        # a sum of products of rounded inputs in fp32; only grad_value is rounded to the dtype of value
        assert_close(a, e, of.family, dtype if name == "value" else torch.float32, f"gradient of {name}")


# Beyond the op's own cases: what the kernels divide their work by. 32 lanes and more of a row, several passes over the
# channels, long runs of samples at one pixel, keys of more than one and two bytes, segments of more than one tile.
KERNEL_CASES = [
    case("16_bytes_each", PYRAMID, 6, dim=8),
    case("24_channels", PYRAMID, 6, dim=24, heads=3),
    case("256_channels", [(3, 4)], 5, dim=256, heads=1),
    case("264_channels", [(3, 4)], 3, dim=264, heads=1, batch=1),
    case("33_channels", [(3, 4)], 3, dim=33, heads=2),
    case("70_points", [(6, 5), (3, 3)], 3, points=70, dim=8),
    case("300_points", [(3, 3)], 2, points=300, dim=32, heads=1, batch=1),
    case("one_pixel", [(1, 1)], 400, points=2, dim=8, batch=1),
    case("two_pixels", [(1, 2)], 200, points=3, dim=32, heads=1),
    case("300_pixels", [(15, 20)], 50, dim=8),
    case("131072_pixels", [(256, 512)], 40, dim=1, heads=1, batch=1, change=whole(2), family="exact"),
    case("many_tiles", [(17, 20), (5, 5)], 8300, points=2, dim=1, heads=2, batch=1),
]


@pytest.mark.parametrize("dtype", host.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("of", [*CASES, *KERNEL_CASES], ids=str)
def test_values(of: Case, dtype: torch.dtype) -> None:
    if dtype not in of.dtypes:
        pytest.skip("this case is not exact in that dtype")
    check(of, dtype)


SMALL = ("pyramid", "points_by_level", "prime", "head_size_40", "not_finite", "one_row_and_column")


def bits(args: Args, grad_out: Tensor, **options: Any) -> list[Tensor]:
    return [forward(args, **options), *backward(args, grad_out, **options)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", [by_name("pyramid"), *KERNEL_CASES[7:9], KERNEL_CASES[-1]], ids=str)
def test_every_order_of_warps_gives_the_same_bits(of: Case, dtype: torch.dtype) -> None:
    args, grad_out = prepared(of, dtype)
    first = bits(args, grad_out)
    for seed in range(1, 6):
        for a, e in zip(bits(args, grad_out, seed=seed), first, strict=True):
            assert_same(a, e, f"{seed=}")


@pytest.mark.parametrize("dtype", host.DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_address_and_undefined_behaviour(name: str, dtype: torch.dtype) -> None:
    check(by_name(name), dtype, "asan", seed=1)


@pytest.mark.parametrize("of", KERNEL_CASES[:10], ids=str)
def test_address_and_undefined_behaviour_of_larger_cases(of: Case) -> None:
    check(of, torch.bfloat16, "asan")


TINY = [
    case("tiny", [(3, 4), (2, 2)], 5, points=3, dim=8, batch=1),
    case("tiny_odd", [(3, 4)], 7, points=2, dim=3, batch=2),
    case("tiny_long", [(1, 2)], 60, points=2, dim=16, heads=1, batch=1),
    case("tiny_many_points", [(3, 4)], 3, points=21, dim=8, heads=1, batch=1),
    case("tiny_two_passes", [(15, 20)], 9, dim=8, heads=1, batch=1, change=some_not_finite),
]


@pytest.mark.parametrize("of", TINY, ids=str)
def test_races(of: Case) -> None:
    check(of, torch.float32, "tsan", seed=1)


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_a_sort_in_short_tiles_gives_the_same_bits(mode: str) -> None:
    args, grad_out = prepared(case("short_tiles", [(12, 20)], 40, points=4, dim=4, heads=1, batch=1), torch.float32)
    full = backward(args, grad_out, needs="v")
    assert_same(backward(args, grad_out, mode, needs="v", seed=1).value, full.value, mode)


def test_a_tensor_at_an_odd_address_takes_the_safe_path() -> None:
    args, grad_out = prepared(by_name("head_size_32"), torch.bfloat16)
    out, grads = forward(args), backward(args, grad_out)
    for name in ("value", "out"):
        assert_same(forward(args, "asan", shift={name: 2}), out, f"output, {name} moved")
    for name in ("value", "grad_out", "grad_value"):  # other lanes add up
        for a, e in zip(backward(args, grad_out, "asan", shift={name: 2}), grads, strict=True):
            assert_close(a, e.double(), "sample", a.dtype, f"{name} moved")


@pytest.mark.parametrize("needs", ["v", "l", "w", "vl", "lw", ""])
def test_only_what_is_wanted_is_computed(needs: str) -> None:
    args, grad_out = prepared(by_name("points_by_level"), torch.float32)
    full = backward(args, grad_out)
    part = backward(args, grad_out, needs=needs)
    for key, a, e in zip("vlw", part, full, strict=True):
        if key in needs:
            assert_same(a, e, key)
        else:
            assert a.numel() == 0


def test_little_scratch_memory_gives_the_same_bits() -> None:
    args, grad_out = prepared(by_name("batch_5"), torch.float32)
    full = backward(args, grad_out)
    for images in (1, 2, 7):
        assert_same(backward(args, grad_out, images=images).value, full.value, f"{images=}")


@pytest.mark.parametrize("mode", ["plain", "asan"])
@pytest.mark.parametrize(
    ("shapes", "starts"),
    [
        ([[3, 4], [2, 2]], [0, 13]),  # past the end by one
        ([[3, 4], [2, 2]], [-5, 12]),
        ([[300, 400], [2, 2]], [0, 12]),
        ([[3, 1 << 40], [1 << 62, 1 << 62]], [0, 12]),
        ([[-3, -4], [0, 2]], [0, 1 << 60]),
        ([[3, -(1 << 63)], [2, 2]], [-(1 << 63), (1 << 63) - 1]),
        ([[0, 0], [0, 0]], [0, 0]),
    ],
)
def test_shape_tensors_that_do_not_fit_reach_no_foreign_memory(shapes: Any, starts: Any, mode: str) -> None:
    args, grad_out = prepared(case("small", [(3, 4), (2, 2)], 20, points=3, dim=8), torch.float32)
    args = args._replace(spatial_shapes=torch.tensor(shapes), level_start_index=torch.tensor(starts))
    assert not forward(args, mode).isnan().any()
    assert not any(grad.isnan().any() for grad in backward(args, grad_out, mode))


def test_levels_that_overlap_are_right() -> None:
    args, grad_out = prepared(case("twice", [(3, 4), (3, 4)], 9, points=2, dim=8), torch.float32)
    for starts in ([0, 6], [0, 0]):
        args = args._replace(level_start_index=torch.tensor(starts))
        out, grads = expected(args, grad_out)
        assert_close(forward(args), out, "sample", torch.float32, f"output, {starts=}")
        for a, e in zip(backward(args, grad_out), grads, strict=True):
            assert_close(a, e, "sample", torch.float32, f"gradient, {starts=}")


def test_nan_weights_and_gradients_stay_where_they_belong() -> None:
    args, grad_out = prepared(case("small", [(3, 4), (2, 2)], 6, points=3, dim=8, reach=3.0), torch.float32)
    locations, weights = args.sampling_locations.clone(), args.attention_weights.clone()
    weights[0, 1, 0] = float("nan")
    weights[1, 4], locations[1, 4] = float("nan"), 7.0  # NaN · 0
    args = args._replace(sampling_locations=locations, attention_weights=weights)
    out, _ = expected(args, grad_out)
    assert_close(forward(args), out, "sample", torch.float32, "output")
    grad_out = grad_out.clone()
    grad_out[1, 2, 3] = float("nan")
    _, grads = expected(args, grad_out)
    got = backward(args, grad_out)
    assert torch.equal(got.weights.isnan(), grads.weights.isnan())
    assert torch.equal(got.locations.isnan(), grads.locations.isnan())
    touched = grads.value.isnan()
    assert not (got.value.isnan() & ~touched).any()


@pytest.mark.parametrize("change", [{"levels": 17}, {"levels": 0}, {"dtype": 3}, {"pixels": 1 << 30}, {"queries": -1}])
def test_sizes_that_the_kernels_do_not_take_are_refused(change: dict[str, int]) -> None:
    args, _ = prepared(by_name("one_level"), torch.float32)
    params = params_of(args)
    for name, value in change.items():
        setattr(params, name, value)
    out = torch.zeros(4096)
    ran = host.run(
        host.program(SOURCE, "asan"), "accel_ms_deform_attn_forward", params, {**inputs_of(args), "out": out}
    )
    assert ran.code == 3
    assert "returned 1" in ran.report


def test_too_little_scratch_memory_is_refused() -> None:
    args, grad_out = prepared(by_name("one_level"), torch.float32)
    with pytest.raises(AssertionError, match="returned 1"):
        backward(args, grad_out, images=0)


@pytest.mark.parametrize("empty", ["batch", "queries", "points"])
def test_empty_calls(empty: str) -> None:
    args, grad_out = prepared(by_name("one_level"), torch.float32)
    value, locations, weights = args[:3]
    if empty == "batch":
        value, locations, weights, grad_out = value[:0], locations[:0], weights[:0], grad_out[:0]
    elif empty == "queries":
        locations, weights, grad_out = locations[:, :0], weights[:, :0], grad_out[:, :0]
    else:
        locations, weights = locations[:, :, :, :0].contiguous(), weights[:, :, :, :0].contiguous()
    points = [0] if empty == "points" else args.num_points
    given = args._replace(
        value=value,
        sampling_locations=locations.contiguous(),
        attention_weights=weights.contiguous(),
        num_points=points,
    )
    assert not forward(given, "asan").any()
    grads = backward(given, grad_out.contiguous(), "asan")
    assert grads.value.shape == value.shape
    assert not grads.value.any()
