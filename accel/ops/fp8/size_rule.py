"""Where plain products are taken instead of those in eight bits, which are slower there: the backend ``torch``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel import dispatch
from accel.ops.amx import WITHOUT, has_amx
from accel.ops.fp8 import formats, fp8_gemm
from accel.ops.fp8.linear_products import Args, backward_args

PLAIN_FROM: dict[tuple[str, str], int] = {
    ("AMX", "bfloat16"): 1,
    ("AMX", "float32"): 64,
    ("AMX", "float16"): 64,
    ("AMX", "float8"): 256,
}
"""By the unit that multiplies (AMX, or sm_90 of a GPU) and the dtype in which the weight is stored: from how many rows
of bfloat16 on plain products are taken.

Forward on one core of an Intel Xeon with AMX, 4096 x 4096, ms of processor time, eight bits (by kernels without AMX)
and plain. A weight in bfloat16, which eight bits quantise at every call: 1 row 12.5 and 2.7, 32 rows 22.8 and 3.9, 512
rows 142 and 20. In float32, which both read: 32 rows 23.5 and 27.4, 64 rows 31.4 and 28.3, 512 rows 146 and 44; a step
of training 135 and 102 from 32 rows on. In float8, which plain products decode at every call: 32 rows 12.4 and 43, 128
rows 35 and 53, 256 rows 67 and 56, 512 rows 138 and 64."""


def rule(unit: str, dtype: torch.dtype, rows: int, stored: str) -> str | None:
    """Why products in eight bits are taken for ``rows`` of x, None where plain ones are faster."""
    least = PLAIN_FROM.get((unit, stored))
    if least is None or dtype != torch.bfloat16:
        return f"plain products of {dtype} with a weight in {stored} were not measured to be faster by {unit}"
    if rows < least:
        return f"by {unit} it is for {least} rows and more beside a weight in {stored}, and here are {rows}"
    return None


def why_not(args: Args) -> str | None:
    x = args.x
    if not args.size_rule:
        return "the recipe has size_rule=False"
    if dispatch.deterministic():
        return "determinism is asked for, and the bits of torch's sums may depend on the number of threads"
    if x.device.type not in ("cpu", "cuda"):
        return f"it is for CPUs and NVIDIA GPUs, and the tensors are on {x.device.type}"
    if x.device.type == "cpu" and not has_amx():
        return WITHOUT
    unit = "AMX"
    if x.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(x.device)
        unit = f"sm_{major}{minor}"
    return rule(unit, x.dtype, x.shape[0], "float8" if args.given else args.weight_dtype)


# --- the products ---


def plain_weight(args: Args) -> Tensor:
    """A weight to train in the dtype of x."""
    assert args.weight is not None
    return args.weight.detach().to(args.x.dtype).contiguous()


def _numbers(args: Args) -> Tensor:
    """The weight in the dtype of x. One in eight bits is looked up in a table, a strip of rows at a time, which stays
    in the cache: torch's own conversion of float8 takes nine times as long."""
    assert args.w is not None
    if args.scale is None:
        return args.w
    N, K = args.w.shape
    rows, cols = formats.resolve_block((N, K), (args.scale.shape[0], args.scale.shape[1]), "w")
    table = formats.decode(torch.arange(256, dtype=torch.uint8, device=args.w.device), args.format)
    made = args.x.new_empty((N, K))
    for start in range(0, N, 128):
        codes = args.w[start : start + 128]
        scale = args.scale[start // rows :][: formats.count(codes.shape[0], rows)]
        scale = scale if cols >= K else scale.repeat_interleave(cols, 1)[:, :K]
        made[start : start + 128] = table.index_select(0, codes.int().view(-1)).view(codes.shape).mul_(scale)
    return made


def forward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    args = Args(*given)
    bias = None if args.bias is None else args.bias.to(args.x.dtype)
    nothing = args.x.new_empty(0, dtype=torch.uint8)
    return F.linear(args.x, _numbers(args), bias), nothing, nothing.float()


def backward(grad: Tensor, codes_t: Tensor, scale_t: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, needs = given
    args, nothing = backward_args(grad, fields), grad.new_empty(0, dtype=torch.float32)
    made = [nothing, nothing, nothing]
    if needs[0]:
        made[0] = grad @ _numbers(args)
    if needs[1]:
        assert args.kept is not None
        made[1] = (grad.t() @ args.kept).to(fp8_gemm.OUT_DTYPES[args.weight_dtype])
    if needs[2]:
        made[2] = grad.sum(0, dtype=torch.float32)
    return made[0], made[1], made[2]
