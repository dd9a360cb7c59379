"""Whether a transformers model may run on flattened batches, tried on a few tokens before its first call of a kind.

Three short sequences are run padded and flattened, and must give the same. Then the first and the last are exchanged
for others: what the middle one gives may not change. That comparison is sharp in any dtype, since the same kernels see
the same numbers. How much the model rounds is seen where the padded batch is laid out in another way.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accel.patches import transformers_flat
from accel.patches.transformers_flat import AS_IT_IS, BY_TOKEN, POOLED, Flat, Layout, Path, cannot, leaves, name_of
from accel.patches.transformers_trial import LENGTHS, MIDDLE, TOTAL, Trial, unnoticed

# What rounding explains, as a part of a token's vector. Equal runs differ by a few units in the last place at most (by
# the kernels that a changed load of the experts brings), others by what some dozens of layers add up to; more where
# the model itself shows more: eight times that, since it was seen on a few tokens only.
_UNITS_EQUAL, _LEAST_EQUAL = 4, 1e-5
_UNITS_ALIKE, _LEAST_ALIKE = 12, 1e-4
_TIMES_SEEN, _MOST_SEEN = 8, 0.25

_SURE = 1e-3
"""Positions that come this near are counted as the model does; otherwise the nearest are taken."""

_one_at_a_time = threading.RLock()


@dataclass(frozen=True)
class Proven:
    """What was found for calls of one kind."""

    way: str
    """How positions are counted, of :data:`transformers_flat.POSITIONS`."""
    layout: Layout


def kind_of(module: nn.Module, given: dict[str, Any]) -> frozenset[str]:
    """What tells calls apart that need a proof of their own: the tensors given and the outputs asked for."""
    config: Any = module.config
    tensors = {name for name, value in given.items() if isinstance(value, Tensor) and value.dim() > 0}
    flags = {name: value for name, value in (vars(config) | given).items() if name.startswith("output_") and value}
    return frozenset(tensors | {f"{name}={value}" for name, value in flags.items()})


def prove(module: nn.Module, given: dict[str, Any], real: Tensor) -> Proven:
    """Try ``module`` for calls like ``given``, and leave it as it was.

    Raises:
        NotImplementedError: flattened, it does not give what it gives padded, or it does not run; the message says how
            large the difference is, and on how many tokens.
    """
    trial = Trial(module, given, real)
    with _one_at_a_time:
        try:
            return _prove(module, trial, hooks=False)
        except _TrialError:
            pass
        try:
            return _prove(module, trial, hooks=True)  # perhaps it needs them to run
        except _TrialError as error:
            raise NotImplementedError(cannot(module, str(error))) from error.__cause__


def _prove(module: nn.Module, trial: Trial, hooks: bool) -> Proven:
    order, other = (0, 1, 2), (2, 0, 1, 0)  # in another order and with one more, where more is rounded otherwise
    with unnoticed(module, trial.device, hooks):
        given, real = trial.batch(0, order)
        padded = _run_padded(module, given)
        found = _nearest(module, padded, given, real)
        changed, _ = trial.batch(1, order)
        leaked = _run_flat(module, changed, real, found.way)
        spread, spread_real = trial.batch(1, other)
        again = _run_padded(module, spread)
        pooled = _pooled(module, padded, found, real)
    layout = found.layout
    leak = _difference(_flat_tokens(found.flat, layout), _flat_tokens(leaked, layout), MIDDLE)
    own = _padded_tokens(padded, layout, real, order), _padded_tokens(again, layout, spread_real, other)
    eps = _eps(module, padded, trial.device)
    noise = min(_MOST_SEEN, _TIMES_SEEN * _difference(*own, MIDDLE).size)
    alike = max(_UNITS_ALIKE * eps, _LEAST_ALIKE, noise)
    equal = max(_UNITS_EQUAL * eps, _LEAST_EQUAL, noise)
    for seen, bound, what in (
        (leak, equal, "the tokens of one sequence change those of another: positions mix outside attention"),
        (found.difference, alike, "positions mix outside attention, or are counted in a way that is not known here"),
        (pooled, alike, "the pooler reads more than a first token"),
    ):
        if not seen.size <= bound:  # NaN proves nothing
            raise NotImplementedError(cannot(module, f"on a trial of {TOTAL} tokens {seen.text(bound)}; {what}"))
    return Proven(found.way, layout)


# --- the runs ---


class _TrialError(Exception):
    pass


def _run(module: nn.Module, how: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if isinstance(error, NotImplementedError) and type(module).__name__ in str(error):
            raise  # a sentence about this model
        raise _TrialError(f"{how}, a trial of {TOTAL} tokens raised {type(error).__name__}: {error}") from error


def _run_padded(module: nn.Module, given: dict[str, Any]) -> Any:
    how = {**given, "use_cache": False, "return_dict": True}
    return _run(module, "padded", lambda: type(module).forward(module, **how))


def _run_flat(module: nn.Module, given: dict[str, Any], real: Tensor, way: str) -> Flat:
    out: Flat = _run(module, "flattened", lambda: transformers_flat.run(module, given, real, way))
    return out


@dataclass
class _Found:
    way: str
    flat: Flat
    layout: Layout
    difference: _Difference


def _nearest(module: nn.Module, padded: Any, given: dict[str, Any], real: Tensor) -> _Found:
    """The flattened run that comes nearest to the padded one, over the ways of counting positions."""
    best: _Found | None = None
    for way in transformers_flat.ways(module, given, real):
        flat = _run_flat(module, given, real, way)
        layout = _layout(module, padded, flat, real)
        expected = _padded_tokens(padded, layout, real, (0, 1, 2)) | _whole(padded, layout)
        difference = _difference(expected, _flat_tokens(flat, layout) | _whole(flat.out, layout), slice(None))
        if best is None or not difference.size >= 0.5 * best.difference.size:
            best = _Found(way, flat, layout, difference)
        if best.difference.size <= _SURE:
            break
    assert best is not None
    return best


def _layout(module: nn.Module, padded: Any, flat: Flat, real: Tensor) -> Layout:
    expected, found = dict(leaves(padded)), dict(leaves(flat.out))
    if list(expected) != list(found) or not found:
        names = [", ".join(name_of(path) for path in out) or "no tensors" for out in (expected, found)]
        raise NotImplementedError(cannot(module, f"padded it returns {names[0]}, flattened {names[1]}"))
    pools = getattr(module, "pooler", None) is not None
    layout = {}
    for path, x in found.items():
        shapes = tuple(expected[path].shape), tuple(x.shape)
        kind = transformers_flat.kind(path, *shapes, real, pools)
        if kind is None:
            words = f"its {name_of(path)} is {shapes[0]} padded and {shapes[1]} flattened"
            raise NotImplementedError(cannot(module, f"for a batch {tuple(real.shape)} with {TOTAL} tokens {words}"))
        layout[path] = kind
    return layout


def _pooled(module: nn.Module, padded: Any, found: _Found, real: Tensor) -> _Difference:
    """The pooler over hidden states that are 0 at padding, for the sequence that begins in the first column."""
    if POOLED not in found.layout.values():
        return _Difference(0.0, (), 0)
    out = _run(
        module, "flattened", lambda: transformers_flat.padded_again(module, found.flat, found.layout, *real.shape)
    )
    expected, pooled = padded["pooler_output"][:1], out["pooler_output"][:1]
    path = ("pooler_output",)
    if pooled.shape != expected.shape:
        return _Difference(math.inf, path, 1)
    return _difference({path: expected}, {path: pooled}, slice(None))


# --- comparing ---

Tokens = dict[Path, Tensor]
"""Numbers by token, ``(TOTAL, ...)`` in the order of the trial's sequences."""


