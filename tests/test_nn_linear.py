"""accel.nn.LinearAttention: the op between projections, its state, and one token at a time."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import accel
from accel.testing import assert_close

LIGHTNING = [-(2.0 ** (-8 * (h + 1) / 2)) for h in range(2)]
MODULES = {
    "plain": {},
    "causal": {"causal": True},
    "decays, grouped": {"causal": True, "num_kv_heads": 2, "log_decay": LIGHTNING, "normalize": False},
    "relu, scaled": {"feature_map": "relu", "scale": 0.3, "eps": 1e-3, "bias": False},
    "other widths": {"kdim": 12, "vdim": 20},
    "cosFormer": {"feature_map": ("cosformer", 32)},
    "features of its own": {"feature_map": lambda x: torch.cat([x, -x], -1).relu(), "causal": True},
}


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def build(dtype=torch.float64, **options):
    torch.manual_seed(2)
    module = accel.nn.LinearAttention(16, 4, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, 0.4)
    return module.to(dtype)


def by_hand(module, query, key, value, mask=None):
    """What the module computes, batch first, with each projection on its own."""
    width, kv_width = 16, module.head_dim * module.num_kv_heads
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        weights = module.in_proj_weight.split([width, kv_width, kv_width])
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.split([width, kv_width, kv_width])
    q, k, v = [
        nn.functional.linear(x, w, b).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    ]
    how = {n: getattr(module, n) for n in ("causal", "feature_map", "normalize", "scale", "log_decay", "eps")}
    out = accel.linear_attention(q, k, v, key_mask=mask, **how, backend="reference")
    return module.out_proj(out.transpose(1, 2).flatten(2))


def given(module, T=7, S=None):
    S = T if S is None else S
    return noise(3, T, 16), noise(3, S, module.kdim, seed=1), noise(3, S, module.vdim, seed=2)


@pytest.mark.parametrize("name", MODULES)
def test_it_is_the_op_between_projections(name):
    module = build(batch_first=True, **MODULES[name])
    query, key, value = given(module, 7, 7 if module.causal else 9)
    mask = torch.ones(key.shape[:2], dtype=torch.bool)
    mask[1, :3] = mask[2, 5:] = False
    expected = by_hand(module, query, key, value)
    torch.testing.assert_close(module(query, key, value), expected, rtol=1e-11, atol=1e-11)
    masked = by_hand(module, query, key, value, mask)
    torch.testing.assert_close(module(query, key, value, ~mask), masked, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(masked, expected)

    tokens_first = build(**MODULES[name])
    out = tokens_first(*[x.transpose(0, 1) for x in (query, key, value)], ~mask)
    torch.testing.assert_close(out.transpose(0, 1), masked, rtol=1e-11, atol=1e-11)
    alone = tokens_first(query[1], key[1], value[1], ~mask[1])
    torch.testing.assert_close(alone, masked[1], rtol=1e-11, atol=1e-11)
    if name != "other widths":
        torch.testing.assert_close(module(query), by_hand(module, query, query, query), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["causal", "decays, grouped", "features of its own"])
def test_a_text_token_by_token(name):
    module = build(batch_first=True, **MODULES[name])
    x = noise(3, 9, 16)
    expected = module(x)
    with torch.no_grad():
        first, state = module(x[:, :4], return_state=True)
        rows = [module.step(x[:, t], state) for t in range(4, 6)]
        middle, state = module(x[:, 6:8], initial_state=state, return_state=True)
        found = torch.cat([first, torch.stack(rows, 1), middle, module.step(x[:, 8], state)[:, None]], 1)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        state = module.zero_state(3)
        rows = [module.step(x[:, t], state) for t in range(9)]
    torch.testing.assert_close(torch.stack(rows, 1), expected, rtol=1e-11, atol=1e-11)
    assert (state[1] is None) == (not module.normalize)


def test_fp32_within_the_tolerance_table():
    module = build(causal=True, log_decay=[-0.1, -0.5, 0.0, -3.0], batch_first=True)
    x = noise(3, 70, 16)
    expected = module(x)
    module.float()
    assert_close(module(x.float()), expected, "linear", torch.float32)
    with torch.no_grad():
        state = module.zero_state(3)
        rows = [module.step(x[:, t].float(), state) for t in range(70)]
    assert_close(torch.stack(rows, 1), expected, "linear", torch.float32)


def test_every_parameter_has_a_gradient():
    module = build(batch_first=True, causal=True)
    state = tuple(y.requires_grad_() for y in module.zero_state(2))
    out, (kv, _) = module(noise(2, 5, 16), initial_state=state, return_state=True)
    (out.square().sum() + kv.square().sum()).backward()
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())
    assert state[0].grad.abs().sum() > 0


def test_weights_of_softmax_attention_load():
    torch.manual_seed(4)
    softmax = accel.nn.MultiHeadAttention(16, 4, num_kv_heads=2)
    torch.manual_seed(4)
    module = accel.nn.LinearAttention(16, 4, num_kv_heads=2)
    for name, value in softmax.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), f"{name} is drawn alike"
    module.load_state_dict(softmax.state_dict())
    softmax.load_state_dict(module.state_dict())


def test_decays_and_projections_go_where_the_module_goes():
    projection = noise(20, 4, seed=5)
    module = build(torch.float32, feature_map=("performer", projection), batch_first=True)
    assert set(module.state_dict()) >= {"projection", "in_proj_weight", "out_proj.bias"}
    assert module(noise(2, 5, 16, dtype=torch.float32)).shape == (2, 5, 16)
    module = build(torch.float32, causal=True, log_decay=torch.tensor([-1.0, -2.0, -3.0, 0.0]))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin.log_decay, module.log_decay)
    assert module.to("meta").log_decay.is_meta
    assert not list(accel.nn.LinearAttention(16, 4).buffers())


def test_it_compiles_in_one_graph():
    module = build(torch.float32, causal=True, batch_first=True)
    x = noise(2, 6, 16, dtype=torch.float32)
    found = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, module(x), rtol=1e-5, atol=1e-5)


def test_what_it_says_of_itself():
    assert repr(accel.nn.LinearAttention(16, 4)).splitlines()[:2][0] == "LinearAttention("
    text = build(**MODULES["decays, grouped"]).extra_repr()
    assert text == "embed_dim=16, num_heads=4, num_kv_heads=2, causal=True, normalize=False"
    assert build(feature_map="relu").extra_repr() == "embed_dim=16, num_heads=4, feature_map=relu"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 3}, "num_heads must divide embed_dim, got embed_dim=16, num_heads=3"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got num_heads=4, num_kv_heads=3"),
        ({"feature_map": "tanh"}, "feature_map must be one of identity, elu1.*got 'tanh'"),
        ({"log_decay": [-1.0] * 4}, "log_decay needs causal=True"),
        ({"log_decay": [-1.0] * 3, "causal": True}, "log_decay must be 4 numbers at most 0"),
        ({"log_decay": [-1.0, 0.0, 0.1, -1.0], "causal": True}, "log_decay must be 4 numbers at most 0"),
        ({"log_decay": [-1.0, 0.0, math.nan, -1.0], "causal": True}, "log_decay must be 4 numbers at most 0"),
    ],
)
def test_bad_modules(options, words):
    with pytest.raises(ValueError, match=words):
        accel.nn.LinearAttention(**{"embed_dim": 16, "num_heads": 4, **options})


def test_bad_calls():
    module = build(batch_first=True)
    x = noise(2, 5, 16)
    with pytest.raises(ValueError, match="step needs causal=True"), torch.no_grad():
        module.step(x[:, 0], module.zero_state(2))
    with pytest.raises(TypeError, match=r"key_padding_mask must be boolean.*torch\.float64"):
        module(x, key_padding_mask=torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"key_mask must be \(B, S\) = \(2, 5\), got .*\(2, 4\)"):
        module(x, key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="query, key and value must be"):
        module(x, x[0])
    module = build(batch_first=True, causal=True)
    with pytest.raises(ValueError, match=r"one token for each entry of the batch, \(B, C\), got .*\(2, 1, 16\)"):
        module.step(x[:, :1], module.zero_state(2))
    with pytest.raises(NotImplementedError, match="call it under torch"):
        module.step(x[:, 0], module.zero_state(2))
