"""Gated attention: rows, rivals, costs and goals.

``eager`` is the formula as papers and libraries write it, with every weight in memory, and ``compile`` the same through
torch.compile. ``strips`` is our own backend of torch's products, 256 queries at a time: what runs where no kernel does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import accel
from accel import dispatch
from accel.benchmarks.goals import DOTS, EVEN, WIDE, Goal, by_machine
from accel.benchmarks.harness import Case, Cost, Pick, Provider, Short, compiled
from accel.ops.linear.gau_attention import OP

NAME = "gau_attention"
PROVIDERS = ("accel", "strips", "eager", "compile")
FORWARD, BOTH = "forward", "forward+backward"
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    tokens: int
    causal: bool = False
    batch: int = 1
    size: int = 128  # of queries and keys
    width: int = 1024  # of values and gate
    kind: str = ""

    @property
    def group(self) -> str:
        return f"{self.kind or ('causal' if self.causal else 'full')} {self.tokens}"

    @property
    def pairs(self) -> float:
        return self.batch * self.tokens**2 * (0.5 if self.causal else 1.0)

    def __str__(self) -> str:
        return f"B{self.batch} T{self.tokens} s{self.size} E{self.width}"


# --- costs ---


def costs(shape: Shape, itemsize: int, modes: Sequence[str]) -> dict[str, Cost]:
    """Forward q·k and weights times values; backward q·k again and two more of it, and two with values.

    Forward reads q, k, v, the gate and writes the output; backward reads these and the output's gradient, and writes
    four gradients.
    """
    narrow, wide = 2 * shape.pairs * shape.size, 2 * shape.pairs * shape.width
    given = shape.batch * shape.tokens * (2 * shape.size + 2 * shape.width) * itemsize
    out = shape.batch * shape.tokens * shape.width * itemsize
    forward, backward = Cost(int(narrow + wide), given + out), Cost(int(3 * narrow + 2 * wide), 2 * given + out)
    both = Cost(forward.flops + backward.flops, forward.moved + backward.moved)
    known = {FORWARD: forward, "backward": backward, BOTH: both}
    return {mode: known[mode] for mode in modes}


# --- what is computed ---


def ours(shape: Shape, backend: str | None = None) -> Function:
    def function(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return accel.gau_attention(q, k, v, gate, causal=shape.causal, backend=backend)

    return function


def eager(shape: Shape) -> Function:
    """The square of what is positive, without what a query must not see, times values and gate."""

    def function(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        weights = torch.relu((q @ k.transpose(-1, -2)) * shape.size**-0.5).square()
        if shape.causal:
            weights = weights.tril()
        return (weights @ v) * gate

    return function


def _backend(shape: Shape) -> Callable[..., str]:
    return lambda *inputs: dispatch.select(OP, OP.prepare(*inputs, causal=shape.causal)).name


def _inputs(shape: Shape, device: str, dtype: torch.dtype) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        sizes = (shape.size, shape.size, shape.width, shape.width)
        tokens = (shape.batch, shape.tokens)
        return tuple([torch.randn(*tokens, n, generator=generator, device=device).to(dtype) for n in sizes])

    return make


def _case(shape: Shape, device: str, dtype: torch.dtype, modes: Sequence[str]) -> Case:
    plain = eager(shape)
    return Case(
        op=NAME,
        group=shape.group,
        variant="",
        shape=str(shape),
        dtype=dtype,
        inputs=_inputs(shape, device, dtype),
        reference=plain,
        providers=(
            Provider("accel", lambda: ours(shape), backend=_backend(shape)),
            Provider("strips", lambda: ours(shape, "torch"), backend=lambda *inputs: "torch"),
            Provider("eager", lambda: plain),
            Provider("compile", lambda: compiled(plain)),
        ),
        costs=costs(shape, dtype.itemsize, modes),
        family="gau",
    )


# --- all rows ---

PEOPLE = Shape(17, batch=8, width=512, kind="RTMPose")  # a head of RTMPose: 17 joints are the tokens
CPU = (Shape(2048, causal=True), Shape(2048), Shape(4096, causal=True), PEOPLE)
CUDA = (Shape(2048, causal=True, batch=8), Shape(2048, batch=8), Shape(8192, causal=True), PEOPLE)


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op, those that goals are about first."""
    for dtype in dtypes:
        for shape in CUDA if device == "cuda" else CPU:
            yield _case(shape, device, dtype, [FORWARD, BOTH])


SHORT = Short(
    rivals=("eager",),
    cpu=(Pick("gated attention, 2048 tokens", CPU[0].group, modes=(FORWARD,)),),
    cuda=(Pick("gated attention, 2048 tokens", CUDA[0].group),),
)


# --- goals ---

BOUNDS = {
    ("causal 2048", EVEN, "fp32"): (1.8, 1.8),
    ("causal 2048", WIDE, "fp32"): (3.5, 3.4),
    ("causal 2048", DOTS, "bf16"): (1.9, 1.6),
    ("full 2048", EVEN, "fp32"): (1.0, 1.0),
    ("full 2048", WIDE, "fp32"): (2.0, 1.8),
    ("full 2048", DOTS, "bf16"): (1.05, 1.0),
}


def _goals() -> Iterator[Goal]:
    yield from by_machine(NAME, BOUNDS, dict.fromkeys(("causal 2048", "full 2048"), ("eager", "compile")))
    for dtype in ("fp32", "bf16"):
        # a kernel that is slower than what runs without it has no place
        every = {(shape.group, "", dtype): (1.0, 1.0) for shape in CPU}
        yield from by_machine(NAME, every, {shape.group: ("strips",) for shape in CPU})
        for mode in (FORWARD, BOTH):
            where = {"group": "causal 4096", "dtype": dtype, "mode": mode}
            name = f"causal, {mode}, {dtype}: peak memory of T 4096 over that of T 2048"
            # linear is 2, and 4 where every weight is kept; kernels take larger tiles of the longer call
            yield Goal(name, NAME, "growth", "cpu", where, at_most=3.0, base={"group": "causal 2048"})


GOALS = tuple(_goals())
