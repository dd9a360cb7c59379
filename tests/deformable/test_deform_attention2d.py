"""DCNv3's and DCNv4's attention: the common checks on awkward calls, independent oracles, and bad input."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from _bad import Bad, check_bad, each, zeros
from _deform_attention2d_cases import BACKENDS, BEHAVIOUR, CASES, GRADIENTS, available, by_name, pair
from _hats import Sample

import accel
from accel import dispatch, testing
from accel.ops.deformable.deform_attention2d import OP
from accel.testing import assert_close, assert_same, check_op

CHECKS = list(check_op(accel.deform_attention2d, CASES, BEHAVIOUR, GRADIENTS, BACKENDS))


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


# --- oracles ---


def naive(
    grad_out, *, input, offset, mask, kernel_size, stride=1, padding=0, dilation=1, offset_scale=1.0,
    remove_center=False, softmax=False,
):  # fmt: skip
    """The definition, sample by sample in float64: the output and its gradients where ``grad_out`` arrives."""
    (kh, kw), (sy, sx), (py, px), (dy, dx) = (pair(v) for v in (kernel_size, stride, padding, dilation))
    batch, ho, wo, groups, count, _ = offset.shape
    per_group = input.shape[3] // groups
    middle_y, middle_x = dy * (kh - 1) // 2, dx * (kw - 1) // 2
    taps = [(a, e) for e in range(kw) for a in range(kh) if not remove_center or (a, e) != (kh // 2, kw // 2)]
    assert len(taps) == count
    out = torch.zeros(batch, ho, wo, input.shape[3], dtype=torch.float64)
    grads = {"input": torch.zeros_like(input), "offset": torch.zeros_like(offset), "mask": torch.zeros_like(mask)}
    for n, i, j, g in itertools.product(range(batch), range(ho), range(wo), range(groups)):
        some = slice(g * per_group, (g + 1) * per_group)
        image, upstream = input[n, ..., some].permute(2, 0, 1), grad_out[n, i, j, some]
        raw = mask[n, i, j, g]
        weights = torch.softmax(raw, 0) if softmax else raw
        grad_weights = torch.zeros(count, dtype=torch.float64)
        for k, (a, e) in enumerate(taps):
            shift_x, shift_y = offset[n, i, j, g, k].tolist()
            y = i * sy - py + middle_y + (a * dy - middle_y + shift_y) * offset_scale
            x = j * sx - px + middle_x + (e * dx - middle_x + shift_x) * offset_scale
            sample = Sample(image, y, x)
            out[n, i, j, some] += weights[k] * sample.value
            grads["input"][n, ..., some] += (weights[k] * upstream) * sample.weights[..., None]
            grads["offset"][n, i, j, g, k, 0] = weights[k] * offset_scale * float(upstream @ sample.slope_x)
            grads["offset"][n, i, j, g, k, 1] = weights[k] * offset_scale * float(upstream @ sample.slope_y)
            grad_weights[k] = float(upstream @ sample.value)
        grads["mask"][n, i, j, g] = weights * (grad_weights - weights @ grad_weights) if softmax else grad_weights
    return out, grads


@pytest.mark.parametrize(
    "name",
    ["v4", "v3", "without_centre_softmax", "scaled_down", "turned_round", "kernel_5x3_without_centre",
     "kernel_2x4_dilated", "kernel_2x4_spread", "all_different", "padding_beyond_kernel", "one_pixel", "3_groups_of_7",
     "not_finite", "not_finite_softmax", "exact", "exact_without_centre", "exact_strided", "exact_integers"],
)  # fmt: skip
def test_reference_is_the_definition(name):
    tensors, kwargs = by_name(name).make(torch.float64, "cpu", 1)
    out = accel.deform_attention2d(**tensors, **kwargs, backend="reference")
    grad_out = testing.random_like(out)
    expected, grads = naive(grad_out, **tensors, **kwargs)
    got = testing.run(accel.deform_attention2d, tensors, kwargs, "reference", grad_out=grad_out)
    torch.testing.assert_close(got.out, expected, rtol=1e-12, atol=1e-12)
    for n, grad in got.grads.items():
        torch.testing.assert_close(grad, grads[n], rtol=1e-12, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize(
    "name",
    ["v4", "v3", "scaled", "without_centre", "stride_2", "stride_2x3", "dilation", "kernel_2x2", "kernel_7x7",
     "4_groups_of_32"],
)  # fmt: skip
def test_reference_is_grid_sample(name):
    """What InternImage runs without its extension: pad the map, normalise positions, ``grid_sample``."""
    tensors, kwargs = by_name(name).make(torch.float64, "cpu", 1)
    (kh, kw), (sy, sx) = pair(kwargs["kernel_size"]), pair(kwargs.get("stride", 1))
    (py, px), (dy, dx) = pair(kwargs.get("padding", 0)), pair(kwargs.get("dilation", 1))
    scale = kwargs.get("offset_scale", 1.0)
    padded = F.pad(tensors["input"].permute(0, 3, 1, 2), (px, px, py, py))
    batch, channels, height, width = padded.shape
    _, ho, wo, groups, count, _ = tensors["offset"].shape
    centre_y, centre_x = dy * (kh - 1) // 2, dx * (kw - 1) // 2
    columns, rows = torch.arange(wo) * sx + centre_x, torch.arange(ho) * sy + centre_y
    base = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
    window = torch.stack(
        torch.meshgrid(torch.arange(kw) * dx - centre_x, torch.arange(kh) * dy - centre_y, indexing="ij"), -1
    ).flatten(0, 1)
    if kwargs.get("remove_center"):
        window = torch.cat([window[: count // 2], window[count // 2 + 1 :]])
    at = base.permute(1, 2, 0)[:, :, None, None] + (window + tensors["offset"]) * scale  # (N, Ho, Wo, G, K, 2)
    grid = (at + 0.5) / torch.tensor([width, height]) * 2 - 1
    samples = F.grid_sample(
        padded.reshape(batch * groups, channels // groups, height, width),
        grid.permute(0, 3, 1, 2, 4, 5).reshape(batch * groups, ho * wo, count, 2),
        align_corners=False,
    )
    mask = torch.softmax(tensors["mask"], -1) if kwargs.get("softmax") else tensors["mask"]
    weights = mask.permute(0, 3, 1, 2, 4).reshape(batch * groups, 1, ho * wo, count)
    expected = (samples * weights).sum(-1).view(batch, channels, ho, wo).permute(0, 2, 3, 1)
    got = accel.deform_attention2d(**tensors, **kwargs, backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


def test_it_is_a_depthwise_deformable_convolution_of_ones():
    tensors, kwargs = by_name("kernel_5x3_without_centre").make(torch.float64, "cpu", 1)
    zero = torch.zeros(2, 7, 6, 2, 1, 2, dtype=torch.float64)  # the centre, put back with a weight of 0
    offset = torch.cat([tensors["offset"][..., :7, :], zero, tensors["offset"][..., 7:, :]], 4)
    mask = torch.cat([tensors["mask"][..., :7], zero[..., 0], tensors["mask"][..., 7:]], 4)
    # taps to height-outer, axes to y before x, channels first
    offset = offset.unflatten(4, (3, 5)).transpose(4, 5).flip(-1).flatten(3).permute(0, 3, 1, 2)
    mask = mask.unflatten(4, (3, 5)).transpose(4, 5).flatten(3).permute(0, 3, 1, 2)
    image = tensors["input"].permute(0, 3, 1, 2)
    expected = accel.deform_conv2d(
        image, offset, torch.ones(8, 1, 5, 3, dtype=torch.float64), padding=(2, 1), mask=mask, backend="reference"
    )
    got = accel.deform_attention2d(**tensors, **kwargs, backend="reference")
    torch.testing.assert_close(got, expected.permute(0, 2, 3, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("groups", "remove_center"), [(2, False), (3, True)])
def test_the_packed_tensor_of_dcnv4(groups, remove_center):
    """The two lines of the docstring against DCNv4's addresses: from 3·K·g on, 2·K offsets, then K weights."""
    count = 9 - remove_center
    packed_size = -(-3 * groups * count // 8) * 8
    offset_mask = torch.randn(2, 4, 5, packed_size)
    G, K = groups, count
    packed = offset_mask[..., : 3 * G * K].unflatten(-1, (G, 3 * K))
    offset, mask = packed[..., : 2 * K].unflatten(-1, (K, 2)), packed[..., 2 * K :]
    x = torch.randn(2, 4, 5, 4 * groups)
    kwargs = {"kernel_size": 3, "padding": 1, "remove_center": remove_center}
    args = OP.prepare(x, offset, mask, **kwargs)
    for g, k in itertools.product(range(groups), range(count)):
        assert torch.equal(args.offset[..., g, k, 0], offset_mask[..., 3 * K * g + 2 * k])
        assert torch.equal(args.offset[..., g, k, 1], offset_mask[..., 3 * K * g + 2 * k + 1])
        assert torch.equal(args.mask[..., g, k], offset_mask[..., 3 * K * g + 2 * K + k])
    assert accel.deform_attention2d(x, offset, mask, **kwargs).shape == x.shape


# --- what the common checks do not ask ---

# on the map [[1, 2], [3, 5], [7, 11]]: position, sample, its derivatives by y and x from the right
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
    ((3.0, 0.0), (0.0, 0.0, 0.0)),
    ((0.0, 2.0), (0.0, 0.0, 0.0)),
    ((math.nan, 0.0), (0.0, 0.0, 0.0)),
    ((0.0, math.nan), (0.0, 0.0, 0.0)),
    ((math.inf, 0.0), (0.0, 0.0, 0.0)),
    ((0.0, -math.inf), (0.0, 0.0, 0.0)),
    ((1e30, 1e30), (0.0, 0.0, 0.0)),
    ((0.0, -1e30), (0.0, 0.0, 0.0)),
    ((3e38, 0.0), (0.0, 0.0, 0.0)),
    ((0.0, -5e9), (0.0, 0.0, 0.0)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 19])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_positions_at_the_border_and_beyond(backend, dtype, channels, scale):
    image = torch.tensor([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0]], dtype=dtype).view(1, 3, 2, 1)
    count = len(BORDER)
    tensors = {
        "input": image.expand(count, 3, 2, channels).contiguous(),
        "offset": torch.tensor([[x / scale, y / scale] for (y, x), _ in BORDER]).view(count, 1, 1, 1, 1, 2),
        "mask": torch.full((count, 1, 1, 1, 1), 2.0),
    }
    kwargs = {"kernel_size": 1, "stride": (3, 2), "offset_scale": scale}  # one output, at (0, 0)
    available(backend, tensors, kwargs)
    got = testing.run(accel.deform_attention2d, tensors, kwargs, backend)
    for i, (at, (value, slope_y, slope_x)) in enumerate(BORDER):
        slopes = [2 * channels * scale * slope_x, 2 * channels * scale * slope_y]
        assert got.out[i].flatten().tolist() == [2 * value] * channels, at
        assert got.grads["offset"][i].flatten().tolist() == slopes, at
        assert got.grads["mask"][i].item() == channels * value, at
        assert got.grads["input"][i].isfinite().all(), at
        assert (got.grads["input"][i].count_nonzero() > 0) == (value > 0), at


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e38])
@pytest.mark.parametrize("softmax", [False, True])
def test_an_offset_that_is_not_finite_takes_its_sample_out(backend, dtype, value, softmax):
    tensors, kwargs = by_name("3_groups_of_7").make(dtype, "cpu", 0)
    kwargs = {**kwargs, "softmax": softmax}
    available(backend, tensors, kwargs)
    bad, out = tensors["offset"].clone(), tensors["offset"].clone()
    bad.view(-1)[3::7], out.view(-1)[3::7] = value, 1000.0
    got, want = (testing.run(accel.deform_attention2d, {**tensors, "offset": o}, kwargs, backend) for o in (bad, out))
    for name, expected in want.named().items():
        assert expected.isfinite().all()
        assert_same(got.named()[name], expected, f"{name} with {value} for an offset")
    assert (got.grads["offset"].reshape(-1)[3::7] == 0).all()
    assert got.grads["offset"].count_nonzero() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("pixel", [(0, 0), (2, 3), (-1, -1)])
