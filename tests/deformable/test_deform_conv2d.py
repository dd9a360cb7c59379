"""Deformable convolution: the common checks on awkward calls, independent oracles, and bad input."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from _bad import Bad, check_bad, each, zeros
from _deform_conv2d_cases import BACKENDS, BEHAVIOUR, CASES, GRADIENTS, available, by_name
from _hats import Sample

import accel
from accel import dispatch, testing
from accel.ops.deformable.deform_conv2d import OP
from accel.testing import assert_same, check_op

CHECKS = list(check_op(accel.deform_conv2d, CASES, BEHAVIOUR, GRADIENTS, BACKENDS))


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


# --- oracles ---


def pair(value):
    return (value, value) if isinstance(value, int) else value


def naive(grad_out, *, input, offset, weight, bias=None, mask=None, stride=1, padding=0, dilation=1,
          border_gradient=True):  # fmt: skip
    """The definition, sample by sample in float64: the output and its gradients where ``grad_out`` arrives."""
    n, channels, height, width = input.shape
    outputs, per_group, kh, kw = weight.shape
    (sy, sx), (py, px), (dy, dx) = pair(stride), pair(padding), pair(dilation)
    ho, wo = (height + 2 * py - dy * (kh - 1) - 1) // sy + 1, (width + 2 * px - dx * (kw - 1) - 1) // sx + 1
    offset_groups = offset.shape[1] // (2 * kh * kw)
    shared = channels // offset_groups
    dense = torch.zeros(outputs, channels, kh, kw, dtype=torch.float64)  # the weight, 0 between groups
    for o in range(outputs):
        first = o // (outputs // (channels // per_group)) * per_group
        dense[o, first : first + per_group] = weight[o]
    out = torch.zeros(n, outputs, ho, wo, dtype=torch.float64)
    if bias is not None:
        out += bias.view(1, -1, 1, 1)
    grads = {"input": torch.zeros_like(input), "offset": torch.zeros_like(offset), "weight": torch.zeros_like(dense)}
    grads["mask"] = None if mask is None else torch.zeros_like(mask)
    grads["bias"] = None if bias is None else grad_out.sum((0, 2, 3))
    for b, q, i, j in itertools.product(range(n), range(offset_groups), range(ho), range(wo)):
        some = slice(q * shared, (q + 1) * shared)
        for a, e in itertools.product(range(kh), range(kw)):
            k = q * kh * kw + a * kw + e
            y = i * sy - py + a * dy + float(offset[b, 2 * k, i, j])
            x = j * sx - px + e * dx + float(offset[b, 2 * k + 1, i, j])
            m = 1.0 if mask is None else float(mask[b, k, i, j])
            sample = Sample(input[b, some], y, x, border_gradient)
            out[b, :, i, j] += dense[:, some, a, e] @ (m * sample.value)
            column = grad_out[b, :, i, j] @ dense[:, some, a, e]
            grads["weight"][:, some, a, e] += torch.outer(grad_out[b, :, i, j], m * sample.value)
            grads["input"][b, some] += (m * column).view(-1, 1, 1) * sample.weights
            grads["offset"][b, 2 * k, i, j] = m * float(column @ sample.slope_y)
            grads["offset"][b, 2 * k + 1, i, j] = m * float(column @ sample.slope_x)
            if mask is not None:
                grads["mask"][b, k, i, j] = float(column @ sample.value)
    for o in range(outputs):
        first = o // (outputs // (channels // per_group)) * per_group
        grads["weight"][o, :per_group] = grads["weight"][o, first : first + per_group].clone()
    grads["weight"] = grads["weight"][:, :per_group]
    return out, grads


@pytest.mark.parametrize(
    "name",
    ["v1", "v2", "all_different", "groups_across", "groups_within", "depthwise_multiplied", "padding_beyond_kernel",
     "stride_beyond_kernel", "one_pixel", "not_finite", "exact", "exact_strided", "exact_integers", "exact_no_border",
     "exact_far"],
)  # fmt: skip
def test_reference_is_the_definition(name):
    tensors, kwargs = by_name(name).make(torch.float64, "cpu", 1)
    out = accel.deform_conv2d(**tensors, **kwargs, backend="reference")
    grad_out = testing.random_like(out)
    expected, grads = naive(grad_out, **tensors, **kwargs)
    got = testing.run(accel.deform_conv2d, tensors, kwargs, "reference", grad_out=grad_out)
    torch.testing.assert_close(got.out, expected, rtol=1e-12, atol=1e-12)
    for n, grad in got.grads.items():
        torch.testing.assert_close(grad, grads[n], rtol=1e-12, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}")


def torchvisions():
    """torchvision's operator, where its native part loads."""
    ops = pytest.importorskip("torchvision.ops")
    try:
        ops.deform_conv2d(torch.zeros(1, 1, 1, 1), torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, 1))
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        pytest.skip(f"torchvision's native operator does not load: {str(error).splitlines()[0]}")
    return ops.deform_conv2d


