"""transformers' routers that a patch takes over: every class against itself, in what it returns and its gradients."""

import ast
import importlib
import inspect
import types
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

import accel
from accel.patches import TABLE, transformers_moe, transformers_routers
from accel.patches.transformers_routers import LEFT, ROUTERS
from accel.patches.unserved import UNSERVED
from accel.testing import assert_close

T, X, K, C = 23, 12, 3, 16


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    """Tests have no more."""
    monkeypatch.setattr(transformers_routers, "LEAST", 0)


FIELDS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), X),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), K),
    **dict.fromkeys(("routed_scaling_factor", "router_scaling_factor", "route_scale"), 2.5),
    "hidden_size": C,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "topk_method": "group_limited_greedy",
    "expert_selection_fn": "softmax",
    "scoring_func": "sqrtsoftplus",
    "use_expert_bias": True,
    "output_multiplier": 0.7,
    "moe_router_logit_softcapping": 1.5,
    "zero_expert_num": 0,
}
OTHERS = [
    ("deepseek_v2.DeepseekV2TopkRouter", {"topk_method": "greedy"}),
    ("deepseek_v3.DeepseekV3TopkRouter", {"norm_topk_prob": False, "n_group": 1, "topk_group": 1}),
    ("qwen3_moe.Qwen3MoeTopKRouter", {"norm_topk_prob": False}),
    ("cohere2_moe.Cohere2MoeTopKRouter", {"expert_selection_fn": "sigmoid"}),
    ("cohere2_moe.Cohere2MoeTopKRouter", {"expert_selection_fn": "sigmoid", "norm_topk_prob": False}),
    ("inkling2.Inkling2TopKRouter", {"scoring_func": "sigmoid"}),
    ("lfm2_moe.Lfm2MoeTopKRouter", {"use_expert_bias": False}),
    ("laguna.LagunaTopKRouter", {"moe_router_logit_softcapping": 0.0}),
    ("axk2.AXK2TopkRouter", {"n_group": None, "topk_group": None}),
]
FIRST = {names[0] for names in transformers_routers._CLASSES.values()} - {"axk2.AXK2TopkRouter"}
"""One class of each kind; the others differ in names."""


def class_of(name):
    family, _, cls = name.partition(".")
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), cls)


def built(name, **fields):
    torch.manual_seed(0)
    module = class_of(name)(types.SimpleNamespace(**{**FIELDS, **fields}))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    for buffer in module.buffers():
        nn.init.normal_(buffer, std=0.2)
    return module


def call(module, dtype):
    """What the module returns for tokens, the weights as ``(T, X)`` too, and gradients."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, C, generator=generator).to(dtype).requires_grad_()
    names = [p for p in inspect.signature(type(module).forward).parameters if p.endswith("_bias")]
    given = {name: 0.2 * torch.randn(X, generator=generator) for name in names}
    three_axes = type(module).__name__ == "AfmoeTokenChoiceRouter"
    out = module(x[None] if three_axes else x, **given)
    dense = torch.zeros(T, X, dtype=out[1].dtype).scatter(1, out[2], out[1])
    parameters = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad((dense.float() * torch.linspace(-1, 1, X)).sum(), [x, *parameters])
    return out, dense.detach(), grads


def check(name, dtype, **fields):
    module = built(name, **fields).to(dtype)
    if type(module).__name__.startswith("Inkling2"):
        module.float()  # as it reads its tokens
    want, dense, grads = call(module, dtype)
    report = accel.patch(module, ops="moe_route")
    got, mine, my_grads = call(module, dtype)
    (row,) = report.rows
    assert (row.calls, row.fallbacks, row.op) == (1, {}, "moe_route"), str(report)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    assert [x.shape for x in got] == [x.shape for x in want]
    assert torch.equal(got[0], want[0])
    same = (got[2].sort(-1)[0] == want[2].sort(-1)[0]).all(-1)
    if dtype == torch.float32:
        assert same.all()
        assert_close(mine, dense.double(), "softmax", dtype, "weights")
        for a, b in zip(my_grads, grads, strict=True):
            assert_close(a, b.double(), "softmax_grad", dtype, "gradients")
    else:  # where rounded scores are equal, either expert is right
        assert same.float().mean() > 0.8
        torch.testing.assert_close(mine[same], dense[same], rtol=2**-6, atol=2**-7)
    assert accel.unpatch(module) == [""]
    assert torch.equal(call(module, dtype)[1], dense)


@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in ROUTERS]
)
def test_a_router_returns_what_its_class_returns(name):
    fields = {"n_group": None} if name.startswith("axk2") else {}
    for dtype in (torch.float32, torch.bfloat16):
        check(name, dtype, **fields)


@pytest.mark.parametrize(("name", "fields"), OTHERS)
def test_as_its_configuration_says(name, fields):
    check(name, torch.float32, **fields)


def test_few_tokens_are_left_to_the_class(monkeypatch):
    """Where it has no groups: one call of ours takes longer than its lines."""
    monkeypatch.setattr(transformers_routers, "LEAST", X * T + 1)
    for name, fallbacks in (("mixtral.MixtralTopKRouter", 1), ("deepseek_v3.DeepseekV3TopkRouter", 0)):
        module = built(name)
        report = accel.patch(module)
        module(torch.randn(T, C))
        module(torch.randn(2 * T, C))
        assert (sum(report.rows[0].fallbacks.values()), report.rows[0].calls) == (fallbacks, 2 - fallbacks)


def test_what_the_op_does_not_compute_is_left_with_a_reason():
    for name, fields, words in [
        ("axk2.AXK2TopkRouter", {}, "outside its groups count as 0"),
        ("deepseek_v2.DeepseekV2TopkRouter", {"topk_method": "noaux"}, "its topk_method is 'noaux', not one of"),
        ("inkling2.Inkling2TopKRouter", {"scoring_func": "tanh"}, "its score is a Tanh"),
    ]:
        report = accel.patch(built(name, **fields), allow_none=True)
        assert not report.replaced
        assert words in report.skipped[0].reason
    module = built("gpt_oss.GptOssTopKRouter")
    report = accel.patch(module)
    module(torch.randn(0, C))
    module(torch.randn(1, T, C))
    assert list(report.rows[0].fallbacks) == [
        "there are no tokens to route",
        "its hidden states have 3 axes, and it takes 2",
    ]


@pytest.mark.slow
def test_every_router_is_known():
    """Every class beside experts of the registry that chooses by ``topk`` is taken over, or left with a reason."""
    known = {name.partition(".")[2] for name in (*ROUTERS, *LEFT)}
    found = set()
    for family in {name.partition(".")[0] for name in transformers_moe.EXPERTS}:
        path = Path(transformers.__file__).parent / "models" / family / f"modeling_{family}.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and ("Router" in node.name or "Gat" in node.name):
                found |= {node.name} if "topk(" in ast.unparse(node) else set()
    assert len(found) > 50
    assert found - known == set()
    for name in LEFT:
        family, _, cls = name.partition(".")
        path = f"transformers.models.{family}.modeling_{family}.{cls}"
        assert path in UNSERVED
        assert path not in TABLE
        assert class_of(name) is not None
