"""Build .cu files for the CPU with the shim of csrc/testing, run their launch functions, compile them with nvcc.

A launch function is ``extern "C" int name(const Params*, void* stream)`` with a plain struct. Each run is a process of
its own, so that a crash or a sanitizer's report is a result like any other.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SHIM = ROOT / "csrc" / "testing"
BUILD = ROOT / "build" / "cuda_host"
ARCHITECTURES = {80: "80", 90: "90a", 100: "100"}  # and what nvcc is told

FLAGS = "-std=c++20 -O1 -g1 -Wall -Wextra -Werror -Wno-unknown-pragmas -fno-strict-aliasing -ffp-contract=off"
MODES = {
    "plain": "",
    "asan": "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer",
    "tsan": "-fsanitize=thread",
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=0",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0",
}
LATE, EARLY, MIXED = 0, 1, 2  # when asynchronous copies land


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if found is None:
        pytest.skip("no g++ to compile .cu files for the host")
    return found


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _shared_sources() -> bytes:
    """What every build depends on: the headers of csrc, the shim, this file."""
    files = [*ROOT.glob("csrc/*.cuh"), *ROOT.glob("csrc/cuda/**/*.cuh"), *ROOT.glob("csrc/cuda/**/*.h")]
    files += [*SHIM.glob("*"), *SHIM.glob("planted/*.h"), Path(__file__)]
    return b"".join(path.read_bytes() for path in sorted(files) if path.is_file())


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=900)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def _kept(variant: str, key: str, make: Callable[[Path, Path], None], end: str = "") -> Path:
    """What ``make(scratch folder, file)`` wrote, made once for every key; of a variant the last is kept.

    Tests run in several processes: whoever comes second waits for the first.
    """
    target = BUILD / f"{variant}-{key}{end}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{variant}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
            made = Path(scratch) / "made"
            make(Path(scratch), made)
            made.replace(target)
        for old in BUILD.glob(f"{variant}-{'[0-9a-f]' * 20}{end}"):
            if old != target:
                old.unlink(missing_ok=True)
    return target


def _compile(source: Path, folder: Path, flags: Sequence[str]) -> Path:
    """The object of a source of kernels or of what surrounds them, for the CPU."""
    made = folder / f"{source.name}.o"
    command = [compiler(), *FLAGS.split(), *flags, "-DACCEL_HOST_CUDA", f"-I{ROOT / 'csrc'}"]
    _run([*command, "-x", "c++", "-c", source, "-o", made])
    return made


def build(sources: Sequence[Path], mode: str, defines: Sequence[str] = ()) -> Path:
    """An executable with the launch functions of ``sources``; kept by the hash of what it is made from."""
    data = [path.read_bytes() for path in sources]
    key = _digest(_shared_sources(), *data, mode.encode(), compiler().encode(), repr(defines).encode())
    variant = "-".join([sources[0].stem, mode, *(d.strip("-D").replace("=", "") for d in defines)])
    sanitize = MODES[mode].split()
    # The scheduler and the driver are told of the sanitizer, but not instrumented by it.
    told = [] if mode == "plain" else [f"-DACCEL_{mode.upper()}"]

    def make(folder: Path, made: Path) -> None:
        objects = []
        for source in (*sources, SHIM / "runtime.cpp", SHIM / "replay.cpp"):
            flags = sanitize if source.suffix == ".cu" else told
            objects.append(_compile(source, folder, [*flags, *defines]))
        _run([compiler(), *sanitize, "-rdynamic", *objects, "-ldl", "-o", made])

    return _kept(variant, key, make)


def binding(source: Path, sources: Sequence[Path], defines: Sequence[str] = ()) -> Path:
    """A library with the CUDA binding of an op, ``source``, over its kernels on the CPU, for ``call_ops``."""
    from torch.utils.cpp_extension import include_paths

    kernels = [*sources, ROOT / "csrc" / "cuda" / "_layout.cu", SHIM / "runtime.cpp", SHIM / "device.cpp"]
    data = [path.read_bytes() for path in (source, *kernels)]
    key = _digest(_shared_sources(), *data, compiler().encode(), torch.__version__.encode(), repr(defines).encode())
    target_version = re.search(r'TORCH_TARGET = "(\w+)"', (ROOT / "setup.py").read_text())
    assert target_version is not None
    of_torch = [f"-DTORCH_TARGET_VERSION={target_version[1]}", "-DTORCH_STABLE_ONLY"]
    of_torch += [word for path in include_paths() for word in ("-isystem", path)]
    libraries = Path(torch.__file__).parent / "lib"

    def make(folder: Path, made: Path) -> None:
        flags = ["-fPIC", *defines]
        objects = [_compile(source, folder, [*flags, *of_torch]), *(_compile(x, folder, flags) for x in kernels)]
        _run([compiler(), "-shared", *objects, f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-o", made])

    return _kept(f"binding-{source.stem}", key, make, ".so")


_CALL = """
import sys, torch
library, call, result = sys.argv[1:]
calls = torch.load(call)
native = torch.library.Library("accel_native", "DEF")
for schema in {schema for schema, _ in calls}:
    native.define(schema.removeprefix("accel_native::"))