# its CPU code dies of a NaN, and it has one rule for the border
@pytest.mark.parametrize("name", [c.name for c in CASES if c.name not in ("not_finite", "exact_no_border")])
def test_reference_is_torchvision(name):
    theirs = torchvisions()
    tensors, kwargs = by_name(name).make(torch.float64, "cpu", 1)
    out = accel.deform_conv2d(**tensors, **kwargs, backend="reference")
    grad_out = testing.random_like(out)
    got = testing.run(accel.deform_conv2d, tensors, kwargs, "reference", grad_out=grad_out)
    want = testing.run(lambda backend, **given: theirs(**given), tensors, kwargs, None, grad_out=grad_out)
    for n, expected in want.named().items():
        torch.testing.assert_close(got.named()[n], expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", ["v1", "groups", "all_different", "kernel_5x3", "stride_2x3", "v2_channels_last"])
def test_without_offsets_it_is_a_convolution(name):
    tensors, kwargs = by_name(name).make(torch.float64, "cpu", 1)
    tensors["offset"] = torch.zeros_like(tensors["offset"])
    if "mask" in tensors:
        tensors["mask"] = torch.ones_like(tensors["mask"])
    groups = tensors["input"].shape[1] // tensors["weight"].shape[1]
    expected = F.conv2d(tensors["input"], tensors["weight"], tensors.get("bias"), groups=groups, **kwargs)
    got = accel.deform_conv2d(**tensors, **kwargs, backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# --- what the common checks do not ask ---

# on the map [[1, 2], [3, 5], [7, 11]]: position, sample, its derivatives by y and x, from the right where it has two
BELOW = math.nextafter(-1.0, -2.0)
BORDER = [
    ((0.0, 0.0), (1.0, 2.0, 1.0)),
    ((1.5, 0.5), (6.5, 5.0, 3.0)),
    ((2.0, 0.0), (7.0, -7.0, 4.0)),
    ((2.0, 1.0), (11.0, -11.0, -11.0)),
    ((2.5, 1.5), (2.75, -5.5, -5.5)),
    ((-1.0, 0.0), (0.0, 1.0, 0.0)),
    ((-1.0, 0.5), (0.0, 1.5, 0.0)),
    ((0.0, -1.0), (0.0, 0.0, 1.0)),
    ((-1.0, -1.0), (0.0, 0.0, 0.0)),
    ((-0.5, -0.5), (0.25, 0.5, 0.5)),
    ((-1.25, 0.0), (0.0, 0.0, 0.0)),
    ((BELOW, 0.0), (0.0, 1.0, 0.0)),  # in float32 this is −1 again
    ((3.0, 0.0), (0.0, 0.0, 0.0)),
    ((0.0, 2.0), (0.0, 0.0, 0.0)),
    ((3.0, 2.0), (0.0, 0.0, 0.0)),
    ((math.nan, 0.0), (0.0, 0.0, 0.0)),
    ((0.0, math.nan), (0.0, 0.0, 0.0)),
    ((math.inf, 0.0), (0.0, 0.0, 0.0)),
    ((0.0, -math.inf), (0.0, 0.0, 0.0)),
    ((1e30, 1e30), (0.0, 0.0, 0.0)),
    ((0.0, -1e30), (0.0, 0.0, 0.0)),
    ((3e9, 0.0), (0.0, 0.0, 0.0)),
    ((0.0, -5e9), (0.0, 0.0, 0.0)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 19])
@pytest.mark.parametrize("border", [True, False])
def test_positions_at_the_border_and_beyond(backend, dtype, channels, border):
    image = torch.tensor([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0]], dtype=dtype)
    tensors = {
        "input": image.expand(len(BORDER), channels, 3, 2).contiguous(),
        "offset": torch.tensor([at for at, _ in BORDER]).view(-1, 2, 1, 1),
        "weight": torch.eye(channels, dtype=dtype).view(channels, channels, 1, 1),
        "mask": torch.full((len(BORDER), 1, 1, 1), 2.0),
    }
    kwargs = {"stride": (3, 2), "border_gradient": border}  # one output, at (0, 0)
    available(backend, tensors, kwargs)
    got = testing.run(accel.deform_conv2d, tensors, kwargs, backend)
    for i, (at, (value, slope_y, slope_x)) in enumerate(BORDER):
        if not border and -1.0 in tensors["offset"][i].flatten().tolist():
            slope_y = slope_x = 0.0
        assert got.out[i].flatten().tolist() == [2 * value] * channels, at
        assert got.grads["offset"][i].flatten().tolist() == [2 * channels * slope_y, 2 * channels * slope_x], at
        assert got.grads["mask"][i].item() == channels * value, at
        assert got.grads["input"][i].isfinite().all(), at
        assert (got.grads["input"][i].count_nonzero() > 0) == (value > 0), at


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e38])
def test_an_offset_that_is_not_finite_takes_its_sample_out(backend, dtype, value):
    tensors, kwargs = by_name("groups_across").make(dtype, "cpu", 0)
    available(backend, tensors, kwargs)
    bad, out = tensors["offset"].clone(), tensors["offset"].clone()
    bad.view(-1)[3::7], out.view(-1)[3::7] = value, 1000.0
    got, want = (testing.run(accel.deform_conv2d, {**tensors, "offset": o}, kwargs, backend) for o in (bad, out))
    for name, expected in want.named().items():
        assert expected.isfinite().all()
        assert_same(got.named()[name], expected, f"{name} with {value} for an offset")
    assert (got.grads["offset"].view(-1)[3::7] == 0).all()
    assert got.grads["offset"].count_nonzero() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["groups_across", "v2_channels_last", "72_to_17_channels_last"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("pixel", [(0, 0), (2, 3), (-1, -1)])
def test_what_is_not_finite_in_the_map_stays_where_it_is_sampled(backend, name, value, pixel):
    tensors, kwargs = by_name(name).make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    clean = testing.run(accel.deform_conv2d, tensors, kwargs, backend)
    at = (0, 3, *pixel)
    bad = tensors["input"].clone()
    bad[at] = value
    got = testing.run(accel.deform_conv2d, {**tensors, "input": bad}, kwargs, backend)
    mark = {**tensors, "input": torch.zeros_like(bad), "weight": torch.ones_like(tensors["weight"])}
    mark["input"][at] = 1.0
    mark["bias"], mark["mask"] = torch.zeros_like(tensors["bias"]), torch.ones_like(tensors["mask"])
    hit = accel.deform_conv2d(**mark, **kwargs, backend="reference") > 0
    assert 0 < hit.sum() < hit.numel()
    assert not got.out[hit].isfinite().any()
    assert_same(got.out[~hit], clean.out[~hit], "outputs that do not sample the pixel")
    assert_same(got.grads["input"], clean.grads["input"], "gradient of the input, which does not depend on it")
    taken = (got.grads["offset"] != clean.grads["offset"]).any(1)
    assert (taken <= hit.any(1)).all(), "offsets of samples elsewhere have another gradient"


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_format_follows_the_input(backend):
    tensors, kwargs = by_name("v2").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    plain = testing.run(accel.deform_conv2d, tensors, kwargs, backend)
    assert plain.out.is_contiguous()
    assert plain.grads["input"].is_contiguous()
    last = tensors["input"].contiguous(memory_format=torch.channels_last)
    wide = torch.cat([last, last], 1).contiguous(memory_format=torch.channels_last)
    for moved in (last, wide[:, :8], F.pad(last, (1, 1)).contiguous(memory_format=torch.channels_last)[..., 1:-1]):
        for upstream in (None, torch.ones_like(plain.out)):
            got = testing.run(accel.deform_conv2d, {**tensors, "input": moved}, kwargs, backend, grad_out=upstream)
            assert got.out.is_contiguous(memory_format=torch.channels_last)
            if backend != "reference":
                assert got.grads["input"].is_contiguous(memory_format=torch.channels_last)
            for name, expected in plain.named().items():
                assert_same(got.named()[name], expected, f"{name}, channels_last")


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_is_fresh(backend):
    tensors, kwargs = by_name("one_pixel_one_tap").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    before = {n: t.clone() for n, t in tensors.items()}
    accel.deform_conv2d(**tensors, **kwargs, backend=backend).zero_()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), f"{name} changed with the output"


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_tensors_of_any_dtype(backend):
    tensors, kwargs = by_name("v2").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    plain = testing.run(accel.deform_conv2d, tensors, kwargs, backend)
    double = {n: t.double() if n in ("offset", "mask", "bias") else t for n, t in tensors.items()}
    got = testing.run(accel.deform_conv2d, double, kwargs, backend)
    for name, expected in plain.named().items():
        assert_same(got.named()[name].float(), expected, name)
    assert got.grads["offset"].dtype == got.grads["mask"].dtype == got.grads["bias"].dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_brings_input_and_weight_to_one_dtype(backend):
    tensors, kwargs = by_name("v2").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    half = {n: t.bfloat16() if n == "input" else t for n, t in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = accel.deform_conv2d(**half, **kwargs, backend=backend)
    half["weight"] = half["weight"].bfloat16()
    assert got.dtype == torch.bfloat16
    assert_same(got, accel.deform_conv2d(**half, **kwargs, backend=backend), "autocast")


def test_reference_in_parts_is_the_same(monkeypatch):
    module = __import__("accel.ops.deformable.deform_conv2d", fromlist=["COLUMNS_AT_ONCE"])
    tensors, kwargs = by_name("batch_5").make(torch.float64, "cpu", 0)
    whole_ = testing.run(accel.deform_conv2d, tensors, kwargs, "reference")
    per_image = 4 * 9 * tensors["offset"][0, 0].numel()
    for limit in (1, 2 * per_image, 4 * per_image):
        monkeypatch.setattr(module, "COLUMNS_AT_ONCE", limit)
        got = testing.run(accel.deform_conv2d, tensors, kwargs, "reference")
        for name, expected in whole_.named().items():
            torch.testing.assert_close(got.named()[name], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_may_come_in_pairs(backend):
    tensors, _ = by_name("v2").make(torch.float32, "cpu", 0)
    tensors["offset"], tensors["mask"] = tensors["offset"][:, :, :3, :3], tensors["mask"][:, :, :3, :3]
    available(backend, tensors, {"stride": 2, "padding": 1, "dilation": (1, 2)})
    got = [
        accel.deform_conv2d(**tensors, stride=s, padding=p, dilation=d, backend=backend)
        for s, p, d in ((2, 1, (1, 2)), ((2, 2), [1, 1], [1, 2]), ([2, 2], (1, 1), torch.Size((1, 2))))
    ]
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


LEVELS = testing.check_levels(
    accel.deform_conv2d,
    map(
        by_name,
        [
            "v2",
            "v2_channels_last",
            "all_different",
            "groups_across",
            "72_to_17_channels_last",
            "not_finite",
            "exact_17_channels",
            "exact_groups",
        ],
    ),
)


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in LEVELS])
def test_every_instruction_set(check):
    check()


