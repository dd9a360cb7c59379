"""What every op's test asks of every backend: the checks, the one tolerance table, poisoned memory.

An op's test file gives its cases as data (:class:`Case`); :func:`check_op` turns them into named checks. Nothing here
needs pytest: a check that cannot run on this machine raises ``unittest.SkipTest`` with the backend's own reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import unittest
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from accel import dispatch, guard

HALVES = (torch.bfloat16, torch.float16)
KERNEL_DTYPES = (torch.float32, *HALVES)


# --- tolerances ---


class Tolerance(NamedTuple):
    """``rms``: of the error over that of the reference, for a whole output. ``row``: largest error in a row of the
    last axis over the largest reference value in that row. Both must hold, since a mean does not see one bad element
    in a million."""

    rms: float
    row: float


_FP16, _BF16 = 2.0**-11, 2.0**-8  # unit roundoff

# Measured floors are of a tiled softmax that keeps fp32 inside and rounds probabilities and outputs once; limits are
# two to four times the floor. In half precision a row may be off by 4 u: one u for each of the two roundings, doubled.
# In fp32 the row is bounded by ten times the mean, which is what the tail of a sum of rounding errors needs.
TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    # floor 4.5e-7, 2.9e-4, 2.3e-3
    ("softmax", torch.float32): Tolerance(2e-6, 2e-5),
    ("softmax", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("softmax", torch.bfloat16): Tolerance(6e-3, 4 * _BF16),
    # floor 4.8e-7, 3.0e-4, 2.5e-3: one more product, and the output is rounded before it enters the row's delta
    ("softmax_grad", torch.float32): Tolerance(3e-6, 3e-5),
    ("softmax_grad", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("softmax_grad", torch.bfloat16): Tolerance(8e-3, 4 * _BF16),
    # rows that see few keys, or in which biases give one key most of the weight: a gradient there is the difference of
    # nearly equal numbers, of which one, the row's delta, is made of the rounded output. The floor of dense arithmetic
    # that rounds weights, their gradients and outputs once is 22 u in the worst row of 200 calls; the mean is as above
    ("softmax_few", torch.float32): Tolerance(2e-6, 2e-5),
    ("softmax_few", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("softmax_few", torch.bfloat16): Tolerance(6e-3, 4 * _BF16),
    ("softmax_few_grad", torch.float32): Tolerance(3e-6, 3e-5),
    ("softmax_few_grad", torch.float16): Tolerance(1e-3, 32 * _FP16),
    ("softmax_few_grad", torch.bfloat16): Tolerance(8e-3, 32 * _BF16),
    # the same with thousands of tokens in causal order: the first rows' gradients are rounded as before, and most rows,
    # by which they are measured, shrink with the number of keys; 39 u at 8192 tokens
    ("softmax_long", torch.float32): Tolerance(2e-6, 2e-5),
    ("softmax_long", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("softmax_long", torch.bfloat16): Tolerance(6e-3, 4 * _BF16),
    ("softmax_long_grad", torch.float32): Tolerance(3e-6, 6e-5),
    ("softmax_long_grad", torch.float16): Tolerance(1e-3, 64 * _FP16),
    ("softmax_long_grad", torch.bfloat16): Tolerance(8e-3, 64 * _BF16),
    # logits of up to 100 or 10 000: rounding a logit, or the log-sum-exp that the backward starts from, to fp32 moves
    # a weight by that many u; in half precision the last rounding hides it
    ("softmax_100", torch.float32): Tolerance(1e-5, 1e-4),
    ("softmax_100", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("softmax_100", torch.bfloat16): Tolerance(6e-3, 4 * _BF16),
    ("softmax_100_grad", torch.float32): Tolerance(2e-5, 2e-4),
    ("softmax_100_grad", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("softmax_100_grad", torch.bfloat16): Tolerance(8e-3, 4 * _BF16),
    ("softmax_10000", torch.float32): Tolerance(1e-5, 1e-4),
    ("softmax_10000", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("softmax_10000", torch.bfloat16): Tolerance(6e-3, 4 * _BF16),
    ("softmax_10000_grad", torch.float32): Tolerance(1e-4, 1e-3),
    ("softmax_10000_grad", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("softmax_10000_grad", torch.bfloat16): Tolerance(8e-3, 4 * _BF16),
    # one number summed with both signs over every weight of the call: plain fp32 torch is off by up to 1.7e-6. In half
    # precision the rounding of the output alone, which the backward starts from, leaves 2.3e-3 and 8.9e-3 in the worst
    # of 40 draws, on an H200 up to 1.5e-3 and 1.1e-2; a kernel that sums rounded terms is off by up to 4e-2
    ("sum_grad", torch.float32): Tolerance(6e-6, 6e-5),
    ("sum_grad", torch.float16): Tolerance(3e-3, 8 * _FP16),
    ("sum_grad", torch.bfloat16): Tolerance(1.5e-2, 8 * _BF16),
    # sums of bilinear samples. Rounding a position on a map of 40 pixels to fp32 moves a sample, and any gradient, by
    # 1e-6 of what its neighbours differ: that is the floor in fp32, mean 1.8e-6 and worst row 1.1e-5 for outputs and
    # gradients alike. In half precision everything is rounded once, at the end: 3.0e-4, 2.5e-3, worst row 1 u. A
    # gradient of positions is a sum over channels of differences of pixels, with the same floor
    ("sample", torch.float32): Tolerance(5e-6, 4e-5),
    ("sample", torch.float16): Tolerance(1e-3, 2 * _FP16),
    ("sample", torch.bfloat16): Tolerance(6e-3, 2 * _BF16),
    ("sample_grad", torch.float32): Tolerance(5e-6, 4e-5),
    ("sample_grad", torch.float16): Tolerance(1e-3, 2 * _FP16),
    ("sample_grad", torch.bfloat16): Tolerance(6e-3, 2 * _BF16),
    # the same on maps of 167 pixels, whose positions are rounded four times as coarsely: in the worst of 3 million rows
    # 9.8e-5 here and in torch's grid_sample
    ("sample_wide", torch.float32): Tolerance(5e-6, 1.6e-4),
    ("sample_wide", torch.float16): Tolerance(1e-3, 2 * _FP16),
    ("sample_wide", torch.bfloat16): Tolerance(6e-3, 2 * _BF16),
    ("sample_wide_grad", torch.float32): Tolerance(5e-6, 1.6e-4),
    ("sample_wide_grad", torch.float16): Tolerance(1e-3, 2 * _FP16),
    ("sample_wide_grad", torch.bfloat16): Tolerance(6e-3, 2 * _BF16),
    # products of weights with such samples, fp32 sums over taps and channels. In half precision a sample times its mask
    # is rounded before the product and the output after it: floor 8.1e-7, 3.2e-4, 2.8e-3, worst row 3.6e-6 and 1.9 u
    ("deform_conv", torch.float32): Tolerance(3e-6, 1.5e-5),
    ("deform_conv", torch.float16): Tolerance(1e-3, 4 * _FP16),
    ("deform_conv", torch.bfloat16): Tolerance(6e-3, 4 * _BF16),
    # the weight's gradient is made of the rounded samples: 1.4e-6, 4.3e-4, 3.4e-3, worst row 1.6e-5 and 3.8 u. The
    # others start from the product of weight and upstream gradient; rounded once as well, a sum over channels of its
    # products with differences of pixels (offset) or samples (mask) has 6.7e-4, 4.4e-3, worst row 4.7 u
    ("deform_conv_grad", torch.float32): Tolerance(4e-6, 5e-5),
    ("deform_conv_grad", torch.float16): Tolerance(1.5e-3, 8 * _FP16),
    ("deform_conv_grad", torch.bfloat16): Tolerance(1e-2, 8 * _BF16),
    # kept in fp32 whatever the inputs; about as large as a logit, so one relative figure serves
    ("lse", torch.float32): Tolerance(1e-6, 1e-5),
    # integers small enough that every product, sum and rounding is exact
    ("exact", torch.float32): Tolerance(0.0, 0.0),
    ("exact", torch.float16): Tolerance(0.0, 0.0),
    ("exact", torch.bfloat16): Tolerance(0.0, 0.0),
    ("exact_grad", torch.float32): Tolerance(0.0, 0.0),
    ("exact_grad", torch.float16): Tolerance(0.0, 0.0),
    ("exact_grad", torch.bfloat16): Tolerance(0.0, 0.0),
}


def assert_close(actual: Tensor, expected: Tensor, family: str, dtype: torch.dtype, what: str = "result") -> None:
    """``actual`` is within the table's limits for ``family`` and ``dtype`` of ``expected`` (best float64).

    NaN and infinities must stand in the same places first. A row whose reference is small beside the whole comes from
    cancellation, so the root mean square of the whole is the least a row's error is measured against.
    """
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)=}, {tuple(expected.shape)=}"
    limit = TOLERANCES[family, dtype]
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = test(a) != test(e)
        assert not differ.any(), (
            f"{what}: {name} at {int(test(a).sum())} places, expected at {int(test(e).sum())}; "
            f"they differ at {differ.nonzero()[:4].tolist()}"
        )
    if a.numel() == 0:
        return
    finite = torch.isfinite(e)
    a, e = torch.where(finite, a, 0.0), torch.where(finite, e, 0.0)
    error = (a - e).abs()
    mean = e.square().mean().sqrt()
    rms = error.square().mean().sqrt()
    bound = limit.rms * mean
    assert rms <= bound, (
        f"{what}: rms error {rms:.3e} > {limit.rms:.1e} x rms {mean:.3e} = {bound:.3e} ({family}, {dtype})"
    )
    rows, error_rows = (x.reshape(-1, x.shape[-1] if x.dim() else 1) for x in (e.abs(), error))
    largest = rows.amax(-1).clamp_min(mean)
    excess = error_rows.amax(-1) - limit.row * largest
    worst = int(excess.argmax())
    column = int(error_rows[worst].argmax())
    assert excess[worst] <= 0, (
        f"{what}: error {error_rows[worst, column]:.3e} > {limit.row:.1e} x {largest[worst]:.3e} in row {worst}, "
        f"column {column}: got {a.reshape(-1)[worst * rows.shape[1] + column]:.6e}, "
        f"expected {e.reshape(-1)[worst * rows.shape[1] + column]:.6e} ({family}, {dtype})"
    )


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal bit for bit, except that any NaN equals any NaN."""
    kinds = ((x.dtype, tuple(x.shape)) for x in (actual, expected))
    assert next(kinds) == next(kinds), f"{what}: {actual.dtype=}, {actual.shape=}, {expected.dtype=}, {expected.shape=}"
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), (
        f"{what}: {int((~same).sum())} of {same.numel()} elements differ, first at {(~same).nonzero()[0].tolist()}: "
        f"{actual[~same][0].item()!r} against {expected[~same][0].item()!r}"
    )


