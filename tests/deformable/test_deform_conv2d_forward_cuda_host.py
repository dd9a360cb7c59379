"""The CUDA kernel of deform_conv2d's forward, run on the CPU by the shim of csrc/testing, which gives it mma.sync in
place of wgmma: against the reference in float64; every tile; orders of warps; sanitizers."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import _cuda_host as host
import pytest
import torch
from _deform_conv2d_cases import HALVES, P1, case, far_away, on_integers, some_not_finite
from torch import Tensor

from accel.ops.deformable.deform_conv2d import OP, Args, memory_format
from accel.testing import Case, assert_close, assert_same

SOURCE = host.ROOT / "csrc" / "cuda" / "deformable" / "conv_forward.cu"
HALF = (torch.bfloat16, torch.float16)
HOPPER, CONSUMER = 227 << 10, 99 << 10  # shared memory of a block: H100; RTX 30, 40 and 50


class Params(ctypes.Structure):
    """csrc/cuda/deformable/conv_forward.h"""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("input", "offset", "mask", "weight", "bias", "out", "packed")],
        *[(name, ctypes.c_int32) for name in ("batch", "height", "width", "channels", "out_channels")],
        *[(name, ctypes.c_int32) for name in ("out_height", "out_width", "groups", "offset_groups")],
        *[(name, ctypes.c_int32) for name in ("dtype", "last")],
        *[(name, ctypes.c_int32 * 2) for name in ("kernel", "stride", "padding", "dilation")],
        *[(name, ctypes.c_int32) for name in ("processors", "shared", "tile")],
    ]


@functools.lru_cache(maxsize=4)
def prepared(of: Case, dtype: torch.dtype) -> Args:
    tensors, kwargs = of.make(dtype, "cpu", 3)
    return OP.prepare(**tensors, **kwargs)


def forward(
    args: Args, mode: str = "plain", processors: int = 1, shared: int = HOPPER, tile: int = 0, **options: Any
) -> Tensor:
    n, c, h, w = args.input.shape
    o, per_group, kh, kw = args.weight.shape
    ho, wo = args.offset.shape[2:]
    last, groups = memory_format(args.input) == torch.channels_last, c // per_group
    params = Params(
        batch=n, height=h, width=w, channels=c, out_channels=o, out_height=ho, out_width=wo, groups=groups,
        offset_groups=args.offset.shape[1] // (2 * kh * kw), dtype=host.DTYPES.index(args.input.dtype),
        last=last, kernel=(kh, kw), stride=tuple(args.stride), padding=tuple(args.padding),
        dilation=tuple(args.dilation), processors=processors, shared=shared, tile=tile,
    )  # fmt: skip

    def unwritten(*size: int) -> Tensor:
        return torch.full(size, float("nan"), dtype=args.input.dtype)

    out = unwritten(n, ho, wo, o) if last else unwritten(n, o, ho, wo)
    tensors = {
        "input": args.input.permute(0, 2, 3, 1).contiguous(),
        "offset": args.offset,
        "weight": args.weight,
        "out": out,
        "packed": unwritten(groups * -(-o // groups // 128) * (per_group // 64) * kh * kw * 64 * 128),
    }
    for name in ("mask", "bias"):
        if (given := getattr(args, name)) is not None:
            tensors[name] = given
    ran = host.run(host.program(SOURCE, mode), "accel_deform_conv2d_forward", params, tensors, **options)
    assert ran.code == 0, ran.report
    return ran.buffers["out"].permute(0, 3, 1, 2) if last else ran.buffers["out"]


def check(of: Case, dtype: torch.dtype, mode: str = "plain", **options: Any) -> None:
    args = prepared(of, dtype)
    exact = [x.double() if isinstance(x, Tensor) else x for x in args]
    assert_close(forward(args, mode, **options), OP.backend("reference").forward(*exact), of.family, dtype, "output")


half_case = functools.partial(case, dtypes=HALF)
TILES = range(1, 6)  # as csrc/cuda/deformable/conv_forward.cu numbers them: 256, 128, 192, 128, 64 outputs
SOME_TILES = [tile if tile in (2, 5) else pytest.param(tile, marks=pytest.mark.slow) for tile in TILES]
IN_EVERY_TILE = half_case("every_tile", (64, 256), (10, 11), **P1)  # two blocks of columns; no tile is full at the end
ODD = [
    half_case("odd_columns", (64, 136), (5, 19), batch=1, **P1),
    half_case("odd_columns_last", (64, 136), (5, 19), batch=1, last=True, **P1),
    half_case("groups", (128, 16), (5, 6), groups=2, batch=1, **P1),
]
CASES = [
    IN_EVERY_TILE,
    *ODD,
    half_case("channels_last", (64, 128), (10, 11), last=True, **P1),
    half_case("v1_no_bias", (64, 64), (6, 7), bias=False, mask=False, batch=1, **P1),
    half_case("two_strips", (64, 8), (3, 37), **P1),
    half_case("two_slices", (128, 64), (6, 7), batch=1, **P1),
    half_case("groups_last", (128, 272), (5, 6), groups=2, batch=1, last=True, **P1),
    half_case("offset_groups", (128, 16), (5, 6), offset_groups=2, batch=1, **P1),
    half_case("three_of_each", (192, 24), (4, 5), groups=3, offset_groups=3, batch=1, **P1),
    half_case("one_tap", (64, 64), (5, 6), (1, 1)),
    half_case("two_taps", (128, 64), (5, 6), (1, 2), batch=1),
    half_case("kernel_5x3", (64, 16), (7, 6), (5, 3), padding=(2, 1), batch=1),
    half_case(
        "all_different", (128, 16), (10, 9), (2, 3), stride=(3, 2), padding=(2, 1), dilation=(2, 3), offset_groups=2
    ),
    half_case("one_output", (64, 8), (3, 3)),
    half_case("far_away", (64, 16), (4, 5), batch=1, change=far_away, **P1),
    half_case("not_finite", (64, 16), (4, 5), change=some_not_finite, **P1),
    half_case("on_integers", (64, 16), (6, 5), batch=1, change=on_integers, family="exact", **P1),
    half_case("halves", (64, 16), (6, 5), batch=1, dtypes=(torch.float16,), **HALVES, **P1),
]


@pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("of", CASES, ids=str)
def test_values(of: Case, dtype: torch.dtype) -> None:
    if dtype not in of.dtypes:
        pytest.skip("this case is not exact in that dtype")
    check(of, dtype)


@pytest.mark.parametrize("tile", TILES)
def test_every_tile_and_order_of_warps_gives_the_same_bits(tile: int) -> None:
    args = prepared(IN_EVERY_TILE, torch.bfloat16)
    first = forward(args)
    for seed, landing in ((0, host.EARLY), (1, host.EARLY), (2, host.MIXED), (3, host.LATE)):
        assert_same(forward(args, tile=tile, seed=seed, landing=landing), first, f"{seed=}")


def test_tiles_that_do_not_fit_are_refused() -> None:
    one_block = prepared(half_case("one_block", (64, 128), (2, 3), batch=1, **P1), torch.bfloat16)
    two_blocks = prepared(IN_EVERY_TILE, torch.bfloat16)
    impossible = [
        (one_block, {"tile": 2}),
        (one_block, {"tile": 6}),
        (two_blocks, {"tile": 2, "shared": CONSUMER}),
        (two_blocks, {"shared": 48 << 10}),
    ]
    for args, wish in impossible:
        with pytest.raises(AssertionError, match="accel_deform_conv2d_forward returned 1"):
            forward(args, **wish)


def test_the_choice_of_a_tile_does_not_change_a_bit() -> None:
    """Many processors take small tiles; 5 · 12 · 2 outputs are for the tile that little memory does not hold."""
    args = prepared(half_case("second_tile", (64, 256), (5, 12), **P1), torch.bfloat16)
    first = forward(args, tile=2)
    for device in ({}, {"processors": 100}, {"shared": CONSUMER}, {"shared": CONSUMER, "processors": 100}):
        assert_same(forward(args, **device), first, f"{device}")


def test_pixels_that_do_not_count_may_hold_anything() -> None:
    of = case("finite", (64, 16), (6, 7), batch=1, change=on_integers, family="exact", **P1)
    args = prepared(of, torch.bfloat16)
    args.input[..., 0, 0] = math.inf
    args.offset[:] = 100.0
    args.offset[..., 3, 3] = 0.0
    exact = [x.double() if isinstance(x, Tensor) else x for x in args]
    assert_close(forward(args), OP.backend("reference").forward(*exact), "exact", torch.bfloat16, "output")


@pytest.mark.parametrize("tile", SOME_TILES)
def test_address_and_undefined_behaviour_of_tiles(tile: int) -> None:
    check(IN_EVERY_TILE, torch.bfloat16, "asan", tile=tile, seed=1)


@pytest.mark.parametrize("of", ODD, ids=str)
def test_address_and_undefined_behaviour(of: Case) -> None:
    check(of, torch.bfloat16, "asan", seed=1)


@pytest.mark.parametrize("tile", SOME_TILES)
def test_races(tile: int) -> None:
    """Five taps are five steps, one more than the most stages: each stage's memory is filled again."""
    tiny = case("tiny", (64, 256), (2, 3), (1, 5), batch=1, padding=(0, 2))
    check(tiny, torch.bfloat16, "tsan", tile=tile, seed=1)
