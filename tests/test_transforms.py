"""``torch.func`` on every op: batched derivatives go through plain torch, in any order, or are refused by us."""

import functools
import logging

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import accel
from accel import dispatch
from accel.ops import pairs, tables
from accel.testing import assert_close

OPS = pytest.mark.parametrize("op", [op for op in dispatch.OPS.values() if op.differentiable], ids=lambda op: op.name)


def noise(like, seed):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype) / 4


def call_of(op, dtype=torch.float32):
    """The op as a function of its first tensor, such a tensor, and weights that make a number of the output."""
    (first, *rest), kwargs = op.example("cpu", dtype)
    if op.name == "softmax_attention":
        first = first[:, :, :7, :8]
        rest, kwargs = [noise(first, seed) for seed in (1, 2)], {"causal": True, "sinks": torch.ones(1)}
    if op.name == "gau_attention":
        first = first[:, :, :7, :8]
        rest, kwargs = [noise(first, seed) for seed in (1, 2, 3)], {"causal": True, "activation": "silu"}

    def call(x, backend=None):
        out = op.function(x, *rest, **kwargs, backend=backend)
        return out if isinstance(out, torch.Tensor) else out[0]

    return call, noise(first, 3), noise(call(first), 4)


def one_by_one(call, weights, xs):
    """Gradients without any transform."""
    leaves = [x.clone().requires_grad_() for x in xs]
    return torch.stack([torch.autograd.grad((call(x) * weights).sum(), x)[0] for x in leaves])


@OPS
def test_gradients_of_each_element_of_a_batch(op):
    call, x, weights = call_of(op)
    xs = torch.stack([x, x.flip(-1), -x])
    got = vmap(grad(lambda x: (call(x) * weights).sum()))(xs)
    assert_close(got, one_by_one(call, weights, xs).double(), "softmax_few_grad", torch.float32)
    around = grad(lambda xs: (vmap(call)(xs) * weights).sum())(xs)
    assert_close(around, got.double(), "softmax_few_grad", torch.float32)
    leaf = xs.clone().requires_grad_()
    (vmap(call)(leaf) * weights).sum().backward()
    assert_close(leaf.grad, got.double(), "softmax_few_grad", torch.float32)


@OPS
def test_a_jacobian_from_either_side(op):
    call, x, weights = call_of(op)

    def three(x):
        return torch.stack([part.sum() for part in (call(x) * weights).flatten().tensor_split(3)])

    leaf = x.clone().requires_grad_()
    rows = [torch.autograd.grad(number, leaf, retain_graph=True)[0] for number in three(leaf)]
    assert_close(jacrev(three)(x), torch.stack(rows).double(), "softmax_few_grad", torch.float32)
    if op.straight_through:
        with pytest.raises(NotImplementedError, match=f"{op.name}: forward-mode derivatives do not exist"):
            jacfwd(three)(x)
        return
    small = jacfwd(lambda t: three(x * t))(torch.ones(()))  # along x alone
    assert_close(small, (torch.stack(rows) * x).flatten(1).sum(1).double(), "softmax_few_grad", torch.float32)


@OPS
def test_second_derivatives(op):
    """Of a number along the first tensor, against plain torch in float64."""
    call, x, weights = call_of(op)
    wide = call_of(op, torch.float64)[0]

    def along(t, call=call, x=x, weights=weights, **how):
        return (call(x * t, **how) * weights).square().sum()

    if op.straight_through:
        for second in (hessian, lambda f: jacrev(jacrev(f)), lambda f: grad(lambda t: jacrev(f)(t).sum())):
            # torch.compile takes no function of ours that had a jvp to say so; torch says it in its own words
            with pytest.raises(RuntimeError, match=f"{op.name}.* derivatives do not exist|implement the jvp"):
                second(along)(torch.ones(()))
        return
    t = torch.ones((), dtype=torch.float64, requires_grad=True)
    number = along(t, wide, x.double(), weights.double(), backend="reference")
    (first,) = torch.autograd.grad(number, t, create_graph=True)
    (expected,) = torch.autograd.grad(first, t)
    for second in (hessian, lambda f: jacrev(jacrev(f)), lambda f: grad(lambda t: jacrev(f)(t).sum())):
        torch.testing.assert_close(second(along)(torch.ones(())), expected.float(), rtol=1e-4, atol=1e-6)


