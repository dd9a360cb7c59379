"""transformers: multi-scale deformable attention, with the projections around it where it is no module of its own.

Ten models keep the sampling alone in a layer ``MultiScaleDeformableAttention``, whose ``forward`` is replaced. In the
other five it is a function of the module, so that ``forward`` of the attention is the smallest method around it; its
projections are called as the modules they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accel.patches import multi_scale
from accel.patches.entry import Entry, accepts_any_call

MODELS = "transformers.models"
WITH_LAYER = (
    "deformable_detr",
    "grounding_dino",
    "lw_detr",
    "mm_grounding_dino",
    "omdet_turbo",
    "pp_doclayout_v2",
    "pp_doclayout_v3",
    "pp_doclayout_v4",
    "rf_detr",
    "rt_detr",
)


def _layer(
    layer: Any,
    attend: Callable[..., Tensor],
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    # As in the class, shapes are those of the list, which needs no look at a tensor on a GPU.
    return attend(value, value_spatial_shapes_list, None, sampling_locations, attention_weights)


# --- the function of a module ---


def _why_not_function(attn: Any, function: Any, name: str) -> str | None:
    if getattr(function, "__module__", None) != type(attn).__module__ or function.__name__ != name:
        return f"{name} is not the function of its own module any more"
    return None


def _function_of_module(name: str) -> Callable[[Any], str | None]:
    def why_not(attn: Any) -> str | None:
        return _why_not_function(attn, getattr(sys.modules.get(type(attn).__module__), name, None), name)

    return why_not


# Mask2Former, OneFormer

_why_not_pixel = _function_of_module("multi_scale_deformable_attention")


def _why_not_pixel_call(attn: Any, hidden_states: Tensor, reference_points: Any = None, **given: Any) -> str | None:
    return multi_scale.why_not_reference_points(reference_points, 2, 4)


def _pixel(
    attn: Any,
    attend: Callable[..., Tensor],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Tensor | None = None,
    position_embeddings: Tensor | None = None,
    reference_points: Any = None,
    spatial_shapes: Tensor | None = None,
    spatial_shapes_list: Any = None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    hidden_states = attn.with_pos_embed(hidden_states, position_embeddings)
    value = multi_scale.heads_of(attn.value_proj(encoder_hidden_states), attn.n_heads, attention_mask)
    locations, weights = multi_scale.sampling(
        attn.sampling_offsets(hidden_states),
        attn.attention_weights(hidden_states),
        reference_points,
        multi_scale.as_tensor(spatial_shapes_list if spatial_shapes is None else spatial_shapes, reference_points),
        (attn.n_heads, attn.n_levels, attn.n_points),
    )
    return attn.output_proj(attend(value, spatial_shapes_list, None, locations, weights)), weights


# RT-DETRv2, D-FINE, DEIMv2: points that differ by level

_V2 = "multi_scale_deformable_attention_v2"


def _why_not_method(method: str) -> str | None:
    return None if method == "default" else f"its sampling method is {method!r}, which is not bilinear"


def _why_not_rt_detr(attn: Any) -> str | None:
    return _function_of_module(_V2)(attn) or _why_not_method(attn.method)


def _why_not_d_fine(attn: Any) -> str | None:
    return _why_not_function(attn, attn.ms_deformable_attn_core, _V2) or _why_not_method(attn.decoder_method)


def _why_not_boxes_call(attn: Any, hidden_states: Tensor, reference_points: Any = None, **given: Any) -> str | None:
    # The classes read points without a size otherwise.
    return multi_scale.why_not_reference_points(reference_points, 4)


def _why_not_d_fine_call(attn: Any, hidden_states: Tensor, **given: Any) -> str | None:
    if given.get("attention_mask") is not None:
        return "an attention mask is given, which the class holds against heads"
    return _why_not_boxes_call(attn, hidden_states, **given)


def _in_boxes(attn: Any, queries: Tensor, boxes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Locations and weights, for offsets that are parts of the sizes of ``boxes`` ``(N, Q, 1, 4)``."""
    offsets = attn.sampling_offsets(queries).unflatten(-1, (attn.n_heads, -1, 2))
    weights = attn.attention_weights(queries).unflatten(-1, (attn.n_heads, -1)).softmax(-1)
    offsets = offsets * scale.to(queries.dtype).unsqueeze(-1) * boxes[:, :, None, :, 2:] * attn.offset_scale
    return boxes[:, :, None, :, :2] + offsets, weights


def _rt_detr(
    attn: Any,
    attend: Callable[..., Tensor],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Tensor | None = None,
    position_embeddings: Tensor | None = None,
    reference_points: Any = None,
    spatial_shapes: Tensor | None = None,
    spatial_shapes_list: Any = None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    if position_embeddings is not None:
        hidden_states = hidden_states + position_embeddings
    padding = None if attention_mask is None else ~attention_mask
    value = multi_scale.heads_of(attn.value_proj(encoder_hidden_states), attn.n_heads, padding)
    locations, weights = _in_boxes(attn, hidden_states, reference_points, attn.n_points_scale)
    out = attend(value, spatial_shapes_list, None, locations, weights, num_points=attn.n_points_list)
    return attn.output_proj(out), weights


def _sum_dtype(value: Tensor, locations: Tensor, weights: Tensor) -> torch.dtype:
    """What the class sums in, and returns as no projection follows: the widest of the three, and float32 for what
    ``grid_sample`` makes on a CPU under autocast."""
    wide = torch.promote_types(torch.promote_types(value.dtype, locations.dtype), weights.dtype)
    on_cpu = value.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return torch.promote_types(wide, torch.float32) if on_cpu else wide


def _d_fine(
    attn: Any,
    attend: Callable[..., Tensor],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    reference_points: Any = None,
    encoder_hidden_states: Any = None,
    spatial_shapes: Tensor | None = None,
    spatial_shapes_list: Any = None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    value = multi_scale.heads_of(encoder_hidden_states, attn.n_heads, None)
    locations, weights = _in_boxes(attn, hidden_states, reference_points, attn.num_points_scale)
    out = attend(value, spatial_shapes_list, None, locations, weights, num_points=attn.num_points_list)
    return out.to(_sum_dtype(value, locations, weights)), weights


def _entry(
    model: str,
    cls: str,
    why_not: Callable[..., str | None],
    compute: Callable[..., Any],
    why_not_call: Callable[..., str | None] = accepts_any_call,
) -> Entry:
    target = f"{MODELS}.{model}.modeling_{model}.{cls}"
    return Entry(target, "forward", why_not, compute, why_not_call, "ms_deform_attn")


_PIXEL = "PixelDecoderEncoderMultiscaleDeformableAttention"
ENTRIES = (
    *(_entry(model, "MultiScaleDeformableAttention", accepts_any_call, _layer) for model in WITH_LAYER),
    _entry("mask2former", f"Mask2Former{_PIXEL}", _why_not_pixel, _pixel, _why_not_pixel_call),
    _entry("oneformer", f"OneFormer{_PIXEL}", _why_not_pixel, _pixel, _why_not_pixel_call),
    _entry("rt_detr_v2", "RTDetrV2MultiscaleDeformableAttention", _why_not_rt_detr, _rt_detr, _why_not_boxes_call),
    _entry("d_fine", "DFineMultiscaleDeformableAttention", _why_not_d_fine, _d_fine, _why_not_d_fine_call),
    _entry("deimv2", "Deimv2MultiscaleDeformableAttention", _why_not_d_fine, _d_fine, _why_not_d_fine_call),
)
