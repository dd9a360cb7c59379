"""mmpose: the gated attention unit of RTMPose, of one sequence or of another's keys and values.

Norm, projections and activation are called, residual and drop path left alone; bypassed is the dropout of weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from accel.patches.entry import DROPOUT, Entry, why_not_bypass, why_not_dropout, why_not_version

MODULE = "mmpose.models.utils.rtmcc_block"
FORMS = ("self-attn", "cross-attn")


def _why_not(block: Any) -> str | None:
    reason = why_not_version(block, "attn_type", "use_rel_bias", "pos_enc", "sqrt_s", "dropout_rate", "rel_pos_bias")
    if reason is not None:
        return reason
    if block.attn_type not in FORMS:
        return f"attn_type is {block.attn_type!r}, not one of {', '.join(FORMS)}"
    if block.pos_enc and not hasattr(sys.modules.get(MODULE), "rope"):
        return f"{MODULE} has no rope: not the version of the library that is known here"
    return why_not_bypass(block, dropout=DROPOUT) if block.dropout_rate > 0.0 else None


def _first(inputs: Any) -> Any:
    return inputs[0] if isinstance(inputs, tuple | list) and inputs else inputs


def _why_not_call(block: Any, inputs: Any) -> str | None:
    cross = block.attn_type == "cross-attn"
    if cross != isinstance(inputs, tuple | list):
        return f"its input is a {type(inputs).__name__}, which {block.attn_type} does not take"
    if cross and (len(inputs) != 3 or not all(isinstance(x, Tensor) and x.dim() == 3 for x in inputs)):
        return "its inputs are not three tensors (B, T, channels)"
    if not cross and inputs.dim() != 3:
        return f"its input has {inputs.dim()} axes, not (B, T, channels)"
    if cross and not (inputs[0].shape[0] == inputs[1].shape[0] and inputs[1].shape[:2] == inputs[2].shape[:2]):
        return f"its inputs do not fit each other: {', '.join(str(tuple(x.shape)) for x in inputs)}"
    if not cross and block.use_rel_bias:
        most = (block.w.shape[0] + 1) // 2
        if not 2 <= inputs.shape[1] <= most:
            return f"its input has {inputs.shape[1]} tokens, and its bias by distance takes 2 to {most}"
    return why_not_dropout(block.dropout.p, block.dropout.training) if block.dropout_rate > 0.0 else None


def _unit(block: Any, attend: Callable[..., Tensor], inputs: Any) -> Tensor:
    scale = 1.0 / block.sqrt_s  # of the biased logits
    rules: dict[str, Any] = {"scale": scale}
    rope = sys.modules[MODULE].rope if block.pos_enc else None  # type: ignore[attr-defined]
    if block.attn_type == "self-attn":
        hidden = block.act_fn(block.uv(block.ln(inputs)))
        gate, v, base = hidden.split([block.e, block.e, block.s], 2)
        uses = base.unsqueeze(2) * block.gamma + block.beta
        q, k = (uses if rope is None else rope(uses, dim=1)).unbind(2)
        if block.use_rel_bias:  # by key − query, and of the first entries only where the tokens are fewer
            rules["bias_table"] = block.w[: 2 * q.shape[1] - 1].flip(0)[:, None] * scale
            rules["bias_index"] = "toeplitz"
    else:
        x, k, v = inputs
        gate, q = block.act_fn(block.uv(block.ln(x))).split([block.e, block.s], 2)
        k, v = block.k_fc(k), block.v_fc(v)
        if rope is not None:
            q, k = rope(q, 1), rope(k, 1)
        if block.use_rel_bias:
            rules["bias"] = block.rel_pos_bias(q.shape[1], k.shape[1]) * scale
    rules["dropout_p"] = block.dropout.p if block.dropout_rate > 0.0 and block.dropout.training else 0.0
    out: Tensor = block.o(attend(q, k, v, gate, **rules))
    return out


ENTRIES = (
    Entry(f"{MODULE}.RTMCCBlock", "_forward", _why_not, _unit, _why_not_call, "gau_attention", tensor_of=_first),
)