# --- cases and running them ---


def _whole(x: Tensor, name: str, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op as data.

    ``make(dtype, device, seed)`` returns the tensors by argument name, the main one first, and the other arguments;
    the same seed gives the same values. ``split(result, name, kwargs)`` cuts an output (``name == "out"``) or a
    gradient (``name`` the argument's) into the parts that are compared apart, where one tensor packs quantities of
    different size. ``sums`` names the tensors whose gradient is one sum over the whole call (family ``sum``).
    ``batched`` names the tensors whose first axis is the batch, as the output's is; ``autocast`` those that autocast
    casts, the main one alone if none is named.
    """

    name: str
    make: Callable[[torch.dtype, str, int], tuple[dict[str, Tensor], dict[str, Any]]]
    family: str = "softmax"
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
    split: Callable[[Tensor, str, dict[str, Any]], dict[str, Tensor]] = _whole
    sums: tuple[str, ...] = ()
    batched: tuple[str, ...] = ()
    autocast: tuple[str, ...] = ()

    def gradient_family(self, name: str) -> str:
        return "sum_grad" if name in self.sums and self.family != "exact" else f"{self.family}_grad"

    def __str__(self) -> str:
        return self.name


class Run(NamedTuple):
    out: Tensor
    grads: dict[str, Tensor | None]

    def named(self) -> dict[str, Tensor]:
        found = {f"grad {n}": g for n, g in self.grads.items() if g is not None}
        return {"out": self.out, **found}


SEED = 2026  # of torch's generator before every call, so that all backends draw the same dropout seed


def op_of(function: Callable[..., Any]) -> dispatch.Op:
    return dispatch.OPS[function.__name__]


def run(
    function: Callable[..., Any],
    tensors: dict[str, Tensor],
    kwargs: dict[str, Any],
    backend: str | None,
    needs: Iterable[str] | None = None,
    grad_out: Tensor | None = None,
) -> Run:
    """Call ``function`` and differentiate it by the floating tensors in ``needs`` (all of them if None)."""
    wanted = [n for n, t in tensors.items() if t.is_floating_point()] if needs is None else list(needs)
    given = {n: t.detach().requires_grad_(n in wanted) for n, t in tensors.items()}
    torch.manual_seed(SEED)
    out = function(**given, **kwargs, backend=backend)
    if not wanted:
        assert not out.requires_grad, "the output requires a gradient that nobody asked for"
        return Run(out, {})
    grad_out = torch.ones_like(out) if grad_out is None else grad_out
    grads = torch.autograd.grad(out, [given[n] for n in wanted], grad_out, allow_unused=True)
    return Run(out.detach(), dict(zip(wanted, grads, strict=True)))


def random_like(x: Tensor, seed: int = 7) -> Tensor:
    """Normal values of the shape, dtype and device of ``x``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator).to(x.device, x.dtype)


def _prepared(
    function: Callable[..., Any], case: Case, dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """The case's tensors and arguments, and an upstream gradient: integers where the case is exact."""
    tensors, kwargs = case.make(dtype, device, 0)
    with torch.no_grad():
        out = function(**tensors, **kwargs, backend="reference")
    grad_out = random_like(out)
    return tensors, kwargs, grad_out.round() if case.family == "exact" else grad_out


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def require(function: Callable[..., Any], backend: str, tensors: dict[str, Tensor], kwargs: dict[str, Any]) -> None:
    """Skip, with its own reason, when ``backend`` cannot run this call here.

    Under ``ACCEL_REQUIRE_NATIVE=1`` (set where the build is expected to have succeeded) a compiled extension that
    does not load is a failure.
    """
    op = op_of(function)
    torch.manual_seed(SEED)
    reason = op.backend(backend).why_not(op.prepare(**tensors, **kwargs))
    if reason is None:
        return
    if os.environ.get("ACCEL_REQUIRE_NATIVE") == "1" and dispatch.leaf("accel._C")[1] == reason:
        raise AssertionError(f"the compiled extension was expected here: {reason}")
    raise unittest.SkipTest(f"{op.name} on {backend}: {reason}")


@contextlib.contextmanager
def watch(op: dispatch.Op) -> Iterator[list[tuple[str, str]]]:
    """List what runs within the block as ``(backend, "forward" or "backward")``.

    The reference is a plain differentiable function outside the registered ops and leaves no trace.
    """
    ran: list[tuple[str, str]] = []

    def noted(name: str, kind: str, function: Callable[..., Any] | None) -> Any:
        def call(*args: Any) -> Any:
            assert function is not None, f"{name} has no {kind}"
            ran.append((name, kind))
            return function(*args)

        return call

    before = op.backends
    watched = tuple(
        dataclasses.replace(
            b, forward=noted(b.name, "forward", b.forward), backward=noted(b.name, "backward", b.backward)
        )
        for b in before
    )
    object.__setattr__(op, "backends", watched)
    try:
        yield ran
    finally:
        object.__setattr__(op, "backends", before)


def _expected(backend: str, *kinds: str) -> list[tuple[str, str]]:
    return [] if backend == "reference" else [(backend, kind) for kind in kinds]


class Recorder(TorchDispatchMode):
    """Keeps the calls of our registered ops made within the block: ``calls`` of ``(overload, args)``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "accel":
            self.calls.append((func, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
        return func(*args, **(kwargs or {}))


def record(
    function: Callable[..., Any], case: Case, backend: str, dtype: torch.dtype, device: str = "cpu"
) -> list[tuple[Any, tuple[Any, ...]]]:
    """The registered ops that one forward and backward of the case call, with their arguments."""
    tensors, kwargs, grad_out = _prepared(function, case, dtype, device)
    require(function, backend, tensors, kwargs)
    with Recorder() as recorder:
        run(function, tensors, kwargs, backend, grad_out=grad_out)
    return recorder.calls


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory from torch holds NaN, or the largest integer, instead of whatever was there."""
    settings: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = before[2]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- values ---


@functools.lru_cache(maxsize=8)
def _oracle(
    function: Callable[..., Any], case: Case, dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor], dict[str, Any], Tensor, Run]:
    """What all backends are compared with: inputs, upstream gradient, and the reference on them in float64."""
    tensors, kwargs, grad_out = _prepared(function, case, dtype, device)
    want = run(function, double(tensors), kwargs, "reference", grad_out=grad_out.double())
    return tensors, kwargs, grad_out, want


def check_values(
    function: Callable[..., Any], case: Case, backend: str, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Output and every gradient against the float64 reference on the same rounded inputs."""
    tensors, kwargs, grad_out, want = _oracle(function, case, dtype, device)
    require(function, backend, tensors, kwargs)
    with watch(op_of(function)) as ran:
        got = run(function, tensors, kwargs, backend, grad_out=grad_out)
    assert ran == _expected(backend, "forward", "backward"), f"{ran=}, asked for {backend}"
    main = next(iter(tensors.values()))
    assert got.out.dtype == main.dtype, f"{got.out.dtype=}, {main.dtype=}"
    for part, expected in case.split(want.out, "out", kwargs).items():
        assert_close(case.split(got.out, "out", kwargs)[part], expected, case.family, dtype, part)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        grad, expected_grad = got.grads[name], want.grads[name]
        if expected_grad is None:  # autograd's own word for a tensor that has no effect
            expected_grad = torch.zeros(tensor.shape, dtype=torch.float64)
        if grad is None:
            assert backend == "reference", f"{backend} gives no gradient for {name}"
            grad = torch.zeros_like(tensor)
        assert grad.dtype == tensor.dtype, f"gradient of {name} is {grad.dtype}, the tensor {tensor.dtype}"
        parts = case.split(grad, name, kwargs)
        for part, expected in case.split(expected_grad, name, kwargs).items():
            # a small fp32 parameter's gradient is made of the main tensor's rounded values
            assert_close(parts[part], expected, case.gradient_family(name), dtype, f"gradient of {part}")


def _check_equal(got: Run, want: Run, what: str) -> None:
    assert got.named().keys() == want.named().keys(), f"{what}: {got.grads.keys()} against {want.grads.keys()}"
    for name, expected in want.named().items():
        assert_same(got.named()[name], expected, f"{what}: {name}")


def check_gradcheck(function: Callable[..., Any], case: Case, device: str = "cpu") -> None:
    """The reference's derivatives against finite differences: every element of the first (a wrong one of many
    escapes gradcheck's fast mode), the second in sum."""
    tensors, kwargs = case.make(torch.float64, device, 0)
    names = [n for n, t in tensors.items() if t.is_floating_point()]

    def call(*values: Tensor) -> Any:
        torch.manual_seed(SEED)
        return function(**{**tensors, **dict(zip(names, values, strict=True))}, **kwargs, backend="reference")

    inputs = tuple(tensors[n].double().requires_grad_() for n in names)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=False)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def _error(call: Callable[[], Any]) -> Exception | None:
    """What ``call()`` raises."""
    try:
        call()
    except Exception as error:
        return error
    return None


# --- behaviour: each takes (function, case, backend, device) and needs a case with a gradient ---


def check_subsets(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """Asking for some gradients changes none of them and brings no others."""
    tensors, kwargs, grad_out = _prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    full = run(function, tensors, kwargs, backend, grad_out=grad_out)
    names = list(full.grads)
    for count in range(len(names)):
        for needs in itertools.combinations(names, count):
            got = run(function, tensors, kwargs, backend, needs, grad_out)
            _check_equal(got, Run(full.out, {n: full.grads[n] for n in needs}), f"gradients of {needs} alone")


def check_opcheck(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """``torch.library.opcheck`` of the registered forward and backward on the case's own arguments."""
    calls = record(function, case, backend, torch.float32, device)
    if backend == "reference":
        assert not calls, f"the reference is differentiated by autograd, yet {calls} ran"
        return
    assert len(calls) == 2, f"one forward and one backward expected, got {[str(op) for op, _ in calls]}"
    for overload, args in calls:
        torch.library.opcheck(overload, args)


@contextlib.contextmanager
def _compiled(function: Callable[..., Any], kwargs: dict[str, Any], compiler: str) -> Iterator[Callable[..., Any]]:
    """``function`` with ``kwargs``, compiled in one graph; tensors and ``backend`` are left to give."""

    def call(backend: str | None = None, **given: Tensor) -> Any:
        return function(**given, **kwargs, backend=backend)

    torch._dynamo.reset()
    try:
        yield torch.compile(call, backend=compiler, fullgraph=True, dynamic=False)
    finally:
        torch._dynamo.reset()


def check_compile(
    function: Callable[..., Any], case: Case, backend: str, device: str = "cpu", compiler: str = "aot_eager"
) -> None:
    """``torch.compile`` takes it in one graph, forward and backward, with the eager result."""
    tensors, kwargs, grad_out = _prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    eager = run(function, tensors, kwargs, backend, grad_out=grad_out)
    with _compiled(function, kwargs, compiler) as compiled, watch(op_of(function)) as ran:
        got = run(compiled, tensors, {}, backend, grad_out=grad_out)
    assert ran == _expected(backend, "forward", "backward"), f"{ran=} when {backend} is asked for by name"
    assert got.named().keys() == eager.named().keys(), f"{got.grads.keys()=}, {eager.grads.keys()=}"
    for name, expected in eager.named().items():
        assert_close(got.named()[name], expected, f"{case.family}_grad", torch.float32, f"compiled {name}")


def check_compiled_use(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """Compiled code heeds ``accel.use`` as it stands at each call."""
    tensors, kwargs, _ = _prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    with _compiled(function, kwargs, "eager") as compiled, watch(op_of(function)) as ran:
        for asked in (backend, "reference", backend):
            ran.clear()
            with dispatch.use(backend=asked):
                run(compiled, tensors, {}, None, needs=())
            assert ran == _expected(asked, "forward"), f"{ran=} under use(backend={asked!r})"


def check_empty(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """A batch of none gives an empty output and zero gradients."""
    tensors, kwargs, _ = _prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    full = run(function, tensors, kwargs, backend, needs=())
    none = {n: t[:0] if n in case.batched else t for n, t in tensors.items()}
    assert any(t.numel() == 0 for t in none.values()), f"case {case} names no batched tensor"
    got = run(function, none, kwargs, backend)
    assert got.out.shape == (0, *full.out.shape[1:]), f"{tuple(got.out.shape)=}, {tuple(full.out.shape)=}"
    for name, grad in got.grads.items():
        if grad is not None:
            assert_same(grad, torch.zeros_like(none[name]), f"gradient of {name} of an empty batch")


def _strided(x: Tensor) -> Tensor:
    """The values of ``x`` at every second element of NaN-filled memory, the first at an odd offset."""
    if x.dim() == 0:
        return x
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype, device=x.device)
    view = wide[..., 1::2]
    view.copy_(x)
    return view


def _turned(x: Tensor) -> Tensor:
    """The values of ``x`` with the order of the axes in memory reversed."""
    turned = list(range(x.dim()))[::-1]
    return x.permute(turned).contiguous().permute(turned)


def check_strides(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """Values count, not their layout: inputs and upstream gradient in any strides give the same bits."""
    tensors, kwargs, grad_out = _prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    plain = run(function, tensors, kwargs, backend, grad_out=grad_out)
    for layout in (_strided, _turned):
        moved = {n: layout(t) if t.is_floating_point() else t for n, t in tensors.items()}
        got = run(function, moved, kwargs, backend, grad_out=layout(grad_out))
        _check_equal(got, plain, f"non-contiguous by {layout.__name__}")
    ones = torch.ones((), device=device).expand(grad_out.shape)  # what out.sum().backward() sends
    got = run(function, tensors, kwargs, backend, grad_out=ones)
    _check_equal(got, run(function, tensors, kwargs, backend, grad_out=ones.contiguous()), "expanded gradient")


def check_poison(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """Every element of outputs and of scratch memory is written before it is read."""
    for dtype in case.dtypes:
        tensors, kwargs, grad_out = _prepared(function, case, dtype, device)
        require(function, backend, tensors, kwargs)
        plain = run(function, tensors, kwargs, backend, grad_out=grad_out)
        with poisoned():
            assert torch.empty(3, device=device).isnan().all(), "torch does not fill fresh memory"
            _check_equal(run(function, tensors, kwargs, backend, grad_out=grad_out), plain, f"poisoned memory, {dtype}")


def check_repeat(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """The same bits every time, whatever the number of threads, and from a graph that is walked twice."""
    for dtype in case.dtypes:
        tensors, kwargs, grad_out = _prepared(function, case, dtype, device)
        require(function, backend, tensors, kwargs)
        with threads(1):
            first = run(function, tensors, kwargs, backend, grad_out=grad_out)
            _check_equal(run(function, tensors, kwargs, backend, grad_out=grad_out), first, f"repeat, {dtype}")
        for count in (2, 3):
            # torch's own matrix products, which the reference is made of, promise no such thing
            if backend != "reference":
                with threads(count):
                    again = run(function, tensors, kwargs, backend, grad_out=grad_out)
                _check_equal(again, first, f"{count} threads, {dtype}")
    given = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    torch.manual_seed(SEED)
    out = function(**given, **kwargs, backend=backend)
    leaves = [t for t in given.values() if t.requires_grad]
    once = torch.autograd.grad(out, leaves, grad_out, retain_graph=True, materialize_grads=True)
    twice = torch.autograd.grad(out, leaves, grad_out, materialize_grads=True)
    for name, a, b in zip(given, once, twice, strict=False):
        assert_same(b, a, f"second walk of the graph: {name}")


def check_batch(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """A kernel's result for one element of the batch does not depend on what else is in it."""
    tensors, kwargs, grad_out = _prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    if backend == "reference":
        raise unittest.SkipTest("torch's matrix products choose their path by the batch")
    kwargs = {n: 0.0 if n == "dropout_p" else v for n, v in kwargs.items()}  # its bits are drawn by the position
    needs = [n for n in case.batched if tensors[n].is_floating_point()]
    whole = run(function, tensors, kwargs, backend, needs, grad_out)
    for i in range(len(whole.out)):
        one = {n: t[i : i + 1] if n in case.batched else t for n, t in tensors.items()}
        got = run(function, one, kwargs, backend, needs, grad_out[i : i + 1])
        for name, value in whole.named().items():
            assert_same(got.named()[name], value[i : i + 1], f"element {i} of the batch alone: {name}")


def check_second_derivative(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """A second derivative is refused in words by a kernel, also where the loss is linear in the output."""
    tensors, kwargs, grad_out = _prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    if backend == "reference":
        raise unittest.SkipTest("gradcheck covers the reference's second derivatives")
    for upstream in (grad_out, grad_out.clone().requires_grad_()):
        given = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
        out = function(**given, **kwargs, backend=backend)
        main = next(iter(given.values()))
        (grad,) = torch.autograd.grad(out, main, upstream, create_graph=True)
        error = _error(grad.square().sum().backward)
        assert isinstance(error, NotImplementedError), f"{backend} on a second derivative: {error!r}"
        assert re.search(f"{op_of(function).name}.*reference", str(error)), str(error)


def check_transforms(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """``torch.func.grad`` is right; ``vmap`` is right, or a kernel refuses it in words."""
    tensors, kwargs, grad_out = _prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    main, *_ = tensors
    rest = {n: t for n, t in tensors.items() if n != main}

    def call(x: Tensor) -> Any:
        torch.manual_seed(SEED)
        return function(**{main: x}, **rest, **kwargs, backend=backend)

    grad = torch.func.grad(lambda x: (call(x) * grad_out).sum())(tensors[main])
    want = run(function, tensors, kwargs, backend, [main], grad_out).grads[main]
    assert want is not None
    assert_same(grad, want, "torch.func.grad")
    stacked = torch.stack([tensors[main], tensors[main].flip(0)])
    mapped: list[Tensor] = []
    error = _error(lambda: mapped.extend(torch.func.vmap(call, randomness="same")(stacked)))
    if error is None:  # torch may do one element after the other
        for i in range(2):
            assert_close(mapped[i], call(stacked[i]), case.family, torch.float32, f"vmap element {i}")
    else:
        assert backend != "reference", f"vmap on the reference: {error!r}"
        assert isinstance(error, RuntimeError), f"vmap on {backend}: {error!r}"
        assert "vmap" in str(error), f"vmap is refused without saying so: {error}"


def check_checkpoint(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """Activation checkpointing, which runs the forward again, gives the same bits; dropout included."""
    tensors, kwargs, grad_out = _prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    plain = run(function, tensors, kwargs, backend, grad_out=grad_out)

    def positional(*values: Tensor) -> Any:
        return function(**dict(zip(tensors, values, strict=True)), **kwargs, backend=backend)

    def checkpointed(reentrant: bool, backend: str | None = None, **given: Tensor) -> Any:
        return checkpoint(positional, *given.values(), use_reentrant=reentrant)

    for reentrant in (False, True):
        call: Any = functools.partial(checkpointed, reentrant)
        if reentrant:  # torch.autograd.grad is not offered there
            given = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
            torch.manual_seed(SEED)
            out = call(**given)
            out.backward(grad_out)
            got = Run(out.detach(), {n: given[n].grad for n in plain.grads})
        else:
            got = run(call, tensors, {}, backend, grad_out=grad_out)
        _check_equal(got, plain, f"checkpoint, {reentrant=}")


def check_autocast(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """Under autocast the main tensors are cast, small parameters are not, and gradients have their tensors' dtypes."""
    tensors, kwargs, grad_out = _prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    main, *_ = tensors

    def cast_inside(dtype: torch.dtype, **given: Any) -> Any:  # as advised, only the forward runs under autocast
        with torch.autocast(device, dtype):
            return function(**given)

    for dtype in HALVES:
        call = functools.partial(cast_inside, dtype)
        got = run(call, tensors, kwargs, backend, grad_out=grad_out.to(dtype))
        cast = {n: t.to(dtype) if n in (case.autocast or (main,)) else t for n, t in tensors.items()}
        want = run(function, cast, kwargs, backend, grad_out=grad_out.to(dtype))
        assert got.out.dtype == dtype, f"{got.out.dtype=} under autocast to {dtype}"
        assert_same(got.out, want.out, f"autocast to {dtype}")
        for name, grad in got.grads.items():
            expected = want.grads[name]
            assert (grad is None) == (expected is None), f"autocast to {dtype}: gradient of {name}"
            if grad is not None and expected is not None:
                assert grad.dtype == tensors[name].dtype, f"gradient of {name} is {grad.dtype} under autocast"
                assert_same(grad, expected.to(grad.dtype), f"autocast to {dtype}: gradient of {name}")


def check_inplace(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """Overwriting an input between forward and backward is an error, not a wrong gradient."""
    tensors, kwargs, grad_out = _prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    given = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    out = function(**given, **kwargs, backend=backend)
    with torch.no_grad():
        next(iter(given.values())).mul_(2.0)
    error = _error(lambda: out.backward(grad_out))
    if error is None:
        assert backend == "reference", f"{backend} differentiated at values that are gone"
    else:
        assert "modified by an inplace operation" in str(error), repr(error)


def check_guard_pages(function: Callable[..., Any], cases: Iterable[Case], backend: str) -> None:
    """No read or write past either end of any tensor: each case's registered ops, in one of its dtypes in turn, run
    again in a process of their own on tensors that touch an unreadable page, first at their end, then at their start.
    """
    calls = [
        (f"{case} {dtype} {overload.name()}", overload.name(), args)
        for i, case in enumerate(cases)
        for dtype in [case.dtypes[i % len(case.dtypes)]]
        for overload, args in record(function, case, backend, dtype)
    ]
    assert calls, f"no registered op of {backend} was called"
    loaded = [module for module, (_, reason) in dispatch._leaves.items() if reason is None]
    guard.replay(calls, ("accel", *loaded))


BEHAVIOUR: tuple[Callable[..., None], ...] = (
    check_subsets,
    check_opcheck,
    check_compile,
    check_compiled_use,
    check_empty,
    check_strides,
    check_poison,
    check_repeat,
    check_batch,
    check_second_derivative,
    check_transforms,
    check_checkpoint,
    check_autocast,
    check_inplace,
)


def check_op(
    function: Callable[..., Any],
    values: Iterable[Case],
    behaviour: Iterable[Case],
    gradients: Iterable[Case],
    backends: Iterable[str],
    device: str = "cpu",
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check of the op, as ``(name, check)``, ready to be a parametrized test.

    ``values`` are the cases whose numbers are compared, one check for each backend and dtype. ``behaviour`` are
    small cases with a batch of at least two; between them they have every differentiable tensor. What is not about
    numbers runs on them. ``gradients`` are a few tiny cases for finite differences on the reference.
    """
    values, behaviour, backends = tuple(values), tuple(behaviour), tuple(backends)

    def bind(check: Callable[..., None], *args: Any) -> Callable[[], None]:
        def bound() -> None:
            with threads(1):  # torch's own small products take ten times as long on more threads than free cores
                check(function, *args)

        return bound

    for case in gradients:
        yield f"reference-gradcheck-{case}", bind(check_gradcheck, case, device)
    for case in values:
        for dtype, backend in itertools.product(case.dtypes, backends):
            name = f"{backend}-{str(dtype).removeprefix('torch.')}-{case}"
            yield name, bind(check_values, case, backend, dtype, device)
    for backend in backends:
        for check, case in itertools.product(BEHAVIOUR, behaviour):
            yield f"{backend}-{check.__name__.removeprefix('check_')}-{case}", bind(check, case, backend, device)
        if device == "cpu" and backend != "reference":
            yield f"{backend}-guard_pages", bind(check_guard_pages, (*values, *behaviour), backend)
