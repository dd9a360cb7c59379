"""The weights of gated attention from the logits of a tile, and the gradients of both."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from accel.kernels._logits import Head, keep, load_rows, logits, visible
from accel.kernels.linear.features import operand, remainder

# --- activations ---


@triton.jit
def _half_erfc(x):
    """erfc(x) / 2 to 4e-7 of itself: Numerical Recipes' Chebyshev fit of log(erfc(x) · (1 + x/2))."""
    a = tl.abs(x)
    t = 1.0 / (1.0 + 0.5 * a)
    p = 0.17087277 * t - 0.82215223
    p = p * t + 1.48851587
    p = p * t - 1.13520398
    p = p * t + 0.27886807
    p = p * t - 0.18628806
    p = p * t + 0.09678418
    p = p * t + 0.37409196
    p = p * t + 1.00002368
    p = p * t - 1.26551223
    y = 0.5 * t * tl.exp(p - a * a)
    return tl.where(x < 0.0, 1.0 - y, y)


@triton.jit
def _laplace_argument(x):
    return (x - 0.7071067811865476) * 2.5066282746310002  # (x − √½) · √(2π)


@triton.jit
def _sigmoid(x):
    """It, and its derivative without a difference."""
    e = tl.exp(-tl.abs(x))
    inverse = 1.0 / (1.0 + e)
    low = e * inverse
    return tl.where(x < 0.0, low, inverse), low * inverse


@triton.jit
def weight(x, NAME: tl.constexpr):
    """A NaN stays one, which a maximum would drop."""
    if NAME == "relu2":
        r = tl.where(x < 0.0, 0.0, x)
        w = r * r
    elif NAME == "laplace":
        w = _half_erfc(-_laplace_argument(x))
    else:
        s, _falling = _sigmoid(x)
        w = s * x if NAME == "silu" else s
    return w


@triton.jit
def slope(x, NAME: tl.constexpr):
    """The derivative of the weight."""
    if NAME == "relu2":
        found = 2.0 * tl.where(x < 0.0, 0.0, x)
    elif NAME == "laplace":
        z = _laplace_argument(x)
        found = 1.4142135623730951 * tl.exp(-z * z)
    else:
        s, falling = _sigmoid(x)
        found = s + x * falling if NAME == "silu" else falling
    return found


# --- memory and operands ---


@triton.jit
def rounded(x, CONFIG: tl.constexpr):
    """fp32 as an operand, of which what is NaN stays NaN."""
    y = operand(x, CONFIG)
    if CONFIG.drop > 0:
        y = tl.where(x == x, y, float("nan"))
    return y


@triton.jit
def load_channels(ptr, row, real, step, first, EDGE: tl.constexpr, CONFIG: tl.constexpr):
    """``(rows, block_e)`` from channel ``first`` on as an operand: 0 past the last channel and, with EDGE, in rows that
    are not ``real``."""
    e = first + tl.arange(0, CONFIG.block_e)
    at = row.to(tl.int64)[:, None] * step + e[None, :]
    if CONFIG.e % CONFIG.block_e != 0:
        x = tl.load(ptr + at, mask=real[:, None] & (e < CONFIG.e)[None, :], other=0.0)
    elif EDGE:
        x = tl.load(ptr + at, mask=real[:, None], other=0.0)
    else:
        x = tl.load(ptr + at)
    return x.to(CONFIG.dot)


@triton.jit
def store_channels(ptr, x, row, count, step, first, CONFIG: tl.constexpr):
    e = first + tl.arange(0, CONFIG.block_e)
    at = row.to(tl.int64)[:, None] * step + e[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=(row < count)[:, None] & (e < CONFIG.e)[None, :])


