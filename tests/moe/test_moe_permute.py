"""Tokens sorted by expert: awkward calls as data for the common checks, an oracle in loops, drops, and bad input."""

import re

import pytest
import torch
from _bad import Bad, check_bad, each, zeros
from _moe_cases import BACKENDS, checks_of, choices, moe_permute, permute_case, plan_oracle

import accel
from accel import testing
from accel.testing import assert_same

SAME = torch.full((5, 1), 2)
CASES = [
    permute_case("plain", 7, 2, 5, 3),
    permute_case("aligned", 9, 3, 4, 17, align=4),
    permute_case("of_nobody", 11, 3, 5, 33, nobody=0.4),
    permute_case("all_of_nobody", 4, 2, 3, 5, nobody=1.0),
    permute_case("one_expert", 5, 1, 1, 40),
    permute_case("all_experts", 6, 7, 7, 9),
    permute_case("more_choices_than_experts", 5, 6, 3, 8, distinct=False),
    permute_case("all_on_one", 5, 1, 4, 31, indices=SAME, align=3),
    permute_case("more_experts_than_rows", 2, 2, 300, 7, align=16),
    permute_case("capacity", 13, 2, 3, 6, capacity=4, distinct=False),
    permute_case("capacity_aligned", 13, 2, 5, 6, capacity=3, align=2, nobody=0.1),
    permute_case("by_score", 13, 3, 4, 6, capacity=3, scores=True),
    permute_case("one_token", 1, 8, 64, 70),
    permute_case("exact", 19, 4, 6, 65, whole=True, nobody=0.1, align=8),
]
BEHAVIOUR = [permute_case("behaviour", 5, 2, 4, 6, nobody=0.2, capacity=2, align=2)]
GRADIENTS = [
    permute_case("gradients", 3, 2, 3, 2, nobody=0.3, align=2),
    permute_case("dropped", 4, 2, 3, 2, capacity=2, scores=True),
]
# the result is in no order of the batch, and the gradient does not depend on x; it casts nothing
CHECKS = checks_of(
    moe_permute, CASES, BEHAVIOUR, GRADIENTS, ("-batch-", "-inplace-", "-second_derivative-", "-autocast-")
)
LEVELS = testing.check_levels(moe_permute, [c for c in CASES if c.name in ("of_nobody", "exact")])


@pytest.mark.parametrize("check", CHECKS)
def test_op(check):
    check()


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in LEVELS])
def test_every_instruction_set(check):
    check()