def test_compiled_by_inductor():
    tensors, kwargs = BEHAVIOUR[0].make(torch.float32, "cpu", 0)
    backend = next(n for n, r in dispatch.reasons(OP, OP.prepare(**tensors, **kwargs)).items() if r is None)
    testing.check_compile(accel.deform_conv2d, BEHAVIOUR[0], backend, compiler="inductor")


def test_flops_are_counted_the_same_for_every_backend():
    images, positions, out, per_group, taps = 2, 5 * 6, 12, 2, 9
    expected = 3 * 2 * images * positions * out * per_group * taps
    testing.check_flops(accel.deform_conv2d, by_name("groups"), BACKENDS, expected, backward=True)


# --- bad input: an error that holds the numbers, before any kernel runs ---


BAD = [
    Bad("not_a_tensor", TypeError, "input must be .* got list", {"input": [1.0]}),
    Bad("integer_input", TypeError, "input must be .* torch.int64", {"input": zeros(2, 4, 5, 6, dtype=torch.int64)}),
    Bad("bool_input", TypeError, "input must be .* torch.bool", {"input": zeros(2, 4, 5, 6, dtype=torch.bool)}),
    Bad("integer_offset", TypeError, "offset must .* torch.int32", {"offset": zeros(2, 18, 5, 6, dtype=torch.int32)}),
    Bad("no_offset", TypeError, "offset must .* NoneType", {"offset": None}),
    Bad("integer_weight", TypeError, "weight must .* torch.int8", {"weight": zeros(6, 4, 3, 3, dtype=torch.int8)}),
    Bad("integer_mask", TypeError, "mask must .* torch.uint8", {"mask": zeros(2, 9, 5, 6, dtype=torch.uint8)}),
    Bad("bool_mask", TypeError, "mask must .* torch.bool", {"mask": zeros(2, 9, 5, 6, dtype=torch.bool)}),
    Bad("integer_bias", TypeError, "bias must .* torch.int64", {"bias": zeros(6, dtype=torch.int64)}),
    Bad("complex_input", TypeError, "torch.complex64", {"input": zeros(2, 4, 5, 6, dtype=torch.complex64)}),
    Bad("two_dtypes", TypeError, "float32, .*bfloat16", {"weight": zeros(6, 4, 3, 3, dtype=torch.bfloat16)}),
    Bad("double_input", TypeError, "torch.float64, .*torch.float32", {"input": zeros(2, 4, 5, 6, dtype=torch.float64)}),
    Bad("rank_3", ValueError, r"\(4, 5, 6\)", {"input": zeros(4, 5, 6)}),
    Bad("no_channels", ValueError, r"\(2, 0, 5, 6\)", {"input": zeros(2, 0, 5, 6)}),
    Bad("no_rows", ValueError, r"\(2, 4, 0, 6\)", {"input": zeros(2, 4, 0, 6)}),
    Bad("no_columns", ValueError, r"\(2, 4, 5, 0\)", {"input": zeros(2, 4, 5, 0)}),
    Bad("weight_rank", ValueError, r"\(6, 4, 3\)", {"weight": zeros(6, 4, 3)}),
    Bad("weight_empty", ValueError, r"\(0, 4, 3, 3\)", {"weight": zeros(0, 4, 3, 3)}),
    Bad("weight_without_taps", ValueError, r"\(6, 4, 3, 0\)", {"weight": zeros(6, 4, 3, 0)}),
    Bad("groups_do_not_divide_input", ValueError, r"4 input channels.*\(6, 3, 3, 3\)", {"weight": zeros(6, 3, 3, 3)}),
    Bad("weight_wider_than_input", ValueError, r"4 input channels.*\(6, 8, 3, 3\)", {"weight": zeros(6, 8, 3, 3)}),
    Bad("groups_do_not_divide_output", ValueError, r"\(6, 1, 3, 3\).*4 groups", {"weight": zeros(6, 1, 3, 3)}),
    Bad("offset_rank", ValueError, r"\(2, 18, 30\)", {"offset": zeros(2, 18, 30)}),
    Bad("offset_of_other_batch", ValueError, r"\(2, 2\*G\*9, 5, 6\).*\(1, 18, 5, 6\)", {"offset": zeros(1, 18, 5, 6)}),
    Bad("offset_of_other_size", ValueError, r"\(2, 2\*G\*9, 5, 6\).*\(2, 18, 5, 5\)", {"offset": zeros(2, 18, 5, 5)}),
    Bad("offset_without_channels", ValueError, "0 channels are 0 groups", {"offset": zeros(2, 0, 5, 6)}),
    Bad("offset_of_half_a_group", ValueError, r"27 channels are 1.5 groups", {"offset": zeros(2, 27, 5, 6)}),
    Bad("offset_for_one_axis", ValueError, r"9 channels are 0.5 groups", {"offset": zeros(2, 9, 5, 6)}),
    Bad("offset_groups_too_many", ValueError, "4 input .*54 channels are 3 groups", {"offset": zeros(2, 54, 5, 6)}),
    Bad("mask_of_other_groups", ValueError, r"must be \(2, 9, 5, 6\).*\(2, 18, 5, 6\)", {"mask": zeros(2, 18, 5, 6)}),
    Bad("mask_of_other_size", ValueError, r"must be \(2, 9, 5, 6\).*\(2, 9, 6, 6\)", {"mask": zeros(2, 9, 6, 6)}),
    Bad("mask_of_other_batch", ValueError, r"must be \(2, 9, 5, 6\).*\(1, 9, 5, 6\)", {"mask": zeros(1, 9, 5, 6)}),
    Bad("mask_rank", ValueError, r"\(9, 5, 6\)", {"mask": zeros(9, 5, 6)}),
    Bad("bias_shape", ValueError, r"bias must be \(6,\), got .*\(4,\)", {"bias": zeros(4)}),
    Bad("bias_rank", ValueError, r"bias must be \(6,\), got .*\(6, 1\)", {"bias": zeros(6, 1)}),
    Bad("offset_elsewhere", ValueError, "offset is on meta .* cpu", {"offset": zeros(2, 18, 5, 6, device="meta")}),
    Bad("weight_elsewhere", ValueError, "weight is on meta .* cpu", {"weight": zeros(6, 4, 3, 3, device="meta")}),
    Bad("mask_elsewhere", ValueError, "mask is on meta .* cpu", {"mask": zeros(2, 9, 5, 6, device="meta")}),
    Bad("bias_elsewhere", ValueError, "bias is on meta .* cpu", {"bias": zeros(6, device="meta")}),
    Bad("stride_0", ValueError, "stride must be at least 1, got stride=0", {"stride": 0}),
    Bad("stride_negative", ValueError, r"at least 1, got stride=\(1, -2\)", {"stride": (1, -2)}),
    Bad("stride_of_3", ValueError, r"stride=\(1, 1, 1\)", {"stride": (1, 1, 1)}),
    Bad("stride_of_1", ValueError, r"stride=\[1\]", {"stride": [1]}),
    Bad("stride_no_integer", TypeError, "stride=1.5", {"stride": 1.5}),
    Bad("padding_negative", ValueError, "padding must be at least 0, got padding=-1", {"padding": -1}),
    Bad("padding_named", TypeError, "padding='same'", {"padding": "same"}),
    Bad("dilation_0", ValueError, r"dilation must be at least 1, got dilation=\(1, 0\)", {"dilation": (1, 0)}),
    Bad("output_empty", ValueError, "be 1 x 0: a map of 5 x 6 .* kernel of 3 x 3", {"padding": 0, "dilation": (2, 3)}),
    Bad("output_negative", ValueError, "would be -3 x 6: .*dilation=.5, 1.", {"dilation": (5, 1)}),
    Bad("no_such_backend", ValueError, "no backend 'cuda9'; it has cpu", {"backend": "cuda9"}),
]  # fmt: skip


