"""Linear attention in pictures: Sana and its autoencoder in diffusers, EfficientViT in timm, computed by the op."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("diffusers")

import timm
from _linear_models import every_backend, gradients, noise
from diffusers.models import attention_processor
from timm.models import efficientvit_mit

import accel
from accel.patches import TABLE, diffusers
from accel.testing import assert_close


def sana(heads=3, dim_head=8, **options):
    return attention_processor.Attention(
        query_dim=heads * dim_head, heads=heads, dim_head=dim_head, bias=True,
        processor=attention_processor.SanaLinearAttnProcessor2_0(), **options,
    )  # fmt: skip


def autoencoder(**options):
    return attention_processor.SanaMultiscaleLinearAttention(16, 16, attention_head_dim=8, **options)


def efficientvit(**options):
    return efficientvit_mit.LiteMLA(16, 16, dim=8, **options)


TOKENS, OTHERS, MAP = (2, 13, 24), (2, 7, 24), (2, 16, 5, 4)
# name: module, shapes of its inputs
MODULES = {
    "Sana": (sana, (TOKENS,)),
    "Sana, norms": (lambda: sana(qk_norm="rms_norm_across_heads", kv_heads=3), (TOKENS,)),
    "Sana, of others": (sana, (TOKENS, OTHERS)),
    "autoencoder": (autoencoder, (MAP,)),
    "autoencoder, two scales": (lambda: autoencoder(kernel_sizes=(3, 5), residual_connection=True), (MAP,)),
    "EfficientViT": (efficientvit, (MAP,)),
    "EfficientViT, two scales": (lambda: efficientvit(scales=(3, 5), use_bias=True), (MAP,)),
    "EfficientViT, another map": (lambda: efficientvit(kernel_func=nn.ReLU6), (MAP,)),
}


def build(name, dtype=torch.float32):
    make, shapes = MODULES[name]
    torch.manual_seed(3)
    module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.3, 0.3)
    # not around 0: beside rows of next to no weight even the class's gradients in float32 would be off
    return module.to(dtype).eval(), [noise(*shape, seed=i, dtype=dtype) + 0.5 for i, shape in enumerate(shapes)]


def call_of(module, inputs):
    names, count = [name for name, _ in module.named_parameters()], len(inputs)

    def call(*given):
        return torch.func.functional_call(module, dict(zip(names, given[count:], strict=True)), given[:count])

    return call, [*inputs, *module.parameters()]


@pytest.fixture
def exactly(monkeypatch):
    """The classes ask for float32 inside; in float64 throughout they say what is right."""

    def of(module, inputs):
        with monkeypatch.context() as wide:
            wide.setattr(torch.Tensor, "float", torch.Tensor.double)
            to = torch.Tensor.to
            wide.setattr(torch.Tensor, "to", lambda x, *a, dtype=None, **how: to(x, *a, **how) if a or how else x)
            return gradients(*call_of(copy.deepcopy(module).double(), [x.double() for x in inputs]))

    return of


@every_backend
@pytest.mark.parametrize("name", MODULES)
def test_modules_compute_the_same(name, backend, exactly):
    module, inputs = build(name)
    own, _ = gradients(*call_of(module, inputs))
    expected, expected_gradients = exactly(module, inputs)
    report = accel.patch(module)
    with accel.use(backend=backend):
        found, found_gradients = gradients(*call_of(module, inputs))
    assert [(row.op, row.calls, row.fallbacks, row.backend) for row in report.rows] == [
        ("linear_attention", 1, {}, backend)
    ]
    assert found[0].dtype == own[0].dtype == torch.float32
    assert_close(found[0], expected[0], "linear", torch.float32)
    largest = max(float(g.abs().max()) for g in expected_gradients)
    for a, b in zip(found_gradients, expected_gradients, strict=True):
        error = float((a - b).abs().max())
        assert error <= 3e-5 * max(float(b.abs().max()), 0.1 * largest), "the bound of a row of linear_grad"
    assert accel.unpatch(module) == [""]
    again, _ = gradients(*call_of(module, inputs))
    assert torch.equal(again[0], own[0])


@every_backend
@pytest.mark.parametrize("name", ["Sana", "autoencoder", "EfficientViT"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(name, dtype, backend):
    module, inputs = build(name)
    exact = module(*inputs)
    for cast in (True, False) if dtype == torch.bfloat16 else (False,):  # Sana's eps is 0 where autocast asks for fp16
        mine = copy.deepcopy(module).to(torch.float32 if cast else dtype)
        given = [x.to(torch.float32 if cast else dtype) for x in inputs]
        with torch.autocast("cpu", dtype, enabled=cast):
            own = mine(*given)
            report = accel.patch(mine)
            with accel.use(backend=backend):
                found = mine(*given)
        assert report.rows[0].calls == 1
        assert found.dtype == own.dtype
        errors = [float((x.double() - exact).abs().max()) for x in (found, own)]
        unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
        assert errors[0] <= 2 * errors[1] + unit * float(exact.abs().max()), errors


@pytest.mark.usefixtures("on_reference")
@pytest.mark.parametrize("name", ["Sana", "autoencoder", "EfficientViT"])
def test_a_wrong_kernel_is_seen(name, monkeypatch):
    module, inputs = build(name)
    report = accel.patch(module)
    stand = report.rows[0].replacement
    op = stand.attend
    monkeypatch.setattr(stand, "attend", lambda q, k, v, **how: op(q, k, v + 0.01, **how))
    assert report.verify(*inputs) > 1e-5


@pytest.mark.usefixtures("on_reference")
def test_whole_models():
    model = timm.create_model("efficientvit_b0", num_classes=5).eval()
    x = noise(1, 3, 64, 64, dtype=torch.float32)
    report = accel.patch(model, ops="linear_attention")
    assert {row.old_class for row in report.replaced} == {"LiteMLA"}
    assert report.verify(x) < 1e-4
    assert not report.uncalled()


# --- what is left to the class ---


@pytest.mark.usefixtures("on_reference")
def test_the_processor_decides_by_which_op_a_module_computes():
    plain = attention_processor.Attention(query_dim=24, heads=3, dim_head=8)
    both = nn.ModuleList([sana(), plain])
    report = accel.patch(both)
    assert [row.op for row in report.rows] == ["linear_attention", "softmax_attention"]
    accel.unpatch(both)
    for op, name in (("linear_attention", "0"), ("softmax_attention", "1")):
        with accel.patch(both, ops=op) as report:
            assert [row.name for row in report.rows] == [name]
    x = noise(*TOKENS, dtype=torch.float32)
    report = accel.patch(both)
    both[0].set_processor(attention_processor.AttnProcessor2_0())
    assert both[0](x).shape == x.shape
    (reason,) = report.rows[0].fallbacks
    assert reason == f"its processor is {diffusers.PROCESSOR}, not {diffusers.SANA}"


def test_where_only_the_reference_computes_the_class_does(as_a_user_has_it):
    module, inputs = build("EfficientViT", torch.float64)
    expected = module(*inputs)
    report = accel.patch(module)
    assert torch.equal(module(*inputs), expected)
    assert next(iter(report.rows[0].fallbacks)).startswith("only the reference of linear_attention computes")


@pytest.mark.usefixtures("on_reference")
def test_what_was_put_in_the_way_is_called():
    module, inputs = build("EfficientViT")
    module._attn = lambda q, k, v: v[..., :-1]
    with pytest.raises(ValueError, match="its _attn has been replaced"):
        accel.patch(module)
    module, inputs = build("EfficientViT")
    seen = []
    module.kernel_func.register_forward_hook(lambda *a: seen.append(a[2].shape))
    expected = module(*inputs)
    accel.patch(module)
    torch.testing.assert_close(module(*inputs), expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == 4


def test_the_kinds_of_a_class_are_in_the_table():
    assert TABLE[f"{diffusers.MODULE}.Attention with {diffusers.SANA}"].op == "linear_attention"
    assert diffusers.class_path(attention_processor.SanaLinearAttnProcessor2_0) == diffusers.SANA
