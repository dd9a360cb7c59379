"""Every check of the op on a GPU, where bf16 and fp16 are the real ones: ``make gpu``."""

import pytest
import torch
from _deform_attention2d_cases import BEHAVIOUR, CASES

import accel
from accel.ops.deformable.deform_attention2d import OP
from accel.testing import check_op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

BACKENDS = ("triton", "cuda")
CHECKS = list(check_op(accel.deform_attention2d, CASES, BEHAVIOUR, (), BACKENDS, device="cuda"))


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


def inputs(dtype=torch.bfloat16):
    """Of a layer of InternImage, with gradients wanted."""
    make = torch.Generator("cuda").manual_seed(0)
    input = torch.randn(2, 56, 56, 128, generator=make, device="cuda").to(dtype)
    offset = torch.randn(2, 56, 56, 4, 9, 2, generator=make, device="cuda")
    mask = torch.randn(2, 56, 56, 4, 9, generator=make, device="cuda")
    return [x.requires_grad_() for x in (input, offset, mask)]


def call(input, offset, mask, **kwargs):
    return accel.deform_attention2d(input, offset, mask, kernel_size=3, padding=1, softmax=True, **kwargs)


def test_a_kernel_of_ours_is_the_choice_on_a_gpu():
    given = inputs()
    text = accel.explain(accel.deform_attention2d, *given, kernel_size=3, padding=1)
    built = OP.backend("cuda").why_not(OP.prepare(*given, kernel_size=3, padding=1)) is None
    assert f"-> {'cuda' if built else 'triton'}: can run this call" in text


@pytest.fixture(params=BACKENDS)
def backend(request):
    """One that can run here."""
    try:
        call(*inputs(), backend=request.param)
    except NotImplementedError as error:
        pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_many_programs_give_the_same_bits(dtype, backend):
    given = inputs(dtype)
    found = []
    for _ in range(3):
        out = call(*given, backend=backend)
        found.append((out, *torch.autograd.grad(out, given, torch.ones_like(out))))
    for again in found[1:]:
        for first, second in zip(found[0], again, strict=True):
            assert torch.equal(first, second)


def test_a_graph_replays_forward_and_backward(backend):
    given = inputs()

    def run():
        out = call(*given, backend=backend)
        return out, *torch.autograd.grad(out, given, torch.ones_like(out))

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
