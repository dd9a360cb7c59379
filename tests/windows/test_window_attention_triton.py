"""The Triton backend of window attention by itself: every path its table can choose, against the float64 reference.

Without a GPU the kernels run under Triton's interpreter, which is slow: maps are as small as their purpose allows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

import accel
from accel import philox
from accel.kernels import _launch
from accel.kernels.windows import window_attention as kernels
from accel.ops.windows import window_attention as op
from accel.testing import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # B and the map
    window: tuple[int, ...]
    heads: int
    head_dim: int
    shift: tuple[int, ...] | None = None
    bias: str | None = "table"  # "table", "dense" or None
    cosine: bool = False
    fill: bool = False
    dropout: float = 0.0
    pad_order: str = "pad_then_roll"
    small: torch.dtype = FP32  # dtype of the small parameters
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def args(self, seed: int = 0) -> op.Args:
        make = torch.Generator().manual_seed(seed)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=make)

        channels, tokens = self.heads * self.head_dim, math.prod(self.window)
        qkv = randn(*self.shape, 3 * channels)
        if self.cosine:  # a query, a key and all of a token that are zero
            parts = qkv.view(-1, 3, self.heads, self.head_dim)
            parts[0, 0, 0] = parts[-1, 1, -1] = parts[parts.shape[0] // 2] = 0.0
        rows = math.prod(2 * w - 1 for w in self.window)
        given = {
            "bias_table": randn(rows, self.heads) if self.bias == "table" else None,
            "bias": randn(self.heads, tokens, tokens) if self.bias == "dense" else None,
            "logit_scale": randn(self.heads) if self.cosine else None,
            "qkv_bias": randn(3 * channels) if self.fill else None,
        }
        torch.manual_seed(seed)
        return op._prepare(
            qkv.to(DEVICE, self.dtype),
            **{name: x if x is None else x.to(DEVICE, self.small) for name, x in given.items()},
            num_heads=self.heads,
            window_size=self.window,
            shift_size=self.shift,
            pad_order=self.pad_order,
            dropout_p=self.dropout,
            **self.options,
        )


CASES = [
    # one tile: windows of at most 64 tokens in half precision
    Case("pad_then_roll", BF16, (1, 9, 11), (7, 7), 2, 32, shift=(3, 3), fill=True),
    Case("roll_then_pad", BF16, (1, 9, 11), (7, 7), 2, 32, shift=(3, 3), fill=True, pad_order="roll_then_pad"),
    Case("no_fill", FP16, (2, 8, 7), (7, 7), 1, 32, shift=(3, 0), bias=None),
    Case("full_window_cosine", FP16, (1, 16, 8), (8, 8), 2, 16, shift=(4, 4), cosine=True),
    Case("small_window_cosine", BF16, (1, 10, 12), (5, 6), 2, 20, shift=(2, 3), cosine=True, small=BF16),
    Case("small_window", FP16, (1, 7, 8), (5, 6), 1, 64, shift=(2, 3), fill=True, dropout=0.2),
    Case("tiny_window", FP16, (1, 5, 4), (3, 2), 3, 4, shift=(1, 1), bias="dense", small=FP16),
    Case("tiny_dropout", BF16, (1, 5, 5), (3, 5), 2, 8, shift=(1, 0), fill=True, dropout=0.6, cosine=True),
    Case("one_token", FP16, (1, 2, 3), (1, 1), 2, 12),
    Case("wrapped_twice", FP16, (1, 2, 3), (7, 5), 1, 16, shift=(5, 4), fill=True, pad_order="roll_then_pad",
         options={"clamp_shift": False}),
    Case("three_axes", BF16, (1, 3, 5, 6), (2, 4, 5), 1, 32, shift=(1, 2, 2), fill=True),
    # blocks: fp32, wide heads, dropout, larger windows
    Case("fp32_v1", FP32, (1, 8, 9), (7, 7), 1, 32, shift=(3, 3), fill=True),
    Case("fp32_cosine", FP32, (1, 6, 7), (5, 7), 1, 20, shift=(2, 3), fill=True, cosine=True,
         pad_order="roll_then_pad"),
    Case("fp32_tiny", FP32, (2, 3, 4), (2, 3), 1, 4, shift=(1, 2), bias="dense", fill=True, dropout=0.3),
    Case("fp32_wide", FP32, (1, 4, 6), (4, 6), 1, 68, cosine=True, dropout=0.25),
    Case("half_wide", BF16, (1, 5, 6), (5, 7), 1, 128, shift=(2, 3), fill=True, bias="dense"),
    Case("dropout", FP16, (1, 8, 8), (7, 7), 1, 32, shift=(3, 3), fill=True, dropout=0.5),
    Case("cosine_v1", BF16, (1, 8, 7), (7, 7), 1, 32, shift=(3, 3), cosine=True, fill=True),
    Case("large_window", BF16, (1, 13, 12), (12, 12), 1, 32, shift=(6, 0), fill=True),
    Case("large_cosine", FP16, (1, 9, 10), (9, 10), 1, 16, shift=(4, 5), cosine=True,
         options={"clamp_shift": False}),
    Case("large_three_axes", BF16, (1, 5, 6, 7), (4, 6, 7), 1, 16, shift=(2, 0, 0)),
]  # fmt: skip


def backward(args: op.Args, grad_out: torch.Tensor, needs: list[bool]) -> tuple[torch.Tensor, ...]:
    _, lse = kernels.forward(*args)
    return kernels.backward(grad_out, lse, *args, needs)


def expected(args: op.Args, grad_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
    """Output, log-sum-exp and gradients in float64 from the same rounded inputs."""
    leaves = [None if x is None else x.double().requires_grad_() for x in args[:5]]
    out, lse = op.reference(*leaves, *args[5:])
    given = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad(out, given, grad_out.double(), allow_unused=True, materialize_grads=True))
    return out, lse, [None if x is None else next(found) for x in leaves]


def random_grad(args: op.Args) -> torch.Tensor:
    shape = (*args.qkv.shape[:-1], args.qkv.shape[-1] // 3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(args.qkv)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case: Case) -> None:
    args = case.args()
    grad_out = random_grad(args)
    out_ref, lse_ref, grads_ref = expected(args, grad_out)
    out, lse = kernels.forward(*args)
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    assert_close(out, out_ref, "softmax", case.dtype, "out")
    assert_close(lse, lse_ref, "lse", torch.float32, "lse")

    grads = kernels.backward(grad_out, lse, *args, [True] * 4)
    assert grads[0].dtype == case.dtype
    if args.window == [1, 1, 1]:  # q and k have no say: their gradients, 0, are judged beside that of v
        assert_close(grads[0], grads_ref[0], "softmax_grad", case.dtype, "gradient of qkv")
    else:
        parts = zip("qkv", grads[0].chunk(3, -1), grads_ref[0].chunk(3, -1), strict=True)
        for name, part, part_ref in parts:
            assert_close(part, part_ref, "softmax_grad", case.dtype, f"gradient of {name}")
    for name, family, grad, ref in zip(
        ("bias_table", "bias", "head_scale", "qkv_bias"),
        ("softmax_grad", "softmax_grad", "sum_grad", "softmax_grad"),
        grads[1:],
        grads_ref[1:],
        strict=True,
    ):
        assert grad.dtype == torch.float32
        if ref is None:
            assert grad.shape == (0,), f"gradient of {name}, which is not there, has shape {tuple(grad.shape)}"
        else:
            assert_close(grad, ref, family, case.dtype, f"gradient of {name}")


def test_cases_reach_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list above loses its point if the table of tiles moves on and leaves a kernel out."""
    reached = set()
    for case in CASES:
        args = case.args()
        out, lse = kernels._results(args)
        launches = [kernels._forward_launch(out, lse, args)]
        launches += kernels._backward_plan(out, lse, args, [True] * 4).launches
        for launch in launches:
            given = launch.arguments
            reached.add((launch.kernel.__name__, given["CONFIG"].block if "CONFIG" in given else given["BLOCK"]))
    block_kernels = {"forward_blocks_kernel", "queries_kernel", "keys_kernel", "bias_kernel"}
    wanted = {(name, block) for name in block_kernels for block in (16, 32)}
    wanted |= {(name, 64) for name in block_kernels - {"bias_kernel"}}
    tile_kernels = {"forward_tile_kernel", "expand_bias_kernel", "backward_tile_kernel"}
    wanted |= {(name, block) for name in tile_kernels for block in (16, 32, 64)}
    assert reached == wanted


