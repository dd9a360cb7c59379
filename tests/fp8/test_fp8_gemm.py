"""Products of eight-bit numbers against the float64 product of what the codes stand for, and bad input."""

import pytest
import torch
from _bad import Bad, check_bad, each, zeros
from _fp8_cases import DTYPES, E4M3, INPUTS, PRODUCTS, WEIGHT_ONLY, Product, exact_product, random_matrix, value_of

import accel
from accel.testing import assert_close, assert_same, guard, threads
from accel.testing.running import Recorder, poisoned
from accel.testing.values import LEVELS, at_level

BACKENDS = ("cpu", "reference")


def check_product(backend, case, dtype, device="cpu", **change):
    given = {**case.make(dtype, device), **change}
    got = accel.fp8_gemm(**given, backend=backend)
    assert got.dtype == dtype
    assert_close(got, exact_product(given, case.a_block, case.b_block), "fp8", dtype, str(case))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_product(case, dtype, backend):
    check_product(backend, case, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    given = Product("", 9, 140, 300, bias=True).make()
    want = accel.fp8_gemm(**given, backend=backend)
    wide = {name: given[name].view(torch.uint8) for name in ("a", "b")}
    moved = {name: torch.stack([x, x ^ 1], -1)[..., 0].view(E4M3) for name, x in wide.items()}
    scales = {name: given[name].t().contiguous().t() for name in ("a_scale", "b_scale")}
    assert_same(accel.fp8_gemm(**{**given, **moved, **scales}, backend=backend), want, "strided")


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_may_be_bytes_or_one_number(backend):
    given = Product("", 9, 40, 300, scale_format="e8m0").make()
    want = accel.fp8_gemm(**given, backend=backend)
    as_bytes = {name: given[name].view(torch.uint8) for name in ("a_scale", "b_scale")}
    assert_same(accel.fp8_gemm(**{**given, **as_bytes}, backend=backend), want, "bytes of e8m0")
    given = Product("", 9, 40, 300, (None, None), (None, None)).make()
    want = accel.fp8_gemm(**given, backend=backend)
    numbers = {name: given[name].view(()) for name in ("a_scale", "b_scale")}
    assert_same(accel.fp8_gemm(**{**given, **numbers}, backend=backend), want, "scales without axes")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(0, 3, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0)])
