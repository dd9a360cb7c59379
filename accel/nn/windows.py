"""Shifted-window attention: torchvision's three modules over :func:`accel.window_attention`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.ops.grid import relative_position_index
from accel.ops.windows.window_attention import window_attention

__all__ = ["ShiftedWindowAttention", "ShiftedWindowAttention3d", "ShiftedWindowAttentionV2"]

# --- what the modules compute; torchvision's own modules hold the same attributes, so patching them runs this too ---


def shifted_window_attention(module: Any, x: Tensor, attend: Callable[..., Tensor] = window_attention) -> Tensor:
    """Swin v1 on a map ``(B, Hh, Ww, C)`` with the parameters that ``module`` holds now."""
    return _project(
        module, x, module.qkv.bias, attend, module.relative_position_bias_table,
        window_size=module.window_size, shift_size=module.shift_size,
    )  # fmt: skip


def shifted_window_attention_v2(module: Any, x: Tensor, attend: Callable[..., Tensor] = window_attention) -> Tensor:
    """Swin v2 on a map ``(B, Hh, Ww, C)``: cosine attention, a continuous bias, and keys without a bias."""
    bias = module.qkv.bias
    if bias is not None:
        q, k, v = bias.chunk(3)
        bias = torch.cat([q, torch.zeros_like(k), v])
    table = 16 * torch.sigmoid(module.cpb_mlp(module.relative_coords_table).view(-1, module.num_heads))
    return _project(
        module, x, bias, attend, table,
        window_size=module.window_size, shift_size=module.shift_size, logit_scale=module.logit_scale,
    )  # fmt: skip


def shifted_window_attention_3d(module: Any, x: Tensor, attend: Callable[..., Tensor] = window_attention) -> Tensor:
    """Video Swin on a map ``(B, D, Hh, Ww, C)``. A window larger than the map shrinks to it, unshifted."""
    if x.dim() != 5:
        raise ValueError(f"x must be (B, D, Hh, Ww, C), got {tuple(x.shape)=}")
    size = x.shape[1:4]
    fits = [size[i] > module.window_size[i] for i in range(3)]
    window = [module.window_size[i] if fits[i] else size[i] for i in range(3)]
    shift = [module.shift_size[i] if fits[i] else 0 for i in range(3)]
    table = module.relative_position_bias_table
    how: dict[str, Any] = {"window_size": window, "shift_size": shift, "clamp_shift": False}
    if window == list(module.window_size):
        return _project(module, x, module.qkv.bias, attend, table, **how)
    # The index of the full window is cut to the first N tokens, which is no table of the smaller window.
    n = math.prod(window)
    bias = table[module.relative_position_index[:n, :n]].permute(2, 0, 1)
    return _project(module, x, module.qkv.bias, attend, None, bias=bias, **how)


def _project(
    module: Any, x: Tensor, qkv_bias: Tensor | None, attend: Callable[..., Tensor], table: Tensor | None, **how: Any
) -> Tensor:
    """Projection, attention, projection. Padded tokens hold the bias, all that a projection makes of a zero."""
    out = attend(
        F.linear(x, module.qkv.weight, qkv_bias),
        table,
        num_heads=module.num_heads,
        qkv_bias=qkv_bias,
        dropout_p=module.attention_dropout if module.training else 0.0,
        **how,
    )
    return F.dropout(F.linear(out, module.proj.weight, module.proj.bias), module.dropout, module.training)


# --- the modules ---


class _Attention(nn.Module):
    """What the three have in common. Parameters are drawn in torchvision's order, so one seed gives equal weights."""

    axes = 2

    def __init__(
        self,
        dim: int,
        window_size: Sequence[int],
        shift_size: Sequence[int],
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(window_size) != self.axes or len(shift_size) != self.axes:
            raise ValueError(
                f"window_size and shift_size must hold {self.axes} integers, got {window_size=}, {shift_size=}"
            )
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got {dim=}, {num_heads=}")
        self.window_size = list(window_size)
        self.shift_size = list(shift_size)
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self._define_bias()
        self._define_index()

    def _define_bias(self) -> None:
        rows = math.prod(2 * w - 1 for w in self.window_size)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, self.num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def _define_index(self) -> None:
        """The kernels work this out by themselves; the buffer keeps checkpoints interchangeable."""
        self.register_buffer("relative_position_index", relative_position_index(self.window_size).flatten())

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, shift_size={self.shift_size}, num_heads={self.num_heads}"


class ShiftedWindowAttention(_Attention):
    """Shifted-window attention of Swin Transformer with its projections, as ``torchvision``'s module of this name.

    Args:
        dim: channels C.
        window_size: ``[wh, ww]``; a map that is no multiple of it is padded at the far end.
        shift_size: ``[sh, sw]``; an axis whose window covers the padded map is not shifted.
        num_heads: H, dividing C.
        qkv_bias: whether the projection to q, k, v has a bias.
        proj_bias: whether the output projection has one.
        attention_dropout: probability in [0, 1) that an attention weight is dropped in training.
        dropout: the same for the output.

    Takes and returns ``(B, Hh, Ww, C)``. See :func:`accel.window_attention` for dtypes, backends and errors.
    """

    def forward(self, x: Tensor) -> Tensor:
        return shifted_window_attention(self, x)


class ShiftedWindowAttentionV2(_Attention):
    """Shifted-window attention of Swin Transformer V2, as ``torchvision``'s module of this name.

    Cosine attention with a learned ``logit_scale`` per head, and a relative position bias that a small network
    ``cpb_mlp`` computes from log-spaced coordinates. Arguments as for :class:`ShiftedWindowAttention`; keys have no
    bias, whatever the middle third of ``qkv.bias`` holds.
    """

    def __init__(self, dim: int, window_size: Sequence[int], shift_size: Sequence[int], num_heads: int,
                 qkv_bias: bool = True, proj_bias: bool = True, attention_dropout: float = 0.0,
                 dropout: float = 0.0) -> None:  # fmt: skip
        super().__init__(dim, window_size, shift_size, num_heads, qkv_bias, proj_bias, attention_dropout, dropout)
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones((num_heads, 1, 1))))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False))
        if qkv_bias:
            with torch.no_grad():
                self.qkv.bias[dim : 2 * dim].zero_()

    def _define_bias(self) -> None:
        axes = [torch.arange(1 - w, w, dtype=torch.float32) / max(w - 1, 1) * 8 for w in self.window_size]
        coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).unsqueeze(0)
        self.register_buffer("relative_coords_table", torch.sign(coords) * torch.log2(coords.abs() + 1) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return shifted_window_attention_v2(self, x)


class ShiftedWindowAttention3d(_Attention):
    """Shifted-window attention of Video Swin Transformer, as ``torchvision``'s module of this name.

    Arguments as for :class:`ShiftedWindowAttention` with three axes, depth first. An axis of the map that the window
    covers takes the map's size as its window and no shift. Takes and returns ``(B, D, Hh, Ww, C)``.
    """

    axes = 3

    def _define_index(self) -> None:
        self.register_buffer("relative_position_index", relative_position_index(self.window_size))

    def forward(self, x: Tensor) -> Tensor:
        return shifted_window_attention_3d(self, x)
