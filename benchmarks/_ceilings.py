"""What this machine does at best: how fast it copies, and how fast it multiplies and adds.

The rate of multiply-adds is that of a loop of ours on registers alone (``csrc/cpu/machine/multiply_add``), at the
instruction set that gives most. ``torch.mm`` is measured beside it and is a rival: on some processors it runs at half
the vector width. Where it is faster (it knows matrix units that we do not), or where there is no native extension, it
is the ceiling, and the source says so.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from accel.benchmarks._machine import MIB, dtype_name

MM = "torch.mm"
LOOP = "multiply-adds"
_ROUNDS = 1 << 16  # of the loop a call: a quarter of a millisecond and more


@dataclass(frozen=True)
class Ceilings:
    """What this machine was measured to do at best, in bytes and FLOPs a second."""

    copy: tuple[tuple[int, float], ...]  # (bytes moved, bytes a second), ascending
    multiply: dict[str, float]  # dtype name -> FLOP a second, the best there is
    sources: dict[str, str] = field(default_factory=dict)  # dtype name -> what gave that
    mm: dict[str, float] = field(default_factory=dict)  # dtype name -> FLOP a second of torch.mm

    def bandwidth(self, moved: int, cold: bool = False) -> float:
        """The copy bandwidth at this size: what fits a cache is held against the cache, unless it is ``cold``."""
        for size, rate in self.copy:
            if moved <= size and not cold:
                return rate
        return self.copy[-1][1]

    def floor_ms(self, flops: int, moved: int, dtype: str, cold: bool = False) -> float:
        """The least time for this work: the slower of moving the bytes and of multiplying."""
        return 1e3 * max(moved / self.bandwidth(moved, cold), flops / self.multiply[dtype])

    def source(self, flops: int, moved: int, dtype: str, cold: bool = False) -> str:
        """What that least time was taken from."""
        moving = moved / self.bandwidth(moved, cold) >= flops / self.multiply[dtype]
        return "copying" if moving else self.sources.get(dtype, MM)


def _best_seconds(call: Callable[[], object], device: str, seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    call()
    while time.perf_counter() < end or best == float("inf"):
        if device == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            stop.synchronize()
            took = start.elapsed_time(stop) / 1e3
        else:
            begin = time.perf_counter()
            call()
            took = time.perf_counter() - begin
        best = min(best, took)
    return best


def multiply_adds(halves: bool, seconds: float) -> tuple[float, str]:
    """FLOP a second of the loop on all threads at its best instruction set, and which that is; bf16 with ``halves``.

    Raises ImportError where the native extension, or this op in it, is missing.
    """
    native = importlib.import_module("accel._C")
    info = native.build_info()
    if not hasattr(torch.ops.accel_native, "multiply_add"):
        raise ImportError("accel._C was built before there was a loop of multiply-adds")
    left = torch.empty(torch.get_num_threads())
    best, source = 0.0, ""

    def call() -> int:
        return int(torch.ops.accel_native.multiply_add(left, _ROUNDS, halves))

    try:
        for level in info["isa_built"][: info["isa_built"].index(info["isa_highest"]) + 1]:
            native.set_isa(level)
            rate = call() / _best_seconds(call, "cpu", seconds)
            if rate > best:
                best, source = rate, f"{LOOP} of {level}"
    finally:
        native.set_isa(info["isa"])
    return best, source


def _mm(dtype: torch.dtype, device: str, seconds: float) -> float:
    """FLOP a second at the size that gives most. On a CPU one of them takes less than a scheduler's slice of time: a
    longer call is never undisturbed on a busy machine, and would make it look like one whose torch.mm is slow."""
    best = 0.0
    for n in (8192,) if device == "cuda" else (1024, 384):
        a = torch.randn(n, n, device=device, dtype=dtype)
        b, out = torch.randn_like(a), torch.empty_like(a)
        took = _best_seconds(lambda x=a, y=b, o=out: torch.mm(x, y, out=o), device, seconds)  # type: ignore[misc]
        best = max(best, 2 * n**3 / took)
    return best


def measure_ceilings(device: str, dtypes: Sequence[torch.dtype], seconds: float = 0.25) -> Ceilings:
    """Time copies, multiply-adds and square matrix products; a call's best time counts, since a ceiling is wanted."""
    sizes = (2048 * MIB,) if device == "cuda" else (2 * MIB, 8 * MIB, 32 * MIB, 128 * MIB, 512 * MIB)
    copy = []
    for size in sizes:
        source = torch.ones(size // 8, device=device)
        target = torch.empty_like(source)
        took = _best_seconds(lambda t=target, s=source: t.copy_(s), device, seconds / 2)  # type: ignore[misc]
        copy.append((size, size / took))
    multiply, sources, mm = {}, {}, {}
    for dtype in dtypes:
        name = dtype_name(dtype)
        mm[name] = multiply[name] = _mm(dtype, device, seconds)
        sources[name] = MM
        if device == "cuda":
            continue
        try:
            rate, source_ = multiply_adds(dtype == torch.bfloat16, seconds / 2)
        except ImportError:
            sources[name] = f"{MM}, as there is no native extension"
            continue
        if rate > mm[name]:
            multiply[name], sources[name] = rate, source_
    return Ceilings(tuple(copy), multiply, sources, mm)
