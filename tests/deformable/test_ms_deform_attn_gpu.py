"""Every check of the op on a GPU, where bf16 and fp16 are the real ones: ``make gpu``."""

import pytest
import torch
from _ms_deform_attn_cases import BEHAVIOUR, CASES

import accel
from accel.ops.deformable.ms_deform_attn import OP
from accel.testing import assert_close, check_op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

BACKENDS = ("triton", "cuda")
CHECKS = list(check_op(accel.ms_deform_attn, CASES, BEHAVIOUR, (), BACKENDS, device="cuda"))
SHAPES = [(50, 84), (25, 42), (13, 21), (7, 11)]


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


def inputs(dtype=torch.bfloat16, queries=300):
    """Of a decoder's layer, with gradients wanted."""
    make = torch.Generator("cuda").manual_seed(0)
    value = torch.randn(2, sum(h * w for h, w in SHAPES), 8, 32, generator=make, device="cuda").to(dtype)
    locations = torch.rand(2, queries, 8, 4, 4, 2, generator=make, device="cuda")
    weights = torch.rand(2, queries, 8, 4, 4, generator=make, device="cuda")
    return [x.requires_grad_() for x in (value, locations, weights)]


def call(value, locations, weights, **kwargs):
    return accel.ms_deform_attn(value, torch.tensor(SHAPES, device="cuda"), None, locations, weights, **kwargs)


def test_a_kernel_of_ours_is_the_choice_on_a_gpu():
    value, locations, weights = inputs()
    text = accel.explain(accel.ms_deform_attn, value, SHAPES, None, locations, weights)
    built = OP.backend("cuda").why_not(OP.prepare(value, SHAPES, None, locations, weights)) is None
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
    shapes = torch.tensor(SHAPES, device="cuda")

    def run():
        out = accel.ms_deform_attn(given[0], shapes, None, *given[1:], backend=backend)
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


def from_odd_byte_counts(x):
    """The same values, beginning one element after where a tensor would."""
    return torch.cat([x.new_zeros(1), x.detach().flatten()])[1:].view(x.shape).requires_grad_()


def test_tensors_may_begin_anywhere(backend):
    given = inputs(torch.float32)
    moved = [from_odd_byte_counts(x) for x in given]
    assert all(x.data_ptr() % 8 for x in moved)
    for first, second in zip(results(given, backend), results(moved, backend), strict=True):
        assert_close(second, first, "sample_grad", torch.float32)  # vectors may be summed in another order


def results(given, backend):
    out = call(*given, backend=backend)
    return out, *torch.autograd.grad(out, given, torch.ones_like(out))


def test_an_encoder_of_many_images_needs_bounded_memory():
    """More samples than the scratch memory holds at once: images go through it in turns, with the bits of one alone."""
    shapes = torch.tensor(SHAPES, device="cuda")
    make = torch.Generator("cuda").manual_seed(0)
    pixels = sum(h * w for h, w in SHAPES)
    value = torch.randn(8, pixels, 8, 32, generator=make, device="cuda", dtype=torch.bfloat16)
    locations = torch.rand(8, pixels, 8, 4, 4, 2, generator=make, device="cuda")
    weights = torch.rand(8, pixels, 8, 4, 4, generator=make, device="cuda")
    args = OP.prepare(value, shapes, None, locations, weights)
    reason = OP.backend("cuda").why_not(args)
    if reason is not None:
        pytest.skip(reason)
    grad_out = torch.randn(8, pixels, 256, generator=make, device="cuda", dtype=torch.bfloat16)
    backward = OP.backend("cuda").backward
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (whole, *_) = backward(grad_out, *args, [True, False, False])
    assert torch.cuda.max_memory_allocated() - before < whole.numel() * 2 + (300 << 20)
    one = [x[5:6].contiguous() for x in args[:3]]
    (alone, *_) = backward(grad_out[5:6].contiguous(), *one, *args[3:], [True, False, False])
    assert torch.equal(whole[5:6], alone)


def test_a_stream_of_ones_own(backend):
    given = inputs()
    want = results(given, backend)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # what runs on another stream is done before this
        late = [(x.detach() * 1).requires_grad_() for x in given]
        got = results(late, backend)
    side.synchronize()
    for first, second in zip(want, got, strict=True):
        assert torch.equal(first, second)
