"""What the tests of the benchmark suite share: a clock that follows a script, and a case small enough for any test."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from accel.benchmarks import _timing, harness
from accel.benchmarks._ceilings import Ceilings
from accel.benchmarks._timing import Contender, Effort, Sample
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import Case, Cost, Provider, Row

CEILINGS = Ceilings(((1 << 20, 4e9), (1 << 30, 1e9)), {"fp32": 1e9, "bf16": 2e9})
WHERE = {"group": "stage 1", "dtype": "fp32", "mode": "forward"}
FASTER = Goal("twice as fast", "window_attention", "speedup", "cpu", WHERE, "eager", at_least=2.0)
EFFORT = Effort(warmup=1, rounds=3, seconds=0.0, most=3, retries=0)


class FakeClock:
    """Gives each contender its next scripted time and keeps the order of calls."""

    def __init__(self, times: dict[str, list[float]] | None = None, slowness: Sequence[float] = (1.0,)) -> None:
        self.times = times or {}
        self.slow = list(slowness)
        self.warmed: list[str] = []
        self.order: list[str] = []

    def warm(self, contender: Contender) -> None:
        self.warmed.append(contender.name)

    def time(self, contender: Contender) -> Sample:
        self.order.append(contender.name)
        script = self.times.get(contender.name, [1.0])
        wall = script.pop(0) if len(script) > 1 else script[0]
        return Sample(wall, 2 * wall, wall)

    def slowness(self) -> float:
        return self.slow.pop(0) if len(self.slow) > 1 else self.slow[0]


def contenders(*names: str) -> list[Contender]:
    return [Contender(name, lambda: None) for name in names]


def make_case(*providers: Provider, modes: Sequence[str] = ("forward", "forward+backward")) -> Case:
    return Case(
        op="window_attention",
        group="stage 1",
        variant="shift 0",
        shape="8",
        dtype=torch.float32,
        inputs=lambda generator: (torch.randn(3, 8, generator=generator), torch.randn(8, generator=generator)),
        reference=lambda x, y: x * y,
        providers=providers,
        costs={mode: Cost(flops=10**6, moved=2**20) for mode in modes},
        family="softmax",
    )


def provider_of(name: str, function: Callable[..., Tensor]) -> Provider:
    return Provider(name, lambda: function, lambda *inputs: "fake")


def rows_of(case: Case, clock: _timing.Clock | None = None) -> list[Row]:
    groups = harness.run_case(case, device="cpu", clock=clock or FakeClock(), effort=EFFORT, ceilings=CEILINGS)
    return [row for rows in groups for row in rows]


def row_of(provider: str, p50: float | None, variant: str = "shift 0", **more: object) -> Row:
    row = Row("window_attention", "stage 1", variant, "8", "fp32", "forward", "cpu", provider, p50_ms=p50)
    for name, value in more.items():
        setattr(row, name, value)
    return row
