"""Multi-scale deformable attention: the common checks on awkward calls, independent oracles, and bad input."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from _bad import Bad, check_bad, each, zeros
from _hats import Sample
from _ms_deform_attn_cases import BACKENDS, BEHAVIOUR, CASES, GRADIENTS, PYRAMID, available, by_name, case

import accel
from accel import dispatch, library, testing
from accel.ops.deformable.ms_deform_attn import OP
from accel.testing import assert_same, check_op

CHECKS = list(check_op(accel.ms_deform_attn, CASES, BEHAVIOUR, GRADIENTS, BACKENDS))


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


# --- oracles ---


def levels_of(args):
    """Each level's number, height, width, start and points ``[first, last)`` of prepared arguments."""
    first = 0
    for level, count in enumerate(args.num_points):
        height, width = args.spatial_shapes[level].tolist()
        yield level, height, width, int(args.level_start_index[level]), first, first + count
        first += count


def naive(grad_out, args):
    """The definition, sample by sample in float64: the output and its gradients where ``grad_out`` arrives."""
    value, locations, weights = args[:3]
    n, _, heads, dim = value.shape
    queries = locations.shape[1]
    out = torch.zeros(n, queries, heads, dim, dtype=torch.float64)
    grad_out = grad_out.view(out.shape)
    grads = [torch.zeros_like(x) for x in args[:3]]
    for b, m, (_, height, width, start, first, last) in itertools.product(range(n), range(heads), levels_of(args)):
        pixels = slice(start, start + height * width)
        image = value[b, pixels, m].T.reshape(dim, height, width)
        for q, p in itertools.product(range(queries), range(first, last)):
            x, y = locations[b, q, m, p].tolist()
            sample = Sample(image, y * height - 0.5, x * width - 0.5, args.border_gradient)
            weight, upstream = weights[b, q, m, p], grad_out[b, q, m]
            out[b, q, m] += weight * sample.value
            grads[0][b, pixels, m] += weight * torch.outer(sample.weights.flatten(), upstream)
            grads[1][b, q, m, p, 0] = weight * width * float(upstream @ sample.slope_x)
            grads[1][b, q, m, p, 1] = weight * height * float(upstream @ sample.slope_y)
            grads[2][b, q, m, p] = float(upstream @ sample.value)
    return out.flatten(2), dict(zip(("value", "sampling_locations", "attention_weights"), grads, strict=True))


