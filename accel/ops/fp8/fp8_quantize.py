"""Quantisation to eight bits by blocks, each with its scale, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library
from accel.backends import KERNEL_DTYPES, check_floating, integer
from accel.ops.fp8 import formats


class Args(NamedTuple):
    """The checked arguments every backend receives."""

    x: Tensor  # (B, R, C) contiguous
    rows: int  # of a block, 0 for all
    cols: int  # 0 for all
    format: str  # one of formats.FORMATS
    scale_format: str  # one of formats.SCALE_FORMATS
    transpose: bool  # whether xᵀ is quantised too, in blocks of the same form

    def block(self, turned: bool = False) -> tuple[int, int]:
        """Rows and columns of a block of x, or of xᵀ."""
        _, R, C = self.x.shape
        R, C = (C, R) if turned else (R, C)
        return self.rows or max(R, 1), self.cols or max(C, 1)

    def scale_shape(self, turned: bool = False) -> tuple[int, int, int]:
        """Of the scales of x, or of those of xᵀ."""
        B, R, C = self.x.shape
        rows, cols = self.block(turned)
        R, C = (C, R) if turned else (R, C)
        return B, formats.count(R, rows), formats.count(C, cols)


# --- the definition ---


def reference(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op in plain torch: codes and scales of x, and of xᵀ or nothing."""
    args = Args(*given)
    codes, scale = _quantize(args.x, args, False)
    if not args.transpose:
        return codes, scale, codes.new_empty(0), scale.new_empty(0)
    return codes, scale, *_quantize(args.x.mT, args, True)


def _quantize(x: Tensor, args: Args, turned: bool) -> tuple[Tensor, Tensor]:
    codes, scale = formats.quantize(x, *args.block(turned), args.format, args.scale_format)
    return codes.contiguous(), formats.to_e8m0(scale) if args.scale_format == "e8m0" else scale


# --- backends, fastest first for each device ---


_triton = backends.triton(__name__)


def _run_native(*args: Any) -> Any:
    return torch.ops.accel_native.fp8_quantize.default(*args)


# --- declaration ---


def _fake(args: Args) -> tuple[Tensor, ...]:
    B, R, C = args.x.shape
    kind = torch.uint8 if args.scale_format == "e8m0" else torch.float32
    nothing = not args.transpose
    return (
        args.x.new_empty((B, R, C), dtype=torch.uint8),
        args.x.new_empty(args.scale_shape(), dtype=kind),
        args.x.new_empty((0,) if nothing else (B, C, R), dtype=torch.uint8),
        args.x.new_empty((0,) if nothing else args.scale_shape(turned=True), dtype=kind),
    )


_op = library.register(
    "fp8_quantize",
    "(Tensor x, SymInt rows, SymInt cols, str format, str scale_format, bool transpose, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda *given: dispatch.OPS["fp8_quantize"].backend(given[-1]).forward(*given[:-1]),
    lambda *given: _fake(Args(*given[:-1])),
    lambda *given: 2 * given[0].numel(),
)


