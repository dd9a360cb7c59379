"""mmcv: deformable convolutions, given their offsets or predicting them, and multi-scale deformable attention.

``conv_offset`` and all projections are called as the modules they are. Any batch is taken, whatever ``im2col_step``.
An offset to exactly −1 has no gradient in mmcv's kernels, where torchvision and ``grid_sample`` have one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.patches import multi_scale
from accel.patches.entry import Entry, accepts_any_call

OPS = "mmcv.ops"

# --- deformable convolution ---


def _why_not(conv: Any) -> str | None:
    for name in ("weight", "kernel_size", "stride", "padding", "dilation", "deform_groups"):
        if not hasattr(conv, name):
            return f"{type(conv).__name__} has no {name}: not the version of the library that is known here"
    return None


def _why_not_pack(conv: Any) -> str | None:
    if not hasattr(conv, "conv_offset"):
        return f"{type(conv).__name__} has no conv_offset: not the version of the library that is known here"
    return _why_not(conv)


def _why_not_call(conv: Any, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> str | None:
    # The op would take the number of groups from the offsets; the class compares it with its own.
    if x.dim() != 4 or offset.dim() != 4:
        return f"its input has {x.dim()} axes and its offset {offset.dim()}, not 4"
    channels = 2 * conv.deform_groups * conv.kernel_size[0] * conv.kernel_size[1]
    if offset.shape[1] != channels:
        return f"its offset has {offset.shape[1]} channels, not {channels}"
    return None


def _convolve(
    conv: Any, attend: Callable[..., Tensor], x: Tensor, offset: Tensor, mask: Tensor | None = None
) -> Tensor:
    bias = getattr(conv, "bias", None)
    x = x.type_as(offset)  # the class computes in the dtype of the offsets
    how = (conv.stride, conv.padding, conv.dilation)
    return attend(x, offset, conv.weight.type_as(x), bias, *how, mask, border_gradient=False)


def _conv(conv: Any, attend: Callable[..., Tensor], x: Tensor, offset: Tensor) -> Tensor:
    """A map smaller than the kernel is padded on the right and at the bottom, and so many outputs are cut off."""
    missing = [max(kernel - size, 0) for kernel, size in zip(conv.kernel_size, x.shape[2:], strict=True)]
    if not any(missing):
        return _convolve(conv, attend, x, offset)
    padding = (0, missing[1], 0, missing[0])
    out = _convolve(conv, attend, F.pad(x, padding), F.pad(offset, padding))
    return out[:, :, : out.shape[2] - missing[0], : out.shape[3] - missing[1]].contiguous()


def _pack(conv: Any, attend: Callable[..., Tensor], x: Tensor) -> Tensor:
    return _convolve(conv, attend, x, conv.conv_offset(x))


def _modulated_pack(conv: Any, attend: Callable[..., Tensor], x: Tensor) -> Tensor:
    y, x_, mask = conv.conv_offset(x).chunk(3, dim=1)
    return _convolve(conv, attend, x, torch.cat((y, x_), 1), mask.sigmoid())


# --- multi-scale deformable attention ---


def _why_not_attention_call(attn: Any, query: Tensor, reference_points: Any = None, **given: Any) -> str | None:
    if not isinstance(given.get("spatial_shapes"), Tensor):
        return "its spatial shapes are not a tensor"
    return multi_scale.why_not_reference_points(reference_points, 2, 4)


def _attention(
    attn: Any,
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    identity: Tensor | None = None,
    query_pos: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    reference_points: Any = None,
    spatial_shapes: Any = None,
    level_start_index: Tensor | None = None,
    residual: Tensor | None = None,
    **unused: Any,
) -> Tensor:
    identity = residual if identity is None else identity  # its older name
    value = query if value is None else value
    identity = query if identity is None else identity
    query = query if query_pos is None else query + query_pos
    if not attn.batch_first:
        query, value = query.transpose(0, 1), value.transpose(0, 1)
    value = multi_scale.heads_of(attn.value_proj(value), attn.num_heads, key_padding_mask)
    locations, weights = multi_scale.sampling(
        attn.sampling_offsets(query),
        attn.attention_weights(query),
        reference_points,
        spatial_shapes,
        (attn.num_heads, attn.num_levels, attn.num_points),
    )
    # On a GPU the class runs its own kernel, on a CPU grid_sample, which moves a sample at exactly −1.
    border = value.device.type != "cuda"
    out = attn.output_proj(attend(value, spatial_shapes, level_start_index, locations, weights, border_gradient=border))
    return attn.dropout(out if attn.batch_first else out.transpose(0, 1)) + identity


def _entry(
    target: str,
    why_not: Callable[..., str | None],
    compute: Callable[..., Tensor],
    why_not_call: Callable[..., str | None] = accepts_any_call,
    op: str = "deform_conv2d",
) -> Entry:
    return Entry(f"{OPS}.{target}", "forward", why_not, compute, why_not_call, op)


ENTRIES = (
    _entry("deform_conv.DeformConv2d", _why_not, _conv, _why_not_call),
    _entry("deform_conv.DeformConv2dPack", _why_not_pack, _pack),
    _entry("modulated_deform_conv.ModulatedDeformConv2d", _why_not, _convolve, _why_not_call),
    _entry("modulated_deform_conv.ModulatedDeformConv2dPack", _why_not_pack, _modulated_pack),
    _entry(
        "multi_scale_deform_attn.MultiScaleDeformableAttention",
        accepts_any_call,
        _attention,
        _why_not_attention_call,
        "ms_deform_attn",
    ),
)
