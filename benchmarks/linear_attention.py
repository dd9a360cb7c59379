"""Linear attention: rows, rivals, costs and goals.

Causal rivals compute what papers publish as plain torch: chunks of 64 tokens side by side, their states summed up in
front of each (``eager``, and the same through ``compile``), and a loop over chunks of 256 that carries one state
(``loop``), as transformers' MiniMax has it. The denominator comes from a column of ones behind the values. The scan of
Mamba-2 is linear attention too; its rival is transformers' own function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import accel
from accel import dispatch
from accel.backends import inner_dtype
from accel.benchmarks import _mamba2
from accel.benchmarks.goals import DOTS, EVEN, WIDE, Goal, by_machine
from accel.benchmarks.harness import Case, Cost, Pick, Provider, Short, compiled
from accel.ops.linear.linear_attention import OP

NAME = "linear_attention"
PROVIDERS = ("accel", "eager", "loop", "compile", "transformers")
EPS = 1e-6
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    group: str
    variant: str
    tokens: int = 4096
    batch: int = 1
    heads: int = 8
    size: int = 64
    causal: bool = True
    decay: bool = False  # by a number a head, without a denominator: lightning attention
    growing: bool = False  # one of several that differ in their tokens alone, for the time that each takes

    def how(self) -> dict[str, Any]:
        if self.decay:
            return {"feature_map": "identity", "normalize": False, "causal": True}
        return {"feature_map": "elu1", "causal": self.causal, "eps": EPS}

    def __str__(self) -> str:
        return f"B{self.batch} T{self.tokens} h{self.heads} D{self.size}"


# --- costs ---


def costs(shape: Shape, itemsize: int, modes: Sequence[str]) -> dict[str, Cost]:
    """Two products of a token with a state forward, and three times as many backward: what the recurrence costs.

    Forward reads q, k, v and writes the output; backward reads these and the output's gradient, and writes three.
    """
    tensor = shape.batch * shape.heads * shape.tokens * shape.size
    forward = Cost(4 * tensor * shape.size, 4 * tensor * itemsize)
    backward = Cost(12 * tensor * shape.size, 7 * tensor * itemsize)
    both = Cost(forward.flops + backward.flops, forward.moved + backward.moved)
    known = {"forward": forward, "backward": backward, "forward+backward": both}
    return {mode: known[mode] for mode in modes}


# --- what is computed ---


def slopes(shape: Shape, x: Tensor) -> Tensor | None:
    """The log-decays of lightning attention, a buffer in models."""
    if not shape.decay:
        return None
    key = (shape.heads, x.device)
    if key not in _slopes:
        _slopes[key] = -torch.exp2(-8.0 * (torch.arange(shape.heads, device=x.device) + 1) / shape.heads)
    return _slopes[key]


_slopes: dict[tuple[int, torch.device], Tensor] = {}


def ours(shape: Shape) -> Function:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = accel.linear_attention(q, k, v, log_decay=slopes(shape, q), **shape.how())
        assert isinstance(out, Tensor)
        return out

    return function


def _features(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mapped queries and keys, and the values with what makes the denominator."""
    if shape.decay:
        return q, k, v
    return F.elu(q) + 1.0, F.elu(k) + 1.0, F.pad(v, (0, 1), value=1.0)


def _divided(shape: Shape, out: Tensor) -> Tensor:
    return out if shape.decay else out[..., :-1] / (out[..., -1:] + EPS)


def full(shape: Shape) -> Function:
    """Every query against the sums over all keys."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = _features(shape, q, k, v)
        return _divided(shape, q @ (k.transpose(-1, -2) @ v))

    return function


def chunks(shape: Shape, chunk: int = 64) -> Function:
    """All chunks side by side, each with the sum of the states before it."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = [x.unflatten(2, (-1, chunk)) for x in _features(shape, q, k, v)]
        states = (k.transpose(-1, -2) @ v).cumsum(2)
        before = F.pad(states[:, :, :-1], (0, 0, 0, 0, 1, 0))
        out = (q @ k.transpose(-1, -2)).tril() @ v + q @ before
        return _divided(shape, out.flatten(2, 3))

    return function


