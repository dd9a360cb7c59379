"""What an op computes: its values and derivatives, at every instruction set, and the work that it counts."""

from __future__ import annotations

import contextlib
import functools
import itertools
import unittest
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from accel import dispatch
from accel.testing.running import (
    SEED,
    Case,
    Run,
    double,
    expected_calls,
    op_of,
    prepared,
    require,
    run,
    watch,
)
from accel.testing.tolerance import KERNEL_DTYPES, assert_close

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")
"""Instruction sets that CPU kernels are built for, each with all that the ones before it have."""


@functools.lru_cache(maxsize=8)
def _oracle(
    function: Callable[..., Any], case: Case, dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor], dict[str, Any], Tensor, Run]:
    """What all backends are compared with: inputs, upstream gradient, and the reference on them in float64."""
    tensors, kwargs, grad_out = prepared(function, case, dtype, device)
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
    assert ran == expected_calls(backend, "forward", "backward"), f"{ran=}, asked for {backend}"
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


@contextlib.contextmanager
def at_level(level: str) -> Iterator[None]:
    """CPU kernels run with this instruction set; it skips where the library or the processor has not got it."""
    if (reason := dispatch.leaf_reason("accel._C")) is not None:
        raise unittest.SkipTest(reason)
    extension = dispatch.leaf("accel._C")[0]
    info = extension.build_info()
    if level not in info["isa_built"] or LEVELS.index(level) > LEVELS.index(info["isa_highest"]):
        raise unittest.SkipTest(f"built for {info['isa_built']}, and this processor has {info['isa_highest']}")
    extension.set_isa(level)
    try:
        assert extension.build_info()["isa"] == level
        yield
    finally:
        extension.set_isa(info["isa"])


def _check_level(function: Callable[..., Any], case: Case, level: str) -> None:
    tensors, kwargs = case.make(torch.float32, "cpu", 0)
    require(function, "cpu", tensors, kwargs)
    with at_level(level):
        for dtype in KERNEL_DTYPES:
            check_values(function, case, "cpu", dtype)


def check_levels(function: Callable[..., Any], cases: Iterable[Case]) -> Iterator[tuple[str, Callable[[], None]]]:
    """The values of each case by the CPU kernel for each instruction set, as ``(name, check)``."""
    for level, case in itertools.product(LEVELS, tuple(cases)):
        yield f"{case}-{level}", functools.partial(_check_level, function, case, level)


def check_flops(
    function: Callable[..., Any], case: Case, backends: Iterable[str], expected: int, backward: bool = False
) -> None:
    """torch's counter finds ``expected`` operations in a forward, or with the backward of every tensor, whichever of
    ``backends`` runs."""
    tensors, kwargs = case.make(torch.float32, "cpu", 0)
    op = op_of(function)
    counts = {}
    for backend in backends:
        if op.backend(backend).why_not(op.prepare(**tensors, **kwargs)) is None:
            with FlopCounterMode(display=False) as counter:
                run(function, tensors, kwargs, backend, needs=None if backward else ())
            counts[backend] = counter.get_total_flops()
    assert counts == dict.fromkeys(counts, expected)
