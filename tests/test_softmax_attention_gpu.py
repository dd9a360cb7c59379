"""Every check of the op on a GPU, where bf16, fp16 and the tensor cores are the real ones: ``make gpu``."""

import pytest
import torch
from test_softmax_attention import BEHAVIOUR, CASES

import accel
from accel.testing import check_op

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
