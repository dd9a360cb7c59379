"""transformers: whole models switched to the registered attention and masks, and calls that the op does not serve.

Tiny random-weight models of the real classes, on the reference backend: what is tested is what reaches the op.
"""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from _transformers_models import (
    BATCH,
    DECODER,
    GAPS,
    IDS,
    LEFT,
    LENGTH,
    MODELS,
    PICTURE,
    RIGHT,
    T5,
    TEXT,
    assert_same,
    assert_same_gradients,
    beit,
    both,
    checkpointing,
    gradients,
    llama,
    outputs,
    qwen3,
    randomize,
    t5,
    text,
)
from transformers import masking_utils
from transformers.modeling_utils import AttentionInterface

import accel
from accel.patches import transformers_interface, transformers_switch
from accel.patches.transformers_rules import LazyBias, MaskRule

pytestmark = pytest.mark.usefixtures("on_reference")

# --- the same function ---


@pytest.mark.parametrize("name", MODELS)
def test_patched_model_computes_the_same(name):
    make, inputs, rows = MODELS[name]
    model = randomize(make())
    keys, configs = list(model.state_dict()), [vars(m).get("config") for m in model.modules()]
    expected, expected_gradients = gradients(model, inputs)
    report = accel.patch(model)
    attention = [r for r in report.replaced if r.old_class != "MultiheadAttention" and not r.op.startswith("moe")]
    assert len(attention) == rows, str(report)
    found, found_gradients = gradients(model, inputs)
    assert_same(found, expected)
    assert_same_gradients(found_gradients, expected_gradients)
    for row in attention:
        assert row.calls >= 1, str(report)
        assert not row.fallbacks, str(report)
        prepares = "compute_bias" in row.old_class or "RelativePositionBias" in row.old_class
        assert row.backend == (None if prepares else "reference")
    assert list(model.state_dict()) == keys
    accel.unpatch(model)
    assert [vars(m).get("config") for m in model.modules()] == configs
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), expected, strict=True))
    assert not any("_accel" in vars(m) for m in model.modules())


def test_a_table_counts_whatever_a_version_calls_causal():
    """transformers 5.17 does not call the decoder's own attention of UMT5 causal."""
    make, inputs, _ = MODELS["UMT5"]
    model = randomize(make())
    for block in model.decoder.block:
        block.layer[0].SelfAttention.is_causal = False
    expected = outputs(model, inputs)
    accel.patch(model)
    assert_same(outputs(model, inputs), expected)


def test_a_wrong_attention_is_seen(monkeypatch):
    """The comparison above can fail: each thing that is read here matters to some model."""
    original = transformers_interface.pairs

    def without(name):
        return lambda *args: {k: v for k, v in original(*args).items() if k != name}

    for name, argument in (
        ("Llama, left", "mask"), ("Llama", "causal"), ("Qwen3", "window"), ("T5", "bias_table"), ("BEiT", "bias_index"),
    ):  # fmt: skip
        make, inputs, _ = MODELS[name]
        model = randomize(make())
        expected = outputs(model, inputs)
        with accel.patch(model), monkeypatch.context() as patched:
            patched.setattr(transformers_interface, "pairs", without(argument))
            if argument == "bias_index":
                with pytest.raises(TypeError, match="bias_index"):
                    outputs(model, inputs)
                continue
            if argument == "bias_table":
                patched.setattr(transformers_interface, "pairs", lambda *args: {
                    k: v for k, v in original(*args).items() if not k.startswith("bias")})  # fmt: skip
            found = outputs(model, inputs)
        assert max(float((a - b).detach().abs().max()) for a, b in zip(found, expected, strict=True)) > 1e-3, name


@pytest.mark.parametrize("name", ["T5", "UMT5", "BEiT", "BEiT, shared", "Data2VecVision"])
def test_a_bias_from_a_table_is_never_written_out(name, monkeypatch):
    make, inputs, _ = MODELS[name]
    model = randomize(make())
    report = accel.patch(model)

    def dense(self):
        raise AssertionError(f"{self} was written out")

    monkeypatch.setattr(LazyBias, "dense", dense)
    monkeypatch.setattr(MaskRule, "dense", dense)
    gradients(model, inputs)
    assert not report.uncalled()


