"""Models with deformable convolution of torchvision and mmcv, small enough for float64 on one core."""

import _mmcv
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

from torchvision.ops import deform_conv as tv


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- models ---


class Block(nn.Module):
    """A convolution that predicts offsets, and a mask if asked, for torchvision's layer behind it."""

    def __init__(self, masked, channels=8, out=12, deform_groups=2, **how):
        super().__init__()
        how = {"kernel_size": 3, "padding": 1, **how}
        self.conv = tv.DeformConv2d(channels, out, **how)
        taps = self.conv.kernel_size[0] * self.conv.kernel_size[1] * deform_groups
        same = {name: how[name] for name in ("kernel_size", "stride", "padding", "dilation") if name in how}
        self.offset = nn.Conv2d(channels, 2 * taps, **same)
        self.mask = nn.Conv2d(channels, taps, **same) if masked else None

    def forward(self, x):
        if self.mask is None:
            return self.conv(x, self.offset(x))
        return self.conv(x, self.offset(x), mask=self.mask(x).sigmoid())


class Given(nn.Module):
    """mmcv's layers that are handed their offsets."""

    def __init__(self, cls, **how):
        super().__init__()
        self.conv = cls(8, 12, 3, padding=1, deform_groups=2, **how)

    def forward(self, x, offset, *mask):
        return self.conv(x, offset, *mask)


def image(*size):
    return (noise(2, 8, *(size or (7, 6))),)


def offsets_too():
    return (*image(), 2 * noise(2, 36, 7, 6, seed=1))


def everything():
    return (*offsets_too(), noise(2, 18, 7, 6, seed=2).sigmoid())


def tiny():
    """Maps lower and narrower than the kernel of 3, for which mmcv pads them and their offsets."""
    return noise(2, 8, 2, 1), 2 * noise(2, 36, 2, 1, seed=1)


def attention_inputs(width, **extra):
    shapes = torch.tensor([[5, 4], [3, 2]])
    given = {
        "value": noise(26, 2, 32, seed=1),
        "reference_points": noise(2, 7, 2, width, seed=2).sigmoid(),
        "spatial_shapes": shapes,
        "level_start_index": torch.tensor([0, 20]),
        **extra,
    }
    return noise(7, 2, 32), given


class Attention(nn.Module):
    def __init__(self, width, **extra):
        super().__init__()
        self.attn = _mmcv.MultiScaleDeformableAttention()
        self.given = attention_inputs(width, **extra)[1]

    def forward(self, query):
        return self.attn(query, **self.given)


MASKED = {
    "query_pos": noise(7, 2, 32, seed=3),
    "identity": noise(7, 2, 32, seed=4),
    "key_padding_mask": torch.arange(26) >= torch.tensor([[26], [21]]),
}
MODELS = {
    "torchvision v1": (lambda: Block(False), image),
    "torchvision v2": (lambda: Block(True), image),
    "torchvision, all options": (
        lambda: Block(
            True, groups=4, bias=False, deform_groups=1, kernel_size=(3, 2), stride=(2, 1), padding=(0, 2), dilation=2
        ),
        image,
    ),
    "mmcv v1": (lambda: Given(_mmcv.DeformConv2d, groups=2), offsets_too),
    "mmcv v1, tiny map": (lambda: Given(_mmcv.DeformConv2d), tiny),
    "mmcv v2": (lambda: Given(_mmcv.ModulatedDeformConv2d), everything),
    "mmcv v2, no bias": (lambda: Given(_mmcv.ModulatedDeformConv2d, bias=False), everything),
    "mmcv v1 pack": (
        lambda: nn.Sequential(_mmcv.DeformConv2dPack(8, 12, 3, 2, 1), _mmcv.DeformConv2dPack(12, 4, 1)), image
    ),
    "mmcv v2 pack": (lambda: nn.Sequential(_mmcv.ModulatedDeformConv2dPack(8, 12, 3, deform_groups=4)), image),
    "mmcv attention": (lambda: Attention(2), lambda: (noise(7, 2, 32),)),
    "mmcv attention, boxes": (lambda: Attention(4, **MASKED), lambda: (noise(7, 2, 32),)),
}  # fmt: skip


def randomize(model, dtype=torch.float64):
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def build(name):
    make, inputs = MODELS[name]
    return randomize(make()), inputs()


def gradients(model, inputs):
    model.zero_grad()
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = model(*inputs)
    (out * noise(*out.shape, seed=9).to(out.dtype)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()} | {f"input {i}": x.grad for i, x in enumerate(inputs)}
    return out.detach(), grads


def near(found, expected, limit):
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        error = float((found[name] - gradient).abs().max())
        assert error <= limit * max(float(gradient.abs().max()), 1.0), f"{name}: {error}"
