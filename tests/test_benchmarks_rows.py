"""What the benchmark suite says of a row: right or wrong before any speed, and the goals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _bench import CEILINGS, FASTER, WHERE, FakeClock, make_case, provider_of, row_of, rows_of
from torch import Tensor

from accel.benchmarks import _choice, _tables, _timing, goals, harness
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import Case, Cost, Provider, Row

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_cold_is_held_against_memory_and_the_rest_against_a_cache_of_its_size(monkeypatch) -> None:
    monkeypatch.setattr(harness, "COLD", 1)  # no copies
    assert CEILINGS.floor_ms(0, 1 << 20, "fp32") == pytest.approx(1e3 * 2**20 / 4e9)
    assert CEILINGS.floor_ms(0, 1 << 20, "fp32", cold=True) == pytest.approx(1e3 * 2**20 / 1e9)
    warm = make_case(provider_of("accel", lambda x, y: x * y))
    warm = dataclasses.replace(warm, costs={mode: Cost(0, cost.moved) for mode, cost in warm.costs.items()})
    times = {"accel": [0.002]}
    floors = [rows_of(case, FakeClock(times))[0].floor_ms for case in (warm, dataclasses.replace(warm, cold=(1,)))]
    assert floors[1] == pytest.approx(4 * floors[0])


def test_a_right_row_has_times_and_what_follows_from_them() -> None:
    rows = rows_of(make_case(provider_of("accel", lambda x, y: x * y)), FakeClock({"accel": [0.002]}))
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
    rows = rows_of(make_case(provider_of("accel", function), provider_of("eager", lambda x, y: x * y)), clock)
    for row in rows:
        if row.provider == "accel" and row.mode in modes:
            assert row.status == "FAIL"
            assert row.reason
            assert (row.p50_ms, row.tflops, row.gbs, row.cpu_ms, row.peak_mib) == (None,) * 5
            assert "FAIL" in _tables.row_cells(row, None)[-1]
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

    rows = rows_of(make_case(Provider("compile", broken), provider_of("accel", lambda x, y: x * y), modes=["forward"]))
    assert (rows[0].status, rows[0].reason) == ("unavailable", "RuntimeError: no compiler here")
    assert rows[1].p50_ms is not None


def test_backward_alone_times_the_gradient_and_is_right() -> None:
    rows = rows_of(make_case(provider_of("accel", lambda x, y: x * y), modes=["backward"]), _timing.CpuClock())
    assert rows[0].status == "ok"
    assert rows[0].samples + rows[0].left_out >= 3, "rounds in which the machine was not itself are left out"
    assert rows[0].p50_ms is not None
    assert rows[0].p50_ms > 0.0


# --- goals ---


def test_a_speedup_is_the_geometric_mean_over_variants() -> None:
    rows = [row_of("accel", 1), row_of("eager", 8), row_of("accel", 2, "shift 3"), row_of("eager", 4, "shift 3")]
    verdict = goals.reach(FASTER, rows, {})
    assert verdict.measured == pytest.approx(4.0)
    assert verdict.met is True
    slow = goals.reach(FASTER, [row_of("accel", 4), row_of("eager", 6)], {})
    assert (slow.measured, slow.met) == (pytest.approx(1.5), False)


def test_what_cannot_be_measured_is_not_judged_but_a_wrong_result_misses() -> None:
    assert goals.reach(FASTER, [row_of("eager", 1)], {}).met is None
    absent = goals.reach(FASTER, [row_of("accel", 1), row_of("eager", None, status="unavailable", reason="gone")], {})
    assert (absent.met, absent.note) == (None, "eager: gone")
    wrong = goals.reach(FASTER, [row_of("accel", None, status="FAIL", reason="off by one"), row_of("eager", 1)], {})
    assert wrong.met is False
    assert "off by one" in wrong.note


def test_goals_of_memory_floor_and_value() -> None:
    rows = [row_of("accel", 3, peak_mib=5.0, floor_ms=2.0), row_of("eager", 6, peak_mib=10.0)]
    memory = Goal("memory", "window_attention", "memory", "cpu", WHERE, "eager", at_most=0.4)
    floor = Goal("floor", "window_attention", "floor", "cpu", WHERE, at_most=1.5)
    value = Goal("value", "window_attention", "value", "cpu", at_most=2.0)
    got = [goals.reach(goal, rows, {"value": 3.0}) for goal in (memory, floor, value)]
    assert [(v.measured, v.met) for v in got] == [(0.5, False), (1.5, True), (3.0, False)]
    assert goals.reach(value, rows, {}).met is None


def test_goals_of_rate_and_growth() -> None:
    small, large = ({**WHERE, "group": group} for group in ("stage 1", "stage 2"))
    rows = [
        row_of("accel", 3, peak_mib=5.0, tflops=2.0),
        row_of("triton", 3, peak_mib=5.0, tflops=8.0),
        dataclasses.replace(row_of("accel", 3, peak_mib=15.0, tflops=4.0), group="stage 2"),
        dataclasses.replace(row_of("accel", 3, peak_mib=99.0), group="stage 2", variant="another"),
    ]
    rate = Goal("rate", "window_attention", "rate", "cpu", small, at_least=3.0)
    theirs = Goal("theirs", "window_attention", "rate", "cpu", small, at_least=3.0, of="triton")
    growth = Goal("growth", "window_attention", "growth", "cpu", large, at_most=2.5, base={"group": "stage 1"})
    got = [goals.reach(goal, rows, {}) for goal in (rate, theirs, growth)]
    assert [(v.measured, v.met) for v in got] == [
        (pytest.approx(2.0), False),
        (pytest.approx(8.0), True),
        (pytest.approx(3.0), False),
    ]


def test_goals_of_time_by_length_and_of_memory_beside_the_results() -> None:
    times = (("1K", 1000, 2.0, 9.0), ("4K", 4000, 10.0, 15.0), ("16K", 16000, 36.0, 40.0))
    rows = [row_of("accel", ms, v, tokens=n, peak_mib=peak, kept_mib=n / 1000) for v, n, ms, peak in times]
    rows += [row_of("eager", 1.0, "1K", tokens=1000, peak_mib=99.0, kept_mib=1.0)]
    spread = Goal("flat", "window_attention", "spread", "cpu", WHERE, at_most=1.25)
    extra = Goal("extra", "window_attention", "extra", "cpu", WHERE, at_most=20.0)
    found = [goals.reach(goal, rows, {}) for goal in (spread, extra)]
    assert [(v.measured, v.met) for v in found] == [(pytest.approx(2.5 / 2.0), True), (pytest.approx(24.0), False)]
    assert goals.reach(spread, rows[:1], {}).met is None, "one length says nothing"
    assert goals.reach(extra, [row_of("accel", 1.0)], {}).met is None
    held = goals.reach(extra, [row_of("accel", 1.0, peak_mib=1.0, kept_mib=2.0)], {})
    assert (held.measured, held.met) == (pytest.approx(goals.PAGE), True)


def test_a_row_knows_its_tokens_and_what_its_results_take() -> None:
    case = dataclasses.replace(make_case(provider_of("accel", torch.mul)), tokens=3)
    assert [(row.mode, row.tokens, row.kept_mib) for row in rows_of(case)] == [
        ("forward", 3, 24 * 4 / 2**20), ("forward+backward", 3, (24 + 8) * 4 / 2**20)
    ]  # fmt: skip
    assert "ns a token" in _tables.row_cells(rows_of(case)[0], None)[-1]


def test_goals_for_the_kind_of_machine() -> None:
    def of(multiply: float, mm: float, level: str) -> set[str]:
        return goals.kinds(dataclasses.replace(CEILINGS, multiply={"fp32": multiply}, mm={"fp32": mm}), level)

    assert of(1.6e9, 1e9, "avx512_bf16") == {"wide", "dots"}
    assert of(1.5e9, 1e9, "avx512") == {"even"}
    assert goals.kinds(CEILINGS, "") == {"even"}, "nothing is known of torch.mm"
    every = [FASTER, *(dataclasses.replace(FASTER, machine=kind) for kind in ("wide", "even", "dots"))]
    assert [goal.machine for goal in goals.fitting(every, {"even", "dots"})] == ["", "even", "dots"]


def test_a_figure_is_divided_by_what_the_work_saved_explains() -> None:
    goal = dataclasses.replace(FASTER, at_least=0.9, per=2.5)
    verdict = goals.reach(goal, [row_of("accel", 4), row_of("eager", 8)], {})
    assert (verdict.measured, verdict.met) == (pytest.approx(0.8), False)


def test_a_yardstick_is_judged_by_what_it_computes() -> None:
    def first(x: Tensor, y: Tensor) -> Tensor:
        return (2 * x)[:2]

    right = Provider("half the work", lambda: first, computes=first)
    wrong = Provider("nearly", lambda: lambda x, y: first(x, y) * 1.01, computes=first)
    rows = rows_of(make_case(provider_of("accel", lambda x, y: x * y), right, wrong))
    assert [(row.provider, row.status) for row in rows] == 2 * [
        ("accel", "ok"), ("half the work", "ok"), ("nearly", "FAIL")
    ]  # fmt: skip


def test_a_gradient_of_a_parameter_in_another_dtype_is_judged_in_that() -> None:
    case = dataclasses.replace(
        make_case(
            provider_of("accel", lambda x, y: (x * y).bfloat16()),
            provider_of("eager", lambda x, y: (x * _Rounded.apply(y)).bfloat16()),
        ),
        dtype=torch.bfloat16,
        inputs=lambda g: (torch.randn(3, 8, generator=g).bfloat16(), torch.randn(8, generator=g)),
    )
    rows = [row for row in rows_of(case) if row.mode == "forward+backward"]
    assert [row.status for row in rows] == ["ok", "ok"], [row.reason for row in rows]


class _Rounded(torch.autograd.Function):
    """Passes the values on, and rounds the gradient as half arithmetic would."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad.bfloat16().float()


