"""Awkward calls of multi-scale deformable attention as data, for the checks of every backend."""

import math

import torch
from _hats import away_from_integers

import accel
from accel import testing
from accel.testing import Case

BACKENDS = ("cpu", "reference")


def case(
    name,
    shapes,
    queries,
    *,
    points=2,
    heads=2,
    dim=4,
    batch=2,
    reach=1.2,
    tensors_for_shapes=False,
    starts=False,
    small=torch.float32,
    change=None,
    family="sample",
    dtypes=testing.KERNEL_DTYPES,
    **more,
):
    """A case with random tensors: ``points`` of each level, as one number or a list (then five axes); locations
    uniform over ``reach`` times the map, away from pixel positions that are integers; ``change(tensors, sizes)``
    edits the values in place, ``more`` are arguments of the op."""
    listed = isinstance(points, list)
    counts = points if listed else [points] * len(shapes)

    def make(dtype, device, seed):
        generator = torch.Generator().manual_seed(seed)
        inner = torch.float64 if dtype == torch.float64 else small or dtype
        pixels = [h * w for h, w in shapes]
        sizes = torch.tensor([[w, h] for (h, w), n in zip(shapes, counts, strict=True) for _ in range(n)])
        share = torch.rand((batch, queries, heads, sum(counts), 2), generator=generator, dtype=torch.float64)
        at = away_from_integers((0.5 + reach * (share - 0.5)) * sizes - 0.5)
        weights = torch.randn((batch, queries, heads, sum(counts)), generator=generator).softmax(-1)
        tensors = {
            "value": torch.randn((batch, sum(pixels), heads, dim), generator=generator),
            "sampling_locations": (at + 0.5) / sizes,
            "attention_weights": weights,
        }
        if change is not None:
            change(tensors, sizes)
        for n in tensors:
            tensors[n] = tensors[n].to(device, dtype if n == "value" else inner)
        if not listed:
            for n in ("sampling_locations", "attention_weights"):
                tensors[n] = tensors[n].unflatten(3, (len(shapes), points))
        kwargs = {"num_points": points, **more} if listed else dict(more)
        first = [sum(pixels[:i]) for i in range(len(pixels))]
        for n, values in (("spatial_shapes", shapes), ("level_start_index", first if starts else None)):
            if tensors_for_shapes and values is not None:
                tensors[n] = torch.tensor(values, device=device)
            else:
                kwargs[n] = values
        return tensors, kwargs

    batched = ("value", "sampling_locations", "attention_weights")
    return Case(name, make, family, dtypes, batched=batched)


def whole(parts):
    """Small integers, pixel positions that are multiples of 1 / ``parts``, and weights that are a power of two: every
    product, sum and rounding is exact. The sizes of the maps must be powers of two."""

    def change(tensors, sizes):
        tensors["value"].mul_(1.2).round_().clamp_(-2, 2)
        at = tensors["sampling_locations"].mul_(sizes).sub_(0.5).mul_(parts).round_().div_(parts)
        at.add_(0.5).div_(sizes)
        tensors["attention_weights"].mul_(4).ceil_().clamp_(1, 2)

    return change


def far_away(tensors, sizes):
    tensors["sampling_locations"].sub_(0.5).mul_(0.1).add_(7.0)


def some_not_finite(tensors, sizes):
    for i, value in enumerate((math.nan, math.inf, -math.inf, 1e30, -1e30)):
        tensors["sampling_locations"].view(-1)[i::11] = value


def weights_of_any_size(tensors, sizes):
    tensors["attention_weights"].mul_(10).sub_(3)
    tensors["attention_weights"][..., ::3] = 0.0


PYRAMID = [(9, 13), (5, 7), (3, 4), (2, 2)]
POWERS = [(8, 16), (4, 8), (2, 2), (1, 1)]
TENSORS = {"tensors_for_shapes": True, "starts": True}
EXACT16 = (torch.float32, torch.float16)

