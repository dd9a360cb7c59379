"""The products of a linear layer in eight bits, forward and backward, by the quantiser and the product of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import dispatch, library, transforms
from accel.backends import inner_dtype
from accel.ops.fp8 import formats, fp8_gemm, fp8_quantize
from accel.ops.fp8.recipe import BLOCKS


class Args(NamedTuple):
    """The checked arguments every backend receives."""

    x: Tensor  # (M, K) contiguous; the backward receives its size
    weight: Tensor | None  # (N, K) floating, which gets the gradient; None where it came in eight bits. Read as w
    bias: Tensor | None  # (N,) contiguous fp32 (fp64 beside fp64)
    w: Tensor | None  # (N, K) contiguous uint8; without scale in the dtype of x; None until a backend is chosen
    scale: Tensor | None  # contiguous fp32, a matrix of those of w
    turned: Tensor | None  # (K, N) contiguous uint8, the weight for the gradient of x, where that is not w turned
    turned_scale: Tensor | None
    kept: Tensor | None  # x itself, where the backward is to read it
    scaling: str  # one of recipe.SCALINGS
    scale_format: str  # "fp32" or "pow2"
    format: str  # of w
    grad_format: str
    keep: bool  # whether the backward will want xᵀ in eight bits
    weight_dtype: str  # of the gradient, a name in fp8_gemm.OUT_DTYPES
    size_rule: bool
    given: bool  # whether the weight came in eight bits

    @property
    def numbers(self) -> Tensor:
        """The weight as it came, or, in a backward, as the products read it."""
        found = self.w if self.weight is None else self.weight
        assert found is not None
        return found

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        N, K = self.numbers.shape
        return self.x.shape[0], N, K


def backward_args(grad: Tensor, fields: Sequence[Any]) -> Args:
    """Those of a backward, which reads neither x nor the weight, and gets their sizes behind the other tensors."""
    return Args(grad, None, *fields[:6], *fields[8:])


class Codes(NamedTuple):
    """A matrix of numbers of eight bits, along the rows of which a product sums."""

    codes: Tensor  # contiguous; turned, with rows and columns exchanged
    scale: Tensor | None  # None where the codes are plain numbers
    format: str
    turned: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.codes.shape[::-1] if self.turned else self.codes.shape
        return rows, cols


# --- the two ops that everything is made of, as plain calls ---


def _leaf(op: dispatch.Op, backend: str, empty: bool) -> Callable[..., Any]:
    return op.backend("reference" if empty else backend).forward


def quantize(
    x: Tensor, block: tuple[int, int], name: str, scale_format: str, transpose: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of a matrix, and of it transposed or nothing."""
    call = _leaf(fp8_quantize.OP, backend, x.numel() == 0)
    codes, scale, codes_t, scale_t = call(x[None], *block, name, scale_format, transpose)
    return codes[0], scale[0], *((codes_t[0], scale_t[0]) if transpose else (codes_t, scale_t))


def gemm_args(a: Codes, b: Codes, bias: Tensor | None, dtype: torch.dtype) -> fp8_gemm.Args:
    """Those of the product a·bᵀ."""
    assert b.scale is not None
    b_rows, depth = formats.resolve_block(b.shape, (b.scale.shape[0], b.scale.shape[1]), "w")
    a_rows = 1
    if a.scale is not None:
        a_rows, a_depth = formats.resolve_block(a.shape, (a.scale.shape[0], a.scale.shape[1]), "x")
        assert a_depth == depth, f"{a_depth=}, {depth=}"
    return fp8_gemm.Args(
        a.codes, b.codes, a.scale, b.scale, bias, a.format, b.format, a_rows, b_rows, depth, b.turned,
        fp8_gemm.OUT_NAMES[dtype],
    )  # fmt: skip


