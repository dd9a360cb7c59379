"""The ops' rows of ``python -m accel bench`` as pytest-benchmark tests: ``pytest benchmarks --benchmark-only``.

Each is proven against the reference first, then timed alone; for ratios use the bench command, which interleaves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accel.benchmarks import _choice, harness

pytest.importorskip("pytest_benchmark")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY = [case for op in _choice.OPS.values() for case in op.cases(DEVICE, [torch.float32, torch.bfloat16])]
CASES = [
    pytest.param(case, provider, mode, id=f"{case.op} {case.label} {mode} {provider.name}")
    for _, case in _choice.short(EVERY, DEVICE)
    for provider in case.providers
    for mode in case.costs
]


@pytest.mark.parametrize(("case", "provider", "mode"), CASES)
def test_row(benchmark: Any, case: harness.Case, provider: harness.Provider, mode: str) -> None:
    try:
        case_of_one = harness.Alone(case, provider, mode, DEVICE, seed=0)
    except harness.UnavailableError as error:
        pytest.skip(str(error))
    assert not case_of_one.reason, case_of_one.reason
    contender = case_of_one.contender
    benchmark.group = f"{case.op} {case.label} {mode}"
    benchmark.extra_info["error"] = case_of_one.error
    benchmark.extra_info["backend"] = case_of_one.backend

    def setup() -> None:
        if contender.prepare is not None:
            contender.prepare()

    def call() -> None:
        contender.call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, setup=setup, rounds=10, warmup_rounds=1)