CASES = [
    case("pyramid", PYRAMID, 7, points=4),
    case("pyramid_tensors", PYRAMID, 7, points=4, **TENSORS),
    case("shape_tensor_without_starts", PYRAMID, 5, tensors_for_shapes=True),
    case("same_dtype", PYRAMID, 7, small=None),
    case("one_of_each", [(1, 1)], 1, points=1, heads=1, dim=1, batch=1),
    case("one_level", [(6, 5)], 9, points=3),
    case("one_query", PYRAMID, 1),
    case("one_point", [(6, 5), (3, 3)], 9, points=1),
    case("one_row_and_column", [(1, 30), (27, 1)], 8),
    case("five_levels", [(7, 6), (5, 5), (3, 4), (2, 3), (1, 1)], 5, points=3),
    case("points_by_level", PYRAMID, 6, points=[3, 6, 3, 1]),
    case("points_by_level_tensors", PYRAMID, 6, points=[1, 4, 2, 5], **TENSORS),
    case("a_level_without_points", PYRAMID, 6, points=[3, 0, 2, 1]),
    case("17_points", [(6, 5), (3, 3)], 5, points=17),
    case("prime", [(7, 11), (5, 3)], 13, heads=3, dim=7),
    case("head_size_1", PYRAMID, 6, dim=1, heads=5),
    case("head_size_3", PYRAMID, 6, dim=3),
    case("head_size_32", PYRAMID, 6, dim=32, points=4),
    case("head_size_40", PYRAMID, 6, dim=40),
    case("head_size_64", PYRAMID, 6, dim=64),
    case("head_size_130", [(4, 5), (2, 2)], 3, dim=130),
    case("one_head", PYRAMID, 6, heads=1, dim=16),
    case("8_heads", PYRAMID, 5, heads=8, dim=16, batch=1),
    case("many_queries", PYRAMID, 211, heads=1, dim=8, batch=1),
    case("large_map", [(29, 37), (15, 19)], 11, heads=1, dim=8, batch=1),
    case("batch_1", PYRAMID, 6, batch=1),
    case("batch_5", [(5, 4), (3, 2)], 4, batch=5),
    case("inside", PYRAMID, 9, reach=0.6),
    case("mostly_outside", PYRAMID, 9, reach=3.0),
    case("nothing_inside", PYRAMID, 5, change=far_away, family="exact"),
    case("not_finite", PYRAMID, 9, change=some_not_finite),
    case("any_weights", PYRAMID, 9, change=weights_of_any_size),
    case("exact", POWERS, 5, change=whole(2), family="exact"),
    case("exact_tensors", POWERS, 5, points=[1, 2, 3, 2], change=whole(2), family="exact", **TENSORS),
    case("exact_head_size_17", POWERS, 4, dim=17, heads=3, change=whole(2), family="exact"),
    case("exact_quarters", POWERS, 5, change=whole(4), family="exact", dtypes=EXACT16),
    case("exact_integers", POWERS, 7, points=3, reach=1.6, change=whole(1), family="exact"),
    case("exact_no_border", POWERS, 7, points=3, reach=1.6, change=whole(1), family="exact", border_gradient=False),
]

# Small, with a batch of two; between them every tensor that has a gradient.
BEHAVIOUR = [
    case("listed", [(4, 5), (2, 3)], 3, points=[2, 3]),
    case("tensors", [(4, 5), (2, 3)], 3, **TENSORS),
]

GRADIENTS = [
    case("pyramid", [(4, 5), (2, 3)], 3, dim=2, batch=1),
    case("one_head", [(3, 4)], 2, points=[3], heads=1, dim=2),
    case("not_finite", [(4, 5), (2, 3)], 3, dim=2, batch=1, change=some_not_finite),
]


def by_name(name):
    return next(c for c in CASES if c.name == name)


def available(backend, tensors, kwargs):
    testing.require(accel.ms_deform_attn, backend, tensors, kwargs)
