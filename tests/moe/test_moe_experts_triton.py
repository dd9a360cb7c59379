"""The Triton kernels of experts, against the float64 reference.

Without a GPU they run under Triton's interpreter, which is slow: cases are as small as their purpose allows.
"""

import pytest
import torch
from _expert_cases import experts_case as case
from _triton_checks import DEVICE, params

pytest.importorskip("triton")
import accel
from accel import ExpertActivation
from accel.testing import assert_same

GPT_OSS = ExpertActivation("silu", alpha=1.702, limit=1.0, shift=1.0)
CASES = [
    case("plain", T=9, C=18, I=7, bias=True, routing="elsewhere"),
    case("one token", T=1, K=3, X=5, C=33, I=18),
    case("one has all", T=20, K=1, C=17, I=9, routing="one"),
    case("wide", T=20, K=2, X=3, C=40, I=70),
    case("GPT-OSS", T=12, C=20, I=35, activation=GPT_OSS, layout="interleaved", transposed=True, bias=True,
         dtypes=(torch.float32,)),
    case("no gate", T=9, gated=False, activation="relu2", transposed=True),
    case("gelu", T=9, activation="gelu", bias=True),
    case("gelu_tanh", T=9, gated=False, activation="gelu_tanh"),
    case("relu", T=9, activation="relu", layout="interleaved", dtypes=(torch.float32,)),
    case("exact", T=20, K=3, C=16, I=24, activation="relu", whole=True, routing="elsewhere"),
    case("exact, limited", T=9, activation=ExpertActivation("relu2", limit=2.0, shift=1.0), whole=True, bias=True),
]  # fmt: skip
TINY = [case("tiny", T=3, X=3, C=3, I=2, bias=True, routing="elsewhere")]
QUICK = {
    "plain": "float32", "GPT-OSS": "float32", "no gate": "bfloat16", "gelu": "float32", "gelu_tanh": "float32",
    "exact": "float32", "exact, limited": "float16",
}  # fmt: skip
ELSEWHERE = ("empty-tiny",)  # in its own terms, beside the other backends


@pytest.mark.parametrize("check", [p for p in params(accel.moe_experts, CASES, TINY, QUICK) if p.id not in ELSEWHERE])
def test_op(check):
    check()


@pytest.mark.parametrize("bias", [False, True])
def test_only_what_is_needed_is_made(bias):
    tensors, kwargs = case("plain", T=5, C=8, I=6, bias=bias).make(torch.float32, DEVICE, 0)
    leaves = {n: x.requires_grad_() for n, x in tensors.items() if x.is_floating_point()}

    def loss(**given):
        return accel.moe_experts(**given, **kwargs, backend="triton").square().sum()

    want = dict(zip(leaves, torch.autograd.grad(loss(**tensors), list(leaves.values())), strict=True))
    for name, x in leaves.items():
        given = {n: y if n == name else y.detach() for n, y in tensors.items()}
        assert_same(torch.autograd.grad(loss(**given), x)[0], want[name], name)


def test_experts_without_tokens_and_tokens_without_experts_get_nothing():
    tensors, kwargs = case("plain", T=5, X=6, C=8, I=6, bias=True).make(torch.float32, DEVICE, 0)
    tensors["indices"] = torch.where(tensors["indices"] > 3, 9, tensors["indices"])
    tensors["indices"][2] = -1
    leaves = {n: x.requires_grad_() for n, x in tensors.items() if x.is_floating_point()}
    out = accel.moe_experts(**tensors, **kwargs, backend="triton")
    grads = dict(zip(leaves, torch.autograd.grad(out.sum(), list(leaves.values())), strict=True))
    assert not out[2].any()
    assert not grads["x"][2].any()
    away = (tensors["indices"] < 0) | (tensors["indices"] >= 6)
    assert not grads["weights"][away].any()
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        assert not grads[name][4:].any(), name
