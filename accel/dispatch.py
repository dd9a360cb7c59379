"""Choosing a backend: each one says in a sentence why it cannot run a call, and nothing falls back in silence.

An op owns an ordered tuple of :class:`Backend`. The first whose ``why_not`` returns ``None`` runs. The same predicate
serves the automatic choice, a backend asked for by name (which raises with that sentence) and :func:`explain`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from accel import transforms

log = logging.getLogger("accel")


@dataclass(frozen=True)
class Backend:
    """Two plain functions with the op's argument list, and the predicate that says when they cannot be used.

    ``devices`` names the device types this backend is meant for. Being refused on another device is no news; being
    refused on one of these is a fallback, which is logged once and is an error under ``use(strict=True)``.
    """

    name: str
    why_not: Callable[[Any], str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    devices: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    """Of the main tensors."""
    extra: bool = False
    """A faster way for some calls, or one that only some builds have: that it is refused is no news on any device."""


@dataclass(frozen=True)
class Op:
    """What the rest of the library needs to know of an op. ``prepare`` turns a public call into the checked
    arguments that every backend receives; its first element is the tensor whose device decides."""

    name: str
    function: Callable[..., Any]
    """The public one."""
    prepare: Callable[..., Any]
    backends: tuple[Backend, ...]
    example: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]
    """``example(device, dtype)`` makes the arguments of a small public call: what doctor and the tests ask about."""
    differentiable: bool = True
    """Whether its output has a gradient; an op without one refuses calls that ask for it."""
    straight_through: bool = False
    """Whether its gradient is one by definition, in which roundings pass it on, and not the derivative of what is
    computed: the reference has a backward of its own then, as kernels have, and no derivative beyond it."""

    def backend(self, name: str) -> Backend:
        for backend in self.backends:
            if backend.name == name:
                return backend
        names = ", ".join(b.name for b in self.backends)
        raise ValueError(f"{self.name} has no backend {name!r}; it has {names}")


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    OPS[op.name] = op
    return op


class _Settings:
    """What ``use`` changes. A plain object, so that torch.compile can read it and guard on it."""

    backend: str | None = None
    strict: bool = False
    deterministic: bool = False


_settings = _Settings()
_said: set[tuple[str, str]] = set()


@contextlib.contextmanager
def use(*, backend: str | None = None, strict: bool | None = None, deterministic: bool | None = None) -> Iterator[None]:
    """Within the block, prefer ``backend`` for every op that has one by that name, with ``strict=True`` turn a fallback
    to a slower backend into an error, and with ``deterministic=True`` take no kernel whose sums have no fixed order.
    Blocks nest; what is not named is inherited.

    Kernels of ours give the same bits for the same input, device and version whatever is asked for. Where torch has a
    faster one that does not, it is taken unless determinism is asked for here or by
    ``torch.use_deterministic_algorithms(True)``, which ``deterministic=False`` does not overrule.

    The setting holds for the whole process, like ``torch.set_num_threads``; enter it before threads are started.

    Raises:
        ValueError: no op has a backend of that name.
    """
    known = {b.name for op in OPS.values() for b in op.backends}
    if backend is not None and backend not in known:
        raise ValueError(f"no op has a backend {backend!r}; known: {', '.join(sorted(known))}")
    before = (_settings.backend, _settings.strict, _settings.deterministic)
    if backend is not None:
        _settings.backend = backend
    if strict is not None:
        _settings.strict = strict
    if deterministic is not None:
        _settings.deterministic = deterministic
    try:
        yield
    finally:
        _settings.backend, _settings.strict, _settings.deterministic = before


def deterministic() -> bool:
    """Whether the same input must give the same bits, by :func:`use` or by torch's own switch."""
    return _settings.deterministic or torch.are_deterministic_algorithms_enabled()


