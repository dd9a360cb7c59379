"""Position-sensitive pooling of boxes: awkward calls as data for the common checks, an oracle, and bad input."""

import numpy as np
import pytest
import torch
from _bad import check_bad, each
from _boxes import (
    BACKENDS,
    BAD,
    GOOD,
    OnEachBackend,
    case,
    check_against_oracle,
    checks_of,
    common_cases,
    naive,
    pool_plane,
)

import accel
from accel import dispatch, testing
from accel.ops.boxes.ps_roi_pool import OP


def ends(count, size, bins, generator):
    """Both ends of boxes in pixels, away from where rounding changes its mind."""
    low = torch.randint(-3, size, (count,), generator=generator)
    high = low + torch.randint(0, max(size // 2, 4), (count,), generator=generator)
    fraction = 0.8 * torch.rand((2, count), generator=generator) - 0.4
    return low + fraction[0], high + fraction[1]


def powers(boxes):
    """Bins of 4 x 2 pixels, all of them inside, and two of one pixel."""
    at = torch.tensor([[0, 0], [1, 0], [0, 2], [3, 1], [2, 2]])
    corners = torch.cat([at, at + torch.tensor([4, 8])], 1)
    corners[3:, 2:] = corners[3:, :2] + 2
    return torch.cat([torch.tensor([0.0, 1, 1, 0, 1])[:, None], corners * 4], 1)


EXACT = {"whole": True, "boxes": powers}
CASES = [
    *common_cases(ends),
    case(ends, "exact", (11, 13), (2, 2), **EXACT),
    case(ends, "exact_17_channels", (11, 7), (2, 2), channels=17, **EXACT),
]
BEHAVIOUR = [case(ends, "plain", (5, 6), (2, 3)), case(ends, "listed", (6, 4), (2, 1), listed=True)]
GRADIENTS = [case(ends, "plain", (4, 5), (2, 1), channels=1), case(ends, "one_bin", (3, 3), (1, 1), batch=1)]
CHECKS = checks_of(accel.ps_roi_pool, CASES, BEHAVIOUR, GRADIENTS)


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


def by_name(name):
    return next(c for c in CASES if c.name == name)


class TestOnEachBackend(OnEachBackend):
    function = staticmethod(accel.ps_roi_pool)
    example = by_name("plain")


@pytest.mark.parametrize("name", [c.name for c in CASES if c.name not in ("40_channels", "many_boxes")])
def test_reference_is_the_definition(name):
    check_against_oracle(accel.ps_roi_pool, pool_plane, by_name(name), "reference", torch.float64, np.float64, 1e-12)


def pooled(rows, low, high, bins, backend, dtype=torch.float32):
    """Means of a column of ``rows`` pixels that hold their own index, from a box of one pixel's width."""
    input = torch.arange(rows, dtype=dtype).view(1, 1, rows, 1).expand(1, bins, rows, 2).contiguous()
    boxes = torch.tensor([[0.0, 0.0, low, 1.0, high]])
    testing.require(accel.ps_roi_pool, backend, {"input": input}, {"boxes": boxes, "output_size": (bins, 1)})
    return accel.ps_roi_pool(input, boxes, (bins, 1), backend=backend).flatten().tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("low", "high", "bins", "expected"),
    [
        (0.0, 4.0, 2, [0.5, 2.5]),
        (0.0, 5.0, 2, [1.0, 3.0]),  # bins share row 2
        (0.5, 3.49, 1, [1.5]),  # 1 to 3
        (1.5, 2.5, 1, [2.0]),  # 2 to 3: ties go away from 0, not to the even
        (2.5, 3.5, 1, [3.0]),
        (-0.5, 2.0, 1, [0.5]),  # −1 to 2
        (-0.49, 2.0, 1, [0.5]),
        (-2.5, 1.0, 4, [0.0, 0.0, 0.0, 0.0]),  # −3 to 1: only row 0, which is 0
        (3.0, 3.0, 1, [3.0]),  # one pixel at least
        (4.0, 1.0, 1, [4.0]),
        (4.0, 2.0, 3, [4.0, 4.0, 4.0]),
        (6.0, 10.0, 2, [6.5, 8.0]),  # row 9, the last, is in no bin
        (8.0, 30.0, 1, [8.0]),
        (9.0, 12.0, 1, [0.0]),
        (0.49999997, 2.0, 1, [0.5]),  # 0 to 2, though 0.49999997 + 0.5 rounds to 1
    ],
)
def test_rows_of_bins(backend, low, high, bins, expected):
    assert pooled(10, low, high, bins, backend) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_bins_are_those_of_float32(backend):
    """57 / 7 · 7 is more than 57 in float32, so that the last bin has a row more, as in torchvision."""
    assert pooled(60, 0.0, 57.0, 7, backend)[-1] == 52.5  # 48 to 58
    assert pooled(60, 0.0, 57.0, 7, "reference", torch.float64)[-1] == 52.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_size_against_float32_loops(backend):
    sizes = torch.arange(1.0, 121.0)
    boxes = torch.stack([torch.zeros(120), torch.zeros(120), torch.zeros(120), torch.ones(120), sizes], 1)
    input = torch.randn(1, 7, 130, 2)
    testing.require(accel.ps_roi_pool, backend, {"input": input}, {"boxes": boxes, "output_size": (7, 1)})
    got = accel.ps_roi_pool(input, boxes, (7, 1), backend=backend)
    want, _ = naive(pool_plane, input.double(), got.double(), boxes, (7, 1), 1.0, real=np.float32)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_that_of_the_output_at_the_border(backend):
    input = torch.randn(1, 1, 4, 5)
    kwargs = {"boxes": torch.tensor([[0.0, 0.0, 0.0, 5.0, 4.0]]), "output_size": 1}
    testing.require(accel.ps_roi_pool, backend, {"input": input}, kwargs)
    expected = torch.full((4, 5), 1 / 12)
    expected[-1], expected[:, -1] = 0.0, 0.0
    got = testing.run(accel.ps_roi_pool, {"input": input}, kwargs, backend)
    torch.testing.assert_close(got.out.flatten(), (expected * input).sum().view(1))
    torch.testing.assert_close(got.grads["input"][0, 0], expected)


LEVELS = testing.check_levels(accel.ps_roi_pool, map(by_name, ["plain", "7x7_bins", "wide", "40_channels", "exact"]))


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in LEVELS])
def test_every_instruction_set(check):
    check()


def test_compiled_by_inductor():
    tensors, kwargs = BEHAVIOUR[0].make(torch.float32, "cpu", 0)
    backend = next(n for n, r in dispatch.reasons(OP, OP.prepare(**tensors, **kwargs)).items() if r is None)
    testing.check_compile(accel.ps_roi_pool, BEHAVIOUR[0], backend, compiler="inductor")


@each(BAD)
def test_bad_input(bad):
    check_bad(accel.ps_roi_pool, GOOD, bad)


def test_double_runs_on_the_reference_alone():
    tensors, kwargs = BEHAVIOUR[0].make(torch.float64, "cpu", 0)
    assert accel.ps_roi_pool(**tensors, **kwargs).dtype == torch.float64
    for backend in ("cpu", "triton"):
        with pytest.raises(NotImplementedError, match=f"backend '{backend}' cannot run this call: ."):
            accel.ps_roi_pool(**tensors, **kwargs, backend=backend)
