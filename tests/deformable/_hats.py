"""An oracle for bilinear samples that knows no corners: every pixel of a map, weighted by how near it is.

A sample is the sum over all pixels of value · hat(y − row) · hat(x − column) with hat(t) = max(0, 1 − |t|), and its
derivatives are those from the right. Float64, one position at a time, for tests of the deformable ops.
"""

import math

import torch


def hat(at, size):
    """The weight of each of ``size`` pixels for a position on one axis, and its derivative from the right."""
    if not math.isfinite(at):
        return torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    t = at - torch.arange(size, dtype=torch.float64)
    rising, falling = (t >= -1) & (t < 0), (t >= 0) & (t < 1)
    return (1 - t.abs()).clamp_min(0), rising.double() - falling.double()


class Sample:
    """The samples of a ``(C, H, W)`` map at one position; without ``border`` one at exactly −1 does not move."""

    def __init__(self, image, y, x, border=True):
        (weight_y, slope_y), (weight_x, slope_x) = hat(y, image.shape[1]), hat(x, image.shape[2])
        if not (math.isfinite(y) and math.isfinite(x)):
            weight_y, slope_y = torch.zeros_like(weight_y), torch.zeros_like(slope_y)
        if not border and -1 in (y, x):
            slope_y, slope_x = torch.zeros_like(slope_y), torch.zeros_like(slope_x)
        self.weights = torch.outer(weight_y, weight_x)
        self.value = (image * self.weights).sum((1, 2))
        self.slope_y = (image * torch.outer(slope_y, weight_x)).sum((1, 2))
        self.slope_x = (image * torch.outer(weight_y, slope_x)).sum((1, 2))


def away_from_integers(position, margin=0.05):
    """The same positions, moved so that none is nearer to an integer than ``margin``: there derivatives jump, and a
    rounding of the position may choose the side."""
    low = position.floor()
    return low + margin + (1 - 2 * margin) * (position - low)
