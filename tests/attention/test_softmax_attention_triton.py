"""The Triton backend of softmax attention by itself: every kernel and rule against the float64 reference.

Without a GPU the kernels run under Triton's interpreter, which is slow: of the op's cases come those that reach
something of their own in these kernels; all of them run on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from _attention_calls import case
from _attention_cases import GRADIENTS, WHOLE, by_name
from _pairs import random_index

import accel
from accel import Grid2D, testing
from accel.kernels import _biases_launch as biases
from accel.kernels import _launch
from accel.kernels.attention import softmax_attention as kernels
from accel.ops.attention.softmax_attention import Args, _prepare, reference
from accel.testing import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

NAMES = [
    ("plain", FP16),
    ("scale_negative", FP32),
    ("value_size_128", BF16),
    ("heads_inside_tokens", BF16),
    ("causal_150", BF16),
    ("causal_more_queries", BF16),
    ("window_causal_more_queries", BF16),
    ("padding_200", BF16),
    ("rows_without_keys", FP16),
    ("block_diffusion_262", BF16),
    ("packed_int64", BF16),
    ("packed_cross_causal", BF16),
    ("bias_full", BF16),
    ("bias_of_keys", BF16),
    ("t5_decoder_step", FP16),
    ("beit_grid", BF16),
    ("index_padding", BF16),
    ("huge_bias", BF16),
    ("least_bias_of_left_keys", FP32),
    ("least_index", FP16),
]
SLOW_NAMES = [
    ("huge_bias", FP32),
    ("huge_toeplitz", BF16),
    ("huge_dropout", BF16),
    ("least_bias", BF16),
    ("least_grid", BF16),
    ("least_softcap", BF16),
    ("one_of_each", FP32),
    ("gqa_3", BF16),
    ("head_size_40", FP32),
    ("keys_of_one_head", BF16),
    ("very_negative", BF16),
    ("top_left_more_keys", FP16),
    ("mask_of_queries", FP32),
    ("no_keys_at_all", BF16),
    ("prefix_list", BF16),
    ("packed_cross_alibi", BF16),
    ("bias_of_queries", BF16),
    ("bias_of_one_number", FP32),
    ("minus_inf_rows_of_bias", FP32),
    ("toeplitz_more_queries", BF16),
    ("index_int32", BF16),
    ("alibi_and_grid", BF16),
    ("softcap_30", FP32),
    ("sinks_rows_without_keys", BF16),
    ("dropout_causal_gqa", BF16),
    ("everything", BF16),
    ("everything_by_index", BF16),
    ("exact_bias_of_heads", BF16),
    ("exact_toeplitz_gqa", BF16),
    ("exact_beit", FP16),
    ("exact_packed_cross", BF16),
]
OWN = [
    case("small_everything", 19, B=1, D=8, E=16, mask=(1, 1, 1, 19), bias=(1, 2, 19, 1), rows=37, slopes=True,
         sinks=True, window=(9, 3), softcap=3.0, dropout_p=0.2, Hkv=1, **WHOLE),
    case("small_softcap", 17, 23, B=1, D=8, softcap=1.5, causal=True),
    case("small_index", 17, 23, B=1, D=8, bias_index=random_index(17, 23, 1100), rows=1100, slopes=True),
    case("small_grid", 17, B=1, D=8, bias_index=Grid2D(5, 3, 2), rows=48, dropout_p=0.3),
]  # fmt: skip


def identified(name: str, dtype: torch.dtype) -> Any:
    return pytest.param(name, dtype, id=f"{name}-{str(dtype)[6:]}")


@pytest.mark.parametrize("given", OWN, ids=str)
def test_own_cases(given: testing.Case) -> None:
    testing.check_values(accel.softmax_attention, given, "triton", FP32, DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [identified(*pair) for pair in SLOW_NAMES])
def test_more_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    testing.check_values(accel.softmax_attention, by_name(name), "triton", dtype, DEVICE)


@pytest.mark.parametrize(("name", "dtype"), [identified(*pair) for pair in NAMES])
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    testing.check_values(accel.softmax_attention, by_name(name), "triton", dtype, DEVICE)


def test_tiny_heads_are_refused() -> None:
    tensors, kwargs = GRADIENTS[0].make(FP32, DEVICE, 0)
    with pytest.raises(NotImplementedError, match="multiple of 8"):
        accel.softmax_attention(**tensors, **kwargs, backend="triton")


SMALL = case("small", 5, 7, D=8, Hkv=1, bias=(2, 1, 1, 7), slopes=True, sinks=True, causal=True, dtypes=(FP32,))
CHECKS = (
    testing.check_strides,
    testing.check_poison,
    testing.check_batch,
    testing.check_opcheck,
)
if torch.cuda.is_available():  # the interpreter runs one program after the other, so nothing can differ between runs
    CHECKS += (testing.check_repeat, testing.check_subsets)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_behaviour(check: Any) -> None:
    check(accel.softmax_attention, SMALL, "triton", DEVICE)


# --- what is not finite ---


def prepared(dtype: torch.dtype = FP32, tokens: int = 40, **kwargs: Any) -> Args:
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, tokens, 16, generator=make).to(DEVICE, dtype) for _ in range(3))
    return _prepare(q, k, v, **kwargs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("rule", [{}, {"causal": True}, {"window": (5, 2)}, {"softcap": 3.0, "causal": True}], ids=str)
def test_not_finite_reaches_those_who_see_it(name: str, bad: float, rule: dict[str, Any]) -> None:
    args = prepared(**rule)
    getattr(args, name)[0, 0, 21, 3] = bad
    out, lse, _ = kernels.forward(*args)
    out_ref, lse_ref = reference(*args)
    assert_close(out, out_ref.double(), "softmax", FP32, "out")
    assert_close(lse, lse_ref.double(), "lse", FP32, "lse")


@pytest.mark.parametrize("name", ["q", "k", "v", "grad_out"])
def test_gradients_of_the_others_stay_finite(name: str) -> None:
    """Two sequences that do not see each other: NaN in the second leaves the gradients of the first as they are."""
    args = prepared(cu_seqlens_q=torch.tensor([0, 19, 40], device=DEVICE), causal=True)
    grad_out = torch.randn(args.q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def gradients() -> list[torch.Tensor]:
        out, lse, peak = kernels.forward(*args)
        grads = kernels.backward(grad_out, (out * grad_out).sum(-1), lse, peak, *args, [False] * 3)
        return [g[:, :, :19] for g in grads[:3]]

    want = gradients()
    (grad_out if name == "grad_out" else getattr(args, name))[0, 0, 25, 3] = math.nan
    for got, expected in zip(gradients(), want, strict=True):
        assert torch.equal(got, expected)


# --- sums in parts ---


@pytest.mark.parametrize(("name", "programs"), [("bias_of_keys", 7), ("toeplitz_more_keys", 1), ("beit_grid", 7)])
def test_parts_with_a_remainder(name: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(biases, "PROGRAMS", programs)
    testing.check_values(accel.softmax_attention, by_name(name), "triton", BF16, DEVICE)


def test_unneeded_gradients_are_empty() -> None:
    args = prepared(bias=torch.zeros(40, device=DEVICE), alibi_slopes=torch.ones(1, device=DEVICE))
    out, lse, peak = kernels.forward(*args)
    grads = kernels.backward(out, lse, lse, peak, *args, [False] * 3)
    assert [tuple(g.shape) for g in grads[3:]] == [(0,)] * 3


# --- refusals, which need no kernel ---


def test_why_not() -> None:
    args = prepared()
    assert kernels.why_not(args) is None
    wide = torch.empty_strided((1, 1, 2, 40), (0, 0, 2**23, 1), device="meta")
    assert "bias" in str(kernels.why_not(args._replace(bias=wide)))
    assert "meta" in str(kernels.why_not(args._replace(q=args.q.to("meta"))))


def test_why_not_without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "INTERPRETING", False)
    args = prepared()
    assert "cpu" in str(kernels.why_not(args._replace(q=args.q.cpu())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(2, 3, 37, 40), (1, 1, 1, 8), (1, 2, 70, 128)])
def test_row_sums(size, dtype):
    b, h, t, d = size
    out = torch.randn(size, dtype=dtype, device=DEVICE)
    grad = torch.randn((b, t, h, d), dtype=dtype, device=DEVICE).transpose(1, 2)
    torch.testing.assert_close(kernels.row_sums(grad, out), (grad.float() * out.float()).sum(-1))
