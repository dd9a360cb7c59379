"""How the benchmark suite takes times: statistics, the machine that is watched meanwhile, ceilings, peak memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import pytest
import torch
from _bench import EFFORT, FakeClock, contenders, make_case, provider_of, rows_of
from torch import Tensor

from accel.benchmarks import _ceilings, _machine, _timing, harness
from accel.benchmarks._timing import Contender, Effort, Sample
from accel.benchmarks.harness import Row

pytestmark = pytest.mark.usefixtures("one_thread")


def test_quantiles_interpolate() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [_timing.quantile(values, q) for q in (0.0, 0.2, 0.5, 0.8, 1.0)] == pytest.approx([1.0, 1.8, 3.0, 4.2, 5.0])
    assert _timing.quantile([7.0], 0.8) == 7.0


def test_providers_run_round_robin() -> None:
    clock = FakeClock()
    found = _timing.measure(contenders("a", "b", "c"), clock, EFFORT)
    assert clock.warmed == ["a", "b", "c"]
    assert clock.order == ["a", "b", "c"] * 3
    assert [t.samples for t in found.values()] == [3, 3, 3]
    assert found["a"].cpu == 2.0


def test_a_wide_row_is_measured_again_at_most_twice_and_the_calmest_attempt_counts() -> None:
    effort = Effort(warmup=0, rounds=3, seconds=0.0, most=3, retries=2)
    calm = _timing.measure(contenders("a"), FakeClock({"a": [1, 5, 9, 2.0, 2.0, 2.1]}), effort)["a"]
    assert (calm.attempts, calm.p50) == (2, 2.0)
    clock = FakeClock({"a": [1, 5, 9, 3, 4, 5, 1, 6, 30]})
    wild = _timing.measure(contenders("a"), clock, effort)["a"]
    assert (len(clock.order), wild.attempts, wild.p50) == (9, 3, 4)


def test_a_row_goes_on_until_it_has_rounds_and_stops_at_most() -> None:
    forever = Effort(warmup=0, rounds=2, seconds=1e9, most=5, retries=0)
    assert _timing.measure(contenders("a"), FakeClock(), forever)["a"].samples == 5


def test_rounds_count_in_which_the_machine_was_steady_before_and_after() -> None:
    effort = Effort(warmup=0, rounds=3, seconds=0.0, most=100, retries=0)
    times = {"a": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "b": [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]}
    looks = [1.0, 1.1, 1.6, 1.0, 1.2, 1.0]  # rounds 2 and 3 are between a steady look and one that was not
    found = _timing.measure(contenders("a", "b"), FakeClock(times, looks), effort)
    assert [(t.samples, t.left_out, "steady" in t.disturbed) for t in found.values()] == [(3, 2, False)] * 2
    assert (found["a"].p50, found["b"].p50) == (4.0, 40.0)  # of rounds 1, 4 and 5


def test_all_rounds_count_where_too_few_were_steady_and_the_row_says_so() -> None:
    effort = Effort(warmup=0, rounds=3, seconds=0.0, most=100, retries=0)
    clock = FakeClock({"a": [1.0, 2.0, 3.0]}, [1.0, 1.0, 1.6])
    found = _timing.measure(contenders("a"), clock, effort)["a"]
    assert (found.samples, found.left_out) == (3 * _timing.PATIENCE, 0)
    assert "the machine was steady in 1 of 12 rounds" in found.disturbed
    assert found.p50 == 3.0


def _from_zero(seconds: Iterable[float]) -> Iterator[float]:
    """What passes before each of two looks at a clock."""
    for each in seconds:
        yield from (0.0, each)


def test_the_pace_is_the_least_time_of_the_same_work_on_all_threads() -> None:
    first, second, third = (5.0, 4.0, 6.0), (8.0, 9.0, 7.0), (2.0, 3.0, 3.0)  # each look takes the best of three
    took = iter([0.0, *_from_zero(first), 1.0, *_from_zero(second), *_from_zero(third)])
    now = [0.0]

    def clock() -> float:
        now[0] += next(took)
        return now[0]

    pace = _machine.Pace(2, seconds=0.0, clock=clock)  # one look
    assert pace._numbers.numel() == 2 * (1 << 15)
    assert pace.least == 4.0
    assert pace.slowness() == 7.0 / 4.0
    assert pace.slowness() == 1.0, "a look that is the least so far is held against itself"
    assert pace.least == 2.0


def test_the_machine_is_never_faster_than_at_its_best() -> None:
    clock = _timing.CpuClock()
    assert all(clock.slowness() >= 1.0 for _ in range(20))


def test_a_row_ends_at_its_limit_with_the_fewest_rounds() -> None:
    effort = Effort(warmup=0, rounds=50, seconds=1e9, most=1000, retries=5, limit=0.0)
    wild = _timing.measure(contenders("a"), FakeClock({"a": [1, 5, 9]}), effort)["a"]
    assert (wild.samples, wild.attempts) == (_timing.FEWEST, 1)


def test_one_thread_is_timed_beside_all_of_them() -> None:
    seen: list[int] = []

    def function(x: Tensor, y: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return x * y

    def rows() -> dict[str, Row]:
        providers = (provider_of("accel", function), harness.one_thread(lambda: function, lambda *inputs: "fake"))
        return {row.provider: row for row in rows_of(make_case(*providers, modes=["forward"]), _timing.CpuClock())}

    assert rows()["one thread"].reason == "the process has no more than one thread"
    torch.set_num_threads(2)
    seen.clear()
    assert rows()["one thread"].status == "ok"
    assert (seen.count(1), torch.get_num_threads()) == (1 + EFFORT.warmup + EFFORT.rounds, 2)  # the first for its peak


def test_load_from_others_marks_a_row() -> None:
    starved = [Sample(1.0, 0.5, 0.5)]
    assert "had a core 50% of the time" in _timing._disturbance(starved, 0.0, "cpu")
    busy = _machine.cores() + 1.0
    assert f"others used {busy:.1f} cores" in _timing._disturbance([Sample(1.0, 1.0, 1.0)], busy, "cpu")
    assert _timing._disturbance([Sample(1.0, 1.0, 1.0)], 0.0, "cpu") == ""


def test_the_cpu_clock_times_the_call_and_not_its_preparation() -> None:
    order: list[str] = []
    slow = Contender("a", lambda: order.append("call"), lambda: (order.append("prepare"), sum(range(10**6))))
    sample = _timing.CpuClock().time(slow)
    assert order == ["prepare", "call"]
    assert 0 < sample.wall < 0.005


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_sees_a_tensor_that_is_gone_when_the_call_returns() -> None:
    _machine.pin_allocator()
    peak = _machine.peak_memory(lambda: torch.ones(16 << 18), "cpu")
    assert peak is not None
    assert 15 <= peak <= 24, peak
    again = _machine.peak_memory(lambda: torch.ones(16 << 18), "cpu")
    assert again is not None
    assert again >= 15, "memory kept from the first call hid the second"


# --- ceilings ---


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_the_loop_counts_its_multiply_adds(level: str) -> None:
    native = pytest.importorskip("accel._C")
    info = native.build_info()
    if level not in info["isa_built"][: info["isa_built"].index(info["isa_highest"]) + 1]:
        pytest.skip(f"this processor or build has no {level}")
    width = {"portable": 4, "avx2": 8}.get(level, 16)
    left, rounds = torch.zeros(3), 100
    try:
        native.set_isa(level)
        assert torch.ops.accel_native.multiply_add(left, rounds, False) == 3 * rounds * 12 * 2 * width
        assert left.tolist() == [12 * width * 2.0] * 3  # each sum x becomes x / 2 + 1, which ends at 2
        pairs = 2 if level == "avx512_bf16" else 1
        assert torch.ops.accel_native.multiply_add(left, rounds, True) == 3 * rounds * 12 * 2 * width * pairs
        grown = (sum(range(12)) + 12 * 0.25 + 12 * rounds * 0.25) * width  # a half squared every round
        assert left.tolist() == [grown if pairs == 2 else 12 * width * 2.0] * 3
    finally:
        native.set_isa(info["isa"])


def test_the_rate_of_multiply_adds_is_that_of_the_best_level_and_the_level_comes_back() -> None:
    native = pytest.importorskip("accel._C")
    before = native.build_info()["isa"]
    rate, source = _ceilings.multiply_adds(False, 0.01)
    assert rate > 1e9
    assert source.removeprefix("multiply-adds of ") in native.build_info()["isa_built"]
    assert native.build_info()["isa"] == before


@pytest.mark.parametrize("took", [(1.0, 1e-9), (1e-9, 1.0)])
def test_torch_mm_counts_at_the_size_that_gives_most(
    took: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(took)
    monkeypatch.setattr(_ceilings, "_best_seconds", lambda call, device, seconds: next(left))
    best = 2 * (384 if took[1] < took[0] else 1024) ** 3 / 1e-9
    assert _ceilings._mm(torch.float32, "cpu", 0.0) == pytest.approx(best)


def test_without_the_native_extension_a_matrix_product_is_the_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(_ceilings, "_mm", lambda dtype, device, seconds: 2e9)
    monkeypatch.setattr(_ceilings.importlib, "import_module", missing)
    found = _ceilings.measure_ceilings("cpu", [torch.float32], seconds=0.001)
    assert (found.multiply, found.mm) == ({"fp32": 2e9}, {"fp32": 2e9})
    assert found.source(10**9, 1, "fp32") == "torch.mm, as there is no native extension"
    assert found.source(1, 10**9, "fp32") == "copying"


@pytest.mark.parametrize(("mm", "source"), [(1e9, "multiply-adds of avx2"), (9e9, "torch.mm")])
def test_the_ceiling_is_the_higher_rate(mm: float, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ceilings, "_mm", lambda dtype, device, seconds: mm)
    monkeypatch.setattr(_ceilings, "multiply_adds", lambda halves, seconds: (4e9, "multiply-adds of avx2"))
    found = _ceilings.measure_ceilings("cpu", [torch.float32], seconds=0.001)
    assert (found.multiply["fp32"], found.sources["fp32"], found.mm["fp32"]) == (max(mm, 4e9), source, mm)
