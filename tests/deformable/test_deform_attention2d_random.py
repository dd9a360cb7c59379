"""Depthwise deformable attention of random sizes: the CPU kernel, and the CUDA kernels on the CPU."""

from __future__ import annotations

import functools
from typing import Any

import test_deform_attention2d_cuda_host as cuda
import torch
from _deform_attention2d_cases import case, whole
from _random_calls import check_on_cpu, cpu_calls, cuda_calls, hypothesis, st, window

import accel
from accel.testing import Case


@st.composite
def attentions(draw: Any, most: int) -> Case:
    """``most``: elements of all samples."""
    size, kernel, more = window(draw)
    groups, of_group = draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 4, 8, 16, 17, 32, 40]))
    batch = draw(st.integers(1, 3))
    hypothesis.assume(batch * size[0] * size[1] * kernel[0] * kernel[1] * groups * of_group <= most)
    centred = kernel[0] % 2 and kernel[1] % 2 and kernel != (1, 1)
    more |= {"kernel_size": kernel, "groups": groups, "group_channels": of_group, "batch": batch}
    more |= {
        "remove_center": bool(centred and draw(st.booleans())),
        "offset_scale": draw(st.sampled_from([1.0, 0.5, 2.0])),
    }
    return case(f"{size=}, {more}", size, **more, change=functools.partial(whole, 2), family="exact")


@cpu_calls(attentions(400_000))
def test_cpu(of: Case, dtype: torch.dtype, threads: int) -> None:
    check_on_cpu(accel.deform_attention2d, of, dtype, threads)


@cuda_calls(attentions(60_000))
def test_cuda_kernels(of: Case) -> None:
    cuda.check(of, torch.float32)
