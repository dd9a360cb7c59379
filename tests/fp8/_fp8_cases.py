"""What the tests of eight-bit numbers share: calls as data, and numbers as plain Python sees them."""

import dataclasses
import math
from fractions import Fraction

import torch

import accel

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = (E4M3, E5M2)
INPUTS = (torch.float32, torch.bfloat16, torch.float16)
SCALES = ("fp32", "pow2", "e8m0")


def value_of(code, dtype):
    """The number of a code by the definition of its format, NaN and infinities included."""
    exponent_bits, bias = (4, 7) if dtype == E4M3 else (5, 15)
    mantissa_bits = 7 - exponent_bits
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    if dtype == E4M3 and code & 0x7F == 0x7F:
        return math.nan
    if dtype == E5M2 and exponent == 31:
        return sign * math.inf if mantissa == 0 else math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)


def rounded(x):
    """The fp32 number nearest to a rational one."""
    near = torch.tensor(float(x), dtype=torch.float64).float()  # perhaps off by rounding twice
    candidates = [near, *(torch.nextafter(near, torch.tensor(s * math.inf)) for s in (-1, 1))]
    best = min(abs(Fraction(c.item()) - x) for c in candidates)
    nearest = [c for c in candidates if abs(Fraction(c.item()) - x) == best]
    return next(c for c in nearest if len(nearest) == 1 or c.view(torch.int32).item() % 2 == 0).item()