def quantize(args: Args, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of x and of xᵀ, as uint8 and fp32 (or the bytes of e8m0)."""
    chosen = dispatch.select(OP, args, backend)
    if chosen.name == "reference" or args.x.numel() == 0:
        return reference(*args)
    return _op(*args, chosen.name)  # type: ignore[no-any-return]


# --- the public functions ---


def read_block(block: Any) -> tuple[int, int]:
    """``block`` as two integers, 0 for all."""
    sizes = (None, None) if block is None else tuple(block) if isinstance(block, tuple | list) else (block,)
    if len(sizes) != 2:
        raise ValueError(f"block must be (rows, columns) or None, got {block=}")
    found = [0 if size is None else integer(size) for size in sizes]
    if any(size is not None and n < 1 for size, n in zip(sizes, found, strict=True)):
        raise ValueError(f"a block has at least one row and one column, got {block=}")
    return found[0], found[1]


def _prepare(
    x: Tensor,
    *,
    block: tuple[int | None, int | None] | None = (1, 128),
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: str = "fp32",
    transpose: bool = False,
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    check_floating(x, "x")
    if x.dtype in formats.NAMES:
        raise TypeError(f"x is {x.dtype} already: fp8_dequantize takes it back first")
    if x.dim() < 2:
        raise ValueError(f"x must be (..., R, C), got {tuple(x.shape)=}")
    if dtype not in formats.NAMES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, formats.NAMES))}, got {dtype=}")
    if scale_format not in formats.SCALE_FORMATS:
        raise ValueError(f"scale_format must be one of {', '.join(formats.SCALE_FORMATS)}, got {scale_format!r:.80}")
    rows, cols = read_block(block)
    x = x.detach().contiguous()
    # the number of matrices as a product, where reshape would have to divide by sizes that may be 0
    batch = 1
    for size in x.shape[:-2]:
        batch = batch * size
    return Args(x.view(batch, *x.shape[-2:]), rows, cols, formats.NAMES[dtype], scale_format, bool(transpose))


def fp8_quantize(
    x: Tensor,
    *,
    block: tuple[int | None, int | None] | None = (1, 128),
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: str = "fp32",
    transpose: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    r"""Numbers of eight bits, and the scale of each block of them: ``x`` is about ``q · scale``.

    Blocks are of the last two axes, short at the edges. With a the largest finite :math:`|x|` of a block and m the
    largest number of ``dtype`` (448 of e4m3, 57344 of e5m2), everything in float32 whatever the dtype of ``x``:

    .. math:: s = a / m, \qquad q = \operatorname{round}(x \cdot (m / a))

    rounded to nearest, ties to even, and both quotients rounded correctly. With ``"pow2"`` and ``"e8m0"`` s is the
    least power of two with :math:`a \le m s`, and q is :math:`\operatorname{round}(x / s)`. A block whose a is below
    2⁻¹¹⁷ (2⁻¹¹⁰ of e5m2), where s would not be a normal number, counts as one of zeros: s is 1. NaN stays NaN; an
    infinity becomes NaN in e4m3, which has none, and stays in e5m2. The finite rest of its block is unharmed. All
    backends give the same bits.

    Args:
        x: ``(..., R, C)``; float32, bfloat16 or float16, and float64, which is rounded to float32 first.
        block: rows and columns of a block; None for all, as in ``(1, None)``, a scale for each row, or for both, one
            for each matrix. The recipe of DeepSeek-V3 takes (1, 128) for activations and gradients and (128, 128) for
            weights, MXFP8 (1, 32) with ``"e8m0"``.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        scale_format: ``"fp32"``; ``"pow2"``, powers of two in float32; ``"e8m0"``, their exponents alone, as
            ``torch.float8_e8m0fnu``.
        transpose: give xᵀ too, quantised from x itself in blocks of the same form, in the same pass.
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(q, scale)``: ``(..., R, C)`` in ``dtype`` and ``(..., ceil(R / rows), ceil(C / columns))``; with
        ``transpose`` ``(q, scale, q_t, scale_t)``, of ``(..., C, R)`` as well. None has a gradient.

    Raises:
        TypeError: ``x`` is not floating, or is of eight bits already.
        ValueError: a block, dtype or name that is none.
        NotImplementedError: ``backend`` cannot run this call; the message says why.

    Follows DeepSeek-AI, DeepSeek-V3 (2024), §3.3, and the OCP Microscaling specification (2023).
    """
    args = _prepare(x, block=block, dtype=dtype, scale_format=scale_format, transpose=transpose)
    made = quantize(args, backend)
    batch = x.shape[:-2]
    q, scale, q_t, scale_t = [t.view(*batch, *t.shape[1:]) if t.dim() == 3 else t for t in made]
    if scale_format == "e8m0":
        scale, scale_t = scale.view(formats.E8M0), scale_t.view(formats.E8M0)
    return (q.view(dtype), scale, q_t.view(dtype), scale_t) if transpose else (q.view(dtype), scale)


def fp8_dequantize(
    q: Tensor,
    scale: Tensor,
    *,
    block: tuple[int | None, int | None] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The numbers ``q · scale`` of :func:`accel.fp8_quantize`, computed in float32 and rounded to ``dtype``.

    Args:
        q: ``(..., R, C)``, float8 (e4m3 or e5m2).
        scale: ``(..., r, c)``, float32 or float8_e8m0fnu (or its bytes as uint8).
        block: rows and columns of a block, as it was quantised; where it is None it follows from the shape of
            ``scale``: 1, 128 or all rows, and 1, 32, 128 or all columns.
        dtype: of the result, float32 if None.

    Returns:
        ``(..., R, C)`` in ``dtype``.

    Raises:
        TypeError: ``q`` is not float8, or ``scale`` neither float32 nor e8m0.
        ValueError: scales that belong to no such blocks.
    """
    if not isinstance(q, Tensor) or q.dtype not in formats.NAMES:
        raise TypeError(f"q must be float8 (e4m3 or e5m2), got {getattr(q, 'dtype', type(q).__name__)}")
    numbers = read_scale(scale, "scale")
    if q.dim() < 2 or numbers.dim() != q.dim() or numbers.shape[:-2] != q.shape[:-2]:
        raise ValueError(f"q (..., R, C) and its scales do not fit: {tuple(q.shape)=}, {tuple(scale.shape)=}")
    shape = (q.shape[-2], q.shape[-1])
    found = (numbers.shape[-2], numbers.shape[-1])
    if block is None:
        rows, cols = formats.resolve_block(shape, found, "scale")
    else:
        rows, cols = [size or max(whole, 1) for size, whole in zip(read_block(block), shape, strict=True)]
        wanted = (formats.count(shape[0], rows), formats.count(shape[1], cols))
        if found != wanted:
            raise ValueError(f"blocks of {block} in {shape} have {wanted} scales, got {tuple(scale.shape)=}")
    return (q.float() * formats.spread_scales(numbers, shape, rows, cols)).to(dtype or torch.float32)


def read_scale(scale: Any, name: str) -> Tensor:
    """Scales in fp32, which holds every one of e8m0."""
    kind = getattr(scale, "dtype", None)
    if kind in (formats.E8M0, torch.uint8):
        return formats.from_e8m0(scale)
    if kind != torch.float32:
        raise TypeError(f"{name} must be float32, or float8_e8m0fnu, got {kind or type(scale).__name__}")
    numbers: Tensor = scale
    return numbers


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.zeros(3, 200, device=device, dtype=dtype),), {"transpose": True}


OP = dispatch.register(
    dispatch.Op(
        name="fp8_quantize",
        function=fp8_quantize,
        prepare=_prepare,
        example=_example,
        backends=(
            dispatch.Backend("cpu", backends.why_not_cpu, _run_native, None, frozenset({"cpu"}), KERNEL_DTYPES),
            dispatch.Backend("triton", _triton.why_not, _triton.forward, None, frozenset({"cuda"}), KERNEL_DTYPES),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
        differentiable=False,
    )
)
