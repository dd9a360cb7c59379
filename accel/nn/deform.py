"""Deformable convolution as modules: torchvision's, and mmcv's that predicts its own offsets and mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accel.backends import pair
from accel.ops.deformable.deform_conv2d import deform_conv2d

__all__ = ["DeformConv2d", "ModulatedDeformConv2d"]


def _two(values: int | Sequence[int], name: str, least: int) -> tuple[int, int]:
    y, x = pair(values, name, least)
    return y, x


class _DeformConv(nn.Module):
    """What the two have in common: the numbers of a convolution, its weight and its bias."""

    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups must divide the channels, got {in_channels=}, {out_channels=}, {groups=}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _two(kernel_size, "kernel_size", 1)
        self.stride = _two(stride, "stride", 1)
        self.padding = _two(padding, "padding", 0)
        self.dilation = _two(dilation, "dilation", 1)
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels))
        else:
            self.register_parameter("bias", None)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}" if self.padding != (0, 0) else ""
        text += f", dilation={self.dilation}" if self.dilation != (1, 1) else ""
        text += f", groups={self.groups}" if self.groups != 1 else ""
        return text + (", bias=False" if self.bias is None else "")


class DeformConv2d(_DeformConv):
    """Deformable convolution with a weight and a bias, as ``torchvision.ops.DeformConv2d``.

    Args:
        in_channels: C of the input.
        out_channels: O of the output.
        kernel_size: one integer or two (y, x), as the next three.
        stride: at least 1.
        padding: at least 0; it moves the positions of the samples.
        dilation: at least 1.
        groups: dividing C and O.
        bias: whether there is one.

    ``forward(input, offset, mask=None)`` takes ``(N, C, H, W)``, ``(N, 2·G·kh·kw, Ho, Wo)`` and
    ``(N, G·kh·kw, Ho, Wo)``. See :func:`accel.deform_conv2d` for their meaning, dtypes, backends and errors.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as a convolution of torch does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)


class ModulatedDeformConv2d(_DeformConv):
    """Deformable convolution v2 that predicts offsets and mask from its input: the layer mmcv calls DCNv2.

    A convolution ``conv_offset`` of the same kernel, stride, padding and dilation gives 3·G·K channels, K = kh·kw:
    the first two thirds are the offsets as :func:`accel.deform_conv2d` takes them, the sigmoid of the rest the mask.
    It starts at zero, so that a new layer is half of a plain convolution. As in mmcv, taps at exactly −1, where a new
    layer with padding has many, give their offsets no gradient.

    Args:
        in_channels: C of the input.
        out_channels: O of the output.
        kernel_size: one integer or two (y, x), as the next three.
        stride: at least 1.
        padding: at least 0.
        dilation: at least 1.
        groups: of the weight, dividing C and O.
        deform_groups: G, groups of channels with offsets and masks of their own, dividing C.
        bias: whether there is one.

    Takes ``(N, C, H, W)`` and returns ``(N, O, Ho, Wo)``. State of ``mmcv.ops.ModulatedDeformConv2dPack`` loads, also
    under the names it had before: ``conv_offset_mask.*`` inside and, with a loader that shows each layer the whole
    state (mmengine's does, torch's does not), ``<name>_offset.*`` beside a layer ``<name>``.
    """

    _version = 2  # of the names in the state, as mmcv counts them

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        if deform_groups < 1 or in_channels % deform_groups:
            raise ValueError(f"deform_groups must divide in_channels, got {in_channels=}, {deform_groups=}")
        self.deform_groups = deform_groups
        self.conv_offset = nn.Conv2d(
            in_channels,
            3 * deform_groups * math.prod(self.kernel_size),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight uniformly, as mmcv does; everything else is zero."""
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        nn.init.uniform_(self.weight, -bound, bound)
        for zero in (self.bias, self.conv_offset.weight, self.conv_offset.bias):
            if zero is not None:
                nn.init.zeros_(zero)

    def forward(self, input: Tensor) -> Tensor:
        first, second, mask = self.conv_offset(input).chunk(3, dim=1)
        offset = torch.cat((first, second), dim=1)
        how = (self.stride, self.padding, self.dilation)
        return deform_conv2d(input, offset, self.weight, self.bias, *how, mask.sigmoid(), border_gradient=False)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", deform_groups={self.deform_groups}" if self.deform_groups != 1 else "")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("weight", "bias"):
            now = f"{prefix}conv_offset.{name}"
            for before in (f"{prefix}conv_offset_mask.{name}", f"{prefix[:-1]}_offset.{name}"):
                if now not in state_dict and before in state_dict:
                    state_dict[now] = state_dict.pop(before)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
