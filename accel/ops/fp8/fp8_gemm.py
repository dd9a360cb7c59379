"""Products of matrices of eight-bit numbers with scales for their blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library, memo
from accel.backends import KERNEL_DTYPES, check_beside, check_floating
from accel.ops.fp8 import formats
from accel.ops.fp8.fp8_quantize import read_scale


class Args(NamedTuple):
    """The checked arguments every backend receives."""

    a: Tensor  # (M, K) contiguous, uint8; floating where it has no scale
    b: Tensor  # (N, K) contiguous uint8, (K, N) where b_turned
    a_scale: Tensor | None  # fp32 contiguous, (ceil(M / a_rows), ceil(K / depth))
    b_scale: Tensor  # fp32 contiguous, (ceil(N / b_rows), ceil(K / depth))
    bias: Tensor | None  # (N,) contiguous fp32
    a_format: str  # one of formats.FORMATS; "" where a is floating
    b_format: str
    a_rows: int  # of a block, from 1 on
    b_rows: int
    depth: int  # columns of a block, of both
    b_turned: bool
    out_dtype: str  # a name in OUT_DTYPES

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        return self.a.shape[0], self.b.shape[1 if self.b_turned else 0], self.a.shape[1]


OUT_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
OUT_NAMES = {dtype: name for name, dtype in OUT_DTYPES.items()}


# --- the definition ---


def reference(*given: Any) -> Tensor:
    """The op in plain torch: the product of the dequantised matrices in float64."""
    args = Args(*given)
    b = formats.decode(args.b, args.b_format)
    b = dequantized(b.mT if args.b_turned else b, args.b_scale, args.b_rows, args.depth)
    a = args.a.double()
    if args.a_scale is not None:
        a = dequantized(formats.decode(args.a, args.a_format), args.a_scale, args.a_rows, args.depth)
    out = a @ b.mT
    return (out if args.bias is None else out + args.bias).to(OUT_DTYPES[args.out_dtype])


def dequantized(x: Tensor, scale: Tensor, rows: int, cols: int) -> Tensor:
    return x.double() * formats.spread_scales(scale.double(), (x.shape[0], x.shape[1]), rows, cols)


# --- backends, fastest first for each device ---


_triton = backends.triton(__name__, floating=False)


def _why_not_triton(args: Args) -> str | None:
    return _triton.why_not(args) or why_not_out(args)


def _why_not_cpu(args: Args) -> str | None:
    return backends.why_not_native(args) or why_not_out(args)


def _run_native(*args: Any) -> Any:
    return torch.ops.accel_native.fp8_gemm.default(*args)


def why_not_out(args: Args) -> str | None:
    """Kernels sum in fp32."""
    if args.out_dtype == "float64" or args.a.dtype == torch.float64:
        return "it computes float32, bfloat16 and float16, not torch.float64"
    return None


# --- declaration ---


def _fake(args: Args) -> Tensor:
    M, N, _ = args.sizes
    return args.a.new_empty((M, N), dtype=OUT_DTYPES[args.out_dtype])


def _flops(args: Args) -> int:
    M, N, K = args.sizes
    return 2 * M * N * K


_op = library.register(
    "fp8_gemm",
    "(Tensor a, Tensor b, Tensor? a_scale, Tensor b_scale, Tensor? bias, str a_format, str b_format, SymInt a_rows, "
    "SymInt b_rows, SymInt depth, bool b_turned, str out_dtype, str backend) -> Tensor",
    lambda *given: dispatch.OPS["fp8_gemm"].backend(given[-1]).forward(*given[:-1]),
    lambda *given: _fake(Args(*given[:-1])),
    lambda *given: _flops(Args(*given[:-1])),
)


def multiply(args: Args, backend: str | None = None) -> Tensor:
    """The product by the backend that is asked for, or the first that can."""
    chosen = dispatch.select(OP, args, backend)
    if chosen.name == "reference" or args.a.numel() == 0 or args.b.numel() == 0:
        return reference(*args)
    return _op(*args, chosen.name)  # type: ignore[no-any-return]


# --- the public function ---


def _read_codes(x: Any, name: str) -> None:
    if not isinstance(x, Tensor) or x.dtype not in formats.NAMES:
        raise TypeError(f"{name} must be float8 (e4m3 or e5m2), got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() != 2:
        raise ValueError(f"{name} must be a matrix, got {tuple(x.shape)}")


_right: memo.Facts[bool] = memo.Facts()


def check_scale(scale: Tensor, name: str) -> None:
    """On a CPU: no scale is negative or NaN. What is remembered of a tensor is read once."""
    if scale.device.type != "cpu" or type(scale) is not Tensor or torch.compiler.is_compiling():
        return
    if _right.known((scale,)):
        return
    wrong = ~(scale >= 0.0)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"scales are numbers from 0 on, got {name}[{', '.join(map(str, place))}]={scale[place].item()}"
        )
    _right.get_or_read((scale,), None, lambda: True)


def _read_scale(scale: Any, name: str, beside: Tensor, shape: tuple[int, int]) -> tuple[Tensor, int, int]:
    """Contiguous fp32 scales of a matrix of ``shape``, and the block that each is of."""
    numbers = read_scale(scale, name)
    if numbers.device != beside.device:
        raise ValueError(f"{name} is on {numbers.device} but its matrix is on {beside.device}")
    if numbers.dim() == 0:
        numbers = numbers.view(1, 1)
    if numbers.dim() != 2:
        raise ValueError(f"{name} must be a matrix of scales, got {tuple(scale.shape)}")
    check_scale(numbers, name)
    rows, cols = formats.resolve_block(shape, (numbers.shape[0], numbers.shape[1]), name)
    return numbers.contiguous(), rows, cols


def _prepare(
    a: Tensor,
    a_scale: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    _read_codes(b, "b")
    if a_scale is None:
        check_floating(a, "a")
        if a.dtype in formats.NAMES:
            raise TypeError(f"a is {a.dtype} and has no a_scale")
    else:
        _read_codes(a, "a")
    if a.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a (M, K) and b (N, K) do not fit: {tuple(a.shape)=}, {tuple(b.shape)=}")
    if a.device != b.device:
        raise ValueError(f"a is on {a.device} but b is on {b.device}")
    if out_dtype not in OUT_NAMES:
        raise ValueError(f"out_dtype must be one of {', '.join(OUT_DTYPES)}, got {out_dtype=}")
    N, K = b.shape
    b_numbers, b_rows, depth = _read_scale(b_scale, "b_scale", b, (N, K))
    a_numbers, a_rows, a_depth = None, 1, depth
    if a_scale is not None:
        a_numbers, a_rows, a_depth = _read_scale(a_scale, "a_scale", a, (a.shape[0], K))
    if a_depth != depth:
        raise ValueError(
            f"scales of a are for {a_depth} columns and those of b for {depth}, which no product pairs: "
            f"{tuple(a_scale.shape)=}, {tuple(b_scale.shape)=}"  # type: ignore[union-attr]
        )
    if bias is not None:
        check_beside(bias, "bias", a, "a")
        if tuple(bias.shape) != (N,):
            raise ValueError(f"bias must be (N,) = ({N},), got {tuple(bias.shape)}")
        bias = bias.to(torch.float32).contiguous()
    turned = K > 1 and N > 1 and b.stride(0) == 1 and b.stride(1) == N
    codes = b.view(torch.uint8)
    codes = codes.mT if turned else codes.contiguous()
    return Args(
        (a if a_scale is None else a.view(torch.uint8)).contiguous(), codes, a_numbers, b_numbers, bias,
        "" if a_scale is None else formats.NAMES[a.dtype], formats.NAMES[b.dtype], a_rows, b_rows, depth, turned,
        OUT_NAMES[out_dtype],
    )  # fmt: skip


def fp8_gemm(
    a: Tensor,
    a_scale: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> Tensor:
    r"""The product :math:`a b^T` of matrices of eight-bit numbers with their scales, plus a bias.

    .. math:: y_{mn} = b_n + \sum_c s^a_{mc} s^b_{nc} \sum_{k \in c} a_{mk} b_{nk}

    where c runs over blocks of columns: the products of a block are summed in float32, then multiplied with the scales,
    then added up in float32.

    How scales lie says which numbers each is for, and both operands must have the same columns to a scale:

    - ``(M, ceil(K / 128))``, blocks of 1 x 128, or ``(ceil(M / 128), ceil(K / 128))``, 128 x 128, in any pair: the
      recipe of DeepSeek-V3 multiplies 1 x 128 with 128 x 128, and 1 x 128 with 1 x 128 for gradients of weights;
    - ``(M, 1)``, one for each row, or one for the whole matrix, ``(1, 1)`` or ``()``;
    - ``(M, ceil(K / 32))``, as MXFP8 has them.

    Args:
        a: ``(M, K)`` float8 (e4m3 or e5m2), any strides. float32, bfloat16 or float16 where ``a_scale`` is None: the
            product of plain numbers with a quantised weight.
        a_scale: scales of ``a``, float32 or float8_e8m0fnu (or its bytes as uint8), or None.
        b: ``(N, K)`` float8, any strides. Where b is the transpose of a contiguous matrix nothing is copied.
        b_scale: scales of ``b``, as those of a.
        bias: ``(N,)``, any floating dtype, added in float32, or None.
        out_dtype: float32, bfloat16 or float16; float64 on the reference.
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(M, N)`` in ``out_dtype``; it has no gradient (:func:`accel.fp8_linear` has). Where K is 0 it is the bias.
        The same input gives the same bits, whatever the number of threads.

    Raises:
        TypeError: an operand that is not float8, or scales that are neither float32 nor e8m0.
        ValueError: shapes that do not fit, scales that are negative or NaN (looked for on a CPU), or of blocks that no
            product pairs.
        NotImplementedError: something requires a gradient, or ``backend`` cannot run this call.
    """
    args = _prepare(a, a_scale, b, b_scale, bias=bias, out_dtype=out_dtype)
    if library.requires_gradient([a, bias]):
        raise NotImplementedError("fp8_gemm has no gradient: use fp8_linear, or call it under torch.no_grad()")
    return multiply(args, backend)


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    a = torch.zeros(3, 200, device=device).to(torch.float8_e4m3fn)
    b = torch.zeros(5, 200, device=device).to(torch.float8_e4m3fn)
    scales = [torch.ones(shape, device=device) for shape in ((3, 2), (1, 2))]
    return (a, scales[0], b, scales[1]), {"out_dtype": dtype}


OP = dispatch.register(
    dispatch.Op(
        name="fp8_gemm",
        function=fp8_gemm,
        prepare=_prepare,
        example=_example,
        backends=(
            dispatch.Backend("cpu", _why_not_cpu, _run_native, None, frozenset({"cpu"}), KERNEL_DTYPES),
            dispatch.Backend("triton", _why_not_triton, _triton.forward, None, frozenset({"cuda"}), KERNEL_DTYPES),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
        differentiable=False,
    )
)
