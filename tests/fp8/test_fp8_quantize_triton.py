"""The Triton kernels of quantisation give the bits of the reference.

Without a GPU they run under Triton's interpreter, which is slow: cases are as small as their purpose allows.
"""

import itertools
import math

import pytest
import torch
from _fp8_cases import DTYPES, INPUTS, QUANTIZE, SCALES, Quantize, random_matrix, value_of
from _triton_checks import DEVICE, on_the_cpu
from test_fp8_quantize import check_bits

pytest.importorskip("triton")
import accel
from accel.kernels.fp8 import fp8_quantize as leaf
from accel.ops.fp8.fp8_quantize import Args
from accel.testing import guard

SLOW = [] if DEVICE == "cuda" else [pytest.mark.slow]  # the interpreter takes minutes for all of them
KINDS = list(itertools.product(INPUTS, DTYPES, SCALES))
MORE = [
    Quantize("tiles_ragged", (33, 144), kind="lognormal"),
    Quantize("two_tiles", (2, 130, 160), (1, 32), "lognormal"),
    Quantize("columns_of_tiles", (140, 272), (128, 1)),
    Quantize("oblong", (66, 48), (4, 16)),
    Quantize("all_columns_of_few", (130, 16), (1, None)),
    Quantize("all_rows", (300, 5), (None, 1)),
    Quantize("large_blocks", (150, 270), (140, 256), "lognormal"),
    Quantize("long", (3, 4112), None, "lognormal"),
    Quantize("larger_than_x", (5, 7), (512, 1000)),
]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("case", [case for case in QUANTIZE if case.name != "wide"] + MORE, ids=str)
def test_bits(case, transpose):
    which = (QUANTIZE + MORE).index(case)
    check_bits("triton", case, *KINDS[(5 * which + 9 * transpose) % len(KINDS)], transpose, DEVICE)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_bits_of_hostile_numbers(kind):
    hostile = next(case for case in QUANTIZE if case.name == "hostile")
    check_bits("triton", hostile, *kind, False, DEVICE)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW, id=str(kind)) for kind in KINDS])
@pytest.mark.parametrize("case", QUANTIZE + MORE, ids=str)
def test_all_bits(case, kind):
    check_bits("triton", case, *kind, True, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_nearest_even(dtype):
    """Every number of the format, every middle between two, and the fp32 numbers beside those, of both signs."""
    numbers = sorted({value_of(code, dtype) for code in range(128) if math.isfinite(value_of(code, dtype))})
    points = torch.tensor([*numbers, *[(a + b) / 2 for a, b in itertools.pairwise(numbers)]])
    points = torch.cat([torch.nextafter(points, torch.tensor(s * math.inf)) for s in (-1, 1)] + [points])
    points = points[points.abs() <= numbers[-1]]
    x = torch.cat([points, -points])[None]
    want = accel.fp8_quantize(x, block=None, dtype=dtype, backend="reference")
    assert want[1].item() == 1.0
    got = accel.fp8_quantize(x.to(DEVICE), block=None, dtype=dtype, backend="triton")
    assert got[1].item() == 1.0
    assert torch.equal(got[0].cpu().view(torch.uint8), want[0].view(torch.uint8))


def launched(*shape, block, transpose):
    x = torch.empty(shape, device="meta")
    args = Args(x, *block, "e4m3", "fp32", transpose)
    made = leaf.empty(args, False), leaf.empty(args, True) if transpose else None
    return [launch.kernel.__name__ for launch in leaf.launches(args, *made)]


def test_small_blocks_are_read_once():
    steps = ["largest_kernel", "scales_kernel"]
    for block in ((1, 128), (128, 128), (1, 32)):
        assert launched(1, 4096, 7168, block=block, transpose=True) == ["tile_kernel"]
        assert launched(1, 4095, 7161, block=block, transpose=False)[-1:] == (
            ["encode_kernel"] if block[0] == 128 else ["tile_kernel"]
        )
    assert launched(1, 4096, 7168, block=(1, 0), transpose=False) == [*steps, "encode_kernel"]
    assert launched(1, 4096, 7168, block=(1, 0), transpose=True) == [*steps, *steps, "encode_kernel"]
    assert launched(1, 100, 96, block=(0, 0), transpose=True) == ["tile_kernel"]


def test_too_many_tiles_are_refused():
    few = Args(random_matrix((1, 1, 1)).to(DEVICE).expand(1, 2**17, 2**17), 1, 128, "e4m3", "fp32", True)
    assert leaf.why_not(few) is None
    for many in (few._replace(x=few.x.expand(100, -1, -1)), few._replace(cols=1)):
        assert "more than one launch can number" in leaf.why_not(many)


def test_compiled():
    def call(x):
        return accel.fp8_quantize(x, block=(1, 32), scale_format="e8m0", transpose=True, backend="triton")

    x = random_matrix((5, 70)).to(DEVICE)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    for got, want in zip(compiled, call(x), strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_nothing_outside_is_read_or_written():
    (x,) = on_the_cpu(random_matrix((1, 13, 131)))
    blocks = ((1, 128), (7, 66))
    calls = [(f"{b}", "accel::fp8_quantize.default", (x, *b, "e4m3", "fp32", True, "triton")) for b in blocks]
    guard.replay(calls, ("accel", leaf.__name__))
