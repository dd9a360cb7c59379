"""The machine under the benchmark: allocator, peak memory, load from others, pace, and what to record."""

from __future__ import annotations

import ctypes
import datetime
import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from accel import dispatch

MIB = 1 << 20
LEVEL = "level of our CPU kernels"  # among the facts of a run
ROOT = Path(__file__).resolve().parent.parent

# --- allocator ---

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_LARGEST_MMAP_THRESHOLD = 32 * MIB  # glibc refuses more


def _libc() -> Any | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def pin_allocator() -> str:
    """Keep freed memory in the process, for all providers alike, and say what was set.

    Left alone, glibc gives every large tensor fresh pages and takes them back, and the page faults (up to 0.4 ms a
    megabyte) would be most of what is measured; a run's first provider would also move the threshold for the others.
    """
    libc = _libc()
    if libc is None:
        return f"{platform.libc_ver()[0] or sys.platform}: as it is (mallopt is glibc's)"
    settings = {
        "M_MMAP_THRESHOLD": (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
        "M_MMAP_MAX": (_M_MMAP_MAX, 0),
        "M_TRIM_THRESHOLD": (_M_TRIM_THRESHOLD, 2**31 - 1),
    }
    done = [f"{name}={value}" for name, (key, value) in settings.items() if libc.mallopt(key, value) == 1]
    return "glibc mallopt " + " ".join(done)


# --- peak memory of one call ---


def _resident_peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def peak_memory(call: Callable[[], object], device: str) -> float | None:
    """MiB that ``call`` needs at its worst moment beyond what is held before it; None where it cannot be known."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    libc = _libc()
    if libc is None:
        return None
    libc.malloc_trim(0)  # free pages that stay resident would hide what the call takes
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
        before = _resident_peak()
        call()
        return (_resident_peak() - before) / MIB
    except OSError:
        return None


# --- load from others ---


class Load:
    """How many cores other processes kept busy since it was made, from the system's and our own CPU time."""

    def __init__(self) -> None:
        self._start = (time.perf_counter(), self._busy(), self._own())

    @staticmethod
    def _busy() -> float:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return 0.0
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _own() -> float:
        return time.process_time()

    def others(self) -> float:
        wall, busy, own = self._start
        elapsed = time.perf_counter() - wall
        if elapsed <= 0:
            return 0.0
        return max(0.0, ((self._busy() - busy) - (self._own() - own)) / elapsed)


# --- how fast it is just now ---


class Pace:
    """The time of a fixed piece of arithmetic on all threads at once, now and at its least.

    Two cores of a virtual machine can be two and, for seconds at a time, the two threads of one core: one thread runs
    as fast as ever then, and two gain nothing. Clocks sink, too. Neither shows in the load.
    """

    _GRAIN = 1 << 15  # elements that torch leaves to one thread: n times as many are work for n

    def __init__(self, threads: int, seconds: float = 0.25, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._numbers = torch.linspace(1, 2, threads * self._GRAIN)
        self._powers = torch.empty_like(self._numbers)
        self.least = float("inf")
        end = clock() + seconds
        while self.now() and clock() < end:
            pass

    def now(self) -> float:
        """Seconds, the best of three."""
        best = float("inf")
        for _ in range(3):
            start = self._clock()
            torch.pow(self._numbers, 1.7, out=self._powers)
            best = min(best, self._clock() - start)
        self.least = min(self.least, best)
        return best

    def slowness(self) -> float:
        """The time now over the least there was, which this look may lower: never below 1."""
        now = self.now()
        return now / self.least


# --- what to record ---


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "present, version unknown"


def _commit() -> str | None:
    if not (ROOT / ".git").exists():  # an installed package may lie inside somebody else's repository
        return None
    try:
        run = ["git", "-C", str(ROOT)]
        head = subprocess.run([*run, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(
            [*run, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + (" and changes" if dirty.strip() else "")


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def level() -> str | None:
    """The instruction set that our CPU kernels run at."""
    extension, _ = dispatch.leaf("accel._C")
    return None if extension is None else str(extension.build_info()["isa"])


def environment(device: str, seed: int, allocator: str, command: str) -> dict[str, Any]:
    """Everything a reader needs to place a number or to get it again."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "device": device,
        "device name": device_name(device),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "allocator": allocator,
        LEVEL: level(),
        "seed": seed,
        "commit": _commit(),
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "accel": _accel_version(),
        "torch": str(torch.__version__),
        "CUDA of torch": torch.version.cuda,
    }
    for package in ("triton", "torchvision", "timm", "transformers"):
        facts[package] = _version(package)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["compute capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["GPU memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
    return facts


def _accel_version() -> str:
    import accel

    return accel.__version__
