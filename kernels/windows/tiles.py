"""How a window is cut into tiles, from sizes alone: chosen by the compile gate's registers and by byte counts, not yet
by measurement."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Tile:
    """How a window is cut: in one tile or in blocks, the tokens of either, and the warps of a program."""

    whole: bool
    block: int
    warps: int


def _blocks_of(block: int, warps: int, tokens: int) -> Tile:
    return Tile(False, min(block, max(16, triton.next_power_of_2(tokens))), warps)


def _small_blocks(tokens: int, head_dim: int, itemsize: int) -> Tile:
    """What every call can run on: fp32 products go without tensor cores and hold many operands in registers."""
    if itemsize == 4:
        return _blocks_of(32 if head_dim <= 32 else 16, 8, tokens)
    return _blocks_of(32 if head_dim <= 64 else 16, 4, tokens)


def forward_tile(tokens: int, head_dim: int, itemsize: int, cosine: bool, dropout: bool, deep: bool) -> Tile:
    """``deep``: the window has more than one token along z, which makes addressing dearer."""
    if itemsize == 4 or head_dim > 64:
        return _small_blocks(tokens, head_dim, itemsize)
    if tokens <= 64:
        return Tile(True, max(16, triton.next_power_of_2(tokens)), 4)
    if cosine or dropout or deep:
        return _small_blocks(tokens, head_dim, itemsize)
    return _blocks_of(64, 4, tokens)


def backward_tile(tokens: int, head_dim: int, itemsize: int, cosine: bool, dropout: bool, padded: bool) -> Tile:
    """A whole tile reads and writes 7·N·D elements, blocks 15·N·D; but it holds p, its gradient and the bias' at
    once. That leaves no registers for cosine with padding or dropout, and at 64 tokens none for dropout, wide or
    odd heads, or cosine with masked loads."""
    if itemsize == 4 or head_dim > 64:
        return _small_blocks(tokens, head_dim, itemsize)
    if tokens <= 16:
        return Tile(True, 16, 2)
    if tokens <= 32 and not (cosine and (dropout or padded)):
        return Tile(True, 32, 4)
    if tokens <= 64 and head_dim in (16, 32) and not dropout and not (cosine and (padded or tokens < 64)):
        return Tile(True, 64, 8 if cosine else 4)
    if cosine or dropout or head_dim > 32:
        return _small_blocks(tokens, head_dim, itemsize)
    return _blocks_of(64, 4, tokens)


def bias_tile(tokens: int, head_dim: int, itemsize: int) -> Tile:
    """For the bias gradient of windows that go in blocks; it holds one more tile than the other two kernels."""
    if itemsize == 2 and head_dim > 32:
        return _blocks_of(16, 2, tokens)
    return _small_blocks(tokens, head_dim, itemsize)
