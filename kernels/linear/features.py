"""Features of a tile and their derivatives, and how a tile becomes an operand of a product."""

from __future__ import annotations

import triton
import triton.language as tl


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
def is_finite(x):
    return tl.abs(x) < float("inf")  # nor is a NaN


@triton.jit
def operand(x, CONFIG: tl.constexpr):
    """fp32 as an operand of a product, rounded to the nearest: tensor cores cut TF32 off, and the interpreter bf16."""
    if CONFIG.drop > 0:
        half: tl.constexpr = 1 << (CONFIG.drop - 1)
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + half) & (-1 << CONFIG.drop)).to(tl.float32, bitcast=True)
    return x.to(CONFIG.dot)


@triton.jit
def load_tile(
    ptr, t, seen, step, first, factor,
    KIND: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """``(tokens, BLOCK)`` from channel ``first`` on, as an operand, and whether a token held what is not finite, which
    is 0 in the operand, as is what is not seen.

    KIND: "feature" of q or k, "value", or "gradient", which is multiplied by a factor for each token; there a factor of
    NaN says that the token is not finite, and one of 0 that it is not to be looked at.
    """
    d = first + tl.arange(0, BLOCK)
    inside = seen[:, None] & (d < SIZE)[None, :]
    at = t.to(tl.int64)[:, None] * step + d[None, :]
    x = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == "gradient":
        bad = factor != factor
        x = tl.where((bad | (factor == 0.0))[:, None], 0.0, x * factor[:, None])
    else:
        if KIND == "feature":
            x = tl.where(inside, feature(x, CONFIG.features), 0.0)
        good = is_finite(x)
        x = tl.where(good, x, 0.0)
        bad = tl.max(tl.where(good, 0, 1), 1) > 0
    return operand(x, CONFIG), bad
