"""The benchmark suite: statistics, the gate before the clock, goals, and what a run leaves on disk."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import accel
from accel.benchmarks import (
    _machine,
    _timing,
    harness,
    models,
    ms_deform_attn,
    report,
    run,
    softmax_attention,
    window_attention,
)
from accel.benchmarks._timing import Contender, Effort, Sample
from accel.benchmarks.harness import Case, Cost, Goal, Provider, Row
from accel.ops.attention.softmax_attention import OP

CEILINGS = _machine.Ceilings(((1 << 20, 4e9), (1 << 30, 1e9)), {"fp32": 1e9, "bf16": 2e9})
EFFORT = Effort(warmup=1, rounds=3, seconds=0.0, most=3, retries=0)
HALF_TOO = (torch.float32, torch.bfloat16)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def _contenders(*names: str) -> list[Contender]:
    return [Contender(name, lambda: None) for name in names]


def _case(*providers: Provider, modes: Sequence[str] = ("forward", "forward+backward")) -> Case:
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


def _provider(name: str, function: Callable[..., Tensor]) -> Provider:
    return Provider(name, lambda: function, lambda *inputs: "fake")


def _rows(case: Case, clock: _timing.Clock | None = None) -> list[Row]:
    groups = harness.run_case(case, device="cpu", clock=clock or FakeClock(), effort=EFFORT, ceilings=CEILINGS)
    return [row for rows in groups for row in rows]


# --- timing ---


def test_quantiles_interpolate() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [_timing.quantile(values, q) for q in (0.0, 0.2, 0.5, 0.8, 1.0)] == pytest.approx([1.0, 1.8, 3.0, 4.2, 5.0])
    assert _timing.quantile([7.0], 0.8) == 7.0


def test_providers_run_round_robin() -> None:
    clock = FakeClock()
    found = _timing.measure(_contenders("a", "b", "c"), clock, EFFORT)
    assert clock.warmed == ["a", "b", "c"]
    assert clock.order == ["a", "b", "c"] * 3
    assert [t.samples for t in found.values()] == [3, 3, 3]
    assert found["a"].cpu == 2.0


def test_a_wide_row_is_measured_again_at_most_twice_and_the_calmest_attempt_counts() -> None:
    effort = Effort(warmup=0, rounds=3, seconds=0.0, most=3, retries=2)
    calm = _timing.measure(_contenders("a"), FakeClock({"a": [1, 5, 9, 2.0, 2.0, 2.1]}), effort)["a"]
    assert (calm.attempts, calm.p50) == (2, 2.0)
    clock = FakeClock({"a": [1, 5, 9, 3, 4, 5, 1, 6, 30]})
    wild = _timing.measure(_contenders("a"), clock, effort)["a"]
    assert (len(clock.order), wild.attempts, wild.p50) == (9, 3, 4)


def test_a_row_goes_on_until_it_has_rounds_and_stops_at_most() -> None:
    forever = Effort(warmup=0, rounds=2, seconds=1e9, most=5, retries=0)
    assert _timing.measure(_contenders("a"), FakeClock(), forever)["a"].samples == 5


def test_rounds_count_in_which_the_machine_was_steady_before_and_after() -> None:
    effort = Effort(warmup=0, rounds=3, seconds=0.0, most=100, retries=0)
    times = {"a": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "b": [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]}
    looks = [1.0, 1.1, 1.6, 1.0, 1.2, 1.0]  # rounds 2 and 3 are between a steady look and one that was not
    found = _timing.measure(_contenders("a", "b"), FakeClock(times, looks), effort)
    assert [(t.samples, t.left_out, "steady" in t.disturbed) for t in found.values()] == [(3, 2, False)] * 2
    assert (found["a"].p50, found["b"].p50) == (4.0, 40.0)  # of rounds 1, 4 and 5


def test_all_rounds_count_where_too_few_were_steady_and_the_row_says_so() -> None:
    effort = Effort(warmup=0, rounds=3, seconds=0.0, most=100, retries=0)
    clock = FakeClock({"a": [1.0, 2.0, 3.0]}, [1.0, 1.0, 1.6])
    found = _timing.measure(_contenders("a"), clock, effort)["a"]
    assert (found.samples, found.left_out) == (3 * _timing.PATIENCE, 0)
    assert "the machine was steady in 1 of 12 rounds" in found.disturbed
    assert found.p50 == 3.0


def test_the_pace_is_the_least_time_of_the_same_work_on_all_threads() -> None:
    pace = _machine.Pace(2, seconds=0.01)
    assert pace._numbers.numel() == 2 * (1 << 15)
    assert 0 < pace.least <= pace.now()
    pace.least = 1e9
    assert pace.now() == pace.least < 1e9
    assert _timing.CpuClock().slowness() >= 1.0


def test_one_thread_is_timed_beside_all_of_them() -> None:
    seen: list[int] = []

    def function(x: Tensor, y: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return x * y

    def rows() -> dict[str, Row]:
        providers = (_provider("accel", function), harness.one_thread(lambda: function, lambda *inputs: "fake"))
        return {row.provider: row for row in _rows(_case(*providers, modes=["forward"]), _timing.CpuClock())}

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


# --- the gate ---


def test_a_right_row_has_times_and_what_follows_from_them() -> None:
    rows = _rows(_case(_provider("accel", lambda x, y: x * y)), FakeClock({"accel": [0.002]}))
    assert [row.mode for row in rows] == ["forward", "forward+backward"]
    row = rows[0]
    assert (row.status, row.backend, row.p50_ms, row.cpu_ms) == ("ok", "fake", 2.0, 4.0)
    assert row.tflops == pytest.approx(5e-4)
    assert row.gbs == pytest.approx(2**20 / 0.002 / 1e9)
    assert row.floor_ms == pytest.approx(1.0)  # 10**6 FLOPs at 1e9 take longer than 1 MiB at 4e9
    assert row.of_ceiling == pytest.approx(0.5)
    assert row.error == pytest.approx(0.0, abs=1e-6)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.sum(0)


def _one_wrong_element(x: Tensor, y: Tensor) -> Tensor:
    out = x * y
    keep = torch.ones_like(out)
    keep[-1, -1] = 1 + 1e-3
    return out * keep


@pytest.mark.parametrize(
    ("function", "modes"),
    [
        pytest.param(lambda x, y: x * y * 1.01, ("forward", "forward+backward"), id="output"),
        pytest.param(_one_wrong_element, ("forward", "forward+backward"), id="one element"),
        pytest.param(lambda x, y: (x * y)[:2], ("forward", "forward+backward"), id="shape"),
        pytest.param(lambda x, y: (x * y).double(), ("forward", "forward+backward"), id="dtype"),
        pytest.param(lambda x, y: x * y + float("nan"), ("forward", "forward+backward"), id="NaN"),
        pytest.param(lambda x, y: _WrongGradient.apply(x, y), ("forward+backward",), id="gradient"),
    ],
)
def test_a_wrong_provider_gets_no_speed(function: Callable[..., Tensor], modes: tuple[str, ...]) -> None:
    clock = FakeClock()
    rows = _rows(_case(_provider("accel", function), _provider("eager", lambda x, y: x * y)), clock)
    for row in rows:
        if row.provider == "accel" and row.mode in modes:
            assert row.status == "FAIL"
            assert row.reason
            assert (row.p50_ms, row.tflops, row.gbs, row.cpu_ms, row.peak_mib) == (None,) * 5
            assert "FAIL" in report.row_cells(row, None)[-1]
        else:
            assert row.status == "ok", row.reason
    assert clock.order.count("accel") == 3 * (2 - len(modes))


def test_a_rival_is_held_to_the_mean_in_half_precision_and_to_every_row_in_fp32() -> None:
    expected = torch.ones(1000, 8, dtype=torch.float64)
    off = expected.clone()
    off[5, 3] += 0.2
    for dtype, ours, rival in ((torch.bfloat16, True, False), (torch.float32, True, True)):
        limit = harness.TOLERANCES["softmax_grad", dtype]._replace(rms=8e-3)  # the mean alone would let it pass
        assert bool(harness.judge(off.to(dtype), expected, limit, "gradient")[1]) is ours
        assert bool(harness.judge(off.to(dtype), expected, limit, "gradient", harness.RIVAL_SLACK)[1]) is rival
    far = (expected * 1.05).to(torch.bfloat16)
    limit = harness.TOLERANCES["softmax", torch.bfloat16]
    assert "relative RMS" in harness.judge(far, expected, limit, "output", harness.RIVAL_SLACK)[1]


def test_a_rival_that_cannot_be_built_is_a_reason_and_the_rest_goes_on() -> None:
    def broken() -> Callable[..., Tensor]:
        raise RuntimeError("no compiler\n  here")

    rows = _rows(_case(Provider("compile", broken), _provider("accel", lambda x, y: x * y), modes=["forward"]))
    assert (rows[0].status, rows[0].reason) == ("unavailable", "RuntimeError: no compiler here")
    assert rows[1].p50_ms is not None


def test_backward_alone_times_the_gradient_and_is_right() -> None:
    rows = _rows(_case(_provider("accel", lambda x, y: x * y), modes=["backward"]), _timing.CpuClock())
    assert (rows[0].status, rows[0].samples) == ("ok", 3)


# --- goals ---


def _row(provider: str, p50: float | None, variant: str = "shift 0", **more: object) -> Row:
    row = Row("window_attention", "stage 1", variant, "8", "fp32", "forward", "cpu", provider, p50_ms=p50)
    for name, value in more.items():
        setattr(row, name, value)
    return row


WHERE = {"group": "stage 1", "dtype": "fp32", "mode": "forward"}
FASTER = Goal("twice as fast", "window_attention", "speedup", "cpu", WHERE, "eager", at_least=2.0)


def test_a_speedup_is_the_geometric_mean_over_variants() -> None:
    rows = [_row("accel", 1), _row("eager", 8), _row("accel", 2, "shift 3"), _row("eager", 4, "shift 3")]
    verdict = harness.reach(FASTER, rows, {})
    assert verdict.measured == pytest.approx(4.0)
    assert verdict.met is True
    slow = harness.reach(FASTER, [_row("accel", 4), _row("eager", 6)], {})
    assert (slow.measured, slow.met) == (pytest.approx(1.5), False)


def test_what_cannot_be_measured_is_not_judged_but_a_wrong_result_misses() -> None:
    assert harness.reach(FASTER, [_row("eager", 1)], {}).met is None
    absent = harness.reach(FASTER, [_row("accel", 1), _row("eager", None, status="unavailable", reason="gone")], {})
    assert (absent.met, absent.note) == (None, "eager: gone")
    wrong = harness.reach(FASTER, [_row("accel", None, status="FAIL", reason="off by one"), _row("eager", 1)], {})
    assert wrong.met is False
    assert "off by one" in wrong.note


def test_goals_of_memory_floor_and_value() -> None:
    rows = [_row("accel", 3, peak_mib=5.0, floor_ms=2.0), _row("eager", 6, peak_mib=10.0)]
    memory = Goal("memory", "window_attention", "memory", "cpu", WHERE, "eager", at_most=0.4)
    floor = Goal("floor", "window_attention", "floor", "cpu", WHERE, at_most=1.5)
    value = Goal("value", "window_attention", "value", "cpu", at_most=2.0)
    got = [harness.reach(goal, rows, {"value": 3.0}) for goal in (memory, floor, value)]
    assert [(v.measured, v.met) for v in got] == [(0.5, False), (1.5, True), (3.0, False)]
    assert harness.reach(value, rows, {}).met is None


def test_goals_of_rate_and_growth() -> None:
    small, large = ({**WHERE, "group": group} for group in ("stage 1", "stage 2"))
    rows = [
        _row("accel", 3, peak_mib=5.0, tflops=2.0),
        _row("triton", 3, peak_mib=5.0, tflops=8.0),
        dataclasses.replace(_row("accel", 3, peak_mib=15.0, tflops=4.0), group="stage 2"),
        dataclasses.replace(_row("accel", 3, peak_mib=99.0), group="stage 2", variant="another"),
    ]
    rate = Goal("rate", "window_attention", "rate", "cpu", small, at_least=3.0)
    theirs = Goal("theirs", "window_attention", "rate", "cpu", small, at_least=3.0, of="triton")
    growth = Goal("growth", "window_attention", "growth", "cpu", large, at_most=2.5, base={"group": "stage 1"})
    got = [harness.reach(goal, rows, {}) for goal in (rate, theirs, growth)]
    assert [(v.measured, v.met) for v in got] == [
        (pytest.approx(2.0), False),
        (pytest.approx(8.0), True),
        (pytest.approx(3.0), False),
    ]


def test_a_figure_is_divided_by_what_the_work_saved_explains() -> None:
    goal = dataclasses.replace(FASTER, at_least=0.9, per=2.5)
    verdict = harness.reach(goal, [_row("accel", 4), _row("eager", 8)], {})
    assert (verdict.measured, verdict.met) == (pytest.approx(0.8), False)


def test_a_yardstick_is_judged_by_what_it_computes() -> None:
    def first(x: Tensor, y: Tensor) -> Tensor:
        return (2 * x)[:2]

    right = Provider("half the work", lambda: first, computes=first)
    wrong = Provider("nearly", lambda: lambda x, y: first(x, y) * 1.01, computes=first)
    rows = _rows(_case(_provider("accel", lambda x, y: x * y), right, wrong))
    assert [(row.provider, row.status) for row in rows] == 2 * [
        ("accel", "ok"), ("half the work", "ok"), ("nearly", "FAIL")
    ]  # fmt: skip


def test_a_gradient_of_a_parameter_in_another_dtype_is_judged_in_that() -> None:
    case = dataclasses.replace(
        _case(
            _provider("accel", lambda x, y: (x * y).bfloat16()),
            _provider("eager", lambda x, y: (x * _Rounded.apply(y)).bfloat16()),
        ),
        dtype=torch.bfloat16,
        inputs=lambda g: (torch.randn(3, 8, generator=g).bfloat16(), torch.randn(8, generator=g)),
    )
    rows = [row for row in _rows(case) if row.mode == "forward+backward"]
    assert [row.status for row in rows] == ["ok", "ok"], [row.reason for row in rows]


class _Rounded(torch.autograd.Function):
    """Passes the values on, and rounds the gradient as half arithmetic would."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad.bfloat16().float()


