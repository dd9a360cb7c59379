"""The keep bits of dropout: Philox4x32-10 (Salmon et al., 2011) of a seed and a linear position.

Every backend draws the same bits, so that backends can be compared and activation checkpointing repeats them.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def new_seed(device: torch.device) -> torch.Tensor:
    """One int64 seed drawn from torch's generator of ``device``, shape ``(1,)``."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def threshold(dropout_p: float) -> int:
    """A position is kept when its 32 random bits, as an unsigned number, are at least this."""
    return int(dropout_p * 2.0**32)


def random_bits(seed: torch.Tensor, count: int) -> torch.Tensor:
    """The bits at positions ``0 .. count-1``, shape ``(count,)``."""
    return bits_at(seed, torch.arange(count, dtype=torch.int64, device=seed.device))


def bits_at(seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The first 32-bit word of Philox at each int64 ``position``, as int64 in ``[0, 2**32)``."""
    c0, c1 = position & _MASK, (position >> 32) & _MASK
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        a, b = c0 * _ROUND_A, c2 * _ROUND_B  # wraps modulo 2**64; the bits wanted survive
        c0, c1, c2, c3 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK, ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0


def keep_mask(seed: torch.Tensor, shape: tuple[int, ...], dropout_p: float) -> torch.Tensor:
    """Boolean mask of ``shape``, True where the element stays; position is row-major in ``shape``."""
    count = 1
    for n in shape:
        count *= n
    return (random_bits(seed, count) >= threshold(dropout_p)).view(shape)