torch.ops.load_library(library)
names = [schema.split("(")[0].removeprefix("accel_native::") for schema, _ in calls]
torch.save([getattr(torch.ops.accel_native, name)(*args) for name, (_, args) in zip(names, calls)], result)
"""


def call_ops(library: Path, calls: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Any]:
    """Results of calls of native ops, each a schema and its arguments, by ``library`` in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        call, result = Path(scratch) / "call", Path(scratch) / "result"
        torch.save(list(calls), call)
        _run([sys.executable, "-c", _CALL, library, call, result])
        done: list[Any] = torch.load(result)
        return done


@dataclass
class Ran:
    """How a run ended. ``report`` is what it said, empty if it was well."""

    code: int
    report: str
    buffers: dict[str, Tensor] = field(default_factory=dict)


def _bytes(x: Tensor) -> bytes:
    assert x.is_contiguous()
    return ctypes.string_at(x.data_ptr(), x.numel() * x.element_size())


def run(
    program: Path,
    function: str,
    params: ctypes.Structure,
    tensors: dict[str, Tensor],
    *,
    seed: int = 0,
    landing: int = LATE,
    shift: dict[str, int] | None = None,
    timeout: float = 300,
) -> Ran:
    """Call ``function`` with ``params``, whose pointer fields named in ``tensors`` point to copies of these.

    ``seed`` 0 runs warps and lanes in ascending order. ``shift`` gives bytes by which a tensor misses a multiple of 64.
    """
    lines = [f"function {function}", f"params {ctypes.sizeof(params)}"]
    for i, (name, x) in enumerate(tensors.items()):
        lines.append(f"buffer {x.numel() * x.element_size()} {(shift or {}).get(name, 0)}")
        lines.append(f"pointer {getattr(type(params), name).offset} {i}")
    with tempfile.TemporaryDirectory() as scratch:
        call, result = Path(scratch) / "call", Path(scratch) / "result"
        call.write_bytes(
            "\n".join([*lines, "end\n"]).encode() + bytes(params) + b"".join(map(_bytes, tensors.values()))
        )
        command = [str(program), str(call), str(result), str(seed), str(landing)]
        done = _execute(command, timeout)
        if done.returncode:
            return Ran(done.returncode, (done.stderr or done.stdout)[-8000:] or f"exit code {done.returncode}")
        out, at = {}, 0
        data = result.read_bytes()
        for name, x in tensors.items():
            size = x.numel() * x.element_size()
            out[name] = torch.empty_like(x)
            ctypes.memmove(out[name].data_ptr(), data[at : at + size], size)
            at += size
    return Ran(0, done.stderr, out)


def _execute(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    def once(prefix: Sequence[str]) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **OPTIONS}
        return subprocess.run(
            [*prefix, *command], capture_output=True, text=True, errors="replace", env=environment, timeout=timeout
        )

    done = once(())
    if "unexpected memory mapping" in done.stderr:  # the kernel randomizes addresses more than ThreadSanitizer knows
        if shutil.which("setarch") is None:
            pytest.skip("ThreadSanitizer cannot run with this kernel's address randomization, and setarch is missing")
        done = once(("setarch", "-R"))
    return done


# --- what the tests of several ops share ---

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by the number that the launch functions take
TILE = {"plain": 8192, "asan": 64, "tsan": 64}  # samples that a block sorts: short where many are slow


def program(source: Path, mode: str) -> Path:
    """``source`` with csrc/cuda/_sort.cuh in the tiles of this mode."""
    return build([source], mode, (f"-DACCEL_SORT_TILE={TILE[mode]}",))


def scratch(images: int, groups: int, samples: int, pixels: int, mode: str) -> Tensor:
    """As much as transpose_scratch in csrc/cuda/deformable/transpose.cuh asks for, filled with what must not matter."""

    def up(size: int) -> int:
        return -(-size // 256) * 256

    tile = TILE[mode]
    tiles = 0 if samples <= 2 * tile else -(-samples // tile)
    every = groups * samples
    each = 2 * up(4 * every) + up(16 * every) + up(4 * groups * (pixels + 1)) + up(groups * tiles * 1024)
    return torch.full((images * each,), 0xEE, dtype=torch.uint8)


# --- nvcc ---


@dataclass(frozen=True)
class Usage:
    """What ptxas says of a kernel on one architecture."""

    kernel: str
    architecture: int
    registers: int
    spilled: int  # bytes
    shared: int


def nvcc(source: Path, flags: Sequence[str] = ()) -> list[Usage]:
    """Compile for every architecture, warnings as errors, and read the resource usage of every kernel."""
    name = shutil.which("nvcc")
    if name is None:
        pytest.skip("nvcc is not installed")
    key = _digest(_shared_sources(), source.read_bytes(), repr(flags).encode(), _run([name, "--version"]).encode())
    command = [name, "-std=c++20", "-O3", "-c", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]
    command += ["-Xptxas", "-v", "--threads", "2", f"-I{ROOT / 'csrc'}", *flags]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES.values()]

    def make(folder: Path, made: Path) -> None:
        made.write_text(_run([*command, source, "-o", folder / "object.o"]))

    return usage(_kept(f"nvcc-{source.stem}", key, make, ".txt").read_text())


def usage(text: str) -> list[Usage]:
    """Read what ``ptxas -v`` prints: a function's name, its stack and spills, then registers and shared memory."""
    found = []
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    for kernel, architecture, stores, loads, registers, rest in re.findall(pattern, text, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        size = int(shared[1]) if shared else 0
        found.append(Usage(kernel, int(architecture), int(registers), int(stores) + int(loads), size))
    assert len(found) == text.count("Compiling entry function"), text
    return found
