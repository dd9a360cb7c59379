"""Position-sensitive alignment of boxes: awkward calls as data for the common checks, an oracle, and bad input."""

import functools

import numpy as np
import pytest
import torch
from _bad import Bad, check_bad, each
from _boxes import (
    BACKENDS,
    BAD,
    GOOD,
    OnEachBackend,
    align_plane,
    case,
    check_against_oracle,
    checks_of,
    common_cases,
)

import accel
from accel import dispatch, testing
from accel.ops.boxes.ps_roi_align import OP


def ends(count, size, bins, generator, longest=3):
    """Both ends of boxes in pixels, such that no bin's length is near an integer, where the number of samples jumps."""
    low = (size + 4) * torch.rand(count, generator=generator) - 3
    whole = torch.randint(0, longest, (count,), generator=generator)
    return low, low + bins * (whole + 0.1 + 0.8 * torch.rand(count, generator=generator))


def powers(length, boxes):
    """Boxes at whole pixels, with bins of ``length`` pixels each way."""
    at = torch.tensor([[0, 0], [1, 0], [0, 2], [3, 1], [7, 6]])
    corners = torch.cat([at, at + 2 * length], 1)
    return torch.cat([torch.tensor([0.0, 1, 1, 0, 1])[:, None], corners * 4], 1)


long_bins = functools.partial(ends, longest=14)
FP16 = {"dtypes": (torch.float32, torch.float16)}

CASES = [
    *common_cases(ends),
    case(ends, "ratio_1", sampling_ratio=1),
    case(ends, "ratio_2", sampling_ratio=2),
    case(ends, "ratio_5", sampling_ratio=5),
    case(ends, "ratio_0", sampling_ratio=0),
    case(long_bins, "long_bins", (23, 31), (2, 3)),
    case(long_bins, "long_bins_ratio_2", (23, 31), (2, 3), sampling_ratio=2),
    *[
        c
        for c in common_cases(ends, sampling_ratio=3)
        if c.name in ("out_of_order", "without_size", "far_away", "not_finite", "one_pixel", "scale_turned_round")
    ],
    case(ends, "exact", (11, 13), (2, 2), whole=True, boxes=functools.partial(powers, 2), sampling_ratio=2),
    case(ends, "exact_adaptive", (11, 13), (2, 2), whole=True, boxes=functools.partial(powers, 2)),
    case(ends, "exact_quarters", (11, 13), (2, 2), whole=True, boxes=functools.partial(powers, 1), sampling_ratio=2,
         **FP16),
]  # fmt: skip
BEHAVIOUR = [case(ends, "plain", (5, 6), (2, 3)), case(ends, "listed", (6, 4), (2, 1), listed=True, sampling_ratio=2)]
GRADIENTS = [
    case(ends, "plain", (4, 5), (2, 1), channels=1),
    case(ends, "ratio_2", (3, 3), (1, 1), batch=1, sampling_ratio=2),
]


def named(cases):
    """Cases that come twice, with another ratio the second time, get names of their own."""
    seen = set()
    for c in cases:
        name = f"{c.name}_ratio_3" if c.name in seen else c.name
        seen.add(c.name)
        object.__setattr__(c, "name", name)
    return cases


CHECKS = checks_of(accel.ps_roi_align, named(CASES), BEHAVIOUR, GRADIENTS)


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


def by_name(name):
    return next(c for c in CASES if c.name == name)


class TestOnEachBackend(OnEachBackend):
    function = staticmethod(accel.ps_roi_align)
    example = by_name("plain")


@pytest.mark.parametrize("name", [c.name for c in CASES if c.name not in ("40_channels", "many_boxes")])
def test_reference_is_the_definition(name):
    check_against_oracle(accel.ps_roi_align, align_plane, by_name(name), "reference", torch.float64, np.float64, 1e-12)


def aligned(rows, low, high, bins, backend, **kwargs):
    """Means of samples of a column of ``rows`` pixels that hold their own index plus 1."""
    input = torch.arange(1.0, rows + 1).view(1, 1, rows, 1).expand(1, bins, rows, 3).contiguous()
    kwargs = {"boxes": torch.tensor([[0.0, 1.0, low, 2.0, high]]), "output_size": (bins, 1), **kwargs}
    testing.require(accel.ps_roi_align, backend, {"input": input}, kwargs)
    return accel.ps_roi_align(input, **kwargs, backend=backend).flatten().tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("low", "high", "ratio", "expected"),
    [
        (2.0, 3.0, -1, [3.0]),  # one sample in the middle of pixel 2
        (2.0, 4.0, -1, [3.5]),  # of pixels 2 and 3
        (2.0, 4.0, 1, [3.5]),  # between them
        (2.0, 2.5, -1, [2.75]),
        (4.0, 2.0, 2, [3.5]),  # backwards
        (4.0, 2.0, -1, [0.0]),  # no samples
        (3.0, 3.0, -1, [0.0]),
        (3.0, 3.0, 2, [3.5]),
        (-0.75, 0.25, -1, [1.0]),  # at −0.75, moved to the first pixel
        (-1.0, 0.0, -1, [1.0]),  # at −1
        (-1.01, -0.01, -1, [0.0]),  # further
        (10.0, 11.0, -1, [10.0]),  # at 10, moved to the last pixel, 9
        (10.01, 11.01, -1, [0.0]),
        (-2.0, 2.0, 2, [0.75]),  # at −1.5, which is 0, and 0.5
        (-400000.0, 400000.0, -1, [66 / 800000]),  # a sample for each pixel, and one at −1 and at 10, on the border
    ],
)
def test_samples_of_bins(backend, low, high, ratio, expected):
    assert aligned(10, low, high, 1, backend, sampling_ratio=ratio) == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "7x7_bins", "long_bins", "ratio_2", "out_of_order_ratio_3"])
def test_float32_loops(backend, name):
    check_against_oracle(accel.ps_roi_align, align_plane, by_name(name), backend, torch.float32, np.float32, 2e-5)


LEVELS = testing.check_levels(
    accel.ps_roi_align, map(by_name, ["plain", "7x7_bins", "wide", "40_channels", "long_bins", "ratio_2", "exact"])
)


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in LEVELS])
def test_every_instruction_set(check):
    check()


def test_compiled_by_inductor():
    tensors, kwargs = BEHAVIOUR[0].make(torch.float32, "cpu", 0)
    backend = next(n for n, r in dispatch.reasons(OP, OP.prepare(**tensors, **kwargs)).items() if r is None)
    testing.check_compile(accel.ps_roi_align, BEHAVIOUR[0], backend, compiler="inductor")


BAD_RATIOS = [
    Bad("ratio_no_integer", TypeError, "sampling_ratio=1.5", {"sampling_ratio": 1.5}),
    Bad("ratio_too_large", ValueError, "at most 4096, got sampling_ratio=5000", {"sampling_ratio": 5000}),
]


@each([*BAD, *BAD_RATIOS])
def test_bad_input(bad):
    check_bad(accel.ps_roi_align, GOOD, bad)


def test_double_runs_on_the_reference_alone():
    tensors, kwargs = BEHAVIOUR[0].make(torch.float64, "cpu", 0)
    assert accel.ps_roi_align(**tensors, **kwargs).dtype == torch.float64
    for backend in ("cpu", "triton"):
        with pytest.raises(NotImplementedError, match=f"backend '{backend}' cannot run this call: ."):
            accel.ps_roi_align(**tensors, **kwargs, backend=backend)
