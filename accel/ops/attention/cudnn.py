"""The backend ``torch`` of softmax attention: cuDNN's kernels as torch calls them, where they are fastest.

They take no bias and no mask but causal order, and the sums of their backward have no fixed order, so they are not
asked where determinism is. In causal order they multiply what a query must not see by 0, which is NaN where that is not
finite: what they gave is looked at, and :func:`largest` tells our own kernels whether to compute it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel import dispatch
from accel.backends import HALF_DTYPES

HEAD_SIZES = (64, 128)
LEAST_TOKENS = 512
"""Of queries and of keys: the fewest that were measured, and the forward was 1.4 to 1.9 times as fast as ours there."""


@torch.compiler.assume_constant_result
def _has_cudnn() -> bool:
    named = hasattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward")
    return named and torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled()


def why_not_plain(args: Any, least_tokens: int) -> str | None:
    """Why no kernel of torch's, for whatever device, computes this call."""
    q, k, v = args.q, args.k, args.v
    extras = (args.bias, args.line, args.table, args.sinks, args.mask)
    if args.rule == "other" or any([x is not None for x in extras]) or args.softcap > 0.0 or args.dropout_p > 0.0:
        return "it is for calls without bias, mask, sinks, softcap and dropout, over all keys or in causal order"
    if args.rule == "causal" and q.shape[2] != k.shape[2]:
        return f"its causal order is for as many queries as keys, not {q.shape[2]} and {k.shape[2]}"
    if q.shape[3] != v.shape[3] or q.shape[3] not in HEAD_SIZES:
        return f"it is for head sizes of 64 and 128, not {q.shape[3]} and {v.shape[3]}"
    if not _at_least(least_tokens, min(q.shape[2], k.shape[2])):
        return f"it is for {least_tokens} tokens or more, not {q.shape[2]} queries and {k.shape[2]} keys"
    return None


def _at_least(bound: int, size: Any) -> bool:
    """Of a size that an export leaves open, whether it always is: the program is for all of them."""
    if not torch.compiler.is_exporting():
        return bool(size >= bound)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(size >= bound)


def why_not(args: Any) -> str | None:
    """Why cuDNN does not compute this call. ``torch.compile`` traces through this."""
    q = args.q
    if q.device.type != "cuda":
        return f"cuDNN runs on NVIDIA GPUs, and the tensors are on {q.device.type}"
    if torch.version.hip or torch.cuda.get_device_capability(q.device) < (9, 0):
        return "it is for compute capability 9.0 and above: cuDNN's kernels were measured to be faster on 9.0"
    if q.dtype not in HALF_DTYPES:
        return f"cuDNN takes bfloat16 and float16, not {q.dtype}"
    reason = why_not_plain(args, LEAST_TOKENS)
    if reason is not None:
        return reason
    if dispatch.deterministic():
        return "determinism is asked for, and the sums of cuDNN's backward have no fixed order"
    if not _has_cudnn():
        return "this torch has no cuDNN attention, or it is switched off"
    return None


_dimensions = {"log-sum-exp": 4}
"""Of what the forward of this torch gives and its backward wants back: versions differ in an axis of one behind."""


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp ``(B, H, T)``."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    _dimensions["log-sum-exp"] = lse.dim()
    return out, lse.view(q.shape[:3])


def backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    lse = lse.unsqueeze(-1) if _dimensions["log-sum-exp"] == 4 else lse
    unread = q.new_empty((), dtype=torch.int64)  # the random state, which dropout alone reads
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(
        *(grad_out, q, k, v, out, lse, unread, unread, None, None, None),
        *(q.shape[2], k.shape[2], 0.0, causal),
        scale=scale,
    )
    return grads


def largest(*tensors: Tensor) -> Tensor:
    """The largest magnitude in them, one fp32 number: NaN or infinite where anything in them is."""
    found = [torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32) for x in tensors]
    return found[0] if len(found) == 1 else torch.stack(found).amax()
