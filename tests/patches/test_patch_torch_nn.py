"""Patched attention of torch.nn where its inputs are unusual: what the class takes is taken, and gives the same."""

import pytest
import torch
from torch import nn

import accel

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 2, batch_first=True, **options).double().eval()
    nn.init.normal_(module.in_proj_bias)
    return module


def result(call):
    """What it gives, or the type of what it raises."""
    try:
        return call()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (0, 3), (3, 0, 5)], ids=str)
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
def test_nested_tensors_without_tokens(lengths, layout):
    """Without any at all, and with sequences that have none: as the class does."""
    attn = attention()
    sequences = [noise(n, 16, seed=n) for n in lengths]
    made = result(lambda: torch.nested.as_nested_tensor(sequences, layout=layout))
    if isinstance(made, type):
        pytest.skip(f"torch makes no such nested tensor: {made.__name__}")

    def call():
        with torch.no_grad():
            return attn(made, made, made, need_weights=False)[0]

    expected = result(call)
    with accel.patch(attn):
        found = result(call)
    if not lengths:
        assert expected is found is AssertionError, "the class says that it takes no such tensor"
        return
    if isinstance(expected, type):  # ours takes more of them
        assert [len(x) for x in found.unbind()] == list(lengths)
        return
    assert found.is_nested
    for x, y in zip(found.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("of_itself", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_bias_of_another_dtype(dtype, of_itself):
    attn = attention().to(dtype)
    attn.in_proj_bias = nn.Parameter(noise(48))
    inputs = [noise(2, 5, 16, seed=n).to(dtype) for n in range(3)]
    inputs = inputs[:1] * 3 if of_itself else inputs
    expected = attn(*inputs, need_weights=False)[0]
    with accel.patch(attn) as report:
        found = attn(*inputs, need_weights=False)[0]
    assert report.rows[0].calls == 1
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_an_integer_mask_is_added_as_eager_attention_adds_it(dtype):
    """transformers hands a mask of four axes on as it is given."""
    interface = pytest.importorskip("accel.patches.transformers_interface")
    q, k, v = (noise(2, 2, 5, 8, seed=n) for n in range(3))
    mask = (noise(2, 1, 5, 5, seed=4) > 0).to(dtype)
    expected = torch.softmax(q @ k.mT * 8**-0.5 + mask, -1) @ v
    found, _ = interface.attention(nn.Module(), q, k, v, mask, scaling=8**-0.5, is_causal=False)
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=0, atol=1e-12)
