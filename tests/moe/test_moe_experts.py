"""The experts of a mixture: layouts, activations and routings as data, an oracle a token, frozen parts, bad input."""

import itertools
import math

import pytest
import torch
from _bad import Bad, check_bad, each, zeros
from _expert_cases import experts_case as case

import accel
from accel import ExpertActivation, testing
from accel.ops.moe.activations import NAMES
from accel.ops.moe.moe_experts import OP
from accel.testing import assert_close, assert_same

GPT_OSS = ExpertActivation("silu", alpha=1.702, limit=7.0, shift=1.0)
FLOAT = (torch.float32,)
CASES = [
    case("one of all", T=1, K=1, X=1, C=1, I=1),
    case("plain"),
    case("one token", T=1, K=3, X=5, C=33, I=18),
    case("elsewhere", T=9, routing="elsewhere", bias=True),
    case("one has all", T=37, K=1, C=17, I=9, routing="one"),
    case("skewed", T=70, K=2, X=5, C=40, I=35, routing="skewed", bias=True),
    case("wide", T=40, K=4, X=8, C=64, I=200),
    case("wide, transposed", T=40, K=4, X=8, C=65, I=201, transposed=True),
    case("wide, turns", T=40, K=4, X=8, C=64, I=200, layout="interleaved", bias=True),
    case("no gate", T=20, gated=False, activation="relu2"),
    case("no gate, transposed", T=20, I=70, gated=False, activation="gelu", transposed=True, bias=True),
    case("gelu", T=30, activation="gelu", bias=True),
    case("gelu_tanh", T=30, activation="gelu_pytorch_tanh"),
    case("relu", T=30, activation="relu", dtypes=FLOAT),
    case("quick_gelu", T=30, activation="quick_gelu", layout="interleaved"),
    case("GPT-OSS", T=30, C=20, I=35, activation=GPT_OSS, layout="interleaved", transposed=True, bias=True),
    # halves round numbers onto the limit, which then count as within
    case("limited", T=30, activation=ExpertActivation("silu", 1.5, 0.4, -0.5), dtypes=FLOAT),
    case("exact", T=40, K=3, C=16, I=24, activation="relu", whole=True, routing="elsewhere"),
    case("exact, limited", T=9, activation=ExpertActivation("relu2", limit=2.0, shift=1.0), whole=True, bias=True),
]
BEHAVIOUR = [
    case("plain", T=4, C=5, I=3, bias=True),
    case("turns", T=6, X=2, C=4, I=3, activation=GPT_OSS, layout="interleaved", transposed=True, routing="elsewhere"),
]
GRADIENTS = [
    case("plain", T=3, X=3, C=3, I=2, bias=True, routing="elsewhere"),
    case("turns", T=2, X=2, C=2, I=2, activation=GPT_OSS, layout="interleaved", transposed=True),
    case("no gate", T=2, X=2, C=2, I=2, activation="gelu_tanh", gated=False),
]
BACKENDS = ["cpu", "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

# How a token's sums are ordered may depend on how many others share its expert, as the docstring says: no check_batch.
CHECKS = [
    (name, check)
    for name, check in testing.check_op(accel.moe_experts, CASES, BEHAVIOUR, GRADIENTS, BACKENDS)
    if name.split("-")[1] != "batch"
]


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


def by_name(name):
    return next(c for c in CASES if c.name == name)


# --- an oracle: a token and an expert at a time, with scalar activations ---

SCALAR = {
    "silu": lambda x, alpha: x / (1.0 + math.exp(-alpha * x)),
    "gelu": lambda x, alpha: 0.5 * x * math.erfc(-x / math.sqrt(2.0)),
    "gelu_tanh": lambda x, alpha: 0.5 * x * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x, alpha: max(x, 0.0),
    "relu2": lambda x, alpha: max(x, 0.0) ** 2,
}


def oracle(x, indices, weights, gate_up_proj, down_proj, gate_up_bias=None, down_bias=None, **how):
    known = how["activation"]
    known = NAMES[known] if isinstance(known, str) else known
    f, limit = SCALAR[known.function], math.inf if known.limit is None else known.limit
    out = torch.zeros_like(x)
    for t, k in itertools.product(*map(range, indices.shape)):
        e = int(indices[t, k])
        if not 0 <= e < gate_up_proj.shape[0]:
            continue
        first, second = (w[e].T if how["transposed"] else w[e] for w in (gate_up_proj, down_proj))
        h = first @ x[t] + (0.0 if gate_up_bias is None else gate_up_bias[e])
        n = second.shape[1]
        if how["gated"]:
            gate, up = (h[::2], h[1::2]) if how["layout"] == "interleaved" else (h[:n], h[n:])
            active = [
                f(min(g, limit), known.alpha) * (max(-limit, min(u, limit)) + known.shift)
                for g, u in zip(gate.tolist(), up.tolist(), strict=True)
            ]
        else:
            active = [f(g, known.alpha) for g in h.tolist()]
        y = second @ torch.tensor(active, dtype=x.dtype) + (0.0 if down_bias is None else down_bias[e])
        out[t] += weights[t, k] * y
    return out


@pytest.mark.parametrize("of", CASES, ids=str)
def test_reference_is_the_definition(of):
    tensors, kwargs = of.make(torch.float64, "cpu", 5)
    got = accel.moe_experts(**tensors, **kwargs, backend="reference")
    torch.testing.assert_close(got, oracle(**tensors, **kwargs), rtol=1e-11, atol=1e-11)


# --- nothing, and those who are left out ---


def some(backend, dtype=torch.float32, **how):
    tensors, kwargs = case("some", **{"T": 6, "bias": True, **how}).make(dtype, "cpu", 2)
    testing.require(accel.moe_experts, backend, tensors, kwargs)
    return tensors, kwargs


@every_backend
def test_no_choices(backend):
    tensors, kwargs = some(backend)
    for name in ("indices", "weights"):
        tensors[name] = tensors[name][:, :0]
    got = testing.run(accel.moe_experts, tensors, kwargs, backend)
    assert_same(got.out, torch.zeros_like(tensors["x"]), "out")
    for name, grad in got.grads.items():
        assert grad is None or not grad.any(), name


@every_backend
def test_nobody_is_here(backend):
    tensors, kwargs = some(backend)
    tensors["indices"] = torch.full_like(tensors["indices"], 4)
    tensors["indices"][0] = -7
    got = testing.run(accel.moe_experts, tensors, kwargs, backend)
    for name, value in got.named().items():
        assert not value.any(), name


@every_backend
def test_an_expert_without_tokens_has_gradients_of_0(backend):
    tensors, kwargs = some(backend)
    tensors["indices"] = tensors["indices"].remainder(2)
    got = testing.run(accel.moe_experts, tensors, kwargs, backend)
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        assert not got.grads[name][2:].any(), name
        assert got.grads[name][:2].any(), name


@every_backend
def test_a_choice_that_is_not_here_reaches_nothing(backend):
    tensors, kwargs = some(backend)
    tensors["indices"][2], tensors["indices"][4, 1] = 4, -1
    clean = testing.run(accel.moe_experts, tensors, kwargs, backend)
    tensors["weights"][2], tensors["weights"][4, 1], tensors["x"][2] = math.nan, math.inf, math.nan
    got = testing.run(accel.moe_experts, tensors, kwargs, backend)
    for name, value in clean.named().items():
        assert_same(got.named()[name], value, name)
    assert not got.grads["weights"][2].any()
    assert got.grads["weights"][4, 1] == 0.0


@every_backend
@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES)
def test_what_is_not_finite_stays_with_its_token_and_experts(backend, dtype):
    tensors, kwargs = some(backend, dtype, T=40, K=1)
    tensors["indices"][0] = 3
    tensors["indices"][1:].remainder_(3)
    clean = testing.run(accel.moe_experts, tensors, kwargs, backend)
    tensors["x"][0] = math.nan
    got = testing.run(accel.moe_experts, tensors, kwargs, backend)
    assert got.out[0].isnan().all()
    assert_same(got.out[1:], clean.out[1:], "the other tokens")
    for name in ("x", "weights"):
        assert_same(got.grads[name][1:], clean.grads[name][1:], name)
    for name in ("gate_up_proj", "down_proj"):
        assert_same(got.grads[name][:3], clean.grads[name][:3], name)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_dtypes_of_indices_and_weights(kind):
    tensors, kwargs = some("cpu", torch.bfloat16)
    want = accel.moe_experts(**tensors, **kwargs, backend="cpu")
    half = {**tensors, "indices": tensors["indices"].to(kind), "weights": tensors["weights"].bfloat16()}
    rounded = {**tensors, "weights": half["weights"].float()}
    assert_same(
        accel.moe_experts(**half, **kwargs, backend="cpu"),
        accel.moe_experts(**rounded, **kwargs, backend="cpu"),
        "weights in bf16",
    )
    assert want.dtype == torch.bfloat16


