"""``accel.nn.MoE`` against a plain loop over tokens and their experts."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import accel
from accel import ExpertActivation
from accel.nn import Experts, MoE

C, I, X, K, T = 12, 10, 6, 3, 29  # noqa: E741


def tokens(dtype=torch.float64, batch=()):
    return torch.randn(*batch, T, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def built(dtype=torch.float64, **how):
    torch.manual_seed(0)
    return MoE(C, I, X, K, dtype=dtype, **how)


def mlp(x, first, second, first_bias, second_bias, gated=True):
    h = F.linear(x, first, first_bias)
    a = F.silu(h[: len(h) // 2]) * h[len(h) // 2 :] if gated else F.silu(h)
    return F.linear(a, second, second_bias)


def loop(moe, x, mask=None, bias=None):
    """Softmax over all experts, the best of each token, divided by their sum, one token after the other."""
    rows, kept = [], {e: [] for e in range(X)}
    for t, token in enumerate(x):
        scores = F.linear(token, moe.router.weight)
        scores = scores.softmax(-1) if moe.how["score"] == "softmax" else scores.sigmoid()
        compared = scores if bias is None else scores + bias
        chosen = compared.topk(K)[1]
        weights = scores[chosen] / scores[chosen].sum() * moe.how["scale"]
        rows.append(list(zip(chosen.tolist(), weights, strict=True)) if mask is None or mask[t] else [])
        for e, w in rows[-1]:
            kept[e].append((-w.item(), t))
    if moe.capacity_factor is not None:
        capacity = math.ceil(moe.capacity_factor * len(x) * K / X)
        kept = {e: {t for _, t in sorted(all_)[:capacity]} for e, all_ in kept.items()}
    else:
        kept = {e: {t for _, t in all_} for e, all_ in kept.items()}
    experts, shared, out = moe.experts, moe.shared, []
    for t, token in enumerate(x):
        total = torch.zeros(C, dtype=x.dtype)
        for e, w in rows[t]:
            if t in kept[e]:
                biases = [None if b is None else b[e] for b in (experts.gate_up_bias, experts.down_bias)]
                total = total + w * mlp(token, experts.gate_up_proj[e], experts.down_proj[e], *biases, experts.gated)
        if shared is not None:
            first, second = shared.gate_up_proj, shared.down_proj
            total = total + mlp(token, first.weight, second.weight, first.bias, second.bias, experts.gated)
        out.append(total)
    return torch.stack(out)


CASES = {
    "plain": {},
    "shared": {"shared_dim": 7, "bias": True, "scale": 2.5},
    "sigmoid": {"score": "sigmoid", "gated": False, "shared_dim": 4},
    "capacity": {"capacity_factor": 0.8},
    "capacity and bias": {"capacity_factor": 0.5, "bias": True, "score": "sigmoid"},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_plain_loop(name, masked):
    moe, x = built(**CASES[name]), tokens()
    mask = torch.arange(T) % 3 != 1 if masked else None
    parameters = [x.requires_grad_(), *moe.parameters()]
    weights = torch.linspace(-1, 1, T * C, dtype=torch.float64).view(T, C)
    got, want = moe(x, mask), loop(moe, x, mask)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for a, b in zip(*[torch.autograd.grad(out, parameters, weights) for out in (got, want)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_kernels_compute_it():
    """In float32 and under autocast, with the router in float32."""
    moe, x = built(torch.float32, shared_dim=8), tokens(torch.float32, batch=(2,))
    want = loop(moe.double(), x.double().view(-1, C)).view(x.shape)
    moe.float()
    torch.testing.assert_close(moe(x).double(), want, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        out, routing = moe(x, return_routing=True)
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, rtol=0.05, atol=0.05)
    half = moe.bfloat16()
    assert half.router.weight.dtype == torch.float32
    assert half.experts.down_proj.dtype == torch.bfloat16
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_the_bias_moves_the_load():
    moe, x = built(torch.float32, score="sigmoid", balance_rate=0.01), tokens(torch.float32)
    with torch.no_grad():
        x[:, 0], moe.router.weight[:2, 0] = 1.0, 2.0  # nearly everyone wants the first two
        before = accel.moe_load(moe.route(x).indices, X).imbalance
        for _ in range(150):
            moe(x)
            moe.balance.update()
        after = accel.moe_load(moe.route(x).indices, X).imbalance
    assert after < 1.3 < before, (before, after)
    torch.testing.assert_close(moe.double()(x.double()), loop(moe, x.double(), bias=moe.balance.bias.double()))


def test_masked_tokens_count_for_no_load():
    moe, x = built(torch.float32, balance_rate=0.1), tokens(torch.float32)
    mask = torch.arange(T) < 5
    moe(x, mask)
    assert int(moe.balance.counts.sum()) == 5 * K
    assert not moe(x, mask)[5:].any()


def test_checkpointing_counts_once_and_a_bias_may_move_before_the_backward():
    moe, x = built(torch.float32, score="sigmoid", balance_rate=0.1), tokens(torch.float32).requires_grad_()
    want = torch.autograd.grad(moe(x).square().sum(), x)[0]
    moe.balance.counts.zero_()
    out = checkpoint(moe, x, use_reentrant=False)
    got = torch.autograd.grad(out.square().sum(), x)[0]
    assert torch.equal(got, want)
    assert int(moe.balance.counts.sum()) == T * K
    out = moe(x)
    moe.balance.update()
    assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], want)


def test_compiled_copied_and_loaded():
    moe, x = built(torch.float32, shared_dim=4, capacity_factor=1.0), tokens(torch.float32)
    want = moe(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(moe, fullgraph=True, backend="aot_eager")(x), want)
    torch._dynamo.reset()
    other = built(torch.float32, shared_dim=4, capacity_factor=1.0)
    torch.nn.init.zeros_(other.router.weight)
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other(x), want)
    assert torch.equal(copy.deepcopy(moe)(x), want)
    assert "top_k=3, score='softmax'" in repr(moe)
    assert moe(x[:0]).shape == (0, C)


def test_the_experts_of_transformers_have_the_same_parameters():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = pytest.importorskip("transformers").MixtralConfig(
        hidden_size=C, intermediate_size=I, num_local_experts=X, num_experts_per_tok=K
    )
    theirs, ours = modeling.MixtralExperts(config), Experts(X, C, I)
    theirs.load_state_dict(ours.state_dict())
    config._experts_implementation = "eager"
    indices, weights = torch.randint(X, (T, K)), torch.rand(T, K)
    x = tokens(torch.float32)
    torch.testing.assert_close(ours(x, indices, weights), theirs(x, indices, weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("top_k must be from 1 to the number of experts, 6, got top_k=7", {"top_k": 7}),
        ("num_groups must divide the 6 experts, got num_groups=4", {"num_groups": 4, "topk_groups": 2}),
        ("inner_dim must be at least 1, got inner_dim=0", {"inner_dim": 0}),
        ("capacity_factor must be None or more than 0 and finite, got capacity_factor=0.0", {"capacity_factor": 0.0}),
        ("shared_dim must be at least 0, got shared_dim=-1", {"shared_dim": -1}),
        ("rate must be at least 0 and finite, got rate=-1", {"balance_rate": -1.0}),
        ("got 'mish'", {"activation": "mish"}),
    ],
)
def test_bad_constructors(words, given):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        MoE(**{"embed_dim": C, "inner_dim": I, "num_experts": X, "top_k": K, **given})


def test_bad_calls():
    moe = built(torch.float32, activation=ExpertActivation("silu", limit=1.0))
    with pytest.raises(ValueError, match=r"mask must be \(29,\), as the tokens of x, got \(28,\)"):
        moe(tokens(torch.float32), torch.ones(28))
