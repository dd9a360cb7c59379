"""Timing: contenders round robin in one process, on a machine that is watched while it happens."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from accel.benchmarks._machine import Load, Pace, cores

SPREAD = 1.3  # p80/p20 beyond which a row is measured again
STEADY = 1.25  # of the least time the machine took for a fixed piece of work; where two cores become one it takes 1.6
PATIENCE = 4  # how many times the rounds of an effort to wait for as many steady ones
FEWEST = 3  # rounds of a row, however long they take


@dataclass(frozen=True)
class Effort:
    """How long to look. A row ends once it has ``rounds`` that were steady and ``seconds``, or ``most`` rounds, and in
    any case after ``limit`` seconds, those of being measured again included."""

    warmup: int
    rounds: int
    seconds: float
    most: int
    retries: int
    limit: float = math.inf


SHORT = Effort(warmup=1, rounds=9, seconds=0.4, most=60, retries=1, limit=4.0)
NORMAL = Effort(warmup=2, rounds=15, seconds=0.8, most=150, retries=2, limit=40.0)
FULL = Effort(warmup=3, rounds=30, seconds=3.0, most=500, retries=2, limit=180.0)


@dataclass(frozen=True)
class Contender:
    """Something to time: ``prepare`` runs before every call and is not timed."""

    name: str
    call: Callable[[], object]
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Sample:
    wall: float  # seconds
    cpu: float  # seconds over all threads
    own: float  # seconds of the calling thread


class Clock(Protocol):
    def warm(self, contender: Contender) -> None: ...

    def time(self, contender: Contender) -> Sample: ...

    def slowness(self) -> float:
        """How many times as long the machine takes for the same work now as at its best; 1 where nobody knows."""


class CpuClock:
    """Wall time beside the CPU time of the process and of the calling thread."""

    def __init__(self) -> None:
        self._pace = Pace(torch.get_num_threads())

    def slowness(self) -> float:
        return self._pace.slowness()

    def warm(self, contender: Contender) -> None:
        if contender.prepare is not None:
            contender.prepare()
        contender.call()

    def time(self, contender: Contender) -> Sample:
        if contender.prepare is not None:
            contender.prepare()
        own, cpu, wall = time.thread_time(), time.process_time(), time.perf_counter()
        contender.call()
        wall = time.perf_counter() - wall
        return Sample(wall, time.process_time() - cpu, time.thread_time() - own)


class CudaClock:
    """Events around a call on a cold L2.

    The flush before a call is repeated until it outlasts the host's time to launch the call, so that the device never
    waits for Python and every provider is timed by its kernels; ``cpu`` is the host's time, shown beside.
    """

    def __init__(self) -> None:
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
        self._scratch = torch.empty(max(4 * cache, 256 << 20), dtype=torch.int8, device="cuda")
        self._flushes: dict[str, int] = {}
        self._flush_seconds = self._timed(self._scratch.zero_)[0]
        self._flush_seconds = self._timed(self._scratch.zero_)[0]

    @staticmethod
    def _timed(call: Callable[[], object]) -> tuple[float, float]:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        host = time.perf_counter()
        call()
        host = time.perf_counter() - host
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3, host

    def warm(self, contender: Contender) -> None:
        if contender.prepare is not None:
            contender.prepare()
        torch.cuda.synchronize()
        host = self._timed(contender.call)[1]
        self._flushes[contender.name] = min(64, 1 + math.ceil(1.5 * host / self._flush_seconds))

    def time(self, contender: Contender) -> Sample:
        if contender.prepare is not None:
            contender.prepare()
        for _ in range(self._flushes.get(contender.name, 1)):
            self._scratch.zero_()
        device, host = self._timed(contender.call)
        return Sample(device, host, host)

    def slowness(self) -> float:
        return 1.0


def make_clock(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()


@dataclass(frozen=True)
class Timing:
    p20: float  # seconds
    p50: float
    p80: float
    cpu: float  # seconds, median
    samples: int
    attempts: int
    disturbed: str
    left_out: int = 0  # rounds beside these samples in which the machine was not itself

    @property
    def spread(self) -> float:
        return self.p80 / self.p20 if self.p20 > 0 else math.inf


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the two nearest order statistics."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def _disturbance(samples: Sequence[Sample], others: float, device: str) -> str:
    """Why these times are not this machine's alone, or nothing."""
    if device == "cuda":
        return ""
    said = []
    wall = sum(s.wall for s in samples)
    share = sum(s.own for s in samples) / wall if wall > 0 else 1.0
    if share < 0.9:
        said.append(f"had a core {share:.0%} of the time")
    free = cores() - torch.get_num_threads()
    if others > max(free, 0) + 0.1 * torch.get_num_threads():
        said.append(f"others used {others:.1f} cores")
    return "; ".join(said)


def _attempt(
    contenders: Sequence[Contender], clock: Clock, effort: Effort, device: str, end: float
) -> dict[str, Timing]:
    """Rounds between two looks at the machine. Those count in which it was steady before and after, whatever they gave;
    all do where too few were, and that is said. Nothing begins after ``end`` but the fewest rounds there must be."""
    every: list[list[Sample]] = []
    steady: list[list[Sample]] = []
    load, start, before = Load(), time.perf_counter(), clock.slowness()

    def enough() -> bool:
        if len(every) >= effort.most or (len(every) >= FEWEST and time.perf_counter() >= end):
            return True
        if len(steady) < effort.rounds and len(every) < PATIENCE * effort.rounds:
            return False
        return time.perf_counter() - start >= effort.seconds

    while not enough():
        taken = [clock.time(contender) for contender in contenders]
        after = clock.slowness()
        every.append(taken)
        if max(before, after) <= STEADY:
            steady.append(taken)
        before = after
    few = 2 * len(steady) < min(effort.rounds, len(every))
    kept, others = every if few else steady, load.others()
    out = {}
    for contender, samples in zip(contenders, zip(*kept, strict=True), strict=True):
        wall = [s.wall for s in samples]
        p20, p50, p80 = (quantile(wall, q) for q in (0.2, 0.5, 0.8))
        said = [_disturbance(samples, others, device)]
        if few:
            said.append(f"the machine was steady in {len(steady)} of {len(every)} rounds")
        disturbed = "; ".join(x for x in said if x)
        cpu = statistics.median(s.cpu for s in samples)
        out[contender.name] = Timing(p20, p50, p80, cpu, len(kept), 1, disturbed, len(every) - len(kept))
    return out


def measure(contenders: Sequence[Contender], clock: Clock, effort: Effort, device: str = "cpu") -> dict[str, Timing]:
    """Time all contenders round robin, so that whatever the machine does meets all of them alike.

    Measured again, all together, while the spread of any is too wide; the attempt whose widest spread is least counts.
    """
    if not contenders:
        return {}
    for contender in contenders:
        for _ in range(effort.warmup):
            clock.warm(contender)
    best: dict[str, Timing] = {}
    end = time.perf_counter() + effort.limit
    for attempt in range(1, effort.retries + 2):
        found = _attempt(contenders, clock, effort, device, end)
        if not best or _widest(found) < _widest(best):
            best = found
        best = {name: replace(t, attempts=attempt) for name, t in best.items()}
        if _widest(best) <= SPREAD or time.perf_counter() >= end:
            break
    return best


def _widest(timings: Mapping[str, Timing]) -> float:
    return max(t.spread for t in timings.values())
