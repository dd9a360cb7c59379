"""The experts of a mixture: both products of each token's experts with the activation between, and the weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library
from accel.backends import KERNEL_DTYPES, inner_dtype
from accel.ops.moe import grouped_torch
from accel.ops.moe.activations import ExpertActivation, activate, check_activation
from accel.ops.moe.groups import add_up_choices, check_integers, grouped_product, sort_choices
from accel.ops.moe.lora import check_lora, experts_with_lora


class Args(NamedTuple):
    """The checked arguments every backend receives. J is 2·I with a gate and I without."""

    x: Tensor  # (T, C) contiguous
    weights: Tensor  # (T, K) contiguous fp32 (fp64 beside fp64)
    gate_up_proj: Tensor  # (X, J, C) contiguous, (X, C, J) where transposed
    down_proj: Tensor  # (X, C, I) contiguous, (X, I, C) where transposed
    gate_up_bias: Tensor | None  # (X, J) contiguous fp32 (fp64 beside fp64)
    down_bias: Tensor | None  # (X, C) the same
    indices: Tensor  # (T, K) contiguous int64
    function: str  # one of activations.FUNCTIONS
    alpha: float
    limit: float  # infinite if there is none
    shift: float
    gated: bool
    interleaved: bool  # gate and up in turn, where gated
    transposed: bool
    keep: bool  # whether a backward will want the first product

    @property
    def activation(self) -> ExpertActivation:
        return ExpertActivation(self.function, self.alpha, None if self.limit == math.inf else self.limit, self.shift)

    @property
    def inner(self) -> int:
        return self.down_proj.shape[1 if self.transposed else 2]

    @property
    def hidden(self) -> int:
        return self.gate_up_proj.shape[2 if self.transposed else 1]


# --- the definition ---


def reference(*given: Any) -> tuple[Tensor, Tensor]:
    """The op in plain torch, fp32 or fp64 inside, expert by expert; the second output stays empty."""
    args = Args(*given)
    inner, experts = inner_dtype(args.x), args.gate_up_proj.shape[0]
    first, second = [
        (w if args.transposed else w.transpose(1, 2)).to(inner) for w in (args.gate_up_proj, args.down_proj)
    ]
    order, offsets, here = sort_choices(args.indices, experts)
    rows = args.x.to(inner)[order // max(args.indices.shape[1], 1)]
    hidden = grouped_product(rows, first, args.gate_up_bias, offsets)
    active = activate(hidden, args.activation, args.gated, args.interleaved)
    made = grouped_product(active, second, args.down_bias, offsets)
    out = add_up_choices(made, args.weights, order, here)
    return out.to(args.x.dtype), args.x.new_empty(0)


# --- backends, fastest first for each device ---


def _torch_forward(*given: Any) -> tuple[Tensor, Tensor]:
    return grouped_torch.experts_forward(Args(*given))


def _torch_backward(grad: Tensor, hidden: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *fields, needs = given
    return grouped_torch.experts_backward(grad, hidden, Args(*fields), needs)


_native = backends.native("moe_experts")
_triton = backends.triton(__name__)
_torch = (grouped_torch.why_not_experts, _torch_forward, _torch_backward)


# --- declaration ---


def _fake(args: Args) -> tuple[Tensor, Tensor]:
    kept = (args.indices.numel(), args.hidden) if args.keep else (0,)
    return args.x.new_empty(args.x.shape), args.x.new_empty(kept)


def _products(args: Args) -> tuple[int, int]:
    """Of both layers, as if every choice were an expert that is here."""
    rows, channels = args.indices.numel(), args.x.shape[1]
    return 2 * rows * channels * args.hidden, 2 * rows * channels * args.inner


def _flops(args: Args) -> int:
    return sum(_products(args))


def _backward_flops(args: Args, made: Sequence[bool]) -> int:
    first, second = _products(args)
    x, weights, gate_up, down, gate_up_bias, _ = made
    through = x or weights or gate_up or gate_up_bias  # the gradient behind the activation
    return first * (int(x) + int(gate_up)) + second * (int(through) + int(down))


# --- the public function ---


def _check_projections(x: Tensor, gate_up: Tensor, down: Tensor, gated: bool, transposed: bool) -> tuple[int, int, int]:
    """X, J and I, of projections that fit."""
    names = ("gate_up_proj", "down_proj")
    for name, w in zip(names, (gate_up, down), strict=True):
        if w.dtype != x.dtype:
            raise TypeError(f"x, gate_up_proj and down_proj must have one dtype, got {x.dtype} and {name} {w.dtype}")
        if w.dim() != 3:
            raise ValueError(f"{name} must have three axes, got {tuple(w.shape)}")
    experts, hidden, channels = gate_up.shape if not transposed else [gate_up.shape[i] for i in (0, 2, 1)]
    into, inner = down.shape[1:] if not transposed else [down.shape[i] for i in (2, 1)]
    each = 2 if gated else 1
    if down.shape[0] != experts or channels != x.shape[1] or into != x.shape[1] or hidden != each * inner:
        j = "2I" if gated else "I"
        form = f"(X, C, {j}) and (X, I, C)" if transposed else f"(X, {j}, C) and (X, C, I)"
        raise ValueError(
            f"gate_up_proj and down_proj must be {form} beside x (T, C), with {gated=}: got {tuple(gate_up.shape)} "
            f"and {tuple(down.shape)} beside {tuple(x.shape)}"
        )
    return experts, hidden, inner


def _check_bias(bias: Tensor | None, name: str, shape: tuple[int, int], x: Tensor) -> Tensor | None:
    if bias is None:
        return None
    backends.check_beside(bias, name, x, "x")
    if tuple(bias.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(bias.shape)}")
    return bias.to(inner_dtype(x)).contiguous()


def _prepare(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    activation: str | ExpertActivation = "silu",
    gated: bool = True,
    layout: str = "concatenated",
    transposed: bool = False,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    backends.check_floating(x, "x")
    for name, w in (("weights", weights), ("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        backends.check_beside(w, name, x, "x")
    x, gate_up_proj, down_proj = library.autocast(x), library.autocast(gate_up_proj), library.autocast(down_proj)
    if x.dim() != 2:
        raise ValueError(f"x must be (T, C), got {tuple(x.shape)=}")
    if layout not in ("concatenated", "interleaved"):
        raise ValueError(f"layout must be 'concatenated' or 'interleaved', got {layout!r}")
    found = check_activation(activation, gated)
    experts, hidden, _ = _check_projections(x, gate_up_proj, down_proj, gated, transposed)
    check_integers(indices, "indices", "the experts of each token", x, "x")
    if indices.dim() != 2 or indices.shape[0] != x.shape[0] or indices.shape != weights.shape:
        raise ValueError(
            f"indices and weights must be (T, K) with T = {x.shape[0]}, got {tuple(indices.shape)=}, "
            f"{tuple(weights.shape)=}"
        )
    gate_up_bias = _check_bias(gate_up_bias, "gate_up_bias", (experts, hidden), x)
    down_bias = _check_bias(down_bias, "down_bias", (experts, x.shape[1]), x)
    main = (x, weights, gate_up_proj, down_proj, gate_up_bias, down_bias)
    return Args(
        x=x.contiguous(),
        weights=weights.to(inner_dtype(x)).contiguous(),
        gate_up_proj=gate_up_proj.contiguous(),
        down_proj=down_proj.contiguous(),
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        indices=indices.to(torch.int64).contiguous(),
        function=found.function,
        alpha=float(found.alpha),
        limit=math.inf if found.limit is None else float(found.limit),
        shift=float(found.shift),
        gated=bool(gated),
        interleaved=bool(gated) and layout == "interleaved",
        transposed=bool(transposed),
        keep=library.requires_gradient(main),
    )


_run = library.differentiable(
    "moe_experts",
    Args,
    reference,
    gradients=6,
    outputs=["out", "hidden"],  # hidden: the first product of each choice, sorted by expert; empty where not kept
    keep_outputs=["hidden"],
    fake=_fake,
    flops=_flops,
    backward_flops=_backward_flops,
)


def moe_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    activation: str | ExpertActivation = "silu",
    gated: bool = True,
    layout: str = "concatenated",
    transposed: bool = False,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    lora: Any = None,
    backend: str | None = None,
) -> Tensor:
    r"""The experts of a mixture of experts, without a copy of the tokens sorted by expert, forward or backward.

    .. math:: y_t = \sum_k w_{tk} \left( D_e\, a(G_e x_t + b_e) + c_e \right), \qquad e = i_{tk}

    with G the ``gate_up_proj`` and D the ``down_proj`` of expert e, b and c their biases, and a the ``activation``,
    which for gate g and up u, the two halves of its argument, is f(g) · u.

    Args:
        x: ``(T, C)``, the tokens; float32, bfloat16, float16, and float64 on the reference. Under autocast x and the
            projections are cast as a matrix product's operands would be. T may be 0.
        indices: ``(T, K)`` int32 or int64, each token's experts, in any order. One outside of [0, X) is an expert of
            another rank: it contributes nothing, and its weight gets no gradient.
        weights: ``(T, K)``, any floating dtype, read in fp32.
        gate_up_proj: ``(X, 2I, C)`` in the dtype of x; ``(X, C, 2I)`` with ``transposed``; I instead of 2I where
            ``gated`` is False.
        down_proj: ``(X, C, I)``; ``(X, I, C)`` with ``transposed``.
        activation: "silu" ("swish"), "gelu", "gelu_tanh" ("gelu_pytorch_tanh", "gelu_new"), "quick_gelu", "relu",
            "relu2" ("squared_relu"), or an :class:`accel.ExpertActivation`, which also knows a limit and a shift:
            GPT-OSS has ``ExpertActivation("silu", alpha=1.702, limit=7.0, shift=1.0)``.
        gated: whether a gate multiplies the up projection; without one the activation is of the whole first product.
        layout: "concatenated", the gate's rows before those of up, or "interleaved", a row of each in turn.
        transposed: how both projections lie.
        gate_up_bias: ``(X, 2I)`` or ``(X, I)``, laid out as the rows of ``gate_up_proj``; any floating dtype, read in
            fp32.
        down_bias: ``(X, C)``, likewise.
        lora: two adapters of low rank, of ``gate_up_proj`` and ``down_proj``, each ``(A, B, scale)`` or None, with A
            ``(X, r, inputs)`` and B ``(X, outputs, r)`` however the projections lie, any floating dtype, cast to that
            of x, and scale a number: an expert's product is that of W + scale · B A, which is never written out.
        backend: one of the op's backends by name, or None for the first that can run the call. With ``lora`` it is
            asked of :func:`accel.grouped_linear`.

    Returns:
        ``(T, C)`` in the dtype of x. The sum over k is made in fp32, in the order of k. What is between the two
        products is rounded to the dtype of x.

    Gradients exist for x, weights, projections, biases and adapters, and only what is needed for those asked for is
    computed: frozen experts cost no gradient of weights, a frozen router none of its own. An expert without tokens gets
    gradients of exactly 0. The forward keeps its first product for the backward and nothing else that is as large; the
    gradient of a weight comes from the activations, :math:`a · D^T g`, so that no output of the second product is kept.
    The same input gives the same bits, whatever the number of threads; how a sum is ordered depends on whether an
    expert has few tokens, so a token's last bit may depend on the others of the call.
    Second and forward-mode derivatives are the reference's; a kernel refuses them. In compiled code the reference
    multiplies every choice with every expert.

    Raises:
        TypeError: a tensor that must be floating or integer is not, or dtypes differ.
        ValueError: shapes, devices, names or numbers that do not fit; the message holds them.
        NotImplementedError: ``backend`` cannot run this call; the message says why.

    Follows Shazeer et al. (2017) and Fedus et al., Switch Transformers (2021), without a capacity; the gradient of the
    router's weights is that of Guo et al., SonicMoE (2025). Adapters are those of Hu et al., LoRA (2021).
    """
    args = _prepare(
        x,
        indices,
        weights,
        gate_up_proj,
        down_proj,
        activation=activation,
        gated=gated,
        layout=layout,
        transposed=transposed,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
    )
    if lora is not None:
        return experts_with_lora(args, check_lora(lora, args), backend)
    out: Tensor = _run(args, backend)[0]
    return out


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def some(*shape: int) -> Tensor:
        return torch.full(shape, 0.25, device=device, dtype=dtype)

    indices = torch.tensor([[0, 2], [1, 0], [2, 1]], device=device)
    return (some(3, 8), indices, some(3, 2), some(3, 12, 8), some(3, 8, 6)), {}


OP = dispatch.register(
    dispatch.Op(
        name="moe_experts",
        function=moe_experts,
        prepare=_prepare,
        example=_example,
        backends=(
            dispatch.Backend("torch", *_torch, frozenset({"cpu"}), (torch.bfloat16,), extra=True),
            dispatch.Backend("cpu", backends.why_not_cpu, *_native, frozenset({"cpu"}), KERNEL_DTYPES),
            dispatch.Backend("triton", *_triton, frozenset({"cuda"}), KERNEL_DTYPES),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
    )
)
