"""Linear attention in Triton: one sum over columns, with different tensors, is the output and each gradient.

``arguments.py`` says which; ``sweep.py`` computes it, ``states.py`` what surrounds it. Where heads, sequences and tiles
of channels are too few to fill a GPU, sequences are cut into parts: the state of each, then those before each, then the
rows. Nothing of size T × T is stored, and states only where there are parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from accel.backends import why_not_gpu
from accel.kernels import _launch
from accel.kernels._launch import Launch, launch
from accel.kernels.linear import states as around
from accel.kernels.linear import sweep
from accel.kernels.linear.arguments import (
    LARGEST,
    Config,
    Numbers,
    Pointers,
    block_of,
    parts_of,
    products_of,
    tile_of,
)
from accel.ops.layout import empty_like_layout
from accel.ops.linear.linear_attention import Args


def why_not(args: Any) -> str | None:
    """Why these kernels cannot run the call; dtype is judged by the op.

    ``torch.compile`` traces through this, which bars generator expressions and Triton's helpers.
    """
    reason = why_not_gpu(args.q, _launch.INTERPRETING)
    if reason is not None:
        return reason
    features, values = args.q.shape[3], args.v.shape[3]
    largest = LARGEST.get(args.q.dtype, 0)
    if largest and max(features, values) > largest:
        return f"it takes up to {largest} features and values a head in {args.q.dtype}, not {features} and {values}"
    heads = max(args.q.shape[1], args.k.shape[1], args.v.shape[1])
    sequences = args.q.shape[0] if args.cu_q is None else args.cu_q.shape[0] - 1
    tokens = max(args.q.shape[2], args.k.shape[2])
    if sequences * heads * 16 * -(-tokens // 16) >= 2**31:
        return f"{sequences} sequences of {tokens} tokens with {heads} heads are more than one launch can number"
    return None


# --- the launches of one sum ---


@dataclass(frozen=True)
class _Upstream:
    """What the gradients start from: the gradient of the output, and see ``Pointers``."""

    grad: Tensor
    factor: Tensor
    constant: Tensor | None


@dataclass(frozen=True)
class _Call:
    """What the sums of a call have in common."""

    args: Args
    cu_q: Tensor | None
    cu_k: Tensor | None
    unit: int

    @property
    def tokens(self) -> tuple[int, int]:
        return self.args.q.shape[2], self.args.k.shape[2]


@dataclass(frozen=True)
class _Sum:
    """The launches of a sum in order, and what they fill besides ``o``."""

    launches: list[Launch]
    final: Tensor | None  # (N, heads with a state, R·V + Z)
    den: Tensor | None
    dots: Tensor | None  # (tiles, B, H, T)


def _call(args: Args, *buffers: Tensor) -> _Call:
    """``buffers``: other tensors that are addressed by strides."""

    def rising(cu: Tensor | None) -> Tensor | None:  # no token is of two sequences, whatever a GPU's offsets hold
        return None if cu is None else cu.cummax(0).values.to(torch.int32)

    cu_q = rising(args.cu_q)
    strides = [n for x in (args.q, args.k, args.v, *buffers) for n in x.stride()[:3]]
    unit = 8 if all(n % 8 == 0 for n in strides) else 1
    return _Call(args, cu_q, cu_q if args.cu_k is None else rising(args.cu_k), unit)


def _steps(name: str, x: Tensor | None, heads: int, unit: int) -> dict[str, int]:
    steps = [0, 0, 0] if x is None else [0 if x.shape[n] == 1 else x.stride(n) // unit for n in range(3)]
    group = 1 if x is None else heads // x.shape[1]
    return {f"{name}_b": steps[0], f"{name}_h": steps[1], f"{name}_t": steps[2], f"{name}_group": group}


def _sum(
    mode: str,
    call: _Call,
    o: Tensor,
    init: Tensor | None,
    keep_final: bool,
    capability: tuple[int, int],
    upstream: _Upstream | None = None,
    dots: bool = False,
) -> _Sum:
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
    fine = dots and args.q.dtype != torch.float32
    tile = tile_of(r, v, args.q.dtype, fine, columns, capability)
    tiles = triton.cdiv(v, tile.values)
    parts = parts_of(sequences * (heads if args.causal else owners) * tiles, columns)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return o.new_empty(size, dtype=dtype)

    def config(has_rows: bool, has_columns: bool) -> Config:
        return Config(
            mode=mode,
            rows=has_rows,
            columns=has_columns,
            features=args.features,
            normalize=args.normalize,
            decay=_kind_of_decay(args),
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
    den = empty(*o.shape[:3]) if mode == "out" and args.normalize else None
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
        return _Sum(launches, final, den, dot_parts)

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
    return _Sum(launches, final, den, dot_parts)


def _kind_of_decay(args: Args) -> str:
    if args.decay is None:
        return ""
    return "head" if args.decay.shape[0] == args.decay.shape[2] == 1 else "token"


def _decay_launch(call: _Call, chunk: int) -> tuple[Tensor, Launch]:
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
    call: _Call, out: Tensor, final: Tensor | None, flags: Tensor, cu: Tensor | None, size: int, owners: int
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


def _upstream(call: _Call, grad: Tensor | None, out: Tensor, den: Tensor) -> tuple[_Upstream, list[Launch]]:
    args = call.args
    zeros = out.new_zeros(out.shape[:3], dtype=torch.float32)
    if grad is None:
        return _Upstream(out, zeros, zeros if args.normalize else None), []
    made = _Upstream(grad, torch.empty_like(zeros), torch.empty_like(zeros) if args.normalize else None)
    steps = {**_steps("grad", grad, args.heads, call.unit), **_steps("out", out, args.heads, call.unit)}
    e = out.shape[3]
    block = max(1, 2048 // block_of(e))
    step = launch(
        around.factors_kernel,
        out.shape[0] * out.shape[1] * triton.cdiv(out.shape[2], block),
        4,
        factor_ptr=made.factor,
        constant_ptr=made.constant,
        grad_ptr=grad,
        out_ptr=out,
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


# --- states and gradients outside the kernels ---


def _flat(kv: Tensor, vector: Tensor | None, transposed: bool) -> Tensor:
    """A state as the sweeps have it."""
    matrix = (kv.mT if transposed else kv).flatten(2)
    return matrix.contiguous() if vector is None else torch.cat([matrix, vector], -1)


def _results(args: Args, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty buffer in the layout of ``x``, or full of zeros where tokens may be of no sequence."""
    made = _launch.result(x, shape)
    return made if args.cu_q is None else made.zero_()


