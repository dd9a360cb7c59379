"""Grouped products of random sizes, of integers whose sums are exact: no tolerance can hide a row or an expert."""

import pytest
import torch
from _expert_cases import experts_case, linear_case
from _random_calls import check_on_cpu, cpu_calls, st

import accel
from accel import dispatch, testing


@st.composite
def linears(draw):
    counts = draw(
        st.lists(st.one_of(st.integers(0, 12), st.sampled_from([0, 15, 16, 17, 48, 130])), min_size=1, max_size=5)
    )
    sizes = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 128]))
    return linear_case(
        "random",
        counts if sum(counts) else [*counts, 1],
        draw(sizes),
        draw(sizes),
        tail=draw(st.integers(0, 3)),
        transposed=draw(st.booleans()),
        bias=draw(st.booleans()),
        whole=True,
    )


@st.composite
def experts(draw):
    return experts_case(
        "random",
        T=draw(st.integers(1, 60)),
        K=draw(st.integers(1, 3)),
        X=draw(st.integers(1, 9)),
        C=draw(st.integers(1, 40)),
        I=draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 70, 130]))),
        routing=draw(st.sampled_from(["any", "elsewhere", "one", "skewed"])),
        activation="relu",
        gated=draw(st.booleans()),
        layout=draw(st.sampled_from(["concatenated", "interleaved"])),
        transposed=draw(st.booleans()),
        bias=draw(st.booleans()),
        whole=True,
    )


def check_experts(of, dtype, threads):
    """bf16 holds no activation above 256: fp32 in its place."""
    check_on_cpu(accel.moe_experts, of, torch.float32 if dtype == torch.bfloat16 else dtype, threads)


@cpu_calls(linears(), 40)
def test_linears(of, dtype, threads):
    check_on_cpu(accel.grouped_linear, of, dtype, threads)


@cpu_calls(experts(), 40)
def test_experts(of, dtype, threads):
    check_experts(of, dtype, threads)


@pytest.fixture(params=testing.LEVELS)
def level(request):
    extension, missing = dispatch.leaf("accel._C")
    if extension is None:
        pytest.skip(missing)
    info = extension.build_info()
    if testing.LEVELS.index(request.param) > testing.LEVELS.index(info["isa_highest"]):
        pytest.skip(f"this processor has {info['isa_highest']}")
    extension.set_isa(request.param)
    yield request.param
    extension.set_isa(info["isa"])


@pytest.mark.slow
def test_many_linears_at_every_level(level):
    cpu_calls(linears(), 800)(lambda of, dtype, threads: check_on_cpu(accel.grouped_linear, of, dtype, threads))()


@pytest.mark.slow
def test_many_experts_at_every_level(level):
    cpu_calls(experts(), 800)(check_experts)()
