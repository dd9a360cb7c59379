"""Every check of the op on a GPU, where bf16, fp16 and the tensor cores are the real ones: ``make gpu``."""

import pytest
import torch
from test_deform_conv2d import BEHAVIOUR, CASES

import accel
from accel.testing import check_op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

CHECKS = list(check_op(accel.deform_conv2d, CASES, BEHAVIOUR, (), ["triton"], device="cuda"))


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


def inputs(dtype=torch.bfloat16, channels=128, size=(50, 84)):
    """Of one layer of a detector, with gradients wanted."""
    make = torch.Generator("cuda").manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=make, device="cuda").to(dtype).requires_grad_()

    return {
        "input": normal(2, channels, *size, dtype=dtype),
        "offset": normal(2, 18, *size),
        "weight": normal(channels, channels, 3, 3, dtype=dtype),
        "mask": normal(2, 9, *size),
    }


def test_triton_is_the_choice_on_a_gpu():
    given = inputs()
    text = accel.explain(accel.deform_conv2d, *(given[n] for n in ("input", "offset", "weight")), padding=1)
    assert "-> triton: can run this call" in text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_many_programs_give_the_same_bits(dtype):
    given = inputs(dtype)
    found = []
    for _ in range(3):
        out = accel.deform_conv2d(**given, padding=1)
        found.append((out, *torch.autograd.grad(out, list(given.values()), torch.ones_like(out))))
    for again in found[1:]:
        for first, second in zip(found[0], again, strict=True):
            assert torch.equal(first, second)


def test_a_graph_replays_forward_and_backward():
    given = inputs()

    def run():
        out = accel.deform_conv2d(**given, padding=1)
        return out, *torch.autograd.grad(out, list(given.values()), torch.ones_like(out))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        want = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for x in got:
        x.detach().zero_()
    graph.replay()
    for first, second in zip(got, want, strict=True):
        assert torch.equal(first, second)


def test_scratch_memory_has_a_bound():
    given = inputs()
    arguments = sum(x.numel() * x.element_size() for x in given.values())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = accel.deform_conv2d(**given, padding=1)
    torch.autograd.grad(out, list(given.values()), torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() - before < 4 * arguments + (100 << 20)