def by_grid_sample(args):
    """The form everybody writes without an extension."""
    value, locations, weights = args[:3]
    n, _, heads, dim = value.shape
    queries = locations.shape[1]
    out = 0.0
    for _, height, width, start, first, last in levels_of(args):
        image = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(n * heads, dim, height, width)
        grid = 2 * locations[:, :, :, first:last].transpose(1, 2).flatten(0, 1) - 1
        samples = F.grid_sample(image.contiguous(), grid, align_corners=False)
        out = out + (samples * weights[:, :, :, first:last].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return out.view(n, heads * dim, queries).transpose(1, 2)


def compare(tensors, got, expected, grads):
    torch.testing.assert_close(got.out, expected, rtol=1e-11, atol=1e-12)
    for n, grad in grads.items():
        ours = got.grads[n].reshape(grad.shape)
        torch.testing.assert_close(ours, grad, rtol=1e-11, atol=1e-11, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize(
    "name",
    ["pyramid", "pyramid_tensors", "points_by_level", "a_level_without_points", "one_row_and_column", "prime",
     "mostly_outside", "not_finite", "any_weights", "exact", "exact_tensors", "exact_integers", "exact_no_border"],
)  # fmt: skip
def test_reference_is_the_definition(name):
    tensors, kwargs = by_name(name).make(torch.float64, "cpu", 1)
    out = accel.ms_deform_attn(**tensors, **kwargs, backend="reference")
    grad_out = testing.random_like(out)
    expected, grads = naive(grad_out, OP.prepare(**tensors, **kwargs))
    got = testing.run(accel.ms_deform_attn, tensors, kwargs, "reference", grad_out=grad_out)
    compare(tensors, got, expected, grads)


@pytest.mark.parametrize("name", [c.name for c in CASES if c.family != "exact" and c.name != "not_finite"])
def test_reference_is_grid_sample(name):
    tensors, kwargs = by_name(name).make(torch.float64, "cpu", 1)
    args = OP.prepare(**tensors, **kwargs)
    given = [x.detach().requires_grad_() for x in args[:3]]
    expected = by_grid_sample(args._replace(**dict(zip(args._fields, given, strict=False))))
    grad_out = testing.random_like(expected)
    grads = torch.autograd.grad(expected, given, grad_out)
    got = testing.run(accel.ms_deform_attn, tensors, kwargs, "reference", grad_out=grad_out)
    compare(tensors, got, expected.detach(), dict(zip(got.grads, grads, strict=True)))


# --- what the common checks do not ask ---

# on the map [[1, 2], [3, 5], [7, 11], [13, 17]]: position, sample, its derivatives by y and x from the right
BORDER = [
    ((0.0, 0.0), (1.0, 2.0, 1.0)),
    ((1.5, 0.5), (6.5, 5.0, 3.0)),
    ((3.0, 0.0), (13.0, -13.0, 4.0)),
    ((3.0, 1.0), (17.0, -17.0, -17.0)),
    ((3.5, 1.5), (4.25, -8.5, -8.5)),
    ((-1.0, 0.0), (0.0, 1.0, 0.0)),
    ((-1.0, 0.5), (0.0, 1.5, 0.0)),
    ((0.0, -1.0), (0.0, 0.0, 1.0)),
    ((-1.0, -1.0), (0.0, 0.0, 0.0)),
    ((-0.5, -0.5), (0.25, 0.5, 0.5)),
    ((-1.25, 0.0), (0.0, 0.0, 0.0)),
    ((4.0, 0.0), (0.0, 0.0, 0.0)),
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
@pytest.mark.parametrize("dim", [1, 19])
@pytest.mark.parametrize("border", [True, False])
def test_positions_at_the_border_and_beyond(backend, dtype, dim, border):
    value = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0], dtype=dtype).view(1, 8, 1, 1)
    at = torch.tensor([[x, y] for (y, x), _ in BORDER], dtype=torch.float64)
    tensors = {
        "value": value.expand(len(BORDER), 8, 1, dim).contiguous(),
        "sampling_locations": ((at + 0.5) / torch.tensor([2.0, 4.0])).float().view(-1, 1, 1, 1, 1, 2),
        "attention_weights": torch.full((len(BORDER), 1, 1, 1, 1), 2.0),
    }
    kwargs = {"spatial_shapes": [(4, 2)], "level_start_index": None, "border_gradient": border}
    available(backend, tensors, kwargs)
    got = testing.run(accel.ms_deform_attn, tensors, kwargs, backend)
    for i, (place, (sample, slope_y, slope_x)) in enumerate(BORDER):
        slopes = [2 * dim * 2 * slope_x, 2 * dim * 4 * slope_y] if border or -1.0 not in place else [0.0, 0.0]
        assert got.out[i].flatten().tolist() == [2 * sample] * dim, place
        assert got.grads["sampling_locations"][i].flatten().tolist() == slopes, place
        assert got.grads["attention_weights"][i].item() == dim * sample, place
        assert got.grads["value"][i].isfinite().all(), place
        assert (got.grads["value"][i].count_nonzero() > 0) == (sample > 0), place


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e38])
def test_a_location_that_is_not_finite_takes_its_sample_out(backend, dtype, value):
    tensors, kwargs = by_name("points_by_level").make(dtype, "cpu", 0)
    available(backend, tensors, kwargs)
    bad, out = tensors["sampling_locations"].clone(), tensors["sampling_locations"].clone()
    bad.view(-1)[3::7], out.view(-1)[3::7] = value, 1000.0
    got, want = (
        testing.run(accel.ms_deform_attn, {**tensors, "sampling_locations": at}, kwargs, backend) for at in (bad, out)
    )
    for name, expected in want.named().items():
        assert expected.isfinite().all()
        assert_same(got.named()[name], expected, f"{name} with {value} for a location")
    assert (got.grads["sampling_locations"].reshape(-1)[3::7] == 0).all()
    assert got.grads["sampling_locations"].count_nonzero() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("pixel", [0, 9 * 13 - 1, 9 * 13, 9 * 13 + 2 * 7 + 3, -1])  # corners, and inside a level