@pytest.mark.parametrize("module", run.OPS.values(), ids=run.OPS)
def test_every_goal_is_about_rows_that_exist(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = [torch.float32, torch.bfloat16]
    for device in ("cpu", "cuda"):
        if device == "cuda":  # what is put there beside the inputs
            elsewhere = {n: _on_cpu(getattr(torch, n)) for n in ("arange", "tensor")}
            for name, function in elsewhere.items():
                monkeypatch.setattr(module.torch, name, function)
            monkeypatch.setattr(Tensor, "to", _to_cpu(Tensor.to))
        found = [
            (case, harness.dtype_name(case.dtype), mode)
            for case in module.cases(device, dtypes, "normal", None)
            for mode in case.costs
        ]
        for goal in module.GOALS:
            if goal.device != device:
                continue
            for where in (goal.where, {**goal.where, **goal.base}):
                matching = [
                    {p.name for p in case.providers}
                    for case, dtype, mode in found
                    if all(_field(case, dtype, mode, n) == value for n, value in where.items())
                ]
                assert matching, goal.name
                rivals = (goal.rival or goal.of).split("|")
                assert all({goal.of, *rivals} <= names for names in matching), goal.name


def test_the_slowest_of_several_rivals_counts() -> None:
    def row(provider: str, dtype: str, ms: float) -> Row:
        return Row("op", "g", "", "8", dtype, "forward", "cpu", provider, p50_ms=ms)

    times = {"fp32": {"accel": 2.0, "a": 3.0, "b": 5.0, "c": 9.0}, "bf16": {"accel": 2.0, "b": 1.0, "a": 5.0}}
    rows = [row(provider, dtype, ms) for dtype, by in times.items() for provider, ms in by.items()]
    goal = Goal("g", "op", "speedup", "cpu", {}, "a|b", at_least=1.0)
    assert harness.reach(goal, rows, {}).measured == pytest.approx(2.5)
    assert harness.reach(dataclasses.replace(goal, rival="a"), rows, {}).measured == pytest.approx((1.5 * 2.5) ** 0.5)


def _field(case: Case, dtype: str, mode: str, name: str) -> str:
    return {"dtype": dtype, "mode": mode}.get(name) or getattr(case, name)


def _on_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: function(*args, **{n: v for n, v in kwargs.items() if n != "device"})


def _to_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *args, **kwargs: x if args == ("cuda",) else function(x, *args, **kwargs)


# --- softmax attention's rivals ---


def _small_cases(monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """One case of each kind, with few tokens."""
    monkeypatch.setattr(softmax_attention, "LENGTHS", [5, 1, 11, 8])
    small = {"kv_heads": 2, "tokens": 40, "heads": 4, "size": 8}
    yield from softmax_attention._table_cases("cpu", torch.float32, harness.MODES, None, 24, True)
    for shape in (softmax_attention.PLAIN[0], softmax_attention.PLAIN[3]):
        changed = dataclasses.replace(shape, **small)
        yield softmax_attention._plain_case(changed, "cpu", torch.float32, harness.MODES, None)
    for rules in ({"window": (6, 0)}, {"pattern": accel.BlockCausal(8)}):
        masked = softmax_attention.Shape("mask", "small", 40, heads=2, kv_heads=2, size=8, rules=rules)
        yield softmax_attention._mask_case(masked, "cpu", torch.float32, harness.MODES, None)
    yield softmax_attention._packed_case("cpu", torch.float32, harness.MODES, None)


def test_the_rivals_of_softmax_attention_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for case in _small_cases(monkeypatch):
        for row in _rows(case):
            assert row.status == "ok", f"{row.label} {row.mode} {row.provider}: {row.reason}"
            seen.add(row.provider)
            if row.provider.startswith("accel"):
                assert row.backend in ("cpu", "reference")
    assert seen == {"accel", "sdpa", "sdpa without bias", "accel without mask"}


def test_an_index_in_any_order_has_no_rule() -> None:
    index = softmax_attention._arbitrary(24, "cpu")
    assert torch.equal(index.sort(0)[0][:, 0], softmax_attention._toeplitz(24, "cpu")[:, 0])
    args = OP.prepare(*[torch.zeros(1, 1, 24, 8)] * 3, bias_table=torch.zeros(47, 1), bias_index=index)
    assert args.line is None


def test_the_share_of_live_tiles() -> None:
    window = softmax_attention.Shape("mask", "window", 256, rules={"window": (63, 0)})
    assert softmax_attention.live_tiles(window) == (4 + 3) / 16
    assert softmax_attention.live_tiles(dataclasses.replace(window, rules={"window": (0, 0)})) == 4 / 16
    blocks = dataclasses.replace(window, rules={"pattern": accel.BlockCausal(128)})
    assert softmax_attention.live_tiles(blocks) == (4 * 2 + 4 * 2 - 4) / 16
    for shape in softmax_attention.MASKS:
        seen = softmax_attention.ours(shape.rules, "reference")
        ones = torch.eye(shape.tokens)[None, None]
        small = torch.zeros(1, 1, shape.tokens, 8)
        assert int((seen(small, small, ones) > 0).sum()) == round(shape.live * shape.tokens**2)


def test_the_padded_batch_does_the_stated_work() -> None:
    lengths = softmax_attention.drawn_lengths()
    assert lengths == softmax_attention.LENGTHS
    assert (len(lengths), min(lengths) >= 32, max(lengths) <= 512) == (16, True, True)
    assert pytest.approx(16 * max(lengths) ** 2 / sum(n**2 for n in lengths)) == softmax_attention.SAVED


# --- window attention's rival ---


SMALL = (
    window_attention.Shape("small", 2, (14, 21), 24, 3, (7, 7), (3, 3)),
    window_attention.Shape("small", 2, (14, 14), 24, 3, (7, 7), (0, 0)),
    window_attention.Shape("covered", 1, (7, 14), 24, 3, (7, 7), (3, 3)),
    window_attention.Shape("padded", 1, (9, 16), 24, 3, (7, 7), (3, 3)),
    window_attention.Shape("cosine", 1, (8, 8), 24, 3, (4, 4), (2, 2), cosine=True),
    window_attention.Shape("video", 1, (4, 8, 8), 24, 3, (2, 4, 4), (1, 2, 2)),
)


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_the_eager_rival_is_the_reference_in_float64(shape: window_attention.Shape) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [x.double() for x in window_attention._inputs(shape, "cpu", torch.float32, False)(generator)]
    expected = window_attention.ours(shape, "reference")(*inputs)
    got = window_attention.core(shape, "cpu")(*inputs)
    if (
        shape.cosine
    ):  # F.normalize divides by max(norm, eps), the reference treats a zero vector apart: not the same bits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    else:
        assert torch.equal(got, expected)
    sdpa = window_attention.core(shape, "cpu", window_attention._attend_sdpa)(*inputs)
    torch.testing.assert_close(sdpa, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SMALL[:4], ids=str)
def test_the_block_rival_is_torchvisions_function(shape: window_attention.Shape) -> None:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    generator = torch.Generator().manual_seed(0)
    inputs = window_attention._inputs(shape, "cpu", torch.float32, True)(generator)
    x, table, w1, b1, w2, b2 = (t.double() for t in inputs)
    index = window_attention.relative_position_index(shape.window).flatten()
    bias = swin._get_relative_position_bias(table, index, list(shape.window))
    expected = swin.shifted_window_attention(
        x, w1, w2, bias, list(shape.window), shape.heads, list(shape.shift), qkv_bias=b1, proj_bias=b2
    )
    assert torch.equal(window_attention.block(shape, "cpu")(x, table, w1, b1, w2, b2), expected)
    ours = window_attention.ours_block(shape, "reference")(x, table, w1, b1, w2, b2)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_costs_are_those_of_the_memory_floor() -> None:
    shape = window_attention.Shape("stage 1", 64, (56, 56), 96, 3, (7, 7), (0, 0))
    cost = window_attention.costs(shape, 2, harness.MODES)
    tokens = 64 * 56 * 56
    assert cost["forward"] == Cost(4 * tokens * 49 * 96, 8 * tokens * 96)
    assert cost["backward"] == Cost(10 * tokens * 49 * 96, 14 * tokens * 96)


# --- multi-scale deformable attention's rival ---


@pytest.mark.parametrize("variant", ["uniform", "local"])
def test_the_rival_of_ms_deform_attn_computes_the_same(variant: str) -> None:
    levels = ((9, 13), (5, 7), (2, 3))
    shape = ms_deform_attn.Shape("small", variant, 0, 2, 3, 8, levels)
    for case in (ms_deform_attn._case(shape, "cpu", dtype, harness.MODES, ["accel", "eager"]) for dtype in HALF_TOO):
        for row in _rows(case):
            assert row.status == "ok", f"{row.label} {row.mode} {row.provider}: {row.reason}"
    inputs = [x.double() for x in ms_deform_attn._inputs(shape, "cpu", torch.float32)(torch.Generator().manual_seed(0))]
    by_queries = ms_deform_attn.reference(shape, at_once=100)(*inputs)
    assert torch.equal(by_queries, ms_deform_attn.ours(shape, "reference")(*inputs))


def test_local_locations_are_near_their_query() -> None:
    shape = next(s for s in ms_deform_attn._shapes(1) if s.variant == "local")
    _, locations, weights = ms_deform_attn._inputs(shape, "cpu", torch.float32)(torch.Generator().manual_seed(0))
    assert torch.allclose(weights.sum((3, 4)), torch.ones(()))
    assert locations.shape[1] == shape.count == 22223
    x, y = locations[0, 30 * 167 + 120, :, 0].mean((0, 1)).tolist()  # row 30, column 120 of the first level
    assert (x * 167, y * 100) == pytest.approx((120.5, 30.5), abs=2.5)


# --- a run ---


def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: list[Case], goals: list[Goal], *argv: str) -> int:
    monkeypatch.setattr(window_attention, "cases", lambda *args: iter(cases))
    monkeypatch.setattr(run, "GOALS", goals)
    monkeypatch.setattr(run, "make_clock", lambda device: FakeClock({"accel": [0.004], "eager": [0.006]}))
    monkeypatch.setattr(run, "measure_ceilings", lambda device, dtypes: CEILINGS)
    monkeypatch.setattr(run, "pin_allocator", lambda: "left alone")
    return run.main(["window_attention", "--device", "cpu", "--quick", "--out", str(tmp_path), *argv])


def test_check_names_the_misses_and_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = _case(_provider("accel", lambda x, y: x * y), _provider("eager", lambda x, y: x * y))
    assert _run(tmp_path, monkeypatch, [right], [FASTER], "--check") == 1
    assert "missed: twice as fast: measured 1.500, target ≥ 2" in capsys.readouterr().out
    assert _run(tmp_path, monkeypatch, [right], [FASTER]) == 0
    reachable = Goal("a bit faster", "window_attention", "speedup", "cpu", WHERE, "eager", at_least=1.4)
    assert _run(tmp_path, monkeypatch, [right], [reachable], "--check") == 0


def test_check_fails_on_a_wrong_result_even_without_goals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = _case(_provider("accel", lambda x, y: x + y), modes=["forward"])
    assert _run(tmp_path, monkeypatch, [wrong], [], "--check") == 1
    assert "FAIL: window_attention stage 1 shift 0 fp32 forward" in capsys.readouterr().out


def test_a_run_leaves_json_csv_and_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case(
        _provider("accel", lambda x, y: x * y), _provider("eager", lambda x, y: x * y), _provider("sdpa", torch.add)
    )
    assert _run(tmp_path, monkeypatch, [case], [FASTER]) == 0
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["finished"] is True
    assert [(r["provider"], r["mode"], r["status"]) for r in data["rows"]][:3] == [
        ("accel", "forward", "ok"), ("eager", "forward", "ok"), ("sdpa", "forward", "FAIL"),
    ]  # fmt: skip
    assert data["rows"][2]["p50_ms"] is None
    assert "--rows '^stage 1 shift 0 fp32$'" in data["rows"][0]["command"]
    assert {"torch", "accel", "device name", "threads", "allocator", "seed", "date", "command"} <= set(
        data["environment"]
    )
    assert data["goals"][0]["measured"] == pytest.approx(1.5)
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(data["rows"]) == 6
    assert lines[0]["p50_ms"] == "4.0"
    assert lines[2]["p50_ms"] == ""
    page = (tmp_path / "index.html").read_text()
    links = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert all(link.startswith("http://www.w3.org/") for link in links), f"the page must stand alone: {links}"
    assert "1.500" in page
    assert "FAIL" in page


def test_a_run_cut_short_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(generator: torch.Generator) -> tuple[Tensor, ...]:
        before = json.loads((tmp_path / "results.json").read_text())
        assert (before["finished"], len(before["rows"])) == (False, 1)
        raise KeyboardInterrupt

    first = _case(_provider("accel", lambda x, y: x * y), modes=["forward"])
    second = Case(**{**vars(first), "inputs": interrupt})
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, monkeypatch, [first, second], [])
    data = json.loads((tmp_path / "results.json").read_text())
    assert (data["finished"], len(data["rows"])) == (False, 1)
    assert "the run did not finish" in (tmp_path / "index.html").read_text()


