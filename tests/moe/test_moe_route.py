"""Routing: awkward calls as data for the common checks, an oracle in loops, ties, NaN, and bad input."""

import math

import pytest
import torch
from _bad import Bad, check_bad, each, zeros
from _moe_cases import BACKENDS, FP32, checks_of, moe_route, route_case, route_oracle, scores_of

import accel
from accel import testing
from accel.testing import assert_same, check_levels

SCORES = ("softmax", "softmax_topk", "sigmoid", "sqrt_softplus")
DEEPSEEK = {"score": "sigmoid", "bias": 0.1, "num_groups": 8, "topk_groups": 4, "scale": 2.5}


def far(logits):
    """From where every score vanishes to where it is saturated."""
    logits.mul_(12.0)[0, 0] = -200.0
    logits[1] -= 60.0


CASES = [
    *[route_case(f"{score}_{X}_{K}", T, X, K, score=score) for score in SCORES for T, X, K in [(5, 7, 3), (3, 64, 8)]],
    *[route_case(f"{score}_raw", 4, 13, 4, score=score, renormalize=False, scale=0.5) for score in SCORES],
    *[route_case(f"{score}_bias", 6, 11, 2, score=score, bias=0.3) for score in SCORES],
    *[
        route_case(f"{score}_far", 4, 19, 14, score=score, change=far, renormalize=False, dtypes=FP32)
        for score in SCORES
    ],
    route_case("deepseek", 4, 256, 8, **DEEPSEEK),
    route_case("groups_max", 5, 12, 3, score="softmax", num_groups=4, topk_groups=2, group_score="max"),
    route_case("groups_of_one", 5, 7, 3, score="sigmoid", num_groups=7, topk_groups=4),
    route_case("all_groups", 5, 12, 5, score="softmax", num_groups=3, topk_groups=3),
    route_case("one_expert", 4, 1, 1),
    route_case("one_expert_sigmoid", 4, 1, 1, score="sigmoid", renormalize=False),
    route_case("all_experts", 3, 17, 17, score="softmax"),
    route_case("prime", 2, 257, 31, score="sqrt_softplus"),
    route_case("one_token", 1, 33, 4),
    route_case("eps", 4, 9, 2, score="sigmoid", eps=0.5),
]
BEHAVIOUR = [
    route_case("grouped", 4, 12, 3, score="sigmoid", bias=0.2, num_groups=3, topk_groups=2),
]
GRADIENTS = [
    *[route_case(score, 2, 5, 3, score=score) for score in SCORES],
    route_case("raw_softmax", 2, 5, 2, renormalize=False),
    route_case("grouped", 2, 6, 2, score="sigmoid", bias=0.2, num_groups=3, topk_groups=2, eps=0.1),
]
CHECKS = checks_of(moe_route, CASES, BEHAVIOUR, GRADIENTS, ("-autocast-",))  # it casts nothing
LEVELS = check_levels(
    moe_route, [c for c in CASES if c.name in ("deepseek", "prime", "softmax_7_3", "softmax_topk_bias")]
)


@pytest.mark.parametrize("check", CHECKS)
def test_op(check):
    check()


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in LEVELS])
def test_every_instruction_set(check):
    check()


