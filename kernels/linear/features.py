"""Features of a tile and their derivatives, and how a tile becomes an operand of a product."""

from __future__ import annotations

import triton
import triton.language as tl

from accel.kernels._logits import is_finite


@triton.jit
def feature(x, NAME: tl.constexpr):
    """A NaN stays one, which maximum and minimum would drop."""
    if NAME == "elu1":
        x = tl.where(x > 0.0, x + 1.0, tl.exp(tl.where(x > 0.0, 0.0, x)))
    elif NAME == "exp":
        x = tl.exp(x)
    elif NAME != "identity":
        x = tl.where(x < 0.0, 0.0, x)
        if NAME == "squared_relu":
            x *= x
    return x


@triton.jit
def slope(x, NAME: tl.constexpr):
    """The derivative of the feature."""
    if NAME == "elu1":
        found = tl.exp(tl.where(x > 0.0, 0.0, x))
    elif NAME == "exp":
        found = tl.exp(x)
    elif NAME == "relu":
        found = tl.where(x > 0.0, 1.0, 0.0)
    elif NAME == "squared_relu":
        found = tl.where(x > 0.0, 2.0 * x, 0.0)
    else:
        found = tl.full(x.shape, 1.0, tl.float32)
    return found


@triton.jit
def operand(x, CONFIG: tl.constexpr):
    """fp32 as an operand of a product, rounded to the nearest: tensor cores cut TF32 off, and the interpreter bf16."""
    if CONFIG.drop > 0:
        half: tl.constexpr = 1 << (CONFIG.drop - 1)
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + half) & (-1 << CONFIG.drop)).to(tl.float32, bitcast=True)
    return x.to(CONFIG.dot)


@triton.jit
def remainder(x, rounded, CONFIG: tl.constexpr):
    """What an operand lacks of ``x``, as a second operand."""
    return operand(x - rounded.to(tl.float32), CONFIG)


@triton.jit
def load_tile(
    ptr, t, seen, step, first, factor,
    KIND: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """``(tokens, BLOCK)`` from channel ``first`` on as an operand, and whether a token held what is not finite. Such a
    token is 0, as is what is not seen.

    KIND: "feature" of q or k, "value", or "gradient": there a factor of NaN says that the token is not finite, and one
    of 0 that it is not to be looked at.
    """
    d = first + tl.arange(0, BLOCK)
    inside = seen[:, None] & (d < SIZE)[None, :]
    at = t.to(tl.int64)[:, None] * step + d[None, :]
    x = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == "gradient":
        bad = factor != factor
        x = tl.where((bad | (factor == 0.0))[:, None], 0.0, x)
    else:
        if KIND == "feature":
            x = tl.where(inside, feature(x, CONFIG.features), 0.0)
        bad = tl.max(tl.where(is_finite(x), 0, 1), 1) > 0
        # by token: what depends on a reduction is not computed again by each warp, in the layout of an operand
        x = tl.where(bad[:, None], 0.0, x)
    return operand(x, CONFIG), bad