def test_the_first_product_is_kept_for_a_backward_alone():
    tensors, kwargs = some("cpu")
    assert not OP.prepare(**tensors, **kwargs).keep
    tensors["weights"].requires_grad_()
    assert OP.prepare(**tensors, **kwargs).keep
    with torch.no_grad():
        assert not OP.prepare(**tensors, **kwargs).keep


@every_backend
def test_names_are_their_descriptions(backend):
    tensors, kwargs = some(backend)
    for name, described in NAMES.items():
        kwargs["activation"] = name
        want = accel.moe_experts(**tensors, **kwargs, backend=backend)
        kwargs["activation"] = described
        assert_same(accel.moe_experts(**tensors, **kwargs, backend=backend), want, name)


@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
def test_activations_far_out(function, gated):
    """One channel and one expert whose weights are 1: the activation itself, at numbers of every size."""
    h = torch.cat([torch.linspace(-12.0, 12.0, 401), torch.tensor([-1e4, -90.0, 90.0, 1e4, 0.0])])[:, None]
    ones = torch.ones(1, 2 if gated else 1, 1)
    given = {"x": h, "weights": torch.ones(len(h), 1), "gate_up_proj": ones, "down_proj": torch.ones(1, 1, 1)}
    kwargs = {"indices": torch.zeros(len(h), 1, dtype=torch.int64), "activation": function, "gated": gated}
    testing.require(accel.moe_experts, "cpu", given, kwargs)
    got = testing.run(accel.moe_experts, given, kwargs, "cpu", ["x"])
    want = testing.run(accel.moe_experts, testing.double(given), kwargs, "reference", ["x"])
    for a, b in ((got.out, want.out), (got.grads["x"], want.grads["x"])):
        torch.testing.assert_close(a.double(), b, rtol=4e-6, atol=4e-6)


