"""The scan of Mamba-2: transformers' own torch function, and the same call with ours put behind it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import accel
from accel.benchmarks._torchvision import allow_import
from accel.benchmarks.harness import Case, Cost, Provider, UnavailableError

HOME = "transformers.models.mamba2.modeling_mamba2"
FUNCTION = "mamba2_chunk_scan"
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    group: str = "mamba2"
    tokens: int = 2048
    batch: int = 1
    heads: int = 24
    size: int = 64  # of a head
    state: int = 128
    chunk: int = 256  # of transformers' function

    def __str__(self) -> str:
        return f"B{self.batch} T{self.tokens} h{self.heads} P{self.size} N{self.state}"


def costs(shape: Shape, modes: Sequence[str]) -> dict[str, Cost]:
    """Two products of a token with a state forward, three times as many backward. Forward reads x, dt, B and C and
    writes the output; backward reads these and its gradient, and writes four."""
    tokens = shape.batch * shape.tokens
    forward = 4 * tokens * shape.heads * shape.size * shape.state
    out = tokens * shape.heads * shape.size * 4
    given = out + tokens * (shape.heads + 2 * shape.state) * 4
    known = {"forward": Cost(forward, given + out), "forward+backward": Cost(4 * forward, 3 * given + 2 * out)}
    return {mode: known[mode] for mode in modes}


def reference(shape: Shape, chunk: int = 64) -> Function:
    """One chunk after the other with the state carried along, in the dtype of the inputs; transformers' is fp32."""

    def function(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        decay = (a * dt).transpose(1, 2)
        q, k, v = [t.transpose(1, 2) for t in (c, b, x * dt[..., None])]
        state = x.new_zeros(shape.batch, shape.heads, shape.state, shape.size)
        rows = []
        for n in range(0, shape.tokens, chunk):
            now, before, made = [t[:, :, n : n + chunk] for t in (q, k, v)]
            total = decay[:, :, n : n + chunk].cumsum(-1)
            between = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
            rows.append((now @ before.mT * between) @ made + total.exp()[..., None] * now @ state)
            weighed = before * (total[..., -1:] - total).exp()[..., None]
            state = total[..., -1].exp()[..., None, None] * state + weighed.mT @ made
        return torch.cat(rows, 2).transpose(1, 2)

    return function


def _home() -> Any:
    allow_import()
    try:
        return importlib.import_module(HOME)
    except ImportError as error:
        raise UnavailableError(f"{HOME} cannot be imported: {error}") from None


class Scan:
    """The call as a model makes it, by the function that stands there without the patch or with it."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def _call(self, function: Callable[..., Tensor]) -> Function:
        return lambda *inputs: function(*inputs, chunk_size=self.shape.chunk)

    def theirs(self) -> Function:
        return self._call(getattr(_home(), FUNCTION))

    def ours(self) -> Function:
        home = _home()
        with accel.patch_functions() as report:
            self._patched = self._call(getattr(home, FUNCTION))
        self._row = next(row for row in report.rows if row.name == f"{HOME}.{FUNCTION}")
        return self._patched

    def backend(self, *inputs: Tensor) -> str:
        """What a call runs; an error where it goes to transformers' function."""
        with torch.no_grad():
            self._patched(*inputs)
        if not self._row.calls:
            raise RuntimeError(f"the patched {FUNCTION} left the call to transformers: {self._row.fallbacks}")
        return str(self._row.backend)


def _inputs(shape: Shape, device: str) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """x, dt, A, B and C, of the sizes that a model has in them: steps of 0.001 to 0.1, A from −1 to −16."""

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        tokens = (shape.batch, shape.tokens)
        drawn = torch.rand(*tokens, shape.heads, generator=generator, device=device)
        a = -torch.linspace(1.0, 16.0, shape.heads, device=device)
        groups = [normal(*tokens, 1, shape.state) for _ in range(2)]
        return (normal(*tokens, shape.heads, shape.size), 0.001 * 100.0**drawn, a, *groups)

    return make


def case(op: str, shape: Shape, device: str, modes: Sequence[str]) -> Case:
    """A row of linear attention in fp32, in which transformers computes."""
    scan = Scan(shape)
    return Case(
        op=op,
        group=shape.group,
        variant=f"T {shape.tokens}",
        shape=str(shape),
        dtype=torch.float32,
        inputs=_inputs(shape, device),
        reference=reference(shape),
        providers=(
            Provider("accel", scan.ours, backend=scan.backend),
            Provider("transformers", scan.theirs),
        ),
        costs=costs(shape, modes),
        family="linear",
    )
