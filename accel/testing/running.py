"""A case of an op as data, running it on a backend, and watching what ran."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import unittest
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from accel import dispatch
from accel.testing.tolerance import KERNEL_DTYPES


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


def prepared(
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


def expected_calls(backend: str, *kinds: str) -> list[tuple[str, str]]:
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
    tensors, kwargs, grad_out = prepared(function, case, dtype, device)
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
