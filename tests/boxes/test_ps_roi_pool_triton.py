"""The Triton backend of position-sensitive pooling by itself, against the float64 reference.

Without a GPU the kernels run under Triton's interpreter, which is slow: cases are as small as their purpose allows.
"""

import pytest
import torch
from _boxes import check_triton_boxes_of_no_image, check_triton_not_finite, check_triton_refuses, check_triton_values
from test_ps_roi_pool import case, ends, powers

pytest.importorskip("triton")
from accel import testing
from accel.kernels.boxes import ps_roi_pool as kernels
from accel.ops.boxes import ps_roi_pool as op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES = [
    case(ends, "plain", (7, 9), (3, 2), channels=1, count=4),
    case(ends, "channels_in_blocks", (4, 5), (1, 1), channels=35, batch=1, count=2),
    case(ends, "tiles", (35, 37), (1, 2), channels=1, batch=1, count=3),
    case(ends, "one_pixel", (1, 1), (2, 1), count=3),
    case(ends, "listed", (5, 6), (2, 1), listed=True, count=4),
    case(ends, "exact", (11, 8), (2, 2), channels=1, whole=True, boxes=powers),
]


# what is read and written is all that a dtype changes: two cases show it
CALLS = [(c, d) for c in CASES for d in c.dtypes if d == torch.float32 or c.name in ("plain", "exact")]


@pytest.mark.parametrize(("case", "dtype"), CALLS, ids=str)
def test_output_and_gradient(case, dtype):
    check_triton_values(op.ps_roi_pool, case, dtype, DEVICE)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.5, 3.49, [1.5]), (2.5, 3.5, [3.0]), (-0.5, 2.0, [0.5]), (0.49999997, 2.0, [0.5]), (4.0, 1.0, [4.0])],
)
def test_corners_are_rounded_away_from_zero(low, high, expected):
    input = torch.arange(10.0, device=DEVICE).view(1, 1, 10, 1).expand(1, 1, 10, 2)
    boxes = torch.tensor([[0.0, 0.0, low, 1.0, high]], device=DEVICE)
    assert op.ps_roi_pool(input, boxes, 1, backend="triton").flatten().tolist() == expected


def test_bins_are_those_of_float32():
    sizes = torch.tensor([31.0, 57.0, 62.0])
    boxes = torch.stack([torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.ones(3), sizes], 1).to(DEVICE)
    input = torch.randn(1, 7, 65, 2, device=DEVICE)
    got = op.ps_roi_pool(input, boxes, (7, 1), backend="triton")
    want = op.ps_roi_pool(input, boxes, (7, 1), backend="reference")
    testing.assert_close(got, want, "sample", torch.float32)


def test_boxes_of_no_image():
    check_triton_boxes_of_no_image(kernels, op, CASES[0], DEVICE)


def test_what_is_not_finite():
    check_triton_not_finite(op.ps_roi_pool, CASES[0], DEVICE)


def test_refuses():
    check_triton_refuses(kernels, op, CASES[0])