def test_a_budget_leaves_out_the_rest_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case(_provider("accel", lambda x, y: x * y), modes=["forward"])
    assert _run(tmp_path, monkeypatch, [case, case, case], [], "--budget", "1e-9") == 0
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["rows"] == []
    assert any("3 of 3 jobs left out" in note for note in data["notes"])


@pytest.mark.parametrize("argv", [["no_such_op"], ["--providers", "nobody"], ["--rows", "("]])
def test_bad_options_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main([*argv, "--device", "cpu"])
    assert caught.value.code == 2
    assert argv[-1] in capsys.readouterr().err


def test_a_real_row_through_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accel", "bench", "window_attention", "--quick", "--device", "cpu"]
    command += ["--dtype", "fp32", "--rows", "stage 4", "--threads", "1", "--out", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["provider"], row["mode"]) for row in rows] == [
        (provider, mode) for mode in ("forward", "forward+backward") for provider in ("accel", "eager")
    ]
    for row in rows:
        assert row["status"] == "ok", row["reason"]
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert rows[0]["backend"] in ("cpu", "reference")
    assert f"accel ({rows[0]['backend']})" in done.stdout


# --- models ---


def test_the_photographs_are_four_different_pictures() -> None:
    pytest.importorskip("skimage")
    x = models.photographs()
    assert x.shape == (4, 3, 224, 224)
    assert torch.isfinite(x).all()
    assert all((x[i] - x[j]).abs().mean() > 0.1 for i in range(4) for j in range(i))


