"""mmcv's layers as they begin: every offset is 0, and with padding many taps stand at exactly −1."""

import _mmcv
import pytest
import torch
from torch import nn

import accel

LAYERS = {
    "v1": (_mmcv.DeformConv2d, ()),
    "v2": (_mmcv.ModulatedDeformConv2d, (torch.full((2, 18, 4, 5), 0.5, dtype=torch.float64),)),
}
PACKS = {"v1": (_mmcv.DeformConv2dPack, 2), "v2": (_mmcv.ModulatedDeformConv2dPack, 3)}


def build(cls):
    torch.manual_seed(0)
    layer = cls(4, 6, 3, padding=1, deform_groups=2).double()
    nn.init.normal_(layer.weight)
    return layer


def at_border():
    """Where the taps of a 3x3 kernel stand at exactly −1, ``(9, 4, 5)``."""
    tap = torch.arange(9)[:, None, None]
    y, x = torch.arange(4)[:, None] - 1 + tap // 3, torch.arange(5) - 1 + tap % 3
    return (y == -1) | (x == -1)


def expected(layer, x, offset, mask, upstream, step=1e-6):
    """The gradient of the offsets by mmcv's rule: differences of the class to the right, 0 at exactly −1."""
    with torch.no_grad():
        here, grad = layer(x, offset, *mask), torch.zeros_like(offset)
        for channel in range(offset.shape[1]):  # an output depends on the offsets at its own place alone
            moved = offset.clone()
            moved[:, channel] += step
            grad[:, channel] = ((layer(x, moved, *mask) - here) / step * upstream).sum(1)
    return grad.unflatten(1, (2, 9, 2)).masked_fill(at_border()[:, None], 0.0).flatten(1, 3)


@pytest.mark.parametrize("name", LAYERS)
def test_a_fresh_layer_has_mmcvs_gradients(name):
    cls, mask = LAYERS[name]
    layer, x, offset = build(cls), torch.randn(2, 4, 4, 5, dtype=torch.float64), torch.zeros(2, 36, 4, 5).double()
    upstream = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    want = expected(layer, x, offset, mask, upstream)
    report = accel.patch(layer, strict=True)
    layer(x, offset.requires_grad_(), *mask).backward(upstream)
    assert [(row.calls, row.fallbacks) for row in report.rows] == [(1, {})]
    torch.testing.assert_close(offset.grad, want, rtol=1e-6, atol=1e-6)
    assert (want != 0).any(1).all(), "some place has no offset with a gradient"


@pytest.mark.parametrize("name", PACKS)
def test_a_fresh_layer_learns_no_offset_from_the_border(name):
    cls, per_tap = PACKS[name]
    layer = build(cls)
    nn.init.zeros_(layer.conv_offset.weight)
    nn.init.zeros_(layer.conv_offset.bias)
    seen = []
    layer.conv_offset.register_forward_hook(lambda module, given, out: seen.append(out) or out.retain_grad())
    report = accel.patch(layer, strict=True)
    layer(torch.randn(2, 4, 4, 5, dtype=torch.float64)).square().sum().backward()
    assert [(row.calls, row.fallbacks) for row in report.rows] == [(1, {})]
    assert seen[0].shape[1] == 18 * per_tap
    grad = seen[0].grad[:, :36].unflatten(1, (2, 9, 2)).transpose(2, 3)
    assert grad[..., at_border()].count_nonzero() == 0
    assert grad[..., ~at_border()].count_nonzero() > 0