def test_what_is_not_finite_in_the_map_stays_where_it_is_sampled(backend, value, pixel):
    tensors, kwargs = by_name("2_groups_of_16").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    clean = testing.run(accel.deform_attention2d, tensors, kwargs, backend)
    at = (0, *pixel, 21)
    bad, mark = tensors["input"].clone(), torch.zeros_like(tensors["input"])
    bad[at], mark[at] = value, 1.0
    got = testing.run(accel.deform_attention2d, {**tensors, "input": bad}, kwargs, backend)
    marked = {**tensors, "input": mark, "mask": torch.ones_like(tensors["mask"])}
    hit = accel.deform_attention2d(**marked, **kwargs, backend="reference") > 0
    assert 0 < hit.sum() < hit.numel()
    assert not got.out[hit].isfinite().any()
    assert_same(got.out[~hit], clean.out[~hit], "outputs that do not sample the pixel")
    assert_same(got.grads["input"], clean.grads["input"], "gradient of the input, which does not depend on it")


@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax_inside_is_softmax_before(backend):
    tensors, kwargs = by_name("v3").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    inside = accel.deform_attention2d(**tensors, **kwargs, backend=backend)
    before = {**tensors, "mask": tensors["mask"].softmax(-1)}
    outside = accel.deform_attention2d(**before, **{**kwargs, "softmax": False}, backend=backend)
    assert_close(inside, outside, "sample", torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tap_softmaxed_has_weight_one(backend):
    tensors, kwargs = by_name("one_tap").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    got = testing.run(accel.deform_attention2d, tensors, {**kwargs, "softmax": True}, backend)
    ones = {**tensors, "mask": torch.ones_like(tensors["mask"])}
    assert_same(got.out, accel.deform_attention2d(**ones, **kwargs, backend=backend), "output")
    assert got.grads["mask"].count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_tensors_of_any_dtype(backend):
    tensors, kwargs = by_name("v3").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    plain = testing.run(accel.deform_attention2d, tensors, kwargs, backend)
    double = {n: t if n == "input" else t.double() for n, t in tensors.items()}
    got = testing.run(accel.deform_attention2d, double, kwargs, backend)
    for name, expected in plain.named().items():
        assert_same(got.named()[name].float(), expected, name)
    assert got.grads["offset"].dtype == got.grads["mask"].dtype == torch.float64


LEVELS = testing.check_levels(
    accel.deform_attention2d,
    map(by_name, ["v3", "v4", "without_centre_softmax", "all_different", "3_groups_of_7", "1_group_of_40", "exact"]),
)


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in LEVELS])
def test_every_instruction_set(check):
    check()