def check_oracle(logits, backend, tolerance=1e-5, **kwargs):
    testing.require(accel.moe_route, backend, {"logits": logits}, kwargs)
    weights, indices = accel.moe_route(logits, **kwargs, backend=backend)
    want, chosen = route_oracle(logits, **kwargs)
    assert weights.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert_same(indices, chosen, "indices")
    torch.testing.assert_close(weights.double(), want, rtol=tolerance, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_choice_is_that_of_plain_loops(case, backend):
    tensors, kwargs = case.make(torch.float32, "cpu", 1)
    check_oracle(tensors["logits"], backend, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("top_k", [1, 4, 10])
def test_ties_go_to_the_lower_index(score, top_k, backend):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(-1, 2, (50, 10), generator=generator).float()
    logits[:10] = 0.0
    logits[5:10, ::2] = -0.0
    logits[10:20, 3:] = -math.inf
    check_oracle(logits, backend, top_k=top_k, score="sigmoid" if score == "sqrt_softplus" else score)
    bias = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0])
    check_oracle(logits[:10], backend, top_k=top_k, score=score, bias=bias)
    check_oracle(logits[:10], backend, top_k=min(top_k, 4), score=score, num_groups=5, topk_groups=2, group_score="max")


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_across_groups_go_to_the_lower_index_too(backend):
    """Also where the group of the higher index is the better one."""
    logits = torch.tensor([[1.0, 0.0, -9.0, -9.0, 1.0, 0.5], [0.5, 0.5, 2.0, 0.5, 0.5, 0.5]])
    given = {"score": "sigmoid", "num_groups": 3, "topk_groups": 2}
    check_oracle(logits, backend, top_k=4, **given)
    _, indices = accel.moe_route(logits, 4, **given, backend=backend)
    assert indices.tolist() == [[0, 4, 5, 1], [2, 0, 1, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_rounds_to_the_same_score_is_told_apart(backend):
    logits = torch.tensor([[20.0, 30.0, 40.0, 35.0], [-200.0, -150.0, -190.0, -140.0]])
    for score in ("sigmoid", "softmax"):
        _, indices = accel.moe_route(logits, 3, score=score, backend=backend)
        assert indices.tolist() == [[2, 3, 1], [3, 1, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("how", ["plain", "bias", "groups"])
def test_nan_loses_to_every_number(how, score, backend):
    logits = torch.randn(9, 12, generator=torch.Generator().manual_seed(0)) - 1
    logits[0, 4] = math.nan
    logits[1, 3:] = math.nan
    logits[2] = math.nan
    logits[3, ::2], logits[3, 1::2] = math.nan, -90.0
    logits[4, :6] = math.nan
    logits[5, 0], logits[5, 1:8] = math.nan, -80.0
    given = {"bias": {"bias": torch.linspace(-0.2, 0.2, 12)}, "groups": {"num_groups": 3, "topk_groups": 2}}
    check_oracle(logits, backend, top_k=4, score=score, renormalize=False, **given.get(how, {}))
    leaf = logits.clone().requires_grad_()
    weights, indices = accel.moe_route(leaf, 4, score=score, renormalize=False, **given.get(how, {}), backend=backend)
    (grad,) = torch.autograd.grad(weights[weights == weights].sum(), leaf)
    if score in ("sigmoid", "sqrt_softplus"):  # where only numbers were chosen nothing of a NaN reaches the gradient
        assert grad[[0, 5, 6]].isfinite().all()
    assert ((indices >= 0) & (indices < 12)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_logits(backend):
    logits = torch.tensor([[0.0, -math.inf, 1.0, -math.inf], [math.inf, 0.0, math.nan, 1.0]])
    weights, indices = accel.moe_route(logits, 3, backend=backend)
    assert indices.tolist() == [[2, 0, 1], [0, 3, 1]]
    torch.testing.assert_close(weights[0], torch.tensor([0.7310586, 0.2689414, 0.0]))
    weights, indices = accel.moe_route(logits, 2, score="sigmoid", renormalize=False, backend=backend)
    torch.testing.assert_close(weights, torch.tensor([[0.7310586, 0.5], [1.0, 0.7310586]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", SCORES)
def test_gradients_are_finite_where_scores_vanish(score, backend):
    leaf = torch.tensor([[-100.0, -1e30, 80.0, 3e38, -41.0], [-120.0, -130.0, -3e38, -140.0, -110.0]]).requires_grad_()
    for renormalize in (False, True):
        weights, _ = accel.moe_route(leaf, 2, score=score, renormalize=renormalize, backend=backend)
        (grad,) = torch.autograd.grad(weights.sum() + weights[:, 0].sum(), leaf)
        assert grad.isfinite().all(), (score, renormalize, grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 2), (3, 1, 1), (1, 1000, 1000)])
def test_sizes_at_the_edge(shape, backend):
    T, X, K = shape
    leaf = torch.randn(T, X).requires_grad_()
    weights, indices = accel.moe_route(leaf, K, score="sigmoid", backend=backend)
    assert weights.shape == indices.shape == (T, K)
    assert all(len(set(row)) == K for row in indices.tolist())
    (grad,) = torch.autograd.grad(weights.sum(), leaf)
    assert grad.shape == leaf.shape
    torch.testing.assert_close(grad, torch.zeros_like(leaf), rtol=0, atol=1e-6)  # the weights sum to 1 whatever it is


def transformers_deepseek(logits, bias, groups, chosen, top_k, scale):
    """DeepseekV3's own lines, in torch."""
    scores = logits.sigmoid()
    compared = scores + bias
    best = compared.view(len(logits), groups, -1).topk(2, -1)[0].sum(-1)
    mask = torch.zeros_like(best).scatter(1, best.topk(chosen, -1)[1], 1.0).bool()
    allowed = mask.unsqueeze(-1).expand(-1, groups, logits.shape[1] // groups).reshape(logits.shape)
    indices = compared.masked_fill(~allowed, -math.inf).topk(top_k, -1)[1]
    weights = scores.gather(1, indices)
    return scale * weights / (weights.sum(-1, keepdim=True) + 1e-20), indices


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_deepseek_v3(backend):
    logits, bias = torch.randn(64, 256), 0.2 * torch.randn(256)
    want = transformers_deepseek(logits, bias, 8, 4, 8, 2.5)
    given = {"bias": bias, "num_groups": 8, "topk_groups": 4, "scale": 2.5}
    weights, indices = accel.moe_route(logits, 8, score="sigmoid", **given, backend=backend)
    assert_same(indices, want[1], "indices")
    torch.testing.assert_close(weights, want[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES, ids=str)
def test_autocast_casts_nothing(dtype, backend):
    logits = torch.randn(4, 8).to(dtype)
    want = accel.moe_route(logits, 2, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = accel.moe_route(logits, 2, backend=backend)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, "under autocast")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bias_has_no_gradient_and_any_floating_dtype(backend):
    leaf, bias = torch.randn(4, 8).requires_grad_(), torch.linspace(-1, 1, 8).requires_grad_()
    weights, want = accel.moe_route(leaf, 3, score="sigmoid", bias=bias, backend=backend)
    assert torch.autograd.grad(weights.sum(), (leaf, bias), allow_unused=True)[1] is None
    for given in (bias.detach().double(), bias.detach().repeat_interleave(2)[::2]):
        assert_same(accel.moe_route(leaf, 3, score="sigmoid", bias=given, backend=backend)[1], want, "indices")
    assert not accel.moe_route(leaf.detach(), 3, bias=bias, backend=backend)[0].requires_grad


def test_native_indices_are_bounded():
    logits = zeros(2, 4)
    testing.require(accel.moe_route, "cpu", {"logits": logits}, {"top_k": 1})
    args = accel.ops.moe.moe_route._prepare(logits, 1)
    backward = torch.ops.accel_native.moe_route_backward.default
    for bad in (-1, 4):
        with pytest.raises(RuntimeError, match=f"holds {bad} beside 4"):
            backward(torch.ones(2, 1), torch.tensor([[0], [bad]]), *args)


GOOD = {"logits": zeros(3, 8), "top_k": 2, "num_groups": 4, "topk_groups": 2}
BAD = [
    Bad("not_a_tensor", TypeError, "logits must be .* list", {"logits": [1.0]}),
    Bad("integers", TypeError, "torch.int64", {"logits": zeros(3, 8, dtype=torch.int64)}),
    Bad("rank_3", ValueError, r"\(1, 3, 8\)", {"logits": zeros(1, 3, 8)}),
    Bad("no_experts", ValueError, r"\(3, 0\)", {"logits": zeros(3, 0)}),
    Bad("k_beyond_x", ValueError, "experts, 8, got top_k=9", {"top_k": 9}),
    Bad("k_of_none", ValueError, "top_k=0", {"top_k": 0}),
    Bad("k_no_integer", TypeError, "float", {"top_k": 2.0}),
    Bad("score", ValueError, "softmax, sigmoid, sqrt_softplus, softmax_topk, got 'relu'", {"score": "relu"}),
    Bad("group_score", ValueError, "top2_sum, max, got 'mean'", {"group_score": "mean"}),
    Bad("groups_do_not_divide", ValueError, "divide the 8 experts, got num_groups=3", {"num_groups": 3}),
    Bad("groups_alone", ValueError, "num_groups=4, topk_groups=None", {"topk_groups": None}),
    Bad("more_groups_than_there_are", ValueError, "num_groups=4, got topk_groups=5", {"topk_groups": 5}),
    Bad("k_beyond_the_groups", ValueError, "top_k=5 is more than the 2 x 2 experts", {"top_k": 5}),
    Bad("eps", ValueError, "eps=-1.0", {"eps": -1.0}),
    Bad("scale", ValueError, "scale=nan", {"scale": math.nan}),
    Bad("bias_of_7", ValueError, r"\(X,\) = \(8,\), got \(7,\)", {"bias": zeros(7)}),
    Bad("bias_of_integers", TypeError, "bias .* torch.int64", {"bias": zeros(8, dtype=torch.int64)}),
    Bad("bias_elsewhere", ValueError, "bias is on meta .* cpu", {"bias": zeros(8, device="meta")}),
    Bad("no_such_backend", ValueError, "no backend 'cuda9'; it has cpu", {"backend": "cuda9"}),
]  # fmt: skip


@each(BAD)
def test_bad_input(bad):
    check_bad(accel.moe_route, GOOD, bad)


# --- expert choice ---


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_each_expert_takes_its_best_tokens(score):
    logits = torch.randint(-2, 3, (23, 5), generator=torch.Generator().manual_seed(1)).float()
    logits[3, 2] = math.nan
    logits[7] = math.nan
    weights, tokens = accel.moe_route_experts(logits, 23, score=score)
    scores = torch.tensor([scores_of(row, score) for row in logits.double().tolist()])
    for x in range(5):
        column = scores[:, x].float().double()  # as the op compares: what is equal there is a tie
        want = sorted(range(23), key=lambda t: (column[t] != column[t], -column[t] if column[t] == column[t] else 0, t))
        assert tokens[x].tolist() == want
        bad = logits.isnan().any(1)[tokens[x]] if score == "softmax" else logits[:, x].isnan()[tokens[x]]
        torch.testing.assert_close(weights[x][~bad].double(), column[tokens[x]][~bad], rtol=1e-5, atol=1e-7)
        assert weights[x][bad].isnan().all()
    few = accel.moe_route_experts(logits, 4, score=score)
    assert_same(few[1], tokens[:, :4], "tokens of a smaller capacity")


def test_expert_choice_with_a_mask():
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 0]).bool()
    logits[0] = math.nan
    weights, tokens = accel.moe_route_experts(logits, 6, mask=mask)
    assert mask[tokens[:, :4]].all()
    assert (tokens[:, 3] == 0).all()
    assert not mask[tokens[:, 4:]].any()
    assert_same(weights[:, 4:], torch.zeros(3, 2), "weights of tokens that may not be taken")
    alone = accel.moe_route_experts(logits[mask], 4)
    assert_same(tokens[:, :4], mask.nonzero()[:, 0][alone[1]], "tokens")


def test_expert_choice_has_gradients_and_empty_batches():
    logits = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: accel.moe_route_experts(x, 3)[0], logits)
    weights, tokens = accel.moe_route_experts(torch.zeros(0, 4), 0)
    assert weights.shape == tokens.shape == (4, 0)


CHOICE = {"logits": zeros(5, 3), "capacity": 2}
BAD_CHOICE = [
    Bad("too_many", ValueError, "tokens, 5, got capacity=6", {"capacity": 6}),
    Bad("negative", ValueError, "capacity=-1", {"capacity": -1}),
    Bad("score", ValueError, "softmax, sigmoid, sqrt_softplus, got 'softmax_topk'", {"score": "softmax_topk"}),
    Bad("mask_of_4", ValueError, r"\(T,\) = \(5,\) .*\(4,\)", {"mask": zeros(4, dtype=torch.bool)}),
    Bad("mask_of_floats", TypeError, "mask must be a bool tensor, got torch.float32", {"mask": zeros(5)}),
]


@each(BAD_CHOICE)
def test_bad_expert_choice(bad):
    check_bad(accel.moe_route_experts, CHOICE, bad)
