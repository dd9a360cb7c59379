"""The backend ``torch``: when it is chosen, and that what must not leak does not leak through torch's kernels.

No GPU is needed: the choice is made on tensors without data, and torch's kernel for the CPU stands in for cuDNN's.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import accel
from accel import dispatch, testing
from accel.kernels import _launch
from accel.ops.attention import cudnn, softmax_attention
from accel.ops.attention.softmax_attention import OP
from accel.testing import assert_close

aten = torch.ops.aten

# --- the choice ---


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU of compute capability 9.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cudnn, "_has_cudnn", lambda: True)


def prepared(
    tokens: int = 1024,
    keys: int | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    size: int = 64,
    kv_heads: int = 4,
    **how: Any,
) -> Any:
    """The arguments of a call, whose tensors have no data and of which q, k and v say that they are on a GPU."""
    shapes = [(2, 4, tokens, size), *[(2, kv_heads, keys or tokens, size)] * 2]
    args = OP.prepare(*[torch.empty(shape, device="meta", dtype=dtype) for shape in shapes], **how)
    with FakeTensorMode():
        q, k, v = (torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes)
    return args._replace(q=q, k=k, v=v)


def chosen(**how: Any) -> str:
    return dispatch.select(OP, prepared(**how)).name


def why_not(**how: Any) -> str | None:
    return OP.backend("torch").why_not(prepared(**how))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("how", [{}, {"causal": True}, {"causal": "top_left"}, {"scale": 0.3, "causal": True}], ids=str)
def test_plain_calls_go_to_torch(how: dict[str, Any], size: int, dtype: torch.dtype, hopper: None) -> None:
    assert chosen(size=size, dtype=dtype, **how) == "torch"
    assert chosen(size=size, dtype=dtype, kv_heads=2, **how) == "torch"


def test_explain_says_so(hopper: None) -> None:
    with FakeTensorMode():
        q = torch.empty(2, 4, 1024, 64, device="cuda", dtype=torch.bfloat16)
        assert " -> torch: can run this call" in accel.explain(accel.softmax_attention, q, q, q)
        with accel.use(deterministic=True):
            text = accel.explain(accel.softmax_attention, q, q, q)
    assert "    torch: determinism is asked for, and the sums of cuDNN's backward have no fixed order" in text
    assert " -> triton: can run this call" in text


def test_more_keys_than_queries_go_to_torch_without_causal_order(hopper: None) -> None:
    assert chosen(tokens=600, keys=1100) == "torch"
    for causal in (True, "top_left"):
        assert chosen(tokens=600, keys=1100, causal=causal) == "triton"
    words = "its causal order is for as many queries as keys, not 600 and 1100"
    assert why_not(tokens=600, keys=1100, causal="top_left") == words


@pytest.mark.parametrize(
    "how",
    [
        {"window": (9, 0)},
        {"pattern": accel.BlockCausal(64)},
        {"softcap": 30.0},
        {"dropout_p": 0.1},
        {"mask": (1024,)},
        {"bias": (1, 4, 1024, 1024)},
        {"bias_table": (32, 4), "bias_index": accel.T5Buckets()},
        {"alibi_slopes": (4,)},
        {"sinks": (4,)},
    ],
    ids=str,
)
def test_all_that_is_more_goes_to_our_kernels(how: dict[str, Any], hopper: None) -> None:
    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=torch.bool if name == "mask" else torch.float32)

    given = {n: tensor(n, x) if isinstance(x, tuple) and n not in ("window",) else x for n, x in how.items()}
    assert chosen(causal=True, **given) == "triton"
    assert (
        why_not(**given)
        == "it is for calls without bias, mask, sinks, softcap and dropout, over all keys or in causal order"
    )


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"dtype": torch.float32}, "not torch.float32"),
        ({"size": 80}, "not 80"),
        ({"tokens": 100}, "not 100 queries and 100 keys"),
    ],
    ids=str,
)
def test_what_was_not_measured_goes_to_our_kernels(tensors: dict[str, Any], words: str, hopper: None) -> None:
    assert chosen(**tensors) == "triton"
    assert words in str(why_not(**tensors))


@pytest.mark.parametrize("causal", [False, True])
def test_determinism_is_ours(causal: bool, hopper: None) -> None:
    assert chosen(causal=causal) == "torch"
    with accel.use(deterministic=True):
        assert chosen(causal=causal) == "triton"
        with accel.use(deterministic=False):
            assert chosen(causal=causal) == "torch"
        assert (
            why_not(causal=causal) == "determinism is asked for, and the sums of cuDNN's backward have no fixed order"
        )
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen(causal=causal) == "triton"
        with accel.use(deterministic=False):
            assert chosen(causal=causal) == "triton", "torch's own switch is not overruled"
    finally:
        torch.use_deterministic_algorithms(False)
    assert chosen(causal=causal) == "torch"


def test_an_older_gpu_keeps_our_kernels(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert chosen(causal=True) == "triton"


def test_the_ops_of_cudnn_take_what_they_are_given() -> None:
    """On tensors without data: the arguments fit this version of torch, and so do the shapes."""
    q = torch.empty(2, 4, 600, 64, device="meta", dtype=torch.bfloat16)
    k = v = torch.empty(2, 4, 700, 64, device="meta", dtype=torch.bfloat16)
    out, lse = cudnn.forward(q, k, v, False, 0.3)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    grads = cudnn.backward(out, out, lse, q, k, v, False, 0.3)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


# --- what it computes, with torch's kernel for the CPU in the place of cuDNN's ---

interpreted = pytest.mark.skipif(not _launch.INTERPRETING, reason="our Triton kernels run on CPU tensors interpreted")


def dense_forward(q: Any, k: Any, v: Any, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels do it: a weight of 0 is multiplied too."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = (q * scale) @ k.mT
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return torch.softmax(logits, -1) @ v, torch.logsumexp(logits, -1)


def dense_backward(grad: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, causal: bool, scale: float) -> Any:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        return torch.autograd.grad(dense_forward(*leaves, causal, scale)[0], leaves, grad)


def flash_forward(q: Any, k: Any, v: Any, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def flash_backward(grad: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, causal: bool, scale: float) -> Any:
    rest = (grad, q, k, v, out, lse, 0.0, causal)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward.default(*rest, scale=scale)


KERNELS = {"flash": (flash_forward, flash_backward), "dense": (dense_forward, dense_backward)}


@pytest.fixture(params=KERNELS)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend on CPU tensors, whatever it would say of them."""
    forward, backward = KERNELS[request.param]
    monkeypatch.setattr(cudnn, "forward", forward)
    monkeypatch.setattr(cudnn, "backward", backward)
    monkeypatch.setattr(cudnn, "why_not", lambda args: None)
    monkeypatch.setattr(softmax_attention, "_on_cpu", lambda x: False)


