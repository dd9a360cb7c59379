"""Products of random sizes and blocks, of integers whose sums are exact: no tolerance can hide a column or a scale."""

import pytest
import torch
from _fp8_cases import DTYPES, exact_product
from _random_calls import calls, exactly, hypothesis, st

import accel
from accel import testing
from accel.testing.values import LEVELS, at_level

SIZES = st.one_of(st.integers(1, 20), st.integers(1, 300), st.sampled_from([8, 9, 64, 65, 128, 129, 256, 257]))
BLOCKS = [((1, 128), (128, 128)), ((128, 128), (1, 128)), ((1, 32), (1, 32)), ((1, None), (1, None)), ((1, 1), (1, 1))]


@st.composite
def products(draw):
    """Arguments of a call, and the blocks of its scales."""
    M, N, K = draw(SIZES), draw(SIZES), draw(SIZES)
    a_block, b_block = draw(st.sampled_from(BLOCKS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def scales(shape, block):
        counts = [-(-n // (b or n)) for n, b in zip(shape, block, strict=True)]
        return 2.0 ** torch.randint(-2, 3, counts, generator=generator)

    a, b = [torch.randint(-8, 9, shape, generator=generator).float() for shape in ((M, K), (N, K))]
    plain = draw(st.sampled_from([None, None, torch.float32, torch.bfloat16, torch.float16]))
    b = b.to(draw(st.sampled_from(DTYPES)))
    given = {
        "a": a.to(plain or draw(st.sampled_from(DTYPES))),
        "a_scale": None if plain else scales((M, K), a_block),
        "b": b.t().contiguous().t() if draw(st.booleans()) else b,
        "b_scale": scales((N, K), b_block),
        "bias": torch.randint(-8, 9, (N,), generator=generator).float() if draw(st.booleans()) else None,
        "out_dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    }
    return given, a_block, b_block


@pytest.mark.parametrize("level", LEVELS)
def test_cpu(level):
    @calls(150)
    @hypothesis.given(products(), st.sampled_from([1, 2, 5]))
    def check(product, threads):
        given, a_block, b_block = product
        with testing.threads(threads):
            got = accel.fp8_gemm(**given, backend="cpu")
        exactly(got, exact_product(given, a_block, b_block), f"{[tuple(given[x].shape) for x in 'ab']}")

    with at_level(level):
        check()
