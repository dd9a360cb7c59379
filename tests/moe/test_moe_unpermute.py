"""Results of experts back to their tokens: awkward calls as data for the common checks, an oracle, and bad input."""

import pytest
import torch
from _bad import Bad, check_bad, each, zeros
from _moe_cases import BACKENDS, LONG, checks_of, choices, unpermute_case

import accel
from accel import testing
from accel.ops.moe.plan import Plan
from accel.testing import assert_same

CASES = [
    unpermute_case("plain", 7, 2, 5, 3),
    unpermute_case("aligned", 9, 3, 4, 17, align=4),
    unpermute_case("of_nobody", 11, 3, 5, 33, nobody=0.4),
    unpermute_case("all_of_nobody", 4, 2, 3, 5, nobody=1.0),
    unpermute_case("one_expert", 5, 1, 1, 40),
    unpermute_case("all_experts", 6, 7, 7, 9),
    unpermute_case("capacity", 13, 2, 3, 6, capacity=4),
    unpermute_case("one_token", 1, 8, 64, 70),
    unpermute_case("wide", 3, 4, 6, 301),
    unpermute_case("exact", 19, 4, 6, 65, whole=True, nobody=0.1, align=8),
]
BEHAVIOUR = [unpermute_case("behaviour", 5, 2, 4, 6, nobody=0.2, capacity=2, align=2)]
GRADIENTS = [unpermute_case("gradients", 3, 2, 3, 2, nobody=0.3, align=2)]
# rows are in no order of the batch; it casts nothing; the kernel is moe_permute's
CHECKS = checks_of(
    accel.moe_unpermute, CASES, BEHAVIOUR, GRADIENTS, ("-batch-", "-empty-", "-autocast-"), slow=("guard_pages", *LONG)
)
LEVELS = testing.check_levels(accel.moe_unpermute, [c for c in CASES if c.name in ("of_nobody", "wide", "exact")])


@pytest.mark.parametrize("check", CHECKS)
def test_op(check):
    check()


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in LEVELS])
def test_every_instruction_set(check):
    check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted", [True, False])
def test_sums_are_those_of_plain_loops(weighted, backend):
    for case in CASES:
        tensors, kwargs = case.make(torch.float32, "cpu", 2)
        plan, destination = kwargs["plan"], kwargs["plan"].destination
        y, weights = [x.mul(2).round() for x in tensors.values()]  # exact in any order
        out, grad_y, grad_weights = (
            torch.zeros(len(destination), y.shape[1]),
            torch.zeros_like(y),
            torch.zeros_like(weights),
        )
        upstream = torch.randint(-3, 4, out.shape).float()
        for t, row in enumerate(destination.tolist()):
            for k, n in enumerate(row):
                if n >= 0:
                    w = weights[t, k] if weighted else 1.0
                    out[t] += w * y[n]
                    grad_y[n] = w * upstream[t]
                    grad_weights[t, k] = (upstream[t] * y[n]).sum()
        leaves = [y.requires_grad_(), weights.requires_grad_()]
        got = accel.moe_unpermute(y, plan, weights if weighted else None, backend=backend)
        assert_same(got.detach(), out, f"{case}")
        grads = torch.autograd.grad(got, leaves, upstream, allow_unused=True)
        assert_same(grads[0], grad_y, f"{case}: gradient of y")
        assert grads[1] is None if not weighted else torch.equal(grads[1], grad_weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_there_and_back(backend):
    """Choices whose weights sum to 1 give the tokens again, and rows that were dropped are missing."""
    x = torch.randint(-8, 8, (9, 5)).float().requires_grad_()
    indices, weights = choices(9, 4, 6), torch.tensor([0.5, 0.25, 0.125, 0.125]).expand(9, 4)
    rows, plan = accel.moe_permute(x, indices, 6, align=4, backend=backend)
    out = accel.moe_unpermute(rows, plan, weights, backend=backend)
    assert_same(out.detach(), x.detach(), "the same again")
    assert_same(torch.autograd.grad(out.sum(), x)[0], torch.ones(9, 5), "gradient")
    rows, plan = accel.moe_permute(x, indices, 6, capacity=3, backend=backend)
    left = torch.where(plan.destination >= 0, weights, 0.0).sum(1, keepdim=True)
    assert (left < 1).any()
    assert_same(accel.moe_unpermute(rows, plan, weights, backend=backend).detach(), x.detach() * left, "what is left")


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_no_choice_are_not_read(backend):
    tensors, kwargs = CASES[1].make(torch.float32, "cpu", 0)
    free = kwargs["plan"].source < 0
    assert free.any()
    want = accel.moe_unpermute(**tensors, **kwargs, backend=backend)
    tensors["y"][free] = torch.nan
    y, weights = tensors["y"].requires_grad_(), tensors["weights"].requires_grad_()
    got = accel.moe_unpermute(y, **kwargs, weights=weights, backend=backend)
    assert_same(got.detach(), want, "out")
    grads = torch.autograd.grad(got.sum(), [y, weights])
    assert grads[1].isfinite().all()
    assert grads[0][free].count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_any_floating_dtype(backend):
    tensors, kwargs = CASES[0].make(torch.bfloat16, "cpu", 0)
    given = {"y": tensors["y"], **kwargs, "backend": backend}
    weights = tensors["weights"].bfloat16()
    want = accel.moe_unpermute(weights=weights.float(), **given)
    for other in (weights, weights.double(), weights.T.contiguous().T):
        leaf = other.clone().requires_grad_()
        got = accel.moe_unpermute(weights=leaf, **given)
        assert_same(got.detach(), want, f"weights in {other.dtype}")
        assert torch.autograd.grad(got.sum(), leaf)[0].dtype == other.dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_that_holds_anything_is_bounded(backend):
    """Rows that nobody claims get zeros, and what is out of range is of nobody."""
    y = torch.arange(8.0).view(4, 2).requires_grad_()
    destination = torch.tensor([[0, 4], [-7, 2], [2**40, 0]])
    source = torch.tensor([0, -1, 3, 2**40])
    plan = Plan(source, destination, source[:1], source[:2])
    out = accel.moe_unpermute(y, plan, torch.ones(3, 2), backend=backend)
    assert out.tolist() == [[0.0, 1.0], [4.0, 5.0], [0.0, 1.0]]
    (grad,) = torch.autograd.grad(out.sum(), y)
    if backend == "cpu":  # row 0 is claimed twice, and one of the claims is the plan's
        assert grad[:, 0].tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (3, 2, 3, 0)])
