"""Multi-scale deformable attention of random sizes: the CPU kernel, and the CUDA kernels on the CPU."""

from __future__ import annotations

from typing import Any

import test_ms_deform_attn_cuda_host as cuda
import torch
from _ms_deform_attn_cases import case, whole
from _random_calls import check_on_cpu, cpu_calls, cuda_calls, hypothesis, st

import accel
from accel.testing import Case


@st.composite
def attentions(draw: Any, most: int) -> Case:
    """``most``: elements of all samples."""
    powers = st.sampled_from([1, 2, 4, 8, 16])
    shapes = draw(st.lists(st.tuples(powers, powers), min_size=1, max_size=4))
    listed = st.lists(st.integers(0, 5), min_size=len(shapes), max_size=len(shapes)).filter(any)
    points = draw(st.one_of(st.integers(1, 7), listed))
    queries, heads = draw(st.sampled_from([1, 2, 5, 33, 64, 65, 130])), draw(st.sampled_from([1, 2, 3, 8]))
    dim, batch = draw(st.sampled_from([1, 3, 4, 8, 16, 17, 32, 33, 40, 64, 128])), draw(st.integers(1, 3))
    count = sum(points) if isinstance(points, list) else points * len(shapes)
    hypothesis.assume(batch * queries * heads * dim * count <= most)
    more = {
        "points": points,
        "heads": heads,
        "dim": dim,
        "batch": batch,
        "reach": draw(st.sampled_from([0.3, 1.2, 3.0])),
    }
    return case(f"{shapes=}, {queries=}, {more}", shapes, queries, **more, change=whole(2), family="exact")


@cpu_calls(attentions(400_000))
def test_cpu(of: Case, dtype: torch.dtype, threads: int) -> None:
    check_on_cpu(accel.ms_deform_attn, of, dtype, threads)


@cuda_calls(attentions(60_000))
def test_cuda_kernels(of: Case) -> None:
    cuda.check(of, torch.float32)
