"""The CPU kernels that ms_deform_attn and deform_attention2d share: sizes that turn to another path, memory, and the
checks of the native ops."""

import dataclasses

import pytest
import torch

import accel
from accel import dispatch, testing
from accel.benchmarks._machine import peak_memory
from accel.ops.deformable import deform_attention2d, ms_deform_attn
from accel.testing import Case

pytestmark = pytest.mark.skipif(
    dispatch.leaf_reason("accel._C") is not None, reason=f"no accel._C: {dispatch.leaf_reason('accel._C')}"
)


def levels(shapes, queries, points, heads, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    places = (1, queries, heads, len(shapes), points)
    sizes = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float64)
    # half a pixel from the border or more and far from any integer: no rounding of a position chooses a side
    pixel = (torch.rand((*places, 2), generator=generator) * (sizes[:, None] - 1)).floor() + 0.3
    tensors = {
        "value": torch.randn((1, sum(h * w for h, w in shapes), heads, dim), generator=generator),
        "sampling_locations": ((pixel + 0.5) / sizes[:, None]).float(),
        "attention_weights": torch.rand(places, generator=generator) / points,
    }
    return tensors, {"spatial_shapes": shapes, "level_start_index": None}


SIZES = {
    "more_maps_than_threads": ([(60, 50), (30, 25)], 480, 16, 18, 64),
    "packed_in_parts": ([(40, 30)], 300, 40, 2, 32),
    "more_points_than_a_block": ([(7, 6), (3, 3)], 3, 150, 2, 5),
    "many_queries_and_a_small_map": ([(4, 4)], 1000, 2, 2, 16),
    "few_queries": ([(50, 60)], 3, 4, 8, 32),
}


@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_take_another_path(name, dtype):
    if name == "more_maps_than_threads" and dtype != torch.float32:
        pytest.skip("takes long, and turns are the same for every dtype")

    def make(asked, device, seed):
        tensors, kwargs = levels(*SIZES[name], seed)
        wide = torch.float64 if asked == torch.float64 else torch.float32
        return {n: t.to(asked if n == "value" else wide) for n, t in tensors.items()}, kwargs

    case = Case(name, make, "sample")
    testing.check_values(accel.ms_deform_attn, case, "cpu", dtype)
    tensors, kwargs = make(dtype, "cpu", 0)
    with testing.threads(1):
        first = testing.run(accel.ms_deform_attn, tensors, kwargs, "cpu")
    for count in (2, 3, 4):
        with testing.threads(count):
            again = testing.run(accel.ms_deform_attn, tensors, kwargs, "cpu")
        for n, expected in first.named().items():
            testing.assert_same(again.named()[n], expected, f"{n} on {count} threads")