def multiply(a: Codes, b: Codes, bias: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    empty = a.codes.numel() == 0 or b.codes.numel() == 0
    made: Tensor = _leaf(fp8_gemm.OP, backend, empty)(*gemm_args(a, b, bias, dtype))
    return made


# --- forward ---


def forward(args: Args, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and codes and scales of xᵀ or nothing."""
    assert args.w is not None
    x, dtype, nothing = args.x, args.x.dtype, args.x.new_empty(0, dtype=torch.uint8)
    codes_t, scale_t = nothing, nothing.float()
    a = Codes(x, None, "")
    if args.scaling != "weight_only":
        made = quantize(x, BLOCKS[args.scaling], "e4m3", args.scale_format, args.keep, backend)
        a = Codes(made[0], made[1], "e4m3")
        codes_t, scale_t = made[2:] if args.keep else (codes_t, scale_t)
    return multiply(a, Codes(args.w, args.scale, args.format), args.bias, dtype, backend), codes_t, scale_t


# --- backward ---


def backward(
    grad: Tensor, codes_t: Tensor, scale_t: Tensor, args: Args, needs: list[bool], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, empty where they are not needed. What the forward kept of xᵀ it made with
    ``args.keep``, and x is ``args.kept`` without."""
    nothing = grad.new_empty(0, dtype=torch.float32)
    made = [nothing, nothing, nothing]
    if needs[2]:
        made[2] = grad.sum(0, dtype=inner_dtype(grad))
    if args.scaling == "weight_only":
        if needs[0]:
            made[0] = _through_weight_only(grad, args, backend)
        if needs[1]:
            made[1] = _plain_gradient(grad, args)
        return made[0], made[1], made[2]
    g, g_t = _grads(grad, args, needs, backend)
    if g is not None:
        made[0] = multiply(g, _turned_weight(args, backend), None, grad.dtype, backend)
    if g_t is not None:
        if not args.keep:
            assert args.kept is not None
            codes_t, scale_t = _columns(args.kept, args, "e4m3", backend)
        dtype = fp8_gemm.OUT_DTYPES[args.weight_dtype]
        made[1] = multiply(g_t, Codes(codes_t, scale_t, "e4m3"), None, dtype, backend)
    return made[0], made[1], made[2]


def _summed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _columns(x: Tensor, args: Args, name: str, backend: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of xᵀ alone."""
    made = quantize(x.t().contiguous(), BLOCKS[args.scaling], name, args.scale_format, False, backend)
    return made[0], made[1]


def _grads(grad: Tensor, args: Args, needs: list[bool], backend: str) -> tuple[Codes | None, Codes | None]:
    """The gradient of the output for that of x, and transposed for that of the weight: both in one pass."""
    name = args.grad_format
    if not needs[0]:
        return None, Codes(*_columns(grad, args, name, backend), name) if needs[1] else None
    made = quantize(grad, BLOCKS[args.scaling], name, args.scale_format, needs[1], backend)
    return Codes(made[0], made[1], name), Codes(made[2], made[3], name) if needs[1] else None


def _turned_weight(args: Args, backend: str) -> Codes:
    """The weight for the gradient of x. Blocks are those of the turned matrix, too; rows are not."""
    assert args.w is not None
    assert args.scale is not None
    if args.turned is not None:
        return Codes(args.turned, args.turned_scale, args.format)
    if args.scaling != "row":
        return Codes(args.w, args.scale.t().contiguous(), args.format, turned=True)
    codes, scale = _columns(dequantize(args.w, args.scale, args.format, torch.float32), args, args.format, backend)
    return Codes(codes, scale, args.format)


def dequantize(w: Tensor, scale: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """The numbers of a weight in eight bits."""
    shape = (w.shape[0], w.shape[1])
    block = formats.resolve_block(shape, (scale.shape[0], scale.shape[1]), "w")
    return (formats.decode(w, name) * formats.spread_scales(scale, shape, *block)).to(dtype)


def _through_weight_only(grad: Tensor, args: Args, backend: str) -> Tensor:
    """The gradient of x, of plain numbers."""
    assert args.w is not None
    assert args.scale is not None
    if args.scale.shape[0] == args.w.shape[0] > 1:  # scales of rows would have to be taken into each product
        w = dequantize(args.w, args.scale, args.format, inner_dtype(grad))
        with library.without_autocast(grad):
            return (grad.to(w.dtype) @ w).to(grad.dtype)
    return multiply(Codes(grad, None, ""), _turned_weight(args, backend), None, grad.dtype, backend)


def _plain_gradient(grad: Tensor, args: Args) -> Tensor:
    """That of the weight by torch's own product, unrounded for fp32."""
    assert args.kept is not None
    dtype = fp8_gemm.OUT_DTYPES[args.weight_dtype]
    between = grad.dtype if grad.dtype == dtype else torch.promote_types(_summed_in(dtype), grad.dtype)
    with library.without_autocast(grad):
        return (grad.to(between).t() @ args.kept.to(between)).to(dtype)


# --- the definition: its gradient passes the roundings by ---


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*given: Any) -> Tensor:
        return forward(Args(*given)._replace(keep=False), "reference")[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        args = Args(*inputs)
        ctx.save_for_backward(args.x, *args[3:7])
        ctx.rest = inputs[8:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needs = list(ctx.needs_input_grad[:3])

        def gradients(grad: Tensor, x: Tensor, *weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            args = Args(*(x, None, None, *weight, x, *ctx.rest))._replace(keep=False)
            nothing = x.new_empty(0)
            return backward(grad, nothing, nothing, args, needs, "reference")

        found = library.once_differentiable("fp8_linear", gradients, grad.contiguous(), *ctx.saved_tensors)
        made = [g if wanted else None for g, wanted in zip(found, needs, strict=True)]
        return *made, *([None] * (len(ctx.needs_input_grad) - 3))


def reference(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain torch: products in float64 of what the codes stand for."""
    args = Args(*given)
    # a tensor inside vmap does not say whether somebody around it wants a gradient
    if transforms.batched_derivative() or library.requires_gradient(given[:3]):
        out: Tensor = _StraightThrough.apply(*given)
    else:  # torch.compile cannot trace autograd where nothing requires a gradient
        out = forward(args._replace(keep=False), "reference")[0]
    return out, args.x.new_empty(0, dtype=torch.uint8), args.x.new_empty(0, dtype=torch.float32)
