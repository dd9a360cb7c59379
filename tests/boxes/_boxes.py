"""What the tests of ps_roi_align and ps_roi_pool share: cases, an oracle, and the checks that hold for both ops."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from _bad import Bad, zeros

from accel import dispatch, testing
from accel.testing import Case, assert_same

BACKENDS = ("cpu", "reference")
NOT_FINITE = [math.nan, math.inf, -math.inf, 1e30, -1e30]


def random_boxes(make_ends, count, batch, size, bins, scale, generator):
    """``(count, 5)``, each end on each axis as ``make_ends(count, pixels, bins, generator)`` gives it in pixels."""
    (y1, y2), (x1, x2) = (make_ends(count, pixels, n, generator) for pixels, n in zip(size, bins, strict=True))
    image = torch.randint(0, batch, (count,), generator=generator)
    return torch.stack([image, *(t / scale for t in (x1, y1, x2, y2))], 1).float()


def case(
    make_ends,
    name,
    size=(11, 13),
    bins=(3, 2),
    *,
    channels=2,
    batch=2,
    count=7,
    scale=0.25,
    boxes=None,
    whole=False,
    listed=False,
    dtypes=testing.KERNEL_DTYPES,
    **kwargs,
):
    """A case with random tensors; ``boxes(boxes)`` edits them in place or returns others. ``whole``: small integers,
    and boxes for which every product, sum and rounding is exact. Boxes are no tensor of the case: they have no
    gradient."""

    def make(dtype, device, seed):
        generator = torch.Generator().manual_seed(seed)
        input = torch.randn((batch, channels * bins[0] * bins[1], *size), generator=generator)
        if whole:
            input = input.round().clamp(-2, 2)
        given = random_boxes(make_ends, count, batch, size, bins, scale, generator)
        if boxes is not None:
            changed = boxes(given)
            given = given if changed is None else changed
        given = given.to(device)
        if listed:
            given = [given[given[:, 0] == n, 1:] for n in range(batch)]
        more = {"output_size": bins, "spatial_scale": scale, **kwargs}
        return {"input": input.to(device, dtype)}, {"boxes": given, **more}

    return Case(name, make, "exact" if whole else "sample", dtypes)


def common_cases(make_ends, **kwargs):
    """The cases that make sense for both ops."""

    def one(name, *args, **more):
        return case(make_ends, name, *args, **{**kwargs, **more})

    def out_of_order(boxes):
        boxes[::2, [1, 3]] = boxes[::2, [3, 1]]
        boxes[::3, [2, 4]] = boxes[::3, [4, 2]]

    def without_size(boxes):
        boxes[::2, 3] = boxes[::2, 1]
        boxes[::3, 4] = boxes[::3, 2]

    def far_away(boxes):
        boxes[:, 1:] += 4000.0 * boxes[:, 2:3].sign()

    def not_finite(boxes):
        for k, value in enumerate(NOT_FINITE):
            boxes[k, 1 + k % 4] = value

    return [
        one("plain"),
        one("listed", listed=True, count=9),
        one("one_bin", bins=(1, 1)),
        one("one_channel", channels=1),
        one("7x7_bins", (23, 31), (7, 7), channels=3),
        one("1x5_bins", bins=(1, 5)),
        one("more_bins_than_pixels", (4, 3), (6, 5)),
        one("one_pixel", (1, 1)),
        one("one_row", (1, 40)),
        one("one_column", (37, 1)),
        one("wide", (5, 75), (2, 1), scale=0.5),
        one("40_channels", (6, 7), (2, 2), channels=40),
        one("one_box", count=1),
        one("many_boxes", (9, 10), (2, 2), count=60),
        one("batch_1", batch=1),
        one("batch_5", batch=5, count=23),
        one("scale_1", scale=1.0),
        one("scale_turned_round", scale=-0.5),
        one("out_of_order", boxes=out_of_order),
        one("without_size", boxes=without_size),
        one("far_away", boxes=far_away),
        one("not_finite", boxes=not_finite),
    ]


def checks_of(function, cases, behaviour, gradients):
    """``check_op``, but for what asks for a batch that the output has, too, or for gradients that depend on the input:
    the ops are linear. ``OnEachBackend`` asks it in their terms."""
    found = testing.check_op(function, cases, behaviour, gradients, BACKENDS)
    asked_here = ("-empty-", "-batch-", "-inplace-", "-second_derivative-")
    return [(name, check) for name, check in found if not any(part in name for part in asked_here)]


# --- the oracle: what torchvision's loops do, one bin at a time ---


def pool_plane(box, i, j, bins, size, scale, real):
    """The weight of every pixel in bin (i, j), coordinates in ``real`` arithmetic; None if the box has no bins."""
    corners = [real(v) * real(scale) for v in box[1:]]
    if not all(abs(v) < 2**22 for v in corners):
        return None
    x1, y1, x2, y2 = (int(math.copysign(math.floor(abs(float(v)) + 0.5), v)) for v in corners)
    plane = np.zeros(size)
    spans = []
    for low, high, at, count, pixels in ((y1, y2, i, bins[0], size[0]), (x1, x2, j, bins[1], size[1])):
        length = real(max(high - low, 1)) / real(count)
        first, end = math.floor(real(at) * length) + low, math.ceil(real(at + 1) * length) + low
        spans.append(slice(*(min(max(v, 0), pixels - 1) for v in (first, end))))
    window = plane[spans[0], spans[1]]
    if window.size:
        window[:] = 1 / window.size
    return plane


def align_plane(box, i, j, bins, size, scale, real, ratio=-1):
    """Likewise, of samples."""
    corners = [real(v) * real(scale) for v in box[1:]]
    if not all(abs(v) < 2**22 for v in corners):
        return None
    x1, y1, x2, y2 = (v - real(0.5) for v in corners)
    plane = np.zeros(size)
    axes = []
    for low, high, at, count in ((y1, y2, i, bins[0]), (x1, x2, j, bins[1])):
        length = (high - low) / real(count)
        grid = ratio if ratio > 0 else math.ceil(length)
        begin = real(at) * length + low
        axes.append([begin + real(t + 0.5) * length / real(grid) for t in range(max(grid, 0))])
    for y, x in itertools.product(*axes):
        if y < -1 or y > size[0] or x < -1 or x > size[1]:
            continue
        y, x = max(y, real(0)), max(x, real(0))
        top, left = int(y), int(x)
        bottom, right = top + 1, left + 1
        if top >= size[0] - 1:
            top = bottom = size[0] - 1
            y = real(top)
        if left >= size[1] - 1:
            left = right = size[1] - 1
            x = real(left)
        dy, dx = y - top, x - left
        plane[top, left] += (1 - dy) * (1 - dx)
        plane[top, right] += (1 - dy) * dx
        plane[bottom, left] += dy * (1 - dx)
        plane[bottom, right] += dy * dx
    return plane / max(len(axes[0]) * len(axes[1]), 1)


def naive(make_plane, input, grad_out, boxes, output_size, spatial_scale, real=np.float64, **kwargs):
    """Output, and the gradient of the input where ``grad_out`` arrives, in float64."""
    if not isinstance(boxes, torch.Tensor):
        boxes = torch.cat([torch.cat([torch.full((len(b), 1), n), b], 1) for n, b in enumerate(boxes)])
    ph, pw = output_size
    out, grad = torch.zeros_like(grad_out), torch.zeros_like(input)
    for (k, box), i, j in itertools.product(enumerate(boxes.tolist()), range(ph), range(pw)):
        plane = make_plane(box, i, j, output_size, input.shape[2:], spatial_scale, real, **kwargs)
        if plane is None:
            continue
        plane, n = torch.from_numpy(plane), int(box[0])
        for c in range(out.shape[1]):
            channel = (c * ph + i) * pw + j
            out[k, c, i, j] = (plane * input[n, channel]).sum()
            grad[n, channel] += grad_out[k, c, i, j] * plane
    return out, grad


def check_against_oracle(function, make_plane, case, backend, dtype, real, tolerance):
    tensors, kwargs = case.make(dtype, "cpu", 1)
    testing.require(function, backend, tensors, kwargs)
    grad_out = testing.random_like(function(**tensors, **kwargs, backend="reference"))
    got = testing.run(function, tensors, kwargs, backend, grad_out=grad_out)
    more = {"ratio": kwargs["sampling_ratio"]} if "sampling_ratio" in kwargs else {}
    given = {n: v for n, v in kwargs.items() if n != "sampling_ratio"}
    out, grad = naive(make_plane, tensors["input"].double(), grad_out.double(), **given, real=real, **more)
    torch.testing.assert_close(got.out.double(), out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.grads["input"].double(), grad, rtol=tolerance, atol=tolerance)


# --- what the common checks do not ask, or ask differently ---


@pytest.mark.parametrize("backend", BACKENDS)
class OnEachBackend:
    """Subclassed by each op's tests, which name ``function`` and ``example``, a case."""

    function = None
    example = None

    def call(self, backend, input, boxes, **change):
        _, kwargs = self.example.make(torch.float32, "cpu", 0)
        kwargs = {**kwargs, "boxes": boxes, **change}
        if len(boxes):
            testing.require(type(self).function, backend, {"input": input}, kwargs)
        return testing.run(type(self).function, {"input": input}, kwargs, backend)

    def given(self):
        tensors, kwargs = self.example.make(torch.float32, "cpu", 0)
        return tensors["input"], kwargs["boxes"]

    @pytest.mark.parametrize("batch", [0, 2])
    def test_no_boxes(self, backend, batch):
        input, boxes = self.given()
        for none in (boxes[:0], [], [boxes[:0, 1:]] * batch):
            got = self.call(backend, input[:batch], none)
            assert got.out.shape == (0, 2, 3, 2)
            assert_same(got.grads["input"], torch.zeros_like(input[:batch]), "gradient without boxes")

    def test_every_box_alone(self, backend):
        input, boxes = self.given()
        whole = self.call(backend, input, boxes)
        for k in range(len(boxes)):
            assert_same(self.call(backend, input, boxes[k : k + 1]).out, whole.out[k : k + 1], f"box {k}")

    def test_gradient_does_not_depend_on_the_input(self, backend):
        input, boxes = self.given()
        want = self.call(backend, input, boxes).grads["input"]
        leaf = input.clone().requires_grad_()
        out = type(self).function(leaf, boxes, (3, 2), 0.25, backend=backend)
        with torch.no_grad():
            leaf.mul_(2.0)
        assert_same(torch.autograd.grad(out.sum(), leaf)[0], want, "gradient after the input was overwritten")

    def test_second_derivative(self, backend):
        input, boxes = self.given()
        leaf = input.requires_grad_()
        out = type(self).function(leaf, boxes, (3, 2), 0.25, backend=backend)
        upstream = torch.ones_like(out).requires_grad_()
        (grad,) = torch.autograd.grad(out, leaf, upstream, create_graph=True)
        assert grad.requires_grad
        if backend == "reference":
            again = torch.autograd.grad((grad * leaf).sum(), upstream)[0]
            assert_same(again, out.detach(), "the transpose's transpose")
        else:
            with pytest.raises(NotImplementedError, match=r"ps_roi_.*reference"):
                grad.square().sum().backward()

    def test_boxes_have_no_gradient(self, backend):
        input, boxes = self.given()
        input, boxes = input.requires_grad_(), boxes.requires_grad_()
        out = type(self).function(input, boxes, (3, 2), 0.25, backend=backend)
        grads = torch.autograd.grad(out.sum(), (input, boxes), allow_unused=True)
        assert grads[0].count_nonzero() > 0
        assert grads[1] is None
        assert not type(self).function(input.detach(), boxes, (3, 2), 0.25, backend=backend).requires_grad

    def test_listed_boxes_are_boxes_with_an_index(self, backend):
        input, boxes = self.given()
        boxes = boxes[boxes[:, 0].argsort(stable=True)]
        want = self.call(backend, input, boxes)
        got = self.call(backend, input, tuple(boxes[boxes[:, 0] == n, 1:].double() for n in range(2)))
        assert_same(got.out, want.out, "listed boxes")
        first = boxes[boxes[:, 0] == 0]
        assert_same(self.call(backend, input, [first[:, 1:]]).out, want.out[: len(first)], "boxes of one image alone")

    @pytest.mark.parametrize("dtype", testing.HALVES, ids=str)
    def test_boxes_of_any_dtype_and_layout(self, backend, dtype):
        input, boxes = self.given()
        half = boxes.to(dtype)
        want = self.call(backend, input, half.float())
        for given in (half, half.double(), half.T.contiguous().T):
            assert_same(self.call(backend, input, given).out, want.out, f"boxes in {given.dtype}")

    def test_an_output_size_for_both_axes(self, backend):
        input, boxes = self.given()
        input = input[:, :8]
        got = self.call(backend, input, boxes, output_size=2)
        assert_same(got.out, self.call(backend, input, boxes, output_size=[2, 2]).out, "output_size 2")

    def test_channels_belong_to_bins(self, backend):
        channels = torch.arange(12.0).view(1, 12, 1, 1).expand(2, 12, 11, 13).contiguous()
        got = self.call(backend, channels, torch.tensor([[1.0, 8.0, 4.0, 40.0, 36.0]]))
        torch.testing.assert_close(got.out, torch.arange(12.0).view(1, 2, 3, 2), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("value", [*NOT_FINITE, 2.0**24, -(2.0**24)])
    def test_a_box_that_is_nowhere_gives_zeros(self, backend, value):
        input, boxes = self.given()
        want = self.call(backend, input, torch.cat([boxes[:2], boxes[3:]]))
        for column in range(1, 5):
            bad = boxes.clone()
            bad[2, column] = value
            got = self.call(backend, input, bad)
            assert got.out[2].count_nonzero() == 0
            assert_same(torch.cat([got.out[:2], got.out[3:]]), want.out, "the other boxes")
            assert_same(got.grads["input"], want.grads["input"], "gradient of the other boxes")

    @pytest.mark.parametrize("corners", [(-90.0, 0.0, -50.0, 40.0), (0.0, 70.0, 30.0, 99.0), (56.0, 0.0, 90.0, 20.0)])
    def test_a_box_outside_of_the_map_gives_zeros(self, backend, corners):
        input, _ = self.given()
        got = self.call(backend, input, torch.tensor([[0.0, *corners]]))
        assert got.out.count_nonzero() == 0
        assert got.grads["input"].count_nonzero() == 0

    def test_a_box_that_covers_more_than_the_map(self, backend):
        input, _ = self.given()
        got = self.call(backend, input, torch.tensor([[0.0, -8e6, -8e6, 8e6, 8e6]]), output_size=(1, 1))
        assert got.out.isfinite().all()

    @pytest.mark.parametrize("image", [-1.0, 2.0, 300.0, -1e30, math.nan, math.inf])
    def test_a_box_of_no_image(self, backend, image):
        input, boxes = self.given()
        boxes[3, 0] = image
        shown = re.escape(str(boxes[3, 0].item()))
        with pytest.raises(ValueError, match=rf"box 3 of boxes is of image {shown}, and input has a batch of 2"):
            self.call(backend, input, boxes)
        if backend == "cpu":  # also where nobody looked before
            native = getattr(torch.ops.accel_native, f"{type(self).function.__name__}_forward").default
            args = dispatch.OPS[type(self).function.__name__].prepare(input, boxes[:3], (3, 2), 0.25)
            with pytest.raises(RuntimeError, match="box 3 of boxes is of image"):
                native(*args._replace(boxes=boxes))

    def test_an_index_is_cut_off(self, backend):
        input, boxes = self.given()
        want = self.call(backend, input, boxes)
        assert_same(self.call(backend, input, boxes + torch.tensor([0.9, 0, 0, 0, 0])).out, want.out, "index + 0.9")

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("pixel", [(0, 0), (4, 5), (8, 3)])
    def test_what_is_not_finite_in_the_map_stays_in_its_bins(self, backend, value, pixel):
        input, boxes = self.given()
        boxes = torch.cat([torch.tensor([[1.0, 4.0, 4.0, 44.0, 40.0]]), boxes])
        at = (1, slice(None), *pixel)
        bad, mark = input.clone(), torch.zeros_like(input)
        bad[at], mark[at] = value, 1.0
        clean, got = self.call(backend, input, boxes), self.call(backend, bad, boxes)
        hit = self.call("reference", mark, boxes).out > 0
        assert hit.any() == (pixel != (0, 0))
        assert not hit.all()
        assert not got.out[hit].isfinite().any()
        assert_same(got.out[~hit], clean.out[~hit], "outputs without the pixel")
        upstream = torch.zeros_like(got.out)
        upstream[0, 0, 0, 0] = value
        leaf = input.requires_grad_()
        grad = torch.autograd.grad(type(self).function(leaf, boxes, (3, 2), 0.25, backend=backend), leaf, upstream)[0]
        reached = self.call("reference", input.detach(), boxes[:1]).grads["input"] != 0
        reached[:, 1:] = False
        assert_same(grad.isfinite(), ~reached, "where a gradient that is not finite arrives")


GOOD = {"input": zeros(2, 12, 5, 6), "boxes": zeros(3, 5), "output_size": (3, 2)}
BAD = [
    Bad("not_a_tensor", TypeError, "input must be .* list", {"input": [1.0]}),
    Bad("integer_input", TypeError, "input must be .* torch.uint8", {"input": zeros(2, 12, 5, 6, dtype=torch.uint8)}),
    Bad("rank_3", ValueError, r"\(12, 5, 6\)", {"input": zeros(12, 5, 6)}),
    Bad("no_rows", ValueError, r"\(2, 12, 0, 6\)", {"input": zeros(2, 12, 0, 6)}),
    Bad("no_channels", ValueError, r"\(2, 0, 5, 6\)", {"input": zeros(2, 0, 5, 6)}),
    Bad("too_wide", ValueError, "4194305", {"input": zeros(1).expand(2, 12, 1, 2**22 + 1)}),
    Bad("channels", ValueError, "3 x 2 = 6 bins .* got 13", {"input": zeros(2, 13, 5, 6)}),
    Bad("fewer_channels", ValueError, "4 x 4 = 16 bins .* got 12", {"output_size": 4}),
    Bad("no_bins", ValueError, r"at least 1, got output_size=\(3, 0\)", {"output_size": (3, 0)}),
    Bad("three_bins", ValueError, r"output_size=\(1, 1, 1\)", {"output_size": (1, 1, 1)}),
    Bad("bins_no_integer", TypeError, "output_size=2.0", {"output_size": 2.0}),
    Bad("scale_nan", ValueError, "spatial_scale=nan", {"spatial_scale": math.nan}),
    Bad("boxes_of_4", ValueError, r"\(K, 5\).*\(3, 4\)", {"boxes": zeros(3, 4)}),
    Bad("boxes_flat", ValueError, r"\(K, 5\).*\(5,\)", {"boxes": zeros(5)}),
    Bad("integer_boxes", TypeError, "boxes must .* torch.int64", {"boxes": zeros(3, 5, dtype=torch.int64)}),
    Bad("no_boxes", TypeError, "list of .* NoneType", {"boxes": None}),
    Bad("boxes_elsewhere", ValueError, "boxes is on meta .* cpu", {"boxes": zeros(3, 5, device="meta")}),
    Bad("listed_of_5", ValueError, r"boxes\[1\] must be \(L, 4\), got \(3, 5\)",
        {"boxes": [zeros(1, 4), zeros(3, 5)]}),
    Bad("listed_numbers", TypeError, r"boxes\[0\] must .* float", {"boxes": [1.0]}),
    Bad("listed_too_many", ValueError, "lists 3 images, .* batch of 2", {"boxes": [zeros(1, 4)] * 3}),
    Bad("no_such_backend", ValueError, "no backend 'cuda9'; it has cpu", {"backend": "cuda9"}),
]  # fmt: skip


# --- the Triton kernels, on the interpreter or a GPU ---


def check_triton_values(function, case, dtype, device):
    tensors, kwargs = case.make(dtype, device, 3)
    out = function(**tensors, **kwargs, backend="reference")
    grad_out = testing.random_like(out)
    grad_out = grad_out.round() if case.family == "exact" else grad_out
    want = testing.run(function, testing.double(tensors), kwargs, "reference", grad_out=grad_out.double())
    got = testing.run(function, tensors, kwargs, "triton", grad_out=grad_out)
    assert got.out.dtype == got.grads["input"].dtype == dtype
    testing.assert_close(got.out, want.out, case.family, dtype, "out")
    testing.assert_close(got.grads["input"], want.grads["input"], f"{case.family}_grad", dtype, "gradient of input")


def check_triton_boxes_of_no_image(kernels, op, case, device):
    """They give zeros, and the others are as if they were alone."""
    tensors, kwargs = case.make(torch.float32, device, 0)
    args = op._prepare(**tensors, **kwargs)
    images = torch.tensor([-1.0, 2.0, -1e30, math.nan, math.inf, 0.9])
    bad = args.boxes[:1].repeat(len(images), 1)
    bad[:, 0] = images
    boxes = torch.cat([args.boxes, bad])
    out, want = kernels.forward(args.input, boxes, *args[2:]), kernels.forward(*args)
    assert_same(out[: len(want)], want, "the other boxes")
    assert out[-len(images) : -1].count_nonzero() == 0
    own = args.boxes[:1].clone()
    own[:, 0] = 0.0
    assert_same(out[-1:], kernels.forward(args.input, own, *args[2:]), "index 0.9")
    size = list(args.input.shape)
    grad = kernels.backward(torch.ones_like(out[:-1]), boxes[:-1], size, *args[2:])
    assert_same(grad, kernels.backward(torch.ones_like(want), args.boxes, size, *args[2:]), "gradient")


def check_triton_not_finite(function, case, device):
    """In boxes it takes them out; in the map, and in a gradient, it stays where it is."""
    tensors, kwargs = case.make(torch.float32, device, 0)
    boxes = kwargs["boxes"].clone()
    for k, value in enumerate([math.nan, math.inf, -1e30]):
        boxes[k, 1 + k] = value
    got = testing.run(function, tensors, {**kwargs, "boxes": boxes}, "triton")
    assert got.out[:3].count_nonzero() == 0
    alone = testing.run(function, tensors, {**kwargs, "boxes": boxes[3:]}, "triton")
    assert_same(got.out[3:], alone.out, "the box that is left")
    assert_same(got.grads["input"], alone.grads["input"], "gradient of the box that is left")
    bad = tensors["input"].clone()
    bad[:, :, 3, 4] = math.nan
    grad_out = torch.full_like(got.out, math.nan)
    found, want = (
        testing.run(function, {"input": bad}, kwargs, name, grad_out=grad_out).named()
        for name in ("triton", "reference")
    )
    for part, value in found.items():
        assert_same(value.isnan(), want[part].isnan(), f"NaN in {part}")


def check_triton_refuses(kernels, op, case):
    tensors, kwargs = case.make(torch.float32, "cpu", 0)
    args = op._prepare(**tensors, **kwargs)
    assert "meta" in kernels.why_not(args._replace(input=args.input.to("meta")))
    from accel.kernels import _launch

    if _launch.INTERPRETING:
        many = args._replace(boxes=args.boxes[:1].expand(2**30, 5))
        assert "more than one launch can number" in kernels.why_not(many)
