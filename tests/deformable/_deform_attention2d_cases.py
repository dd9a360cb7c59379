"""Awkward calls of DCNv3's and DCNv4's attention as data, for the checks of every backend."""

import functools
import math

import torch
from _hats import away_from_integers

import accel
from accel import testing
from accel.testing import Case

BACKENDS = ("cpu", "reference")


def pair(value):
    return (value, value) if isinstance(value, int) else value


def case(
    name,
    size,
    *,
    groups=2,
    group_channels=4,
    batch=2,
    reach=1.5,
    small=torch.float32,
    change=None,
    family="sample",
    dtypes=testing.KERNEL_DTYPES,
    kernel_size=3,
    **kwargs,
):
    """A case with random tensors: offsets of normal size ``reach``, such that no position comes near an integer;
    ``change(tensors)`` edits the values in place."""

    def make(dtype, device, seed):
        generator = torch.Generator().manual_seed(seed)
        inner = torch.float64 if dtype == torch.float64 else small or dtype
        (kh, kw), (sh, sw) = pair(kernel_size), pair(kwargs.get("stride", 1))
        (ph, pw), (dh, dw) = pair(kwargs.get("padding", 0)), pair(kwargs.get("dilation", 1))
        ho, wo = (size[0] + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (size[1] + 2 * pw - dw * (kw - 1) - 1) // sw + 1
        scale = kwargs.get("offset_scale", 1.0)
        taps = [(e, a) for e in range(kw) for a in range(kh)]
        if kwargs.get("remove_center"):
            taps.remove((kw // 2, kh // 2))
        # where a tap stands from the middle of its window, up to an integer: the offset is chosen for the sum
        still = torch.tensor([[e * dw - dw * (kw - 1) // 2, a * dh - dh * (kh - 1) // 2] for e, a in taps]).double()
        shift = reach * torch.randn((batch, ho, wo, groups, len(taps), 2), generator=generator)
        tensors = {
            "input": torch.randn((batch, *size, groups * group_channels), generator=generator),
            "offset": away_from_integers((still + shift) * scale) / scale - still,
            "mask": torch.randn((batch, ho, wo, groups, len(taps)), generator=generator),
        }
        if change is not None:
            change(tensors)
        for n in tensors:
            tensors[n] = tensors[n].to(device, dtype if n == "input" else inner)
        return tensors, {"kernel_size": kernel_size, **kwargs}

    return Case(name, make, family, dtypes, batched=("input", "offset", "mask"))


def whole(parts, tensors):
    """Small integers, offsets that are multiples of 1 / ``parts``: every product, sum and rounding is exact."""
    tensors["input"].mul_(1.2).round_().clamp_(-2, 2)
    tensors["offset"].mul_(parts).round_().div_(parts)
    tensors["mask"].round_().clamp_(-2, 2)


def far_away(tensors):
    tensors["offset"].add_(tensors["offset"].sign() * 50)


def some_not_finite(tensors):
    for i, value in enumerate((math.nan, math.inf, -math.inf, 1e30, -1e30)):
        tensors["offset"].view(-1)[i::11] = value


def large_masks(tensors):
    tensors["mask"].mul_(30)


P1 = {"padding": 1}
HALVES = {"change": functools.partial(whole, 2), "family": "exact"}
QUARTERS = {"change": functools.partial(whole, 4), "family": "exact", "dtypes": (torch.float32, torch.float16)}

CASES = [
    case("v4", (6, 7), **P1),
    case("v3", (6, 7), softmax=True, **P1),
    case("same_dtype", (6, 7), small=None, **P1),
    case("softmax_same_dtype", (6, 7), small=None, softmax=True, **P1),
    case("without_centre", (6, 7), remove_center=True, **P1),
    case("without_centre_softmax", (6, 7), remove_center=True, softmax=True, offset_scale=2.0, **P1),
    case("scaled", (6, 7), offset_scale=1.7, **P1),
    case("scaled_down", (6, 7), offset_scale=0.3, dilation=2, padding=2),
    case("turned_round", (6, 7), offset_scale=-1.0, **P1),
    case("one_pixel", (1, 1), **P1),
    case("one_row", (1, 40), **P1),
    case("one_column", (37, 1), **P1),
    case("one_output", (3, 3)),
    case("one_tap", (5, 6), kernel_size=1),
    case("kernel_1x5", (5, 9), kernel_size=(1, 5), padding=(0, 2)),
    case("kernel_5x3_without_centre", (7, 6), kernel_size=(5, 3), padding=(2, 1), remove_center=True),
    case("kernel_2x2", (5, 6), kernel_size=2),
    case("kernel_2x4_dilated", (7, 9), kernel_size=(2, 4), dilation=(3, 1), padding=(1, 2)),
    case("kernel_2x4_spread", (7, 9), kernel_size=(2, 4), dilation=(3, 1), padding=(1, 2), offset_scale=1.3),
    case("kernel_7x7", (8, 9), kernel_size=7, padding=3, groups=1, batch=1),
    case("stride_2", (9, 10), stride=2, **P1),
    case("stride_2x3", (9, 11), stride=(2, 3), padding=(1, 0)),
    case("padding_beyond_kernel", (4, 5), padding=(4, 3)),
    case("dilation", (9, 8), dilation=(2, 3), padding=(2, 3)),
    case(
        "all_different", (10, 9), kernel_size=(3, 5), stride=(3, 2), padding=(2, 1), dilation=(2, 1), remove_center=True
    ),
    case("one_group", (5, 6), groups=1, group_channels=6, **P1),
    case("one_channel", (5, 6), groups=1, group_channels=1, **P1),
    case("group_per_channel", (5, 6), groups=5, group_channels=1, **P1),
    case("3_groups_of_7", (5, 6), groups=3, group_channels=7, **P1),
    case("2_groups_of_16", (5, 6), group_channels=16, **P1),
    case("1_group_of_40", (5, 6), groups=1, group_channels=40, **P1),
    case("4_groups_of_32", (4, 5), groups=4, group_channels=32, batch=1, **P1),
    case("1_group_of_130", (4, 3), groups=1, group_channels=130, **P1),
    case("many_positions", (23, 19), groups=1, batch=1, **P1),
    case("batch_1", (5, 6), batch=1, **P1),
    case("batch_5", (4, 5), batch=5, **P1),
    case("still", (6, 7), reach=0.3, **P1),
    case("far", (6, 7), reach=6.0, **P1),
    case("nothing_inside", (5, 6), change=far_away, family="exact", **P1),
    case("not_finite", (6, 7), change=some_not_finite, **P1),
    case("not_finite_softmax", (6, 7), change=some_not_finite, softmax=True, **P1),
    case("large_masks", (6, 7), change=large_masks, softmax=True, **P1),
    case("exact", (5, 6), **HALVES, **P1),
    case("exact_without_centre", (5, 6), remove_center=True, offset_scale=2.0, **HALVES, **P1),
    case("exact_strided", (7, 8), kernel_size=(2, 3), stride=(2, 1), padding=(1, 2), dilation=(2, 1), **HALVES),
    case("exact_3_groups_of_17", (4, 3), groups=3, group_channels=17, **HALVES, **P1),
    case("exact_quarters", (5, 4), **QUARTERS, **P1),
    case("exact_integers", (5, 6), change=functools.partial(whole, 1), family="exact", **P1),
]

# Small, with a batch of two; between them every tensor that has a gradient.
BEHAVIOUR = [
    case("v3", (4, 5), softmax=True, remove_center=True, offset_scale=1.5, **P1),
    case("v4_strided", (5, 6), kernel_size=(2, 3), stride=(1, 2), groups=1),
]

GRADIENTS = [
    case("v4", (3, 4), group_channels=2, batch=1, kernel_size=2, padding=1),
    case("v3", (3, 3), groups=1, group_channels=2, batch=1, softmax=True, remove_center=True, offset_scale=1.5, **P1),
    case("not_finite", (3, 4), group_channels=2, batch=1, kernel_size=2, padding=1, change=some_not_finite),
]


def by_name(name):
    return next(c for c in CASES if c.name == name)


def available(backend, tensors, kwargs):
    testing.require(accel.deform_attention2d, backend, tensors, kwargs)