@pytest.mark.parametrize("pad_order", ["pad_then_roll", "roll_then_pad"])
@pytest.mark.parametrize(
    ("shape", "window", "shift"), [((2, 9, 8), (4, 3), (3, 1)), ((1, 3, 5, 4), (2, 2, 3), (1, 1, 2))]
)
def test_addressing_is_exact(
    shape: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], pad_order: str
) -> None:
    """A bias that leaves each token only itself makes the op the identity on v, bit for bit."""
    tokens = math.prod(window)
    bias = torch.full((2, tokens, tokens), -1e9)
    bias.diagonal(dim1=1, dim2=2).zero_()
    qkv = torch.randn(*shape, 3 * 2 * 8).to(DEVICE, BF16)
    out = accel.window_attention(
        qkv, num_heads=2, window_size=window, shift_size=shift, bias=bias.to(DEVICE), pad_order=pad_order,
        backend="triton",
    )  # fmt: skip
    assert torch.equal(out, qkv[..., 32:])


@pytest.mark.parametrize("exponent", [-14, -30])
def test_vectors_below_the_norm_bound(exponent: int) -> None:
    """0 < norm < 1e-12 divides by 1e-12, also where the squares vanish in fp32."""
    args = Case("", FP32, (1, 3, 4), (3, 4), 1, 16, cosine=True).args()
    args.qkv[0, 0, 1, 1, :32] *= 10.0**exponent
    grad_out = random_grad(args)
    _, _, ref = expected(args, grad_out)
    grad = backward(args, grad_out, [True] * 4)[0]
    assert ref[0][0, 0, 1, 1, :32].abs().max() > 1e9
    assert_close(grad[0, 0, 1, 1], ref[0][0, 0, 1, 1], "softmax_grad", FP32, "gradient of the tiny vectors")
    grad[0, 0, 1, 1] = ref[0][0, 0, 1, 1] = 0.0
    assert_close(grad, ref[0], "softmax_grad", FP32, "gradient of the others")


