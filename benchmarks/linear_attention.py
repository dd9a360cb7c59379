"""Linear attention: rows, rivals, costs and goals.

Causal rivals compute what papers publish as plain torch: chunks of 64 tokens side by side, their states summed up in
front of each (``eager``, and the same through ``compile``), and a loop over chunks of 256 that carries one state
(``loop``), as transformers' MiniMax has it. The denominator comes from a column of ones behind the values.
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
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import Case, Cost, Pick, Provider, Short, compiled
from accel.ops.linear.linear_attention import OP

NAME = "linear_attention"
PROVIDERS = ("accel", "eager", "loop", "compile")
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
    if shape.decay:
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
    )


# --- all rows ---

CPU = (
    Shape("causal", "T 4096"),
    Shape("full", "T 4096", causal=False),
    Shape("decay", "T 2048", 2048, decay=True),
)
CUDA = (
    Shape("causal", "T 8192", 8192, 2, 16, 128),
    Shape("full", "T 8192", 8192, 2, 16, 128, causal=False),
    Shape("decay", "T 8192", 8192, 2, 16, 128, decay=True),
)


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op, those that goals are about first."""
    for dtype in dtypes:
        for shape in CUDA if device == "cuda" else CPU:
            yield _case(shape, device, dtype, ["forward", "forward+backward"])


SHORT = Short(
    rivals=("loop", "eager"),
    cpu=(
        Pick("causal, 4096 tokens", "causal", "T 4096", ("forward",)),
        Pick("4096 tokens", "full", "T 4096", ("forward",)),
    ),
    cuda=(Pick("causal, 8192 tokens", "causal", "T 8192"), Pick("8192 tokens", "full", "T 8192")),
)


# --- goals ---


def _is_wide() -> bool:
    """Whether the CPU kernels run with 512-bit vectors, which they do where the processor gains by them."""
    extension, _ = dispatch.leaf("accel._C")
    return extension is not None and str(extension.build_info()["isa"]).startswith("avx512")


def _bounds(wide: bool) -> dict[tuple[str, str, str], float]:
    """Group, dtype and mode -> how many times as fast as each rival, and so as the fastest."""
    both = "forward+backward"
    if not wide:
        return {
            ("causal", "fp32", "forward"): 2.5,
            ("causal", "fp32", both): 2.2,
            ("full", "fp32", "forward"): 1.05,
        }
    return {
        ("causal", "fp32", "forward"): 4.2,
        ("causal", "fp32", both): 3.4,
        ("causal", "bf16", "forward"): 3.0,
        ("causal", "bf16", both): 2.0,
        ("full", "fp32", "forward"): 1.8,
        ("full", "bf16", "forward"): 1.2,
    }


def _goals() -> Iterator[Goal]:
    for (group, dtype, mode), bound in _bounds(_is_wide()).items():
        for rival in ("eager", "loop", "compile") if group == "causal" else ("eager", "compile"):
            where = {"group": group, "dtype": dtype, "mode": mode}
            name = f"{group}, {mode}, {dtype}, against {rival}"
            yield Goal(name, NAME, "speedup", "cpu", where, rival, at_least=bound)


GOALS = tuple(_goals())