def test_compiled_by_inductor():
    tensors, kwargs = BEHAVIOUR[0].make(torch.float32, "cpu", 0)
    backend = next(n for n, r in dispatch.reasons(OP, OP.prepare(**tensors, **kwargs)).items() if r is None)
    testing.check_compile(accel.deform_attention2d, BEHAVIOUR[0], backend, compiler="inductor")


# --- bad input: an error that holds the numbers, before any kernel runs ---


def inputs(*shape, **more):
    return {"input": zeros(*shape, **more)}


def offsets(*shape, **more):
    return {"offset": zeros(*shape, **more)}


def masks(*shape, **more):
    return {"mask": zeros(*shape, **more)}


BAD = [
    Bad("not_a_tensor", TypeError, "input must be .* list", {"input": [1.0]}),
    Bad("integer_input", TypeError, "input must be .* torch.uint8", inputs(2, 5, 6, 8, dtype=torch.uint8)),
    Bad("integer_offset", TypeError, "offset must .* torch.int64", offsets(2, 5, 6, 2, 9, 2, dtype=torch.int64)),
    Bad("bool_mask", TypeError, "mask must .* torch.bool", masks(2, 5, 6, 2, 9, dtype=torch.bool)),
    Bad("no_mask", TypeError, "mask must .* NoneType", {"mask": None}),
    Bad("rank_3", ValueError, r"\(30, 2, 8\)", inputs(30, 2, 8)),
    Bad("no_rows", ValueError, r"\(2, 0, 6, 8\)", inputs(2, 0, 6, 8)),
    Bad("no_channels", ValueError, r"\(2, 5, 6, 0\)", inputs(2, 5, 6, 0)),
    Bad("groups_do_not_divide", ValueError, r"divide 7 channels, got G = 2", inputs(2, 5, 6, 7)),
    Bad("no_groups", ValueError, r"G = 0 in .*\(2, 5, 6, 0, 9, 2\)", offsets(2, 5, 6, 0, 9, 2)),
    Bad("offset_flat", ValueError, r"\(2, 5, 6, G, 9, 2\) .*\(2, 5, 6, 36\)", offsets(2, 5, 6, 36)),
    Bad("offset_of_other_batch", ValueError, r"\(2, 5, 6, G, 9, 2\) .*\(1, 5, 6, 2, 9, 2\)", offsets(1, 5, 6, 2, 9, 2)),
    Bad("offset_of_other_size", ValueError, r"\(2, 5, 6, G, 9, 2\) .*\(2, 6, 5, 2, 9, 2\)", offsets(2, 6, 5, 2, 9, 2)),
    Bad("offset_of_other_taps", ValueError, r"\(2, 5, 6, G, 9, 2\) .*\(2, 5, 6, 2, 8, 2\)", offsets(2, 5, 6, 2, 8, 2)),
    Bad("offset_of_3_axes", ValueError, r"\(2, 5, 6, G, 9, 2\) .*\(2, 5, 6, 2, 9, 3\)", offsets(2, 5, 6, 2, 9, 3)),
    Bad("centre_not_removed", ValueError, r"\(2, 5, 6, G, 8, 2\) .*remove_center=True", {"remove_center": True}),
    Bad("mask_of_other_groups", ValueError, r"\(2, 5, 6, 2, 9\) .*\(2, 5, 6, 4, 9\)", masks(2, 5, 6, 4, 9)),
    Bad("mask_of_other_taps", ValueError, r"\(2, 5, 6, 2, 9\) .*\(2, 5, 6, 2, 8\)", masks(2, 5, 6, 2, 8)),
    Bad("mask_flat", ValueError, r"\(2, 5, 6, 2, 9\) .*\(2, 5, 6, 18\)", masks(2, 5, 6, 18)),
    Bad("even_kernel_without_centre", ValueError, r"odd kernel .*kernel_size=\(3, 2\)",
        {"kernel_size": (3, 2), "remove_center": True}),
    Bad("one_tap_without_centre", ValueError, "more than one tap, got kernel_size=1",
        {"kernel_size": 1, "remove_center": True}),
    Bad("kernel_0", ValueError, "kernel_size=0", {"kernel_size": 0}),
    Bad("kernel_of_3", ValueError, r"kernel_size=\(3, 3, 3\)", {"kernel_size": (3, 3, 3)}),
    Bad("kernel_no_integer", TypeError, "kernel_size=3.0", {"kernel_size": 3.0}),
    Bad("stride_0", ValueError, "stride must be at least 1, got stride=0", {"stride": 0}),
    Bad("padding_negative", ValueError, r"at least 0, got padding=\(1, -1\)", {"padding": (1, -1)}),
    Bad("dilation_0", ValueError, "dilation=0", {"dilation": 0}),
    Bad("output_empty", ValueError, "be 1 x 0: a map of 5 x 6 .* kernel of 3 x 3", {"padding": 0, "dilation": (2, 3)}),
    Bad("scale_nan", ValueError, "offset_scale=nan", {"offset_scale": math.nan}),
    Bad("scale_infinite", ValueError, "offset_scale=inf", {"offset_scale": math.inf}),
    Bad("offset_elsewhere", ValueError, "offset is on meta .* cpu", offsets(2, 5, 6, 2, 9, 2, device="meta")),
    Bad("mask_elsewhere", ValueError, "mask is on meta .* cpu", masks(2, 5, 6, 2, 9, device="meta")),
    Bad("no_such_backend", ValueError, "no backend 'cuda9'; it has cpu", {"backend": "cuda9"}),
]  # fmt: skip


