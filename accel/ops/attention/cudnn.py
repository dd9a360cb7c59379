"""The backend ``torch`` of softmax attention: cuDNN's forward kernel, where it is the fastest there is.

It takes no bias and no mask. Under a causal rule it would multiply the values a query must not see by 0, which is NaN
where they are, so it is not asked for that either. Its log-sum-exp serves our own backward, whose sums have one order;
cuDNN's has none unless the whole process asks for determinism.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.backends import HALF_DTYPES

HEAD_SIZES = (64, 128)
LEAST_TOKENS = 512
"""Of queries and of keys: the fewest that were measured, and it was 1.4 to 1.9 times as fast as our forward there."""


@torch.compiler.assume_constant_result
def _has_cudnn() -> bool:
    named = hasattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention")
    return named and torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled()


def why_not(args: Any) -> str | None:
    """Why cuDNN does not compute this call. ``torch.compile`` traces through this."""
    q, k, v = args.q, args.k, args.v
    if q.device.type != "cuda":
        return f"cuDNN runs on NVIDIA GPUs, and the tensors are on {q.device.type}"
    if torch.version.hip or torch.cuda.get_device_capability(q.device) < (9, 0):
        return "it is for compute capability 9.0 and above: cuDNN's kernel was measured to be faster on 9.0"
    if q.dtype not in HALF_DTYPES:
        return f"cuDNN takes bfloat16 and float16, not {q.dtype}"
    extras = (args.bias, args.line, args.table, args.sinks, args.mask)
    if args.rule != "all" or any([x is not None for x in extras]) or args.softcap > 0.0 or args.dropout_p > 0.0:
        return "it is for calls without bias, mask, sinks, softcap and dropout"
    if q.shape[3] != v.shape[3] or q.shape[3] not in HEAD_SIZES:
        return f"it is for head sizes of 64 and 128, not {q.shape[3]} and {v.shape[3]}"
    if q.shape[1] != k.shape[1]:
        return f"it is for as many heads of keys as of queries, not {k.shape[1]} and {q.shape[1]}"
    if min(q.shape[2], k.shape[2]) < LEAST_TOKENS:
        return f"it is for {LEAST_TOKENS} tokens or more, not {q.shape[2]} queries and {k.shape[2]} keys"
    if not _has_cudnn():
        return "this torch has no cuDNN attention, or it is switched off"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp ``(B, H, T)``."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        q, k, v, None, True, 0.0, False, False, scale=scale
    )
    return out, lse.view(q.shape[:3])