def random_matrix(shape, kind="normal", seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "lognormal":  # a fifth of the codes are subnormal
        x = x.sign() * (2.0 * torch.randn(shape, generator=generator)).exp()
    return x.to(dtype)


def hostile(dtype=torch.float32):
    """Rows of 300 with what is not finite, zeros, ties and both ends of the range."""
    x = random_matrix((11, 300), "lognormal", 3)
    x[0, 7], x[0, 150] = math.nan, -math.nan
    x[1, 3], x[1, 200] = math.inf, -math.inf
    x[2, :128] = 0.0
    x[2, 128:256] = -0.0
    x[3] = math.nan
    x[4] = math.inf
    x[5] *= 1e-30 if dtype != torch.float16 else 1e-4
    x[6] = 2.0**-118 if dtype != torch.float16 else 2.0**-24
    x[7] *= 1e36 if dtype != torch.float16 else 10.0
    x[8] = torch.arange(300) / 16 + 1  # ties
    x[9, ::2] = 2.0**-130 if dtype != torch.float16 else 0.0  # subnormal, beside the smallest block that counts
    x[9, 1::2] = 2.0**-117 if dtype != torch.float16 else 2.0**-14
    x[10] = 448.0 * torch.linspace(-1, 1, 300)
    return x.to(dtype)


@dataclasses.dataclass(frozen=True)
class Quantize:
    """A call of ``fp8_quantize``; ``dtype`` is of the input."""

    name: str
    shape: tuple
    block: object = (1, 128)
    kind: str = "normal"

    def make(self, dtype=torch.float32):
        return hostile(dtype) if self.kind == "hostile" else random_matrix(self.shape, self.kind, 1, dtype)

    def __str__(self):
        return self.name


QUANTIZE = [
    Quantize("tiles", (5, 384)),
    Quantize("ragged", (7, 300), kind="lognormal"),
    Quantize("hostile", (), kind="hostile"),
    Quantize("blocks", (256, 256), (128, 128)),
    Quantize("blocks_ragged", (160, 131), (128, 128), "lognormal"),
    Quantize("rows", (9, 201), (1, None)),
    Quantize("whole", (33, 65), None, "lognormal"),
    Quantize("mx", (6, 100), (1, 32)),
    Quantize("odd_blocks", (23, 45), (3, 7)),
    Quantize("columns", (130, 5), (128, 1)),
    Quantize("one", (1, 1)),
    Quantize("batch", (2, 3, 4, 140)),
    Quantize("wide", (3, 5000), kind="lognormal"),
    Quantize("tall", (700, 3), (128, 128)),
]


@dataclasses.dataclass(frozen=True)
class Product:
    """A call of ``fp8_gemm``: operands quantised in these blocks; ``a_block`` None leaves a as it is."""

    name: str
    M: int
    N: int
    K: int
    a_block: object = (1, 128)
    b_block: object = (128, 128)
    bias: bool = False
    turned: bool = False
    kind: str = "normal"
    scale_format: str = "fp32"
    formats: tuple = (E4M3, E4M3)

    def make(self, dtype=torch.float32, device="cpu"):
        """Arguments of the call; ``dtype`` is of plain numbers, and of the result."""
        a = 0.01 * random_matrix((self.M, self.K), self.kind, 5).to(device)  # no sum may leave the range of fp16
        b = random_matrix((self.N, self.K), self.kind, 6).to(device)
        a_scale = None
        scale_format = self.scale_format
        if self.a_block is None:
            a = a.to(dtype)
        else:
            a, a_scale = accel.fp8_quantize(
                a, block=self.a_block, dtype=self.formats[0], scale_format=scale_format, backend="reference"
            )
        b, b_scale = accel.fp8_quantize(
            b, block=self.b_block, dtype=self.formats[1], scale_format=scale_format, backend="reference"
        )
        if self.turned:
            b = b.t().contiguous().t()
        bias = random_matrix((self.N,), seed=8).to(device) if self.bias else None
        return {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale, "bias": bias, "out_dtype": dtype}

    def __str__(self):
        return self.name


def exact_product(given, a_block, b_block):
    """The product in float64 of the dequantised operands of a call, made without the op's own reference."""

    def numbers(x, scale, block):
        if scale is None:
            return x.double()
        rows, cols = [size or whole for size, whole in zip(block, x.shape, strict=True)]
        spread = scale.float().double().repeat_interleave(rows, 0)[: x.shape[0]]
        return x.float().double() * spread.repeat_interleave(cols, 1)[:, : x.shape[1]]

    out = numbers(given["a"], given["a_scale"], a_block) @ numbers(given["b"], given["b_scale"], b_block).t()
    return out if given["bias"] is None else out + given["bias"].double()


WEIGHT_ONLY = None
TENSOR = (None, None)
ROW = (1, None)
TILE = (1, 128)
PRODUCTS = [
    Product("one_row", 1, 160, 256),
    Product("two_rows", 2, 130, 300, bias=True),
    Product("four_rows", 4, 17, 129, kind="lognormal"),
    Product("five_rows", 5, 65, 257),
    Product("gemm", 37, 200, 390, bias=True, kind="lognormal"),
    Product("many_rows", 150, 70, 260),
    Product("turned", 19, 140, 300, turned=True),
    Product("turned_one_row", 1, 140, 300, turned=True, bias=True),
    Product("turned_lognormal", 33, 300, 131, turned=True, kind="lognormal"),
    Product("weight_gradient", 70, 90, 150, b_block=TILE),
    Product("blocks_first", 140, 9, 200, (128, 128), TILE),
    Product("blocks_both", 140, 150, 200, (128, 128), (128, 128)),
    Product("row", 6, 50, 200, ROW, ROW, bias=True),
    Product("tensor", 11, 50, 200, TENSOR, TENSOR),
    Product("row_tensor", 3, 20, 131, ROW, TENSOR),
    Product("mx", 8, 40, 100, (1, 32), (1, 32), scale_format="e8m0"),
    Product("e8m0", 8, 40, 300, scale_format="e8m0"),
    Product("e5m2", 9, 40, 200, formats=(E5M2, E4M3)),
    Product("e5m2_both", 9, 40, 200, formats=(E5M2, E5M2), turned=True),
    Product("weight_only", 7, 140, 260, WEIGHT_ONLY, bias=True),
    Product("weight_only_one_row", 1, 140, 260, WEIGHT_ONLY, kind="lognormal"),
    Product("weight_only_turned", 5, 140, 260, WEIGHT_ONLY, turned=True),
    Product("weight_only_rows", 40, 140, 260, WEIGHT_ONLY, ROW),
    Product("one", 1, 1, 1),
    Product("short", 3, 5, 7),
    Product("single_columns", 3, 5, 128),
]
