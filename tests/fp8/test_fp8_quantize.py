"""Quantisation to eight bits against plain Python on the reference, the same bits on every backend, and bad input."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from _bad import Bad, check_bad, each, zeros
from _fp8_cases import DTYPES, E4M3, E5M2, INPUTS, QUANTIZE, SCALES, hostile, random_matrix, rounded, value_of

import accel
from accel.ops.fp8 import formats
from accel.testing import assert_same, guard, threads
from accel.testing.running import Recorder, poisoned
from accel.testing.values import LEVELS, at_level

# --- the reference ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_decoded(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    want = torch.tensor([value_of(code, dtype) for code in range(256)])
    assert_same(formats.decode(codes, formats.NAMES[dtype]), want, "values of codes")
    one = torch.ones(1, 1)
    assert_same(accel.fp8_dequantize(codes.view(dtype)[None], one)[0], want, "dequantised")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_nearest_even(dtype):
    """Every number of the format, every middle between two, and the fp32 numbers beside those."""
    numbers = sorted({value_of(code, dtype) for code in range(128) if math.isfinite(value_of(code, dtype))})
    points = torch.tensor([*numbers, *[(a + b) / 2 for a, b in itertools.pairwise(numbers)]])
    points = torch.cat([torch.nextafter(points, torch.tensor(s * math.inf)) for s in (-1, 1)] + [points])
    points = points[(points >= 0) & (points <= numbers[-1])]
    codes = formats.encode(points, formats.NAMES[dtype])
    for x, code in zip(points.tolist(), codes.tolist(), strict=True):
        gaps = [abs(Fraction(x) - Fraction(n)) for n in numbers]
        nearest = [i for i, gap in enumerate(gaps) if gap == min(gaps)]
        want = next(i for i in nearest if len(nearest) == 1 or i % 2 == 0)
        assert code == want, f"{x!r} is nearest to number {want}, got {code}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_format", SCALES)
def test_scales_and_codes_are_those_of_exact_quotients(dtype, scale_format):
    x = random_matrix((3, 200), "lognormal")
    q, scale = accel.fp8_quantize(x, dtype=dtype, scale_format=scale_format, backend="reference")
    largest = formats.FORMATS[formats.NAMES[dtype]].largest
    for row in range(3):
        for c in range(2):
            block = x[row, 128 * c : 128 * (c + 1)]
            amax = Fraction(block.abs().max().item())
            if scale_format == "fp32":
                want, factor = rounded(amax / Fraction(largest)), rounded(Fraction(largest) / amax)
            else:
                power = next(p for p in range(-140, 140) if amax <= Fraction(largest) * Fraction(2) ** p)
                want, factor = 2.0**power, 2.0**-power
            assert scale[row, c].float().item() == want
            codes = formats.encode(block * factor, formats.NAMES[dtype])
            assert torch.equal(q[row, 128 * c : 128 * (c + 1)].view(torch.uint8), codes)


def test_what_is_not_finite_harms_nothing_else():
    x = random_matrix((1, 128))
    clean = accel.fp8_quantize(x, backend="reference")
    x[0, x[0].abs().argmin()] = math.nan
    q, scale = accel.fp8_quantize(x, backend="reference")
    assert_same(scale, clean[1], "scale beside a NaN")
    differ = q.view(torch.uint8) != clean[0].view(torch.uint8)
    assert differ.sum() == 1
    assert q.view(torch.uint8)[differ].item() == formats.NAN_CODE
    for dtype, want in ((E4M3, (0x7F, 0x7F)), (E5M2, (0x7C, 0xFC))):
        given = torch.tensor([[math.inf, -math.inf, 1.0]])
        codes = accel.fp8_quantize(given, dtype=dtype, backend="reference")[0].view(torch.uint8)
        assert tuple(codes[0, :2].tolist()) == want
        assert accel.fp8_dequantize(*accel.fp8_quantize(given, dtype=dtype))[0, 2] == 1.0


def test_blocks_too_small_for_a_scale_count_as_zeros():
    for dtype, least in ((E4M3, 2.0**-117), (E5M2, 2.0**-110)):
        q, scale = accel.fp8_quantize(torch.tensor([[least], [least * 0.75], [0.0]]), dtype=dtype)
        assert scale[0, 0] < 2.0**-100
        assert scale[1:, 0].tolist() == [1.0, 1.0]
        assert q.view(torch.uint8)[1:, 0].tolist() == [0, 0]
        assert accel.fp8_dequantize(q, scale)[0, 0] == least


# --- every backend gives its bits ---


def check_bits(backend, case, dtype, format_dtype, scale_format, transpose=True, device="cpu"):
    given = {"block": case.block, "dtype": format_dtype, "scale_format": scale_format}
    x = case.make(dtype)
    made = accel.fp8_quantize(x.to(device), **given, transpose=transpose, backend=backend)
    got = [t.cpu() for t in made]
    want = accel.fp8_quantize(x, **given, backend="reference")
    if transpose:
        want += accel.fp8_quantize(x.mT, **given, backend="reference")
    for name, a, b in zip(("q", "scale", "q_t", "scale_t")[: len(want)], got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{name}: {a.dtype} {tuple(a.shape)}, {b.dtype} {b.shape}"
        bits = [t.view(torch.uint8 if t.element_size() == 1 else torch.int32) for t in (a, b)]
        assert torch.equal(*bits), f"{name}: {int((bits[0] != bits[1]).sum())} of {a.numel()} differ"


@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("case", QUANTIZE, ids=str)
def test_xt_is_quantised_from_x(case, dtype):
    for format_dtype in DTYPES:
        for scale_format in SCALES:
            check_bits("reference", case, dtype, format_dtype, scale_format)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("case", QUANTIZE, ids=str)
def test_cpu(case, dtype, level):
    with at_level(level):
        for format_dtype, scale_format in itertools.product(DTYPES, SCALES):
            check_bits("cpu", case, dtype, format_dtype, scale_format)


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (1, None), None, (3, 7)])
def test_cpu_threads_and_fresh_memory_change_no_bit(block):
    x = random_matrix((2, 700, 300), "lognormal")

    def made():
        results = accel.fp8_quantize(x, block=block, transpose=True, backend="cpu")
        return [t.view(torch.uint8) for t in results]

    want = accel.fp8_quantize(x, block=block, transpose=True, backend="reference")
    for count in (1, 2, 3):
        with threads(count), poisoned():
            for got, expected in zip(made(), want, strict=True):
                assert torch.equal(got, expected.view(torch.uint8)), f"{count} threads"


def test_cpu_reads_and_writes_nothing_beyond():
    calls = []
    for case, dtype in itertools.product(QUANTIZE, INPUTS):
        with Recorder() as recorder:
            accel.fp8_quantize(case.make(dtype), block=case.block, transpose=True, backend="cpu")
        calls += [(f"{case} {dtype}", overload.name(), args) for overload, args in recorder.calls]
    assert len(calls) == len(QUANTIZE) * len(INPUTS)
    guard.replay(calls, ("accel", "accel._C"))


# --- around it ---


def test_there_and_back():
    x = random_matrix((40, 300))
    for block in ((1, 128), (128, 128), (1, None), None, (1, 32)):
        back = accel.fp8_dequantize(*accel.fp8_quantize(x, block=block))
        assert (back - x).norm() < 0.03 * x.norm(), block
    q, scale = accel.fp8_quantize(x, block=(16, 20))
    back = accel.fp8_dequantize(q, scale, block=(16, 20), dtype=torch.bfloat16)
    assert back.dtype == torch.bfloat16
    assert (back.float() - x).norm() < 0.03 * x.norm()
    again = accel.fp8_quantize(accel.fp8_dequantize(q, scale, block=(16, 20)), block=(16, 20))
    assert torch.equal(again[0].view(torch.uint8), q.view(torch.uint8))
    assert_same(again[1], scale, "scales of what was dequantised")


def test_strides_do_not_matter_and_nothing_requires_a_gradient():
    x = random_matrix((20, 260)).t().requires_grad_()
    q, scale = accel.fp8_quantize(x)
    want = accel.fp8_quantize(x.detach().contiguous())
    assert torch.equal(q.view(torch.uint8), want[0].view(torch.uint8))
    assert_same(scale, want[1], "scales")
    assert not q.requires_grad
    assert not scale.requires_grad


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4), (2, 0, 0)])
def test_empty(shape):
    q, scale, q_t, scale_t = accel.fp8_quantize(zeros(*shape), transpose=True)
    assert q.shape == shape
    assert q_t.shape == (*shape[:-2], shape[-1], shape[-2])
    assert scale.numel() == scale_t.numel() == 0
    assert accel.fp8_dequantize(q, scale).shape == shape


def test_compiled():
    def call(x):
        q, scale, q_t, scale_t = accel.fp8_quantize(x, transpose=True)
        return accel.fp8_dequantize(q, scale), accel.fp8_dequantize(q_t, scale_t)

    x = hostile()
    for got, want in zip(torch.compile(call, backend="aot_eager", fullgraph=True)(x), call(x), strict=True):
        assert_same(got, want, "compiled")


@each(
    [
        Bad("integers", TypeError, r"floating.*torch\.int64", {"x": zeros(2, 2, dtype=torch.int64)}),
        Bad("eight_bits", TypeError, "already", {"x": zeros(2, 2).to(E4M3)}),
        Bad("vector", ValueError, r"\(\.\.\., R, C\).*\(3,\)", {"x": zeros(3)}),
        Bad("block_0", ValueError, r"at least one row.*\(0, 128\)", {"block": (0, 128)}),
        Bad("block_of_one_axis", ValueError, "block=128", {"block": 128}),
        Bad("dtype", ValueError, r"float8_e4m3fn.*torch\.float16", {"dtype": torch.float16}),
        Bad("scale_format", ValueError, "fp32, pow2, e8m0, got 'fp16'", {"scale_format": "fp16"}),
        Bad("backend", ValueError, "no backend 'mkl'", {"backend": "mkl"}),
    ]
)
def test_bad_input(bad):
    check_bad(accel.fp8_quantize, {"x": zeros(4, 130)}, bad)


@each(
    [
        Bad("plain", TypeError, r"float8.*torch\.float32", {"q": zeros(4, 130)}),
        Bad(
            "scales_of_half", TypeError, r"float8_e8m0fnu.*torch\.float16", {"scale": zeros(4, 2, dtype=torch.float16)}
        ),
        Bad("too_few", ValueError, r"\(3, 2\) scales.*\(4, 130\)", {"scale": zeros(3, 2)}),
        Bad("batch", ValueError, r"\(4, 130\).*\(1, 4, 2\)", {"scale": zeros(1, 4, 2)}),
        Bad("other_blocks", ValueError, r"\(2, 64\).*\(2, 3\) scales", {"block": (2, 64)}),
    ]
)
def test_bad_input_back(bad):
    check_bad(accel.fp8_dequantize, {"q": zeros(4, 130).to(E4M3), "scale": zeros(4, 2)}, bad)
