"""The backend ``torch`` of softmax attention on a CPU: torch's flash kernel, where the processor has AMX.

What is not finite is our own kernel's to compute: torch's makes 0 of a row with an infinite logit, and in causal order
multiplies what a query must not see by 0 where that lies in a tile of which it sees a part. The log-sum-exp and the
output tell.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from accel import dispatch
from accel.ops.amx import WITHOUT, has_amx
from accel.ops.attention import cudnn

LEAST_TOKENS = 192
LEAST_HEADS = 4
BACKWARD_KEYS = 2048 * 64
"""Which calls go to torch, by what two cores of an Emerald Rapids gave in bf16 (``cpu-emerald-rapids-2-cores`` in
``benchmarks/results``), ours against torch's, with 8 heads.

The forward: 2.1 times torch's time at T = 256, 2.0 at 512, 2.1 at 1024, 2.4 at 2048, 3.2 at 1024 with heads of 128; in
causal order 1.4 at 256, 1.6 at 1024, 1.8 at 2048, 2.0 at 1024 with heads of 128, 1.7 where 4 heads share a key. A whole
ViT-S, of 197 tokens, lost 13 % to it. Shorter calls were not measured. Nor was what torch does not pack for AMX: fewer
than 4 heads, and sizes that 64 does not divide.

The backward, as forward + backward less forward: ours 0.63 of torch's at T = 256, 0.79 at 512, 0.94 at 1024; in causal
order 0.53 at 256, 0.71 at 1024, 0.94 at 2048, 0.95 at 1024 with heads of 128, 0.82 where 4 heads share a key. Torch's
was the faster one over all keys of two calls: 0.87 of ours at T = 2048, 0.72 at 1024 with heads of 128.
"""


@torch.compiler.assume_constant_result
def _has_amx() -> bool:
    return has_amx() and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")


def why_not(args: Any) -> str | None:
    """Why torch's flash kernel does not compute this call. ``torch.compile`` traces through this."""
    if not _has_amx():
        return WITHOUT
    if args.q.dtype != torch.bfloat16:
        return f"on a CPU it is for bfloat16, which torch multiplies in AMX, not {args.q.dtype}"
    if args.q.shape[1] < LEAST_HEADS:
        return f"it is for {LEAST_HEADS} heads or more, which torch packs for AMX, not {args.q.shape[1]}"
    if dispatch.deterministic():
        return "determinism is asked for, and the bits of torch's sums depend on the number of threads"
    return cudnn.why_not_plain(args, LEAST_TOKENS)


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp ``(B, H, T)``."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v over all keys."""
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        grad_out, q, k, v, out, lse, 0.0, False, scale=scale
    )
    return grads


def backward_is_faster(args: Any) -> bool:
    """Whether torch's was measured to be faster than ours."""
    grouped = args.q.shape[1] != args.k.shape[1]  # of which torch's gradients were less exact than ours
    return not grouped and args.rule == "all" and args.k.shape[2] * args.k.shape[3] >= BACKWARD_KEYS


def finite(x: Tensor) -> bool:
    """Whether all in it is finite: a sum is not, where one of its terms is not."""
    return math.isfinite(x.sum(dtype=torch.float32).item())
