"""FP8 checkpoints in transformers: loaded on a CPU, equal to what their codes stand for, trained, and saved again."""

import pytest
import torch
from _fp8_checkpoint import config, write
from safetensors.torch import load_file

import accel
from accel.patches import transformers_fp8

transformers = pytest.importorskip("transformers")
Model = transformers.DeepseekV3ForCausalLM
WEIGHT_ONLY = accel.FP8Recipe(scaling="weight_only", size_rule=False)
BLOCK = accel.FP8Recipe(size_rule=False)
TOKENS = torch.arange(46).view(2, 23) * 7 % 128
CODES = [torch.float8_e4m3fn, torch.float8_e8m0fnu]


def load(path, recipe=None):
    with accel.fp8_checkpoints(recipe):
        return Model.from_pretrained(path, dtype=torch.float32)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


def relative(a, b):
    return float((a - b).norm() / b.norm())


def bits(state):
    return {n: t.view(torch.uint8) if t.dtype in CODES else t for n, t in state.items()}


def is_served(model):
    return {type(m).__name__ for m in model.modules() if "forward" in vars(m)}


@pytest.fixture(scope="module", params=["fp32", "e8m0"])
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("fp8") / request.param
    return path, *write(transformers, path, request.param)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("fp8") / "dense"
    return path, *write(transformers, path, dense=True)


def test_weight_only_gives_the_logits_of_what_the_codes_stand_for(checkpoint):
    path, oracle, _ = checkpoint
    model = load(path, WEIGHT_ONLY)
    assert is_served(model) == {"FP8Linear", "FP8Experts"}
    projection = model.model.layers[0].self_attn.kv_a_proj_with_mqa
    assert projection.weight.dtype == torch.float8_e4m3fn
    assert projection.weight.shape[0] == 160
    assert relative(logits(model), logits(oracle)) < 2e-6


def test_the_default_recipe_is_the_references(checkpoint):
    path, oracle, _ = checkpoint
    model = load(path, BLOCK)
    found = logits(model)
    with accel.use(backend="reference"):
        want = logits(model)
    # a sum's last bit may move a rounded activation to its neighbour
    assert relative(found, want) < 5e-3
    # and may send a token to another expert than plain activations do
    assert 1e-4 < relative(found, logits(oracle)) < 0.2


def test_it_generates_and_takes_padding(checkpoint):
    path, oracle, _ = checkpoint
    model = load(path, WEIGHT_ONLY)
    mask = torch.ones_like(TOKENS)
    mask[0, :9] = 0
    made = [m.generate(TOKENS, attention_mask=mask, max_new_tokens=5, do_sample=False) for m in (model, oracle)]
    assert torch.equal(*made)


def test_behind_the_block_it_stays_served_until_it_is_unpatched(dense):
    path, *_ = dense
    model = load(path, WEIGHT_ONLY)
    want = logits(model)
    quantizer = transformers_fp8.importlib.import_module(transformers_fp8.QUANTIZER).FineGrainedFP8HfQuantizer
    assert quantizer.validate_environment.__module__.startswith("transformers")
    assert torch.equal(logits(model), want)
    assert len(accel.unpatch(model)) == 16
    assert is_served(model) == set()


def test_gradients_reach_what_stands_before_the_codes(dense):
    path, oracle, _ = dense
    model = load(path, WEIGHT_ONLY)
    for m in (model, oracle):
        m.zero_grad()
        m(TOKENS, labels=TOKENS).loss.backward()
    found, want = (m.model.embed_tokens.weight.grad for m in (model, oracle))
    assert relative(found, want) < 1e-5
    assert model.model.layers[0].mlp.up_proj.weight.grad is None


def test_saved_as_it_was_loaded(dense, tmp_path):
    path, _, tensors = dense
    model = load(path)
    model.save_pretrained(tmp_path)
    written = bits(load_file(tmp_path / "model.safetensors"))
    for name, want in bits(tensors).items():
        assert torch.equal(written[name], want), name


def test_there_to_masters_and_back_is_the_same_bits(checkpoint):
    path, _, tensors = checkpoint
    model = load(path)
    report = accel.fp8_convert(model, "master")
    assert set(report.left) == {"model.layers.1.mlp.experts", "lm_head"}
    assert "experts in FP8 stay as they are" in str(report)
    assert model.model.layers[0].self_attn.o_proj.weight.dtype == torch.float32
    recipe = accel.FP8Recipe(scale_format="e8m0" if path.name == "e8m0" else "fp32")
    accel.fp8_convert(model, "fp8", recipe=recipe)
    state = bits(model.state_dict())
    for name, want in bits(tensors).items():
        if ".experts." not in name:
            assert torch.equal(state[name], want), name


def test_trained_saved_and_loaded_again(dense, tmp_path):
    path, _, tensors = dense
    model = load(path)
    accel.fp8_convert(model, "master")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    accel.fp8_convert(model, "fp8")
    want = logits(model.eval())
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), want)
    name = "model.layers.0.mlp.up_proj.weight"
    assert again.get_parameter(name).dtype == torch.float8_e4m3fn
    assert not torch.equal(bits(again.state_dict())[name], bits(tensors)[name])


# --- what is refused, and in which words ---

SCALE = "model.layers.0.self_attn.o_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda tensors, _: tensors.pop(SCALE), ValueError, f"{SCALE} is missing from the checkpoint"),
        (lambda _, settings: settings.update(activation_scheme="static"), NotImplementedError, "static scales"),
        (lambda _, settings: settings.update(expert_dtype="fp4"), NotImplementedError, "FP4"),
        (
            lambda _, settings: settings.update(weight_block_size=[64, 64]), (NotImplementedError, RuntimeError),
            r"o_proj.*\(64, 64\)|ignore_mismatched_sizes",
        ),
    ],
    ids=["missing_scale", "static", "fp4", "blocks"],
)  # fmt: skip
def test_a_checkpoint_of_another_kind_is_refused(tmp_path, change, error, words):
    write(transformers, tmp_path, dense=True, change=change)
    with pytest.raises(error, match=words):
        load(tmp_path)


def test_a_checkpoint_in_full_precision_is_refused_by_name(tmp_path):
    Model(config(transformers, dense=True)).save_pretrained(tmp_path)
    plain = transformers.FineGrainedFP8Config()
    with accel.fp8_checkpoints(), pytest.raises(NotImplementedError, match=r"accel\.fp8_convert"):
        Model.from_pretrained(tmp_path, quantization_config=plain)
