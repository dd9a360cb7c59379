"""Taking padding out and putting it back: the round trip, its gradient, and attention between the two."""

import pytest
import torch

import accel
from accel.testing import assert_close


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_mask(batch, seqlen, seed=1):
    mask = torch.rand(batch, seqlen, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0] = True
    return mask


MASKS = {
    "right": torch.arange(7) < torch.tensor([[7], [3], [1]]),
    "left": torch.arange(7) >= torch.tensor([[0], [5], [6]]),
    "holes": random_mask(3, 7),
    "one_empty": torch.arange(7) < torch.tensor([[4], [0], [7]]),
    "all_empty": torch.zeros(3, 7, dtype=torch.bool),
    "none_padded": torch.ones(3, 7, dtype=torch.bool),
    "no_tokens": torch.zeros(3, 0, dtype=torch.bool),
    "no_batch": torch.zeros(0, 7, dtype=torch.bool),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("rest", [(), (5,), (2, 3)], ids=str)
def test_round_trip(name, rest):
    mask = MASKS[name]
    x = normal(*mask.shape, *rest)
    packed, indices, cu_seqlens, longest = accel.unpad(x, mask)
    assert torch.equal(packed, x[mask])
    assert (indices.dtype, cu_seqlens.dtype, type(longest)) == (torch.int64, torch.int32, int)
    lengths = mask.sum(1).tolist()
    assert cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert longest == max(lengths, default=0)
    assert torch.equal(x.flatten(0, 1)[indices], packed)
    back = accel.pad(packed, indices, *mask.shape)
    assert back.shape == x.shape
    assert torch.equal(back, torch.where(mask.view(*mask.shape, *[1] * len(rest)), x, 0.0))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8], ids=str)
def test_a_mask_may_be_of_integers(dtype):
    mask = random_mask(3, 7)
    given = (mask * 3).to(dtype)
    for got, expected in zip(accel.unpad(normal(3, 7, 2), given), accel.unpad(normal(3, 7, 2), mask), strict=True):
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_any_dtype_and_layout(dtype):
    mask = random_mask(3, 7)
    x = (normal(4, 7, 3) * 10).to(dtype).permute(2, 1, 0)
    packed, indices, _, _ = accel.unpad(x, mask)
    assert packed.dtype == dtype
    assert torch.equal(accel.pad(packed, indices, 3, 7)[mask], x[mask])


def test_gradients():
    mask = random_mask(3, 5)
    x = normal(3, 5, 2, dtype=torch.float64).requires_grad_()
    _, indices, _, _ = accel.unpad(x, mask)

    def packed(x):
        return accel.unpad(x, mask)[0]

    def round_trip(x):
        return accel.pad(accel.unpad(x, mask)[0], indices, 3, 5)

    for call in (packed, round_trip):
        assert torch.autograd.gradcheck(call, (x,), fast_mode=False)
    (grad,) = torch.autograd.grad(round_trip(x).sum(), x)
    assert torch.equal(grad, mask[..., None].expand_as(x).double())


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_packed_tokens_is_that_on_the_padded_batch(causal):
    mask = MASKS["left" if causal else "right"]
    q, k, v = (normal(3, 7, 2, 8, seed=i, dtype=torch.float64).requires_grad_() for i in range(3))
    padded = accel.softmax_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), mask=mask[:, None, None], causal=causal, backend="reference"
    ).transpose(1, 2)[mask]
    parts = [accel.unpad(x, mask) for x in (q, k, v)]
    _, indices, cu_seqlens, _ = parts[0]
    out = accel.softmax_attention(
        *(p[0].transpose(0, 1)[None] for p in parts), cu_seqlens_q=cu_seqlens, causal=causal, backend="reference"
    )
    back = accel.pad(out[0].transpose(0, 1), indices, 3, 7)
    torch.testing.assert_close(back[mask], padded, rtol=1e-12, atol=1e-12)
    assert not back[~mask].any()
    weight = normal(*padded.shape, seed=9, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(back[mask], (q, k, v), weight),
        torch.autograd.grad(padded, (q, k, v), weight),
        strict=True,
    ):
        assert_close(one, other, "softmax_grad", torch.float32)
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_pad_in_one_graph():
    mask = random_mask(3, 7)
    packed, indices, _, _ = accel.unpad(normal(3, 7, 2), mask)
    torch._dynamo.reset()
    compiled = torch.compile(accel.pad, backend="eager", fullgraph=True)
    assert torch.equal(compiled(packed, indices, 3, 7), accel.pad(packed, indices, 3, 7))
    torch._dynamo.reset()


X, MASK = torch.zeros(3, 7, 2), torch.ones(3, 7, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "words", "x", "mask"),
    [
        (TypeError, "mask must be .* got torch.float32", X, MASK.float()),
        (TypeError, "mask must be .* got torch.complex64", X, MASK.to(torch.complex64)),
        (TypeError, "mask must be .* got list", X, [[True]]),
        (TypeError, "x must be a tensor, got list", [1.0], MASK),
        (ValueError, r"\(3, 7, 2\).*\(7,\)", X, MASK[0]),
        (ValueError, r"\(3, 7, 2\).*\(3, 6\)", X, MASK[:, 1:]),
        (ValueError, r"\(3,\).*\(3, 7\)", X[:, 0, 0], MASK),
        (ValueError, "mask is on meta but x is on cpu", X, MASK.to("meta")),
    ],
)
def test_bad_input_of_unpad(error, words, x, mask):
    with pytest.raises(error, match=words):
        accel.unpad(x, mask)


@pytest.mark.parametrize(
    ("error", "words", "indices", "batch", "seqlen"),
    [
        (ValueError, r"\(4,\).*\(3, 2\)", torch.arange(4), 2, 7),
        (ValueError, r"\(1, 3\)", torch.arange(3)[None], 2, 7),
        (ValueError, "3 tokens do not fit into batch=2 · seqlen=1", torch.arange(3), 2, 1),
        (ValueError, "from 4 to 6 do not lie within batch=2 · seqlen=3", torch.tensor([4, 5, 6]), 2, 3),
        (ValueError, "from -1 to 1 do not lie", torch.tensor([-1, 0, 1]), 2, 3),
        (TypeError, "indices must be int64, got torch.float32", torch.arange(3).float(), 2, 3),
        (TypeError, "indices must be int64, got list", [0, 1, 2], 2, 3),
    ],
)
def test_bad_input_of_pad(error, words, indices, batch, seqlen):
    with pytest.raises(error, match=words):
        accel.pad(torch.zeros(3, 2), indices, batch, seqlen)
