"""The experts of a mixture: rows, rivals, costs and goals.

Rivals are transformers' own: ``grouped_mm`` (its default, torch's grouped products), ``batched_mm`` and ``eager``, its
loop over experts. The projections are cold, as they are in a model whose layers take turns. ``even`` is ours on tokens
that are spread evenly, beside a row in which half of them meet one expert. ``routing`` is what comes before and behind
them, the choice of experts and the tokens sorted by them and brought back, by our ops alone: a yardstick, of which the
layer has no need. ``merged`` is ours with adapters of low rank added to the frozen projections at every call, as PEFT
does, beside a row in which their products stand beside.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import accel
from accel import dispatch
from accel.benchmarks._torchvision import allow_import
from accel.benchmarks.goals import EVEN, WIDE, Goal
from accel.benchmarks.harness import Case, Cost, Pick, Provider, Short, UnavailableError
from accel.ops.moe.moe_experts import OP

NAME = "moe_experts"
PROVIDERS = ("accel", "even", "routing", "merged", "grouped_mm", "batched_mm", "eager")
RIVALS = ("grouped_mm", "batched_mm", "eager")


def rivals(tokens: int) -> tuple[str, ...]:
    """``batched_mm`` copies a choice's weights for it: 18 GiB for 512 tokens of 64 experts, and 200 times our time."""
    return tuple(name for name in RIVALS if name != "batched_mm" or tokens <= 16)


BOTH = "forward+backward"
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    group: str
    tokens: int
    channels: int
    experts: int
    inner: int
    choices: int
    skewed: bool = False

    @property
    def variant(self) -> str:
        return f"T {self.tokens}, half on one" if self.skewed else f"T {self.tokens}"

    @functools.cached_property
    def indices(self) -> Tensor:
        """The experts of each token, drawn evenly; where skewed, expert 0 is the first choice of every other token."""
        generator = torch.Generator().manual_seed(self.tokens)
        found = torch.rand(self.tokens, self.experts, generator=generator)
        if self.skewed:
            found[::2, 0] = 2.0
        return found.topk(self.choices).indices

    def __str__(self) -> str:
        return f"T{self.tokens} C{self.channels} X{self.experts} I{self.inner} K{self.choices}"


def qwen3(tokens: int, **how: Any) -> Shape:
    return Shape("Qwen3-like", tokens, 1024, 64, 384, 8, **how)


def mixtral(tokens: int) -> Shape:
    return Shape("Mixtral-like", tokens, 1024, 8, 1792, 2)


# --- costs ---


def costs(shape: Shape, itemsize: int, modes: Sequence[str]) -> dict[str, Cost]:
    """Three products of each choice forward and twice as many backward. The weights of the experts that are met are
    read in either direction, the gradients of all are written; tokens are read and written once."""
    expert = 3 * shape.channels * shape.inner
    rows, met = shape.indices.numel(), int(shape.indices.unique().numel())
    flops, tokens = 2 * rows * expert, 2 * shape.tokens * shape.channels
    forward = Cost(flops, (met * expert + tokens) * itemsize)
    both = Cost(3 * flops, (2 * met * expert + shape.experts * expert + 3 * tokens) * itemsize)
    known = {"forward": forward, BOTH: both}
    return {mode: known[mode] for mode in modes}


# --- what is computed ---