def test_what_is_not_finite_in_the_map_stays_where_it_is_sampled(backend, value, pixel):
    tensors, kwargs = case("wide", PYRAMID, 300, dim=40).make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    clean = testing.run(accel.ms_deform_attn, tensors, kwargs, backend)
    at = (0, pixel, 1, 5)
    bad, mark = tensors["value"].clone(), torch.zeros_like(tensors["value"])
    bad[at], mark[at] = value, 1.0
    got = testing.run(accel.ms_deform_attn, {**tensors, "value": bad}, kwargs, backend)
    hit = accel.ms_deform_attn(**{**tensors, "value": mark}, **kwargs, backend="reference") > 0
    assert 0 < hit.sum() < hit.numel()
    assert not got.out[hit].isfinite().any()
    assert_same(got.out[~hit], clean.out[~hit], "outputs that do not sample the pixel")
    assert_same(got.grads["value"], clean.grads["value"], "gradient of the value, which does not depend on it")


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_may_come_as_tensor_or_list_and_starts_may_be_missing(backend):
    tensors, kwargs = by_name("pyramid").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    starts = [0, 117, 152, 164]
    got = [
        testing.run(
            accel.ms_deform_attn, tensors, {"spatial_shapes": shapes, "level_start_index": first, **more}, backend
        )
        for shapes in (PYRAMID, [list(s) for s in PYRAMID], torch.tensor(PYRAMID), torch.tensor(PYRAMID).int())
        for first in (None, starts, torch.tensor(starts), torch.tensor(starts).int())
        for more in ({}, {"num_points": 4}, {"num_points": [4, 4, 4, 4]})
    ]
    for other in got[1:]:
        for name, expected in got[0].named().items():
            assert_same(other.named()[name], expected, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_levels_may_lie_in_any_order(backend):
    tensors, kwargs = by_name("pyramid").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    plain = testing.run(accel.ms_deform_attn, tensors, kwargs, backend)
    parts = tensors["value"].split([h * w for h, w in PYRAMID], 1)
    moved = {**tensors, "value": torch.cat(parts[::-1], 1)}
    got = testing.run(accel.ms_deform_attn, moved, {**kwargs, "level_start_index": [51, 16, 4, 0]}, backend)
    assert_same(got.out, plain.out, "output")
    back = got.grads["value"].split([h * w for h, w in PYRAMID[::-1]], 1)
    assert_same(torch.cat(back[::-1], 1), plain.grads["value"], "gradient of value")
    assert_same(got.grads["sampling_locations"], plain.grads["sampling_locations"], "gradient of locations")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries(backend):
    tensors, kwargs = by_name("pyramid").make(torch.float32, "cpu", 0)
    none = {n: t if n == "value" else t[:, :0] for n, t in tensors.items()}
    available(backend, none, kwargs)
    got = testing.run(accel.ms_deform_attn, none, kwargs, backend)
    assert got.out.shape == (2, 0, 8)
    assert got.grads["value"].count_nonzero() == 0
    for n in none:
        assert got.grads[n].shape == none[n].shape


def test_a_shape_tensor_on_a_device_is_not_read(monkeypatch):
    # a tensor on "meta" is on another device and has no values: reading one is an error
    monkeypatch.setattr(library, "autocast", lambda x: x)  # torch has no autocast there
    value, at = torch.zeros(1, 20, 2, 8, device="meta"), torch.zeros(1, 3, 2, 2, 4, 2, device="meta")
    shapes, weights = torch.zeros(2, 2, dtype=torch.int64, device="meta"), at[..., 0]
    with pytest.raises(NotImplementedError):
        shapes.tolist()
    for starts in (None, shapes[:, 0]):
        args = OP.prepare(value, shapes, starts, at, weights)
        assert args.level_start_index.shape == (2,)
        assert OP.backend("reference").forward(*args).shape == (1, 3, 16)
    args = OP.prepare(value, [(4, 4), (2, 2)], [0, 16], at, weights)
    assert args.spatial_shapes.device.type == args.level_start_index.device.type == "meta"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shapes", "starts"),
    [
        ([[90, 13], [5, 700]], [0, 117]),
        ([[9, 13], [5, 7]], [-1000, 10**12]),
        ([[2**40, 2**40], [5, 7]], [0, 117]),
        ([[-9, 13], [0, 7]], [0, 2**62]),
        ([[2**62, 3], [3, -(2**62)]], [2**63 - 1, -(2**63)]),
    ],
)
def test_shapes_nobody_checked_read_no_foreign_memory(backend, shapes, starts):
    tensors, kwargs = case("two", [(9, 13), (5, 7)], 5).make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    args = OP.prepare(**tensors, **kwargs)
    wrong = args._replace(spatial_shapes=torch.tensor(shapes), level_start_index=torch.tensor(starts))
    leaf = OP.backend(backend)
    out = leaf.forward(*wrong)
    assert out.isfinite().all()
    assert out.abs().max() <= 2 * 2 * args.value.abs().max() * args.attention_weights.sum(-1).max()
    if leaf.backward is not None:
        for grad, x in zip(leaf.backward(torch.ones_like(out), *wrong, [True] * 3), args[:3], strict=True):
            assert grad.shape == x.shape
            assert not grad.isnan().any()