def _flat_tokens(flat: Flat, layout: Layout) -> Tokens:
    by_token = {path: x[0] if layout[path] == BY_TOKEN else x for path, x in leaves(flat.out)}
    return {path: x for path, x in by_token.items() if layout[path] not in (AS_IT_IS, POOLED)}


def _padded_tokens(out: Any, layout: Layout, real: Tensor, order: tuple[int, ...]) -> Tokens:
    tokens = {}
    for path, x in leaves(out):
        if layout[path] not in (AS_IT_IS, POOLED):
            rows = x if layout[path] == BY_TOKEN else x.unflatten(0, real.shape)
            tokens[path] = torch.cat([rows[order.index(i)][real[order.index(i)]] for i in range(len(LENGTHS))])
    return tokens


def _whole(out: Any, layout: Layout) -> Tokens:
    """What belongs to no token, as if it were one."""
    return {path: x[None] for path, x in leaves(out) if layout[path] == AS_IT_IS}


@dataclass
class _Difference:
    """How far two runs are apart, as a part of the size of a token's vector."""

    size: float
    where: Path
    tokens: int
    """How many differ by more than a tenth of that."""

    def text(self, bound: float) -> str:
        return (
            f"{name_of(self.where)} differs by up to {self.size:.2g} of its size, on {self.tokens} tokens, where "
            f"rounding explains {bound:.2g}"
        )


def _difference(expected: Tokens, found: Tokens, tokens: slice) -> _Difference:
    worst = _Difference(0.0, (), 0)
    for path, x in expected.items():
        a, b = [y.detach()[tokens].cpu().double().reshape(len(y[tokens]), -1) for y in (x, found[path])]
        apart, size = torch.where(a == b, 0.0, a - b).norm(dim=1), a.norm(dim=1)
        part = apart / size.clamp_min(max(1e-3 * float(size.max()), 1e-30))
        largest = float(part.max())
        if largest > worst.size or math.isnan(largest):
            worst = _Difference(largest, path, int((part >= 0.1 * largest).sum()))
    return worst


def _eps(module: nn.Module, out: Any, device: torch.device) -> float:
    """The distance of neighbouring numbers in the coarsest arithmetic that the model computes with."""
    dtypes = {x.dtype for _, x in leaves(out)} | {p.dtype for p in module.parameters()}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    known = [torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1]
    if torch.float32 in dtypes:
        known.append({"highest": 0.0, "high": 2.0**-10}.get(torch.get_float32_matmul_precision(), 2.0**-7))
    return max(known, default=2.0**-7)
