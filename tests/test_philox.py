"""The keep bits of dropout, against the generator's published values."""

import pytest
import torch

from accel import philox


def test_known_answers():
    # Random123's test vectors for philox4x32-10: counter 0 and key 0; the first word of the result
    assert philox.random_bits(torch.zeros(1, dtype=torch.int64), 1).item() == 0x6627E8D5


def test_bits_depend_on_both_halves_of_the_seed():
    seeds = [0, 1, 1 << 32, -1, -(2**63), 2**63 - 1]
    drawn = [tuple(philox.random_bits(torch.tensor([s]), 64).tolist()) for s in seeds]
    assert len(set(drawn)) == len(seeds)
    assert all(0 <= bits < 2**32 for row in drawn for bits in row)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_share_kept(p):
    count = 200_000
    kept = philox.keep_mask(torch.tensor([2026]), (count,), p).double().mean().item()
    assert abs(kept - (1 - p)) <= 5 * (p * (1 - p) / count) ** 0.5


def test_position_is_row_major():
    seed = torch.tensor([11])
    assert torch.equal(philox.keep_mask(seed, (3, 5, 7), 0.5).flatten(), philox.keep_mask(seed, (105,), 0.5))


def test_seed_follows_torchs_generator():
    torch.manual_seed(3)
    first, second = (philox.new_seed(torch.device("cpu")) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(philox.new_seed(torch.device("cpu")), first)
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64
    assert first.shape == (1,)