def test_a_padded_causal_batch_needs_no_dense_mask(monkeypatch):
    model = randomize(qwen3())
    report = accel.patch(model)
    monkeypatch.setattr(MaskRule, "dense", lambda self: pytest.fail("the mask was written out"))
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda *args, **kwargs: pytest.fail("the mask was written out"))
    model(**text(LEFT))
    assert not report.uncalled()


@pytest.mark.parametrize("name", ["Llama", "GPT-OSS", "Gemma2", "T5"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache(name, cache):
    model = randomize(MODELS[name][0]())
    how = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6, "attention_mask": LEFT}
    if cache == "static":
        how |= {"cache_implementation": "static", "disable_compile": True}
    expected = model.generate(IDS, **how)
    report = accel.patch(model)
    assert torch.equal(model.generate(IDS, **how), expected)
    rows = [row for row in report.rows if row.op == "softmax_attention"]
    counts = [row.calls for row in rows if "compute_bias" not in row.old_class]
    encoder = 2 if name == "T5" else 0
    assert counts[encoder:] == [6] * (len(counts) - encoder)
    assert all(row.calls == 6 for row in report.rows if row.op == "moe_experts")
    late = {"its cache counts tokens on the device"} if name == "T5" and cache == "static" else set()
    assert {reason for row in rows for reason in row.fallbacks} == late


def test_gradient_checkpointing_recomputes_the_same():
    for make, inputs in ((t5, both(RIGHT)), (llama, text(LEFT))):
        model = randomize(make()).train()
        expected, expected_gradients = gradients(model, inputs)
        report = accel.patch(model)
        for reentrant in (False, True):
            checkpointing(model, {"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
            found, found_gradients = gradients(model, inputs)
            assert_same(found, expected)
            assert_same_gradients(found_gradients, expected_gradients)
        assert all(row.calls >= 4 for row in report.rows if "compute_bias" not in row.old_class)


@pytest.mark.parametrize("make", [
    lambda: (llama(num_hidden_layers=1), text(LEFT)),
    lambda: (beit(use_relative_position_bias=True, num_hidden_layers=1), PICTURE),
    lambda: (transformers.T5EncoderModel(transformers.T5Config(**{**T5, "num_layers": 1})), text(RIGHT)),
], ids=["Llama", "BEiT", "T5"])  # fmt: skip
def test_compiled_model_is_one_graph(make):
    model, inputs = make()
    randomize(model)
    expected = outputs(model, inputs)
    report = accel.patch(model)
    model.compile(fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_same(outputs(model, inputs), expected)
    assert not report.uncalled()


def test_dropout_is_applied_in_training_only():
    model = randomize(llama(attention_dropout=0.5))
    accel.patch(model)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    model.eval()
    assert torch.equal(model(IDS).logits, model(IDS).logits)


# --- what the registry alone does ---


def test_both_registries_know_the_name():
    assert AttentionInterface._global_mapping["accel"] is transformers_interface.attention
    assert masking_utils.AttentionMaskInterface._global_mapping["accel"] is transformers_interface.mask


@pytest.mark.parametrize("mask", [LEFT, RIGHT, GAPS], ids=["left", "right", "gaps"])
def test_a_registered_name_keeps_the_padding(mask, monkeypatch):
    model = randomize(llama())
    expected = model(**text(mask)).logits[mask.bool()]
    model.set_attn_implementation("accel")
    torch.testing.assert_close(model(**text(mask)).logits[mask.bool()], expected, rtol=1e-4, atol=2e-5)
    monkeypatch.delitem(masking_utils.AttentionMaskInterface._global_mapping, "accel")  # the trap
    if mask is LEFT:
        assert float((model(**text(mask)).logits[mask.bool()] - expected).detach().abs().max()) > 1e-2
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**text(mask)).logits[mask.bool()], expected)


def test_a_model_is_built_with_the_name():
    model = randomize(llama(attn_implementation="accel"))
    other = randomize(llama())
    assert_same([model(**text(LEFT)).logits[LEFT.bool()]], [other(**text(LEFT)).logits[LEFT.bool()]])
    assert model.config._attn_implementation == "accel"
    report = accel.patch(model)  # counts from here on
    model(IDS)
    assert [row.calls for row in report.rows] == [1, 1]


def test_chunked_attention_and_packed_positions():
    config = transformers.Llama4TextConfig(
        **DECODER, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48, no_rope_layers=[1, 0]
    )
    model = randomize(transformers.Llama4ForCausalLM(config))
    expected = model(**text(LEFT)).logits[LEFT.bool()]
    accel.patch(model)
    assert_same([model(**text(LEFT)).logits[LEFT.bool()]], [expected])
    model = randomize(llama())
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    expected = model(IDS[:1], position_ids=positions).logits
    report = accel.patch(model)
    assert_same([model(IDS[:1], position_ids=positions).logits], [expected])
    assert not report.uncalled()


def test_float_masks_are_added():
    model = randomize(llama())
    mask = torch.randn(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(5))
    expected = model(IDS, attention_mask=mask).logits
    accel.patch(model)
    assert_same([model(IDS, attention_mask=mask).logits], [expected])


# --- calls that the op does not serve ---


@pytest.mark.parametrize("name", ["BERT", "Llama, left", "GPT-OSS", "T5"])
def test_asking_for_attention_weights_falls_back_for_that_call(name, caplog):
    make, inputs, _ = MODELS[name]
    model = randomize(make())
    model.set_attn_implementation("eager")
    expected = model(**inputs, output_attentions=True)
    report = accel.patch(model)
    found = model(**inputs, output_attentions=True)
    key = "decoder_attentions" if name == "T5" else "attentions"
    assert len(found[key]) == len(expected[key]) == 2
    real = inputs["decoder_attention_mask" if name == "T5" else "attention_mask"].bool()
    for a, b in zip(found[key], expected[key], strict=True):
        torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], rtol=1e-4, atol=1e-5)
    rows = [row for row in report.rows if row.op == "softmax_attention" and "compute_bias" not in row.old_class]
    assert all(row.fallbacks == {"attention weights are asked for": 1} and row.calls == 0 for row in rows)
    assert "attention weights are asked for" in caplog.text
    model(**inputs)
    assert all(row.calls == 1 for row in rows)


