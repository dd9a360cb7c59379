"""Every Triton kernel compiles offline for every GPU generation it admits, without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from accel.testing import compile_gate

ROOT = Path(__file__).resolve().parents[1]


def gate(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the gate in a process of its own: this one may have Triton's interpreter on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "accel.testing.compile_gate", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)


@pytest.mark.parametrize("op", compile_gate.leaves())
def test_kernels_compile_without_spills(op: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    report = tmp_path / "gate.json"
    done = gate(op, "--json", str(report))
    assert done.returncode == 0, done.stderr or done.stdout
    rows = json.loads(report.read_text())
    assert {row["architecture"] for row in rows} == {80, 90, 100}
    for row in rows:
        assert row["registers"] > 0, row
        assert row["stack"] <= row["stack_limit"], row
        assert row["stack_limit"] == compile_gate.STACK_LIMIT or row["architecture"] == 90, "only Hopper was measured"
        assert row["shared"] <= compile_gate.SHARED_LIMIT[row["architecture"]], row


def test_there_is_something_to_compile() -> None:
    assert "window_attention" in compile_gate.leaves()


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ({}, None),
        ({"stack": 32}, None),
        ({"stack": 40}, "40 bytes of stack"),
        ({"shared": 99 << 10}, None),
        ({"shared": (99 << 10) + 1}, "shared memory"),
        ({"error": "ValueError: no"}, "ValueError: no"),
    ],
)
def test_problems_are_named(numbers: dict[str, object], problem: str | None) -> None:
    result = compile_gate.Result(**{"name": "k", "architecture": 80, "registers": 9, "stack": 0, "shared": 0,
                                    "seconds": 0.0, "error": "", **numbers})  # fmt: skip
    found = result.problem()
    assert found == problem if problem is None else problem in str(found)


def test_gate_refuses_what_is_not_there() -> None:
    done = gate("no_such_kernel")
    assert done.returncode == 2
    assert "no_such_kernel" in done.stderr