def ours(shape: Shape, **how: Any) -> Function:
    def function(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return accel.moe_experts(x, shape.indices.to(x.device), weights, gate_up, down, **how)

    return function


def routing(shape: Shape, backend: str | None = None) -> Function:
    """The choice of experts by the logits of a router, and the tokens sorted by them and summed with its weights."""
    generator = torch.Generator().manual_seed(shape.tokens)
    logits = torch.rand(shape.tokens, shape.experts, generator=generator)

    def function(x: Tensor, *others: Tensor) -> Tensor:
        weights, indices = accel.moe_route(logits.to(x.device), shape.choices, backend=backend)
        rows, plan = accel.moe_permute(x, indices, shape.experts, backend=backend)
        return accel.moe_unpermute(rows, plan, weights, backend=backend)

    return function


def _module(shape: Shape, gate_up: Tensor, down: Tensor) -> Any:
    """What transformers' functions read of a module."""

    def gate(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up

    flags = dict.fromkeys(("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel"), False)
    return types.SimpleNamespace(
        **flags, has_gate=True, num_experts=shape.experts, act_fn=F.silu, _apply_gate=gate, gate_up_proj=gate_up,
        down_proj=down,
    )  # fmt: skip


def theirs(shape: Shape, name: str) -> Function:
    with contextlib.suppress(ModuleNotFoundError):
        allow_import()  # transformers imports torchvision where it is installed
    try:
        from transformers.integrations import moe
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    except ImportError as error:
        raise UnavailableError(f"transformers with experts functions is not installed: {error}") from error
    experts: Any = MixtralExperts
    known: dict[str, Any] = {
        "grouped_mm": moe.grouped_mm_experts_forward,
        "batched_mm": moe.batched_mm_experts_forward,
        "eager": experts.forward.__wrapped__,
    }

    def function(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        module = _module(shape, gate_up, down)
        made: Tensor = known[name](module, x, shape.indices.to(x.device), weights)
        return made

    return function


def _inputs(shape: Shape, device: str, dtype: torch.dtype) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        x, scores = normal(shape.tokens, shape.channels), normal(shape.tokens, shape.choices)
        gate_up = normal(shape.experts, 2 * shape.inner, shape.channels) * shape.channels**-0.5
        down = normal(shape.experts, shape.channels, shape.inner) * shape.inner**-0.5
        return x.to(dtype), scores.softmax(-1).to(dtype), gate_up.to(dtype), down.to(dtype)

    return make


def _backend(shape: Shape) -> Callable[..., str]:
    def name(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> str:
        return dispatch.select(OP, OP.prepare(x, shape.indices.to(x.device), weights, gate_up, down)).name

    return name


def _case(shape: Shape, device: str, dtype: torch.dtype, modes: Sequence[str]) -> Case:
    providers = [Provider("accel", lambda: ours(shape), backend=_backend(shape))]
    if shape.skewed:
        even = replace(shape, skewed=False)
        providers.append(Provider("even", lambda: ours(even), _backend(even), ours(even, backend="reference")))
    if shape.tokens >= 512 and not shape.skewed:
        providers.append(Provider("routing", lambda: routing(shape), computes=routing(shape, "reference")))
    providers += [Provider(name, functools.partial(theirs, shape, name)) for name in rivals(shape.tokens)]
    return Case(
        op=NAME,
        group=shape.group,
        variant=shape.variant,
        shape=str(shape),
        dtype=dtype,
        inputs=_inputs(shape, device, dtype),
        reference=ours(shape, backend="reference"),
        providers=tuple(providers),
        costs=costs(shape, dtype.itemsize, modes),
        family="experts",
        cold=(2, 3),
    )


# --- adapters of low rank beside frozen projections ---

RANK = 16


def _frozen(shape: Shape, dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Weights of the choice and projections, in the dtype of what they meet."""

    @functools.cache
    def drawn(device: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        weights = torch.rand(shape.tokens, shape.choices, generator=generator)
        gate_up = torch.randn(shape.experts, 2 * shape.inner, shape.channels, generator=generator)
        down = torch.randn(shape.experts, shape.channels, shape.inner, generator=generator)
        found = [weights, gate_up * shape.channels**-0.5, down * shape.inner**-0.5]
        made = [x.to(device, dtype) for x in found]
        return made[0], made[1], made[2]

    def of(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, gate_up, down = [y.to(x.dtype) for y in drawn(str(x.device))]
        return weights, gate_up, down

    return of


def _beside(shape: Shape, frozen: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], **how: Any) -> Function:
    def function(x: Tensor, *adapters: Tensor) -> Tensor:
        a, b, c, d = adapters
        return accel.moe_experts(x, shape.indices.to(x.device), *frozen(x), lora=((a, b, 1.0), (c, d, 1.0)), **how)

    return function


def _merged(shape: Shape, frozen: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Function:
    def function(x: Tensor, *adapters: Tensor) -> Tensor:
        weights, gate_up, down = frozen(x)
        a, b, c, d = adapters
        return accel.moe_experts(x, shape.indices.to(x.device), weights, gate_up + b @ a, down + d @ c)

    return function


def _lora(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    frozen = _frozen(shape, dtype)

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        def normal(*size: int, scale: float = 0.1) -> Tensor:
            return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

        narrow, x = (shape.experts, RANK), normal(shape.tokens, shape.channels, scale=1.0)
        first = normal(*narrow, shape.channels, scale=shape.channels**-0.5)
        second = normal(*narrow, shape.inner, scale=shape.inner**-0.5)
        back = [normal(shape.experts, size, RANK) for size in (2 * shape.inner, shape.channels)]
        return x, first, back[0], second, back[1]

    expert = 3 * shape.channels * shape.inner
    flops = 4 * shape.indices.numel() * expert  # forward, and the gradient of the tokens
    return Case(
        op=NAME,
        group=shape.group,
        variant=f"{shape.variant}, LoRA {RANK}",
        shape=str(shape),
        dtype=dtype,
        inputs=make,
        reference=_beside(shape, frozen, backend="reference"),
        providers=(
            Provider("accel", lambda: _beside(shape, frozen)),
            Provider("merged", lambda: _merged(shape, frozen)),
        ),
        costs={BOTH: Cost(flops, 2 * shape.experts * expert * dtype.itemsize)},
        family="experts",
    )


# --- all rows ---

CPU = (*map(qwen3, (1, 16, 512)), *map(mixtral, (1, 16, 512)), qwen3(512, skewed=True))
CUDA = (
    Shape("Qwen3-30B-like", 32768, 2048, 128, 768, 8),
    Shape("Qwen3-30B-like", 1, 2048, 128, 768, 8),
)


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op, those that goals are about first."""
    for dtype in dtypes:
        for shape in CUDA if device == "cuda" else CPU:
            yield _case(shape, device, dtype, ["forward", BOTH])
        if device == "cpu":
            yield _lora(qwen3(512), device, dtype)


SHORT = Short(
    rivals=("grouped_mm",),
    cpu=(
        Pick("64 experts of 384, 16 tokens", "Qwen3-like", "T 16", ("forward",)),
        Pick("64 experts of 384, 512 tokens", "Qwen3-like", "T 512", ("forward",)),
    ),
    cuda=(Pick("128 experts of 768, 32768 tokens", "Qwen3-30B-like", "T 32768"),),
)


# --- goals ---


# group, kind of machine and dtype -> how many times as fast as each rival, at 1, 16 and 512 tokens
FORWARD: dict[tuple[str, str, str], Sequence[float | None]] = {
    ("Qwen3-like", "", "bf16"): (2.6, 1.6, 1.05),
    ("Mixtral-like", "", "bf16"): (1.7, 1.0, 0.95),
    ("Qwen3-like", WIDE, "fp32"): (2.3, 2.4, 1.8),
    ("Mixtral-like", WIDE, "fp32"): (None, 2.2, 1.8),
    ("Qwen3-like", EVEN, "fp32"): (1.0, 1.0, 1.0),
    ("Mixtral-like", EVEN, "fp32"): (1.0, 1.0, 1.0),
}
TRAINING: dict[tuple[str, str, str], Sequence[float | None]] = {
    ("Qwen3-like", "", "bf16"): (1.5, 1.4, 1.3),
    ("Mixtral-like", "", "bf16"): (None, None, 1.0),
    ("Qwen3-like", WIDE, "fp32"): (None, None, 2.2),
    ("Mixtral-like", WIDE, "fp32"): (None, None, 1.8),
}


def _goals() -> Iterator[Goal]:
    for mode, table in (("forward", FORWARD), (BOTH, TRAINING)):
        for ((group, machine, dtype), bounds), rival in itertools.product(table.items(), RIVALS):
            for tokens, bound in zip((1, 16, 512), bounds, strict=True):
                if bound is not None and rival in rivals(tokens):
                    where = {"group": group, "dtype": dtype, "mode": mode, "variant": f"T {tokens}"}
                    name = f"{group}, {tokens} tokens, {mode}, {dtype}, against {rival}"
                    yield Goal(name, NAME, "speedup", "cpu", where, rival, at_least=bound, machine=machine)
    for dtype in ("fp32", "bf16"):
        where = {"group": "Qwen3-like", "dtype": dtype, "mode": "forward", "variant": "T 512, half on one"}
        yield Goal(f"half of the tokens on one expert, {dtype}", NAME, "speedup", "cpu", where, "even", at_least=0.8)
        where = {**where, "variant": "T 512"}
        name = f"routing and permutation of 512 tokens beside their experts, {dtype}"
        yield Goal(name, NAME, "speedup", "cpu", where, "routing", at_most=0.05)
    where = {"group": "Qwen3-like", "dtype": "bf16", "mode": BOTH, "variant": f"T 512, LoRA {RANK}"}
    yield Goal("LoRA, against weights that it is merged into", NAME, "speedup", "cpu", where, "merged", at_least=1.2)
    where = {"group": "Qwen3-like", "dtype": "bf16", "mode": BOTH, "variant": "T 512"}
    yield Goal("memory of a training step", NAME, "memory", "cpu", where, "grouped_mm", at_most=1.0)


GOALS = tuple(_goals())