def _forward_plan(args: Args, capability: tuple[int, int]) -> tuple[Tensor, _Sum]:
    q = args.q
    out = _results(args, q, (q.shape[0], args.heads, q.shape[2], args.v.shape[3]))
    init = None if args.kv is None else _flat(args.kv, args.k_sum, False)
    return out, _sum("out", _call(args, out), out, init, args.return_state, capability)


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, state and denominators; arguments are the fields of ``accel.ops.linear.linear_attention.Args``."""
    given = Args(*args)
    d, e = given.q.shape[3], given.v.shape[3]
    with _launch.device_of(given.q):
        out, plan = _forward_plan(given, _launch.capability(given.q))
        if plan.den is not None and given.cu_q is not None:
            plan.den.zero_()
        for step in plan.launches:
            step.run()
        kv, k_sum, den = (out.new_empty(0, dtype=torch.float32) for _ in range(3))
        if given.return_state:
            assert plan.final is not None
            kv = plan.final[..., : d * e].unflatten(-1, (d, e)).contiguous()
            if given.normalize:
                k_sum = plan.final[..., d * e :].contiguous()
    return out.to(given.q.dtype), kv, k_sum, den if plan.den is None else plan.den


@dataclass(frozen=True)
class _Backward:
    """The launches of a backward pass in order, and the sums that they make. ``grads``: of q, k and v for each head."""

    launches: list[Launch]
    grads: list[Tensor]
    sums: list[_Sum]
    init: Tensor | None  # the gradient of the final state, as that state is for the gradient of q


def _backward_plan(
    grad: Tensor | None,
    grad_kv: Tensor | None,
    grad_k_sum: Tensor | None,
    out: Tensor,
    den: Tensor,
    args: Args,
    needs: list[bool],
    capability: tuple[int, int],
) -> _Backward:
    q, k, v, heads = args.q, args.k, args.v, args.heads
    grads = []
    for x in (q, k, v):
        if x.shape[1] == heads:
            grads.append(_results(args, x, tuple(x.shape)))
        else:  # those of each head are summed
            made = x.new_zeros if args.cu_q is not None else x.new_empty
            grads.append(made((x.shape[0], heads, *x.shape[2:]), dtype=torch.float32))
    call = _call(args, out, *grads, *([] if grad is None else [grad]))
    upstream, launches = _upstream(call, grad, out, den)
    by_decay = args.decay is not None and needs[0]
    start = None if args.kv is None else _flat(args.kv, args.k_sum, True)
    final = _final_gradient(args, grad_kv, grad_k_sum)
    sums = [
        _sum("grad_q", call, grads[0], start, by_decay and final is not None, capability, upstream, by_decay),
        _sum("grad_k", call, grads[1], _of_heads(final, args), needs[2], capability, upstream, by_decay),
        _sum("grad_v", call, grads[2], _of_heads(grad_kv, args), needs[1], capability, upstream),
    ]
    for found in sums:
        launches += found.launches
    return _Backward(launches, grads, sums, final)


def _final_gradient(args: Args, grad_kv: Tensor | None, grad_k_sum: Tensor | None) -> Tensor | None:
    """The gradient of the final state as the sums of the gradients of q and k have it."""
    if grad_kv is None and grad_k_sum is None:
        return None
    n, heads, d, e = args.sequences, args.state_heads, args.q.shape[3], args.v.shape[3]
    kv = args.q.new_zeros((n, heads, d, e), dtype=torch.float32) if grad_kv is None else grad_kv
    if not args.normalize:
        return _flat(kv, None, True)
    return _flat(kv, kv.new_zeros((n, heads, d)) if grad_k_sum is None else grad_k_sum, True)


def _of_heads(state: Tensor | None, args: Args) -> Tensor | None:
    """``(N, Hs, ...)`` with a state for each head: the first of a group has that of the group, the others zeros."""
    if state is None:
        return None
    flat = state.flatten(2)
    group = args.heads // args.state_heads
    if group == 1:
        return flat.contiguous()
    every = flat.new_zeros((flat.shape[0], args.heads, flat.shape[2]))
    every[:, ::group] = flat
    return every


def _over_groups(x: Tensor, heads: int) -> Tensor:
    """The sums over the heads that share one of ``heads``."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)


