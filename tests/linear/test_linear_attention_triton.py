"""The Triton backend of linear attention by itself: every kernel against the float64 reference.

Without a GPU the kernels run under Triton's interpreter, which is slow: a dozen of the op's cases run by default, and
all of them where there is a GPU or slow tests are asked for.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from _linear_cases import BEHAVIOUR, CASES, EXACT, by_name, case, cumulative
from _triton_checks import DEVICE, params

import accel
from accel import testing
from accel.kernels import _launch
from accel.kernels.linear import arguments
from accel.kernels.linear import linear_attention as kernels
from accel.ops.linear.linear_attention import Args, _prepare, reference
from accel.testing import assert_close

SLOW = [] if DEVICE == "cuda" else [pytest.mark.slow]
FP32, HALVES = torch.float32, (torch.bfloat16, torch.float16)


def in_halves(given: testing.Case) -> list[testing.Case]:
    """A case by dtype. In half precision the gradient of q of what is normalized starts from the rounded output, and
    where a row sees few keys is a difference of nearly equal numbers: see "linear_few"."""
    _, kwargs = given.make(FP32, "cpu", 0)
    if given.family != "linear" or not kwargs.get("normalize", True):
        return [given]
    few = dataclasses.replace(given, family="linear_few", dtypes=HALVES)
    return [dataclasses.replace(given, dtypes=(FP32,)), few]


QUICK = {
    "causal": "float32",
    "cross": "bfloat16",
    "masked_causal": "float16",
    "exact_17": "float32",
}
CHECKED = [some for given in CASES for some in in_halves(given)]
SMALL = case("small", 5, B=2, H=(1, 1, 1), D=8, causal=True, dtypes=(FP32,))


@pytest.mark.parametrize("check", params(accel.linear_attention, [*CHECKED, *EXACT], [SMALL, *BEHAVIOUR], QUICK))
def test_op(check: Any) -> None:
    check()


# --- sequences in parts ---

PARTS = (
    "causal_65",
    "state_decay",
    "packed_state",
    "token_decay",
    "packed_cross_state",
    "gqa_of_few_keys",
    "heavy_decay",
)


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "PROGRAMS", 10_000)
    monkeypatch.setattr(arguments, "SEGMENT", 48)


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW) for n in PARTS])
def test_parts(name: str) -> None:
    testing.check_values(accel.linear_attention, by_name(name), "triton", FP32, DEVICE)


# --- states ---


def drawn(tokens: int, heads: int = 2, size: int = 16, batch: int = 1) -> dict[str, Any]:
    make = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(batch, heads, tokens, size, generator=make) for _ in range(3))
    decay = -torch.rand(batch, heads, tokens, generator=make)
    state = torch.randn(batch, heads, size, size, generator=make), torch.rand(batch, heads, size, generator=make)
    given = {"q": q, "k": k, "v": v, "log_decay": decay}
    return {**{n: x.to(DEVICE) for n, x in given.items()}, "initial_state": tuple(x.to(DEVICE) for x in state)}


@pytest.mark.parametrize("rule", ["decay", *(pytest.param(rule, marks=SLOW) for rule in ("sum", "all"))])
@pytest.mark.parametrize("packed", [pytest.param(False, marks=SLOW), True], ids=["batch", "packed"])
@pytest.mark.parametrize("what", [*(pytest.param(what, marks=SLOW) for what in ("out", "state")), "both"])
def test_gradients_of_states(what: str, rule: str, packed: bool) -> None:
    """Through the initial state, and from the final one, of a call that gives both."""
    given = drawn(70, heads=4)
    given["k"] = given["k"][:, :2]
    options: dict[str, Any] = {"causal": rule != "all", "normalize": rule != "sum", "return_state": True}
    if rule == "all":
        del given["log_decay"]
    if packed:
        options["cu_seqlens_q"] = cumulative((0, 43, 27), device=DEVICE)
        given["initial_state"] = tuple(torch.cat([x, x + 1.0, x]) for x in given["initial_state"])

    def grads(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        kv, k_sum = [x.to(dtype).requires_grad_() for x in given["initial_state"]]
        leaves = {n: x.to(dtype).requires_grad_() for n, x in given.items() if n != "initial_state"}
        out, (last, last_sum) = accel.linear_attention(**leaves, initial_state=(kv, k_sum), **options, backend=backend)
        parts = {"out": [out], "state": [last, last_sum], "both": [out, last, last_sum]}[what]
        parts = [x for x in parts if x is not None]
        upstream = [testing.running.random_like(x, i) for i, x in enumerate(parts)]
        wanted = [*leaves.values(), kv, *([k_sum] if options["normalize"] else [])]
        return list(torch.autograd.grad(parts, wanted, upstream, allow_unused=True, materialize_grads=True))

    for i, (got, want) in enumerate(zip(grads("triton", FP32), grads("reference", torch.float64), strict=True)):
        assert_close(got, want, "linear_grad", FP32, f"gradient {i}")


def test_two_halves_are_the_whole() -> None:
    given = drawn(70)
    options: dict[str, Any] = {"causal": True, "return_state": True, "backend": "triton"}
    whole, after = accel.linear_attention(**given, **options)
    state, found = given.pop("initial_state"), []
    for part in (slice(0, 41), slice(41, None)):
        pieces = {n: x[:, :, part] for n, x in given.items()}
        out, state = accel.linear_attention(**pieces, initial_state=state, **options)
        found.append(out)
    assert_close(torch.cat(found, 2), whole.double(), "linear", FP32)
    for got, want in zip(state, after, strict=True):
        assert_close(got, want.double(), "linear", FP32)


# --- what is not finite ---

WIDE = 72
"""More channels than a tile has in fp32: the tiles that do not hold the number have to learn of it."""


def prepared(tokens: int = 40, size: int = WIDE, **options: Any) -> Args:
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, tokens, size, generator=make).to(DEVICE) for _ in range(3))
    return _prepare(q, k, v, **options)


@pytest.mark.parametrize("bad", [math.nan, pytest.param(math.inf, marks=SLOW)])
@pytest.mark.parametrize("name", [*(pytest.param(name, marks=SLOW) for name in "qk"), "v"])
@pytest.mark.parametrize("rule", [{"causal": True}, {}], ids=["causal", "all"])
def test_not_finite(name: str, bad: float, rule: dict[str, Any]) -> None:
    """It makes the rows and the state that see it NaN, in all channels, and leaves the bits of the others."""
    args = prepared(**rule, return_state=True, feature_map="identity", normalize=False)
    clean = kernels.forward(*args)[0]
    getattr(args, name)[0, 1, 21, 3] = bad
    out, kv, _, _ = kernels.forward(*args)
    want, want_kv, _, _ = reference(*args)
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(kv.isnan(), want_kv.isnan())
    assert torch.equal(out[~want.isnan()], clean[~want.isnan()])


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW) for name in "kv"])
def test_not_finite_in_parts(name: str) -> None:
    args = prepared(tokens=150, causal=True, return_state=True)
    getattr(args, name)[0, 1, 101, 3] = math.nan
    out, kv, k_sum, _ = kernels.forward(*args)
    for got, want in zip((out, kv, k_sum), reference(*args), strict=False):
        assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=SLOW) for name in "qv"), "k", "grad_out"])
def test_gradients_of_the_others_stay_finite(name: str) -> None:
    """Two sequences that do not see each other: NaN in the second leaves the gradients of the first as they are."""
    decay = torch.full((1, 2, 40), -0.1, device=DEVICE)
    cu = torch.tensor([0, 19, 40], device=DEVICE)
    args = prepared(size=16, cu_seqlens_q=cu, causal=True, log_decay=decay)
    grad_out = torch.randn(args.q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def gradients() -> list[torch.Tensor]:
        out, _, _, den = kernels.forward(*args)
        grads = kernels.backward(grad_out, None, None, out, den, *args, [True] * 3)
        return [g[:, :, :19] for g in grads[:4]]

    want = gradients()
    (grad_out if name == "grad_out" else getattr(args, name))[0, 0, 25, 3] = math.nan
    for got, expected in zip(gradients(), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=SLOW) for name in "qv"), "k"])
def test_rows_that_are_nan_give_no_gradient(name: str) -> None:
    """As in the definition, whose output they are not part of."""
    args = prepared(size=16, causal=True, feature_map="elu1")
    getattr(args, name)[0, 0, 25, 3] = math.nan
    grad_out = torch.randn(args.q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    out, _, _, den = kernels.forward(*args)
    got = kernels.backward(grad_out, None, None, out, den, *args, [False] * 3)[:3]
    leaves = [x.double().requires_grad_() for x in args[:3]]
    wide = reference(*leaves, *args[3:])[0]
    for x, want in zip(got, torch.autograd.grad(wide, leaves, grad_out.double()), strict=True):
        assert_close(x, want.nan_to_num(0.0), "linear_few_grad", FP32)


# --- what needs no kernel ---


def test_unneeded_gradients_are_empty() -> None:
    args = prepared(tokens=5, size=8, causal=True, log_decay=torch.full((2,), -0.1, device=DEVICE))
    out, _, _, den = kernels.forward(*args)
    grads = kernels.backward(out, None, None, out, den, *args, [False] * 3)
    assert [tuple(g.shape) for g in grads[3:]] == [(0,)] * 3


def test_why_not() -> None:
    args = prepared()
    assert kernels.why_not(args) is None
    assert "not 136 and 72" in str(kernels.why_not(args._replace(q=args.q.new_empty(1, 2, 40, 136))))
    assert "meta" in str(kernels.why_not(args._replace(q=args.q.to("meta"))))


def test_why_not_without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "INTERPRETING", False)
    args = prepared()
    assert "cpu" in str(kernels.why_not(args._replace(q=args.q.cpu())))


# --- the gradient of decay of sequences that are longer than a part ---


@pytest.mark.parametrize("of", ["token", pytest.param("head", marks=SLOW)])
@pytest.mark.parametrize("normalize", [False, pytest.param(True, marks=SLOW)], ids=["sum", "normalized"])
def test_the_gradient_of_decay_does_not_drift(normalize: bool, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through rows and the final state, by heads that share keys, in parts of 64 tokens, the last of them short."""
    monkeypatch.setattr(arguments, "ANCHORED", 64)
    generator = torch.Generator().manual_seed(2)  # a number for all tokens is no small difference of large ones
    q, k, v = [torch.rand(1, n, 180, 16, generator=generator) - (not normalize) / 2 for n in (2, 1, 1)]
    decay = -0.05 * torch.rand(1, 1, 180, generator=generator)
    decay = decay.mean((0, 2)) if of == "head" else decay

    def gradient(backend: str, dtype: torch.dtype, device: str) -> torch.Tensor:
        leaf = decay.to(device, dtype).requires_grad_()
        out, state = accel.linear_attention(
            *[x.to(device, dtype) for x in (q, k, v)], feature_map="identity", causal=True, normalize=normalize,
            log_decay=leaf, return_state=True, backend=backend,
        )  # fmt: skip
        made = [x for x in (out, *state) if x is not None]
        upstream = [testing.running.random_like(x, i) for i, x in enumerate(made)]
        return torch.autograd.grad(made, leaf, upstream)[0]

    want = gradient("reference", torch.float64, "cpu")
    assert_close(gradient("triton", FP32, DEVICE), want, "sum_grad" if of == "head" else "linear_grad", FP32)


@pytest.mark.parametrize("parts", [False, pytest.param(True, marks=SLOW)], ids=["whole", "parts"])
def test_the_gradient_of_heavy_decay_through_states(parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last key enters the final state whole: what it gives must not be a difference of the gradients of others."""
    if parts:
        monkeypatch.setattr(arguments, "ANCHORED", 16)
    given = drawn(40, heads=1, size=8)
    given["log_decay"].fill_(-12.0)  # of heavier ones the reference has no more digits

    def gradient(backend: str, dtype: torch.dtype) -> torch.Tensor:
        *leaves, kv, k_sum = [x.to(dtype) for x in (*(given[n] for n in ("q", "k", "v")), *given["initial_state"])]
        decay = given["log_decay"].to(dtype).requires_grad_()
        out, state = accel.linear_attention(
            *leaves, causal=True, log_decay=decay, initial_state=(kv, k_sum), return_state=True, backend=backend
        )
        made = [out, *state]
        return torch.autograd.grad(made, decay, [testing.running.random_like(x, i) for i, x in enumerate(made)])[0]

    assert_close(gradient("triton", FP32), gradient("reference", torch.float64), "linear_grad", FP32)
