"""Measuring: providers interleaved in one process, each proven right before it is timed.

A benchmark file describes :class:`Case`s (what is computed, by whom, at what cost) and :class:`Goal`s. ``run_case``
turns a case into :class:`Row`s, one per mode and provider. Nothing here knows any op.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from accel.benchmarks._machine import Ceilings, dtype_name, peak_memory
from accel.benchmarks._timing import Clock, Contender, Effort, Timing, measure
from accel.testing import TOLERANCES, Tolerance, threads

OURS = "accel"
ONE_THREAD = "one thread"  # ours again, to see what more threads gain
# The tolerance table is for kernels that round once. Rivals round every intermediate to the dtype: they may be four
# times as far off in the mean, and in half precision their single rows (measured up to 0.1 off, in the bias table's
# gradient) are not held; their fp32 rows are, and show that they compute the same function.
RIVAL_SLACK = 4.0
LARGE = 1 << 26  # elements of an input beyond which the reference is fp32: fp64 would take eight times the input
MODES = ("forward", "backward", "forward+backward")


# --- what a benchmark file describes ---


class UnavailableError(Exception):
    """Raised by a provider's ``build``: the sentence is what its row shows in place of a speed."""


@dataclass(frozen=True)
class Provider:
    """Somebody's way to compute a case. ``build`` may take long (compile) or raise; ``backend`` names what runs.

    ``computes`` is for a yardstick, which computes something else of the same inputs: the function it is judged by.
    ``threads`` are those it runs on, the process's own if 0.
    """

    name: str
    build: Callable[[], Callable[..., Tensor]]
    backend: Callable[..., str] = lambda *inputs: ""
    computes: Callable[..., Tensor] | None = None
    threads: int = 0


def one_thread(build: Callable[[], Callable[..., Tensor]], backend: Callable[..., str]) -> Provider:
    """Ours on one thread, beside ours on all of them."""

    def build_if_more() -> Callable[..., Tensor]:
        if torch.get_num_threads() == 1:
            raise UnavailableError("the process has no more than one thread")
        return build()

    return Provider(ONE_THREAD, build_if_more, backend, threads=1)


@dataclass(frozen=True)
class Cost:
    """The least work of one call: FLOPs (a multiply-add is two) and bytes that must move."""

    flops: int
    moved: int


@dataclass(frozen=True)
class Case:
    """One shape and dtype of an op. The inputs are all differentiable, small parameters may be fp32 beside a half
    dtype; the reference takes them in any dtype."""

    op: str
    group: str
    variant: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]]
    reference: Callable[..., Tensor]
    providers: tuple[Provider, ...]
    costs: Mapping[str, Cost]  # mode -> cost; its keys are the modes to measure
    family: str  # of accel.testing.TOLERANCES; gradients are judged by family + "_grad"

    @property
    def label(self) -> str:
        return " ".join(x for x in (self.group, self.variant, dtype_name(self.dtype)) if x)


@dataclass
class Row:
    """One provider in one mode of one case. Times are missing where the result was wrong or there was none."""

    op: str
    group: str
    variant: str
    shape: str
    dtype: str
    mode: str
    device: str
    provider: str
    backend: str = ""
    status: str = "ok"  # ok, FAIL (wrong result), unavailable
    reason: str = ""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    cpu_ms: float | None = None  # CPU time of a call over all threads; on a GPU the host's time to launch it
    samples: int = 0
    left_out: int = 0  # rounds beside them in which the machine was slower than at its best
    attempts: int = 0
    disturbed: str = ""
    tflops: float | None = None
    gbs: float | None = None
    floor_ms: float | None = None  # what the measured ceilings would allow
    of_ceiling: float | None = None  # floor_ms / p50_ms
    peak_mib: float | None = None
    error: float | None = None  # relative RMS, the worst of output and gradients
    calls: int | None = None  # calls of our op inside a patched model, a forward pass
    command: str = ""

    @property
    def label(self) -> str:
        return " ".join(x for x in (self.group, self.variant, self.dtype) if x)