def test_detectors_run_on_one_photograph_in_fp32() -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("transformers")
    x = models._detectors.photograph()
    assert x.shape == (1, 3, 416, 640)
    assert x.std() > 0.5
    dtypes = (torch.float32, torch.bfloat16)
    jobs = {level: [(m.name, d) for m, d, _ in models.jobs(dtypes, level) if m.detects] for level in run.EFFORTS}
    names = ["transformers Deformable DETR", "transformers RT-DETR"]
    assert jobs == {
        "quick": [],
        "normal": [(n, torch.float32) for n in names],
        "full": [(n, torch.float32) for n in names],
    }


def test_a_detector_is_compared_as_a_set_of_queries() -> None:
    class Detector(torch.nn.Module):
        order = torch.arange(5)

        def forward(self, pixel_values: Tensor) -> Any:
            found = torch.arange(20.0).view(1, 5, 4).square()[:, self.order]
            return type("Output", (), {"last_hidden_state": found, "logits": found + 100, "pred_boxes": found / 400})

    net, x = Detector(), torch.zeros(1, 3, 8, 8)
    first = models._results(net, x, x, False, 0, detects=True)
    net.order = torch.tensor([3, 1, 0, 4, 2])
    for a, b in zip(first, models._results(net, x, x, False, 0, detects=True), strict=True):
        torch.testing.assert_close(a, b)
    assert harness.relative_rms(first[1] + 1, first[1]) > 0.005
    assert "boxes" in models._judge([1e-6, 1e-6, 1e-3], [1e-6] * 3, torch.float32, models.FOUND)


