"""The Triton kernel of products of eight-bit numbers, against the float64 product of what the codes stand for.

Without a GPU it runs under Triton's interpreter, which is slow: cases are as small as their purpose allows.
"""

import itertools

import pytest
import torch
from _fp8_cases import DTYPES, E4M3, E5M2, INPUTS, PRODUCTS, ROW, TENSOR, TILE, WEIGHT_ONLY, Product
from _triton_checks import DEVICE, on_the_cpu
from test_fp8_gemm import check_product

pytest.importorskip("triton")
import accel
from accel.kernels.fp8 import fp8_gemm as leaf
from accel.ops.fp8.fp8_gemm import _prepare
from accel.testing import assert_same, guard

SLOW = [] if DEVICE == "cuda" else [pytest.mark.slow]  # the interpreter takes minutes for all of them
MORE = [
    Product("columns_of_sixteen", 20, 48, 272, b_block=TILE, bias=True),
    Product("rows_of_b_turned", 70, 48, 144, ROW, ROW, turned=True),
    Product("mx_turned", 20, 33, 100, (1, 32), (1, 32), turned=True, scale_format="e8m0"),
    Product("many_rows_mx", 66, 34, 80, (1, 32), (1, 32)),
    Product("weight_only_mx", 17, 34, 80, WEIGHT_ONLY, (1, 32)),
    Product("weight_only_tensor_e5m2", 70, 34, 144, WEIGHT_ONLY, TENSOR, formats=(E4M3, E5M2)),
    Product("long", 2, 3, 4096, kind="lognormal"),
    Product("groups_of_tiles", 1200, 70, 16, TENSOR, ROW),
]


@pytest.mark.parametrize("case", PRODUCTS + MORE, ids=str)
def test_product(case):
    dtype = INPUTS[(PRODUCTS + MORE).index(case) % len(INPUTS)]
    check_product("triton", case, dtype, DEVICE)


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=SLOW) for dtype in INPUTS])
@pytest.mark.parametrize("case", PRODUCTS + MORE, ids=str)
def test_all_products(case, dtype):
    check_product("triton", case, dtype, DEVICE)


# --- what comes out exactly ---


def turned(x):
    return x.t().contiguous().t()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of infinities that become NaN
@pytest.mark.parametrize("formats", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_code_times_every_code(formats):
    """What is not finite included. The second column is zeros, so that rows of b may be turned."""
    a, b = [torch.stack([torch.arange(256), torch.zeros(256)], 1).to(torch.uint8).view(kind) for kind in formats]
    one = torch.ones(1, 1, device=DEVICE)
    want = (a.double()[:, :1] * b.double()[:, 0]).float()
    a, b = a.to(DEVICE), b.to(DEVICE)
    for rows, by in ((256, b), (40, b), (256, turned(b)), (5, turned(b))):
        got = accel.fp8_gemm(a[-rows:], one, by, one, out_dtype=torch.float32, backend="triton")
        assert_same(got.cpu(), want[-rows:], f"{rows} rows")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("kind", DTYPES)
def test_plain_numbers_times_every_code(kind, dtype):
    b = torch.arange(256, dtype=torch.uint8)[:, None]
    a = torch.tensor([[1.0], [-2.0], [0.375]], dtype=dtype)
    one = torch.ones(1, 1, device=DEVICE)
    given = (a.to(DEVICE), None, b.to(DEVICE).view(kind), one)
    got = accel.fp8_gemm(*given, out_dtype=torch.float32, backend="triton")
    assert_same(got.cpu(), (a.double() * b.view(kind).double()[:, 0]).float(), "products")


@pytest.mark.parametrize("seed", range(12))
def test_any_size(seed):
    """Small whole numbers and scales, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    M, N, K = [int(whole(1, most, 1)) for most in ((70, 160, 300), (20, 70, 700), (160, 40, 150))[seed % 3]]
    depth = (32, 128, 1024)[seed // 3 % 3]
    given, exact = [], []
    for size, kind in ((M, E4M3), (N, DTYPES[seed % 2])):
        rows = (1, 128, 1024)[int(whole(0, 3, 1))]
        x, scale = whole(-8, 9, size, K), whole(1, 3, -(-size // rows), -(-K // depth))
        exact.append(x * scale.repeat_interleave(rows, 0)[:size].repeat_interleave(depth, 1)[:, :K])
        given += [x.float().to(kind).to(DEVICE), scale.float().to(DEVICE)]
    if seed % 4 == 1:
        given[2] = turned(given[2])
    if seed % 4 == 3:
        given[:2] = whole(-8, 9, M, K).to(INPUTS[seed % 3]).to(DEVICE), None
        exact[0] = given[0].cpu().long()
    bias = whole(-8, 9, N).float()
    got = accel.fp8_gemm(*given, bias=bias.to(DEVICE), out_dtype=torch.float32, backend="triton")
    assert_same(got.cpu(), (exact[0] @ exact[1].t() + bias).float(), f"{M} x {N} x {K}")


# --- around it ---


def test_what_it_refuses():
    columns = Product("", 3, 5, 40, (1, 1), (1, 1)).make(device=DEVICE)
    with pytest.raises(NotImplementedError, match="multiples of 32 columns, not of 1"):
        accel.fp8_gemm(**columns, backend="triton")
    blocks = Product("", 300, 5, 40).make(device=DEVICE)
    with pytest.raises(NotImplementedError, match="float64"):
        accel.fp8_gemm(**{**blocks, "out_dtype": torch.float64}, backend="triton")
    args = _prepare(**blocks)
    assert leaf.why_not(args) is None
    assert "not of 100 rows of a" in leaf.why_not(args._replace(a_rows=100))
    many = args.a[:1, :1].expand(2**20, -1), args.b[:1, :1].expand(2**20, -1)
    assert "more than one launch can number" in leaf.why_not(args._replace(a=many[0], b=many[1], a_rows=1, b_rows=1))


def test_codes_are_multiplied_as_they_are_where_tensor_cores_take_them(monkeypatch):
    monkeypatch.setattr(leaf._launch, "INTERPRETING", False)
    codes = _prepare(**Product("", 70, 32, 40).make())
    found = {of: leaf.config(codes, of)[0].dot for of in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))}
    assert [of for of, dot in found.items() if dot is None] == [(8, 9), (9, 0), (10, 0), (12, 0)]
    plain = _prepare(**Product("", 70, 32, 40, WEIGHT_ONLY).make(torch.bfloat16))
    assert str(leaf.config(plain, (9, 0))[0].dot) == "bf16"


def test_compiled():
    given = Product("", 5, 40, 100, bias=True).make(torch.bfloat16, DEVICE)
    call = torch.compile(lambda: accel.fp8_gemm(**given, backend="triton"), backend="aot_eager", fullgraph=True)
    assert_same(call(), accel.fp8_gemm(**given, backend="triton"), "compiled")


def test_nothing_outside_is_read_or_written():
    on_the_cpu()
    cases = (
        Product("", 3, 34, 144), Product("", 70, 33, 130, TILE, TILE), Product("", 5, 32, 140, ROW, ROW, turned=True),
        Product("", 7, 9, 45, WEIGHT_ONLY, bias=True),
    )  # fmt: skip
    calls = [(f"{n}", "accel::fp8_gemm.default", (*_prepare(**c.make()), "triton")) for n, c in enumerate(cases)]
    guard.replay(calls, ("accel", leaf.__name__))
