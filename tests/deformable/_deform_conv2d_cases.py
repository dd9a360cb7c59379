"""Awkward calls of deformable convolution as data, for the checks of every backend."""

import functools
import math

import torch
import torch.nn.functional as F
from _hats import away_from_integers

import accel
from accel import testing
from accel.testing import Case

BACKENDS = ("cpu", "reference")


def case(
    name,
    channels,
    size,
    kernel=(3, 3),
    *,
    batch=2,
    groups=1,
    offset_groups=1,
    bias=True,
    mask=True,
    reach=1.5,
    small=torch.float32,
    last=False,
    change=None,
    family="deform_conv",
    dtypes=testing.KERNEL_DTYPES,
    **kwargs,
):
    """A case with random tensors: ``channels`` in and out, offsets of normal size ``reach`` that keep away from
    integers, ``small`` the dtype of offset, mask and bias (None: that of input), ``last`` for channels_last;
    ``change(tensors)`` edits the values in place."""
    stride, padding, dilation = (kwargs.get(n, d) for n, d in (("stride", 1), ("padding", 0), ("dilation", 1)))

    def make(dtype, device, seed):
        generator = torch.Generator().manual_seed(seed)
        inner = torch.float64 if dtype == torch.float64 else small or dtype
        c, o = channels
        taps = kernel[0] * kernel[1]
        shape = torch.empty(1, 1, *size), torch.empty(1, 1, *kernel)
        ho, wo = F.conv2d(*(x.to("meta") for x in shape), None, stride, padding, dilation).shape[2:]

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        tensors = {
            "input": normal(batch, c, *size),
            "offset": away_from_integers(reach * normal(batch, 2 * offset_groups * taps, ho, wo)),
            "weight": normal(o, c // groups, *kernel) / math.sqrt(c // groups * taps),
        }
        if bias:
            tensors["bias"] = normal(o)
        if mask:
            tensors["mask"] = torch.rand((batch, offset_groups * taps, ho, wo), generator=generator)
        if change is not None:
            change(tensors)
        for n in tensors:
            tensors[n] = tensors[n].to(device, dtype if n in ("input", "weight") else inner)
        if last:
            tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
        return tensors, kwargs

    batched = ("input", "offset", "mask") if mask else ("input", "offset")
    return Case(name, make, family, dtypes, sums=("bias",), batched=batched, autocast=("input", "weight"))


def whole(parts, tensors):
    """Small integers, offsets that are multiples of 1 / ``parts``: every product, sum and rounding is exact."""
    tensors["input"].mul_(1.2).round_().clamp_(-2, 2)
    tensors["offset"].mul_(parts).round_().div_(parts)
    tensors["weight"].sign_()
    if "bias" in tensors:
        tensors["bias"].round_()
    if "mask" in tensors:
        tensors["mask"].mul_(2.4).round_()


def on_integers(tensors):
    whole(1, tensors)


def offsets_on_integers(tensors):
    tensors["offset"].round_()


def far_away(tensors):
    tensors["offset"].add_(tensors["offset"].sign() * 50)


def some_not_finite(tensors):
    for i, value in enumerate((math.nan, math.inf, -math.inf, 1e30, -1e30)):
        tensors["offset"].view(-1)[i::11] = value


def no_mask(tensors):
    tensors["mask"][:, ::2] = 0.0


P1 = {"padding": 1}
HALVES = {"change": functools.partial(whole, 2), "family": "exact"}
QUARTERS = {
    "change": functools.partial(whole, 4),
    "family": "exact",
    "dtypes": (torch.float32, torch.float16),
}

CASES = [
    case("v1", (8, 8), (6, 7), mask=False, **P1),
    case("v2", (8, 8), (6, 7), **P1),
    case("v2_channels_last", (8, 12), (6, 7), last=True, **P1),
    case("v2_same_dtype", (8, 8), (6, 7), small=None, **P1),
    case("no_bias", (8, 4), (5, 5), bias=False, **P1),
    case("v1_no_bias", (3, 4), (5, 5), bias=False, mask=False),
    case("one_channel", (1, 1), (5, 4), **P1),
    case("one_pixel", (4, 4), (1, 1), **P1),
    case("one_pixel_one_tap", (3, 2), (1, 1), (1, 1)),
    case("one_row", (4, 4), (1, 40), padding=(1, 1)),
    case("one_column", (4, 4), (37, 1), padding=(1, 1)),
    case("one_output", (5, 6), (3, 3)),
    case("prime", (7, 11), (13, 5), **P1),
    case("one_tap", (8, 8), (5, 6), (1, 1)),
    case("kernel_1x5", (4, 6), (5, 9), (1, 5), padding=(0, 2)),
    case("kernel_2x2", (4, 6), (5, 6), (2, 2)),
    case("kernel_5x3", (4, 6), (7, 6), (5, 3), padding=(2, 1)),
    case("kernel_7x7", (4, 4), (8, 9), (7, 7), padding=3, batch=1),
    case("stride_2", (8, 8), (9, 10), stride=2, **P1),
    case("stride_2x3", (4, 4), (9, 11), stride=(2, 3), padding=(1, 0)),
    case("stride_beyond_kernel", (4, 4), (11, 10), (2, 2), stride=5),
    case("padding_beyond_kernel", (4, 4), (4, 5), padding=(4, 3)),
    case("dilation", (4, 4), (9, 8), dilation=(2, 3), padding=(2, 3)),
    case("all_different", (6, 4), (10, 9), (2, 3), stride=(3, 2), padding=(2, 1), dilation=(2, 3), offset_groups=2),
    case("groups", (8, 12), (5, 6), groups=4, **P1),
    case("depthwise", (6, 6), (5, 6), groups=6, **P1),
    case("depthwise_multiplied", (4, 12), (5, 6), groups=4, offset_groups=4, **P1),
    case("offset_groups", (12, 8), (5, 6), offset_groups=3, **P1),
    case("offset_group_per_channel", (5, 8), (5, 6), offset_groups=5, **P1),
    case("groups_across", (12, 4), (5, 6), groups=2, offset_groups=3, last=True, **P1),
    case("groups_within", (16, 8), (5, 6), groups=2, offset_groups=8, mask=False, **P1),
    case("40_to_72", (40, 72), (9, 10), batch=1, **P1),
    case("72_to_17_channels_last", (72, 17), (6, 11), batch=1, last=True, **P1),
    case("130_channels", (130, 34), (4, 5), batch=1, **P1),
    case("many_positions", (5, 6), (29, 37), batch=1, **P1),
    case("batch_1", (8, 8), (5, 6), batch=1, **P1),
    case("batch_5", (4, 3), (4, 5), batch=5, **P1),
    case("still", (8, 8), (6, 7), reach=0.3, **P1),
    case("far", (8, 8), (6, 7), reach=6.0, **P1),
    case("nothing_inside", (4, 4), (5, 6), change=far_away, family="exact", bias=False, **P1),
    case("not_finite", (8, 8), (6, 7), change=some_not_finite, **P1),
    case("half_the_taps", (8, 8), (6, 7), change=no_mask, **P1),
    case("exact", (4, 5), (5, 6), batch=1, **HALVES, **P1),
    case("exact_channels_last", (4, 5), (5, 4), batch=1, last=True, **HALVES, **P1),
    case("exact_strided", (4, 4), (7, 8), (2, 3), stride=(2, 1), padding=(1, 2), dilation=(2, 1), **HALVES),
    case("exact_groups", (12, 6), (5, 4), batch=1, groups=2, offset_groups=3, **HALVES, **P1),
    case("exact_17_channels", (17, 19), (3, 4), (2, 2), batch=1, **HALVES, **P1),
    case("exact_quarters", (2, 3), (5, 4), batch=1, **QUARTERS, **P1),
    case("exact_integers", (4, 4), (5, 6), change=on_integers, family="exact", **P1),
    case("exact_no_border", (4, 4), (5, 6), change=on_integers, family="exact", border_gradient=False, **P1),
    case("exact_far", (4, 4), (5, 6), reach=4.0, batch=1, **HALVES, **P1),
]

# Small, with a batch of two; between them every tensor that has a gradient.
BEHAVIOUR = [
    case("v2", (4, 6), (4, 5), groups=2, offset_groups=2, **P1),
    case("v1_channels_last", (6, 4), (4, 5), (2, 3), mask=False, last=True, stride=(1, 2)),
]

GRADIENTS = [
    case("v2", (2, 2), (3, 4), (2, 2), batch=1, padding=1),
    case("groups", (4, 2), (3, 3), (2, 2), batch=1, groups=2, offset_groups=2, bias=False),
    case("v1_strided", (2, 1), (5, 4), (2, 3), batch=1, mask=False, stride=2, padding=1, dilation=(1, 2)),
    case("not_finite", (2, 2), (3, 4), (2, 2), batch=1, padding=1, change=some_not_finite),
]


def by_name(name):
    return next(c for c in CASES if c.name == name)


def available(backend, tensors, kwargs):
    testing.require(accel.deform_conv2d, backend, tensors, kwargs)
