"""Stand-ins for mmcv's layers, which need its compiled extension: the same names, attributes, parameters and meaning.

They sample through ``grid_sample``, tap by tap and level by level, and know nothing of accel.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn


def pair(x):
    return (x, x) if isinstance(x, int) else tuple(x)


def sample(image, x, y):
    """``image`` (B, C, H, W) at pixels ``x`` and ``y``, both (B, …)."""
    height, width = image.shape[2:]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    out = F.grid_sample(image, grid.flatten(1, -2).unsqueeze(1), align_corners=False)
    return out.reshape(*image.shape[:2], *x.shape[1:])


def convolve(input, offset, weight, bias=None, stride=1, padding=0, dilation=1, mask=None):
    """Deformable convolution with torchvision's signature."""
    (sy, sx), (py, px), (dy, dx) = pair(stride), pair(padding), pair(dilation)
    n, _, kh, kw = input.shape[0], *weight.shape[1:]
    taps = kh * kw
    groups = offset.shape[1] // (2 * taps)
    ho, wo = offset.shape[2:]
    image = input.unflatten(1, (groups, -1)).flatten(0, 1)
    shift = offset.reshape(n * groups, taps, 2, ho, wo)
    row = (torch.arange(ho) * sy - py).to(input.dtype)[:, None]
    column = (torch.arange(wo) * sx - px).to(input.dtype)
    columns = []
    for tap in range(taps):
        y, x = row + tap // kw * dy + shift[:, tap, 0], column + tap % kw * dx + shift[:, tap, 1]
        part = sample(image, x, y)
        if mask is not None:
            part = part * mask.reshape(n * groups, taps, ho, wo)[:, tap, None]
        columns.append(part.unflatten(0, (n, groups)).flatten(1, 2))
    weight_groups = input.shape[1] // weight.shape[1]
    columns = torch.stack(columns, 2).unflatten(1, (weight_groups, -1))
    out = torch.einsum("ngcthw,goct->ngohw", columns, weight.flatten(2).unflatten(0, (weight_groups, -1)))
    return out.flatten(1, 2) + (0 if bias is None else bias[:, None, None])


class Conv(nn.Module):
    def __init__(self, channels, out, kernel, stride=1, padding=0, dilation=1, groups=1, deform_groups=1):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = channels, out, pair(kernel)
        self.stride, self.padding, self.dilation = pair(stride), pair(padding), pair(dilation)
        self.groups, self.deform_groups, self.im2col_step = groups, deform_groups, 32
        self.weight = nn.Parameter(torch.empty(out, channels // groups, *self.kernel_size))

    def compute(self, x, offset, mask=None):
        channels = self.deform_groups * 2 * self.kernel_size[0] * self.kernel_size[1]
        if offset.shape[1] != channels:
            raise RuntimeError(f"invalid number of channels of offset: {offset.shape[1]} is not {channels}")
        bias = getattr(self, "bias", None)
        x = x.type_as(offset)
        weight = self.weight.type_as(x)
        return convolve(x, offset, weight, bias, self.stride, self.padding, self.dilation, mask)


class DeformConv2d(Conv):
    __module__ = "mmcv.ops.deform_conv"

    def forward(self, x, offset):
        bottom = max(self.kernel_size[0] - x.size(2), 0)
        right = max(self.kernel_size[1] - x.size(3), 0)
        out = self.compute(F.pad(x, (0, right, 0, bottom)), F.pad(offset, (0, right, 0, bottom)))
        return out[:, :, : out.size(2) - bottom, : out.size(3) - right]


def predictor(conv, per_tap):
    return nn.Conv2d(
        conv.in_channels,
        conv.deform_groups * per_tap * conv.kernel_size[0] * conv.kernel_size[1],
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
    )


class DeformConv2dPack(DeformConv2d):
    __module__ = "mmcv.ops.deform_conv"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.conv_offset = predictor(self, 2)

    def forward(self, x):
        return self.compute(x, self.conv_offset(x))


class ModulatedDeformConv2d(Conv):
    __module__ = "mmcv.ops.modulated_deform_conv"

    def __init__(self, *args, bias=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_parameter("bias", nn.Parameter(torch.zeros(self.out_channels)) if bias else None)

    def forward(self, x, offset, mask):
        return self.compute(x, offset, mask)


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    __module__ = "mmcv.ops.modulated_deform_conv"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.conv_offset = predictor(self, 3)

    def forward(self, x):
        offset_y, offset_x, mask = torch.chunk(self.conv_offset(x), 3, dim=1)
        return self.compute(x, torch.cat((offset_y, offset_x), dim=1), torch.sigmoid(mask))


def renamed(forward):
    """mmcv's forward under the older name of its ``identity``."""

    @functools.wraps(forward)
    def with_older_name(self, *args, residual=None, **kwargs):
        return forward(self, *args, **(kwargs if residual is None else {**kwargs, "identity": residual}))

    return with_older_name


class MultiScaleDeformableAttention(nn.Module):
    __module__ = "mmcv.ops.multi_scale_deform_attn"

    def __init__(self, width=32, num_heads=4, num_levels=2, num_points=3, dropout=0.0, batch_first=False):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.batch_first, self.embed_dims, self.im2col_step = batch_first, width, 64
        self.dropout = nn.Dropout(dropout)
        self.sampling_offsets = nn.Linear(width, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(width, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    @renamed
    def forward(
        self,
        query,
        key=None,
        value=None,
        identity=None,
        query_pos=None,
        key_padding_mask=None,
        reference_points=None,
        spatial_shapes=None,
        level_start_index=None,
        **kwargs,
    ):
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.permute(1, 0, 2), value.permute(1, 0, 2)
        n, queries, _ = query.shape
        sizes = (self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        value = value.view(n, value.shape[1], self.num_heads, -1)
        offsets = self.sampling_offsets(query).view(n, queries, *sizes, 2)
        weights = self.attention_weights(query).view(n, queries, self.num_heads, -1).softmax(-1)
        weights = weights.view(n, queries, *sizes)
        out = 0
        for level, (height, width) in enumerate(spatial_shapes.tolist()):
            start = int(level_start_index[level])
            image = value[:, start : start + height * width].permute(0, 2, 3, 1)
            image = image.reshape(n * self.num_heads, -1, height, width)
            at = reference_points[:, :, None, level, None]
            if reference_points.shape[-1] == 2:
                at = at + offsets[:, :, :, level] / torch.tensor([width, height])
            elif reference_points.shape[-1] == 4:
                at = at[..., :2] + offsets[:, :, :, level] / self.num_points * at[..., 2:] * 0.5
            else:
                raise ValueError(f"reference_points of {reference_points.shape[-1]}")
            x, y = [(at[..., i] * s - 0.5).transpose(1, 2).flatten(0, 1) for i, s in ((0, width), (1, height))]
            part = sample(image, x, y) * weights[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)
            out = out + part.sum(-1)  # (N·M, D, Q)
        out = self.output_proj(out.reshape(n, -1, queries).transpose(1, 2))
        return self.dropout(out if self.batch_first else out.permute(1, 0, 2)) + identity