# --- the gate ---


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the error over RMS of the reference; infinite where NaN or infinities stand in other places."""
    if actual.shape != expected.shape:
        return math.inf
    a, e = actual.detach().to(expected.dtype), expected.detach()
    finite = torch.isfinite(e)
    if not torch.equal(finite, torch.isfinite(a)) or a.numel() == 0:
        return math.inf if a.numel() else 0.0
    error = torch.where(finite, a - e, 0).square().mean().sqrt().item()
    scale = torch.where(finite, e, 0).square().mean().sqrt().item()
    return error / scale if scale else (math.inf if error else 0.0)


def judge(actual: Tensor, expected: Tensor, limit: Tolerance, what: str, slack: float = 1.0) -> tuple[float, str]:
    """The error, and why it is too large (nothing if it is not): the mean over all, and the worst row of the last
    axis, which alone sees one bad element in a million. Stays on the device."""
    if actual.shape != expected.shape:
        return math.inf, f"{what}: {tuple(actual.shape)=}, {tuple(expected.shape)=}"
    rms = relative_rms(actual, expected)
    if not rms <= limit.rms * slack:
        return rms, f"{what}: relative RMS error {rms:.2e} > {limit.rms * slack:.2e}"
    if actual.numel() == 0 or (slack > 1.0 and actual.dtype.itemsize < 4):
        return rms, ""
    e = expected.detach()
    error = (actual.detach().to(e.dtype) - e).abs().nan_to_num(0.0)
    mean = e.nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt()
    size = e.abs().nan_to_num(0.0, 0.0, 0.0).amax(-1).clamp_min(mean)
    row = torch.where(error.amax(-1) == 0, 0.0, error.amax(-1) / size).max().item()  # 0 is right where all is 0
    if not row <= limit.row * slack:
        return rms, f"{what}: largest error in a row is {row:.2e} of its largest value > {limit.row * slack:.2e}"
    return rms, ""


def _run(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor | None) -> list[Tensor]:
    """The output, followed by the gradients of all inputs where ``grad`` is given."""
    if grad is None:
        with torch.no_grad():
            return [function(*inputs)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype), materialize_grads=True)]


@dataclass(frozen=True)
class Truth:
    """The reference's results, and how far a provider may be from them."""

    forward: list[Tensor]
    both: list[Tensor]
    dtypes: list[torch.dtype]  # of the output and of each gradient
    grad: Tensor  # of the output, that the gradients are for

    def judge(self, got: list[Tensor], case: Case, slack: float) -> tuple[float, str]:
        expected = self.forward if len(got) == 1 else self.both
        worst = 0.0
        for i, (a, e) in enumerate(zip(got, expected, strict=True)):
            what = "output" if i == 0 else f"gradient {i - 1}"
            limit = TOLERANCES[case.family + ("_grad" if i else ""), case.dtype]
            if a.dtype != self.dtypes[i]:
                return math.inf, f"{what}: {a.dtype=}, expected {self.dtypes[i]}"
            error, reason = judge(a, e, limit, what, slack)
            worst = max(worst, error)
            if reason:
                return worst, reason
        return worst, ""


def _truth(case: Case, function: Callable[..., Tensor], inputs: Sequence[Tensor], training: bool, seed: int) -> Truth:
    """What ``function`` gives for the inputs, and an upstream gradient of the output's shape."""
    inner = torch.float64 if max(x.numel() for x in inputs) <= LARGE else torch.float32
    wide = [x.to(inner) for x in inputs]
    with torch.no_grad():
        like = function(*wide)
    device = inputs[0].device
    generator = torch.Generator(device).manual_seed(seed + 1)
    grad = torch.randn(like.shape, generator=generator, device=device, dtype=torch.float32).to(case.dtype)
    both = _run(function, wide, grad.to(inner)) if training else [like]
    return Truth(both[:1], both, [case.dtype, *(x.dtype for x in inputs)], grad)


def _truths(case: Case, inputs: Sequence[Tensor], modes: Sequence[str], seed: int) -> Callable[[Provider], Truth]:
    """What is right for each provider: the case's own truth, but for yardsticks. Each is found once, when needed."""
    training = any(mode != "forward" for mode in modes)
    found: dict[Callable[..., Tensor], Truth] = {}

    def of(provider: Provider) -> Truth:
        function = provider.computes or case.reference
        if function not in found:
            found[function] = _truth(case, function, inputs, training, seed)
        return found[function]

    return of


def _slack(provider: Provider) -> float:
    return 1.0 if provider.name in (OURS, ONE_THREAD) else RIVAL_SLACK


# --- a case becomes rows ---