def inputs(layout: bool = False, kv_heads: int = 2) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    found = [torch.randn(2, heads, 20, 16, generator=make) for heads in (2, kv_heads, kv_heads)]
    if layout:
        found = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in found]
    return dict(zip("qkv", found, strict=True))


@interpreted
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("layout", [False, True], ids=["", "heads_inside_tokens"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_it_computes_the_op(causal: bool, layout: bool, kv_heads: int, stand_in: None) -> None:
    tensors, how = inputs(layout, kv_heads), {"causal": causal, "scale": 0.3}
    got = testing.run(accel.softmax_attention, tensors, how, "torch")
    want = testing.run(accel.softmax_attention, testing.double(tensors), how, "reference")
    assert_close(got.out, want.out, "softmax", torch.float32)
    assert (got.out.stride(1) < got.out.stride(2)) is layout
    for name in "qkv":
        assert_close(got.grads[name], want.grads[name], "softmax_few_grad", torch.float32, name)


@interpreted
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_reaches_only_who_may_see_it(name: str, value: float, stand_in: None) -> None:
    """In causal order, of one batch entry: queries before the place, or of another place, and their gradients."""
    tensors = inputs()
    clean = testing.run(accel.softmax_attention, tensors, {"causal": True}, "reference")
    tensors[name][0, :, 11, 1] = value
    got = testing.run(accel.softmax_attention, tensors, {"causal": True}, "torch")
    want = testing.run(accel.softmax_attention, tensors, {"causal": True}, "reference")
    assert torch.equal(got.out.isnan(), want.out.isnan())
    rows, keys = torch.ones(2, 20, dtype=torch.bool), torch.ones(2, 20, dtype=torch.bool)
    if name == "q":
        rows[0, 11] = keys[0, :12] = False
    else:
        rows[0, 11:] = keys[0] = False
    spared = {"out": rows, "grad q": rows, "grad k": keys, "grad v": keys}
    for key, expected in clean.named().items():
        x, y = (t.transpose(1, 2)[spared[key]] for t in (got.named()[key], expected))
        assert_close(x, y.double(), "softmax" if key == "out" else "softmax_few_grad", torch.float32, key)


@interpreted
def test_what_is_finite_stays_as_torch_computed_it(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels are launched behind torch's and change nothing."""
    tensors = inputs()
    got = testing.run(accel.softmax_attention, tensors, {"causal": True}, "torch")
    grad_out = torch.ones_like(got.out)
    out, lse = cudnn.forward(*tensors.values(), True, 0.25)
    grads = cudnn.backward(grad_out, out, lse, *tensors.values(), True, 0.25)
    testing.assert_same(got.out, out, "output")
    for name, grad in zip("qkv", grads, strict=True):
        testing.assert_same(got.grads[name], grad, f"gradient of {name}")


@interpreted
@pytest.mark.parametrize("return_lse", [False, True])
def test_compiled_it_computes_the_backward_too(
    return_lse: bool, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code makes zeros for the gradient of a log-sum-exp that the caller got; of none there is none."""
    tensors, ran, computed = inputs(), [], cudnn.backward
    monkeypatch.setattr(cudnn, "backward", lambda *given: ran.append("torch") or computed(*given))

    def attend(backend: str, **given: torch.Tensor) -> torch.Tensor:
        made = accel.softmax_attention(**given, scale=0.3, return_lse=return_lse, backend=backend)
        return made[0] if isinstance(made, tuple) else made

    torch._dynamo.reset()
    try:
        got = testing.run(torch.compile(attend, fullgraph=True), tensors, {}, "torch")
    finally:
        torch._dynamo.reset()
    assert ran == ([] if return_lse else ["torch"])
    for name, expected in testing.run(attend, testing.double(tensors), {}, "reference").named().items():
        assert_close(got.named()[name], expected, "softmax_few_grad", torch.float32, name)


@interpreted
def test_a_gradient_of_the_log_sum_exp_and_determinism_take_our_backward(
    stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("torch's backward was called")

    monkeypatch.setattr(cudnn, "backward", refuse)
    leaves = [x.requires_grad_() for x in inputs().values()]
    _, lse = accel.softmax_attention(*leaves, return_lse=True, backend="torch")
    got = torch.autograd.grad(lse.square().sum(), leaves[:2])
    _, lse = accel.softmax_attention(*leaves, return_lse=True, backend="reference")
    for grad, expected in zip(got, torch.autograd.grad(lse.square().sum(), leaves[:2]), strict=True):
        assert_close(grad, expected.double(), "softmax_few_grad", torch.float32)
    out = accel.softmax_attention(*leaves, backend="torch")
    with accel.use(deterministic=True):
        out.sum().backward()
    out = accel.softmax_attention(*leaves, backend="torch")
    with pytest.raises(AssertionError, match="torch's backward was called"):
        out.sum().backward()
