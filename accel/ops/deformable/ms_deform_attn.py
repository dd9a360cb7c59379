"""Multi-scale deformable attention: every query and head sums a few samples from each level of a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library, memo
from accel.backends import KERNEL_DTYPES, check_beside, check_floating, inner_dtype, integer
from accel.ops.deformable import sampling

CUDA_LEVELS = 16  # as in csrc/cuda/deformable/ms_deform_attn.h


class Args(NamedTuple):
    """The checked arguments every backend receives. P is the number of points of all levels, level by level."""

    value: Tensor  # (N, S, M, D) contiguous
    sampling_locations: Tensor  # (N, Q, M, P, 2) contiguous fp32 (fp64 beside fp64), x before y, in units of the level
    attention_weights: Tensor  # (N, Q, M, P) contiguous fp32 (fp64 beside fp64)
    spatial_shapes: Tensor  # (L, 2) int64, height before width, on the device of value; on a GPU unchecked
    level_start_index: Tensor  # (L,) int64 likewise
    num_points: list[int]  # points of each level
    border_gradient: bool  # at exactly −1 the location has the gradient from the right; else none


# --- the definition ---


def _by_point(values: Tensor, num_points: Sequence[int]) -> Tensor:
    """``(L,)`` to ``(P,)``: each level's value for each of its points, without asking the device how many."""
    return torch.cat([values[i : i + 1].expand(count) for i, count in enumerate(num_points)])


def reference(
    value: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    num_points: list[int],
    border_gradient: bool,
) -> Tensor:
    """The op in plain torch, fp32 or fp64 inside."""
    inner = inner_dtype(value)
    n, s, m, d = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[3]
    height, width = _by_point(spatial_shapes[:, 0], num_points), _by_point(spatial_shapes[:, 1], num_points)
    start = _by_point(level_start_index, num_points)
    size = torch.stack([width, height], -1).to(inner)
    at = (sampling_locations * size - 0.5).transpose(1, 2).reshape(n * m, queries, points, 2)
    image = value.to(inner).permute(0, 2, 3, 1).reshape(n * m, d, s)
    samples = sampling.bilinear(image, at[..., 1], at[..., 0], height, width, start, border_gradient)  # (N·M, D, Q, P)
    weights = attention_weights.transpose(1, 2).reshape(n * m, 1, queries, points)
    out = (samples * weights).sum(-1)
    return out.reshape(n, m * d, queries).transpose(1, 2).to(value.dtype).contiguous()


# --- backends, fastest first for each device ---


def _why_not_cuda(args: Args) -> str | None:
    batch, pixels, heads, channels = args.value.shape
    sizes = {"batch": batch, "pixels": pixels, "heads": heads, "channels": channels}
    reason = sampling.why_not_cuda(args, sizes, args.sampling_locations.shape[1], sum(args.num_points))
    if reason is None and len(args.num_points) > CUDA_LEVELS:
        return f"it takes up to {CUDA_LEVELS} levels, not {len(args.num_points)}"
    return reason


_native = backends.native("ms_deform_attn")
_triton = backends.triton(__name__)


# --- declaration ---


def _fake(args: Args) -> Tensor:
    n, _, heads, size = args.value.shape
    return args.value.new_empty((n, args.sampling_locations.shape[1], heads * size))


def _flops(args: Args) -> int:
    """FLOPs of the weighted sum of four pixels for every point and channel."""
    n, queries, heads, points = args.attention_weights.shape
    return 2 * 4 * n * queries * heads * points * args.value.shape[3]


def _backward_flops(args: Args, made: Sequence[bool]) -> int:
    return (int(made[0]) + int(made[1] or made[2])) * _flops(args)


# --- the public function ---

_shapes_seen = memo.Recent()


