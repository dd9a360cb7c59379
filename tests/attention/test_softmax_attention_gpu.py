"""Every check of the op on a GPU, where bf16, fp16 and the tensor cores are the real ones: ``make gpu``."""

import pytest
import torch
from _attention_cases import BEHAVIOUR, CASES

import accel
from accel.ops.attention.softmax_attention import OP
from accel.testing import assert_close, check_op, run

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
    for causal in (False, True):
        assert "-> torch: can run this call" in accel.explain(accel.softmax_attention, *qkv(1024), causal=causal)
        with accel.use(deterministic=True):
            assert "-> triton: can run this call" in accel.explain(accel.softmax_attention, *qkv(1024), causal=causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("through_lse", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cudnn_computes_the_op(kv_heads, through_lse, causal, head_size, heads_inside, dtype):
    """With its log-sum-exp, whose gradient takes our own backward, in the layout that the registered op promises."""
    make = torch.Generator("cuda").manual_seed(0)
    keys = (kv_heads, 700 if causal else 1100)
    sizes = [(2, *axes, head_size) for axes in ((4, 700), keys, keys)]
    if heads_inside:
        sizes = [(b, t, h, d) for b, h, t, d in sizes]
    given = [torch.randn(size, generator=make, device="cuda").to(dtype) for size in sizes]
    q, k, v = (x.transpose(1, 2) if heads_inside else x for x in given)
    if (reason := OP.backend("torch").why_not(OP.prepare(q, k, v, scale=0.3, causal=causal))) is not None:
        pytest.skip(reason)
    tensors = {"q": q, "k": k, "v": v}
    kwargs = {"scale": 0.3, "causal": causal, "return_lse": True}
    grad_out = torch.randn(q.shape, generator=make, device="cuda").to(dtype)
    grad_lse = torch.randn(q.shape[:3], generator=make, device="cuda")

    def results(tensors, backend):
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        out, lse = accel.softmax_attention(**leaves, **kwargs, backend=backend)
        upstream = (grad_out.to(out.dtype), grad_lse.to(lse.dtype))[: 1 + through_lse]
        grads = torch.autograd.grad((out, lse)[: 1 + through_lse], list(leaves.values()), upstream)
        return out, lse, grads

    out, lse, grads = results(tensors, "torch")
    want, want_lse, want_grads = results({name: x.double() for name, x in tensors.items()}, "reference")
    assert_close(out, want, "softmax_few", dtype)
    assert_close(lse, want_lse, "lse", torch.float32)
    for name, got, expected in zip("qkv", grads, want_grads, strict=True):
        assert_close(got, expected, "softmax_few_grad", dtype, name)
    assert (out.stride(1) < out.stride(2)) is heads_inside


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


@pytest.mark.parametrize("toeplitz", [False, True])
@pytest.mark.parametrize("seen", [False, True])
def test_a_graph_captures_a_bias_by_index(seen, toeplitz):
    """Forward and backward; whether or not the index was seen before the capture."""
    q, k, v = (x.requires_grad_() for x in qkv(256))
    table = torch.randn(511, 8, device="cuda", requires_grad=True)
    at = torch.arange(256, device="cuda")
    index = at[:, None] - at + 255 if toeplitz else torch.randint(511, (256, 256), device="cuda")

    def run(index):
        out = accel.softmax_attention(q, k, v, bias_table=table, bias_index=index)
        return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v, table))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            want = run(index)
    torch.cuda.current_stream().wait_stream(side)
    given = index if seen else index.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(given)
    for x in got:
        x.zero_()
    graph.replay()
    for name, x, expected in zip(("out", *"qkv", "table"), got, want, strict=True):
        assert_close(x, expected.double(), "softmax_few" if name == "out" else "softmax_few_grad", torch.bfloat16, name)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nothing_leaks_through_the_causal_order_of_torch(name):
    """What is not finite leaves the queries before it, and the gradients that come from them alone, as they are."""
    tensors = dict(zip("qkv", qkv(1024), strict=True))
    if (reason := OP.backend("torch").why_not(OP.prepare(**tensors, causal=True))) is not None:
        pytest.skip(reason)
    tensors[name][0, :, 600, 1] = float("nan")
    got, want = (run(accel.softmax_attention, tensors, {"causal": True}, b) for b in ("torch", "reference"))
    for key, expected in want.named().items():
        assert torch.equal(got.named()[key].isnan(), expected.isnan()), f"{key}: NaN in other places"
    assert_close(got.out[:, :, :600], want.out[:, :, :600].double(), "softmax_few", torch.bfloat16)


@pytest.mark.parametrize("causal", [False, True])
def test_determinism_gives_the_same_bits_every_time(causal):
    q, k, v = (x.requires_grad_() for x in qkv(2048, head_size=128))

    def once():
        out = accel.softmax_attention(q, k, v, causal=causal)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    with accel.use(deterministic=True):
        for first, second in zip(once(), once(), strict=True):
            assert torch.equal(first, second)
