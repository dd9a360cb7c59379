"""Gated attention of random sizes and rules: the CPU kernel, on values whose results are exact."""

from __future__ import annotations

from typing import Any

import torch
from _gau_cases import case, integers
from _random_calls import calls, check_on_cpu, cpu_calls, hypothesis, st

import accel
from accel import BlockCausal, PrefixLM, testing
from accel.testing import Case


@st.composite
def attentions(draw: Any) -> Case:
    sizes = st.sampled_from([1, 2, 5, 31, 33, 64, 65, 127, 130, 257, 300])
    T, S = draw(sizes), draw(sizes)
    heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 1, 2]))
    more: dict[str, Any] = {
        "B": draw(st.integers(1, 3)),
        "H": heads * group,
        "Hkv": heads,
        "D": 4 * draw(st.integers(1, 9)),
        "E": 8 * draw(st.sampled_from([1, 2, 3, 5, 15, 16, 17, 33])),
        "gate": draw(st.booleans()),
        "causal": draw(st.sampled_from([False, True, "top_left"])),
        "window": draw(st.sampled_from([None, (0, 0), (7, -1), (70, 3), (-1, 40)])),
        "pattern": draw(st.sampled_from([None, None, PrefixLM(19), BlockCausal(37)])),
        "mask": draw(st.sampled_from([None, (T, S), (1, 1, 1, S)])),
    }
    pairs = more["B"] * more["H"] * T * S
    hypothesis.assume(pairs * (more["D"] + more["E"]) <= 20_000_000)
    return case(f"{T=}, {S=}, {more}", T, S, **more, scale=0.5, change=integers, family="exact")


@cpu_calls(attentions(), 200)
def test_cpu(of: Case, dtype: torch.dtype, threads: int) -> None:
    check_on_cpu(accel.gau_attention, of, dtype, threads)


@calls(60)
@hypothesis.given(attentions())
def test_pairs_of_bf16(of: Case) -> None:
    with testing.at_level("avx512_bf16"):
        check_on_cpu(accel.gau_attention, of, torch.bfloat16, 1)
