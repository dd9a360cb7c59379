"""One token of linear attention in Triton: a tile of a head's state is read, decayed, added to, asked and written.

A program owns a head, or a tile of its values where nothing is normalized: the sums of features are updated in place
too, and whoever needs them has to be the one that writes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.backends import why_not_gpu
from accel.kernels import _launch
from accel.kernels._launch import Launch, launch, power_of_two
from accel.kernels.linear.features import feature
from accel.ops.linear.linear_attention_step import Args, why_not_state

WARPS = 4


def why_not(args: Any) -> str | None:
    """Why this kernel cannot run the call; dtype is judged by the op."""
    reason = why_not_gpu(args.q, _launch.INTERPRETING) or why_not_state(args)
    if reason is not None:
        return reason
    if args.kv.numel() >= 2**31:
        return f"a state of {args.kv.numel()} numbers is more than one launch can count"
    return None


class Pointers(NamedTuple):
    """The tensors of a launch, None for what it lacks."""

    q: Tensor
    k: Tensor
    v: Tensor
    kv: Tensor
    k_sum: Tensor | None
    decay: Tensor | None
    out: Tensor


class Numbers(NamedTuple):
    """The numbers of a call."""

    scale: float
    eps: float


@dataclass(frozen=True)
class Config:
    """What the kernel is compiled for."""

    features: str
    block_d: int
    block_e: int


INTS = [
    *[f"{name}_{axis}" for name in ("q", "k", "v") for axis in ("b", "h", "d", "group")],
    *[f"kv_{axis}" for axis in "bhde"],
    *["sum_b", "sum_h", "decay_b", "decay_h", "heads", "group", "d_size", "e_size", "tiles"],
]


@triton.jit
def _features(ptr, at, inside, NAME: tl.constexpr):
    x = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, feature(x, NAME), 0.0)


@triton.jit(do_not_specialize=INTS)
def step_kernel(
    pointers, numbers,
    q_b, q_h, q_d, q_group, k_b, k_h, k_d, k_group, v_b, v_h, v_d, v_group, kv_b, kv_h, kv_d, kv_e,
    sum_b, sum_h, decay_b, decay_h, heads, group, d_size, e_size, tiles,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """``heads`` of states, ``group`` outputs to each; ``*_group``: how many heads share one of that tensor."""
    D: tl.constexpr = CONFIG.block_d
    E: tl.constexpr = CONFIG.block_e
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    k_ptr = pointers.k + batch * k_b + (head // k_group).to(tl.int64) * k_h
    v_ptr = pointers.v + batch * v_b + (head // v_group).to(tl.int64) * v_h
    kv_ptr = pointers.kv + batch * kv_b + head.to(tl.int64) * kv_h
    shrink = 1.0
    if pointers.decay is not None:
        shrink = tl.exp(tl.load(pointers.decay + batch * decay_b + head.to(tl.int64) * decay_h))
    if pointers.k_sum is not None:
        sum_ptr = pointers.k_sum + batch * sum_b + head.to(tl.int64) * sum_h
        for d0 in tl.range(0, d_size, D):
            d = d0 + tl.arange(0, D)
            in_d = d < d_size
            key = _features(k_ptr, d.to(tl.int64) * k_d, in_d, CONFIG.features)
            tl.store(sum_ptr + d, tl.load(sum_ptr + d, mask=in_d, other=0.0) * shrink + key, mask=in_d)
        tl.debug_barrier()
    for i in tl.range(0, group):
        h = head * group + i
        q_ptr = pointers.q + batch * q_b + (h // q_group).to(tl.int64) * q_h
        out_ptr = pointers.out + (batch * heads * group + h) * e_size
        factor = numbers.scale
        if pointers.k_sum is not None:
            den = 0.0
            for d0 in tl.range(0, d_size, D):
                d = d0 + tl.arange(0, D)
                in_d = d < d_size
                asked = _features(q_ptr, d.to(tl.int64) * q_d, in_d, CONFIG.features)
                den += tl.sum(asked * tl.load(sum_ptr + d, mask=in_d, other=0.0), 0)
            den = den * numbers.scale + numbers.eps
            factor = tl.where(den == 0.0, 0.0, numbers.scale / tl.where(den == 0.0, 1.0, den))
        for e0 in tl.range(tile * E, e_size, tiles * E):
            e = e0 + tl.arange(0, E)
            in_e = e < e_size
            found = tl.zeros((E,), tl.float32)
            for d0 in tl.range(0, d_size, D):
                d = d0 + tl.arange(0, D)
                in_d = d < d_size
                inside = in_d[:, None] & in_e[None, :]
                at = kv_ptr + d.to(tl.int64)[:, None] * kv_d + e.to(tl.int64)[None, :] * kv_e
                state = tl.load(at, mask=inside, other=0.0)
                if i == 0:  # the other outputs find it updated
                    key = _features(k_ptr, d.to(tl.int64) * k_d, in_d, CONFIG.features)
                    value = tl.load(v_ptr + e.to(tl.int64) * v_d, mask=in_e, other=0.0).to(tl.float32)
                    state = state * shrink + key[:, None] * value[None, :]
                    tl.store(at, state, mask=inside)
                asked = _features(q_ptr, d.to(tl.int64) * q_d, in_d, CONFIG.features)
                found += tl.sum(asked[:, None] * state, 0)
            tl.store(out_ptr + e, (found * factor).to(pointers.out.dtype.element_ty), mask=in_e)
        tl.debug_barrier()


def _strides(name: str, x: Tensor, heads: int) -> dict[str, int]:
    steps = {f"{name}_{axis}": x.stride(i) for axis, i in (("b", 0), ("h", 1), ("d", 3))}
    return {**steps, f"{name}_group": heads // x.shape[1]}


def _plan(args: Args) -> tuple[Tensor, Launch]:
    batch, heads, d, e = args.kv.shape
    out = args.q.new_empty((batch, args.heads, 1, e), dtype=_launch.store_dtype(args.q.dtype))
    config = Config(args.features, power_of_two(d, 16, 64), power_of_two(e, 16, 64))
    tiles = 1 if args.k_sum is not None else triton.cdiv(e, config.block_e)
    decay = args.decay
    return out, launch(
        step_kernel,
        batch * heads * tiles,
        WARPS,
        pointers=Pointers(args.q, args.k, args.v, args.kv, args.k_sum, decay, out),
        numbers=Numbers(args.scale, args.eps),
        **_strides("q", args.q, args.heads),
        **_strides("k", args.k, heads),
        **_strides("v", args.v, heads),
        **{f"kv_{axis}": args.kv.stride(i) for i, axis in enumerate("bhde")},
        sum_b=0 if args.k_sum is None else args.k_sum.stride(0),
        sum_h=0 if args.k_sum is None else args.k_sum.stride(1),
        decay_b=decay.stride(0) if decay is not None and decay.dim() == 3 else 0,
        decay_h=0 if decay is None else decay.stride(-2 if decay.dim() == 3 else 0),
        heads=heads,
        group=args.heads // heads,
        d_size=d,
        e_size=e,
        tiles=tiles,
        CONFIG=config,
    )


def forward(*args: Any) -> Tensor:
    """The output; the state is updated. Arguments are the fields of ``Args`` of the op."""
    given = Args(*args)
    with _launch.device_of(given.q):
        out, step = _plan(given)
        step.run()
    return out.to(given.q.dtype)


# --- what the compile gate builds ---


def compile_cases() -> Iterator[_launch.CompileCase]:
    """The largest tile plain, with all there can be, and with states by columns; and the smallest."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    calls: list[tuple[torch.dtype, int, dict[str, Any]]] = [
        (bf16, 128, {"normalize": False, "features": "identity"}),
        (bf16, 128, {"features": "elu1", "decay": True}),
        (fp32, 128, {"features": "exp", "decay": True, "columns": True}),
        (fp16, 16, {"features": "squared_relu"}),
    ]
    return _launch.once(_case(dtype, size, **flags) for dtype, size, flags in calls)


def _case(
    dtype: torch.dtype, size: int, features: str, normalize: bool = True, decay: bool = False, columns: bool = False
) -> _launch.CompileCase:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    name = f"{str(dtype)[6:]} {size} {features}{' normalize' * normalize}{' decay' * decay}{' columns' * columns}"
    token, kv = empty(8, 32, 1, size, dtype=dtype), empty(8, 32, size, size)
    args = Args(
        q=token,
        k=token,
        v=token,
        kv=kv.mT if columns else kv,
        k_sum=empty(8, 32, size) if normalize else None,
        decay=empty(32) if decay else None,
        features=features,
        normalize=normalize,
        scale=1.0,
        eps=1e-6,
    )
    return _plan(args)[1].case(name)