LEVELS = testing.check_levels(
    accel.moe_experts,
    map(
        by_name, ["plain", "skewed", "wide", "wide, transposed", "wide, turns", "gelu", "gelu_tanh", "GPT-OSS", "exact"]
    ),
)


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in LEVELS])
def test_every_instruction_set(check):
    check()


def test_flops():
    of, first, second = by_name("plain"), 2 * 14 * 8 * 12, 2 * 14 * 8 * 6
    testing.check_flops(accel.moe_experts, of, BACKENDS[:1], first + second)
    testing.check_flops(accel.moe_experts, of, BACKENDS[:1], 3 * (first + second), backward=True)


def test_frozen_experts_cost_no_gradient_of_weights():
    from torch.utils.flop_counter import FlopCounterMode

    tensors, kwargs = by_name("plain").make(torch.float32, "cpu", 0)
    testing.require(accel.moe_experts, "cpu", tensors, kwargs)
    first, second = 2 * 14 * 8 * 12, 2 * 14 * 8 * 6
    for needs, backward in ((["weights"], second), (["x"], first + second), (["down_proj"], second)):
        with FlopCounterMode(display=False) as counter:
            testing.run(accel.moe_experts, tensors, kwargs, "cpu", needs)
        assert counter.get_total_flops() == first + second + backward, needs


