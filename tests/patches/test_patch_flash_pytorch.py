"""flash-pytorch's layers, patched: outputs and gradients of a whole model, padded, and what is left to the class."""

import pytest
import torch

import accel
from accel.testing import assert_close

flash_pytorch = pytest.importorskip("flash_pytorch")


def awake(model):
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "gamma" in name or "relative" in name:
            torch.nn.init.normal_(p)
    return model


def transformer(**given):
    torch.manual_seed(0)
    return awake(
        flash_pytorch.FLASHTransformer(dim=32, num_tokens=50, depth=2, group_size=16, query_key_dim=16, **given)
    )


def run(model, *args, **given):
    model.zero_grad()
    out = model(*args, **given)
    out.square().mean().backward()
    return [out.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


def check_equal(model, replaced, *args, **given):
    """In float64 by the reference, where rounding hides nothing, and the output by a kernel."""
    plain = model(*args, **given)
    with accel.patch(model) as report:
        assert_close(model(*args, **given), plain.double(), "gau", torch.float32)
        assert [row.calls for row in report.replaced] == [1] * replaced
    assert torch.equal(model(*args, **given), plain)
    model.double()
    args = [x.double() if x.is_floating_point() else x for x in args]
    given = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in given.items()}
    expected = run(model, *args, **given)
    with accel.patch(model) as report, accel.use(backend="reference"):
        got = run(model, *args, **given)
        assert [row.calls for row in report.replaced] == [1] * replaced
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [None, "right", "left"])
def test_whole_models(padded, causal):
    ids = torch.randint(0, 50, (2, 37), generator=torch.Generator().manual_seed(0))
    real = torch.arange(37)[None] < torch.tensor([[37], [20]])
    mask = None if padded is None else real if padded == "right" else real.flip(1)
    check_equal(transformer(causal=causal, laplace_attn_fn=causal), 2, ids, mask=mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_units(with_bias, causal):
    torch.manual_seed(0)
    unit = awake(flash_pytorch.GAU(dim=32, query_key_dim=16, causal=causal))
    x = torch.randn(2, 23, 32, generator=torch.Generator().manual_seed(3))
    bias = torch.randn(23, 23, generator=torch.Generator().manual_seed(4)) if with_bias else None
    mask = torch.arange(23)[None] < torch.tensor([[23], [9]])
    check_equal(unit, 1, x, rel_pos_bias=bias, mask=mask)


def test_compiled_and_checkpointed():
    model = transformer(causal=True)
    ids = torch.randint(0, 50, (2, 37))
    expected = run(model, ids)
    accel.patch(model)
    compiled = torch.compile(model, backend="aot_eager")
    for a, b in zip(run(compiled, ids), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    layer, x = model.layers[0], torch.randn(2, 20, 32, requires_grad=True)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(again.sum(), x)
    (plain,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(grad, plain)


def test_what_is_left_to_the_class():
    model = transformer(causal=False, reduce_group_non_causal_attn=False)
    with pytest.raises(ValueError, match="reduce_group_non_causal_attn is off"):
        accel.patch(model)
    model = transformer(causal=True)
    model.layers[0].attn_fn = torch.nn.GELU()
    report = accel.patch(model)
    assert [row.name for row in report.replaced] == ["layers.1"]
    assert "attn_fn is GELU" in str(report)
