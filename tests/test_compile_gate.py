"""Every Triton kernel compiles offline for every GPU generation it admits, without spills."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from accel.testing import compile_gate

ROOT = Path(__file__).resolve().parents[1]
CHOSEN_WITH = "3.7."
"""The Triton that tiles were chosen with; another shares out registers in its own way."""
OTHER_LIMIT = 128
"""Bytes of stack that a kernel may take with another."""


def gate(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the gate in a process of its own: this one may have Triton's interpreter on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "accel.testing.compile_gate", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000)


def compiled(report: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of a run of the gate that found nothing wrong."""
    other = not pytest.importorskip("triton").__version__.startswith(CHOSEN_WITH)
    # where tests themselves run in several processes each compiles in one
    jobs = ("--jobs", "1") if "PYTEST_XDIST_WORKER" in os.environ else ()
    done = gate(*arguments, *jobs, "--json", str(report))
    assert done.returncode == 0 or (other and report.exists()), done.stderr or done.stdout
    rows: list[dict[str, Any]] = json.loads(report.read_text())
    for row in rows:
        assert row["registers"] > 0, row
        assert row["stack"] <= (max(row["stack_limit"], OTHER_LIMIT) if other else row["stack_limit"]), row
        assert row["stack_limit"] == compile_gate.STACK_LIMIT or row["architecture"] == 90, "only Hopper was measured"
        assert row["shared"] <= compile_gate.SHARED_LIMIT[row["architecture"]], row
    return rows


@pytest.mark.parametrize("op", compile_gate.leaves())
def test_kernels_compile_without_spills(op: str, tmp_path: Path) -> None:
    rows = compiled(tmp_path / "gate.json", op)
    kernels = {
        generation: {row["name"].split()[0] for row in rows if row["architecture"] == generation}
        for generation in (80, 90, 100)
    }
    assert kernels[80] == kernels[90] == kernels[100]
    counts = collections.Counter(row["architecture"] for row in rows)
    assert len(kernels[100]) <= counts[100] <= 2 * len(kernels[100]), "the heaviest cases of each kernel"


@pytest.mark.slow
def test_all_cases_compile_for_all_generations(tmp_path: Path) -> None:
    rows = compiled(tmp_path / "gate.json", "--all")
    counts = collections.Counter(row["architecture"] for row in rows)
    assert counts[80] == counts[90] == counts[100]


ANEW = """
from typing import Any, NamedTuple

import torch
import triton
from accel.kernels._launch import launch


class Pair(NamedTuple):
    x: Any
    y: Any


@triton.jit(do_not_specialize=["n"])
def kernel(grouped, n, m):
    pass


x = torch.empty(4, device="meta")
for grouped, m in (((x, 1.0), 0.5), ((x, 16), 0.5), ((x, 1.0), 16)):
    try:
        case = launch(kernel, 1, 4, grouped=Pair(*grouped), n=16, m=m).case("")
        print(case.signature, case.constexprs, case.attributes)
    except TypeError as error:
        print(error)
"""


def test_integers_that_would_be_specialised_are_refused(tmp_path: Path) -> None:
    """Triton specialises integers inside tuples, and those that a kernel does not list, on their values."""
    pytest.importorskip("triton")
    script = tmp_path / "anew.py"
    script.write_text(ANEW)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    taken, in_tuple, flat = done.stdout.splitlines()
    assert taken == (
        "{'grouped': Pair(x='*fp32', y='fp32'), 'n': 'i32', 'm': 'fp32'} {} {(0, 0): [['tt.divisibility', 16]]}"
    )
    assert in_tuple == "kernel would be compiled anew for each value of grouped"
    assert flat == "kernel would be compiled anew for each value of m"


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


KEPT = """
import json

from accel.testing import compile_gate

op = "ps_roi_pool"
cases = compile_gate._loaded[op] = compile_gate.cases(op)
jobs = [(op, position, 90) for position in range(len(cases))]
compile_gate._known = lambda: {key: compile_gate.Result("kept", 90, 9, 0, 0, 0.0) for key in keys}


def names():
    stub = compile_gate.Result("compiled", 90, 0, 0, 0, 0.0, "not kept")
    return sorted({result.name for _, result in compile_gate._results(jobs, lambda todo: [stub] * len(todo))})


keys = [compile_gate._key(compile_gate._sources(op), case, 90) for case in cases]
before = names()
compile_gate._sources = lambda op: b"a shelf that has changed"
print(json.dumps([before, names()]))
"""


def test_a_result_is_kept_for_the_code_it_came_from(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", KEPT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["kept"], ["compiled"]]
