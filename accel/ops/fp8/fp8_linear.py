"""A linear layer whose products are of eight-bit numbers, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library
from accel.backends import KERNEL_DTYPES, inner_dtype
from accel.ops.fp8 import formats, fp8_gemm, fp8_quantize, linear_products, size_rule
from accel.ops.fp8.linear_products import Args, backward_args, reference
from accel.ops.fp8.recipe import BLOCKS, WEIGHT_BLOCKS, FP8Recipe

# --- backends: those that both the quantiser and the product have ---


def _why_not(name: str) -> Callable[[Args], str | None]:
    quantizer, product = fp8_quantize.OP.backend(name), fp8_gemm.OP.backend(name)

    def why_not(args: Args) -> str | None:
        """A backend judges by device, dtype and sizes: it is asked as if x and the weight had their codes."""
        x, numbers, plain = args.x, args.numbers, args.scaling == "weight_only"
        reason = None
        if not plain or not args.given:
            block = WEIGHT_BLOCKS[args.scaling]
            reason = quantizer.why_not(fp8_quantize.Args(x[None], *block, "e4m3", args.scale_format, False))
        rows, depth = (1, 128) if args.scaling in ("block", "weight_only") else (1, max(x.shape[1], 1))
        a_scale, a_format = (None, "") if plain else (x, "e4m3")
        out = fp8_gemm.OUT_NAMES[x.dtype]
        return reason or product.why_not(
            fp8_gemm.Args(x, numbers, a_scale, numbers, args.bias, a_format, args.format, rows, rows, depth, False, out)
        )

    return why_not


def _backend(name: str, devices: frozenset[str]) -> dispatch.Backend:
    def forward(*given: Any) -> tuple[Tensor, ...]:
        return linear_products.forward(Args(*given), name)

    def backward(grad: Tensor, codes_t: Tensor, scale_t: Tensor, *given: Any) -> tuple[Tensor, ...]:
        *fields, needs = given
        return linear_products.backward(grad, codes_t, scale_t, backward_args(grad, fields), needs, name)

    return dispatch.Backend(name, _why_not(name), forward, backward, devices, KERNEL_DTYPES)


def _shared() -> list[dispatch.Backend]:
    quantizers = {b.name for b in fp8_quantize.OP.backends} - {"reference"}
    return [_backend(b.name, b.devices) for b in fp8_gemm.OP.backends if b.name in quantizers]


# --- declaration ---


def _fake(args: Args) -> tuple[Tensor, ...]:
    M, N, K = args.sizes
    nothing = args.x.new_empty(0, dtype=torch.uint8)
    kept = (nothing, nothing.float())
    if args.keep:
        _, cols = BLOCKS[args.scaling]
        rows = 1 if args.scaling == "tensor" else K
        kept = (
            args.x.new_empty((K, M), dtype=torch.uint8),
            args.x.new_empty((rows, formats.count(M, cols or M)), dtype=torch.float32),
        )
    return args.x.new_empty((M, N)), *kept


def _backward_fake(args: Args, made: Sequence[bool]) -> tuple[Tensor, ...]:
    M, N, K = args.sizes
    x, nothing = args.x, args.x.new_empty(0, dtype=torch.float32)
    return (
        x.new_empty((M, K)) if made[0] else nothing,
        x.new_empty((N, K), dtype=fp8_gemm.OUT_DTYPES[args.weight_dtype]) if made[1] else nothing,
        x.new_empty(N, dtype=inner_dtype(x)) if made[2] else nothing,
    )


def _flops(args: Args) -> int:
    M, N, K = args.sizes
    return 2 * M * N * K


def _backward_flops(args: Args, made: Sequence[bool]) -> int:
    return _flops(args) * (int(made[0]) + int(made[1]))


# --- the public function ---


class Weight(NamedTuple):
    """A quantised weight: codes and scales as the product of the forward reads them, and where the gradient of x needs
    others, those."""

    w: Tensor
    scale: Tensor
    turned: Tensor | None
    turned_scale: Tensor | None


def scaling_of(
    shape: tuple[int, int], scale: Tensor, recipe: FP8Recipe | None, scale_name: str = "weight_scale"
) -> str:
    """What the recipe calls the scaling of a weight whose scales are these."""
    N, K = shape
    shapes = {"block": (formats.count(N, 128), formats.count(K, 128)), "row": (N, 1), "tensor": (1, 1)}
    fitting = [name for name, wanted in shapes.items() if tuple(scale.shape) == wanted]
    wanted = "block" if recipe is None else recipe.scaling
    if not fitting:
        raise ValueError(
            f"{scale_name} must be {shapes['block']}, blocks of 128 x 128, {shapes['row']}, rows, or (1, 1) beside "
            f"weight ({N}, {K}), got {tuple(scale.shape)}"
        )
    if wanted in fitting or wanted == "weight_only":
        return wanted
    if recipe is not None:
        raise ValueError(
            f"the recipe has scaling={wanted!r}, and {scale_name} {tuple(scale.shape)} beside weight ({N}, {K}) is "
            f"for {fitting[0]!r}"
        )
    return fitting[0]


def _read_given(weight: Tensor, weight_scale: Any, recipe: FP8Recipe | None) -> tuple[Tensor, Tensor, str]:
    """Codes, scales and scaling of a weight that is stored in eight bits."""
    if weight_scale is None:
        raise ValueError(f"weight is {weight.dtype} and has no weight_scale (weight_scale_inv of a checkpoint)")
    scale = fp8_quantize.read_scale(weight_scale, "weight_scale")
    if scale.device != weight.device:
        raise ValueError(f"weight_scale is on {scale.device} but weight is on {weight.device}")
    scale = scale.detach()
    scale = (scale.view(1, 1) if scale.numel() == 1 else scale).contiguous()
    scaling = scaling_of((weight.shape[0], weight.shape[1]), scale, recipe)
    fp8_gemm.check_scale(scale, "weight_scale")
    return weight.detach().view(torch.uint8).contiguous(), scale, scaling


def _check(x: Any, weight: Any, bias: Any, weight_scale: Any, recipe: Any) -> None:
    if recipe is not None and not isinstance(recipe, FP8Recipe):
        raise TypeError(f"recipe must be an accel.FP8Recipe or None, got {type(recipe).__name__}")
    for name, t in (("x", x), ("weight", weight)):
        backends.check_floating(t, name)
    if x.dtype not in fp8_gemm.OUT_NAMES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if weight.dtype not in fp8_gemm.OUT_NAMES and weight.dtype not in formats.NAMES:
        raise TypeError(f"weight must be floating, or float8 (e4m3 or e5m2), got {weight.dtype}")
    backends.check_beside(weight, "weight", x, "x")
    if weight.dtype not in formats.NAMES and weight_scale is not None:
        raise TypeError(f"weight_scale belongs to a float8 weight, and weight is {weight.dtype}")
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x (..., K) and weight (N, K) do not fit: {tuple(x.shape)=}, {tuple(weight.shape)=}")
    if bias is not None:
        backends.check_beside(bias, "bias", x, "x")
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias must be (N,) = ({weight.shape[0]},), got {tuple(bias.shape)}")


def _prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
    recipe: FP8Recipe | None = None,
) -> Args:
    """Check a public call and bring it to the form the backends take; the weight is quantised once one is chosen."""
    _check(x, weight, bias, weight_scale, recipe)
    x = library.autocast(x)
    how = FP8Recipe() if recipe is None else recipe
    given = weight.dtype in formats.NAMES
    w, scale, scaling = _read_given(weight, weight_scale, recipe) if given else (None, None, how.scaling)
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    learns = not given and library.requires_gradient([weight])
    return Args(
        x=x.contiguous().view(rows, x.shape[-1]),
        weight=None if given else weight,
        bias=None if bias is None else bias.to(inner_dtype(x)).contiguous(),
        w=w,
        scale=scale,
        turned=None,
        turned_scale=None,
        kept=None,
        scaling=scaling,
        scale_format="fp32" if how.scale_format == "fp32" else "pow2",
        format=formats.NAMES.get(weight.dtype, "e4m3"),
        grad_format=formats.NAMES[how.grad_dtype],
        keep=learns and how.save == "fp8" and scaling != "weight_only",
        weight_dtype="float32" if given else fp8_gemm.OUT_NAMES[weight.dtype],
        size_rule=how.size_rule,
        given=given,
    )


_run = library.differentiable(
    "fp8_linear",
    Args,
    reference,
    gradients=3,
    fake=_fake,
    flops=_flops,
    backward_flops=_backward_flops,
    backward_fake=_backward_fake,
    outputs=["out", "codes_t", "scale_t"],
    keep_outputs=["codes_t", "scale_t"],
    sizes_only=["x", "weight"],
)


def _quantize_weight(args: Args, turned: bool, backend: str) -> Weight:
    """``turned``: with codes of their own for the gradient of x, where scaling asks for them."""
    assert args.weight is not None
    turned = turned and args.scaling == "row"
    numbers = args.weight.detach().contiguous()
    if numbers.dtype == torch.float64 and backend != "reference":
        numbers = numbers.float()  # as every number is
    block = WEIGHT_BLOCKS[args.scaling]
    asked = fp8_quantize.Args(numbers[None], *block, args.format, args.scale_format, turned)
    codes, scale, codes_t, scale_t = fp8_quantize.quantize(asked, backend)
    return Weight(codes[0], scale[0], codes_t[0] if turned else None, scale_t[0] if turned else None)


Remember = Callable[[Tensor, Any, Callable[[], Weight]], Weight]
"""``remember(weight, key, make)``: the weight as ``make()`` quantises it, perhaps from an earlier call."""


def call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    recipe: FP8Recipe | None,
    backend: str | None = None,
    remember: Remember | None = None,
) -> Tensor:
    """:func:`fp8_linear`, perhaps with a weight that was quantised earlier."""
    args = _prepare(x, weight, bias, weight_scale=weight_scale, recipe=recipe)
    chosen = dispatch.select(OP, args, backend)
    if chosen.name == "torch":
        w = args.w if args.given else size_rule.plain_weight(args)
        args = args._replace(w=w, keep=False)
    elif not args.given:
        turned = remember is not None or library.requires_gradient([args.x])
        make = functools.partial(_quantize_weight, args, turned, chosen.name)
        key = (args.scaling, args.scale_format, chosen.name)
        args = args._replace(**(make() if remember is None else remember(weight, key, make))._asdict())
    if not args.given and not args.keep and library.requires_gradient([weight]):
        args = args._replace(kept=args.x.detach())
    out: Tensor = _run(args, chosen)[0]
    return out.view(*x.shape[:-1], weight.shape[0])


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
    recipe: FP8Recipe | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""A linear layer, :math:`y = x W^T + b`, whose three products are of eight-bit numbers: that of the output, that
    of the gradient of x, and that of the gradient of the weight.

    With :math:`Q` for what is left of numbers once they were quantised (:func:`accel.fp8_quantize`) along the axis that
    a product sums, and g for the gradient of y:

    .. math:: y = Q(x) Q(W)^T + b, \qquad \frac{dL}{dx} = Q(g) Q(W), \qquad \frac{dL}{dW} = Q(g^T) Q(x^T)^T

    Gradients pass the roundings by: they are those of a plain linear layer, from quantised numbers. Blocks of 128 x 128
    serve both products with the weight, which is quantised once; that of scales by rows is quantised anew for the
    gradient of x. Products are summed in float32, and so is the gradient of the bias.

    Args:
        x: ``(..., K)``; float32, bfloat16, float16, and float64 on the reference. Autocast casts it as it would the
            operand of a matrix product.
        weight: ``(N, K)``, any of these dtypes, not necessarily that of x: quantised from its own values, under
            autocast too. Or float8 (e4m3 or e5m2), as checkpoints store it, beside ``weight_scale``, without gradient.
        bias: ``(N,)``, any floating dtype, added in float32, or None.
        weight_scale: scales of a float8 weight, by which its numbers are multiplied (``weight_scale_inv`` of a
            DeepSeek checkpoint): ``(ceil(N / 128), ceil(K / 128))`` for blocks, ``(N, 1)`` for rows, ``(1, 1)`` or one
            number for all; float32 or float8_e8m0fnu (or its bytes as uint8).
        recipe: how to quantise, an :class:`accel.FP8Recipe`; if None that of DeepSeek-V3, or with ``weight_scale`` the
            one that its shape names.
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(..., N)`` in the dtype of x (under autocast in its dtype). The bias where K is 0.

    Gradients exist for x, weight and bias, each in its tensor's dtype; that of a float32 weight is not rounded to the
    dtype of x. For the gradient of the weight a byte an element of x is kept, or x itself, as ``recipe.save`` says, and
    nothing where the weight needs none; the quantised weight is kept for that of x. The same input gives the same bits,
    whatever is kept. With ``recipe.size_rule`` a call whose products are faster in plain numbers is computed in those,
    with plain gradients: the backend ``torch``, of which :func:`accel.explain` says why it runs or not.
    Second and forward-mode derivatives do not exist: rounding has none.

    Raises:
        TypeError: x is not floating or of eight bits, a weight that is neither, scales of another dtype or beside a
            weight that is not float8, or a recipe that is none.
        ValueError: shapes or devices that do not fit, a float8 weight without scales, scales that are negative or NaN
            (looked for on a CPU), or of other blocks than the recipe's.
        NotImplementedError: ``backend`` cannot run this call, or a derivative that does not exist is asked for; the
            message says which.

    Follows DeepSeek-AI, DeepSeek-V3 (2024), §3.3.
    """
    return call(x, weight, bias, weight_scale, recipe, backend)


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = torch.zeros(3, 200, device=device, dtype=dtype)
    return (x, torch.full((5, 200), 0.25, device=device, dtype=dtype)), {}


_TORCH = (size_rule.why_not, size_rule.forward, size_rule.backward)

OP = dispatch.register(
    dispatch.Op(
        name="fp8_linear",
        function=fp8_linear,
        prepare=_prepare,
        example=_example,
        backends=(
            dispatch.Backend("torch", *_TORCH, frozenset({"cpu"}), (torch.bfloat16,), extra=True),
            *_shared(),
            dispatch.Backend("reference", lambda args: None, reference, _backend("reference", frozenset()).backward),
        ),
        straight_through=True,
    )
)
