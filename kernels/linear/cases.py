"""What the compile gate builds of linear attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from accel.kernels import _launch
from accel.kernels.linear.arguments import LARGEST
from accel.kernels.linear.plans import backward_plan, decay_gradient, forward_plan
from accel.ops.linear.linear_attention import Args


def compile_cases() -> Iterator[_launch.CompileCase]:
    """Every tile of the table, plain and in the heaviest calls that reach it; what the compiler sees twice, once."""
    return _launch.once(case for dtype, sizes, flags in _calls() for case in _cases(dtype, sizes, **flags))


def _calls() -> Iterator[tuple[torch.dtype, tuple[int, int], dict[str, Any]]]:
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    everything = {"decay": "token", "mask": True, "state": True}
    for dtype in (bf16, fp16, fp32):
        for size in (64, 128, 256):
            if size <= LARGEST[dtype]:
                yield dtype, (size, size), everything
                if dtype != fp32:  # the output is made again
                    yield dtype, (size, size), {**everything, "features": "squared_relu"}
    yield bf16, (128, 128), {}
    yield bf16, (128, 64), {"decay": "head", "normalize": False, "features": "identity", "shared": True}
    yield bf16, (64, 64), {"decay": "token", "state": True, "packed": True, "features": "squared_relu"}
    yield bf16, (64, 128), {"decay": "token", "mask": True, "state": True, "parts": True, "features": "exp"}
    yield bf16, (64, 64), {"causal": False, "mask": True, "state": True, "features": "relu"}
    yield fp16, (32, 32), {"causal": False, "features": "relu"}
    yield fp32, (32, 32), {"causal": False, "mask": True, "aligned": False}


def _cases(
    dtype: torch.dtype,
    sizes: tuple[int, int],
    features: str = "elu1",
    causal: bool = True,
    normalize: bool = True,
    decay: str = "",
    mask: bool = False,
    state: bool = False,
    packed: bool = False,
    parts: bool = False,
    shared: bool = False,
    aligned: bool = True,
) -> Iterator[_launch.CompileCase]:
    """The launches of one call, forward and backward, on tensors that have shapes only."""
    name = f"{str(dtype)[6:]} D={sizes[0]} E={sizes[1]} {features}"
    for flag in ("causal", "normalize", "mask", "state", "packed", "parts", "shared"):
        name += f" {flag}" if locals()[flag] else ""
    name += f" decay={decay}" if decay else ""
    heads, batch = (2, 1) if parts or packed else (16, 32)
    tokens = 2048
    d, e = sizes

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def main(count: int, size: int) -> Tensor:
        return empty(batch, count, tokens, size + (0 if aligned else 1), dtype=dtype)[..., :size]

    cu = empty(257, dtype=torch.int32) if packed else None
    sequences = 256 if packed else batch
    of_keys = heads // 2 if shared else heads
    args = Args(
        q=main(of_keys, d),
        k=main(of_keys, d),
        v=main(heads, e),
        decay={"": None, "head": empty(1, heads, 1), "token": empty(batch, heads, tokens)}[decay],
        kv=empty(sequences, heads, d, e) if state else None,
        k_sum=empty(sequences, heads, d) if state and normalize else None,
        key_mask=empty(batch, tokens, dtype=torch.bool) if mask else None,
        cu_q=cu,
        cu_k=None,
        features=features,
        causal=causal,
        normalize=normalize,
        return_state=state,
        keep=True,
        scale=1.0,
        eps=1e-6,
    )

    def of(capability: tuple[int, int]) -> Iterator[_launch.CompileCase]:
        out, plan = forward_plan(args, capability)
        den = empty(*out.shape[:3]) if normalize else empty(0)
        grad_kv = empty(sequences, heads, d, e) if state else None
        grad_k_sum = empty(sequences, heads, d) if state and normalize else None
        back = backward_plan(out, grad_kv, grad_k_sum, out, den, args, [True] * 3, capability)
        for way, launches in (("forward", plan.launches), ("backward", back.launches)):
            for n, step in enumerate(launches):
                yield step.case(f"{name} {way} {n}")
        if decay:
            yield decay_gradient(back, args, cu)[1].case(name)

    old, hopper = list(of((8, 0))), list(of((9, 0)))  # by tiles, a launch more or less
    if old == hopper:
        yield from old
    else:
        yield from (replace(step, architectures=(80, 100)) for step in old)
        yield from (replace(step, name=f"{step.name} hopper", architectures=(90,)) for step in hopper)
