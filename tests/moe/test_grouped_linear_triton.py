"""The Triton kernels of grouped products, against the float64 reference.

Without a GPU they run under Triton's interpreter, which is slow: cases are as small as their purpose allows.
"""

import itertools

import pytest
import torch
from _expert_cases import linear_case
from _triton_checks import DEVICE, params

pytest.importorskip("triton")
import accel
from accel.kernels.moe import products
from accel.testing import assert_same

CASES = [
    linear_case("plain", (5, 0, 20), 7, 9, bias=True, tail=3),
    linear_case("transposed", (0, 33, 2), 18, 5, transposed=True, bias=True),
    linear_case("tiles", (70, 3), 40, 70),
    linear_case("one row", (0, 1), 1, 1),
    linear_case("exact", (3, 0, 40, 17), 21, 34, whole=True, bias=True, tail=2),
    linear_case("exact, transposed", (19, 2), 34, 18, whole=True, transposed=True, kind=torch.int32),
]
TINY = [linear_case("tiny", (2, 0, 3), 3, 4, bias=True, tail=1)]
QUICK = {
    "plain": "float32", "transposed": "bfloat16", "one row": "float32", "exact": "float32",
    "exact, transposed": "float16",
}  # fmt: skip


ELSEWHERE = ("batch-tiny", "empty-tiny")  # in its own terms, beside the other backends


@pytest.mark.parametrize(
    "check", [p for p in params(accel.grouped_linear, CASES, TINY, QUICK) if p.id not in ELSEWHERE]
)
def test_op(check):
    check()


def test_tiles_are_those_of_every_expert_and_cover_every_row_once():
    for counts, tail, block in (((5, 0, 40), 7, 16), ((0, 0), 3, 16), ((33,), 0, 16), ((1, 1, 1), 0, 32)):
        rows = sum(counts) + tail
        offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], device=DEVICE)
        found = [[] for _ in range(len(counts) + 1)]
        for expert, first, stop in zip(*[x.tolist() for x in products.tiles(offsets, rows, block)], strict=True):
            found[expert] += range(first, min(first + block, stop))
        edges = [*offsets.tolist(), rows]
        assert found == [list(range(a, b)) for a, b in itertools.pairwise(edges)]


def test_offsets_that_hold_anything_are_bounded():
    """On a GPU their values are not checked: every row is written, and none is read that is not there."""
    x, weight = torch.ones(6, 2, device=DEVICE), torch.ones(3, 4, 2, device=DEVICE)
    for offsets in ([0, 5, 2, 2**40], [-3, 2**50, 1, 1], [4, 4, 4, 4]):
        out = products.product(x, weight, True, None, torch.tensor(offsets, device=DEVICE), 6)
        assert set(out.flatten().tolist()) <= {0.0, 2.0}
        made = products.outer(x, x, torch.tensor(offsets, device=DEVICE), 6)
        assert made.isfinite().all()


def test_what_is_not_finite_reaches_its_own_expert_alone():
    case = linear_case("plain", (5, 3), 7, 4, tail=2)
    tensors, kwargs = case.make(torch.float32, DEVICE, 0)
    tensors["x"][6], tensors["x"][8:] = torch.nan, torch.inf
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()
    out = accel.grouped_linear(x, weight, **kwargs, backend="triton")
    assert out.isnan().any(1).tolist() == [False] * 6 + [True] + [False] * 3
    grads = torch.autograd.grad(out[:8].sum(), [x, weight])
    assert_same(grads[1][0].isnan().any(), torch.tensor(False, device=DEVICE), "the other expert")
    assert not grads[0][8:].any()
