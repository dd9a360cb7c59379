"""The Triton kernels of permutation and its way back, against the float64 reference.

Without a GPU they run under Triton's interpreter, which is slow: cases are as small as their purpose allows.
"""

import pytest
import torch
from _moe_cases import choices, moe_permute, permute_case, unpermute_case

pytest.importorskip("triton")
import accel
from accel import testing
from accel.kernels.moe import rows
from accel.ops.moe import moe_permute as op
from accel.ops.moe.plan import Plan
from accel.testing import assert_same

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

PERMUTE = [
    permute_case("plain", 5, 2, 4, 3, nobody=0.2),
    permute_case("aligned", 4, 3, 3, 17, align=4),
    permute_case("by_score", 7, 2, 3, 6, capacity=2, scores=True),
    permute_case("channels_in_blocks", 2, 2, 3, 530),
    permute_case("one_expert", 3, 1, 1, 5),
    permute_case("exact", 9, 3, 4, 33, whole=True, nobody=0.1, align=2),
]
UNPERMUTE = [
    unpermute_case("plain", 5, 2, 4, 3, nobody=0.2),
    unpermute_case("aligned", 4, 3, 3, 17, align=4),
    unpermute_case("capacity", 7, 2, 3, 6, capacity=2),
    unpermute_case("channels_in_blocks", 2, 2, 3, 530),
    unpermute_case("exact", 9, 3, 4, 33, whole=True, nobody=0.1, align=2),
]
CALLS = [
    (function, case, dtype)
    for function, cases in ((moe_permute, PERMUTE), (accel.moe_unpermute, UNPERMUTE))
    for case in cases
    for dtype in case.dtypes
    if dtype == torch.float32 or case.name in ("plain", "exact")
]


@pytest.mark.parametrize(("function", "case", "dtype"), CALLS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_output_and_gradients(function, case, dtype):
    testing.values.check_values(function, case, "triton", dtype, DEVICE)


@pytest.mark.parametrize("case", PERMUTE, ids=str)
def test_the_plan_is_the_references(case):
    tensors, kwargs = case.make(torch.float32, DEVICE, 1)
    got = accel.moe_permute(**tensors, **kwargs, backend="triton")
    want = accel.moe_permute(**tensors, **kwargs, backend="reference")
    for a, b in zip([got[0], *got[1]], [want[0], *want[1]], strict=True):
        assert_same(a, b, str(case))


def test_there_and_back():
    x = torch.randint(-8, 8, (6, 5), device=DEVICE).float().requires_grad_()
    weights = torch.tensor([0.5, 0.25, 0.25], device=DEVICE).expand(6, 3)
    moved, plan = accel.moe_permute(x, choices(6, 3, 5).to(DEVICE), 5, align=4, backend="triton")
    out = accel.moe_unpermute(moved, plan, weights, backend="triton")
    assert_same(out.detach(), x.detach(), "the same again")
    assert_same(torch.autograd.grad(out.sum(), x)[0], torch.ones_like(x), "gradient")


SLOW = [] if DEVICE == "cuda" else [pytest.mark.slow]


@pytest.mark.parametrize("check", ["poison", "second_derivative", pytest.param("repeat", marks=SLOW)])
def test_behaviour(check):
    getattr(testing.checks, f"check_{check}")(accel.moe_unpermute, UNPERMUTE[1], "triton", DEVICE)


def test_rows_of_no_choice_are_not_read():
    tensors, kwargs = UNPERMUTE[1].make(torch.float32, DEVICE, 0)
    want = testing.run(accel.moe_unpermute, tensors, kwargs, "triton")
    tensors["y"][kwargs["plan"].source < 0] = torch.nan
    got = testing.run(accel.moe_unpermute, tensors, kwargs, "triton")
    for name, value in got.named().items():
        assert_same(value, want.named()[name], name)


def test_a_plan_that_holds_anything_is_bounded():
    """Rows that nobody claims get zeros, and what is out of range is of nobody."""
    y = torch.arange(8.0, device=DEVICE).view(4, 2).requires_grad_()
    destination = torch.tensor([[0, 4], [-7, 2], [2**40, 0]], device=DEVICE)
    source = torch.tensor([0, -1, 3, 2**40], device=DEVICE)
    plan = Plan(source, destination, source[:1], source[:2])
    out = accel.moe_unpermute(y, plan, torch.ones(3, 2, device=DEVICE), backend="triton")
    assert out.tolist() == [[0.0, 1.0], [4.0, 5.0], [0.0, 1.0]]
    assert torch.autograd.grad(out.sum(), y)[0][:, 0].tolist() == [1.0, 0.0, 1.0, 0.0]
    alone = accel.moe_unpermute(y, plan._replace(source=torch.full_like(source, 1)), backend="triton")
    assert torch.autograd.grad(alone.sum(), y)[0].count_nonzero() == 0  # no row and choice name each other


def test_refuses():
    x, indices = torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64)
    args = op._prepare(x, indices, 2)
    assert "meta" in rows.why_not(args._replace(x=x.to("meta")))
    if rows._launch.INTERPRETING:
        many = args._replace(x=x[:1].expand(2**31, 3))
        assert "than one launch can number" in rows.why_not(many)