def test_programs_walk_over_windows_with_a_remainder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FORWARD_PROGRAMS", 3)
    args = Case("", BF16, (1, 13, 33), (7, 7), 1, 32, shift=(3, 3), fill=True).args()
    out, lse = kernels._results(args)
    forward = kernels._forward_launch(out, lse, args)
    plan = kernels._backward_plan(out, lse, args, [True] * 4)
    for launch in (forward, plan.launches[-1]):
        assert launch.arguments["windows"] == 10
        assert 1 < launch.arguments["per_program"] < 10
        assert 10 % launch.arguments["per_program"]
    grad_out = random_grad(args)
    out_ref, _, grads_ref = expected(args, grad_out)
    assert_close(kernels.forward(*args)[0], out_ref, "softmax", BF16, "out")
    grads = backward(args, grad_out, [True] * 4)
    for i, name in ((0, "qkv"), (1, "bias_table"), (4, "qkv_bias")):
        assert_close(grads[i], grads_ref[i], "softmax_grad", BF16, f"gradient of {name}")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["blocks", "one_tile"])
def test_only_needed_gradients_and_the_same_bits(dtype: torch.dtype) -> None:
    args = Case("", dtype, (1, 4, 4), (3, 3), 2, 8, shift=(1, 1), cosine=True, fill=True).args()
    grad_out = random_grad(args)
    all_of_them = backward(args, grad_out, [True] * 4)
    none = backward(args, grad_out, [False] * 4)
    assert torch.equal(none[0], all_of_them[0])
    assert [tuple(g.shape) for g in none[1:]] == [(0,)] * 4
    again = backward(args, grad_out, [True, False, True, True])
    for first, second in zip(all_of_them, again, strict=True):
        assert torch.equal(first, second)