def test_sizes_of_zero(shape, backend):
    T, K, X, C = shape
    rows, plan = accel.moe_permute(zeros(T, C), choices(T, K, X), X, backend=backend)
    y, weights = rows.requires_grad_(), zeros(T, K).requires_grad_()
    out = accel.moe_unpermute(y, plan, weights, backend=backend)
    assert out.shape == (T, C)
    for leaf, grad in zip((y, weights), torch.autograd.grad(out.sum(), (y, weights)), strict=True):
        assert_same(grad, torch.zeros_like(leaf), "gradient")
    rows, plan = accel.moe_permute(zeros(3, 4), torch.full((3, 2), -1), 2, capacity=0, backend=backend)
    assert_same(accel.moe_unpermute(rows, plan, backend=backend), zeros(3, 4), "no rows at all")


PLAN = accel.moe_permute(zeros(3, 4), torch.zeros(3, 2, dtype=torch.int64), 2, backend="reference")[1]
GOOD = {"y": zeros(6, 5), "plan": PLAN, "weights": zeros(3, 2)}
BAD = [
    Bad("not_a_tensor", TypeError, "y must be .* list", {"y": [1.0]}),
    Bad("integers", TypeError, "torch.int64", {"y": zeros(6, 5, dtype=torch.int64)}),
    Bad("rank_3", ValueError, r"\(1, 6, 5\)", {"y": zeros(1, 6, 5)}),
    Bad("rows", ValueError, r"the plan's 6 rows, got \(7, 5\)", {"y": zeros(7, 5)}),
    Bad("no_plan", TypeError, "moe_permute returns, got Tensor", {"plan": zeros(3)}),
    Bad("half_a_plan", TypeError, "moe_permute returns, got tuple", {"plan": tuple(PLAN)[:2]}),
    Bad("source_of_floats", TypeError, "plan.source must be int64, got torch.float32",
        {"plan": PLAN._replace(source=zeros(6))}),
    Bad("flat_destination", ValueError, r"plan.destination must have 2 axes, got \(6,\)",
        {"plan": PLAN._replace(destination=PLAN.destination.flatten())}),
    Bad("elsewhere", ValueError, "plan.source is on meta .* cpu",
        {"plan": PLAN._replace(source=PLAN.source.to("meta"))}),
    Bad("weights_of_3", ValueError, r"\(T, K\) = \(3, 2\), got \(3, 3\)", {"weights": zeros(3, 3)}),
    Bad("weights_of_integers", TypeError, "weights .* torch.int64", {"weights": zeros(3, 2, dtype=torch.int64)}),
    Bad("no_such_backend", ValueError, "no backend 'cuda9'; it has cpu", {"backend": "cuda9"}),
]  # fmt: skip


@each(BAD)
def test_bad_input(bad):
    check_bad(accel.moe_unpermute, GOOD, bad)
