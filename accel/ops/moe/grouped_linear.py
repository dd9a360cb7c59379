"""A linear layer for each group of rows: the products of all experts as one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library
from accel.backends import KERNEL_DTYPES, inner_dtype
from accel.ops.moe import grouped_torch
from accel.ops.moe.groups import check_integers, check_offsets, grouped_product


class Args(NamedTuple):
    """The checked arguments every backend receives."""

    x: Tensor  # (N, C) contiguous
    weight: Tensor  # (X, O, C) contiguous, (X, C, O) where transposed
    bias: Tensor | None  # (X, O) contiguous fp32 (fp64 beside fp64)
    offsets: Tensor  # (X + 1,) contiguous int64
    transposed: bool

    @property
    def outputs(self) -> int:
        return self.weight.shape[2 if self.transposed else 1]


# --- the definition ---


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, transposed: bool) -> Tensor:
    """The op in plain torch, fp32 or fp64 inside."""
    inner = inner_dtype(x)
    turned = weight if transposed else weight.transpose(1, 2)
    rows = x.to(inner, copy=True)  # of whose parts torch says nothing a reader understands where x changes in place
    return grouped_product(rows, turned.to(inner), bias, offsets).to(x.dtype)


# --- backends, fastest first for each device ---


_native = backends.native("grouped_linear")
_triton = backends.triton(__name__)
_torch = (grouped_torch.why_not_linear, grouped_torch.linear_forward, grouped_torch.linear_backward)


# --- declaration ---


def _fake(args: Args) -> Tensor:
    return args.x.new_empty((args.x.shape[0], args.outputs))


def _flops(args: Args) -> int:
    """As if every row had an expert: how many have is in the values."""
    n, c = args.x.shape
    return 2 * n * c * args.outputs


# --- the public function ---


def _prepare(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    backends.check_floating(x, "x")
    backends.check_beside(weight, "weight", x, "x")
    x, weight = library.autocast(x), library.autocast(weight)
    if x.dtype != weight.dtype:
        raise TypeError(f"x and weight must have one dtype, got {x.dtype} and {weight.dtype}")
    form = "(X, C, O)" if transposed else "(X, O, C)"
    if x.dim() != 2 or weight.dim() != 3 or weight.shape[1 if transposed else 2] != x.shape[1]:
        raise ValueError(f"x (N, C) and weight {form} do not fit: {tuple(x.shape)=}, {tuple(weight.shape)=}")
    check_integers(offsets, "offsets", "where each expert's rows begin", x, "x")
    experts, outputs = weight.shape[0], weight.shape[2 if transposed else 1]
    if offsets.dim() != 1 or offsets.shape[0] != experts + 1:
        raise ValueError(f"offsets must be (X + 1,) = ({experts + 1},), got {tuple(offsets.shape)=}")
    if bias is not None:
        backends.check_beside(bias, "bias", x, "x")
        if tuple(bias.shape) != (experts, outputs):
            raise ValueError(f"bias must be (X, O) = ({experts}, {outputs}), got {tuple(bias.shape)=}")
        bias = bias.to(inner_dtype(x)).contiguous()
    check_offsets(offsets, x.shape[0])
    return Args(x.contiguous(), weight.contiguous(), bias, offsets.to(torch.int64).contiguous(), bool(transposed))


def _backward_flops(args: Args, made: Sequence[bool]) -> int:
    return _flops(args) * (int(made[0]) + int(made[1]))


_run = library.differentiable(
    "grouped_linear",
    Args,
    reference,
    gradients=3,
    fake=_fake,
    flops=_flops,
    backward_flops=_backward_flops,
)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""A linear layer for each group of rows: :math:`y_n = W_e x_n + b_e` where ``offsets[e] <= n < offsets[e + 1]``.

    What the experts of a mixture compute once tokens lie sorted by expert. Groups may have any sizes, none included,
    and a large one keeps all cores busy: work is cut by rows and by outputs.

    Args:
        x: ``(N, C)``, the rows of expert 0, then those of expert 1, and so on; float32, bfloat16, float16, and float64
            on the reference. Under autocast x and weight are cast as a matrix product's operands would be.
        weight: ``(X, O, C)`` in the dtype of x; ``(X, C, O)`` with ``transposed``.
        offsets: ``(X + 1,)``, int32 or int64: rises from 0 to at most N. Values are checked on a CPU; in compiled code
            by the kernel alone.
        bias: ``(X, O)``, any floating dtype, read in fp32.
        transposed: how ``weight`` lies.
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(N, O)`` in the dtype of x, summed in fp32. Rows behind ``offsets[X]`` are 0, and get no gradient, whatever
        they hold.

    Gradients exist for x, weight and bias, and only those that are needed are made. An expert without rows gets
    gradients of exactly 0. The same input gives the same bits, whatever the number of threads. How the sum of a row is
    ordered depends on whether its group has few rows, so a row's last bit may depend on how many stand beside it.
    What is not finite in a row reaches that row, and the gradients of its own expert. Second and forward-mode
    derivatives are the reference's; a kernel refuses them. In compiled code the reference multiplies every row with
    every expert.

    Raises:
        TypeError: a tensor that must be floating or integer is not, or dtypes differ.
        ValueError: shapes or devices that do not fit, or offsets that fall, do not begin with 0, or leave x.
        NotImplementedError: ``backend`` cannot run this call; the message says why.

    Follows Gale et al., MegaBlocks (2022), without padding.
    """
    args = _prepare(x, weight, offsets, bias, transposed=transposed)
    return _run(args, backend)


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = torch.zeros(5, 8, device=device, dtype=dtype)
    weight = torch.full((3, 6, 8), 0.25, device=device, dtype=dtype)
    return (x, weight, torch.tensor([0, 2, 2, 5], device=device)), {}


OP = dispatch.register(
    dispatch.Op(
        name="grouped_linear",
        function=grouped_linear,
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
