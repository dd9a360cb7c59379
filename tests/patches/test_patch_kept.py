"""Where only the reference could compute, a patched module keeps its own code, and the report says why."""

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("transformers")

import transformers
from _swin_models import build

import accel
from accel import dispatch
from accel.patches import stand

pytestmark = pytest.mark.usefixtures("as_a_user_has_it")

FLOAT64 = (
    "only the reference of window_attention computes torch.float64 on cpu, which is no faster "
    "(cpu: it computes float32, bfloat16 and float16, not torch.float64)"
)
MISSING = "accel._C did not load: ImportError: no such file"


@pytest.fixture
def without_kernels(monkeypatch):
    """As after an installation without a compiler, on a machine without a GPU."""
    monkeypatch.setitem(dispatch._leaves, "accel._C", (None, MISSING))
    for op in dispatch.OPS.values():
        monkeypatch.setitem(dispatch._leaves, dispatch.leaf_of(op.function.__module__), (None, "no GPU"))


def test_float64_is_the_classs_own(caplog):
    model, x = build("torchvision v1")
    expected = model.eval()(x)
    report = accel.patch(model)
    assert len(report.replaced) == 4
    assert [row.kept for row in report.rows] == [FLOAT64] * 4
    assert str(report).count("keeps its own code: only the reference") == 4
    assert torch.equal(model(x), expected)
    assert [(row.calls, row.fallbacks) for row in report.rows] == [(0, {FLOAT64: 1})] * 4
    assert str(report).count("only the reference of window_attention") == 4
    assert FLOAT64 in caplog.text
    assert report.verify(x) == 0
    with accel.use(backend="reference"):
        assert report.rows[0].kept is None
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert [row.calls for row in report.rows] == [1] * 4
    model.float()(x.float())
    assert [row.calls for row in report.rows] == [2] * 4
    assert [row.kept for row in report.rows] == [None] * 4


def test_a_strict_call_raises_as_before():
    model, x = build("torchvision v1")
    accel.patch(model)
    with accel.use(strict=True), pytest.raises(NotImplementedError, match="strict mode"):
        model(x)


@pytest.mark.parametrize("name", ["torchvision v1", "timm v1", "Swin"])
def test_without_a_native_build(name, without_kernels):
    model, x = build(name)
    model, x = model.float().eval(), x.float()
    with torch.no_grad():
        expected = model(x)[0]
        report = accel.patch(model)
        assert torch.equal(model(x)[0], expected)
    assert all(row.calls == 0 and MISSING in next(iter(row.fallbacks)) for row in report.rows)


@pytest.mark.usefixtures("without_kernels")
def test_a_device_that_no_kernel_is_made_for():
    reason = stand.only_reference("softmax_attention", "meta", torch.float32)
    assert reason.endswith("computes torch.float32 on meta, which is no faster (there is no kernel for such a device)")


def test_compiled_it_is_one_graph_of_the_class():
    model, x = build("torchvision v1")
    block = model.eval().get_submodule("features.1.1.attn")
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    expected = block(x)
    report = accel.patch(block)
    found = torch.compile(block, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert report.rows[0].kept == FLOAT64


SMALL = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
IDS = torch.arange(14).view(2, 7)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_of_the_registry_keeps_its_own(implementation):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, attn_implementation=implementation)).eval()
    with torch.no_grad():
        expected = model(IDS, attention_mask=MASK).logits
        report = accel.patch(model)
        assert all("only the reference of softmax_attention" in row.kept for row in report.rows)
        found = model(IDS, attention_mask=MASK).logits
        torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], rtol=0, atol=1e-6)
        generated = model.generate(IDS, attention_mask=MASK, max_new_tokens=3, do_sample=False)
        accel.unpatch(model)
        assert torch.equal(generated, model.generate(IDS, attention_mask=MASK, max_new_tokens=3, do_sample=False))
    assert all(row.calls == 0 and MISSING in next(iter(row.fallbacks)) for row in report.rows)