def test_unpadded_map_gives_qkv_bias_no_gradient() -> None:
    args = Case("", BF16, (1, 3, 6), (3, 3), 1, 8, fill=True).args()
    grad = backward(args, random_grad(args), [True] * 4)[4]
    assert torch.equal(grad, torch.zeros_like(grad))
    assert grad.shape == args.qkv_bias.shape


def test_public_call_runs_on_triton() -> None:
    """Autograd, half inputs beside fp32 parameters, and a second head scale shape, through the front door."""
    make = torch.Generator().manual_seed(3)
    qkv, table, scale = (torch.randn(size, generator=make) for size in ((1, 5, 6, 48), (35, 2), (2, 1, 1)))
    results = []
    for backend, dtype in (("triton", BF16), ("reference", torch.float64)):
        leaves = [qkv.to(BF16).to(DEVICE, dtype), table.to(DEVICE), scale.to(DEVICE)]
        leaves = [x.double() if dtype == torch.float64 else x.clone() for x in leaves]
        leaves = [x.requires_grad_() for x in leaves]
        out = accel.window_attention(
            leaves[0], leaves[1], num_heads=2, window_size=(3, 4), shift_size=(1, 2), logit_scale=leaves[2],
            backend=backend,
        )  # fmt: skip
        out.square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for name, family, got, want in zip(
        ("out", "qkv", "table", "logit_scale"),
        ("softmax", "softmax_grad", "softmax_grad", "sum_grad"),
        *results,
        strict=True,
    ):
        assert_close(got, want, family, BF16, name)


# --- dropout bits ---


@triton.jit
def _bits_kernel(out_ptr, seed_ptr, position_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out_ptr + i, _launch.random_bits(seed_ptr, tl.load(position_ptr + i)))


def device_bits(seed: int, positions: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(positions)
    _bits_kernel[(1,)](out, torch.tensor([seed], device=DEVICE), positions, COUNT=positions.numel())
    return out


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_bits_are_those_of_philox(seed: int) -> None:
    got = device_bits(seed, torch.arange(1024, device=DEVICE))
    assert torch.equal(got, philox.random_bits(torch.tensor([seed], device=DEVICE), 1024))


def philox_word(seed: int, position: int) -> int:
    """First word of Philox4x32-10 in Python's integers."""
    low = 0xFFFFFFFF
    c, k = [position & low, position >> 32, 0, 0], [seed & low, (seed >> 32) & low]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c[0]


def test_bits_past_32_bit_positions() -> None:
    positions = [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 5 * 2**32 + 7, 2**40 + 3, 2**62 + 11]
    got = device_bits(-42, torch.tensor(positions, device=DEVICE))
    assert got.tolist() == [philox_word(-42, position) for position in positions]


# --- refusals and sizes, which need no kernel ---


def test_why_not() -> None:
    args = CASES[0].args()
    assert kernels.why_not(args) is None
    huge = args._replace(window=[1, 200, 200])
    assert "40000" in str(kernels.why_not(huge))
    many = args._replace(qkv=torch.empty(2**20, 1, 64, 64, 96, dtype=BF16, device="meta"), window=[1, 1, 1])
    assert "meta" in str(kernels.why_not(many))


def test_why_not_without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "INTERPRETING", False)
    args = CASES[0].args()
    assert "cpu" in str(kernels.why_not(args._replace(qkv=args.qkv.cpu())))


@pytest.mark.parametrize("tokens", [1, 49, 64, 144, 256, 576, 784, 4096])
@pytest.mark.parametrize("heads", [1, 3, 24, 64])
@pytest.mark.parametrize("windows", [1, 7, 64, 4096, 1_000_000])
def test_partial_sums_are_bounded(windows: int, heads: int, tokens: int) -> None:
    shape = kernels._Shape(head_dim=32, tokens=tokens, windows=windows, padded=False)
    per_program = kernels._windows_per_part(shape, heads, 2, heads * triton.cdiv(tokens, 32) ** 2, True)
    assert 1 <= per_program <= windows
    parts = triton.cdiv(windows, per_program)
    dense = 4 * heads * tokens**2
    assert parts * dense <= max(kernels.PARTS_BYTES, dense)
