"""Every check of the op on a GPU, where bf16, fp16 and the tensor cores are the real ones: ``make gpu``."""

import pytest
import torch
from _window_cases import BEHAVIOUR, CASES

import accel
from accel.testing import check_op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

CHECKS = list(check_op(accel.window_attention, CASES, BEHAVIOUR, (), ["triton"], device="cuda"))


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


def test_triton_is_the_choice_on_a_gpu():
    qkv = torch.randn(2, 14, 14, 96, device="cuda", dtype=torch.bfloat16)
    text = accel.explain(accel.window_attention, qkv, num_heads=1, window_size=(7, 7), shift_size=(3, 3))
    assert "-> triton: can run this call" in text


def test_a_graph_replays_the_same_bits():
    qkv = torch.randn(2, 14, 14, 96, device="cuda", dtype=torch.bfloat16)
    table = torch.randn(169, 1, device="cuda")

    def run():
        return accel.window_attention(qkv, table, num_heads=1, window_size=(7, 7), shift_size=(3, 3))

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
