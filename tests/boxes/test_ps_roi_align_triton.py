"""The Triton backend of position-sensitive alignment by itself, against the float64 reference.

Without a GPU the kernels run under Triton's interpreter, which is slow: cases are as small as their purpose allows.
"""

import functools

import pytest
import torch
from _boxes import check_triton_boxes_of_no_image, check_triton_not_finite, check_triton_refuses, check_triton_values
from test_ps_roi_align import case, ends, long_bins, powers

pytest.importorskip("triton")
from accel.kernels.boxes import ps_roi_align as kernels
from accel.ops.boxes import ps_roi_align as op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES = [
    case(ends, "plain", (7, 9), (3, 2), channels=1, count=4),
    case(ends, "ratio_2", (5, 6), (2, 2), channels=1, count=4, sampling_ratio=2),
    case(ends, "backwards", (5, 6), (2, 1), channels=1, count=4, scale=-0.25, sampling_ratio=1),
    case(ends, "backwards_adaptive", (5, 6), (2, 1), channels=1, count=4, scale=-0.25),
    case(ends, "channels_in_blocks", (4, 5), (1, 1), channels=35, batch=1, count=2),
    case(long_bins, "tiles", (35, 37), (1, 2), channels=1, batch=1, count=3),
    case(ends, "one_pixel", (1, 1), (2, 1), count=3),
    case(ends, "listed", (5, 6), (2, 1), listed=True, count=4),
    case(ends, "exact", (10, 10), (2, 2), channels=1, whole=True, boxes=functools.partial(powers, 2)),
]


# what is read and written is all that a dtype changes: two cases show it
CALLS = [(c, d) for c in CASES for d in c.dtypes if d == torch.float32 or c.name in ("plain", "exact")]


@pytest.mark.parametrize(("case", "dtype"), CALLS, ids=str)
def test_output_and_gradient(case, dtype):
    check_triton_values(op.ps_roi_align, case, dtype, DEVICE)


@pytest.mark.parametrize(
    ("low", "high", "ratio", "expected"),
    [
        (3.0, 3.0, -1, 0.0),  # no samples
        (3.0, 3.0, 2, 3.5),
        (4.0, 2.0, 2, 3.5),
        (-1.0, 0.0, -1, 1.0),  # at −1
        (-1.01, -0.01, -1, 0.0),
        (10.0, 11.0, -1, 10.0),  # at 10, moved to the last pixel
        (10.01, 11.01, -1, 0.0),
        (-400000.0, 400000.0, -1, 66 / 800000),
    ],
)
def test_samples(low, high, ratio, expected):
    input = torch.arange(1.0, 11.0, device=DEVICE).view(1, 1, 10, 1).expand(1, 1, 10, 3)
    boxes = torch.tensor([[0.0, 1.0, low, 2.0, high]], device=DEVICE)
    got = op.ps_roi_align(input, boxes, 1, 1.0, ratio, backend="triton")
    assert got.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_boxes_of_no_image():
    check_triton_boxes_of_no_image(kernels, op, CASES[0], DEVICE)


def test_what_is_not_finite():
    check_triton_not_finite(op.ps_roi_align, CASES[0], DEVICE)


def test_refuses():
    check_triton_refuses(kernels, op, CASES[0])
