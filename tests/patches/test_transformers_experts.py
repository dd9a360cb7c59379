""" "accel" in transformers' registry of experts: every decorated class against its own eager forward."""

import ast
import importlib
import inspect
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import accel
from accel import dispatch, testing
from accel.ops.moe import grouped_linear, moe_experts
from accel.testing import assert_close

transformers = pytest.importorskip("transformers")
moe = pytest.importorskip("transformers.integrations.moe")

T, K, X, C, I = 21, 3, 5, 12, 10  # noqa: E741

FIELDS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), X),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), C),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), I),
    **dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act"), "silu"),
    "swiglu_limit": 0.7,
    **dict.fromkeys(("mlp_gate_softcap", "mlp_up_softcap"), 1.5),
    "swiglu_alpha": 1.702,
    "post_norm_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "moe_latent_size": None,
}

ONE_CALL = {
    "MixtralExperts": "mixtral",
    "Qwen3MoeExperts": "qwen3_moe",
    "GptOssExperts": "gpt_oss",
    "OpenAIPrivacyFilterExperts": "openai_privacy_filter",
    "MiniMaxM3VLExperts": "minimax_m3_vl",
    "DeepseekV4Experts": "deepseek_v4",
    "AriaExperts": "aria",
    "NemotronHExperts": "nemotron_h",
    "BeamExperts": "beam",
}
IN_PARTS = {"MuseSparkExperts": "muse_spark", "Inkling2Experts": "inkling2"}


def decorated():
    """The classes of the installed transformers that the registry serves, by name, and the folder of each."""
    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "use_experts_implementation" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and any(
                "use_experts_implementation" in ast.unparse(by) for by in node.decorator_list
            ):
                found[node.name] = f"{path.parent.name}/{path.stem}"
    return found


def built(name, folder, **fields):
    """A small one, with random weights."""
    folder, _, file = folder.partition("/")
    module = importlib.import_module(f"transformers.models.{folder}.{file or f'modeling_{folder}'}")
    cls = getattr(module, name)
    config = types.SimpleNamespace(**{**FIELDS, **fields}, _experts_implementation="eager")
    needed = [p for p in inspect.signature(cls.__init__).parameters if p in ("layer_idx",)]
    torch.manual_seed(0)
    made = cls(config, **dict.fromkeys(needed, 0))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


def call(made, implementation, x, indices, weights):
    made.config._experts_implementation = implementation
    leaves = [x.detach().requires_grad_(), weights.detach().requires_grad_()]
    out = made(leaves[0], indices, leaves[1])
    parameters = list(made.parameters())
    grads = torch.autograd.grad(out, [*leaves, *parameters], torch.linspace(-1, 1, out.numel()).view(out.shape))
    return out.detach(), grads


def inputs():
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(T, X, generator=generator).softmax(-1)
    weights, indices = scores.topk(K)
    return torch.randn(T, C, generator=generator), indices, weights


def check(made):
    """Output and every gradient, and how many calls of which op."""
    given = inputs()
    want, grads = call(made, "eager", *given)
    with testing.watch(moe_experts.OP) as whole, testing.watch(grouped_linear.OP) as parts:
        got, mine = call(made, "accel", *given)
    assert_close(got, want.double(), "experts", torch.float32, "output")
    names = ["x", "weights", *[name for name, _ in made.named_parameters()]]
    for name, a, b in zip(names, mine, grads, strict=True):
        assert_close(a, b.double(), "experts_grad", torch.float32, f"gradient of {name}")
    return whole, parts


needs_kernel = pytest.mark.skipif(
    dispatch.leaf_reason("accel._C") is not None, reason="without a kernel transformers' own function runs"
)
FORTH_AND_BACK = [("cpu", "forward"), ("cpu", "backward")]


SHORT = ("MixtralExperts", "GptOssExperts", "DeepseekV4Experts", "NemotronHExperts")  # the others differ in names


@needs_kernel
@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in ONE_CALL]
)
def test_one_call_serves(name):
    whole, parts = check(built(name, ONE_CALL[name]))
    assert (whole, parts) == (FORTH_AND_BACK, [])


@needs_kernel
@pytest.mark.parametrize("name", IN_PARTS)
def test_a_gate_or_norm_of_its_own_stands_between_two_calls(name):
    whole, parts = check(built(name, IN_PARTS[name]))
    assert whole == []
    assert sorted(parts) == sorted(2 * FORTH_AND_BACK)


@needs_kernel
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "gelu_new"])
def test_activations_that_the_op_knows(act):
    whole, parts = check(built("MixtralExperts", "mixtral", hidden_act=act))
    assert (whole, parts) == (FORTH_AND_BACK, [])


@needs_kernel
@pytest.mark.parametrize("act", ["mish", "tanh", "leaky_relu"])
def test_activations_that_it_does_not_know(act):
    whole, parts = check(built("MixtralExperts", "mixtral", hidden_act=act))
    assert whole == []
    assert sorted(parts) == sorted(2 * FORTH_AND_BACK)


@needs_kernel
def test_a_changed_limit_is_tried_again():
    made = built("GptOssExperts", "gpt_oss")
    check(made)
    made.limit = 0.2
    whole, parts = check(made)
    assert (whole, parts) == (FORTH_AND_BACK, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", decorated())
def test_every_class(name):
    whole, parts = check(built(name, decorated()[name]))
    assert whole or parts or dispatch.leaf_reason("accel._C") is not None


@needs_kernel
@pytest.mark.slow
def test_compiled_in_one_graph():
    made = built("Qwen3MoeExperts", "qwen3_moe")
    given = inputs()
    want, _ = call(made, "eager", *given)
    made.config._experts_implementation = "accel"
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(made, fullgraph=True, backend="aot_eager")(*given)
    torch._dynamo.reset()
    assert_close(got, want.double(), "experts", torch.float32)


def test_a_choice_of_another_rank_gives_nothing():
    made = built("Qwen3MoeExperts", "qwen3_moe")
    x, indices, weights = inputs()
    made._is_expert_parallel = True
    indices[::2, 1] = X
    want, grads = call(made, "eager", x, indices, weights)
    got, mine = call(made, "accel", x, indices, weights)
    assert_close(got, want.double(), "experts", torch.float32)
    assert not mine[1][::2, 1].any()
    for a, b in zip(mine, grads, strict=True):
        assert_close(a, b.double(), "experts_grad", torch.float32)


def tiny(**fields):
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        **fields,
    )
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config).eval()


@needs_kernel
def test_a_model_by_the_name_alone():
    model = tiny()
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(3))
    model.set_experts_implementation("eager")
    with torch.no_grad():
        want = model(tokens).logits
        written = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    model.set_experts_implementation("accel")
    with testing.watch(moe_experts.OP) as ran, torch.no_grad():
        assert_close(model(tokens).logits, want.double(), "experts", torch.float32)
        assert ran == 2 * [("cpu", "forward")]
        assert torch.equal(model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0), written)
    assert len(ran) == 2 * 7


@needs_kernel
def test_training_in_bf16_and_float64():
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(3))
    for dtype in (torch.bfloat16, torch.float64):
        model = tiny().to(dtype)
        model.set_experts_implementation("accel")
        model(tokens, labels=tokens).loss.backward()
        experts = model.model.layers[0].mlp.experts
        assert experts.gate_up_proj.grad.dtype == dtype
        assert experts.gate_up_proj.grad.isfinite().all()


def test_the_registry_knows_the_name():
    assert "accel" in moe.ALL_EXPERTS_FUNCTIONS
    assert accel.__version__
