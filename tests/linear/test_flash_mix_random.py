"""Mixed chunk attention of random sizes: the CPU kernel, on values whose results are exact."""

from __future__ import annotations

from typing import Any

import torch
from _flash_cases import case, integers
from _random_calls import calls, check_on_cpu, cpu_calls, hypothesis, st

import accel
from accel import testing
from accel.testing import Case


def few_integers(tensors: dict[str, torch.Tensor]) -> None:
    """So few linear keys that sums over all of them are exact in bf16, too, in which kernels may multiply them."""
    integers(tensors)
    keys = tensors["lin_k"]
    keys.clamp_(-1, 1)
    keys[:, torch.arange(keys.shape[1]) % 8 != 3] = 0.0


@st.composite
def mixes(draw: Any) -> Case:
    T = draw(st.sampled_from([1, 2, 5, 31, 33, 64, 65, 127, 130, 257, 300]))
    chunk = draw(st.sampled_from([1, 3, 16, 33, 64, 100, 256, 290]))
    causal = draw(st.booleans())
    more: dict[str, Any] = {
        "B": draw(st.integers(1, 3)),
        "s": draw(st.sampled_from([2, 5, 8, 33])),
        "s2": draw(st.sampled_from([1, 3, 8, 17])),
        "E": draw(st.sampled_from([1, 7, 8, 40, 129, 264])),
        "gate": draw(st.booleans()),
        "mask": draw(st.booleans()),
        "causal": causal,
        "state": causal and draw(st.booleans()),
    }
    hypothesis.assume(more["B"] * T * (min(chunk, T) + more["s2"]) * more["E"] <= 4_000_000)
    return case(
        f"{T=}, {chunk=}, {more}", T, chunk, **more, quad_scale=0.5, lin_scale=0.25, change=few_integers, family="exact"
    )


@cpu_calls(mixes(), 80)
def test_cpu(of: Case, dtype: torch.dtype, threads: int) -> None:
    check_on_cpu(accel.flash_mix, of, dtype, threads)


@calls(40)
@hypothesis.given(mixes())
def test_pairs_of_bf16(of: Case) -> None:
    with testing.at_level("avx512_bf16"):
        check_on_cpu(accel.flash_mix, of, torch.bfloat16, 1)
