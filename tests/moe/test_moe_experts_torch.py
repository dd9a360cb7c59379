"""The backend ``torch`` of both products of experts: when it is chosen, and that it computes the same.

No AMX is needed: torch's grouped product runs on every CPU, and what asks the processor is answered in its place.
"""

import pytest
import torch
from _expert_cases import experts_case, linear_case

import accel
from accel import ExpertActivation, dispatch, testing
from accel.ops.moe import grouped_linear, grouped_torch, moe_experts
from accel.testing import assert_close

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped product")


@pytest.fixture
def amx(monkeypatch):
    monkeypatch.setattr(grouped_torch, "has_amx", lambda: True)


@pytest.fixture
def any_rows(amx, monkeypatch):
    monkeypatch.setattr(grouped_torch, "LEAST_ROWS", 0)


LINEAR = [
    linear_case("plain", (9, 4, 17), 16, 24),
    linear_case("empty ones and a tail", (0, 5, 0, 12, 0), 24, 8, tail=6),
    linear_case("transposed", (3, 40, 1), 40, 16, transposed=True, tail=1),
    linear_case("exact", (7, 0, 30), 16, 32, whole=True),
]
EXPERTS = [
    experts_case("plain", T=40, C=16, I=24),
    experts_case("transposed, elsewhere", T=33, K=3, X=5, C=24, I=16, transposed=True, routing="elsewhere"),
    experts_case("one has all", T=20, C=8, I=8, routing="one"),
    experts_case("turns", T=30, C=16, I=8, layout="interleaved", activation=ExpertActivation("silu", 1.702, 7.0, 1.0)),
    experts_case("no gate", T=30, C=16, I=8, gated=False, activation="relu2"),
]


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def run(function, case, backend, dtype=None):
    """Output and gradients on the same rounded inputs, in float64 where asked."""
    tensors, kwargs = case.make(BF16, "cpu", 0)
    leaves = {n: x.to(dtype or x.dtype).requires_grad_() for n, x in tensors.items() if x.is_floating_point()}
    with testing.watch(dispatch.OPS[function.__name__]) as ran:
        out = function(**{**tensors, **leaves}, **kwargs, backend=backend)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(BF16).to(out.dtype)
        grads = torch.autograd.grad(out, list(leaves.values()), weights)
    return out.detach(), dict(zip(leaves, grads, strict=True)), ran


@by_name(LINEAR)
def test_grouped_linear(case, any_rows):
    check(accel.grouped_linear, case, "grouped")


@by_name(EXPERTS)
def test_moe_experts(case, any_rows):
    check(accel.moe_experts, case, "experts")


def check(function, case, family):
    want, want_grads, _ = run(function, case, "reference", torch.float64)
    got, grads, ran = run(function, case, None)
    assert ran == [("torch", "forward"), ("torch", "backward")]
    if case.family == "exact":
        assert torch.equal(got.double(), want)
        return
    assert_close(got, want, family, BF16, "output")
    for name, grad in grads.items():
        assert_close(grad, want_grads[name], f"{family}_grad", BF16, f"gradient of {name}")


def test_only_what_is_needed_is_made(any_rows):
    tensors, kwargs = EXPERTS[0].make(BF16, "cpu", 0)
    leaves = {n: x.requires_grad_() for n, x in tensors.items() if x.is_floating_point()}
    for name, x in leaves.items():
        given = {n: y if n == name else y.detach() for n, y in tensors.items()}
        with testing.watch(moe_experts.OP) as ran:
            out = accel.moe_experts(**given, **kwargs)
            (alone,) = torch.autograd.grad(out.float().square().sum(), x)
        out = accel.moe_experts(**tensors, **kwargs)
        assert torch.equal(alone, torch.autograd.grad(out.float().square().sum(), x)[0]), name
        assert ran == [("torch", "forward"), ("torch", "backward")]


def test_what_is_behind_the_last_offset_is_zero_whatever_it_holds(any_rows):
    tensors, kwargs = LINEAR[1].make(BF16, "cpu", 0)
    tensors["x"][-6:] = float("nan")
    x = tensors["x"].requires_grad_()
    out = accel.grouped_linear(**{**tensors, "x": x}, **kwargs)
    out.sum().backward()
    assert not out[-6:].any()
    assert not x.grad[-6:].any()
    assert x.grad.isfinite().all()


def test_when_it_is_chosen(amx, monkeypatch):
    def reason(case, dtype=BF16, op=moe_experts.OP):
        tensors, kwargs = case.make(dtype, "cpu", 0)
        return dispatch.reasons(op, op.prepare(**tensors, **kwargs))["torch"]

    many = experts_case("many", T=64, C=16, I=24)
    assert reason(many) is None
    assert reason(linear_case("many", (40, 60), 16, 8), op=grouped_linear.OP) is None
    assert reason(linear_case("few", (40, 20), 16, 8), op=grouped_linear.OP) == (
        "it is for 32 rows an expert and more, and here are 60 for 2"
    )
    assert "not torch.float32" in reason(many, torch.float32)
    assert "takes no bias" in reason(experts_case("bias", T=64, C=16, I=24, bias=True))
    assert "sizes that 8 divides, not [(24, 12), (12, 12)]" in reason(experts_case("odd", T=64, C=12, I=12))
    with accel.use(deterministic=True):
        assert "determinism is asked for" in reason(many)
    monkeypatch.setattr(grouped_torch, "has_amx", lambda: False)
    assert "has none in use" in reason(many)