def test_under_compile_shapes_are_not_read():
    tensors, kwargs = by_name("pyramid_tensors").make(torch.float32, "cpu", 0)
    torch._dynamo.reset()
    compiled = torch.compile(accel.ms_deform_attn, backend="eager", fullgraph=True, dynamic=False)
    assert_same(compiled(**tensors, **kwargs), accel.ms_deform_attn(**tensors, **kwargs), "compiled")
    without = {**tensors, "level_start_index": None}
    assert_same(compiled(**without, **kwargs), accel.ms_deform_attn(**tensors, **kwargs), "without starts")
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_tensors_of_any_dtype(backend):
    tensors, kwargs = by_name("pyramid").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    plain = testing.run(accel.ms_deform_attn, tensors, kwargs, backend)
    double = {n: t if n == "value" else t.double() for n, t in tensors.items()}
    got = testing.run(accel.ms_deform_attn, double, kwargs, backend)
    for name, expected in plain.named().items():
        assert_same(got.named()[name].float(), expected, name)
    assert got.grads["sampling_locations"].dtype == got.grads["attention_weights"].dtype == torch.float64


LEVELS = testing.check_levels(
    accel.ms_deform_attn,
    map(by_name, ["pyramid", "points_by_level", "head_size_3", "head_size_40", "not_finite", "exact"]),
)


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in LEVELS])
def test_every_instruction_set(check):
    check()


def test_compiled_by_inductor():
    tensors, kwargs = BEHAVIOUR[0].make(torch.float32, "cpu", 0)
    backend = next(n for n, r in dispatch.reasons(OP, OP.prepare(**tensors, **kwargs)).items() if r is None)
    testing.check_compile(accel.ms_deform_attn, BEHAVIOUR[0], backend, compiler="inductor")


# --- bad input: an error that holds the numbers, before any kernel runs ---