@pytest.mark.parametrize("module", _choice.OPS.values(), ids=_choice.OPS)
def test_every_goal_and_pick_is_about_rows_that_exist(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = [torch.float32, torch.bfloat16]
    for device in ("cpu", "cuda"):
        if device == "cuda":  # what is put there beside the inputs
            elsewhere = {n: _on_cpu(getattr(torch, n)) for n in ("arange", "tensor")}
            for name, function in elsewhere.items():
                monkeypatch.setattr(module.torch, name, function)
            monkeypatch.setattr(Tensor, "to", _to_cpu(Tensor.to))
        found = [
            (case, harness.dtype_name(case.dtype), mode) for case in module.cases(device, dtypes) for mode in case.costs
        ]
        for pick in module.SHORT.picks(device):
            modes = {m for case, _, m in found if (case.group, case.variant) == (pick.group, pick.variant)}
            assert modes & set(pick.modes), pick.title
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
    assert goals.reach(goal, rows, {}).measured == pytest.approx(2.5)
    assert goals.reach(dataclasses.replace(goal, rival="a"), rows, {}).measured == pytest.approx((1.5 * 2.5) ** 0.5)


def _field(case: Case, dtype: str, mode: str, name: str) -> str:
    return {"dtype": dtype, "mode": mode}.get(name) or getattr(case, name)


def _on_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: function(*args, **{n: v for n, v in kwargs.items() if n != "device"})


def _to_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *args, **kwargs: x if args == ("cuda",) else function(x, *args, **kwargs)


def test_what_is_cold_lies_elsewhere_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the inputs that are named take turns, more of them than a cache holds; the results are the same."""
    seen: list[tuple[int, int]] = []

    def function(x: Tensor, y: Tensor) -> Tensor:
        seen.append((x.data_ptr(), y.data_ptr()))
        return x * y

    case = dataclasses.replace(make_case(provider_of("accel", function)), cold=(1,))
    x, y = case.inputs(torch.Generator().manual_seed(0))
    monkeypatch.setattr(harness, "COLD", 3 * y.nbytes)
    turns = harness._turns(case, (x, y))
    assert len(turns) == 3
    assert len({b.data_ptr() for _, b in turns}) == 3
    assert all(a is x and torch.equal(b, y) for a, b in turns)
    for mode in ("forward", "backward", "forward+backward"):
        contender = harness._contender(case.providers[0], mode, function, turns, torch.ones_like(x * y))
        seen.clear()
        for _ in range(4):
            if contender.prepare is not None:
                contender.prepare()
            contender.call()
        assert [b for _, b in seen] == [turns[i % 3][1].data_ptr() for i in range(4)], mode
        assert len({a for a, _ in seen}) == 1
    assert harness._turns(dataclasses.replace(case, cold=()), (x, y)) == [(x, y)]
