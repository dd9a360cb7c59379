"""Linear attention of thousands of tokens against a float64 oracle that carries its state from chunk to chunk."""

import pytest
import torch

import accel
from accel.ops.linear.linear_attention import OP
from accel.testing import assert_close

FP32 = torch.float32
BACKENDS = [b.name for b in OP.backends if b.name == "cpu"]


def carried(q, k, v, log_decay, state, normalize, eps, chunk=128):
    """Output and final state of identity features in float64. ``log_decay (B, H, T)``."""
    kv, k_sum = state
    rows = []
    for t in range(0, q.shape[2], chunk):
        a, b, c, g = [x[:, :, t : t + chunk] for x in (q, k, v, log_decay)]
        total = g.cumsum(-1)
        weights = (a @ b.mT) * (total[..., :, None] - total[..., None, :]).tril().exp().tril()
        early, late = a * total.exp()[..., None], b * (total[..., -1:] - total).exp()[..., None]
        out, whole = weights @ c + early @ kv, total[..., -1].exp()
        if normalize:
            out = out / (weights.sum(-1) + (early * k_sum[:, :, None]).sum(-1) + eps)[..., None]
        rows.append(out)
        kv = whole[..., None, None] * kv + late.mT @ c
        k_sum = whole[..., None] * k_sum + late.sum(-2)
    return torch.cat(rows, 2), kv, k_sum


def steps_of_mamba2(heads, tokens, generator):
    """Log-decays of the sizes that its models have: steps of 0.001 to 0.1 times A from −1 to −16."""
    a = -torch.linspace(1.0, 16.0, heads)
    return (0.001 * 100.0 ** torch.rand(1, heads, tokens, generator=generator)) * a[:, None]


def gradients_of_decay(tokens, normalize, with_state, per_head):
    """Ours by every backend that can, and the oracle's, of what reaches the decay by rows and by the final state."""
    generator = torch.Generator().manual_seed(tokens)
    heads, size = 3, 16
    q, k, v = [torch.randn(1, heads, tokens, size, generator=generator) for _ in range(3)]
    if normalize:
        q, k = q.abs(), k.abs()
    decay = steps_of_mamba2(heads, tokens, generator)
    if per_head:
        decay = decay.mean((0, 2))
    state = torch.randn(1, heads, size, size, generator=generator), torch.rand(1, heads, size, generator=generator)
    upstream = [torch.randn(1, heads, *n, generator=generator) for n in ((tokens, size), (size, size), (size,))]
    upstream = upstream[: 3 if with_state and normalize else 2 if with_state else 1]

    wide = decay.double().requires_grad_()
    each = wide[None, :, None].expand(1, heads, tokens) if per_head else wide
    made = carried(*[x.double() for x in (q, k, v)], each, [x.double() for x in state], normalize, 1e-3)
    (want,) = torch.autograd.grad(made[: len(upstream)], wide, [x.double() for x in upstream])

    def ours(backend):
        leaf = decay.clone().requires_grad_()
        out, (kv, k_sum) = accel.linear_attention(
            q, k, v, feature_map="identity", causal=True, normalize=normalize, log_decay=leaf, eps=1e-3,
            initial_state=(state[0], state[1] if normalize else None), return_state=True, backend=backend,
        )  # fmt: skip
        return torch.autograd.grad([out, kv, k_sum][: len(upstream)], leaf, upstream)[0]

    return ours, want


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of", ["token", "head"])
@pytest.mark.parametrize("with_state", [False, True], ids=["rows", "state"])
@pytest.mark.parametrize("normalize", [False, True], ids=["sum", "normalized"])
@pytest.mark.parametrize("tokens", [2048, 8192])
def test_the_gradient_of_decay_does_not_drift(tokens, normalize, with_state, of, backend):
    ours, want = gradients_of_decay(tokens, normalize, with_state, of == "head")
    assert_close(ours(backend), want, "linear_grad", FP32, f"{tokens} tokens")


def gradient_of_queries(q, k, v, upstream, eps, chunk=128):
    """That of features of q, whose rows are normalized, by its formula in float64."""
    q, k, v, upstream = [x.double() for x in (q, k, v, upstream)]
    kv, k_sum, rows = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), q.new_zeros(*q.shape[:2], q.shape[3], 1), []
    for t in range(0, q.shape[2], chunk):
        a, b, c, g = [x[:, :, t : t + chunk] for x in (q, k, v, upstream)]
        weights = (a @ b.mT).tril()
        den = weights.sum(-1, keepdim=True) + a @ k_sum + eps
        g = g / den
        along = (g * (weights @ c + a @ kv)).sum(-1, keepdim=True) / den
        rows.append((g @ c.mT - along).tril() @ b + g @ kv.mT - along * k_sum.mT)
        kv, k_sum = kv + b.mT @ c, k_sum + b.sum(-2)[..., None]
    return torch.cat(rows, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_late_queries_keeps_its_digits(backend):
    """It is the difference of two sums over all tokens, one of them of the denominator. Where rows see few keys it is
    that of nearly equal numbers, and much larger than it is later on: those are measured as such."""
    generator = torch.Generator().manual_seed(0)
    q, k = [1.0 + torch.rand(1, 1, 65536, 16, generator=generator) for _ in range(2)]
    v, upstream = [torch.randn(1, 1, 65536, 16, generator=generator) for _ in range(2)]
    want = gradient_of_queries(q, k, v, upstream, 1e-6)
    leaf = q.clone().requires_grad_()
    out = accel.linear_attention(leaf, k, v, feature_map="identity", causal=True, backend=backend)
    (got,) = torch.autograd.grad(out, leaf, upstream)
    assert_close(got[:, :, :64], want[:, :, :64], "linear_few_grad", FP32, "the first rows")
    assert_close(got[:, :, 64:], want[:, :, 64:], "linear_grad", FP32, "the other rows")
