"""Linear attention of random sizes, heads and packed lengths, on whole numbers: results and gradients are exact."""

from __future__ import annotations

import torch
from _linear_cases import case, integers
from _random_calls import calls, check_on_cpu, cpu_calls, hypothesis

import accel
from accel import testing

st = hypothesis.strategies

HEADS = [(1, 1, 1), (2, 2, 2), (4, 2, 2), (3, 1, 1), (1, 1, 3), (2, 2, 4), (2, 4, 4), (4, 1, 2), (4, 4, 2)]


def small(tensors):
    integers(tensors)
    if "log_decay" in tensors:
        tensors["log_decay"].zero_()  # every other one makes fractions


@st.composite
def call(draw):
    """Sums of up to 600 products of whole numbers up to 2, with them once more in the gradients: below 2^24."""
    causal = draw(st.booleans())
    heads, D, E = draw(st.sampled_from(HEADS)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    features = draw(st.sampled_from(["identity", "relu", "squared_relu"]))
    given = {"H": heads, "D": D, "E": E, "causal": causal, "normalize": False, "feature_map": features}
    given["family"] = "exact"
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, 90), min_size=1, max_size=5).filter(any))
        given |= {"B": 1, "lengths": lengths}
        T = S = sum(lengths)
        if not causal and draw(st.booleans()):
            given["lengths_k"] = draw(st.permutations([n + 1 for n in lengths]))
            S = sum(given["lengths_k"])
    else:
        T = draw(st.sampled_from([draw(st.integers(1, 140)), draw(st.integers(500, 600))]))
        S = T if causal else draw(st.sampled_from([draw(st.integers(1, 140)), draw(st.integers(500, 600))]))
        given |= {"B": draw(st.integers(1, 2)), "mask": draw(st.booleans())}
    if causal:
        given["decay"] = draw(st.sampled_from([None, "head", "token"]))
    return case("random", T, S, change=small, **given)


@cpu_calls(call(), 200)
def test_cpu(of, dtype, threads):
    check_on_cpu(accel.linear_attention, of, dtype, threads)


@calls(40)
@hypothesis.given(call())
def test_pairs_of_bf16(of):
    with testing.at_level("avx512_bf16"):
        check_on_cpu(accel.linear_attention, of, torch.bfloat16, 1)