def _on_device(values: Sequence[int], like: Tensor) -> Tensor:
    """Integers as an int64 tensor beside ``like``, without a copy from the host, which a GPU would have to wait for at
    every call, and which would make constants of symbols."""
    varying = torch.compiler.is_compiling() or any([isinstance(v, torch.SymInt) for v in values])
    if like.device.type == "cpu" and not varying:
        return torch.tensor(values, dtype=torch.int64)

    def make() -> Tensor:
        return torch.cat([torch.full((1,), v, dtype=torch.int64, device=like.device) for v in values])

    if not memo.may_remember(like.detach() if like.requires_grad else like):
        return make()
    return _shapes_seen.get_or_make((like.device, *values), make)


def _check_integers(x: Tensor, name: str, value: Tensor) -> None:
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    if x.device != value.device:
        raise ValueError(f"{name} is on {x.device} but value is on {value.device}")


def _read(x: Tensor) -> list[Any] | None:
    """The values of a tensor where looking at them costs nothing, else None."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or type(x) is not Tensor:
        return None
    return x.tolist()


def _read_shapes(given: Tensor | Sequence[Sequence[int]], value: Tensor) -> tuple[Tensor, list[list[int]] | None]:
    """``spatial_shapes`` as a tensor, and its values where they are known."""
    if isinstance(given, Tensor):
        _check_integers(given, "spatial_shapes", value)
        if given.dim() != 2 or given.shape[0] == 0 or given.shape[1] != 2:
            raise ValueError(f"spatial_shapes must be (L, 2) with at least one level, got {tuple(given.shape)=}")
        return given.to(torch.int64).contiguous(), _read(given)
    try:
        rows = [[integer(v) for v in row] for row in given]
    except TypeError:
        raise TypeError(f"spatial_shapes must hold (H, W) of each level as integers, got {given!r}") from None
    if not rows or any([len(row) != 2 for row in rows]):
        raise ValueError(f"spatial_shapes must hold (H, W) of each level, got {given!r}")
    flat = [v for row in rows for v in row]
    return _on_device(flat, value).view(len(rows), 2), rows


def _read_starts(
    given: Tensor | Sequence[int] | None, shapes: Tensor, known: list[list[int]] | None, value: Tensor
) -> Tensor:
    """``level_start_index`` as a tensor that fits ``value`` as far as its values, and the shapes, are known."""
    if given is None:
        if known is None:
            sizes = shapes[:, 0] * shapes[:, 1]
            return sizes.cumsum(0) - sizes
        pixels = [row[0] * row[1] for row in known]
        return _on_device([sum(pixels[:i]) for i in range(len(pixels))], value)
    at: list[int] | None
    if isinstance(given, Tensor):
        _check_integers(given, "level_start_index", value)
        starts, at = given.to(torch.int64).contiguous(), _read(given)
    else:
        try:
            at = [integer(v) for v in given]
        except TypeError:
            raise TypeError(f"level_start_index must hold an integer for each level, got {given!r}") from None
        starts = _on_device(at, value)
    levels = shapes.shape[0]
    if starts.dim() != 1 or starts.shape[0] != levels:
        raise ValueError(f"level_start_index must be ({levels},), got {tuple(starts.shape)}")
    if at is not None and known is not None:
        ends = [start + row[0] * row[1] for start, row in zip(at, known, strict=True)]
        if min(at) < 0 or max(ends) > value.shape[1]:
            raise ValueError(
                f"level_start_index must place every level within the {value.shape[1]} pixels of value, got {at} for "
                f"spatial_shapes {known}"
            )
    return starts


def _read_points(num_points: int | Sequence[int] | None, levels: int, locations: Tensor) -> list[int]:
    """Points of each level, from ``num_points`` and the axes of the locations."""

    def shown() -> str:  # only where something is wrong: torch.compile cannot print sizes that vary
        return f"for {levels} levels and {tuple(locations.shape)=}"

    if num_points is None:
        if locations.dim() != 6:
            raise ValueError(f"num_points must say how many points each level has {shown()}, got {num_points=}")
        return [locations.shape[4]] * levels
    try:
        if isinstance(num_points, Sequence):
            out = [integer(v) for v in num_points]
        else:
            out = [integer(num_points)] * levels
    except TypeError:
        raise TypeError(f"num_points must be an integer or one for each level, got {num_points=}") from None
    if len(out) != levels or min(out) < 0:
        raise ValueError(f"num_points must be one number for each level, none negative, {shown()}, got {num_points=}")
    if locations.dim() == 6 and out != [locations.shape[4]] * levels:
        raise ValueError(f"num_points must be {[locations.shape[4]] * levels} {shown()}, got {num_points=}")
    if locations.dim() == 5 and sum(out) != locations.shape[3]:
        raise ValueError(f"num_points must sum to {locations.shape[3]} {shown()}, got {num_points=}")
    return out


def _prepare(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    num_points: int | Sequence[int] | None = None,
    border_gradient: bool = True,
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    check_floating(value, "value")
    check_beside(sampling_locations, "sampling_locations", value, "value")
    check_beside(attention_weights, "attention_weights", value, "value")
    if value.dim() != 4 or value.shape[1] == 0 or value.shape[2] == 0 or value.shape[3] == 0:
        raise ValueError(f"value must be (N, S, M, D) with S, M and D positive, got {tuple(value.shape)=}")
    n, s, m, _ = value.shape

    shapes, known = _read_shapes(spatial_shapes, value)
    levels = shapes.shape[0]
    if known is not None:
        sizes = [row[0] * row[1] for row in known]
        if any([row[0] < 1 or row[1] < 1 for row in known]) or sum(sizes) != s:
            raise ValueError(
                f"spatial_shapes must be positive and have as many pixels as value, {s}, got {known}, "
                f"{sum(sizes)} pixels, for {tuple(value.shape)=}"
            )
    starts = _read_starts(level_start_index, shapes, known, value)

    if sampling_locations.dim() not in (5, 6) or sampling_locations.shape[-1] != 2:
        raise ValueError(
            f"sampling_locations must be (N, Q, M, L, P, 2) or (N, Q, M, sum of points, 2), "
            f"got {tuple(sampling_locations.shape)=}"
        )
    if sampling_locations.shape[0] != n or sampling_locations.shape[2] != m:
        raise ValueError(
            f"sampling_locations must have N = {n} and M = {m} for {tuple(value.shape)=}, "
            f"got {tuple(sampling_locations.shape)=}"
        )
    if sampling_locations.dim() == 6 and sampling_locations.shape[3] != levels:
        raise ValueError(
            f"sampling_locations must have L = {levels} as spatial_shapes, got {tuple(sampling_locations.shape)=}"
        )
    if attention_weights.shape != sampling_locations.shape[:-1]:
        raise ValueError(
            f"attention_weights must be {tuple(sampling_locations.shape[:-1])} for "
            f"{tuple(sampling_locations.shape)=}, got {tuple(attention_weights.shape)=}"
        )
    points = _read_points(num_points, levels, sampling_locations)

    value = library.autocast(value)
    inner = inner_dtype(value)
    queries, total = sampling_locations.shape[1], sum(points)
    return Args(
        value=value.contiguous(),
        sampling_locations=sampling_locations.to(inner).reshape(n, queries, m, total, 2).contiguous(),
        attention_weights=attention_weights.to(inner).reshape(n, queries, m, total).contiguous(),
        spatial_shapes=shapes,
        level_start_index=starts,
        num_points=points,
        border_gradient=bool(border_gradient),
    )


_run = library.differentiable(
    "ms_deform_attn", Args, reference, gradients=3, fake=_fake, flops=_flops, backward_flops=_backward_flops
)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    num_points: int | Sequence[int] | None = None,
    border_gradient: bool = True,
    backend: str | None = None,
) -> Tensor:
    r"""Multi-scale deformable attention: the contract of mmcv and transformers, without their compiled extensions.

    For query q and head m, with the maps :math:`v^l` of L levels laid end to end along the second axis of ``value``,

    .. math:: o_{q m} = \sum_{l, p} a_{q m l p}\; v^l_m(x W_l - \tfrac12,\; y H_l - \tfrac12),
              \qquad (x, y) = \ell_{q m l p}

    where the map between pixels is the bilinear mean of the four around and each pixel outside counts 0: what
    ``grid_sample`` does with ``align_corners=False`` and zero padding. The weights are taken as they are; models
    softmax them over L·P before.

    A location that is NaN, infinite or beyond the border gives a sample of 0, and no gradient to location, weight or
    value. Where a sample has two derivatives, at integer pixels, the one from the right is taken. A pixel position of
    exactly −1 has one too, as ``grid_sample``'s has; in mmcv's CUDA kernel it has none: ``border_gradient=False``.
    Locations are read and pixel positions computed in float32, sums made in float32 (float64 beside float64).

    Args:
        value: ``(N, S, M, D)``; S pixels of all levels, M heads. float32, bfloat16, float16, and float64 on the
            reference. Under autocast it is cast as a matrix product's operand would be.
        spatial_shapes: ``(L, 2)`` int32 or int64 on the device of ``value``, or a list of pairs: height and width of
            each level, together S pixels. A tensor on a GPU is never read on the host, so it is not checked; a wrong
            one gives wrong numbers, never foreign memory. Nor is one checked under ``torch.compile``.
        level_start_index: ``(L,)`` where each level starts, int32 or int64, or a list; if None, each after the last.
        sampling_locations: ``(N, Q, M, L, P, 2)``, or ``(N, Q, M, ΣP, 2)`` with ``num_points``, level by level: x
            before y, as fractions of the level's width and height. Any floating dtype; never cast by autocast. Q may
            be 0.
        attention_weights: the shape of ``sampling_locations`` less the last axis, any floating dtype.
        num_points: points of each level, one number for all or one for each; may be left out for six axes.
        border_gradient: whether a pixel position of exactly −1, in y or x, moves its sample. False takes both gradients
            of its location for 0.
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(N, Q, M·D)`` in the dtype of ``value``, contiguous.

    Gradients exist for the three floating tensors. A kernel's are the same bits every time: what reaches a pixel is
    summed in a fixed order, without atomics. Second and forward-mode derivatives are the reference's; a kernel refuses
    them.

    Raises:
        TypeError: a tensor that must be floating, or integer, is not.
        ValueError: shapes, sizes or devices that do not fit; the message holds them.
        NotImplementedError: ``backend`` cannot run this call; the message says why.

    Follows Zhu et al., Deformable DETR (2020); points that differ by level are D-FINE's and RT-DETRv2's.
    """
    args = _prepare(
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations,
        attention_weights,
        num_points=num_points,
        border_gradient=border_gradient,
    )
    return _run(args, backend)


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    value = torch.zeros(1, 20, 2, 8, device=device, dtype=dtype)
    locations = torch.full((1, 3, 2, 2, 4, 2), 0.5, device=device)
    return (value, [(4, 4), (2, 2)], None, locations, torch.full((1, 3, 2, 2, 4), 0.125, device=device)), {}


OP = dispatch.register(
    dispatch.Op(
        name="ms_deform_attn",
        function=ms_deform_attn,
        prepare=_prepare,
        example=_example,
        backends=(
            dispatch.Backend("cpu", backends.why_not_cpu, *_native, frozenset({"cpu"}), KERNEL_DTYPES),
            # the faster of these two on an H200; a library without it, built where nvcc is not, lacks nothing
            dispatch.Backend("cuda", _why_not_cuda, *_native, frozenset({"cuda"}), KERNEL_DTYPES, extra=True),
            dispatch.Backend("triton", *_triton, frozenset({"cuda"}), KERNEL_DTYPES),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
    )
)