def ints(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


def places(*shape, **more):
    return {"sampling_locations": zeros(*shape, **more)}


def weights(*shape, **more):
    return {"attention_weights": zeros(*shape, **more)}


def shapes(given, **more):
    return {"spatial_shapes": given, **more}


FIVE = {"sampling_locations": zeros(2, 5, 3, 8, 2), "attention_weights": zeros(2, 5, 3, 8)}
BAD = [
    Bad("not_a_tensor", TypeError, "value must be .* list", {"value": [1.0]}),
    Bad("integer_value", TypeError, "value must be .* torch.int32", {"value": zeros(2, 26, 3, 4, dtype=torch.int32)}),
    Bad("integer_locations", TypeError, "sampling_locations must .* torch.int64",
        places(2, 5, 3, 2, 4, 2, dtype=torch.int64)),
    Bad("bool_weights", TypeError, "attention_weights must .* torch.bool",
        weights(2, 5, 3, 2, 4, dtype=torch.bool)),
    Bad("float_shapes", TypeError, "spatial_shapes must be int32 or int64, got torch.float32",
        shapes(zeros(2, 2))),
    Bad("short_shapes", TypeError, "int32 or int64, got torch.int16", shapes(ints([4, 5], [2, 3], dtype=torch.int16))),
    Bad("float_starts", TypeError, "level_start_index must be int32 or int64, got torch.float32",
        {"level_start_index": zeros(2)}),
    Bad("bool_starts", TypeError, "level_start_index .* torch.bool", {"level_start_index": zeros(2, dtype=torch.bool)}),
    Bad("listed_floats", TypeError, r"spatial_shapes .*\(4.0, 5.0\)", shapes([(4.0, 5.0), (2, 3)])),
    Bad("listed_float_start", TypeError, r"level_start_index .*\[0, 2.5\]", {"level_start_index": [0, 2.5]}),
    Bad("no_shapes", TypeError, "spatial_shapes .*None", shapes(None)),
    Bad("value_rank", ValueError, r"\(2, 26, 12\)", {"value": zeros(2, 26, 12)}),
    Bad("no_pixels", ValueError, r"\(2, 0, 3, 4\)", {"value": zeros(2, 0, 3, 4)}),
    Bad("no_heads", ValueError, r"\(2, 26, 0, 4\)", {"value": zeros(2, 26, 0, 4)}),
    Bad("no_head_size", ValueError, r"\(2, 26, 3, 0\)", {"value": zeros(2, 26, 3, 0)}),
    Bad("pixels_too_few", ValueError, r"pixels as value, 26, got \[\[4, 5\], \[2, 2\]\], 24", shapes([(4, 5), (2, 2)])),
    Bad("pixels_too_many", ValueError, r"26, got \[\[4, 5\], \[2, 4\]\], 28", shapes(ints([4, 5], [2, 4]))),
    Bad("size_0", ValueError, r"\[\[4, 5\], \[0, 3\]\]", shapes([(4, 5), (0, 3)], value=zeros(2, 20, 3, 4))),
    Bad("size_negative", ValueError, r"\[\[-4, -5\], \[2, 3\]\]", shapes(ints([-4, -5], [2, 3]))),
    Bad("no_levels", ValueError, r"\(0, 2\)", shapes(zeros(0, 2, dtype=torch.int64))),
    Bad("no_levels_listed", ValueError, r"got \[\]", shapes([])),
    Bad("shapes_of_3", ValueError, r"\(1, 3\)", shapes(ints([4, 5, 6]))),
    Bad("shapes_flat", ValueError, r"\(4,\)", shapes(ints(4, 5, 2, 3))),
    Bad("shapes_of_3_listed", ValueError, r"\(2, 3, 1\)", shapes([(4, 5), (2, 3, 1)])),
    Bad("starts_too_many", ValueError, r"level_start_index must be \(2,\), got \(3,\)",
        {"level_start_index": ints(0, 20, 26)}),
    Bad("start_negative", ValueError, r"26 pixels .*\[-1, 20\]", {"level_start_index": ints(-1, 20)}),
    Bad("start_too_far", ValueError, r"26 pixels .*\[0, 21\]", {"level_start_index": [0, 21]}),
    Bad("locations_rank", ValueError, r"\(2, 5, 3, 2\)", places(2, 5, 3, 2)),
    Bad("locations_of_3", ValueError, r"\(2, 5, 3, 2, 4, 3\)", places(2, 5, 3, 2, 4, 3)),
    Bad("locations_of_other_batch", ValueError, r"N = 2 .*\(1, 5, 3, 2, 4, 2\)", places(1, 5, 3, 2, 4, 2)),
    Bad("locations_of_other_heads", ValueError, r"M = 3 .*\(2, 5, 4, 2, 4, 2\)", places(2, 5, 4, 2, 4, 2)),
    Bad("locations_of_other_levels", ValueError, r"L = 2 .*\(2, 5, 3, 3, 4, 2\)", places(2, 5, 3, 3, 4, 2)),
    Bad("weights_of_other_points", ValueError, r"\(2, 5, 3, 2, 4\) .*\(2, 5, 3, 2, 3\)", weights(2, 5, 3, 2, 3)),
    Bad("weights_flat", ValueError, r"\(2, 5, 3, 2, 4\) .*\(2, 5, 3, 8\)", weights(2, 5, 3, 8)),
    Bad("points_not_said", ValueError, "num_points=None", FIVE),
    Bad("points_do_not_sum", ValueError, r"sum to 8 .*num_points=\[3, 4\]", {**FIVE, "num_points": [3, 4]}),
    Bad("points_of_3_levels", ValueError, r"2 levels .*num_points=\[3, 4, 1\]", {**FIVE, "num_points": [3, 4, 1]}),
    Bad("points_negative", ValueError, r"num_points=\[9, -1\]", {**FIVE, "num_points": [9, -1]}),
    Bad("points_not_as_the_axes", ValueError, r"num_points must be \[4, 4\] .*num_points=\[5, 3\]",
        {"num_points": [5, 3]}),
    Bad("points_no_integer", TypeError, "num_points=4.0", {**FIVE, "num_points": 4.0}),
    Bad("locations_elsewhere", ValueError, "sampling_locations is on meta .* cpu",
        places(2, 5, 3, 2, 4, 2, device="meta")),
    Bad("weights_elsewhere", ValueError, "attention_weights is on meta", weights(2, 5, 3, 2, 4, device="meta")),
    Bad("shapes_elsewhere", ValueError, "spatial_shapes is on meta .* cpu",
        shapes(zeros(2, 2, dtype=torch.int64, device="meta"))),
    Bad("starts_elsewhere", ValueError, "level_start_index is on meta",
        {"level_start_index": zeros(2, dtype=torch.int64, device="meta")}),
    Bad("no_such_backend", ValueError, "no backend 'cuda9'; it has cpu", {"backend": "cuda9"}),
]  # fmt: skip


@each(BAD)
def test_bad_input(bad):
    good = {"value": zeros(2, 26, 3, 4), "spatial_shapes": ints([4, 5], [2, 3]), "level_start_index": ints(0, 20)}
    good |= {"sampling_locations": zeros(2, 5, 3, 2, 4, 2), "attention_weights": zeros(2, 5, 3, 2, 4)}
    check_bad(accel.ms_deform_attn, good, bad)


def test_double_runs_on_the_reference_alone():
    tensors, kwargs = BEHAVIOUR[0].make(torch.float64, "cpu", 0)
    assert accel.ms_deform_attn(**tensors, **kwargs).dtype == torch.float64
    for backend in ("cpu", "triton"):
        with pytest.raises(NotImplementedError, match=f"backend '{backend}' cannot run this call: ."):
            accel.ms_deform_attn(**tensors, **kwargs, backend=backend)
