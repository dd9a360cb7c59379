"""transformers: ``forward`` of SAM's vision attention and of its copies, which do not go through the registry.

Their relative positions are decomposed by axis. No child is bypassed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from accel.patches import decomposed, transformers_calls
from accel.patches.entry import Entry, why_not_dropout, why_not_version
from accel.patches.timm_heads import split


def _why_not(attn: Any) -> str | None:
    return why_not_version(attn, "get_rel_pos", "qkv", "proj")


def _has_positions(attn: Any) -> bool:
    """SegGPT has another name for it."""
    return attn.use_rel_pos if hasattr(attn, "use_rel_pos") else attn.use_relative_position_embeddings


def _why_not_call(attn: Any, hidden_states: Tensor, output_attentions: bool | None = None) -> str | None:
    if not _has_positions(attn):
        return None
    return decomposed.why_not(attn.rel_pos_h.shape[1], *hidden_states.shape[1:3])


def _attention(
    attn: Any,
    attend: Callable[..., Tensor],
    hidden_states: Tensor,
    output_attentions: bool | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, None]:
    h, w = hidden_states.shape[1:3]
    q, k, v = split(attn.qkv(hidden_states).flatten(1, 2), 3, attn.num_attention_heads)
    scale = attn.scale
    if _has_positions(attn):
        axes = attn.get_rel_pos(h, h, attn.rel_pos_h), attn.get_rel_pos(w, w, attn.rel_pos_w)
        q, k = decomposed.with_positions(q, k, scale, *axes)
        scale = 1.0
    out = attend(q, k, v, scale=scale, dropout_p=dropout_p).transpose(1, 2).flatten(2)
    return attn.proj(out.unflatten(1, (h, w))), None


# --- the eager classes also return weights, and drop some ---


def _dropout(attn: Any) -> float:
    """SegGPT has none."""
    return getattr(attn, "dropout", 0.0)


def _why_not_eager_call(attn: Any, hidden_states: Tensor, output_attentions: bool | None = None) -> str | None:
    # a model above may collect them: these classes return them at every call, wanted or not
    if transformers_calls.weights_wanted(attn, {"output_attentions": output_attentions}):
        return transformers_calls.WEIGHTS
    return _why_not_call(attn, hidden_states) or why_not_dropout(_dropout(attn), attn.training)


def _eager(
    attn: Any, attend: Callable[..., Tensor], hidden_states: Tensor, output_attentions: bool | None = None
) -> tuple[Tensor, None]:
    return _attention(attn, attend, hidden_states, dropout_p=_dropout(attn) if attn.training else 0.0)


def _entries(prefix: str, sdpa: bool = False) -> tuple[Entry, ...]:
    target, op = f"transformers.models.{prefix}", "softmax_attention"
    eager = Entry(f"{target}Attention", "forward", _why_not, _eager, _why_not_eager_call, op)
    if not sdpa:
        return (eager,)
    return eager, Entry(f"{target}SdpaAttention", "forward", _why_not, _attention, _why_not_call, op)


ENTRIES = (
    *_entries("sam.modeling_sam.SamVision", sdpa=True),
    *_entries("sam_hq.modeling_sam_hq.SamHQVision", sdpa=True),
    *_entries("deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVision", sdpa=True),
    *_entries("unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrSamVision", sdpa=True),
    *_entries("got_ocr2.modeling_got_ocr2.GotOcr2Vision"),
    *_entries("pp_formulanet.modeling_pp_formulanet.PPFormulaNetVision"),
    *_entries("slanext.modeling_slanext.SLANeXtVision"),
    *_entries("seggpt.modeling_seggpt.SegGpt"),
)
