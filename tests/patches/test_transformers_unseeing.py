"""transformers: queries that the mask lets see no key get the mean of all values, as from eager attention."""

import types

import pytest
import torch

pytest.importorskip("transformers")

from _transformers_models import IDS, RIGHT, bert, randomize
from _transformers_odd import SOUND, lasr, parakeet
from transformers.models.llama.modeling_llama import eager_attention_forward

import accel
from accel.patches import transformers_interface
from accel.patches.transformers_rules import LazyMask, MaskRule

pytestmark = pytest.mark.usefixtures("on_reference")


@pytest.mark.parametrize("window", [None, (2, -1), (1, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", [(6, 6, 0), (3, 6, 3), (1, 6, 5)])
def test_who_sees_nothing_is_known_from_the_rule(window, causal, sizes):
    queries, keys, offset = sizes
    padding = torch.tensor([[0, 0, 0, 1, 1, 1], [0] * 6, [1] * 6, [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    rule = MaskRule(4, queries, keys, torch.device("cpu"), causal, window, offset, padding)
    none = ~rule.dense().any(-1, keepdim=True)
    assert torch.equal(rule.unseeing, none)
    assert MaskRule(4, queries, keys, torch.device("cpu"), causal, window, offset, padding[2:3]).unseeing is None
    assert MaskRule(4, queries, keys, torch.device("cpu"), causal, window, offset).unseeing is None


@pytest.mark.parametrize("kind", ["rule", "lazy", "dense", "inference"])
@pytest.mark.parametrize("heads", [4, 2])
def test_who_sees_nothing_gets_the_mean_as_from_eager(kind, heads):
    padding = torch.tensor([[0, 0, 0, 1, 1], [0] * 5, [1] * 5], dtype=torch.bool)
    rule = MaskRule(3, 5, 5, torch.device("cpu"), True, None, 0, padding)
    module = types.SimpleNamespace(num_key_value_groups=4 // heads, training=False)
    generator = torch.Generator().manual_seed(1)
    q, k, v = [torch.randn(3, h, 5, 8, generator=generator, requires_grad=True) for h in (4, heads, heads)]
    g = torch.randn(3, 5, 4, 8, generator=generator)
    added = torch.zeros(3, 1, 5, 5).masked_fill(~rule.dense(), torch.finfo(torch.float32).min)
    expected, _ = eager_attention_forward(module, q, k, v, added, scaling=0.4)
    expected_gradients = torch.autograd.grad((expected * g).sum(), (q, k, v))
    mask = {"rule": lambda: rule, "lazy": lambda: LazyMask(rule), "dense": rule.dense}.get(kind, rule.dense)()
    if kind == "inference":
        with torch.inference_mode():
            found, _ = transformers_interface.attention(torch.nn.Module(), q, k, v, mask.clone(), scaling=0.4)
        torch.testing.assert_close(found.clone(), expected.detach(), rtol=1e-5, atol=1e-6)
        return
    found, _ = transformers_interface.attention(torch.nn.Module(), q, k, v, mask, scaling=0.4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found_gradients = torch.autograd.grad((found * g).sum(), (q, k, v))
    for a, b in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_is_not_finite_reaches_only_who_sees_it():
    padding = torch.tensor([[0, 0, 1, 1]], dtype=torch.bool)
    rule = MaskRule(1, 4, 4, torch.device("cpu"), True, None, 0, padding)
    q, k, v = [torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3)]
    poisoned = k + torch.tensor([torch.nan, 0.0, 0.0, 0.0])[:, None]
    out, _ = transformers_interface.attention(torch.nn.Module(), q, poisoned, v, rule)
    assert out[:, 2:].isfinite().all()
    gradient = torch.autograd.grad(out[:, 2:].sum(), q)[0]
    assert gradient[:, :, 2:].isfinite().all()


@pytest.mark.parametrize("make", [parakeet, lasr])
def test_encoders_with_convolutions_read_padded_rows(make):
    model = randomize(make())
    model.set_attn_implementation("eager")
    expected = model(**SOUND).last_hidden_state
    report = accel.patch(model)
    torch.testing.assert_close(model(**SOUND).last_hidden_state, expected, rtol=1e-4, atol=2e-5)
    assert all(row.calls == 1 for row in report.rows), str(report)


def test_a_fully_padded_row_of_a_batch_is_that_of_eager():
    model = randomize(bert())
    model.set_attn_implementation("eager")
    mask = RIGHT.clone()
    mask[1] = 0
    expected = model(IDS, attention_mask=mask).logits
    accel.patch(model)
    torch.testing.assert_close(model(IDS, attention_mask=mask).logits, expected, rtol=1e-4, atol=2e-5)
    model.compile(fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, attention_mask=mask).logits, expected, rtol=1e-4, atol=2e-5)