def test_digits_curves_coincide_within_the_noise_and_the_loss_falls() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("torchvision")
    ticks: list[None] = []
    curves = models.digits(3, seed=0, tick=lambda: ticks.append(None))
    assert len(ticks) == 12
    assert len(curves.patched) == 3
    assert curves.difference < 1e-4
    assert all(torch.isfinite(torch.tensor(run_)).all() for run_ in (curves.eager, curves.patched, *curves.perturbed))


def test_noise_is_counted_in_runs_that_differ_by_rounding() -> None:
    curves = models.Curves([1.0, 2.0], [1.0, 2.5], [[1.0, 2.25], [1.0, 2.0]], {})
    assert (curves.difference, curves.noise, models.noise_ratio(curves)) == (0.5, 0.25, 2.0)


def test_a_patched_model_far_from_float64_is_wrong() -> None:
    assert models._judge([1e-6, 1e-6], [1e-6, 1e-6], torch.float32) == ""
    assert "gradients" in models._judge([1e-6, 1e-3], [1e-6, 1e-6], torch.float32)
    assert "output" in models._judge([float("nan")], [1e-6], torch.float32)


def test_the_command_line_without_a_command_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    from accel.__main__ import main

    assert main([]) == 2
    assert "bench" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert main(["dance"]) == 2
