"""Every check of the op on a GPU, where bf16, fp16 and the tensor cores are the real ones: ``make gpu``."""

import pytest
import torch
from _attention_cases import BEHAVIOUR, CASES

import accel
from accel.ops.attention.softmax_attention import OP
from accel.testing import assert_close, check_op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

CHECKS = list(check_op(accel.softmax_attention, CASES, BEHAVIOUR, (), ["triton"], device="cuda"))


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


def qkv(tokens, heads=8, head_size=64):
    return [torch.randn(2, heads, tokens, head_size, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def test_triton_is_the_choice_on_a_gpu():
    text = accel.explain(accel.softmax_attention, *qkv(256), causal=True)
    assert "-> triton: can run this call" in text


def test_torch_is_the_choice_for_a_long_plain_call():
    if OP.backend("torch").why_not(OP.prepare(*qkv(1024))) is not None:
        pytest.skip(OP.backend("torch").why_not(OP.prepare(*qkv(1024))))
    assert "-> torch: can run this call" in accel.explain(accel.softmax_attention, *qkv(1024))
    assert "-> triton: can run this call" in accel.explain(accel.softmax_attention, *qkv(1024), causal=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("head_size", [64, 128])
def test_cudnn_computes_the_op(head_size, heads_inside, dtype):
    """With its log-sum-exp, whose gradient counts, and in the layout that the registered op promises."""
    make = torch.Generator("cuda").manual_seed(0)
    sizes = [(2, 3, tokens, head_size) for tokens in (700, 1100, 1100)]
    if heads_inside:
        sizes = [(b, t, h, d) for b, h, t, d in sizes]
    given = [torch.randn(size, generator=make, device="cuda").to(dtype) for size in sizes]
    q, k, v = (x.transpose(1, 2) if heads_inside else x for x in given)
    if (reason := OP.backend("torch").why_not(OP.prepare(q, k, v, scale=0.3))) is not None:
        pytest.skip(reason)
    tensors = {"q": q, "k": k, "v": v}
    kwargs = {"scale": 0.3, "return_lse": True}
    grad_out = torch.randn(q.shape, generator=make, device="cuda").to(dtype)
    grad_lse = torch.randn(q.shape[:3], generator=make, device="cuda")

    def results(tensors, backend):
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        out, lse = accel.softmax_attention(**leaves, **kwargs, backend=backend)
        grads = torch.autograd.grad((out, lse), list(leaves.values()), (grad_out.to(out.dtype), grad_lse.to(lse.dtype)))
        return out, lse, grads

    out, lse, grads = results(tensors, "torch")
    want, want_lse, want_grads = results({name: x.double() for name, x in tensors.items()}, "reference")
    assert_close(out, want, "softmax_few", dtype)
    assert_close(lse, want_lse, "lse", torch.float32)
    for name, got, expected in zip("qkv", grads, want_grads, strict=True):
        assert_close(got, expected, "softmax_few_grad", dtype, name)
    assert (out.stride(1) < out.stride(2)) is heads_inside
    again = results(tensors, "torch")
    assert all(torch.equal(a, b) for a, b in zip((out, lse, *grads), (*again[:2], *again[2]), strict=True))


@pytest.mark.parametrize("head_size", [64, 128])
def test_a_long_call_gives_the_same_bits_every_time(head_size):
    q, k, v = (x.requires_grad_() for x in qkv(2048, head_size=head_size))
    bias = torch.randn(1, 8, 1, 2048, device="cuda", requires_grad=True)

    def run():
        out = accel.softmax_attention(q, k, v, causal=True, bias=bias, backend="triton")
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_a_graph_replays_the_same_bits():
    q, k, v = qkv(512)

    def run():
        return accel.softmax_attention(q, k, v, causal=True)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        want = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)
