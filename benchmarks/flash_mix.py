"""FLASH's mixed chunks: rows, rivals, costs and goals.

``eager`` is the layer's middle as flash-pytorch has it: tokens padded to whole groups, products within them, sums of
keys times values by group, running sums moved on by one group. ``compile`` is the same through torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import accel
from accel import dispatch
from accel.benchmarks.goals import DOTS, EVEN, WIDE, by_machine
from accel.benchmarks.harness import Case, Cost, Pick, Provider, Short, compiled
from accel.ops.linear.flash_mix import OP

NAME = "flash_mix"
PROVIDERS = ("accel", "eager", "compile")
FORWARD, BOTH = "forward", "forward+backward"
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    group: str
    causal: bool
    tokens: int = 4096
    batch: int = 1
    size: int = 128  # of queries and keys
    width: int = 1024  # of values and gate
    chunk: int = 256

    def __str__(self) -> str:
        return f"B{self.batch} T{self.tokens} s{self.size} E{self.width} chunk {self.chunk}"


# --- costs ---


def costs(shape: Shape, itemsize: int, modes: Sequence[str]) -> dict[str, Cost]:
    """Within chunks what gated attention costs, over half of the pairs in causal order, and across them two products
    of a token with a state forward, four backward.

    Forward reads four narrow tensors, the values and the gate and writes the output; backward reads these and the
    output's gradient, and writes six gradients.
    """
    tokens = shape.batch * shape.tokens
    seen = shape.chunk * (0.5 if shape.causal else 1.0)
    narrow, wide = int(2 * tokens * seen * shape.size), int(2 * tokens * seen * shape.width)
    state = 2 * tokens * shape.size * shape.width
    given, out = tokens * (4 * shape.size + 2 * shape.width) * itemsize, tokens * shape.width * itemsize
    forward = Cost(narrow + wide + 2 * state, given + out)
    backward = Cost(3 * narrow + 2 * wide + 4 * state, 2 * given + out)
    both = Cost(forward.flops + backward.flops, forward.moved + backward.moved)
    known = {FORWARD: forward, "backward": backward, BOTH: both}
    return {mode: known[mode] for mode in modes}


# --- what is computed ---


def ours(shape: Shape) -> Function:
    def function(*inputs: Tensor) -> Tensor:
        out = accel.flash_mix(*inputs, causal=shape.causal, chunk_size=shape.chunk)
        assert isinstance(out, Tensor)
        return out

    return function


def eager(shape: Shape) -> Function:
    def function(quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        tokens = v.shape[1]
        rest = -tokens % shape.chunk
        quad_q, quad_k, lin_q, lin_k, v = [
            F.pad(x, (0, 0, 0, rest)).unflatten(1, (-1, shape.chunk)) for x in (quad_q, quad_k, lin_q, lin_k, v)
        ]
        weights = F.relu(torch.einsum("bgid,bgjd->bgij", quad_q, quad_k) / shape.chunk) ** 2
        if shape.causal:
            later = torch.ones(shape.chunk, shape.chunk, dtype=torch.bool, device=v.device).triu(1)
            weights = weights.masked_fill(later, 0.0)
        within = torch.einsum("bgij,bgjd->bgid", weights, v)
        if shape.causal:
            sums = torch.einsum("bgnd,bgne->bgde", lin_k, v) / shape.chunk
            before = F.pad(sums.cumsum(1), (0, 0, 0, 0, 1, -1))
            across = torch.einsum("bgde,bgnd->bgne", before, lin_q)
        else:
            total = torch.einsum("bgnd,bgne->bde", lin_k, v) / tokens
            across = torch.einsum("bgnd,bde->bgne", lin_q, total)
        return gate * (within + across).flatten(1, 2)[:, :tokens]

    return function


def _backend(shape: Shape) -> Callable[..., str]:
    def name(*inputs: Tensor) -> str:
        return dispatch.select(OP, OP.prepare(*inputs, causal=shape.causal, chunk_size=shape.chunk)).name

    return name


def _inputs(shape: Shape, device: str, dtype: torch.dtype) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """Queries and keys so large that logits are about 0.7, and that both parts make up the output."""
    keys, scale = (shape.tokens / 2, 1 / shape.chunk) if shape.causal else (shape.tokens, 1 / shape.tokens)
    quad = (0.7 * shape.chunk / shape.size**0.5) ** 0.5
    lin = (5.0 / (scale * (keys * shape.size) ** 0.5)) ** 0.5
    sizes = [(shape.size, quad)] * 2 + [(shape.size, lin)] * 2 + [(shape.width, 1.0)] * 2

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        tokens = (shape.batch, shape.tokens)
        return tuple(
            [(factor * torch.randn(*tokens, n, generator=generator, device=device)).to(dtype) for n, factor in sizes]
        )

    return make


def _case(shape: Shape, device: str, dtype: torch.dtype, modes: Sequence[str]) -> Case:
    plain = eager(shape)
    return Case(
        op=NAME,
        group=shape.group,
        variant=f"T {shape.tokens}",
        shape=str(shape),
        dtype=dtype,
        inputs=_inputs(shape, device, dtype),
        reference=plain,
        providers=(
            Provider("accel", lambda: ours(shape), backend=_backend(shape)),
            Provider("eager", lambda: plain),
            Provider("compile", lambda: compiled(plain)),
        ),
        costs=costs(shape, dtype.itemsize, modes),
        family="gau",
    )


# --- all rows ---

CPU = (Shape("causal", True), Shape("full", False))
CUDA = (Shape("causal", True, 8192, 4), Shape("full", False, 8192, 4))


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the function."""
    for dtype in dtypes:
        for shape in CUDA if device == "cuda" else CPU:
            yield _case(shape, device, dtype, [FORWARD, BOTH])


SHORT = Short(
    rivals=("eager",),
    cpu=(Pick("FLASH's chunks, 4096 tokens", "causal", "T 4096", (FORWARD,)),),
    cuda=(Pick("FLASH's chunks, 8192 tokens", "causal", "T 8192"),),
)


# --- goals ---

BOUNDS = {
    ("causal", EVEN, "fp32"): (1.4, 1.3),
    ("causal", WIDE, "fp32"): (2.3, 2.2),
    ("causal", DOTS, "bf16"): (1.35, 1.3),
    ("full", EVEN, "fp32"): (1.1,),
    ("full", WIDE, "fp32"): (1.8,),
    ("full", DOTS, "bf16"): (1.05,),
}
GOALS = tuple(by_machine(NAME, BOUNDS, dict.fromkeys(("causal", "full"), ("eager", "compile"))))
