"""transformers: models that ask for "accel" by name are served right, or refused with their class's name."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from _transformers_models import DECODER, IMAGE, PICTURE, RIGHT, TEXT, bert, clip, llama, randomize, text
from _transformers_odd import (
    PIXELS_AND_TEXT,
    RELYING,
    SEQ2SEQ,
    bigbird_pegasus,
    clap,
    deepseek_v32,
    git,
    minimax,
    sam,
)
from transformers import PreTrainedModel

import accel
from accel.patches import transformers_interface

pytestmark = pytest.mark.usefixtures("on_reference")

GPT = {"vocab_size": 50, "hidden_size": 32, "num_layers": 1, "num_heads": 4, "num_attention_heads": 4}

# class: configuration
REFUSED = {
    "BigBirdModel": {**TEXT, "block_size": 2, "num_random_blocks": 1},
    "BloomModel": {"vocab_size": 50, "hidden_size": 32, "n_layer": 1, "n_head": 4},
    "BlipTextModel": TEXT,
    "BlipVisionModel": IMAGE,
    "ConvBertModel": {**TEXT, "embedding_size": 32, "conv_kernel_size": 3},
    "Data2VecVisionModel": IMAGE,
    "FalconModel": {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    "GPTNeoModel": {**GPT, "attention_types": [[["global"], 1]], "max_position_embeddings": 64},
    "GPTNeoXJapaneseModel": {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    "GroupViTVisionModel": {**IMAGE, "depths": [1, 0, 0], "num_group_tokens": [4, 2, 0]},
    "IBertModel": TEXT,
    "LEDModel": {**SEQ2SEQ, "attention_window": 4, "max_encoder_position_embeddings": 64},
    "LongformerModel": {**TEXT, "attention_window": 4},
    "MPNetModel": TEXT,
    "MegatronBertModel": TEXT,
    "MvpModel": SEQ2SEQ,
    "NystromformerModel": {**TEXT, "num_landmarks": 2, "segment_means_seq_len": 64},
    "RemBertModel": {**TEXT, "input_embedding_size": 16, "output_embedding_size": 16},
    "RoFormerModel": {**TEXT, "embedding_size": 32},
    "SqueezeBertModel": {**TEXT, "embedding_size": 32},
    "Swinv2Model": {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2]},
    "TapasModel": TEXT,
    "TrOCRForCausalLM": {**SEQ2SEQ, "d_model": 32},
    "XGLMModel": {"vocab_size": 50, "d_model": 32, "num_layers": 1, "attention_heads": 4, "ffn_dim": 48},
}


def configured(name, **options):
    cls = getattr(transformers, name)
    return cls, cls.config_class(**{**REFUSED[name], **options})


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_that_asks_no_registry_is_refused(name):
    cls, config = configured(name, attn_implementation="accel")
    with pytest.raises(ValueError, match=f'^{name} cannot take attn_implementation="accel": no attention of it asks'):
        cls(config)
    model = cls._from_config(configured(name)[1], attn_implementation="eager")
    with pytest.raises(ValueError, match=f"^{name} cannot take .* Load it with .*accel.patch"):
        model.set_attn_implementation("accel")
    assert model.config._attn_implementation == "eager", "a refusal changes nothing"


def test_loading_is_refused_as_well(tmp_path):
    cls, config = configured("BloomModel")
    cls(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^BloomModel cannot take .*BloomAttention"):
        transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="accel")
    assert transformers.AutoModel.from_pretrained(tmp_path).config._attn_implementation == "eager"


def of(make, name):
    """The model of ``make`` with another attention."""

    def made():
        before = PreTrainedModel.__init__

        def init(self, config, *args, **kwargs):
            config._attn_implementation = name
            before(self, config, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(PreTrainedModel, "__init__", init)
            return make()

    return randomize(made())


def values(model, inputs, training=False):
    out = model(**inputs, use_cache=False).logits
    mask = inputs.get("attention_mask" if "decoder_input_ids" not in inputs else "decoder_attention_mask")
    if mask is not None and out.shape[1] >= mask.shape[1]:  # GIT's logits begin with its image
        out = out[:, -mask.shape[1] :][mask.bool()]
    return out


def with_gradients(model, inputs):
    model.zero_grad()
    out = values(model, inputs)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(8))).sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=2e-5)
    largest = max(float(g.abs().max()) for g in expected[1].values())
    for name, gradient in expected[1].items():
        error = float((found[1][name] - gradient).abs().max())
        assert error <= 1e-4 * max(float(gradient.abs().max()), 1e-2 * largest), f"{name}: {error}"


@pytest.mark.parametrize("name", RELYING)
def test_who_relies_on_the_masks_of_eager_gets_them(name):
    make, inputs = RELYING[name]
    expected = with_gradients(of(make, "eager"), inputs)
    model = of(make, "accel")
    assert transformers_interface.EAGER_MASKS in {m.config._attn_implementation for m in models_in(model)}
    assert_close(with_gradients(model, inputs), expected)
    assert_close(with_gradients(pickle.loads(pickle.dumps(model)), inputs), expected)
    again = of(make, "eager")
    again.set_attn_implementation("accel")
    assert_close(with_gradients(again, inputs), expected)
    again.set_attn_implementation("eager")
    assert torch.equal(values(again, inputs), values(of(make, "eager"), inputs))


@pytest.mark.parametrize("name", RELYING)
def test_a_patch_leaves_them_their_masks(name):
    make, inputs = RELYING[name]
    model = of(make, "eager")
    expected = with_gradients(model, inputs)
    report = accel.patch(model)
    assert_close(with_gradients(model, inputs), expected)
    routers = [row.name for row in report.rows if row.op == "moe_route"]  # which leave so few tokens to their class
    assert set(report.uncalled()) <= set(routers)
    assert report.verify(**inputs, use_cache=False) < 1e-4


def test_a_mask_is_written_out_only_where_it_must_be():
    """The decoder of T5 and BART, and all of BERT and Llama, keep their rules: the look above finds no more than it
    should."""
    for make in (bert, llama, clip, minimax, lambda: transformers.T5Model(transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)),
        lambda: transformers.BartModel(transformers.BartConfig(**SEQ2SEQ)),
        lambda: transformers.WhisperModel(transformers.WhisperConfig(**SEQ2SEQ, num_mel_bins=8))):  # fmt: skip
        assert {m.config._attn_implementation for m in models_in(of(make, "accel"))} == {"accel"}


def models_in(model):
    return [m for m in model.modules() if isinstance(m, PreTrainedModel)]


def test_a_table_of_classes_takes_the_name():
    """GIT and SAM look a class up by the name: what is served in them is served, the rest is left as it is."""
    model = of(sam, "accel")
    expected = of(sam, "eager")(**PICTURE).pred_masks
    torch.testing.assert_close(model(**PICTURE).pred_masks, expected, rtol=1e-4, atol=2e-5)
    assert of(git, "accel")(**PIXELS_AND_TEXT).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"^SamVisionModel cannot take"):
        transformers.SamVisionModel(transformers.SamVisionConfig(**IMAGE, attn_implementation="accel"))


def test_a_part_that_cannot_is_named(caplog):
    model = of(clap, "accel")
    assert model.text_model.config._attn_implementation == "accel"
    assert caplog.text.count("ClapAudioModel is not served by accel: its attention (ClapAudio") <= 1
    assert type(model.audio_model).__name__ == "ClapAudioModel"
    with pytest.raises(ValueError, match=r"^ClapAudioModel cannot take"):
        model.audio_model.set_attn_implementation("accel")


def test_a_dict_names_parts():
    config = clip().config
    model = transformers.CLIPModel._from_config(config, attn_implementation={"": "eager", "text_config": "accel"})
    assert model.text_model.config._attn_implementation == "accel"
    assert model.vision_model.config._attn_implementation == "sdpa", "what it had"
    model.set_attn_implementation({"vision_config": "accel"})
    assert model.vision_model.config._attn_implementation == "accel"
    audio = of(clap, "eager")
    with pytest.raises(ValueError, match=r"^ClapModel cannot take .*ClapAudioSelfAttention"):
        audio.set_attn_implementation({"audio_config": "accel"})
    audio.set_attn_implementation({"text_config": "accel"})
    assert audio.audio_model.config._attn_implementation == "eager"


def test_sparse_attention_is_refused():
    with pytest.raises(ValueError, match=r"self_attn \(DeepseekV32Attention\) it passes indices to its attention"):
        of(deepseek_v32, "accel")
    model = of(deepseek_v32, "eager")
    with pytest.raises(ValueError, match=r"^DeepseekV32ForCausalLM cannot take"):
        model.set_attn_implementation("accel")
    expected = values(model, text(RIGHT))
    report = accel.patch(model, allow_none=True)
    assert [row.reason for row in report.skipped] == ["it passes indices to its attention, which the op does not know"]
    assert torch.equal(values(model, text(RIGHT)), expected)


def test_a_failure_inside_is_forgotten():
    """What stopped half-way is no model that others are built in."""
    kept = []

    class Stops(transformers.BloomPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            kept.append(self)  # post_init is never reached

    cls, config = configured("BloomModel", attn_implementation="accel")
    Stops(transformers.BloomConfig())
    Stops(transformers.LlamaConfig(**DECODER))
    kept.pop(0)
    with pytest.raises(ValueError, match=r"^BloomModel"):
        cls(config)
    assert kept


def test_other_names_are_not_looked_at(monkeypatch):
    from accel.patches import transformers_by_name

    monkeypatch.setattr(transformers_by_name, "look", lambda model: pytest.fail("it was looked at"))
    model = llama(attn_implementation="eager")
    model.set_attn_implementation("sdpa")
    assert copy.deepcopy(model).config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="is not supported"):
        model.set_attn_implementation("no such attention")
    bigbird_pegasus()
