"""``accel.scaled_dot_product_attention`` against torch's own, argument for argument."""

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from _bad import Bad, check_bad, each

import accel
from accel.testing import assert_close


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def boolean(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.7


def no_keys_for_some(*shape):
    mask = boolean(*shape)
    mask[..., 1, :] = False
    return mask


def minus_inf(*shape):
    return normal(*shape, seed=4).masked_fill(~no_keys_for_some(*shape), -torch.inf)


def test_the_signature_is_that_of_torch():
    ours = inspect.signature(accel.scaled_dot_product_attention).parameters
    words = F.scaled_dot_product_attention.__doc__.split("scaled_dot_product_attention(")[1].split(") ->")[0]
    theirs = [word.split("=")[0].strip(" \n*") for word in words.replace("\n", " ").split(",")]
    theirs = [name.split(":")[0] for name in theirs if name]
    assert list(ours) == theirs
    defaults = {n: p.default for n, p in ours.items() if p.default is not inspect.Parameter.empty}
    assert defaults == {
        "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False
    }  # fmt: skip


L, S, D, E = 7, 9, 16, 8
Q, K, V = (2, 3, L, D), (2, 3, S, D), (2, 3, S, E)
CALLS = {
    "plain": (Q, K, V, {}),
    "scale": (Q, K, V, {"scale": 1.0}),
    "causal": (Q, K, V, {"is_causal": True}),
    "causal_more_queries": ((2, 3, S, D), (2, 3, L, D), (2, 3, L, E), {"is_causal": True}),
    "two_axes": ((L, D), (S, D), (S, E), {}),
    "two_axes_causal": ((L, D), (S, D), (S, E), {"is_causal": True}),
    "two_axes_mask": ((L, D), (S, D), (S, E), {"attn_mask": boolean(L, S)}),
    "three_axes": ((3, L, D), (3, S, D), (3, S, E), {}),
    "three_axes_mask": ((3, L, D), (3, S, D), (3, S, E), {"attn_mask": boolean(3, L, S)}),
    "three_axes_bias_of_keys": ((3, L, D), (3, S, D), (3, S, E), {"attn_mask": normal(3, 1, S, seed=4)}),
    "five_axes": ((2, 1, 3, L, D), (2, 1, 3, S, D), (2, 1, 3, S, E), {"is_causal": True}),
    "five_axes_mask_2d": ((2, 5, 3, L, D), (2, 5, 3, S, D), (2, 5, 3, S, E), {"attn_mask": boolean(L, S)}),
    "five_axes_mask_3d": ((2, 5, 3, L, D), (2, 5, 3, S, D), (2, 5, 3, S, E), {"attn_mask": boolean(3, L, S)}),
    "five_axes_mask_4d": ((2, 5, 3, L, D), (2, 5, 3, S, D), (2, 5, 3, S, E), {"attn_mask": boolean(5, 1, L, S)}),
    "five_axes_mask_5d": ((2, 5, 3, L, D), (2, 5, 3, S, D), (2, 5, 3, S, E), {"attn_mask": boolean(2, 1, 3, 1, S)}),
    "five_axes_bias": ((2, 5, 3, L, D), (2, 5, 3, S, D), (2, 5, 3, S, E), {"attn_mask": normal(2, 5, 1, L, S)}),
    "heads_broadcast": (Q, (2, 1, S, D), (2, 1, S, E), {}),
    "batch_broadcasts": ((1, 3, L, D), K, (1, 3, S, E), {"is_causal": True}),
    "axes_broadcast": ((L, D), (3, S, D), (2, 1, S, E), {}),
    "gqa": ((2, 6, L, D), (2, 2, S, D), (2, 2, S, E), {"enable_gqa": True}),
    "gqa_three_axes": ((6, L, D), (2, S, D), (2, S, E), {"enable_gqa": True}),
    "gqa_mask": ((2, 6, L, D), (2, 2, S, D), (2, 2, S, E), {"enable_gqa": True, "attn_mask": boolean(2, 6, L, S)}),
    "gqa_same_heads": (Q, K, V, {"enable_gqa": True, "is_causal": True}),
    "mask": (Q, K, V, {"attn_mask": boolean(2, 3, L, S)}),
    "mask_of_batch": (Q, K, V, {"attn_mask": boolean(2, 1, L, S)}),
    "mask_of_keys": (Q, K, V, {"attn_mask": boolean(2, 1, 1, S)}),
    "mask_3d": (Q, K, V, {"attn_mask": boolean(3, L, S)}),
    "mask_2d": (Q, K, V, {"attn_mask": boolean(L, S)}),
    "mask_without_keys": (Q, K, V, {"attn_mask": no_keys_for_some(2, 3, L, S)}),
    "bias": (Q, K, V, {"attn_mask": normal(2, 3, L, S)}),
    "bias_of_heads": (Q, K, V, {"attn_mask": normal(1, 3, L, S)}),
    "bias_2d": (Q, K, V, {"attn_mask": normal(L, S)}),
    "bias_minus_inf": (Q, K, V, {"attn_mask": minus_inf(2, 1, L, S)}),
    "no_queries": ((2, 3, 0, D), K, V, {}),
    "no_batch": ((0, 3, L, D), (0, 3, S, D), (0, 3, S, E), {"is_causal": True}),
    "no_batch_of_five": ((2, 0, 3, L, D), (2, 0, 3, S, D), (2, 0, 3, S, E), {}),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_it_is_that_of_torch(name, backend):
    *shapes, how = CALLS[name]
    given = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    wide = [x.detach().double().requires_grad_() for x in given]
    mine, theirs = dict(how), dict(how)
    mask = how.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        mine["attn_mask"], theirs["attn_mask"] = mask.clone().requires_grad_(), mask.double().requires_grad_()
        given, wide = [*given, mine["attn_mask"]], [*wide, theirs["attn_mask"]]
    with accel.use(backend=backend):
        out = accel.scaled_dot_product_attention(*given[:3], **mine)
        expected = F.scaled_dot_product_attention(*wide[:3], **theirs)
        assert_close(out, expected, "softmax_few", torch.float32, name)
        weight = normal(*expected.shape, seed=8)
        got = torch.autograd.grad(out, given, weight)
    want = torch.autograd.grad(expected, wide, weight.double())
    for x, one, other in zip(given, got, want, strict=True):
        assert one.shape == x.shape
        assert_close(one, other, "softmax_few_grad", torch.float32, f"gradient of {tuple(x.shape)}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    q, k, v = (normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate((Q, K, V)))
    out = accel.scaled_dot_product_attention(q, k, v, attn_mask=normal(L, S, dtype=dtype))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), normal(L, S, dtype=dtype).double())
    assert out.dtype == dtype
    assert_close(out, expected, "softmax_few", torch.float32 if dtype == torch.float64 else dtype)


def test_dropout_is_drawn_from_the_generator_and_keeps_the_mean():
    q, k = torch.zeros(1, 2, 400, 8), torch.zeros(1, 2, 50, 8)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(accel.scaled_dot_product_attention(q, k, torch.ones(1, 2, 50, 8), dropout_p=0.4))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert abs(outs[0].mean().item() - 1.0) < 0.02
    assert outs[0].std() > 0.05


def test_positional_arguments_stand_where_torch_has_them():
    q, k, v = (normal(*shape, seed=i) for i, shape in enumerate(((2, 3, L, D), (2, 1, S, D), (2, 1, S, E))))
    for mask, causal in ((None, True), (boolean(L, S), False)):
        arguments = (mask, 0.0, causal)
        out = accel.scaled_dot_product_attention(q, k, v, *arguments, scale=0.3, enable_gqa=True)
        expected = F.scaled_dot_product_attention(q, k, v, *arguments, scale=0.3, enable_gqa=True)
        assert_close(out, expected, "softmax_few", torch.float32)


GOOD = {"query": normal(*Q), "key": normal(*K), "value": normal(*V)}
BAD = [
    Bad("mask_and_causal", ValueError, r"not both.*\(7, 9\)", {"attn_mask": boolean(L, S), "is_causal": True}),
    Bad("one_axis", ValueError, r"at least 2-D.*\(16,\)", {"query": normal(D)}),
    Bad("sizes", ValueError, r"do not fit.*\(2, 3, 9, 8\)", {"key": normal(2, 3, S, 8)}),
    Bad("heads", ValueError, r"divide.*\(2, 4, 9, 16\)",
        {"query": normal(2, 6, L, D), "key": normal(2, 4, S, D), "value": normal(2, 4, S, E), "enable_gqa": True}),
    Bad("mask_shape", ValueError, r"\(2, 3, 7, 9\).*\(1, 1, 7, 7\)", {"attn_mask": boolean(L, L)}),
    Bad("dropout", ValueError, "dropout_p=1.5", {"dropout_p": 1.5}),
]  # fmt: skip


@each(BAD)
def test_bad_input(bad):
    check_bad(accel.scaled_dot_product_attention, GOOD, bad)


def test_an_integer_mask_is_refused():
    q, k, v = (normal(*shape) for shape in (Q, K, V))
    with pytest.raises(TypeError, match="int64"):
        accel.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(L, S, dtype=torch.int64))


def test_tensors_that_do_not_broadcast_are_refused():
    for heads in itertools.permutations((2, 3, 1)):
        shapes = [(2, h, n, D) for h, n in zip(heads, (L, S, S), strict=True)]
        with pytest.raises((RuntimeError, ValueError)):
            accel.scaled_dot_product_attention(*(normal(*shape) for shape in shapes))