@each(BAD)
def test_bad_input(bad):
    good = {"input": zeros(2, 4, 5, 6), "offset": zeros(2, 18, 5, 6), "weight": zeros(6, 4, 3, 3), "padding": 1}
    good |= {"mask": zeros(2, 9, 5, 6), "bias": zeros(6)}
    check_bad(accel.deform_conv2d, good, bad)


def test_double_runs_on_the_reference_alone():
    tensors, kwargs = BEHAVIOUR[0].make(torch.float64, "cpu", 0)
    assert accel.deform_conv2d(**tensors, **kwargs).dtype == torch.float64
    for backend in ("cpu", "triton"):
        with pytest.raises(NotImplementedError, match=f"backend '{backend}' cannot run this call: ."):
            accel.deform_conv2d(**tensors, **kwargs, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_where_every_size_varies(dtype):
    """In fp64 kernels refuse, and those of Triton are asked as well."""
    generator = torch.Generator().manual_seed(0)

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def compiled(x, offset, weight):
        return accel.deform_conv2d(x, offset, weight, padding=1)

    for channels, size in ((4, 5), (6, 7), (10, 4)):
        x = torch.randn(2, channels, size, size + 1, generator=generator, dtype=dtype)
        weight = torch.randn(channels + 2, channels, 3, 3, generator=generator, dtype=dtype)
        offset = torch.randn(2, 18, size, size + 1, generator=generator, dtype=dtype)
        assert torch.equal(compiled(x, offset, weight), accel.deform_conv2d(x, offset, weight, padding=1))