@OPS
def test_a_kernel_asked_for_by_name_says_what_to_do(op):
    call, x, _ = call_of(op)
    if dispatch.leaf_reason("accel._C") is not None:
        pytest.skip("no kernels for the CPU are built here")
    kernel = next(b.name for b in op.backends if b.name in ("cpu", "triton"))
    words = f"{op.name}: backend '{kernel}' cannot run this call: vmap has no rule .*backend='reference' has"
    for mapped in (vmap(functools.partial(call, backend=kernel)), vmap(grad(lambda x: call(x, kernel).sum()))):
        with pytest.raises(NotImplementedError, match=words):
            mapped(x[None])
    with accel.use(backend=kernel), pytest.raises(NotImplementedError, match=words):
        vmap(call)(x[None])
    with accel.use(backend="reference"):
        assert vmap(call)(x[None]).shape == (1, *call(x).shape)


def test_the_fallback_is_said_and_strict_mode_forbids_it(caplog, monkeypatch):
    call, x, _ = call_of(dispatch.OPS["window_attention"])
    if dispatch.leaf_reason("accel._C") is not None:
        pytest.skip("no kernels for the CPU are built here")
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.WARNING, "accel"):
        vmap(call)(x[None])
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("window_attention runs on the slower backend 'reference' because cpu: vmap has no rule")
    with accel.use(strict=True), pytest.raises(NotImplementedError, match="strict mode"):
        vmap(call)(x[None])


def test_nothing_made_inside_a_transform_outlives_it(monkeypatch):
    """Rows of rules and facts of an index are remembered from call to call; a transform's tensors are not."""
    monkeypatch.setattr(pairs, "_recent", type(pairs._recent)())
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    index = torch.randint(5, (9, 9))
    table = torch.randn(5, 2)

    def call(q, **how):
        return accel.softmax_attention(q, k, v, **how, causal=True).square().sum()

    for how in ({}, {"bias_table": table, "bias_index": index}):
        inside = grad(functools.partial(call, **how))(q)
        assert not pairs._recent
        assert tables._index_facts.known((index,)) is None
        leaf = q.clone().requires_grad_()
        call(leaf, **how).backward()
        assert torch.equal(leaf.grad, inside)
        pairs._recent.clear()


def test_compiled_a_tensor_that_was_filled_by_parts_has_its_gradient():
    """torch.compile takes it for one without, as it was when it was made; DeepSeek-V3 makes its keys so."""
    k = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(1))

    def attend(q, k):
        joined = k.new_empty(k.shape)
        joined[..., :4].copy_(k[..., :4])
        joined[..., 4:].copy_(k[..., 4:])
        return accel.softmax_attention(q, joined, joined)

    out, weights = attend(q, k), torch.linspace(-1, 1, k.numel()).view(k.shape)
    torch._dynamo.reset()
    for inputs in ((q, k), (q.clone().requires_grad_(), k)):
        found = torch.compile(attend, fullgraph=True, backend="eager")(*inputs)
        assert torch.equal(found, out)
        assert torch.equal(
            torch.autograd.grad(found, k, weights)[0], torch.autograd.grad(attend(*inputs), k, weights)[0]
        )
    torch._dynamo.reset()


def filled(x):
    made = x.new_empty(x.shape)
    made[..., :4].copy_(x[..., :4])
    made[..., 4:].copy_(x[..., 4:])
    return made


def normal(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


HEADS, TOKENS, CHOICES = normal(1, 2, 5, 8), normal(2, 5, 8), torch.tensor([[0, 1], [2, 0]])
EXPERTS = (normal(2, 2), normal(3, 12, 8), normal(3, 8, 6))
KEEPING = {
    "linear_attention": (HEADS, lambda k: accel.linear_attention(HEADS, k, HEADS, causal=True)),
    "gau_attention": (HEADS, lambda gate: accel.gau_attention(HEADS, HEADS, HEADS, gate)),
    "flash_mix": (TOKENS, lambda gate: accel.flash_mix(*[TOKENS] * 5, gate, chunk_size=4, causal=True)),
    "moe_experts": (normal(2, 8), lambda x: accel.moe_experts(x, CHOICES, *EXPERTS)),
}


@pytest.mark.parametrize("name", KEEPING)
def test_compiled_what_only_a_backward_reads_is_kept_for_such_a_tensor(name):
    value, call = KEEPING[name]
    leaf = value.clone().requires_grad_()
    expected = torch.autograd.grad(call(filled(leaf)).square().sum(), leaf)[0]
    torch._dynamo.reset()
    found = torch.compile(lambda x: call(filled(x)), fullgraph=True, backend="eager")(leaf)
    assert torch.equal(torch.autograd.grad(found.square().sum(), leaf)[0], expected)
    torch._dynamo.reset()