def check_plan(x, indices, num_experts, backend, capacity=None, weights=None, align=1):
    given = {"capacity": capacity, "weights": weights, "drop": "order" if weights is None else "score", "align": align}
    testing.require(accel.moe_permute, backend, {"x": x, "indices": indices}, {"num_experts": num_experts, **given})
    rows, plan = accel.moe_permute(x, indices, num_experts, **given, backend=backend)
    source, destination, counts, offsets = plan_oracle(indices, num_experts, capacity, weights, align)
    assert len(source) <= len(rows) == len(plan.source), f"{len(source)} rows are used, N is {len(rows)}"
    assert len(rows) % align == 0
    source += [-1] * (len(rows) - len(source))
    assert_same(plan.source, torch.tensor(source, dtype=torch.int64), "source")
    assert_same(plan.destination, destination, "destination")
    assert_same(plan.counts, counts, "counts")
    assert_same(plan.offsets, offsets, "offsets")
    nothing = torch.zeros_like(x[0])
    want = [x[s // indices.shape[1]] if s >= 0 else nothing for s in source]
    assert_same(rows, torch.stack(want) if want else x[:0], "rows")
    return plan


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plan_is_that_of_plain_loops(case, backend):
    tensors, kwargs = case.make(torch.float32, "cpu", 3)
    kwargs.pop("drop", None)
    check_plan(**tensors, **kwargs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_plans(backend):
    """Of many sizes, with choices of nobody and one expert that has half of all."""
    generator = torch.Generator().manual_seed(4)
    for seed in range(60):
        T, K, X, align, capacity = (
            int(torch.randint(low, high, (), generator=generator))
            for low, high in [(1, 40), (1, 9), (1, 20), (1, 9), (-6, 9)]
        )
        indices = choices(T, K, X, seed, nobody=0.1, distinct=seed % 2 == 0)
        if seed % 3 == 0:
            indices[: T // 2] = X // 2
        weights = None
        if capacity >= 0 and seed % 4 < 2:
            weights = torch.randint(0, 3, (T, K), generator=generator).float()  # with ties
            weights[::3, 0] = torch.nan
        x = torch.randint(-8, 8, (T, 3), generator=generator).float()
        check_plan(x, indices, X, backend, None if capacity < 0 else capacity, weights, align)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "given", [{}, {"capacity": 5000}, {"capacity": 5000, "drop": "score"}], ids=["all", "order", "score"]
)
def test_many_choices_are_sorted_in_runs(given, threads):
    """Runs of choices are counted apart, whatever the number of threads."""
    T, K, X = 20001, 4, 7
    indices = choices(T, K, X, nobody=0.05)
    indices[: T // 2, 0] = 3
    x, weights = torch.arange(float(T))[:, None], torch.rand(T, K)
    given = {**given, "weights": weights}
    testing.require(accel.moe_permute, "cpu", {"x": x, "indices": indices}, {"num_experts": X, **given})
    rows, want = accel.moe_permute(x, indices, X, **given, backend="reference")
    with testing.running.threads(threads):
        got = accel.moe_permute(x, indices, X, **given, backend="cpu")
    assert_same(got[0], rows, "rows")
    for name, a, b in zip(want._fields, got[1], want, strict=True):
        assert_same(a, b, name)
    assert want.counts.sum() == (want.destination >= 0).sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_sort(backend):
    x = torch.zeros(0, 4, requires_grad=True)
    rows, plan = accel.moe_permute(x, torch.zeros(0, 2, dtype=torch.int64), 3, align=8, backend=backend)
    assert rows.shape == (0, 4)
    assert plan.counts.tolist() == [0, 0, 0]
    assert plan.offsets.tolist() == [0, 0, 0, 0]
    assert plan.destination.shape == (0, 2)
    assert_same(torch.autograd.grad(rows.sum(), x)[0], torch.zeros(0, 4), "gradient")
    x = torch.ones(3, 4, requires_grad=True)
    rows, plan = accel.moe_permute(x, torch.zeros(3, 2, dtype=torch.int64), 2, capacity=0, backend=backend)
    assert rows.shape == (0, 4)
    assert (plan.destination == -1).all()
    assert_same(torch.autograd.grad(rows.sum(), x)[0], torch.zeros(3, 4), "gradient of tokens without a row")
    rows, _ = accel.moe_permute(torch.zeros(3, 0), torch.zeros(3, 2, dtype=torch.int64), 2, backend=backend)
    assert rows.shape == (6, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_of_nobody_gets_no_gradient(backend):
    x = torch.randn(4, 5).requires_grad_()
    indices = torch.tensor([[0, 9], [-1, 3], [2, 2**40], [-(2**40), 2]])
    rows, plan = accel.moe_permute(x, indices, 3, backend=backend)
    assert plan.counts.tolist() == [1, 0, 2]
    upstream = torch.full_like(rows, torch.nan)
    upstream[:3] = torch.arange(3.0)[:, None] + 1
    (grad,) = torch.autograd.grad(rows, x, upstream)
    assert grad[:, 0].tolist() == [1.0, 0.0, 2.0, 3.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_may_be_int32_and_strided(backend):
    x, indices = torch.randn(6, 4), choices(6, 3, 5)
    want = accel.moe_permute(x, indices, 5, backend=backend)
    for given in (indices.int(), indices.T.contiguous().T, indices.repeat_interleave(2, 1)[:, ::2]):
        got = accel.moe_permute(x, given, 5, backend=backend)
        for a, b in zip([got[0], *got[1]], [want[0], *want[1]], strict=True):
            assert_same(a, b, "other indices")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_does_not_depend_on_the_tokens(backend):
    x, indices = torch.randn(6, 4), choices(6, 3, 5)
    leaf = x.clone().requires_grad_()
    rows, plan = accel.moe_permute(leaf, indices, 5, weights=torch.rand(6, 3).requires_grad_(), backend=backend)
    assert not any(t.requires_grad for t in plan)
    with torch.no_grad():
        leaf.mul_(2.0)
    upstream = torch.randn(18, 4).requires_grad_()
    (grad,) = torch.autograd.grad(rows, leaf, upstream, create_graph=True)
    want = upstream.detach()[plan.destination].double().sum(1)
    torch.testing.assert_close(grad.detach().double(), want, rtol=1e-6, atol=1e-6)
    if backend == "reference":
        again = torch.autograd.grad((grad * leaf).sum(), upstream)[0]
        assert_same(again, leaf.detach()[plan.source // 3], "the transpose's transpose")
    else:
        with pytest.raises(NotImplementedError, match=r"moe_permute.*reference"):
            grad.square().sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES, ids=str)
def test_autocast_casts_nothing(dtype, backend):
    x, indices = torch.randn(6, 4).to(dtype), choices(6, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        rows, plan = accel.moe_permute(x, indices, 5, backend=backend)
        back = accel.moe_unpermute(rows, plan, torch.ones(6, 3), backend=backend)
    assert_same(rows, accel.moe_permute(x, indices, 5, backend=backend)[0], "under autocast")
    assert back.dtype == dtype


def test_sizes_beyond_32_bits():
    """Of a call that nobody has the memory for, by its sizes alone."""
    x, indices = zeros(2**20, 4096, device="meta"), zeros(2**20, 8, dtype=torch.int64, device="meta")
    rows, plan = accel.moe_permute(x, indices, 128, align=128)
    assert rows.shape == (2**23 + 127 * 128, 4096)
    assert rows.numel() > 2**34
    assert plan.destination.shape == (2**20, 8)
    out = accel.moe_unpermute(rows, plan, zeros(2**20, 8, device="meta"))
    assert out.shape == (2**20, 4096)
    args = accel.ops.moe.moe_permute._prepare(x, indices, 128)
    assert accel.ops.moe.moe_permute._backward_flops(args, [True]) == 2**35
    rows, _ = accel.moe_permute(x, indices, 128, capacity=5, align=4)
    assert rows.shape == (128 * 8, 4096)


def test_a_plan_that_does_not_fit_is_refused_by_the_kernel():
    x, indices = zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    testing.require(accel.moe_permute, "cpu", {"x": x, "indices": indices}, {"num_experts": 2})
    forward = torch.ops.accel_native.moe_permute_forward.default
    with pytest.raises(RuntimeError, match="needs 6 rows, and there are 5"):
        forward(x, indices, None, 2, -1, 1, 5)
    with pytest.raises(RuntimeError, match=r"tokens must be \(3, 2\)"):
        forward(zeros(2, 2), indices, None, 2, -1, 1, 6)


GOOD = {"x": zeros(3, 4), "indices": torch.zeros(3, 2, dtype=torch.int64), "num_experts": 5}
BAD = [
    Bad("not_a_tensor", TypeError, "x must be .* list", {"x": [1.0]}),
    Bad("integers", TypeError, "x must be .* torch.int64", {"x": zeros(3, 4, dtype=torch.int64)}),
    Bad("rank_3", ValueError, r"\(1, 3, 4\)", {"x": zeros(1, 3, 4)}),
    Bad("indices_of_floats", TypeError, "int32 or int64, got torch.float32", {"indices": zeros(3, 2)}),
    Bad("indices_of_bytes", TypeError, "torch.uint8", {"indices": zeros(3, 2, dtype=torch.uint8)}),
    Bad("indices_of_4_tokens", ValueError, r"T = 3 .* \(4, 2\)", {"indices": zeros(4, 2, dtype=torch.int64)}),
    Bad("no_choices", ValueError, r"K at least 1, got \(3, 0\)", {"indices": zeros(3, 0, dtype=torch.int64)}),
    Bad("flat_indices", ValueError, r"\(T, K\) .*\(3,\)", {"indices": zeros(3, dtype=torch.int64)}),
    Bad("elsewhere", ValueError, "indices is on meta .* cpu",
        {"indices": zeros(3, 2, dtype=torch.int64, device="meta")}),
    Bad("no_experts", ValueError, "at least 1, got num_experts=0", {"num_experts": 0}),
    Bad("experts_no_integer", TypeError, "num_experts=2.0", {"num_experts": 2.0}),
    Bad("align", ValueError, "at least 1, got align=0", {"align": 0}),
    Bad("capacity", ValueError, "at least 0, got capacity=-1", {"capacity": -1}),
    Bad("drop", ValueError, "'order' or 'score', got 'random'", {"drop": "random"}),
    Bad("score_of_nothing", ValueError, "drop='score' needs weights", {"drop": "score", "capacity": 2}),
    Bad("weights_of_3", ValueError, r"\(3, 2\) .*\(3, 3\)", {"weights": zeros(3, 3)}),
    Bad("weights_of_integers", TypeError, "weights .* torch.int64", {"weights": zeros(3, 2, dtype=torch.int64)}),
    Bad("no_such_backend", ValueError, "no backend 'cuda9'; it has cpu", {"backend": "cuda9"}),
]  # fmt: skip


@each(BAD)
def test_bad_input(bad):
    check_bad(accel.moe_permute, GOOD, bad)


def test_double_runs_on_the_reference_alone():
    x, indices = torch.randn(6, 4, dtype=torch.float64), choices(6, 3, 5)
    assert accel.moe_permute(x, indices, 5)[0].dtype == torch.float64
    with pytest.raises(NotImplementedError, match=re.escape("backend 'cpu' cannot run this call: ")):
        accel.moe_permute(x, indices, 5, backend="cpu")