@triton.jit
def load_spared(ptr, bad_ptr, row, count, step, SPARED: tl.constexpr, EDGE: tl.constexpr, CONFIG: tl.constexpr):
    """Rows of q or k as operands of a product with gradients. With SPARED those that are not finite are 0, as some
    that may not see them would multiply them by 0: whoever may see them has a gradient of NaN."""
    d = tl.arange(0, CONFIG.block_d)
    real = row < count
    if SPARED:
        real &= tl.load(bad_ptr + row, mask=real, other=0.0) == 0.0
    at = row.to(tl.int64)[:, None] * step + d[None, :]
    if SPARED or EDGE or CONFIG.block_d != CONFIG.d:
        x = tl.load(ptr + at, mask=real[:, None] & (d < CONFIG.d)[None, :], other=0.0)
    else:
        x = tl.load(ptr + at)
    return x.to(CONFIG.dot)


# --- a tile ---


@triton.constexpr_function
def hides(PART, CONFIG):
    """Whether a step may meet pairs that weigh nothing: an added −∞ hides a key in a full tile too."""
    return PART or CONFIG.adds


@triton.jit
def seen_logits(a, b, i, j, i0, j0, head, CONFIG: tl.constexpr, PART: tl.constexpr):
    """Logits of the rows of ``a`` with those of ``b``, 0 in pairs that are hidden, and which pairs are not."""
    raw = tl.dot(a, tl.trans(b), input_precision="ieee")
    raw += raw * 0.0  # an infinite product becomes NaN: −∞ hides only where it was added
    x, _capped = logits(raw, i, j, i0, j0, head, CONFIG)
    seen = (i < head.call.queries) & (j < head.call.keys)
    if PART:
        seen = visible(i, j, i0, j0, head, CONFIG)
    if CONFIG.adds:
        seen &= x != float("-inf")
    if PART or CONFIG.adds:
        x = tl.where(seen, x, 0.0)
    return x, seen


@triton.jit
def row_number(ptr, i, head):
    """A number of each query, 0 past the last."""
    return tl.load(ptr + head.first + i, mask=i < head.call.queries, other=0.0)


@triton.jit
def weights(x, seen, i, head, upstream, CONFIG: tl.constexpr, HIDES: tl.constexpr):
    """Weights before dropout; those of hidden pairs are 0."""
    if CONFIG.by_row:
        w = tl.exp(x * row_number(upstream.factor, i, head) - row_number(upstream.top, i, head))
        if upstream.inverse is not None:
            w *= row_number(upstream.inverse, i, head)
    else:
        w = weight(x, CONFIG.activation)
    if HIDES:
        w = tl.where(seen, w, 0.0)
    return w


@triton.jit
def kept(i, j, head):
    """What dropout multiplies weights by."""
    return tl.where(keep(i, j, head), head.call.factors.keep_scale, 0.0)


class Starts(NamedTuple):
    """Where the rows of a head begin, and the steps from row to row. ``grad`` has the upstream gradients of the sums of
    values, ``rest`` what rounding left of them, or is None; ``key_first`` is how many keys stand before the head's."""

    q: Any
    k: Any
    v: Any
    grad: Any
    rest: Any
    q_step: Any
    k_step: Any
    v_step: Any
    grad_step: Any
    key_first: Any


@triton.jit
def _product_of_channels(a_ptr, b_ptr, a, b, real_a, real_b, a_step, b_step, sums, CONFIG: tl.constexpr):
    for first in tl.range(0, CONFIG.e, CONFIG.block_e):
        x = load_channels(a_ptr, a, real_a, a_step, first, True, CONFIG)
        y = load_channels(b_ptr, b, real_b, b_step, first, True, CONFIG)
        sums = tl.dot(x, tl.trans(y), sums, input_precision=CONFIG.precision)
    return sums