@each(BAD)
def test_bad_input(bad):
    good = {**inputs(2, 5, 6, 8), **offsets(2, 5, 6, 2, 9, 2), **masks(2, 5, 6, 2, 9), "kernel_size": 3, "padding": 1}
    check_bad(accel.deform_attention2d, good, bad)


def test_double_runs_on_the_reference_alone():
    tensors, kwargs = BEHAVIOUR[0].make(torch.float64, "cpu", 0)
    assert accel.deform_attention2d(**tensors, **kwargs).dtype == torch.float64
    for backend in ("cpu", "triton"):
        with pytest.raises(NotImplementedError, match=f"backend '{backend}' cannot run this call: ."):
            accel.deform_attention2d(**tensors, **kwargs, backend=backend)


def test_compiled_where_every_size_varies():
    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def compiled(input, offset, mask, scale):
        return accel.deform_attention2d(input, offset, mask, kernel_size=3, padding=1, offset_scale=scale)

    for batch, groups, size, scale in ((2, 2, 4, 1.0), (3, 3, 5, 0.5), (4, 5, 6, 2.0)):
        input, spots = torch.randn(batch, size, size + 1, 4 * groups), (batch, size, size + 1, groups, 9)
        offset, mask = torch.randn(*spots, 2), torch.randn(spots)
        want = accel.deform_attention2d(input, offset, mask, kernel_size=3, padding=1, offset_scale=scale)
        assert torch.equal(compiled(input, offset, mask, scale), want)
