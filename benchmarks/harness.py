"""Measuring: providers interleaved in one process, each proven right before it is timed.

A benchmark file describes :class:`Case`s (what is computed, by whom, at what cost) and which of them a user cares about
most (:class:`Short`). ``run_case`` turns a case into :class:`Row`s, one per mode and provider. Nothing here knows ops.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.benchmarks._ceilings import Ceilings
from accel.benchmarks._machine import MIB, dtype_name, peak_memory
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
COLD = 1 << 28  # bytes of what is to be cold, over all its copies: more than a last-level cache holds


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


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` through torch.compile, for its shapes alone."""
    torch._dynamo.reset()  # the limit of recompilations counts per function, and beyond it eager code would run
    return torch.compile(function, fullgraph=True, dynamic=False)


@dataclass(frozen=True)
class Cost:
    """The least work of one call: FLOPs (a multiply-add is two) and bytes that must move."""

    flops: int
    moved: int


@dataclass(frozen=True)
class Case:
    """One shape and dtype of an op. The inputs are differentiable, small parameters may be fp32 beside a half dtype;
    the reference takes them in any dtype. Integers and numbers of eight bits are handed on as they are."""

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
    tokens: int | None = None  # of the whole batch, where the time a token is of interest
    cold: tuple[int, ...] = ()  # inputs that no cache holds in use: weights of which a step reads a part, once

    @property
    def label(self) -> str:
        return " ".join(x for x in (self.group, self.variant, dtype_name(self.dtype)) if x)


@dataclass(frozen=True)
class Pick:
    """A case of the short run, in its ``modes`` that are named here; ``title`` is its name for a visitor."""

    title: str
    group: str
    variant: str = ""
    modes: tuple[str, ...] = MODES


@dataclass(frozen=True)
class Short:
    """What the short run measures of an op: two or three cases by device, what matters most first, in two dtypes.

    ``rivals`` are measured there beside ours; the first that has a time is the one our speed-up is shown against.
    """

    rivals: tuple[str, ...]
    cpu: tuple[Pick, ...]
    cuda: tuple[Pick, ...]

    def picks(self, device: str) -> tuple[Pick, ...]:
        return self.cuda if device == "cuda" else self.cpu


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
    ceiling: str = ""  # what floor_ms was taken from
    peak_mib: float | None = None
    kept_mib: float | None = None  # the part of it that the results take
    tokens: int | None = None
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
    if not expected.is_floating_point():
        actual, expected = actual.float(), expected.float()
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
    leaves = _leaves(inputs)
    out = function(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(out.dtype), materialize_grads=True)]


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
    wide = [x.detach().to(inner).requires_grad_(training) if _has_gradient(x) else x for x in inputs]
    with torch.set_grad_enabled(training):
        out = function(*wide)
    device = inputs[0].device
    generator = torch.Generator(device).manual_seed(seed + 1)
    grad = torch.randn(out.shape, generator=generator, device=device, dtype=torch.float32).to(case.dtype)
    both = [out.detach()]
    if training:
        wanted = [x for x in wide if x.requires_grad]
        both += torch.autograd.grad(out, wanted, grad.to(inner), materialize_grads=True)
    made = case.dtype if out.is_floating_point() else out.dtype
    return Truth(both[:1], both, [made, *(x.dtype for x in inputs if _has_gradient(x))], grad)


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


def _has_gradient(x: Tensor) -> bool:
    return x.is_floating_point() and x.itemsize > 1


def _leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_(_has_gradient(x)) for x in inputs]


def _turns(case: Case, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The inputs, and others in which copies stand for what is cold: called in turn, each is out of every cache."""
    size = sum(inputs[i].nbytes for i in case.cold)
    copies = -(-COLD // size) - 1 if size else 0
    others = [tuple([x.clone() if i in case.cold else x for i, x in enumerate(inputs)]) for _ in range(copies)]
    return [inputs, *others]


def _contender(
    provider: Provider, mode: str, function: Callable[..., Tensor], turns: Sequence[Sequence[Tensor]], grad: Tensor
) -> Contender:
    plain = itertools.cycle(turns)
    training = itertools.cycle([_leaves(inputs) for inputs in turns])
    made: list[tuple[Tensor, list[Tensor]]] = []

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*next(plain))

    def prepare() -> None:
        leaves = next(training)
        made[:] = [(function(*leaves), leaves)]

    def backward() -> object:
        out, leaves = made.pop()
        return torch.autograd.grad(out, [x for x in leaves if x.requires_grad], grad, allow_unused=True)

    def both() -> object:
        leaves = next(training)
        wanted = [x for x in leaves if x.requires_grad]
        return torch.autograd.grad(function(*leaves), wanted, grad, allow_unused=True)

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


def fill_timing(row: Row, timing: Timing, cost: Cost | None, ceilings: Ceilings, cold: bool = False) -> None:
    """Write a timing into a row, with what follows from it and the case's cost, of bytes in no cache if ``cold``."""
    row.p20_ms, row.p50_ms, row.p80_ms = 1e3 * timing.p20, 1e3 * timing.p50, 1e3 * timing.p80
    row.cpu_ms = 1e3 * timing.cpu
    row.samples, row.left_out = timing.samples, timing.left_out
    row.attempts, row.disturbed = timing.attempts, timing.disturbed
    if cost is not None:
        row.tflops = cost.flops / timing.p50 / 1e12
        row.gbs = cost.moved / timing.p50 / 1e9
        row.floor_ms = ceilings.floor_ms(cost.flops, cost.moved, row.dtype, cold)
        row.of_ceiling = row.floor_ms / row.p50_ms
        row.ceiling = ceilings.source(cost.flops, cost.moved, row.dtype, cold)


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
    turns = _turns(case, inputs)

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
            row.command, row.tokens = command(row), case.tokens
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
                kept = got if mode == "forward" else got[1:]
                kept_mib = sum(x.numel() * x.element_size() for x in kept) / MIB
                del got, kept
                if row.reason:
                    row.status = "FAIL"
                    continue
                contender = _contender(provider, mode, function, turns, truth.grad)
                row.peak_mib, row.kept_mib = _peak(contender, device), kept_mib
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
                fill_timing(row, timings[row.provider], cost, ceilings, bool(case.cold))
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
        self.contender = _contender(provider, mode, function, _turns(case, inputs), truth.grad)


def _peak(contender: Contender, device: str) -> float | None:
    if contender.prepare is None:
        return peak_memory(contender.call, device)
    contender.prepare()
    return peak_memory(contender.call, device)


def to_json(value: Any) -> Any:
    """Plain data of a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
