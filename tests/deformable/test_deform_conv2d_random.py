"""Deformable convolutions of random sizes: the CPU kernel, and the CUDA kernel's tiles on the CPU."""

from __future__ import annotations

from typing import Any

import _cuda_host as host
import test_deform_conv2d_forward_cuda_host as cuda
import torch
from _deform_conv2d_cases import case, on_integers
from _random_calls import check_on_cpu, cpu_calls, cuda_calls, exactly, hypothesis, st, window

import accel
from accel.ops.deformable.deform_conv2d import OP
from accel.testing import Case


@st.composite
def convolutions(draw: Any, of_group: tuple[int, ...], out_of_group: tuple[int, ...], shared: int, most: int) -> Case:
    """``of_group`` and ``out_of_group``: channels of a weight group, in and out; ``shared``: what channels that share
    their offsets are a multiple of; ``most``: products of a channel."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, out = groups * draw(st.sampled_from(of_group)), groups * draw(st.sampled_from(out_of_group))
    sharing = [n for n in (1, 2, 3, 4) if channels % (n * shared) == 0]
    (size, kernel, more), batch = window(draw), draw(st.integers(1, 3))
    outs = [n + 2 * p for n, p in zip(size, more["padding"], strict=True)]  # at most
    hypothesis.assume(batch * outs[0] * outs[1] * kernel[0] * kernel[1] * (channels // groups) * out <= most)
    more |= {"batch": batch, "groups": groups, "offset_groups": draw(st.sampled_from(sharing))}
    more |= {name: draw(st.booleans()) for name in ("bias", "mask", "last")}
    name = f"{channels} to {out} channels, {size=}, {kernel=}, {more}"
    return case(name, (channels, out), size, kernel, **more, change=on_integers, family="exact")


@cpu_calls(convolutions((1, 2, 3, 5, 8, 16, 17, 40), (1, 2, 7, 8, 15, 16, 33, 64), 1, 4_000_000))
def test_cpu(of: Case, dtype: torch.dtype, threads: int) -> None:
    check_on_cpu(accel.deform_conv2d, of, dtype, threads)


@cuda_calls(
    convolutions((64, 64, 128), (8, 16, 40, 72, 128, 136, 256), 64, 60_000_000),
    st.sampled_from(cuda.HALF),
    st.sampled_from([0, *cuda.TILES]),
)
def test_cuda_tiles(of: Case, dtype: torch.dtype, tile: int) -> None:
    args = cuda.prepared(of, dtype)
    groups = args.input.shape[1] // args.weight.shape[1]
    hypothesis.assume(tile != 2 or -(-args.weight.shape[0] // groups // 128) % 2 == 0)
    exact = [x.double() if isinstance(x, torch.Tensor) else x for x in args]
    exactly(cuda.forward(args, tile=tile, landing=host.EARLY), OP.backend("reference").forward(*exact), "output")