def test_weights_without_a_patch_are_said_once(caplog):
    model = randomize(llama(attn_implementation="accel"))
    for _ in range(2):
        assert model(IDS, output_attentions=True).attentions[0].shape == (BATCH, 4, LENGTH, LENGTH)
    assert caplog.text.count("LlamaAttention is not served by accel: attention weights are asked for") <= 1


def test_what_is_not_known_raises():
    q = torch.zeros(1, 1, 2, 8)
    module = nn.Module()
    with pytest.raises(NotImplementedError, match="passes indices=Tensor to its attention"):
        transformers_interface.attention(module, q, q, q, None, indices=q)
    with pytest.raises(NotImplementedError, match="cache=object"):
        transformers_interface.attention(module, q, q, q, None, cache=object())
    with pytest.raises(NotImplementedError, match="cannot serve Module: attention weights are asked for"):
        transformers_interface.attention(module, q, q, q, None, output_attentions=True)
    out, weights = transformers_interface.attention(module, q, q, q, None, use_cache=True, position_ids=q)
    assert out.shape == (1, 2, 1, 8)
    assert weights is None


def test_sparse_attention_is_not_claimed():
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention

    module = DeepseekV32Attention.__new__(DeepseekV32Attention)
    assert transformers_switch.why_not(module) == "it passes indices to its attention, which the op does not know"


def test_modules_that_ignore_the_registry_are_not_claimed():
    model = transformers.RoFormerModel(transformers.RoFormerConfig(**TEXT, embedding_size=32))
    with pytest.raises(ValueError, match=r"RoFormer\w*Attention .*: it is not known here"):
        accel.patch(model)
    assert model.config._attn_implementation != "accel"
