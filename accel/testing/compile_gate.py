"""Compile every Triton kernel for every GPU generation it admits, without a GPU.

``python -m accel.testing.compile_gate``: each leaf, ``kernels/<family>/<op>.py``, yields its configurations from
``compile_cases()``. Each is compiled offline, and the gate fails with names where registers spill or shared memory is
more than the architecture has. A case is compiled for one generation, Hopper if it admits it. For the others only the
heaviest cases of each kernel are: the one that took the most stack and registers there, and the one that took the most
shared memory. ``--all`` compiles every case for all. Results are kept in a private cache folder by the hash of what
they depend on, so that an unchanged kernel costs nothing the next time.

It needs a process without ``TRITON_INTERPRET=1``, which replaces the compiler by the interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accel  # noqa: F401  registers the ops
from accel import dispatch

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
KEPT = Path(__file__).resolve().parents[2] / "tests" / "compile_gate.json"
FIRST = 90
"""The generation that a case is compiled for if it admits it."""
STACK_LIMIT = 32
# of a block; what compiles for sm_80 also runs on sm_86 and sm_89 (RTX 30 and 40), which have less than the A100
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Result:
    """What one case became on one architecture. ``stack`` is bytes a thread, ``shared`` bytes a program; the limit of
    ``stack`` is higher only for tiles that say so because they were measured."""

    name: str
    architecture: int
    registers: int
    stack: int
    shared: int
    seconds: float
    error: str = ""
    stack_limit: int = STACK_LIMIT

    def problem(self) -> str | None:
        if self.error:
            return self.error
        if self.stack > self.stack_limit:
            return f"{self.stack} bytes of stack, more than {self.stack_limit}: registers spill"
        limit = SHARED_LIMIT[self.architecture]
        if self.shared > limit:
            return f"{self.shared} bytes of shared memory, more than {limit}"
        return None


def leaves() -> dict[str, Path]:
    """The file of every op's Triton leaf, by the op's name."""
    modules = {name: dispatch.leaf_of(op.function.__module__) for name, op in sorted(dispatch.OPS.items())}
    paths = {name: KERNELS.joinpath(*module.split(".")[2:]).with_suffix(".py") for name, module in modules.items()}
    return {name: path for name, path in paths.items() if path.exists()}


def cases(op: str) -> list[Any]:
    """The compile cases of an op's leaf; each name must be there once."""
    found = list(importlib.import_module(f"accel.kernels.{leaves()[op].parent.name}.{op}").compile_cases())
    names = [case.name for case in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the Triton leaf of {op} names compile cases twice: {twice}")
    return found


def _folder() -> Path:
    """A cache folder that nobody else can write to: its contents are believed."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "accel" / "compile_gate"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    folder.chmod(0o700)
    return folder


def _sources(op: str) -> bytes:
    """What an op's results depend on besides the case: its shelf, what every leaf uses, this gate and Triton."""
    import triton

    files = [*sorted(leaves()[op].parent.glob("*.py")), *sorted(KERNELS.glob("*.py")), Path(__file__)]
    return triton.__version__.encode() + b"".join(path.read_bytes() for path in files)


def _key(sources: bytes, case: Any, architecture: int) -> str:
    # Triton's own hash of the device code: it knows the constants that come from elsewhere, an op's limits for instance
    code = (case.name, case.kernel.cache_key)
    data = (*code, case.signature, case.constexprs, case.attributes, case.options, case.spill, architecture)
    return hashlib.sha256(sources + repr(data).encode()).hexdigest()


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread of the one kernel in ``cubin``, from the cuobjdump that Triton brings."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    if len(found) != 1:
        raise RuntimeError(f"cuobjdump reported {len(found)} kernels where one was compiled:\n{text}")
    return int(found[0][0]), int(found[0][1])


def compile_case(case: Any, architecture: int) -> Result:
    """Compile one case for ``sm_<architecture>``; whatever the compiler throws is the result's error."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(case.kernel, case.signature, case.constexprs, case.attributes)
    start = time.perf_counter()
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=case.options)
        registers, stack = _resources(compiled.asm["cubin"])
        seconds = time.perf_counter() - start
        limit = max(STACK_LIMIT, case.spill)
        return Result(case.name, architecture, registers, stack, compiled.metadata.shared, seconds, stack_limit=limit)
    except Exception as error:
        seconds = time.perf_counter() - start
        return Result(case.name, architecture, 0, 0, 0, seconds, f"{type(error).__name__}: {error}")


def _known() -> dict[str, Result]:
    """What stands in the sources, by the hash of what it depends on; nothing in an installation without tests."""
    if not KEPT.exists():
        return {}
    return {key: Result(**row, seconds=0.0) for key, row in json.loads(KEPT.read_text()).items()}


def _keep(found: dict[str, Result]) -> None:
    """Write ``tests/compile_gate.json``, a line for each result."""
    rows = sorted(found.items(), key=lambda item: (item[1].name, item[1].architecture, item[0]))
    lines = []
    for key, result in rows:
        row = {name: value for name, value in asdict(result).items() if name not in ("seconds", "error")}
        lines.append(f"{json.dumps(key)}: {json.dumps(row)}")
    KEPT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


Job = tuple[str, int, int]
"""An op, the position of a case in its list, and the architecture."""

_loaded: dict[str, list[Any]] = {}
_found: dict[str, Result] = {}
"""The results of this process, by the hash of what they depend on."""


def _work(job: Job) -> Result:
    """In a worker: the case is found by position, because kernels do not travel between processes."""
    op, position, architecture = job
    if op not in _loaded:
        _loaded[op] = cases(op)
    return compile_case(_loaded[op][position], architecture)


def _results(jobs: list[Job], compile_all: Callable[[list[Job]], Iterable[Result]]) -> Iterator[tuple[Job, Result]]:
    """The result of each job, those that are kept first."""
    folder, known = _folder(), _known()
    todo: dict[Job, str] = {}
    sources = {op: _sources(op) for op in {op for op, _, _ in jobs}}
    for job in jobs:
        op, position, architecture = job
        key = _key(sources[op], _loaded[op][position], architecture)
        kept = folder / f"{key}.json"
        if key in known or kept.exists():
            _found[key] = known[key] if key in known else Result(**json.loads(kept.read_text()))
            yield job, _found[key]
        else:
            todo[job] = key
    for (job, key), result in zip(todo.items(), compile_all(list(todo)), strict=True):
        if not result.error:  # an error may be this machine's, a full disk for instance
            _found[key] = result
            part = folder / f"{key}.{os.getpid()}"
            part.write_text(json.dumps(asdict(result)))
            part.replace(folder / f"{key}.json")
        yield job, result


def _heaviest(found: dict[Job, Result], jobs: list[Job]) -> list[Job]:
    """Of each kernel's jobs for an architecture those whose cases took the most registers, and the most shared memory,
    where they were compiled."""
    took = {(op, position): result for (op, position, _), result in found.items()}
    alike: dict[tuple[str, str, int], list[Job]] = {}
    for job in jobs:
        op, position, architecture = job
        alike.setdefault((op, _loaded[op][position].kernel.__name__, architecture), []).append(job)
    best: dict[Job, None] = {}
    for of_kernel in alike.values():
        best[max(of_kernel, key=lambda job: (took[job[:2]].stack, took[job[:2]].registers))] = None
        best[max(of_kernel, key=lambda job: took[job[:2]].shared)] = None
    return list(best)


def run(ops: list[str], processes: int, only: str = "", everything: bool = False) -> Iterator[Result]:
    """Results of the cases of these ops whose name contains ``only``, as they become known.

    With ``everything`` all of them for every generation, else for one, and the heaviest of each kernel for the others.
    """
    first: list[Job] = []
    others: list[Job] = []
    for op in ops:
        _loaded[op] = cases(op)
        for position, case in enumerate(_loaded[op]):
            if only in case.name:
                once = FIRST if FIRST in case.architectures else case.architectures[0]
                for architecture in case.architectures:
                    (first if architecture == once else others).append((op, position, architecture))
    with contextlib.ExitStack() as stack:
        compile_all: Callable[[list[Job]], Iterable[Result]] = functools.partial(map, _work)
        if processes > 1:
            compile_all = functools.partial(stack.enter_context(ProcessPoolExecutor(processes)).map, _work)
        found: dict[Job, Result] = {}
        for job, result in _results(first, compile_all):
            found[job] = result
            yield result
        for _, result in _results(others if everything else _heaviest(found, others), compile_all):
            yield result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m accel.testing.compile_gate", description=__doc__)
    parser.add_argument("kernels", nargs="*", help="ops; all if none")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--all", action="store_true", help="every case for every generation")
    parser.add_argument("--keep", action="store_true", help=f"write what was found into {KEPT.name}; of all ops")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; all cores if none")
    chosen = parser.parse_args(argv)
    if chosen.keep and (chosen.kernels or chosen.only):
        parser.error("--keep writes the results of all ops: name none")
    unknown = sorted(set(chosen.kernels) - set(leaves()))
    if unknown:
        parser.error(f"no such kernel files: {unknown}; there are {list(leaves())}")
    from triton import knobs

    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, which replaces the compiler; unset it for this process")
    with tempfile.TemporaryDirectory() as scratch:  # not Triton's own cache, whose contents it does not check
        os.environ["TRITON_CACHE_DIR"] = scratch
        results = []
        for result in run(chosen.kernels or list(leaves()), chosen.jobs, chosen.only, chosen.all):
            results.append(result)
            verdict = result.problem() or "ok"
            print(
                f"sm_{result.architecture:<4} {result.registers:4} registers {result.stack:6} B stack "
                f"{result.shared:7} B shared {result.seconds:5.1f} s  {result.name}: {verdict}",
                flush=True,
            )
    if chosen.json:
        rows = [{**asdict(result), "problem": result.problem()} for result in results]
        chosen.json.write_text(json.dumps(rows, indent=1))
    failed = [result for result in results if result.problem()]
    if chosen.keep and not failed:
        _keep(_found)
    print(f"{len(results)} compiled, {len(failed)} failed")
    for result in failed:
        print(f"FAILED sm_{result.architecture} {result.name}: {result.problem()}", file=sys.stderr)
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