def test_the_gradient_of_a_router_with_frozen_experts():
    tensors, kwargs = by_name("skewed").make(torch.float32, "cpu", 0)
    testing.require(accel.moe_experts, "cpu", tensors, kwargs)
    want = testing.run(accel.moe_experts, testing.double(tensors), kwargs, "reference", ["weights"])
    got = testing.run(accel.moe_experts, tensors, kwargs, "cpu", ["weights"])
    assert_close(got.grads["weights"], want.grads["weights"], "experts_grad", torch.float32)


# --- bad input ---

GOOD = {
    "x": zeros(3, 8),
    "indices": torch.zeros(3, 2, dtype=torch.int64),
    "weights": zeros(3, 2),
    "gate_up_proj": zeros(4, 12, 8),
    "down_proj": zeros(4, 8, 6),
}
BAD = [
    Bad("axes of x", ValueError, r"x must be \(T, C\), got .*\(1, 3, 8\)", {"x": zeros(1, 3, 8)}),
    Bad("no float", TypeError, "x must be a floating point tensor, got torch.int64", {"x": zeros(3, 8).long()}),
    Bad("weights", TypeError, "weights must be a floating point tensor", {"weights": zeros(3, 2).long()}),
    Bad("indices' dtype", TypeError, "int32 or int64, got torch.float32", {"indices": zeros(3, 2)}),
    Bad("int8", TypeError, "int32 or int64, got torch.int8", {"indices": zeros(3, 2).to(torch.int8)}),
    Bad("shapes of a choice", ValueError, r"T = 3, got .*\(3, 2\).*\(3, 1\)", {"weights": zeros(3, 1)}),
    Bad("tokens", ValueError, r"T = 3, got .*\(4, 2\)", {"indices": torch.zeros(4, 2).long(), "weights": zeros(4, 2)}),
    Bad("dtypes", TypeError, "float32 and down_proj torch.bfloat16", {"down_proj": zeros(4, 8, 6).bfloat16()}),
    Bad("two axes", ValueError, r"gate_up_proj must have three axes, got \(12, 8\)", {"gate_up_proj": zeros(12, 8)}),
    Bad("channels", ValueError, r"\(X, 2I, C\) and \(X, C, I\).*\(4, 12, 7\)", {"gate_up_proj": zeros(4, 12, 7)}),
    Bad("experts", ValueError, r"\(4, 12, 8\) and \(3, 8, 6\)", {"down_proj": zeros(3, 8, 6)}),
    Bad("no gate", ValueError, r"\(X, I, C\).*gated=False.*\(4, 12, 8\)", {"gated": False}),
    Bad("transposed", ValueError, r"\(X, C, 2I\) and \(X, I, C\)", {"transposed": True}),
    Bad("layout", ValueError, "'concatenated' or 'interleaved', got 'turns'", {"layout": "turns"}),
    Bad("name", ValueError, "silu, gelu.*got 'mish'", {"activation": "mish"}),
    Bad("kind", TypeError, "a name or an ExpertActivation, got int", {"activation": 3}),
    Bad("a limit without a gate", ValueError, r"gated=False leaves out, got .*limit=7.0",
        {"activation": GPT_OSS, "gated": False, "gate_up_proj": zeros(4, 6, 8)}),
    Bad("bias", ValueError, r"gate_up_bias must be \(4, 12\), got \(4, 6\)", {"gate_up_bias": zeros(4, 6)}),
    Bad("second bias", ValueError, r"down_bias must be \(4, 8\), got \(8,\)", {"down_bias": zeros(8)}),
    Bad("device", ValueError, "indices is on meta but x is on cpu",
        {"indices": torch.zeros(3, 2, dtype=torch.int64, device="meta")}),
]  # fmt: skip


@each(BAD)
def test_bad_input(bad):
    check_bad(accel.moe_experts, GOOD, bad)


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("silu, gelu.*got 'mish'", {"function": "mish"}),
        ("1 beside any function but silu, got .*alpha=2.0", {"function": "gelu", "alpha": 2.0}),
        ("alpha must be finite.*nan", {"alpha": math.nan}),
        ("shift must be finite.*inf", {"shift": math.inf}),
        ("limit must be None or at least 0.*-1.0", {"limit": -1.0}),
    ],
)
def test_bad_activations(words, given):
    with pytest.raises(ValueError, match=words):
        ExpertActivation(**given)
