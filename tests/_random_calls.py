"""Calls of random sizes for the deformable ops. Their values are small integers at positions whose products and sums
are exact, so that results are equal, and a wrong index cannot hide below a tolerance."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from accel import dispatch, testing
from accel.testing import Case, assert_same
from accel.testing.running import prepared

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def calls(count: int) -> Any:
    """Settings: as many calls, the same ones every time."""
    quiet = list(hypothesis.HealthCheck)
    return hypothesis.settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=quiet
    )


def cpu_calls(cases: Any, count: int = 250) -> Any:
    """A test of a case, a dtype and a number of threads gets so many calls."""
    drawn = hypothesis.given(cases, st.sampled_from(DTYPES), st.sampled_from([1, 2, 5]))
    return lambda test: calls(count)(drawn(test))


def cuda_calls(*cases: Any) -> Any:
    """A test gets 80 calls, each run thread by thread."""
    return lambda test: calls(80)(hypothesis.given(*cases)(test))


def exactly(got: Tensor, expected: Tensor, what: str) -> None:
    """``expected``, an exact result in float64, rounded once."""
    assert_same(got, expected.to(got.dtype), what)


def window(draw: Any) -> tuple[tuple[int, int], tuple[int, int], dict[str, tuple[int, int]]]:
    """The size of a map, a kernel that fits on it, and stride, padding and dilation."""

    def pairs(least: int, largest: int) -> Any:
        return draw(st.tuples(st.integers(least, largest), st.integers(least, largest)))

    kernel, stride, padding, dilation = pairs(1, 5), pairs(1, 3), pairs(0, 4), pairs(1, 3)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = draw(st.tuples(st.integers(least[0], 14), st.integers(least[1], 21)))
    return size, kernel, {"stride": stride, "padding": padding, "dilation": dilation}


def check_on_cpu(function: Any, of: Case, dtype: torch.dtype, threads: int) -> None:
    """The output in any dtype; gradients in float32, as half precision rounds what they are made of."""
    if (reason := dispatch.leaf_reason("accel._C")) is not None:
        pytest.skip(reason)
    tensors, kwargs, grad_out = prepared(function, of, dtype, "cpu")
    wanted = None if dtype == torch.float32 else []
    run = functools.partial(testing.run, function, kwargs=kwargs, needs=wanted)
    want = run(testing.double(tensors), backend="reference", grad_out=grad_out.double())
    with testing.threads(threads):
        got = run(tensors, backend="cpu", grad_out=grad_out)
    for part, expected in want.named().items():
        exactly(got.named()[part], expected, part)
