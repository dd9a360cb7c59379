"""Checks of what a call of linear attention is given."""

from __future__ import annotations

import torch
from torch import Tensor

from accel import memo
from accel.backends import check_beside

State = tuple[Tensor, Tensor | None]
"""``(kv, k_sum)``: the sums of φ(k)ᵀ v and of φ(k) that a head has seen."""


def to_heads(x: Tensor, heads: int) -> Tensor:
    """``x`` with each of its heads as often as output heads, or states, read it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_beside(x, name, q if isinstance(q, Tensor) else x, "q")
        if x.dim() != 4:
            raise ValueError(f"{name} must be (B, H, tokens, head size), got {tuple(x.shape)=}")
    if not (q.dtype == k.dtype == v.dtype):
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")

    def shapes() -> str:  # which torch.compile cannot make of sizes that vary, and is asked for in an error alone
        return f"{tuple(q.shape)=}, {tuple(k.shape)=}, {tuple(v.shape)=}"

    if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[2] != v.shape[2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q (B, Hq, T, D), k (B, Hk, S, D) and v (B, Hv, S, E) do not fit: {shapes()}")
    each = (q.shape[1], k.shape[1], v.shape[1])
    heads, state_heads = max(each), max(each[1:])
    if any([n == 0 or heads % n for n in each]) or any([state_heads % n for n in each[1:]]) or heads % state_heads:
        raise ValueError(
            f"the heads of q, k and v must divide the most of them, those of k and v the more of both: {shapes()}"
        )


def check_key_mask(mask: Tensor | None, k: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"key_mask must be boolean, True where a key takes part, got {kind}")
    if tuple(mask.shape) != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_mask must be (B, S) = ({k.shape[0]}, {k.shape[2]}), got {tuple(mask.shape)=}")
    if mask.device != k.device:
        raise ValueError(f"key_mask is on {mask.device} but k is on {k.device}")
    return mask.contiguous()


def check_state(
    state: State | None, shape: tuple[int, int, int, int], normalize: bool, q: Tensor, inner: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    if state is None:
        return None, None
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"initial_state must be a pair (kv, k_sum), got {type(state).__name__}")
    kv, k_sum = state
    if normalize and k_sum is None:
        raise ValueError("initial_state has k_sum=None, which normalize=True needs")
    given = [("kv", kv, shape), ("k_sum", k_sum, shape[:3])] if normalize else [("kv", kv, shape)]
    found: list[Tensor | None] = []
    for name, x, wanted in given:
        check_beside(x, f"{name} of initial_state", q, "q")
        assert x is not None
        if x.dtype not in (torch.float32, inner):
            raise TypeError(f"{name} of initial_state must be float32, got {x.dtype}")
        if tuple(x.shape) != wanted:
            raise ValueError(f"{name} of initial_state must be {tuple(wanted)}, got {tuple(x.shape)}")
        found.append(x.to(inner).contiguous())
    return found[0], found[1] if normalize else None


_largest: memo.Facts[float] = memo.Facts()


def check_decay(
    decay: Tensor | None, full: tuple[int, int, int], causal: bool, q: Tensor, inner: torch.dtype
) -> Tensor | None:
    """``(1, Hs, 1)`` or ``(B, Hs, T)``."""
    if decay is None:
        return None
    check_beside(decay, "log_decay", q, "q")
    if not causal:
        raise ValueError(f"log_decay needs causal=True: without an order nothing is past, got {tuple(decay.shape)=}")
    if tuple(decay.shape) not in ((full[1],), full):
        raise ValueError(f"log_decay must be (Hs,) = ({full[1]},) or (B, Hs, T) = {full}, got {tuple(decay.shape)}")
    if decay.device.type == "cpu" and decay.numel() and not torch.compiler.is_compiling():
        largest = _largest.get_or_read((decay,), None, lambda: float(decay.detach().amax()))
        if not largest <= 0.0 and largest == largest:
            raise ValueError(f"log_decay must be at most 0, its largest value is {largest}")
    wide = decay.to(inner)
    return wide[None, :, None] if wide.dim() == 1 else wide.contiguous()
