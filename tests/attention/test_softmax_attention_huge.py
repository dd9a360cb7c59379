"""Rows whose keys all carry one huge number: torch's softmax takes the mean of them, forward and backward."""

import pytest
import torch
from _attention_calls import BACKENDS, LEAST, drawn
from _attention_cases import available

import accel
from accel import testing
from accel.testing import assert_close


def eager(q, k, v, bias, scale):
    weights = torch.softmax((q * scale) @ k.mT + bias, -1)
    return weights @ v, weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [-1e9, -1e30, LEAST, 1e30])
def test_it_is_the_mean_of_the_values(value, backend):
    q, k, v = (x.float() for x in drawn(9, 70, E=16))
    bias = torch.zeros(9, 70)
    bias[::2] = value
    available(backend, {"q": q, "k": k, "v": v}, {})
    tensors = {"q": q, "k": k, "v": v, "bias": bias}
    got = testing.run(accel.softmax_attention, tensors, {}, backend)
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    expected, weights = eager(*leaves.values(), 8**-0.5)
    grads = torch.autograd.grad(expected, list(leaves.values()), torch.ones_like(expected))
    torch.testing.assert_close(weights[:, :, ::2], torch.full_like(weights[:, :, ::2], 1 / 70))
    mean = v.double().mean(2, keepdim=True).expand(-1, -1, 5, -1)
    assert_close(got.out[:, :, ::2], mean, "softmax", torch.float32)
    assert_close(got.out, expected, "softmax", torch.float32)
    for name, grad in zip(leaves, grads, strict=True):
        assert_close(got.grads[name], grad, "softmax_grad", torch.float32, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_log_sum_exp_is_that_number(backend):
    q, k, v = (x.float() for x in drawn(3, 70, E=8))
    available(backend, {"q": q, "k": k, "v": v}, {})
    for value in (-1e30, LEAST):
        bias = torch.full((3, 70), value)
        _, lse = accel.softmax_attention(q, k, v, bias=bias, return_lse=True, backend=backend)
        expected = torch.logsumexp((q * 8**-0.5) @ k.mT + bias, -1)
        assert_close(lse, expected.double(), "lse", torch.float32, str(value))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_hides_a_key_still_hides_it(backend):
    """A row of −∞ or of a boolean mask sees nothing and gives 0, beside one of the least number, which is the mean."""
    q, k, v = (x.float() for x in drawn(3, 20, B=1, E=8))
    bias = torch.stack([torch.full((20,), x) for x in (-torch.inf, LEAST, LEAST)])
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[2] = False
    available(backend, {"q": q, "k": k, "v": v}, {})
    out, lse = accel.softmax_attention(q, k, v, bias=bias, mask=mask, return_lse=True, backend=backend)
    assert torch.equal(out[:, :, ::2], torch.zeros_like(out[:, :, ::2]))
    assert (lse[:, :, ::2] == -torch.inf).all()
    assert_close(out[:, :, 1], v.double().mean(2), "softmax", torch.float32)