@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96])
def test_a_large_output_is_that_of_its_parts(dim, dtype):
    queries = 16 * 2**20 // (8 * dim * dtype.itemsize) + 5  # 16 MiB and more are stored past the caches
    tensors, kwargs = levels([(4, 5), (2, 3)], queries, 1, 8, dim)
    value = tensors["value"].to(dtype)
    places = tensors["sampling_locations"], tensors["attention_weights"]
    whole = accel.ms_deform_attn(value, kwargs["spatial_shapes"], None, *places, backend="cpu")
    halves = [
        accel.ms_deform_attn(value, kwargs["spatial_shapes"], None, *(x[:, part] for x in places), backend="cpu")
        for part in (slice(0, queries // 2), slice(queries // 2, queries))
    ]
    testing.assert_same(whole, torch.cat(halves, 1), f"{queries} queries")


def test_memory_beside_arguments_and_results_is_bounded():
    tensors, kwargs = levels([(100, 167), (50, 84)], 5000, 16, 8, 32)
    for x in tensors.values():
        x.requires_grad_()

    def call():
        out = accel.ms_deform_attn(**tensors, **kwargs, backend="cpu")
        return out, *torch.autograd.grad(out.sum(), list(tensors.values()))

    with testing.threads(2):
        results = sum(x.numel() * x.element_size() for x in call()) / 2**20
        peak = peak_memory(call, "cpu")
    if peak is None:
        pytest.skip("this system does not tell peak memory")
    gradient = 5000 * 8 * 32 * 4 / 2**20  # of the output, made contiguous
    assert peak - results - gradient < 32, f"{peak:.1f} MiB, of which {results:.1f} are results"


# --- whoever calls the native ops: what protects memory is checked there ---


def native_ms_deform_attn(**change):
    tensors, kwargs = levels([(4, 5), (2, 3)], 3, 2, 2, 4)
    args = ms_deform_attn.OP.prepare(**tensors, **kwargs)._asdict() | change
    out = torch.ops.accel_native.ms_deform_attn_forward.default(*args.values())
    grad = change.get("grad_out", torch.ones(1, 3, 8))
    torch.ops.accel_native.ms_deform_attn_backward.default(grad, *args.values(), [True] * 3)
    return out


def native_deform_attention2d(**change):
    tensors = {"input": torch.ones(1, 5, 6, 8), "offset": torch.zeros(1, 5, 6, 2, 9, 2)}
    tensors["mask"] = torch.ones(1, 5, 6, 2, 9)
    args = deform_attention2d.OP.prepare(**tensors, kernel_size=3, padding=1)._asdict() | change
    out = torch.ops.accel_native.deform_attention2d_forward.default(*args.values())
    grad = change.get("grad_out", torch.ones(1, 5, 6, 8))
    torch.ops.accel_native.deform_attention2d_backward.default(grad, *args.values(), [True] * 3)
    return out


@dataclasses.dataclass
class Bad:
    name: str
    change: dict


MSDA = [
    Bad("value_of_other_batch", {"value": torch.zeros(2, 26, 2, 4)}),
    Bad("value_of_other_heads", {"value": torch.zeros(1, 26, 3, 4)}),
    Bad("strided_value", {"value": torch.zeros(1, 26, 2, 8)[..., ::2]}),
    Bad("integer_value", {"value": torch.zeros(1, 26, 2, 4, dtype=torch.int32)}),
    Bad("no_pixels", {"value": torch.zeros(1, 0, 2, 4)}),
    Bad("flat_value", {"value": torch.zeros(26, 8)}),
    Bad("half_locations", {"sampling_locations": torch.zeros(1, 3, 2, 4, 2).half()}),
    Bad("locations_of_fewer_points", {"sampling_locations": torch.zeros(1, 3, 2, 3, 2)}),
    Bad("locations_of_3", {"sampling_locations": torch.zeros(1, 3, 2, 4, 3)}),
    Bad("short_weights", {"attention_weights": torch.zeros(1, 2, 2, 4)}),
    Bad("int32_shapes", {"spatial_shapes": torch.zeros(2, 2, dtype=torch.int32)}),
    Bad("short_shapes", {"spatial_shapes": torch.zeros(1, 2, dtype=torch.int64)}),
    Bad("short_starts", {"level_start_index": torch.zeros(1, dtype=torch.int64)}),
    Bad("points_of_3_levels", {"num_points": [1, 2, 1]}),
    Bad("negative_points", {"num_points": [5, -1]}),
    Bad("too_many_points", {"num_points": [2**62, 2]}),
    Bad("no_points", {"num_points": [0, 0]}),
    Bad("short_gradient", {"grad_out": torch.ones(1, 2, 8)}),
    Bad("half_gradient", {"grad_out": torch.ones(1, 3, 8).half()}),
]

DCN = [
    Bad("strided_input", {"input": torch.zeros(1, 5, 6, 16)[..., ::2]}),
    Bad("input_of_other_channels", {"input": torch.zeros(1, 5, 6, 7)}),
    Bad("no_pixels", {"input": torch.zeros(1, 0, 6, 8)}),
    Bad("offset_of_other_batch", {"offset": torch.zeros(2, 5, 6, 2, 9, 2)}),
    Bad("offset_of_fewer_taps", {"offset": torch.zeros(1, 5, 6, 2, 8, 2)}),
    Bad("half_offset", {"offset": torch.zeros(1, 5, 6, 2, 9, 2).half()}),
    Bad("short_mask", {"mask": torch.zeros(1, 5, 5, 2, 9)}),
    Bad("no_kernel", {"kernel_size": [0, 3]}),
    Bad("huge_kernel", {"kernel_size": [2**40, 2**40]}),
    Bad("one_number", {"stride": [1]}),
    Bad("huge_dilation", {"dilation": [2**62, 1]}),
    Bad("centre_that_is_there", {"remove_center": True}),
    Bad("short_gradient", {"grad_out": torch.ones(1, 5, 6, 7)}),
]


@pytest.mark.parametrize("bad", MSDA, ids=lambda bad: bad.name)
def test_native_ms_deform_attn_checks_what_it_addresses(bad):
    assert native_ms_deform_attn().shape == (1, 3, 8)
    with pytest.raises(RuntimeError):
        native_ms_deform_attn(**bad.change)


@pytest.mark.parametrize("bad", DCN, ids=lambda bad: bad.name)
def test_native_deform_attention2d_checks_what_it_addresses(bad):
    assert native_deform_attention2d().shape == (1, 5, 6, 8)
    with pytest.raises(RuntimeError):
        native_deform_attention2d(**bad.change)