def _why_not(candidate: Backend, args: Any) -> str | None:
    """The backend's own reason, or that torch batches derivatives of plain torch alone, which the reference is."""
    if candidate.name != "reference" and transforms.batched_derivative():
        return "vmap has no rule for derivatives of kernels; backend='reference' has, and runs where none is asked for"
    return candidate.why_not(args)


def select(op: Op, args: Any, backend: str | None = None) -> Backend:
    """The backend that will run ``args``.

    Raises:
        ValueError: ``backend`` names no backend of the op.
        NotImplementedError: the one asked for refuses, or all do, or strict mode forbids the fallback.
    """
    if backend is None and _settings.backend is not None:
        for candidate in op.backends:
            if candidate.name == _settings.backend:
                backend = candidate.name
    if backend is not None:
        asked = op.backend(backend)
        reason = _why_not(asked, args)
        if reason is not None:
            raise NotImplementedError(f"{op.name}: backend {backend!r} cannot run this call: {reason}")
        return asked
    device = args[0].device.type
    refused: list[str] = []
    for candidate in op.backends:
        reason = _why_not(candidate, args)
        if reason is None:
            if refused:
                _report_fallback(op, candidate, refused)
            return candidate
        if device in candidate.devices and not candidate.extra:
            refused.append(f"{candidate.name}: {reason}")
    raise NotImplementedError(f"{op.name}: no backend can run this call; " + "; ".join(refused))


def _report_fallback(op: Op, chosen: Backend, refused: list[str]) -> None:
    text = f"{op.name} runs on the slower backend {chosen.name!r} because " + "; ".join(refused)
    if _settings.strict:
        raise NotImplementedError(text + " (strict mode)")
    _say_once(op.name, text)


@torch.compiler.assume_constant_result  # logging breaks a graph; said while tracing, it is said once all the same
def _say_once(name: str, text: str) -> None:
    if (name, text) not in _said:
        _said.add((name, text))
        log.warning("%s", text)


def reasons(op: Op, args: Any) -> dict[str, str | None]:
    """Every backend of the op with why it cannot run ``args``, ``None`` where it can."""
    return {b.name: _why_not(b, args) for b in op.backends}


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Say which backend ``function(*args, **kwargs)`` would run on and why not on the others, without running it.

    Example:
        ``print(accel.explain(accel.window_attention, qkv, table, num_heads=3, window_size=(7, 7)))``
    """
    name = getattr(function, "__name__", str(function))
    if name not in OPS:
        raise ValueError(f"{name} is no op of accel; ops: {', '.join(OPS)}")
    op = OPS[name]
    asked = kwargs.pop("backend", None)
    found = reasons(op, op.prepare(*args, **kwargs))
    wanted = asked or (_settings.backend if _settings.backend in found else None)
    chosen = wanted or next((n for n, reason in found.items() if reason is None), None)
    lines = [f"{op.name}:"]
    for backend, reason in found.items():
        mark = "->" if backend == chosen and reason is None else "  "
        lines.append(f" {mark} {backend}: {reason or 'can run this call'}")
    return "\n".join(lines)


# --- leaves, imported on first use; what kept one from loading is kept and is its reason ---

_leaves: dict[str, tuple[Any, str | None]] = {}


def leaf(module: str) -> tuple[Any, str | None]:
    """Import ``module`` once: ``(module, None)``, or ``(None, why it would not load)``."""
    if module not in _leaves:
        try:
            _leaves[module] = (importlib.import_module(module), None)
        except Exception as error:  # any failure of a leaf is a reason, never a crash of the library
            _leaves[module] = (None, f"{module} did not load: {type(error).__name__}: {error}")
    return _leaves[module]


@torch.compiler.assume_constant_result  # an import cannot be traced, and its outcome does not change
def leaf_reason(module: str) -> str | None:
    """Why ``module`` would not load, None where it did."""
    return leaf(module)[1]


def leaf_of(op: str) -> str:
    """``accel.kernels.<family>.<op>``, found from the op's own module name, ``accel.ops.<family>.<op>``."""
    return op.replace("accel.ops.", "accel.kernels.", 1)