def test_empty(sizes, backend):
    M, N, K = sizes
    bias = random_matrix((N,))
    a, b = zeros(M, K).to(E4M3), zeros(N, K).to(E4M3)
    a_scale, b_scale = zeros(M, -(-K // 128)), zeros(-(-N // 128), -(-K // 128))
    out = accel.fp8_gemm(a, a_scale, b, b_scale, bias=bias, backend=backend)
    assert_same(out, bias.bfloat16().expand(M, N), "an empty product is the bias")


# --- the kernels of CPUs ---


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_cpu_at_every_level(case, dtype, level):
    with at_level(level):
        check_product("cpu", case, dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8, 40])
def test_cpu_multiplies_every_code(rows, turned, level):
    """Each of the 256 in a row of its own, at a place of its own, by ones; NaN and infinities among them."""
    codes = torch.arange(256)
    for dtype in DTYPES:
        b = zeros(256, 131, dtype=torch.uint8)
        b[codes, codes % 131] = codes.byte()
        b = b.t().contiguous().t() if turned else b
        want = torch.tensor([value_of(code, dtype) for code in range(256)]).expand(rows, 256)
        for a, scale in ((torch.ones(rows, 131), None), (torch.ones(rows, 131).to(E4M3), torch.ones(rows, 2))):
            given = {"a": a, "a_scale": scale, "b": b.view(dtype), "b_scale": torch.ones(2, 2)}
            with at_level(level):
                got = accel.fp8_gemm(**given, out_dtype=torch.float32, backend="cpu")
            assert_same(got, want, f"codes of b, {dtype}")
        if rows == 40:
            given = {"a": b.contiguous().view(dtype), "a_scale": torch.ones(256, 2)}
            ones = torch.ones(131, 7).to(E4M3) if turned else torch.ones(7, 131).to(E4M3)
            given |= {"b": ones.t() if turned else ones, "b_scale": torch.ones(1, 2), "out_dtype": torch.float32}
            with at_level(level):
                got = accel.fp8_gemm(**given, backend="cpu")
            assert_same(got, want[:1].t().expand(256, 7), f"codes of a, {dtype}")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("depth", [4096, 16384])
@pytest.mark.parametrize("rows", [2, 24])
def test_cpu_sums_are_fp32(rows, depth, level):
    for kind in ("normal", "lognormal"):
        for a_block, b_block, turned in (
            ((1, 128), (128, 128), False),
            ((1, 128), (1, 128), True),
            ((1, None),) * 2 + (0,),
        ):
            case = Product("", rows, 70, depth, a_block, b_block, turned=bool(turned), kind=kind)
            given = case.make()
            want = exact_product(given, a_block, b_block)
            with at_level(level):
                got = accel.fp8_gemm(**given, backend="cpu").double()
            assert (got - want).norm() <= 1e-6 * want.norm(), f"{case}, {kind}"


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_cpu_threads_and_fresh_memory_change_no_bit(case):
    given = case.make()
    want = accel.fp8_gemm(**given, backend="cpu")
    for count in (1, 2, 3):
        with threads(count), poisoned():
            assert_same(accel.fp8_gemm(**given, backend="cpu"), want, f"{count} threads")


@pytest.mark.parametrize("level", LEVELS)
def test_the_number_of_threads_changes_no_bit_of_a_product_of_many_tiles(level):
    a, a_scale = accel.fp8_quantize(random_matrix((300, 515), "normal", 0))
    b, b_scale = accel.fp8_quantize(random_matrix((2048, 515), "normal", 1), block=(128, 128))
    with at_level(level):
        made = []
        for count in (1, 2, 8):
            with threads(count):
                made.append(accel.fp8_gemm(a, a_scale, b, b_scale, out_dtype=torch.float32, backend="cpu"))
    for product in made[1:]:
        assert_same(product, made[0], level)


def test_cpu_reads_and_writes_nothing_beyond():
    calls = []
    for i, case in enumerate(PRODUCTS):
        with Recorder() as recorder:
            accel.fp8_gemm(**case.make(INPUTS[i % 3]), backend="cpu")
        calls += [(str(case), overload.name(), args) for overload, args in recorder.calls]
    assert [name for _, name, _ in calls].count("accel::fp8_gemm") == len(PRODUCTS)
    guard.replay(calls, ("accel", "accel._C"))


def test_cpu_makes_no_float64():
    given = Product("", 3, 4, 5, WEIGHT_ONLY).make()
    for change in ({"out_dtype": torch.float64}, {"a": given["a"].double()}):
        with pytest.raises(NotImplementedError, match=r"not torch\.float64"):
            accel.fp8_gemm(**{**given, **change}, backend="cpu")


# --- around it ---


def test_against_what_was_quantised():
    for kind in ("normal", "lognormal"):
        x, w = random_matrix((30, 4096), kind, 1), random_matrix((60, 4096), kind, 2)
        got = accel.fp8_gemm(*accel.fp8_quantize(x), *accel.fp8_quantize(w, block=(128, 128)), out_dtype=torch.float32)
        want = x.double() @ w.double().t()
        assert (got - want).norm() <= 0.05 * want.norm()


def test_it_has_no_gradient():
    given = Product("", 3, 4, 5, None).make()
    with pytest.raises(NotImplementedError, match="fp8_linear"):
        accel.fp8_gemm(**{**given, "a": given["a"].requires_grad_()})
    with torch.no_grad():
        assert accel.fp8_gemm(**given).shape == (3, 4)


def test_compiled():
    given = Product("", 9, 40, 300, bias=True).make()
    call = torch.compile(lambda **given: accel.fp8_gemm(**given), backend="aot_eager", fullgraph=True)
    assert_same(call(**given), accel.fp8_gemm(**given), "compiled")


@each(
    [
        Bad("plain_b", TypeError, r"b must be float8.*torch\.float32", {"b": zeros(5, 300)}),
        Bad("plain_a", TypeError, r"a must be float8.*torch\.float32", {"a": zeros(4, 300)}),
        Bad("codes_without_scale", TypeError, "no a_scale", {"a_scale": None}),
        Bad("depth", ValueError, r"\(4, 300\).*\(5, 200\)", {"b": zeros(5, 200).to(E4M3)}),
        Bad("batch", ValueError, r"matrix.*\(1, 5, 300\)", {"b": zeros(1, 5, 300).to(E4M3)}),
        Bad("scale_shape", ValueError, r"a_scale has \(3, 3\) scales.*\(4, 300\)", {"a_scale": zeros(3, 3)}),
        Bad("pairing", ValueError, "300 columns and those of b for 128", {"a_scale": zeros(4, 1)}),
        Bad(
            "scale_dtype", TypeError, r"b_scale must be float32.*float16", {"b_scale": zeros(1, 3, dtype=torch.float16)}
        ),
        Bad("negative", ValueError, r"b_scale\[0, 1\]=-1", {"b_scale": torch.tensor([[1.0, -1.0, 1.0]])}),
        Bad("nan", ValueError, r"b_scale\[0, 2\]=nan", {"b_scale": torch.tensor([[1.0, 1.0, float("nan")]])}),
        Bad("bias", ValueError, r"\(N,\) = \(5,\).*\(4,\)", {"bias": zeros(4)}),
        Bad("out_dtype", ValueError, r"out_dtype=torch\.int8", {"out_dtype": torch.int8}),
    ]
)
def test_bad_input(bad):
    good = {
        "a": zeros(4, 300).to(E4M3), "a_scale": zeros(4, 3), "b": zeros(5, 300).to(E4M3), "b_scale": zeros(1, 3)
    }  # fmt: skip
    check_bad(accel.fp8_gemm, good, bad)
