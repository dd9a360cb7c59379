"""Every check of the op on a GPU, where bf16, fp16 and the tensor cores are the real ones: ``make gpu``."""

import pytest
import torch
from _deform_conv2d_cases import BEHAVIOUR, CASES
from test_deform_conv2d_forward_cuda_host import CASES as CUDA_CASES

import accel
from accel.ops.deformable.deform_conv2d import OP
from accel.testing import assert_close, check_op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

BACKENDS = ("triton", "cuda")
CHECKS = [
    *check_op(accel.deform_conv2d, CASES, BEHAVIOUR, (), ["triton"], device="cuda"),
    # of few channels is only what that one refuses
    *check_op(accel.deform_conv2d, CUDA_CASES, (), (), ["cuda"], device="cuda"),
]


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


def inputs(dtype=torch.bfloat16, channels=128, size=(50, 84), batch=2):
    """Of one layer of a detector, with gradients wanted."""
    make = torch.Generator("cuda").manual_seed(0)

    def normal(*shape, dtype=torch.float32, scale=1.0):
        return (scale * torch.randn(shape, generator=make, device="cuda")).to(dtype).requires_grad_()

    return {
        "input": normal(batch, channels, *size, dtype=dtype),
        "offset": normal(batch, 18, *size),
        "weight": normal(channels, channels, 3, 3, dtype=dtype, scale=(9 * channels) ** -0.5),
        "mask": normal(batch, 9, *size),
    }


def test_triton_is_the_choice_on_a_gpu():
    given = inputs()
    text = accel.explain(accel.deform_conv2d, *(given[n] for n in ("input", "offset", "weight")), padding=1)
    assert "-> triton: can run this call" in text


@pytest.fixture(params=BACKENDS)
def backend(request):
    """One that can run here."""
    given = inputs()
    reason = OP.backend(request.param).why_not(OP.prepare(**given, padding=1))
    if reason is not None:
        pytest.skip(reason)
    return request.param


def run(given, backend):
    """Output and gradients."""
    out = accel.deform_conv2d(**given, padding=1, backend=backend)
    return out, *torch.autograd.grad(out, list(given.values()), torch.ones_like(out))


# on the 132 multiprocessors of an H100 these get every tile of the CUDA kernel
LAYERS = [(64, (150, 160)), (128, (100, 168)), (192, (37, 41)), (256, (50, 84)), (512, (25, 42))]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers_of_detectors(layer, batch, last, backend):
    given = inputs(torch.bfloat16, *layer, batch=batch)
    if last:
        given["input"] = given["input"].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    exact = {n: x.detach().float().requires_grad_() for n, x in given.items()}
    out, expected = (
        accel.deform_conv2d(**x, padding=1, backend=b) for x, b in ((given, backend), (exact, "reference"))
    )
    assert_close(out, expected, "deform_conv", torch.bfloat16, "output")
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, list(given.values()), upstream)
    wanted = torch.autograd.grad(expected, list(exact.values()), upstream.float())
    for name, got, want in zip(given, grads, wanted, strict=True):
        assert_close(got, want, "deform_conv_grad", torch.bfloat16, f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_many_programs_give_the_same_bits(dtype, backend):
    given = inputs(dtype)
    if OP.backend(backend).why_not(OP.prepare(**given, padding=1)) is not None:
        pytest.skip(f"{backend} does not compute {dtype}")
    first = run(given, backend)
    for _ in range(2):
        for one, other in zip(first, run(given, backend), strict=True):
            assert torch.equal(one, other)


def test_a_graph_replays_forward_and_backward(backend):
    given = inputs()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        want = run(given, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(given, backend)
    for x in got:
        x.detach().zero_()
    graph.replay()
    for first, second in zip(got, want, strict=True):
        assert torch.equal(first, second)


def test_scratch_memory_has_a_bound(backend):
    given = inputs()
    arguments = sum(x.numel() * x.element_size() for x in given.values())
    run(given, backend)  # cuBLAS keeps a workspace of its own
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(given, backend)
    assert torch.cuda.max_memory_allocated() - before < 4 * arguments + (100 << 20)