def _decay_launch_of_gradient(plan: _Backward, args: Args, cu: Tensor | None) -> tuple[Tensor, Launch]:
    """``(B, Hs, T)`` fp32, or ``(N, Hs)`` that is summed over sequences; after the sums were made."""
    decay, queries, keys = args.decay, plan.sums[0].dots, plan.sums[1].dots
    assert decay is not None
    assert queries is not None
    assert keys is not None
    token = _kind_of_decay(args) == "token"
    shape = decay.shape if token else (args.sequences, decay.shape[1])
    grad = decay.new_zeros(shape)
    last = plan.sums[0].final
    ends = None if last is None or plan.init is None else (last.double() * plan.init).sum(-1).float()
    return grad, launch(
        around.decay_gradient_kernel,
        args.sequences * args.state_heads,
        4,
        grad_ptr=grad,
        queries_ptr=queries,
        keys_ptr=keys,
        ends_ptr=ends,
        cu_ptr=cu,
        heads=args.state_heads,
        group=args.heads // args.state_heads,
        batches=args.q.shape[0],
        rows=args.q.shape[2],
        tiles=queries.shape[0],
        flags=keys.shape[0],
        TOKEN=token,
        BLOCK=512,
    )


def backward(
    grad_out: Tensor | None,
    grad_kv: Tensor | None,
    grad_k_sum: Tensor | None,
    out: Tensor,
    den: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and, where needed, of decay, kv and k_sum (fp32, else empty)."""
    *fields, needs = rest
    args = Args(*fields)
    q, state_heads, d, e = args.q, args.state_heads, args.q.shape[3], args.v.shape[3]
    if not args.return_state:  # compiled code sends gradients of empty states
        grad_kv = grad_k_sum = None
    with _launch.device_of(q):
        plan = _backward_plan(grad_out, grad_kv, grad_k_sum, out, den, args, needs, _launch.capability(q))
        for step in plan.launches:
            step.run()
        grads = [_in_layout_of(x, grad) for x, grad in zip((args.q, args.k, args.v), plan.grads, strict=True)]
        decay, kv, k_sum = (out.new_empty(0, dtype=torch.float32) for _ in range(3))
        if args.decay is not None and needs[0]:
            decay, step = _decay_launch_of_gradient(plan, args, _call(args).cu_q)
            step.run()
            if decay.dim() == 2:
                decay = decay.double().sum(0)[None, :, None].float()
        if args.kv is not None and needs[1]:
            kv = _over_groups(_final_of(plan.sums[2])[..., : d * e].unflatten(-1, (d, e)), state_heads).contiguous()
        if args.k_sum is not None and needs[2]:
            k_sum = _over_groups(_final_of(plan.sums[1])[..., d * e :], state_heads).contiguous()
    return *grads, decay, kv, k_sum


def _final_of(made: _Sum) -> Tensor:
    assert made.final is not None
    return made.final


def _in_layout_of(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of ``x``, of each head or already of those of ``x``, in its dtype and in the layout of results."""
    if grad.shape == x.shape:
        return grad.to(x.dtype)
    return empty_like_layout(x, tuple(x.shape)).copy_(_over_groups(grad, x.shape[1]))


# --- what the compile gate builds ---


def compile_cases() -> Iterator[_launch.CompileCase]:
    """Every tile of the table, plain and in the heaviest calls that reach it; what the compiler sees twice, once."""
    return _launch.once(case for dtype, sizes, flags in _calls() for case in _cases(dtype, sizes, **flags))


def _calls() -> Iterator[tuple[torch.dtype, tuple[int, int], dict[str, Any]]]:
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    everything = {"decay": "token", "mask": True, "state": True}
    for dtype in (bf16, fp16, fp32):
        for size in (64, 128, 256):
            if size <= LARGEST[dtype]:
                yield dtype, (size, size), everything
    yield bf16, (128, 128), {}
    yield bf16, (128, 64), {"decay": "head", "normalize": False, "features": "identity", "shared": True}
    yield bf16, (64, 64), {"decay": "token", "state": True, "packed": True, "features": "squared_relu"}
    yield bf16, (64, 128), {"decay": "token", "mask": True, "state": True, "parts": True, "features": "exp"}
    yield bf16, (64, 64), {"causal": False, "mask": True, "state": True, "features": "relu"}
    yield fp16, (32, 32), {"causal": False, "features": "relu"}
    yield fp32, (32, 32), {"causal": False, "mask": True, "aligned": False}


def _cases(
    dtype: torch.dtype,
    sizes: tuple[int, int],
    features: str = "elu1",
    causal: bool = True,
    normalize: bool = True,
    decay: str = "",
    mask: bool = False,
    state: bool = False,
    packed: bool = False,
    parts: bool = False,
    shared: bool = False,
    aligned: bool = True,
) -> Iterator[_launch.CompileCase]:
    """The launches of one call, forward and backward, on tensors that have shapes only."""
    name = f"{str(dtype)[6:]} D={sizes[0]} E={sizes[1]} {features}"
    for flag in ("causal", "normalize", "mask", "state", "packed", "parts", "shared"):
        name += f" {flag}" if locals()[flag] else ""
    name += f" decay={decay}" if decay else ""
    heads, batch = (2, 1) if parts or packed else (16, 32)
    tokens = 2048
    d, e = sizes

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def main(count: int, size: int) -> Tensor:
        return empty(batch, count, tokens, size + (0 if aligned else 1), dtype=dtype)[..., :size]

    cu = empty(257, dtype=torch.int32) if packed else None
    sequences = 256 if packed else batch
    of_keys = heads // 2 if shared else heads
    args = Args(
        q=main(of_keys, d),
        k=main(of_keys, d),
        v=main(heads, e),
        decay={"": None, "head": empty(1, heads, 1), "token": empty(batch, heads, tokens)}[decay],
        kv=empty(sequences, heads, d, e) if state else None,
        k_sum=empty(sequences, heads, d) if state and normalize else None,
        key_mask=empty(batch, tokens, dtype=torch.bool) if mask else None,
        cu_q=cu,
        cu_k=None,
        features=features,
        causal=causal,
        normalize=normalize,
        return_state=state,
        scale=1.0,
        eps=1e-6,
    )

    def of(capability: tuple[int, int]) -> Iterator[_launch.CompileCase]:
        out, plan = _forward_plan(args, capability)
        den = empty(*out.shape[:3]) if normalize else empty(0)
        grad_kv = empty(sequences, heads, d, e) if state else None
        grad_k_sum = empty(sequences, heads, d) if state and normalize else None
        back = _backward_plan(out, grad_kv, grad_k_sum, out, den, args, [True] * 3, capability)
        for way, launches in (("forward", plan.launches), ("backward", back.launches)):
            for n, step in enumerate(launches):
                yield step.case(f"{name} {way} {n}")
        if decay:
            yield _decay_launch_of_gradient(back, args, cu)[1].case(name)

    old, hopper = list(of((8, 0))), list(of((9, 0)))  # by tiles, a launch more or less
    if old == hopper:
        yield from old
    else:
        yield from (replace(step, architectures=(80, 100)) for step in old)
        yield from (replace(step, name=f"{step.name} hopper", architectures=(90,)) for step in hopper)
