"""The launches of one sum over columns, in order: with few programs, first those that make the state of each part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from accel.kernels._launch import Launch, launch
from accel.kernels.linear import states as around
from accel.kernels.linear import sweep
from accel.kernels.linear.arguments import (
    Config,
    Numbers,
    Pointers,
    anchored_parts,
    block_of,
    parts_of,
    products_of,
    tile_of,
)
from accel.ops.linear.linear_attention import Args


@dataclass(frozen=True)
class Upstream:
    """What the gradients start from: the gradient of the output, and see ``Pointers``."""

    grad: Tensor
    factor: Tensor
    constant: Tensor | None
    own: Tensor | None


@dataclass(frozen=True)
class Call:
    """What the sums of a call have in common."""

    args: Args
    cu_q: Tensor | None
    cu_k: Tensor | None
    unit: int

    @property
    def tokens(self) -> tuple[int, int]:
        return self.args.q.shape[2], self.args.k.shape[2]


@dataclass(frozen=True)
class Sum:
    """The launches of a sum in order, and what they fill besides ``o``."""

    launches: list[Launch]
    final: Tensor | None  # (N, heads with a state, R·V + Z)
    den: Tensor | None
    dots: Tensor | None  # (tiles, B, H, T)
    each: Tensor | None  # (N, heads with a state, parts, R·V + Z), where there are parts: the state before each
    parts: int
    chunk: int  # tokens; parts hold whole ones


def call_of(args: Args, *buffers: Tensor) -> Call:
    """``buffers``: other tensors that are addressed by strides."""

    def rising(cu: Tensor | None) -> Tensor | None:  # no token is of two sequences, whatever a GPU's offsets hold
        return None if cu is None else cu.cummax(0).values.to(torch.int32)

    cu_q = rising(args.cu_q)
    strides = [n for x in (args.q, args.k, args.v, *buffers) for n in x.stride()[:3]]
    unit = 8 if all(n % 8 == 0 for n in strides) else 1
    return Call(args, cu_q, cu_q if args.cu_k is None else rising(args.cu_k), unit)


def _steps(name: str, x: Tensor | None, heads: int, unit: int) -> dict[str, int]:
    steps = [0, 0, 0] if x is None else [0 if x.shape[n] == 1 else x.stride(n) // unit for n in range(3)]
    group = 1 if x is None else heads // x.shape[1]
    return {f"{name}_b": steps[0], f"{name}_h": steps[1], f"{name}_t": steps[2], f"{name}_group": group}


def sum_of(
    mode: str,
    call: Call,
    o: Tensor,
    init: Tensor | None,
    keep_final: bool,
    capability: tuple[int, int],
    upstream: Upstream | None = None,
    dots: bool = False,
    fine: bool = False,
) -> Sum:
    """Launches that fill ``o (B, H, rows, V)``. ``init``: the state before the first token, or the gradient of that
    after the last."""
    args = call.args
    heads, sequences = args.heads, args.sequences
    grad = None if upstream is None else upstream.grad
    x, y, u = {
        "out": (args.q, args.k, args.v),
        "grad_q": (grad, args.v, args.k),
        "grad_k": (args.v, grad, args.q),
        "grad_v": (args.k, args.q, grad),
    }[mode]
    assert x is not None
    assert y is not None
    assert u is not None
    reverse = mode in ("grad_k", "grad_v")
    raw = {"grad_q": args.q, "grad_k": args.k}.get(mode)
    if args.features == "identity" and not dots:
        raw = None
    rows, columns = call.tokens[::-1] if reverse else call.tokens
    owners = heads if reverse else args.state_heads  # of states
    r, v = y.shape[3], u.shape[3]
    fine = (fine or dots) and args.q.dtype != torch.float32
    tile = tile_of(r, v, args.q.dtype, fine, columns, capability)
    tiles = triton.cdiv(v, tile.values)
    parts = parts_of(sequences * (heads if args.causal else owners) * tiles, columns)
    if dots:
        parts = anchored_parts(parts, columns, 1 if args.cu_q is None else sequences)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return o.new_empty(size, dtype=dtype)

    def config(has_rows: bool, has_columns: bool) -> Config:
        return Config(
            mode=mode,
            rows=has_rows,
            columns=has_columns,
            features=args.features,
            normalize=args.normalize,
            decay=kind_of_decay(args),
            r=r,
            v=v,
            block_r=block_of(r),
            block_v=tile.values,
            chunk=tile.chunk,
            unit=call.unit,
            **products_of(args.q.dtype),
            fine=fine,
        )

    plan = config(True, True)
    size = r * v + plan.z
    batches = args.q.shape[0]
    den = empty(*o.shape[:3]) if mode == "out" and args.normalize and args.keep else None
    dot_parts = empty(tiles, *o.shape[:3]) if dots else None
    final = empty(sequences, owners, size) if keep_final else None
    launches: list[Launch] = []
    decay = args.decay
    if plan.decay == "token":
        assert decay is not None
        decay, step = _decay_launch(call, tile.chunk)
        launches.append(step)
    packed = args.cu_q is not None
    cu_rows, cu_columns = (call.cu_k, call.cu_q) if reverse else (call.cu_q, call.cu_k)

    def run(has_rows: bool, has_columns: bool, of: int, parts: int, **more: Any) -> None:
        """Add a sweep by programs for ``of`` heads."""
        pointers = Pointers(
            x=x if has_rows else None,
            y=y if has_columns else None,
            u=u if has_columns else None,
            raw=raw if has_rows else None,
            o=o if has_rows else None,
            den=den if has_rows else None,
            dots=dot_parts if has_rows else None,
            mask=None if args.key_mask is None else args.key_mask.view(torch.uint8),
            cu_rows=cu_rows if packed else None,
            cu_columns=cu_columns if packed else None,
            decay=decay,
            factor=None if upstream is None else upstream.factor,
            constant=None if upstream is None else upstream.constant,
            own=upstream.own if upstream is not None and has_rows and dots else None,
            **{name: more.get(name) for name in ("init", "states", "totals", "first", "flags")},
        )
        steps: dict[str, int] = {}
        for name, tensor, takes in (
            ("x", x, has_rows),
            ("y", y, has_columns),
            ("u", u, has_columns),
            ("raw", raw, has_rows),
            ("o", o, has_rows),
        ):
            steps.update(_steps(name, tensor if takes else None, of, call.unit))
        launches.append(
            launch(
                sweep.sweep_kernel,
                sequences * of * parts * tiles,
                tile.warps,
                pointers=pointers,
                numbers=Numbers(args.scale, args.eps),
                **steps,
                heads=of,
                state_group=of // owners,
                decay_group=of // args.state_heads,
                init_parts=more.get("init_parts", 1),
                states_parts=more.get("states_parts", 1),
                rows=rows,
                columns=columns,
                batches=batches,
                parts=parts,
                tiles=tiles,
                CONFIG=config(has_rows, has_columns),
            )
        )

    if args.causal and parts == 1:
        flags = empty(sequences, heads, tiles, dtype=torch.int32) if mode == "out" and tiles > 1 else None
        run(True, True, heads, 1, init=init, states=final, flags=flags)
        if flags is not None:
            launches.append(_spread_launch(call, o, final, flags, cu_rows if packed else None, size, owners))
        return Sum(launches, final, den, dot_parts, None, parts, tile.chunk)

    each = empty(sequences, owners, parts, size)
    totals, flags = empty(sequences, owners, parts), empty(sequences, owners, parts * tiles, dtype=torch.int32)
    first = empty(sequences, owners, dtype=torch.int32)
    final = empty(sequences, owners, size) if final is None else final
    run(False, True, owners, parts, states=each, totals=totals, flags=flags, states_parts=parts)
    blocks = triton.cdiv(size, 1024)
    launches.append(
        launch(
            around.prefix_kernel,
            sequences * owners * blocks,
            4,
            states_ptr=each,
            totals_ptr=totals,
            flags_ptr=flags,
            init_ptr=init,
            final_ptr=final,
            first_ptr=first,
            parts=parts,
            flags=parts * tiles,
            size=size,
            blocks=blocks,
            REVERSE=reverse,
            BLOCK=1024,
        )
    )
    if args.causal:
        run(True, True, heads, parts, init=each, init_parts=parts, first=first)
    else:
        run(True, False, heads, parts_of(sequences * heads * tiles, rows), init=final, first=first)
    return Sum(launches, final, den, dot_parts, each, parts, tile.chunk)


def kind_of_decay(args: Args) -> str:
    if args.decay is None:
        return ""
    return "head" if args.decay.shape[0] == args.decay.shape[2] == 1 else "token"


def _decay_launch(call: Call, chunk: int) -> tuple[Tensor, Launch]:
    args, tokens = call.args, call.tokens[0]
    assert args.decay is not None
    sums = args.decay.new_empty((2, *args.decay.shape))
    block = max(512, chunk)
    parts = max(1, min(triton.cdiv(tokens, block), 1024))
    return sums, launch(
        around.decay_kernel,
        args.sequences * args.state_heads * parts,
        4,
        sums_ptr=sums,
        decay_ptr=args.decay,
        cu_ptr=call.cu_q,
        heads=args.state_heads,
        batches=args.q.shape[0],
        columns=tokens,
        parts=parts,
        BLOCK=block,
        CHUNK=chunk,
    )


def _spread_launch(
    call: Call, out: Tensor, final: Tensor | None, flags: Tensor, cu: Tensor | None, size: int, owners: int
) -> Launch:
    steps = _steps("out", out, out.shape[1], call.unit)
    e = out.shape[3]
    return launch(
        around.spread_kernel,
        flags.shape[0] * flags.shape[1],
        4,
        out_ptr=out,
        states_ptr=final,
        flags_ptr=flags,
        cu_ptr=cu,
        **steps,
        heads=flags.shape[1],
        tiles=flags.shape[2],
        rows=out.shape[2],
        group=flags.shape[1] // owners,
        size=size,
        UNIT=call.unit,
        E=e,
        BLOCK_E=block_of(e),
        BLOCK=16,
    )


def upstream_of(
    call: Call, grad: Tensor | None, out: Tensor, den: Tensor, by_decay: bool
) -> tuple[Upstream, list[Launch]]:
    args, heads, unit = call.args, call.args.heads, call.unit
    zeros = out.new_zeros(out.shape[:3], dtype=torch.float32)
    if grad is None:
        return Upstream(out, zeros, zeros if args.normalize else None, zeros if by_decay else None), []
    constant, own = [torch.empty_like(zeros) if wanted else None for wanted in (args.normalize, by_decay)]
    made = Upstream(grad, torch.empty_like(zeros), constant, own)
    v = args.v if by_decay else None
    steps = {**_steps("grad", grad, heads, unit), **_steps("out", out, heads, unit), **_steps("v", v, heads, unit)}
    e = out.shape[3]
    block = max(1, 2048 // block_of(e))
    step = launch(
        around.factors_kernel,
        out.shape[0] * out.shape[1] * triton.cdiv(out.shape[2], block),
        4,
        factor_ptr=made.factor,
        constant_ptr=made.constant,
        own_ptr=made.own,
        grad_ptr=grad,
        out_ptr=out,
        v_ptr=v,
        den_ptr=den if args.normalize else None,
        **steps,
        heads=args.heads,
        rows=out.shape[2],
        batches=out.shape[0],
        numbers=Numbers(args.scale, args.eps),
        UNIT=call.unit,
        E=e,
        BLOCK_E=block_of(e),
        BLOCK=block,
    )
    return made, [step]