def loop(shape: Shape, chunk: int = 256) -> Function:
    """One chunk after the other, with the state carried along."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        decay = slopes(shape, q)
        q, k, v = _features(shape, q, k, v)
        slope = None if decay is None else decay.to(inner_dtype(q))[:, None]
        state: Tensor | None = None
        rows = []
        for a, b, c in zip(*[x.split(chunk, 2) for x in (q, k, v)], strict=True):
            weights, weighed, kept = (a @ b.transpose(-1, -2)).tril(), b, state
            if slope is not None:
                at = torch.arange(a.shape[2], device=q.device, dtype=slope.dtype)
                between = torch.exp(slope[..., None] * (at[:, None] - at).clamp(min=0))
                weights = weights * between.to(q.dtype)
                weighed = b * torch.exp(slope * (len(at) - 1 - at)).to(q.dtype)[..., None]
                a = a * torch.exp(slope * (at + 1)).to(q.dtype)[..., None]
                kept = None if state is None else state * torch.exp(slope * len(at)).to(q.dtype)[..., None]
            out, made = weights @ c, weighed.transpose(-1, -2) @ c
            if state is not None and kept is not None:
                out, made = out + a @ state, made + kept
            state = made
            rows.append(out)
        return _divided(shape, torch.cat(rows, 2))

    return function


def reference(shape: Shape) -> Function:
    """In memory linear in the tokens, which our own has not, and in the dtype of the inputs."""
    return loop(shape, 64) if shape.causal else full(shape)


def _backend(shape: Shape) -> Callable[..., str]:
    def name(q: Tensor, k: Tensor, v: Tensor) -> str:
        return dispatch.select(OP, OP.prepare(q, k, v, log_decay=slopes(shape, q), **shape.how())).name

    return name


def _inputs(shape: Shape, device: str, dtype: torch.dtype) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        size = (shape.batch, shape.heads, shape.tokens, shape.size)
        return tuple([torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(3)])

    return make


def _case(shape: Shape, device: str, dtype: torch.dtype, modes: Sequence[str]) -> Case:
    providers = [Provider("accel", lambda: ours(shape), backend=_backend(shape))]
    if shape.decay or shape.growing:
        # which carries its state in the dtype of the inputs: after 64K tokens in bf16 that is too far off to be timed
        if not shape.growing or dtype == torch.float32:
            providers.append(Provider("loop", lambda: loop(shape)))
    else:
        eager = chunks(shape) if shape.causal else full(shape)
        providers.append(Provider("eager", lambda: eager))
        if shape.causal:
            providers.append(Provider("loop", lambda: loop(shape)))
        providers.append(Provider("compile", lambda: compiled(eager)))
    return Case(
        op=NAME,
        group=shape.group,
        variant=shape.variant,
        shape=str(shape),
        dtype=dtype,
        inputs=_inputs(shape, device, dtype),
        reference=reference(shape),
        providers=tuple(providers),
        costs=costs(shape, dtype.itemsize, modes),
        family="linear",
        tokens=shape.batch * shape.tokens if shape.growing else None,
    )


# --- all rows ---

CPU = (
    Shape("causal", "T 4096"),
    Shape("full", "T 4096", causal=False),
    Shape("decay", "T 2048", 2048, decay=True),
    *(Shape("a token", f"T {n}K", n << 10, growing=True) for n in (4, 16, 64)),
)
CUDA = (
    Shape("causal", "T 8192", 8192, 2, 16, 128),
    Shape("full", "T 8192", 8192, 2, 16, 128, causal=False),
    Shape("decay", "T 8192", 8192, 2, 16, 128, decay=True),
    *(Shape("a token", f"T {n}K", n << 10, 1, 16, 128, growing=True) for n in (4, 16, 64)),
)
MAMBA = _mamba2.Shape()


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op, those that goals are about first."""
    for dtype in dtypes:
        for shape in CUDA if device == "cuda" else CPU:
            yield _case(shape, device, dtype, ["forward"] if shape.growing else ["forward", "forward+backward"])
    if torch.float32 in dtypes:
        yield _mamba2.case(NAME, MAMBA, device, ["forward"])


SHORT = Short(
    rivals=("loop", "eager", "transformers"),
    cpu=(
        Pick("causal, 4096 tokens", "causal", "T 4096", ("forward",)),
        Pick("4096 tokens", "full", "T 4096", ("forward",)),
    ),
    cuda=(Pick("causal, 8192 tokens", "causal", "T 8192"), Pick("8192 tokens", "full", "T 8192")),
)


# --- goals ---

BOUNDS = {
    ("causal", EVEN, "fp32"): (2.5, 2.2),
    ("causal", WIDE, "fp32"): (4.2, 3.4),
    ("causal", DOTS, "bf16"): (3.0, 2.0),
    ("full", EVEN, "fp32"): (1.05,),
    ("full", WIDE, "fp32"): (1.8,),
    ("full", DOTS, "bf16"): (1.2,),
    (MAMBA.group, EVEN, "fp32"): (5.0,),
    (MAMBA.group, WIDE, "fp32"): (8.0,),
}
RIVALS = {"causal": ("eager", "loop", "compile"), "full": ("eager", "compile"), MAMBA.group: ("transformers",)}
EXTRA = 4.0  # MiB beside the output, which takes 8 MiB for 4096 tokens in fp32, and 128 for 65 536


def _goals() -> Iterator[Goal]:
    yield from by_machine(NAME, BOUNDS, RIVALS)
    for dtype in ("fp32", "bf16"):
        where = {"group": "a token", "dtype": dtype, "mode": "forward"}
        name = f"causal, {dtype}: time a token of 4K, 16K and 64K, the longest over the shortest"
        yield Goal(name, NAME, "spread", "cpu", where, at_most=1.15)
        name = f"causal, {dtype}: memory beside the output at 4K, 16K and 64K, MiB"
        yield Goal(name, NAME, "extra", "cpu", where, at_most=EXTRA)


GOALS = tuple(_goals())