@triton.jit
def grad_of_weights(starts, i, j, head, TURNED: tl.constexpr, CONFIG: tl.constexpr):
    """Of queries i and keys j, before dropout: the products of upstream gradients and values; keys × queries if
    TURNED."""
    _q, _k, v, grad, rest, _q_step, _k_step, v_step, grad_step, _key_first = starts
    real_i = i < head.call.queries
    real_j = j < head.call.keys
    if TURNED:
        sums = tl.zeros((j.shape[0], i.shape[0]), tl.float32)
        sums = _product_of_channels(v, grad, j, i, real_j, real_i, v_step, grad_step, sums, CONFIG)
        if rest is not None:
            sums = _product_of_channels(v, rest, j, i, real_j, real_i, v_step, grad_step, sums, CONFIG)
    else:
        sums = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
        sums = _product_of_channels(grad, v, i, j, real_i, real_j, grad_step, v_step, sums, CONFIG)
        if rest is not None:
            sums = _product_of_channels(rest, v, i, j, real_i, real_j, grad_step, v_step, sums, CONFIG)
    return sums


@triton.jit
def logit_gradients(x, seen, grad_w, i, j, head, upstream, CONFIG: tl.constexpr, HIDES: tl.constexpr):
    """Gradients of logits from those of the weights after dropout; 0 in hidden pairs."""
    if head.call.inputs.seed is not None:
        grad_w *= kept(i, j, head)
    if CONFIG.by_row:
        grad = grad_w - row_number(upstream.delta, i, head)
        grad *= weights(x, seen, i, head, upstream, CONFIG, False) * row_number(upstream.factor, i, head)
    else:
        grad = grad_w * slope(x, CONFIG.activation)
    if HIDES:
        grad = tl.where(seen, grad, 0.0)
    return grad


@triton.jit
def add_product(grad, rows, sums, CONFIG: tl.constexpr):
    """Add the product of gradients of logits and rows of q or k. Of few pairs, as a window has them, one may be most of
    the sum: with ``CONFIG.split`` the gradients go as two operands."""
    part = rounded(grad, CONFIG)
    sums = tl.dot(part, rows, sums, input_precision=CONFIG.precision)
    if CONFIG.split:
        sums = tl.dot(remainder(grad, part, CONFIG), rows, sums, input_precision=CONFIG.precision)
    return sums


# --- for the gradients of biases ---


@triton.jit
def tile_gradient(i0, j0, batch, index, rows, mask_at, call, sides, upstream, CONFIG: tl.constexpr):
    """Gradient of the logits of the tile at ``(i0, j0)`` of a head, 0 in hidden pairs."""
    UNIT: tl.constexpr = CONFIG.unit
    i = i0 + tl.arange(0, CONFIG.block_m)
    j = j0 + tl.arange(0, CONFIG.block_n)
    q, k, v, grad, group = sides
    bias_at = batch * call.bias.b + index * call.bias.h
    head = Head(call, index, rows, bias_at, mask_at, (batch * call.heads + index) * call.queries)
    grad_first = (batch * grad.b + index * grad.h) * UNIT
    rest = upstream.rest
    if rest is not None:
        rest += grad_first
    starts = Starts(
        q=q.ptr + (batch * q.b + index * q.h) * UNIT,
        k=k.ptr + (batch * k.b + index // group * k.h) * UNIT,
        v=v.ptr + (batch * v.b + index // group * v.h) * UNIT,
        grad=grad.ptr + grad_first,
        rest=rest,
        q_step=q.t * UNIT,
        k_step=k.t * UNIT,
        v_step=v.t * UNIT,
        grad_step=grad.t * UNIT,
        key_first=0,
    )
    grad_w = grad_of_weights(starts, i, j, head, False, CONFIG)
    q = load_rows(starts.q, i, call.queries, starts.q_step, CONFIG.d, CONFIG.block_d, True, CONFIG.given)
    k = load_rows(starts.k, j, call.keys, starts.k_step, CONFIG.d, CONFIG.block_d, True, CONFIG.given)
    x, seen = seen_logits(q, k, i[:, None], j[None, :], i0, j0, head, CONFIG, True)
    return logit_gradients(x, seen, grad_w, i[:, None], j[None, :], head, upstream, CONFIG, True)
