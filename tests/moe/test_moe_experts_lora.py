"""Experts with adapters of low rank: against the merged weight, in float64 and on every backend, and bad input."""

import pytest
import torch
from _bad import Bad, check_bad, each, zeros

import accel
from accel import ExpertActivation, testing
from accel.ops.moe import grouped_linear, moe_experts
from accel.testing import assert_close

T, K, X, C, I, R = 23, 2, 5, 14, 9, 3  # noqa: E741
GPT_OSS = ExpertActivation("silu", alpha=1.702, limit=7.0, shift=1.0)
CASES = {
    "plain": {},
    "GPT-OSS": {"transposed": True, "layout": "interleaved", "activation": GPT_OSS},
    "no gate": {"gated": False, "activation": "relu2"},
}
NAMES = ("x", "weights", "A1", "B1", "A2", "B2")


def given(name, dtype, bias=True):
    how = CASES[name]
    J = 2 * I if how.get("gated", True) else I
    generator = torch.Generator().manual_seed(0)

    def made(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    indices = torch.randint(0, X - 1, (T, K), generator=generator)  # the last expert has no token
    indices[3, 1], indices[4, 0] = X, -1
    gate_up, down = made(X, J, C, scale=C**-0.5), made(X, C, I, scale=I**-0.5)
    lora = {
        "A1": made(X, R, C, scale=C**-0.5),
        "B1": made(X, J, R, scale=0.3),
        "A2": made(X, R, I, scale=I**-0.5),
        "B2": made(X, C, R, scale=0.3),
    }
    x, weights = made(T, C), torch.rand(T, K, generator=generator, dtype=torch.float64).to(dtype)
    biases = {"gate_up_bias": made(X, J), "down_bias": made(X, C)} if bias else {}
    return {"x": x, "weights": weights, **lora}, indices, (gate_up, down), {**how, **biases}


def call(leaves, indices, projections, how, backend=None):
    gate_up, down = [w.transpose(1, 2).contiguous() if how.get("transposed") else w for w in projections]
    lora = ((leaves["A1"], leaves["B1"], 0.5), (leaves["A2"], leaves["B2"], 2.0))
    return accel.moe_experts(
        leaves["x"], indices, leaves["weights"], gate_up, down, **how, lora=lora, backend=backend
    )  # fmt: skip


def merged(leaves, indices, projections, how):
    """By weights that the adapters are added to."""
    first = projections[0] + 0.5 * leaves["B1"] @ leaves["A1"]
    second = projections[1] + 2.0 * leaves["B2"] @ leaves["A2"]
    first, second = [w.transpose(1, 2) if how.get("transposed") else w for w in (first, second)]
    return accel.moe_experts(leaves["x"], indices, leaves["weights"], first, second, **how, backend="reference")


def gradients(function, leaves, *rest, **how):
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()}
    out = function(leaves, *rest, **how)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return out.detach(), dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), weights), strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, *testing.KERNEL_DTYPES])
def test_merged_weights(name, dtype):
    leaves, indices, projections, how = given(name, dtype)
    exact = {n: x.double() for n, x in leaves.items()}
    exact_how = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in how.items()}
    want, want_grads = gradients(merged, exact, indices, [w.double() for w in projections], exact_how)
    got, grads = gradients(call, leaves, indices, projections, how)
    assert got.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close((got, grads), (want, want_grads))
        return
    assert_close(got, want, "experts", dtype, "output")
    for n in NAMES:
        assert grads[n].dtype == dtype
        assert_close(grads[n], want_grads[n], "experts_grad", dtype, f"gradient of {n}")
    assert not any(grads[n][X - 1].any() for n in NAMES[2:])  # of the expert without tokens


def test_one_adapter_alone_and_none():
    leaves, indices, projections, how = given("plain", torch.float32)
    plain = accel.moe_experts(leaves["x"], indices, leaves["weights"], *projections, **how)
    for lora in (
        (None, None),
        ((leaves["A1"], leaves["B1"], 0.0), None),
        (None, (leaves["A2"], torch.zeros_like(leaves["B2"]), 1.0)),
    ):
        found = accel.moe_experts(leaves["x"], indices, leaves["weights"], *projections, **how, lora=lora)
        assert_close(found, plain.double(), "experts", torch.float32)


def test_frozen_weights_are_never_written_out(monkeypatch):
    """What is made has the rank's width or the rows'; frozen projections get no gradient, and the kernels run."""
    if accel.dispatch.leaf_reason("accel._C") is not None:
        pytest.skip("there is no kernel to watch")
    leaves, indices, projections, how = given("plain", torch.float32)
    with testing.watch(grouped_linear.OP) as ran, testing.watch(moe_experts.OP) as whole:
        gradients(call, leaves, indices, projections, how)
    assert sorted(ran) == sorted([("cpu", "forward"), ("cpu", "backward")] * 6)
    assert whole == []


def test_autocast_and_another_dtype_of_adapters():
    leaves, indices, projections, how = given("plain", torch.float32, bias=False)
    want = call(leaves, indices, projections, how)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(call(leaves, indices, projections, how), want.double(), "experts", torch.bfloat16)
    half = {n: x.bfloat16() if n == "x" else x for n, x in leaves.items()}
    found, grads = gradients(call, half, indices, [w.bfloat16() for w in projections], how)
    assert_close(found, want.double(), "experts", torch.bfloat16)
    assert grads["A1"].dtype == torch.float32


def test_compiled():
    leaves, indices, projections, how = given("plain", torch.float32)
    want, want_grads = gradients(call, leaves, indices, projections, how)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, grads = gradients(compiled, leaves, indices, projections, how)
    torch._dynamo.reset()
    assert_close(got, want.double(), "experts", torch.float32)
    for n in NAMES:
        assert_close(grads[n], want_grads[n].double(), "experts_grad", torch.float32, n)


GOOD = {
    "x": zeros(3, 8), "indices": torch.zeros(3, 2, dtype=torch.int64), "weights": zeros(3, 2),
    "gate_up_proj": zeros(4, 12, 8), "down_proj": zeros(4, 8, 6), "lora": (None, None),
}  # fmt: skip
ONE = (zeros(4, 2, 8), zeros(4, 12, 2), 1.0)
BAD = [
    Bad("one adapter", TypeError, "for each of the projections, got", {"lora": (ONE,)}),
    Bad("no adapter", TypeError, r"adapter of down_proj must be \(A, B, scale\), got 3", {"lora": (None, 3)}),
    Bad("shapes", ValueError, r"\(X, r, 6\) and \(X, 8, r\) with X = 4, got \(4, 2, 8\) and \(4, 12, 2\)",
        {"lora": (None, ONE)}),
    Bad("ranks", ValueError, r"got \(4, 2, 8\) and \(4, 12, 3\)", {"lora": ((ONE[0], zeros(4, 12, 3), 1.0), None)}),
    Bad("integers", TypeError, "B of gate_up_proj must be a floating", {"lora": ((ONE[0], ONE[1].long(), 1.0), None)}),
    Bad("scale", ValueError, "scale of gate_up_proj must be a finite number, got nan",
        {"lora": ((*ONE[:2], float("nan")), None)}),
]  # fmt: skip


@each(BAD)
def test_bad_input(bad):
    check_bad(accel.moe_experts, GOOD, bad)
