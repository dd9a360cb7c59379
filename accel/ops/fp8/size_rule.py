"""Where plain products are taken instead of those in eight bits, which are slower there: the backend ``torch``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.ops.amx import WITHOUT, has_amx
from accel.ops.fp8 import fp8_gemm
from accel.ops.fp8.linear_products import Args, backward_args, dequantize

PLAIN_FROM: dict[tuple[str, bool], int] = {
    ("amx", False): 32,
    ("amx", True): 512,
}
"""By the unit that multiplies, and whether the weight is stored in eight bits, which then is decoded at each call: from
how many rows on plain products are taken."""


def rule(unit: str, dtype: torch.dtype, rows: int, outputs: int, depth: int, given: bool) -> str | None:
    """Why products in eight bits are taken for ``rows`` of x, None where plain ones are faster."""
    least = PLAIN_FROM.get((unit, given))
    if least is None or dtype != torch.bfloat16:
        return f"no plain product of {dtype} was measured to be faster on {unit}"
    if rows < least:
        weight = "in eight bits" if given else "of plain numbers"
        return f"on {unit} plain products are faster from {least} rows on beside a weight {weight}, and here are {rows}"
    return None


def why_not(args: Args) -> str | None:
    if not args.size_rule:
        return "the recipe has size_rule=False"
    if args.x.device.type != "cpu":
        return f"it is for CPUs, and the tensors are on {args.x.device.type}"
    if not has_amx():
        return WITHOUT
    rows, outputs, depth = args.sizes
    return rule("amx", args.x.dtype, rows, outputs, depth, args.given)


def plain_weight(args: Args) -> Tensor:
    """The weight as numbers of the dtype of x."""
    if args.weight is not None:
        return args.weight.detach().to(args.x.dtype).contiguous()
    assert args.w is not None
    assert args.scale is not None
    return dequantize(args.w, args.scale, args.format, args.x.dtype)


def forward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    args = Args(*given)
    assert args.w is not None
    bias = None if args.bias is None else args.bias.to(args.x.dtype)
    nothing = args.x.new_empty(0, dtype=torch.uint8)
    return F.linear(args.x, args.w, bias), nothing, nothing.float()


def backward(grad: Tensor, codes_t: Tensor, scale_t: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, needs = given
    args, nothing = backward_args(grad, fields), grad.new_empty(0, dtype=torch.float32)
    made = [nothing, nothing, nothing]
    if needs[0]:
        assert args.w is not None
        made[0] = grad @ args.w
    if needs[1]:
        assert args.kept is not None
        made[1] = (grad.t() @ args.kept).to(fp8_gemm.OUT_DTYPES[args.weight_dtype])
    if needs[2]:
        made[2] = grad.sum(0, dtype=torch.float32)
    return made[0], made[1], made[2]