def _contender(
    provider: Provider, mode: str, function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> Contender:
    leaves = [x.detach().requires_grad_() for x in inputs]
    made: list[Tensor] = []

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    def prepare() -> None:
        made[:] = [function(*leaves)]

    def backward() -> object:
        return torch.autograd.grad(made.pop(), leaves, grad, allow_unused=True)

    def both() -> object:
        return torch.autograd.grad(function(*leaves), leaves, grad, allow_unused=True)

    def on_its_threads() -> object:
        with threads(provider.threads):
            return call()

    call = {"forward": forward, "backward": backward, "forward+backward": both}[mode]
    timed = on_its_threads if provider.threads else call
    return Contender(provider.name, timed, prepare if mode == "backward" else None)


def one_line(error: BaseException, most: int = 240) -> str:
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if not isinstance(error, UnavailableError) else text
    return text if len(text) <= most else text[: most - 1] + "…"


def fill_timing(row: Row, timing: Timing, cost: Cost | None, ceilings: Ceilings) -> None:
    """Write a timing into a row, with what follows from it and the case's cost."""
    row.p20_ms, row.p50_ms, row.p80_ms = 1e3 * timing.p20, 1e3 * timing.p50, 1e3 * timing.p80
    row.cpu_ms = 1e3 * timing.cpu
    row.samples, row.left_out = timing.samples, timing.left_out
    row.attempts, row.disturbed = timing.attempts, timing.disturbed
    if cost is not None:
        row.tflops = cost.flops / timing.p50 / 1e12
        row.gbs = cost.moved / timing.p50 / 1e9
        row.floor_ms = ceilings.floor_ms(cost.flops, cost.moved, row.dtype)
        row.of_ceiling = row.floor_ms / row.p50_ms


def run_case(
    case: Case,
    *,
    device: str,
    clock: Clock,
    effort: Effort,
    ceilings: Ceilings,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    command: Callable[[Row], str] = lambda row: "",
) -> Iterator[list[Row]]:
    """Yield the rows of each mode of ``case``: built, proven against the reference, then timed together."""
    say(f"{case.label}: reference")
    inputs = case.inputs(torch.Generator(device).manual_seed(seed))
    truths = _truths(case, inputs, list(case.costs), seed)

    built: dict[str, Callable[..., Tensor]] = {}
    refused: dict[str, str] = {}
    for provider in case.providers:
        say(f"{case.label}: {provider.name} is built")
        try:
            built[provider.name] = provider.build()
        except Exception as error:  # a rival that cannot be built is a fact for the table, not the end of the run
            refused[provider.name] = one_line(error)

    for mode, cost in case.costs.items():
        rows, contenders = [], []
        for provider in case.providers:
            row = Row(
                case.op, case.group, case.variant, case.shape, dtype_name(case.dtype), mode, device, provider.name
            )
            row.command = command(row)
            rows.append(row)
            if provider.name in refused:
                row.status, row.reason = "unavailable", refused[provider.name]
                continue
            say(f"{case.label} {mode}: {provider.name} against the reference")
            function = built[provider.name]
            try:
                row.backend = provider.backend(*inputs)
                truth = truths(provider)
                got = _run(function, inputs, None if mode == "forward" else truth.grad)
                row.error, row.reason = truth.judge(got, case, _slack(provider))
                del got
                if row.reason:
                    row.status = "FAIL"
                    continue
                contender = _contender(provider, mode, function, inputs, truth.grad)
                row.peak_mib = _peak(contender, device)
            except Exception as error:
                row.status, row.reason = "unavailable", one_line(error)
                if provider.name == OURS:
                    row.status = "FAIL"
                continue
            contenders.append(contender)
        say(f"{case.label} {mode}: timing")
        timings = measure(contenders, clock, effort, device)
        for row in rows:
            if row.provider in timings:
                fill_timing(row, timings[row.provider], cost, ceilings)
        yield rows


class Alone:
    """One provider in one mode, judged and ready to be timed by somebody else's clock."""

    def __init__(self, case: Case, provider: Provider, mode: str, device: str, seed: int) -> None:
        inputs = case.inputs(torch.Generator(device).manual_seed(seed))
        truth = _truths(case, inputs, [mode], seed)(provider)
        function = provider.build()
        self.backend = provider.backend(*inputs)
        got = _run(function, inputs, None if mode == "forward" else truth.grad)
        self.error, self.reason = truth.judge(got, case, _slack(provider))
        self.contender = _contender(provider, mode, function, inputs, truth.grad)


def _peak(contender: Contender, device: str) -> float | None:
    if contender.prepare is None:
        return peak_memory(contender.call, device)
    contender.prepare()
    return peak_memory(contender.call, device)


# --- goals ---


@dataclass(frozen=True)
class Goal:
    """A figure to reach, as data beside the benchmark it judges. ``at_least`` or ``at_most`` is given.

    ``figure``: ``speedup`` is the rival's median over ours; ``floor`` is our median over the time of the measured
    memory bandwidth; ``rate`` is our TFLOP/s; ``memory`` is our peak over the rival's; ``growth`` is our peak over that
    of our row which is as ``base`` says; ``value`` is a number the benchmark itself reports under the goal's name. All
    but the last are geometric means over the rows.

    ``rival`` may name several, as in ``"conv2d|matmul"``: each row is held against the slowest of them.

    ``per`` is what a figure is divided by: the part of it that the work saved explains. ``of`` names whose rows are
    meant where they are not ours.
    """

    name: str
    op: str
    figure: str
    device: str
    where: Mapping[str, str] = field(default_factory=dict)  # field of Row -> value; variants are what is averaged over
    rival: str = ""
    at_least: float | None = None
    at_most: float | None = None
    stretch: float | None = None
    per: float = 1.0
    of: str = OURS
    base: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Verdict:
    """What was measured for a goal. ``met`` is None where nothing could be measured; ``note`` says why."""

    goal: Goal
    measured: float | None = None
    met: bool | None = None
    note: str = ""

    @property
    def target(self) -> str:
        goal = self.goal
        return f"≥ {goal.at_least:g}" if goal.at_least is not None else f"≤ {goal.at_most:g}"


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def _key(row: Row) -> tuple[str, ...]:
    return row.op, row.group, row.variant, row.shape, row.dtype, row.mode, row.device


def pairs(rows: Sequence[Row], rival: str, of: str = OURS) -> Iterator[tuple[Row, Row]]:
    """Our row and the rival's of the same case and mode, the slowest where several are named."""
    named = [row for row in rows if row.provider in rival.split("|")]
    rivals = {_key(row): row for row in sorted(named, key=lambda row: row.p50_ms or 0.0)}
    for row in rows:
        if row.provider == of and _key(row) in rivals:
            yield row, rivals[_key(row)]


def concerns(goal: Goal, row: Row) -> bool:
    """Whether the goal is about this row."""
    same = (row.op, row.device) == (goal.op, goal.device)
    return same and all(getattr(row, name) == value for name, value in goal.where.items())


def reach(goal: Goal, rows: Sequence[Row], values: Mapping[str, float]) -> Verdict:
    """Hold a goal against what was measured. A wrong result of ours misses; an absent rival only goes unjudged."""
    verdict = Verdict(goal)
    if goal.figure == "value":
        if goal.name not in values:
            verdict.note = "not measured in this run"
            return verdict
        verdict.measured = values[goal.name]
    else:
        mine = [row for row in rows if row.provider == goal.of and concerns(goal, row)]
        wrong = [row for row in mine if row.status == "FAIL"]
        if wrong:
            verdict.met, verdict.note = False, f"{wrong[0].label}: {wrong[0].reason}"
            return verdict
        figures, note = _figures(goal, mine, rows)
        if not figures:
            verdict.note = note or "not measured in this run"
            return verdict
        verdict.measured, verdict.note = geometric_mean(figures) / goal.per, note
    measured = verdict.measured
    verdict.met = measured >= goal.at_least if goal.at_least is not None else measured <= (goal.at_most or 0.0)
    return verdict


def _figures(goal: Goal, mine: Sequence[Row], rows: Sequence[Row]) -> tuple[list[float], str]:
    if goal.figure == "floor":
        return [row.p50_ms / row.floor_ms for row in mine if row.p50_ms and row.floor_ms], ""
    if goal.figure == "rate":
        return [row.tflops for row in mine if row.tflops], ""
    if goal.figure == "growth":
        return _growth(goal, mine, rows), ""
    figures, notes = [], []
    theirs = [r for r in rows if r.provider in goal.rival.split("|")]
    for row, rival in pairs([*mine, *theirs], goal.rival, goal.of):
        if rival.reason:
            notes.append(f"{rival.provider}: {rival.reason}")
        elif goal.figure == "memory" and row.peak_mib and rival.peak_mib:
            figures.append(row.peak_mib / rival.peak_mib)
        elif goal.figure == "speedup" and row.p50_ms and rival.p50_ms:
            figures.append(rival.p50_ms / row.p50_ms)
    return figures, "; ".join(dict.fromkeys(notes))


def _growth(goal: Goal, mine: Sequence[Row], rows: Sequence[Row]) -> list[float]:
    """Our peak over that of the row which differs in ``goal.base`` alone (its shape, which goes with that, beside)."""
    smaller = replace(goal, where={**goal.where, **goal.base})
    bases = {r.variant: r for r in rows if r.provider == goal.of and concerns(smaller, r)}
    found = [(row.peak_mib, bases[row.variant].peak_mib) for row in mine if row.variant in bases]
    return [peak / base for peak, base in found if peak and base]


def to_json(value: Any) -> Any:
    """Plain data of a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
