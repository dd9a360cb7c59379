"""The Triton kernels of routing, against the float64 reference and loops.

Without a GPU they run under Triton's interpreter, which is slow: cases are as small as their purpose allows.
"""

import math

import pytest
import torch
from _moe_cases import FP32, moe_route, route_case, route_oracle

pytest.importorskip("triton")
import accel
from accel import testing
from accel.kernels.moe import moe_route as kernels
from accel.ops.moe import moe_route as op
from accel.testing import assert_same

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCORES = ("softmax", "softmax_topk", "sigmoid", "sqrt_softplus")

CASES = [
    *[route_case(f"{score}_7_3", 3, 7, 3, score=score, dtypes=FP32) for score in SCORES],
    *[route_case(f"{score}_raw", 2, 13, 4, score=score, renormalize=False, scale=0.5, dtypes=FP32) for score in SCORES],
    *[route_case(f"{score}_bias", 3, 11, 2, score=score, bias=0.3, dtypes=FP32) for score in SCORES],
    route_case("plain", 3, 16, 4),
    route_case("deepseek", 2, 64, 8, score="sigmoid", bias=0.1, num_groups=8, topk_groups=4, scale=2.5),
    route_case("groups_max", 3, 12, 3, num_groups=4, topk_groups=2, group_score="max", dtypes=FP32),
    route_case("groups_of_one", 3, 7, 3, score="sigmoid", num_groups=7, topk_groups=4, dtypes=FP32),
    route_case("one_expert", 3, 1, 1, dtypes=FP32),
    route_case("all_experts", 2, 17, 17, dtypes=FP32),
]


@pytest.mark.parametrize(("case", "dtype"), [(c, d) for c in CASES for d in c.dtypes], ids=str)
def test_output_and_gradient(case, dtype):
    testing.values.check_values(moe_route, case, "triton", dtype, DEVICE)


SLOW = [] if DEVICE == "cuda" else [pytest.mark.slow]
BEHAVIOUR = ["batch", "second_derivative", *[pytest.param(n, marks=SLOW) for n in ("poison", "repeat", "strides")]]


@pytest.mark.parametrize("check", BEHAVIOUR)
def test_behaviour(check):
    getattr(testing.checks, f"check_{check}")(moe_route, CASES[12], "triton", DEVICE)


def check_oracle(logits, **kwargs):
    weights, indices = accel.moe_route(logits.to(DEVICE), **kwargs, backend="triton")
    want, chosen = route_oracle(logits, **kwargs)
    assert_same(indices.cpu(), chosen, "indices")
    torch.testing.assert_close(weights.cpu().double(), want, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("score", ["softmax", "softmax_topk", "sigmoid"])
def test_ties_go_to_the_lower_index(score):
    logits = torch.randint(-1, 2, (6, 10), generator=torch.Generator().manual_seed(3)).float()
    logits[0] = 0.0
    logits[1, ::2], logits[1, 1::2] = -0.0, 0.0
    logits[2, 3:] = -math.inf
    check_oracle(logits, top_k=4, score=score)
    check_oracle(logits[:1], top_k=4, score=score, num_groups=5, topk_groups=2)
    across = torch.tensor([[1.0, 0.0, -9.0, -9.0, 1.0, 0.5], [0.5, 0.5, 2.0, 0.5, 0.5, 0.5]])
    check_oracle(across, top_k=4, score=score, num_groups=3, topk_groups=2)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("how", ["plain", "bias", "groups"])
def test_nan_loses_to_every_number(how, score):
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)) - 1
    logits[0, 4] = math.nan
    logits[1, 3:] = math.nan
    logits[2] = math.nan
    logits[3, ::2], logits[3, 1::2] = math.nan, -90.0
    bias = torch.linspace(-0.2, 0.2, 12)
    given = {"bias": {"bias": bias.to(DEVICE)}, "groups": {"num_groups": 3, "topk_groups": 2}}
    check_oracle(logits, top_k=4, score=score, renormalize=False, **given.get(how, {}))


@pytest.mark.parametrize("score", SCORES)
def test_gradients_where_scores_vanish(score):
    leaf = torch.tensor([[-100.0, -1e30, 80.0, -41.0], [-120.0, -130.0, -3e38, -110.0]], device=DEVICE).requires_grad_()
    weights, _ = accel.moe_route(leaf, 2, score=score, backend="triton")
    assert torch.autograd.grad(weights[:, 0].sum(), leaf)[0].isfinite().all()


def test_refuses():
    args = op._prepare(torch.zeros(2, 3), 1)
    assert "meta" in kernels.why_not(args._replace(logits=args.logits.to("meta")))
    if kernels._launch.INTERPRETING:
        assert "up to 4096 experts of a token, not 4097" in kernels.why_not(args._replace(logits=torch.zeros(2, 4097)))
