"""The Triton backend of gated attention by itself: every kernel and rule against the float64 reference.

Without a GPU the kernels run under Triton's interpreter, which is slow: some of the op's cases run by default, and all
of them where there is a GPU or slow tests are asked for.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import test_gau_attention as common
from _gau_cases import BEHAVIOUR, CASES, WHOLE, case, cumulative, integers
from _triton_checks import DEVICE, on_the_cpu, params

import accel
from accel import Grid2D, testing
from accel.kernels import _biases_launch as biases
from accel.kernels import _launch
from accel.kernels.linear import gau_attention as kernels
from accel.ops.linear.gau_attention import Args, _prepare, reference
from accel.ops.linear.gau_strips import BY_PAIR

SLOW = [] if DEVICE == "cuda" else [pytest.mark.slow]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# more channels than a block has, none of whole blocks, and more than one tile of queries and of keys
OWN = [
    case("small_channels", 37, 41, B=1, H=2, Hkv=1, D=8, E=136, causal=True),
    case("small_everything", 19, B=1, H=2, Hkv=1, D=8, E=72, mask=(1, 1, 1, 19), bias=(1, 2, 19, 1), rows=37,
         window=(9, 3), activation="laplace", dropout_p=0.2, **WHOLE),
    case("small_by_row", 19, 37, B=1, D=8, E=72, bias=(1, 1, 19, 37), window=(30, 3), activation="softmax_plus"),
    case("small_exact", 33, 35, B=1, D=8, E=72, change=integers, scale=0.5, window=(9, 5), family="exact"),
    case("small_grid", 17, B=1, D=8, E=8, bias_index=Grid2D(5, 3, 2), rows=48, activation="silu"),
]  # fmt: skip
SMALL = case(
    "small", 5, 7, D=8, E=8, bias=(2, 1, 1, 7), rows=11, causal=True, activation="laplace", dtypes=(FP32,), **WHOLE
)
QUICK = {
    "small_channels": "float16",
    "small_everything": "bfloat16",
    "small_by_row": "bfloat16",
    "small_exact": "bfloat16",
    "small_grid": "float32",
    "bias_and_table": "bfloat16",
    "packed_cross": "float16",
}


@pytest.mark.parametrize("check", params(accel.gau_attention, [*CASES, *OWN], [SMALL, *BEHAVIOUR], QUICK))
def test_op(check: Any) -> None:
    check()


# --- what the tests of all backends ask ---


def identified(*axes: Any) -> list[Any]:
    return [pytest.param(*values, marks=SLOW) for values in itertools.product(*axes)]


@pytest.mark.parametrize(
    ("name", "tensor", "value"), identified(("causal", "few_silu", "blocks"), "qkv", (math.nan, math.inf))
)
def test_what_is_not_finite(name: str, tensor: str, value: float) -> None:
    common.test_what_is_not_finite_reaches_only_who_may_see_it(*on_the_cpu(name, tensor, value, FP32, "triton"))


@pytest.mark.parametrize(("name", "tensor"), identified(("window", "padding", "few"), "qkv"))
def test_what_is_not_finite_in_bf16(name: str, tensor: str) -> None:
    common.test_what_is_not_finite_reaches_only_who_may_see_it(*on_the_cpu(name, tensor, math.nan, BF16, "triton"))


@pytest.mark.parametrize("T", [100, pytest.param(2048, marks=SLOW)])
def test_small_weights_keep_their_digits_in_fp16(T: int) -> None:
    common.test_small_weights_keep_their_digits_in_fp16(*on_the_cpu(T, "triton"))


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (2, 2, 0, 0)], ids=str)
@pytest.mark.parametrize("activation", ["relu2", "softmax_plus"])
def test_nothing_in_nothing_out(sizes: tuple[int, ...], activation: str) -> None:
    common.test_nothing_in_nothing_out(*on_the_cpu(*sizes, activation, "triton"))


# --- activations ---


@pytest.mark.parametrize(
    "name", ["laplace", "silu", *(pytest.param(name, marks=SLOW) for name in ("sigmoid", "relu2"))]
)
def test_weights_and_slopes_over_the_whole_range(name: str) -> None:
    """One key of value 1: the output is its weight, and the gradient of the bias its slope, to a few ulp of itself."""
    x = torch.cat([torch.linspace(-6.0, 6.0, 60), torch.tensor([-80.0, -20.0, 20.0, 80.0])]).to(DEVICE)
    bias = x.view(1, 1, -1, 1).requires_grad_()
    zeros = torch.zeros(1, 1, x.numel(), 8, device=DEVICE)
    one = torch.tensor([1.0] + [0.0] * 7, device=DEVICE).view(1, 1, 1, 8)
    out = accel.gau_attention(zeros, zeros[:, :, :1], one, activation=name, bias=bias, backend="triton")[0, 0, :, 0]
    (grad,) = torch.autograd.grad(out.sum(), bias)
    of = BY_PAIR[name]
    torch.testing.assert_close(out.double(), of.weight(x.double()), rtol=2e-5, atol=1e-12)
    torch.testing.assert_close(grad.flatten().double(), of.slope(x.double()), rtol=2e-5, atol=1e-12)


# --- what is not finite ---

WIDE = 136
"""More channels than a block has: the programs that do not hold the number have to learn of it."""


def prepared(tokens: int = 40, size: int = 16, width: int = 16, **options: Any) -> Args:
    make = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, tokens, size, generator=make).to(DEVICE) for _ in range(2))
    v, gate = (torch.randn(1, 2, tokens, width, generator=make).to(DEVICE) for _ in range(2))
    return _prepare(q, k, v, gate, **options)


@pytest.mark.parametrize("bad", [math.nan, *(pytest.param(x, marks=SLOW) for x in (math.inf, -math.inf))])
@pytest.mark.parametrize("name", [pytest.param("q", marks=SLOW), pytest.param("k", marks=SLOW), "v"])
@pytest.mark.parametrize("rule", [{"window": (5, 2)}, pytest.param({}, marks=SLOW)], ids=["window", "all"])
def test_not_finite(name: str, bad: float, rule: dict[str, Any]) -> None:
    """It makes the rows that see it NaN, in all channels, and leaves the bits of the others."""
    args = prepared(width=WIDE, **rule)
    clean = kernels.forward(*args)[0]
    getattr(args, name)[0, 1, 21, 3] = bad
    out, want = kernels.forward(*args)[0], reference(*args)[0]
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out[~want.isnan()], clean[~want.isnan()])


@pytest.mark.parametrize("name", ["v", "grad_out"])
def test_pairs_that_a_bias_hides_stay_as_they_are(name: str) -> None:
    """−∞ hides a key from some queries in the middle of a full tile: what is NaN in either does not reach the other."""
    hidden = torch.arange(40, device=DEVICE) % 3 != 0
    bias = torch.zeros(40, 40, device=DEVICE)
    bias[hidden, 21] = -math.inf
    args = prepared(bias=bias if name == "v" else bias.T.contiguous())
    grad_out = torch.randn(args.v.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def run() -> list[torch.Tensor]:
        out, sums = kernels.forward(*args)
        grad_q, grad_k, grad_v, *_ = kernels.backward(grad_out, sums, *args, [False] * 4)
        return [x[:, :, hidden] for x in ((out, grad_q) if name == "v" else (out, grad_k, grad_v))]

    want = run()
    (grad_out if name == "grad_out" else args.v)[0, 1, 21, 3] = math.nan
    for got, expected in zip(run(), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=SLOW) for name in "qkv"), "grad_out"])
def test_gradients_of_the_others_stay_finite(name: str) -> None:
    """Two sequences that do not see each other: NaN in the second leaves the gradients of the first as they are."""
    args = prepared(cu_seqlens_q=cumulative((19, 21), device=DEVICE), causal=True)
    grad_out = torch.randn(args.v.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def gradients() -> list[torch.Tensor]:
        _, sums = kernels.forward(*args)
        return [g[:, :, :19] for g in kernels.backward(grad_out, sums, *args, [False] * 4)[:3]]

    want = gradients()
    (grad_out if name == "grad_out" else getattr(args, name))[0, 0, 25, 3] = math.nan
    for got, expected in zip(gradients(), want, strict=True):
        assert torch.equal(got, expected)


# --- sums in parts, and what needs no kernel ---


@pytest.mark.parametrize(("name", "programs"), identified(("bias_of_keys", "toeplitz_300", "grid_300"), (7,)))
def test_parts_with_a_remainder(name: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(biases, "PROGRAMS", programs)
    testing.check_values(accel.gau_attention, common.by_name(name), "triton", BF16, DEVICE)


def test_unneeded_gradients_are_empty() -> None:
    args = prepared(tokens=5, bias=torch.zeros(5, 5, device=DEVICE))
    grads = kernels.backward(args.v, args.v, *args, [False] * 4)
    assert [tuple(g.shape) for g in grads[3:]] == [(0,)] * 4


def test_why_not() -> None:
    args = prepared()
    assert kernels.why_not(args) is None
    assert "multiple of 8 up to 256, not 264" in str(kernels.why_not(args._replace(q=args.q.new_empty(1, 2, 40, 264))))
    assert "multiple of 8 up to 8192, not 12" in str(kernels.why_not(args._replace(v=args.v.new_empty(1, 2, 40, 12))))
    assert "one launch" in str(kernels.why_not(args._replace(q=args.q.new_empty(1).expand(2**16, 2**12, 2**10, 16))))
    assert "meta" in str(kernels.why_not(args._replace(q=args.q.to("meta"))))


def test_why_not_without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "INTERPRETING", False)
    assert "cpu" in str(kernels.why_not(prepared()._replace(q=torch.empty(1, 2, 40, 16))))
