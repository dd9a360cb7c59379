"""What surrounds the sweeps: sums of decay, states of parts one after the other, rows that others made NaN, and what
the gradients start from."""

from __future__ import annotations

import triton
import triton.language as tl

from accel.kernels.linear.arguments import FAR, LAUNCH_INTS
from accel.kernels.linear.features import is_finite
from accel.kernels.linear.sweep import FLOOR, bounds

_FLOOR: tl.constexpr = tl.constexpr(FLOOR)
_FAR: tl.constexpr = tl.constexpr(FAR)


@triton.jit(do_not_specialize=LAUNCH_INTS)
def decay_kernel(sums_ptr, decay_ptr, cu_ptr, heads, batches, columns, parts, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """The sums of decay from the start of a chunk, each as two fp32 numbers, ``(2, B, Hs, T)``.

    They are made in fp64, so that −0.001 is not lost beside −100: differences of sums are what is used.
    """
    part = tl.program_id(0) % parts
    unit = tl.program_id(0) // parts
    head = unit % heads
    n = unit // heads
    batch = n.to(tl.int64)
    if cu_ptr is not None:
        batch = batch * 0
    start, stop = bounds(cu_ptr, n, columns)
    at = (batch * heads + head) * columns
    plane = batches.to(tl.int64) * heads * columns
    for t0 in tl.range(start + part * BLOCK, stop, parts * BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        x = tl.load(decay_ptr + at + t, mask=t < stop, other=0.0)
        x = tl.where(x < _FLOOR, _FLOOR, x).to(tl.float64)
        total = tl.reshape(tl.cumsum(tl.reshape(x, (BLOCK // CHUNK, CHUNK)), 1), (BLOCK,))
        high = total.to(tl.float32)
        low = (total - high.to(tl.float64)).to(tl.float32)
        tl.store(sums_ptr + at + t, high, mask=t < stop)
        tl.store(sums_ptr + plane + at + t, low, mask=t < stop)


@triton.jit(do_not_specialize=LAUNCH_INTS)
def prefix_kernel(
    states_ptr, totals_ptr, flags_ptr, init_ptr, final_ptr, first_ptr, parts, flags, size, blocks,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of ``size`` numbers of each part's state make those of the state before the part, and after the last one the
    final state; and of the first tokens of the parts that are not finite the first."""
    owner = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    first = tl.program_id(0) * 0 + _FAR
    for i in tl.range(0, flags):
        first = tl.minimum(first, tl.load(flags_ptr + owner * flags + i))
    tl.store(first_ptr + owner, first, mask=block == 0)
    state = tl.zeros((BLOCK,), tl.float32)
    if init_ptr is not None:
        state = tl.load(init_ptr + owner * size + at, mask=inside, other=0.0)
    for step in tl.range(0, parts):
        part = step
        if REVERSE:
            part = parts - 1 - step
        place = states_ptr + (owner * parts + part) * size + at
        added = tl.load(place, mask=inside, other=0.0)
        tl.store(place, state, mask=inside)
        state = state * tl.exp(tl.load(totals_ptr + owner * parts + part)) + added
    state = tl.where(first < _FAR, float("nan"), state)
    tl.store(final_ptr + owner * size + at, state, mask=inside)


@triton.jit(do_not_specialize=LAUNCH_INTS)
def spread_kernel(
    out_ptr, states_ptr, flags_ptr, cu_ptr, out_b, out_h, out_t, heads, tiles, rows, group, size,
    UNIT: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Make NaN, in all channels, the rows and the state that see a token of which one tile found that it is not
    finite."""
    unit = tl.program_id(0)
    head = unit % heads
    n = unit // heads
    first = tl.program_id(0) * 0 + _FAR
    for tile in tl.range(0, tiles):
        first = tl.minimum(first, tl.load(flags_ptr + unit.to(tl.int64) * tiles + tile))
    if first < _FAR:
        start, stop = bounds(cu_ptr, n, rows)
        batch = n.to(tl.int64)
        if cu_ptr is not None:
            batch = batch * 0
        place = out_ptr + (batch * out_b + head.to(tl.int64) * out_h) * UNIT
        e = tl.arange(0, BLOCK_E)
        for t0 in tl.range(tl.maximum(start, first), stop, BLOCK):
            t = t0 + tl.arange(0, BLOCK)
            inside = (t < stop)[:, None] & (e < E)[None, :]
            lost = tl.full((BLOCK, BLOCK_E), float("nan"), tl.float32).to(out_ptr.dtype.element_ty)
            tl.store(place + t.to(tl.int64)[:, None] * (out_t * UNIT) + e[None, :], lost, mask=inside)
        if states_ptr is not None:  # noqa: SIM102  both sides of "and" are compiled
            if head % group == 0:
                owner = n.to(tl.int64) * (heads // group) + head // group
                for at in tl.range(0, size, 1024):
                    d = at + tl.arange(0, 1024)
                    lost = tl.full((1024,), float("nan"), tl.float32)
                    tl.store(states_ptr + owner * size + d, lost, mask=d < size)


@triton.jit(do_not_specialize=LAUNCH_INTS)
def factors_kernel(
    factor_ptr, constant_ptr, own_ptr, grad_ptr, out_ptr, v_ptr, den_ptr, grad_b, grad_h, grad_t, out_b, out_h, out_t,
    v_b, v_h, v_t, v_group, heads, rows, batches, numbers, UNIT: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What each row's upstream gradient is to be multiplied by, −(output · gradient) of the row, and what its own value
    gives to the gradient of the weight.

    The factor is 0 where the row's output is not finite, which has no gradient, and NaN where the gradient is not.
    """
    tiles = tl.cdiv(rows, BLOCK)
    t = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    unit = (tl.program_id(0) // tiles).to(tl.int64)
    head = unit % heads
    batch = unit // heads
    e = tl.arange(0, BLOCK_E)
    inside = (t < rows)[:, None] & (e < E)[None, :]
    out_at = (batch * out_b + head * out_h) * UNIT + t.to(tl.int64)[:, None] * (out_t * UNIT) + e[None, :]
    grad_at = (batch * grad_b + head * grad_h) * UNIT + t.to(tl.int64)[:, None] * (grad_t * UNIT) + e[None, :]
    out = tl.load(out_ptr + out_at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + grad_at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.full((BLOCK,), 0.0, tl.float32) + numbers.scale
    place = unit * rows + t
    if den_ptr is not None:
        den = tl.load(den_ptr + place, mask=t < rows, other=0.0)
        factor = tl.where(den == 0.0, 0.0, factor / tl.where(den == 0.0, 1.0, den))
    constant = -tl.sum(out * grad, 1)
    seen = tl.max(tl.where(is_finite(out), 0, 1), 1) == 0
    bad = tl.max(tl.where(is_finite(grad), 0, 1), 1) > 0
    bad = (bad | (is_finite(constant) == 0)) & (factor != 0.0)
    factor = tl.where(seen, tl.where(bad, float("nan"), factor), 0.0)
    tl.store(factor_ptr + place, factor, mask=t < rows)
    if constant_ptr is not None:
        tl.store(constant_ptr + place, tl.where(seen & (bad == 0), constant, 0.0), mask=t < rows)
    if own_ptr is not None:
        v_at = (batch * v_b + head // v_group * v_h) * UNIT + t.to(tl.int64)[:, None] * (v_t * UNIT) + e[None, :]
        own = tl.sum(tl.load(v_ptr + v_at, mask=inside, other=0.0).to(tl.float32) * grad, 1)
        if constant_ptr is not None:
            own += constant
        own *= factor
        tl.store(own_ptr + place, tl.where(is_finite(own), own, 0.0), mask=t < rows)  # a masked value may be NaN


@triton.jit
def _of_group(dots_ptr, t, inside, batch, head, heads, group, batches, rows, tiles):
    """The sum over tiles and the heads of a group of ``(tiles, B, H, T)``, in fp64."""
    total = tl.zeros(t.shape, tl.float64)
    for i in tl.range(0, tiles * group):
        unit = (i // group * batches + batch) * heads * group + head * group + i % group
        total += tl.load(dots_ptr + unit * rows + t, mask=inside, other=0.0).to(tl.float64)
    return total


@triton.jit(do_not_specialize=LAUNCH_INTS)
def decay_gradient_kernel(
    grad_ptr, queries_ptr, keys_ptr, starts_ptr, cu_ptr, heads, group, batches, rows, parts, tiles, flags,
    TOKEN: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of decay from the products of features with their gradients, a part of a sequence a program.

    A token's decay is in the weight of each query from it on with each key before it. What keys before it give less
    what queries before it give cancels but for those, summed from the start of a part, where pairs on both sides of it
    enter: the state there times its gradient. Summed from the start of a long sequence it would drift. In fp64, as
    little is left of much. Not from the end, where the last keys enter the final state whole, however heavy decay is.
    ``tiles`` and ``flags``: how many tiles the products come in.
    """
    part = tl.program_id(0) % parts
    unit = tl.program_id(0) // parts
    head = unit % heads
    n = unit // heads
    start, stop = bounds(cu_ptr, n, rows)
    batch = n.to(tl.int64)
    if cu_ptr is not None:
        batch = batch * 0
    each = tl.cdiv(tl.cdiv(stop - start, parts), CHUNK) * CHUNK
    start = tl.minimum(start + part * each, stop)
    stop = tl.minimum(start + each, stop)
    carry = tl.sum(tl.zeros((BLOCK,), tl.float64), 0)
    if starts_ptr is not None:
        carry += tl.load(starts_ptr + tl.program_id(0)).to(tl.float64)
    total = carry * 0.0
    for t0 in tl.range(start, stop, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        inside = t < stop
        passed = inside & (t > start)
        added = _of_group(keys_ptr, t - 1, passed, batch, head, heads, group, batches, rows, flags)
        added -= _of_group(queries_ptr, t - 1, passed, batch, head, heads, group, batches, rows, tiles)
        found = tl.cumsum(added, 0) + carry
        carry += tl.sum(added, 0)
        if TOKEN:
            tl.store(grad_ptr + (batch * heads + head) * rows + t, found.to(tl.float32), mask=inside)
        else:
            total += tl.sum(tl.where(inside, found, 0.0), 0)
    if not TOKEN:
        tl.store(grad_ptr + tl.program_id(0), total.to(tl.float32))
