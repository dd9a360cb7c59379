"""Shifted-window attention in Triton: tokens are found by addressing, nothing of size windows × N × N is stored.

Windows of at most 64 tokens are one tile (``whole.py``): a program keeps its head and walks over several
windows, summing small gradients in registers. Larger ones go in blocks (``blocks.py``): online softmax forward,
three backward kernels, so that every sum has one owner and a fixed order. ``tiles.py`` says which, and both find
their tokens and compute their logits by ``logits.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from accel.backends import why_not_gpu
from accel.kernels import _launch
from accel.kernels._launch import Launch, launch
from accel.kernels.windows import blocks, whole
from accel.kernels.windows.logits import Bias, Config, Factors, Inputs, Upstream, Window
from accel.kernels.windows.tiles import backward_tile, bias_tile, forward_tile
from accel.ops.windows.window_attention import Args

MAX_TOKENS = 32768  # a query's and a key's offset in the dense bias of one head fit 32 bits

# Enough programs to fill any present GPU several times over; fixed, so that sums do not depend on the device.
FORWARD_PROGRAMS = 2048
BACKWARD_PROGRAMS = 1024
PARTS_BYTES = 64 << 20

# --- launches ---


class _Shape(NamedTuple):
    """What the launchers need of a call, from its shapes alone."""

    head_dim: int
    tokens: int
    windows: int  # of the whole batch
    padded: bool


def _shape(args: Any) -> _Shape:
    qkv, window = args.qkv, args.window
    counts = [-(-qkv.shape[i + 1] // window[i]) for i in range(3)]
    return _Shape(
        head_dim=qkv.shape[-1] // (3 * args.num_heads),
        tokens=math.prod(window),
        windows=qkv.shape[0] * math.prod(counts),
        padded=[counts[i] * window[i] for i in range(3)] != list(qkv.shape[1:4]),
    )


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtype and head size are judged by the op.

    ``torch.compile`` traces through this, which bars generator expressions and Triton's helpers.
    """
    qkv = args.qkv
    reason = why_not_gpu(qkv, _launch.INTERPRETING)
    if reason is not None:
        return reason
    shape = _shape(args)
    if shape.tokens > MAX_TOKENS:
        return f"it takes windows of at most {MAX_TOKENS} tokens, not {shape.tokens} ({args.window})"
    rows = math.prod([2 * size - 1 for size in args.window])
    if rows * args.num_heads >= 2**31:
        return f"a bias table of {rows} rows and {args.num_heads} heads is more than 32 bits can address"
    programs = shape.windows * args.num_heads * -(-shape.tokens // 16)
    if programs >= 2**31:
        return f"{shape.windows} windows with {args.num_heads} heads are more than one launch can number"
    return None


def _shared(args: Args, shape: _Shape) -> dict[str, Any]:
    """The arguments that all kernels of a call have in common, but for what is compiled in."""
    return {
        "qkv_ptr": args.qkv,
        "inputs": Inputs(
            head_scale=args.head_scale,
            fill=args.qkv_bias if shape.padded else None,
            seed=args.seed if args.dropout_p > 0.0 else None,
        ),
        "bias": Bias(args.bias_table, args.bias),
        "factors": Factors(1.0 / (1.0 - args.dropout_p), args.scale, args.mask_value),
        "size_z": args.qkv.shape[1],
        "size_y": args.qkv.shape[2],
        "size_x": args.qkv.shape[3],
        "num_heads": args.num_heads,
        "windows": shape.windows,
        "threshold": int(args.dropout_p * 2.0**32),
    }


def _config(args: Args, head_dim: int, block: int) -> Config:
    return Config(
        window=Window(*args.window),
        shift_z=args.shift[0],
        shift_y=args.shift[1],
        shift_x=args.shift[2],
        roll_first=args.roll_first,
        d=head_dim,
        block_d=max(16, triton.next_power_of_2(head_dim)),
        block=block,
        dot=_launch.dot_dtype(args.qkv.dtype),
    )


def _forward_launch(out: Tensor, lse: Tensor, args: Args) -> Launch:
    shape = _shape(args)
    tile = forward_tile(
        shape.tokens,
        shape.head_dim,
        args.qkv.element_size(),
        cosine=args.head_scale is not None,
        dropout=args.dropout_p > 0.0,
        deep=args.window[0] > 1,
    )
    given = {
        **_shared(args, shape),
        "out_ptr": out,
        "lse_ptr": lse,
        "CONFIG": _config(args, shape.head_dim, tile.block),
    }
    if not tile.whole:
        programs = shape.windows * args.num_heads * triton.cdiv(shape.tokens, tile.block)
        return launch(blocks.forward_blocks_kernel, programs, tile.warps, **given)
    # A bias tile is read once a program: for up to 16 windows, fewer where that would leave the GPU idle.
    per_program = min(16, max(1, shape.windows * args.num_heads // FORWARD_PROGRAMS))
    programs = triton.cdiv(shape.windows, per_program) * args.num_heads
    return launch(whole.forward_tile_kernel, programs, tile.warps, per_program=per_program, **given)


def _windows_per_part(shape: _Shape, num_heads: int, itemsize: int, programs_per_part: int, need_bias: bool) -> int:
    """Windows whose small gradients one program sums before it writes its part; only shapes decide it, and with it
    the order of the sum.

    Enough parts for BACKWARD_PROGRAMS programs. But a part of the bias gradient costs 8·N² bytes a head, written and
    then read once: that shall stay below a quarter of the 7·N·D elements each of its windows costs anyway, and all
    parts together below PARTS_BYTES, or be one part where the dense bias is already larger than that.
    """
    parts = triton.cdiv(BACKWARD_PROGRAMS, programs_per_part)
    least = 1
    if need_bias:
        parts = min(parts, max(1, PARTS_BYTES // (4 * num_heads * shape.tokens**2)))
        least = triton.cdiv(4 * 8 * shape.tokens, 7 * shape.head_dim * itemsize)
    return max(triton.cdiv(shape.windows, parts), min(least, shape.windows))


@dataclass(frozen=True)
class _Backward:
    """The launches of a backward pass in order, and the buffers they fill.

    Parts of head_scale's and qkv_bias' gradients are a number and two head rows for each program: at most a hundredth
    and a 24th of the gradient of qkv.
    """

    launches: list[Launch]
    grad_qkv: Tensor
    bias_parts: Tensor | None  # (parts, H, N, N)
    head_parts: Tensor | None  # (parts, H)
    fill_parts: Tensor | None  # (parts, 2, C): of k and v, as nobody reads what a padded token's q gives


def _backward_plan(grad_out: Tensor, lse: Tensor, args: Args, needs: list[bool]) -> _Backward:
    qkv, num_heads, shape = args.qkv, args.num_heads, _shape(args)
    tile = backward_tile(
        shape.tokens,
        shape.head_dim,
        qkv.element_size(),
        cosine=args.head_scale is not None,
        dropout=args.dropout_p > 0.0,
        padded=shape.padded,
    )
    cuts = triton.cdiv(shape.tokens, tile.block)
    tile_of_bias = tile if tile.whole else bias_tile(shape.tokens, shape.head_dim, qkv.element_size())
    tiles_of_bias = triton.cdiv(shape.tokens, tile_of_bias.block) ** 2
    has_bias = args.bias_table is not None or args.bias is not None
    need_bias = (args.bias_table is not None and needs[0]) or (args.bias is not None and needs[1])
    per_program = _windows_per_part(shape, num_heads, qkv.element_size(), num_heads * tiles_of_bias, need_bias)
    parts = triton.cdiv(shape.windows, per_program)
    owners = parts if tile.whole else shape.windows * cuts  # programs of a head that add to the smallest gradients

    def part(needed: bool, *size: int) -> Tensor | None:
        return lse.new_empty(size) if needed else None

    grad_qkv = torch.empty_like(qkv, dtype=_launch.store_dtype(qkv.dtype))
    bias_parts = part(need_bias, parts, num_heads, shape.tokens, shape.tokens)
    head_parts = part(args.head_scale is not None and needs[2], owners, num_heads)
    fill_parts = part(args.qkv_bias is not None and needs[3] and shape.padded, owners, 2, qkv.shape[-1] // 3)
    tile_bias = part(tile.whole and has_bias, num_heads, tile.block, tile.block)
    arguments = {
        **_shared(args, shape),
        "upstream": Upstream(
            grad_out=grad_out,
            delta=None if tile.whole else torch.empty_like(lse),
            inverse_total=None if tile.whole else torch.empty_like(lse),
            lse=lse,
        ),
        "tile_ptr": tile_bias,
        "grad_qkv_ptr": grad_qkv,
        "bias_part_ptr": bias_parts,
        "head_part_ptr": head_parts,
        "fill_part_ptr": fill_parts,
        "per_program": per_program,
        "CONFIG": _config(args, shape.head_dim, tile.block),
    }
    launches = []
    if tile_bias is not None:
        given = {**arguments, "WINDOW": Window(*args.window), "BLOCK": tile.block}
        launches.append(launch(whole.expand_bias_kernel, num_heads * (tile.block // 16), 4, **given))
    if tile.whole:
        launches.append(launch(whole.backward_tile_kernel, owners * num_heads, tile.warps, **arguments))
        return _Backward(launches, grad_qkv, bias_parts, head_parts, fill_parts)
    launches.append(launch(blocks.queries_kernel, owners * num_heads, tile.warps, **arguments))
    launches.append(launch(blocks.keys_kernel, owners * num_heads, tile.warps, **arguments))
    if need_bias:
        arguments["CONFIG"] = _config(args, shape.head_dim, tile_of_bias.block)
        programs = parts * tiles_of_bias * num_heads
        launches.append(launch(blocks.bias_kernel, programs, tile_of_bias.warps, **arguments))
    return _Backward(launches, grad_qkv, bias_parts, head_parts, fill_parts)


def _table_launch(grad_table: Tensor, grad_bias: Tensor, window: list[int]) -> Launch:
    num_heads, rows = grad_bias.shape[0], 16
    return launch(
        blocks.reduce_table_kernel,
        triton.cdiv(grad_table.shape[0], rows) * num_heads,
        4,
        grad_table_ptr=grad_table,
        grad_bias_ptr=grad_bias,
        num_heads=num_heads,
        WINDOW=Window(*window),
        ROWS=rows,
        BLOCK=64,
    )


def _results(args: Args) -> tuple[Tensor, Tensor]:
    """Empty out and lse."""
    qkv, shape = args.qkv, _shape(args)
    out = qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3), dtype=_launch.store_dtype(qkv.dtype))
    return out, qkv.new_empty((shape.windows, args.num_heads, shape.tokens), dtype=torch.float32)


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; arguments are the fields of ``accel.ops.windows.window_attention.Args``."""
    given = Args(*args)
    out, lse = _results(given)
    with _launch.device_of(given.qkv):
        _forward_launch(out, lse, given).run()
    return out.to(given.qkv.dtype), lse


def backward(grad_out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of qkv and, where needed, of table, dense bias, head_scale and qkv_bias (fp32, else empty).

    The output is rounded and so not what the gradients start from; it is recomputed.
    """
    *fields, needs = args
    given = Args(*fields)
    qkv = given.qkv
    grad_table, grad_bias, grad_head, grad_fill = (lse.new_empty(0) for _ in range(4))
    with _launch.device_of(qkv):
        plan = _backward_plan(grad_out, lse, given, needs)
        for step in plan.launches:
            step.run()
        if plan.bias_parts is not None:
            dense = plan.bias_parts.sum(0)
            if given.bias_table is None:
                grad_bias = dense
            else:
                grad_table = lse.new_empty(given.bias_table.shape)
                _table_launch(grad_table, dense, given.window).run()
        if plan.head_parts is not None:
            grad_head = plan.head_parts.sum(0)
        if given.qkv_bias is not None and needs[3]:
            grad_fill = lse.new_zeros(given.qkv_bias.shape)  # its q third and, without padding, all of it stay zero
            if plan.fill_parts is not None:
                grad_fill.view(3, -1)[1:] = plan.fill_parts.sum(0)
    return plan.grad_qkv.to(qkv.dtype), grad_table, grad_bias, grad_head, grad_fill


# --- what the compile gate builds ---


def compile_cases() -> Iterator[_launch.CompileCase]:
    """Every tile the tables can choose in the heaviest calls that reach it, and the calls of the Swin models.

    What differs only by tensors' shapes, or by nothing the kernel sees, comes once.
    """
    return _launch.once(
        case for dtype, window, size, flags in _calls() for case in _cases(dtype, window, size, **flags)
    )


def _calls() -> Iterator[tuple[torch.dtype, list[int], int, dict[str, bool]]]:
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    tiny, small, v1, v2, wide, deep = [1, 3, 5], [1, 5, 6], [1, 7, 7], [1, 8, 8], [1, 16, 16], [8, 7, 7]
    shifted = {"shift": True}
    padded = {"shift": True, "fill": True}
    cosine = {"shift": True, "cosine": True}
    everything = {"cosine": True, "shift": True, "fill": True, "dropout": True}
    other = {"shift": True, "fill": True, "roll_first": True, "dense": True}
    for head_dim in (16, 32, 64, 128):
        yield fp32, v1, head_dim, everything
    yield fp32, tiny, 32, everything
    yield fp32, v1, 20, other
    yield fp32, v2, 32, cosine
    for window in (tiny, v1, wide):
        yield bf16, window, 32, everything
    for head_dim in (32, 64):
        yield bf16, small, head_dim, cosine
        yield bf16, small, head_dim, {**padded, "dropout": True}
    yield bf16, v1, 64, everything
    yield bf16, v1, 128, everything
    for window in (v1, v2, wide, deep):
        yield bf16, window, 32, padded
    for window in (v2, wide):
        yield bf16, window, 32, cosine
    for window in (v1, wide):
        yield bf16, window, 32, other
        yield bf16, window, 64, padded
    yield fp16, v1, 32, shifted
    yield bf16, v1, 16, padded
    yield bf16, v1, 20, other
    yield bf16, v1, 32, {}
    yield fp16, v1, 32, everything


def _cases(
    dtype: torch.dtype,
    window: list[int],
    head_dim: int,
    cosine: bool = False,
    shift: bool = False,
    fill: bool = False,
    dropout: bool = False,
    dense: bool = False,
    roll_first: bool = False,
) -> Iterator[_launch.CompileCase]:
    """The launches of one call, forward and backward, on tensors that have shapes only."""
    heads = 3
    name = f"{str(dtype)[6:]} window {'x'.join(map(str, window))} D={head_dim}"
    for flag in ("cosine", "shift", "fill", "dropout", "dense", "roll_first"):
        name += f" {flag}" if locals()[flag] else ""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    tokens = math.prod(window)
    rows = math.prod(2 * w - 1 for w in window)
    channels = heads * head_dim
    qkv = empty(64, *(8 * w - int(fill) for w in window), 3 * channels, dtype=dtype)
    args = Args(
        qkv=qkv,
        bias_table=None if dense else empty(rows, heads),
        bias=empty(heads, tokens, tokens) if dense else None,
        head_scale=empty(heads) if cosine else None,
        qkv_bias=empty(3 * channels) if fill else None,
        seed=empty(1, dtype=torch.int64) if dropout else None,
        num_heads=heads,
        window=window,
        shift=[w // 2 if shift else 0 for w in window],
        scale=head_dim**-0.5,
        roll_first=roll_first,
        mask_value=-100.0,
        dropout_p=0.1 if dropout else 0.0,
    )
    out, lse = _results(args)
    yield _forward_launch(out, lse, args).case(name)
    for step in _backward_plan(out, lse, args, [True] * 4).launches:
        yield step.case(name)
    if not dense:
        yield _table_launch(empty(rows, heads), empty(heads, tokens, tokens), window).case(name)
