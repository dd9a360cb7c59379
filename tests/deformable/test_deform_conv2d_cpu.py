"""What is peculiar to the CPU kernel of deformable convolution: rounds of tasks, memory, checks of the native op."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

import accel
from accel import dispatch, testing
from accel.ops.deformable.deform_conv2d import OP


def layer(batch, channels, size, out, groups=1, offset_groups=1, seed=0):
    """Positions in steps of 1/16, which fp32 has exactly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    spots = (batch, 9 * offset_groups, *size)
    return {
        "input": normal(batch, channels, *size),
        "offset": (normal(batch, 18 * offset_groups, *size) * 32).round() / 16,
        "weight": normal(out, channels // groups, 3, 3) / (9 * channels // groups) ** 0.5,
        "mask": torch.sigmoid(normal(*spots)),
    }


@pytest.fixture(autouse=True)
def _built():
    testing.require(accel.deform_conv2d, "cpu", layer(1, 8, (4, 4), 8), {"padding": 1})


# Tasks of the backward run in rounds where the parts of offset gradients would take too much memory: of images (first
# case), of channels (second), and of channels whose offset group spans two rounds (third).
ROUNDS = {
    "images": (5, 16, (128, 128), 8, 1, 1),
    "channels": (2, 40, (120, 125), 20, 20, 4),
    "across": (1, 44, (120, 125), 11, 11, 1),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_rounds_of_tasks(name):
    tensors = layer(*ROUNDS[name])
    grad_out = testing.random_like(torch.empty(ROUNDS[name][0], ROUNDS[name][3], *ROUNDS[name][2]))
    want = testing.run(accel.deform_conv2d, testing.double(tensors), {"padding": 1}, "reference",
                       grad_out=grad_out.double())  # fmt: skip
    results = []
    for threads in (1, 3):
        with testing.threads(threads):
            results.append(testing.run(accel.deform_conv2d, tensors, {"padding": 1}, "cpu", grad_out=grad_out))
    for part, expected in want.named().items():
        family = "deform_conv" if part == "out" else "deform_conv_grad"
        testing.assert_close(results[0].named()[part], expected, family, torch.float32, part)
        testing.assert_same(results[1].named()[part], results[0].named()[part], f"{part} with 3 threads")


def memory_beside_arguments(channels, size):
    """MiB that a call takes at its worst moment, and those of its results."""
    from accel.benchmarks._machine import peak_memory

    batch = 4
    tensors = layer(batch, channels, size, channels)
    for x in tensors.values():
        x.requires_grad_()
    grad_out = torch.randn(batch, channels, *size)

    def call():
        out = accel.deform_conv2d(**tensors, padding=1, backend="cpu")
        return out, *torch.autograd.grad(out, list(tensors.values()), grad_out)

    with testing.threads(2):
        results = sum(x.numel() * x.element_size() for x in call()) / 2**20
        return peak_memory(call, "cpu"), results


@pytest.mark.parametrize(("channels", "size"), [(128, (100, 168)), (512, (25, 42))])
def test_memory_beside_arguments_and_results(channels, size, monkeypatch):
    """In a process of its own: what other tests leave behind is counted too, or hides what a call takes. There every
    tensor is memory of its own, given back when it is freed; holes in a common heap would count as well."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(128 << 10))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        peak, results = alone.submit(memory_beside_arguments, channels, size).result()
    if peak is None:
        pytest.skip("this system does not tell peak memory")
    assert peak - results < 32, f"{peak:.1f} MiB, of which {results:.1f} are results"


def native(**change):
    tensors = layer(1, 8, (5, 6), 4)
    args = OP.prepare(**tensors, bias=torch.zeros(4), padding=1)._asdict() | change
    return torch.ops.accel_native.deform_conv2d_forward.default(*args.values())


# whoever calls the native op: what protects memory is checked there
BAD = {
    "short_offset": {"offset": torch.zeros(1, 18, 5, 5)},
    "odd_offset": {"offset": torch.zeros(1, 17, 5, 6)},
    "half_offset": {"offset": torch.zeros(1, 18, 5, 6).half()},
    "short_mask": {"mask": torch.zeros(1, 9, 4, 6)},
    "short_bias": {"bias": torch.zeros(3)},
    "weight_of_other_channels": {"weight": torch.zeros(4, 3, 3, 3)},
    "half_weight": {"weight": torch.zeros(4, 8, 3, 3).half()},
    "integer_input": {"input": torch.zeros(1, 8, 5, 6, dtype=torch.int32)},
    "strided_input": {"input": torch.zeros(1, 8, 5, 12)[..., ::2]},
    "no_stride": {"stride": [0, 1]},
    "negative_padding": {"padding": [-1, 1]},
    "no_output": {"dilation": [9, 9]},
    "short_padding": {"padding": [1]},
}


@pytest.mark.parametrize("name", BAD)
def test_native_op_checks_what_it_addresses(name):
    assert native().shape == (1, 4, 5, 6)
    with pytest.raises(RuntimeError):
        native(**BAD[name])


def test_backend_is_chosen():
    tensors = layer(1, 8, (4, 4), 8)
    assert dispatch.select(OP, OP.prepare(**tensors, padding=1)).name == "cpu"
