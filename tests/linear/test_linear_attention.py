"""Linear attention: the common checks on awkward calls, a recurrence as a second oracle, states, what must not leak."""

import dataclasses
import math

import pytest
import torch
from _bad import Bad, check_bad, each, zeros
from _linear_cases import BEHAVIOUR, CASES, EXACT, FP32, GRADIENTS, by_name, case, cumulative

import accel
from accel import testing
from accel.ops.linear.linear_attention import OP
from accel.testing import assert_close, check_levels, check_op

IN_PAIRS = "avx512_bf16"
BACKENDS = [b.name for b in OP.backends if b.name in ("cpu", "reference")]
# in half precision the reference computes as in fp32
PLAINLY = [dataclasses.replace(c, dtypes=FP32) for c in CASES]
CHECKS = [
    *check_op(accel.linear_attention, [*CASES, *EXACT], BEHAVIOUR, [], BACKENDS[:-1]),
    *check_op(accel.linear_attention, PLAINLY, BEHAVIOUR, GRADIENTS, BACKENDS[-1:]),
]


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


LEVEL_CASES = [by_name(n) for n in ("causal_prime", "token_decay", "cross") if "cpu" in BACKENDS]
# what pairs of bf16 could cost digits in: rows of little weight, decay, sums over runs of tokens, heads that share keys
PAIRS_CASES = [
    by_name(n)
    for n in ("relu_8", "squared_relu_8", "causal_1500", "gqa", "mqa", "head_decay", "heavy_decay", "sum", "size_256")
    if "cpu" in BACKENDS
]
LEVELS = [
    *check_levels(accel.linear_attention, LEVEL_CASES),
    *(x for x in check_levels(accel.linear_attention, PAIRS_CASES) if x[0].endswith(IN_PAIRS)),
]


@pytest.mark.parametrize("check", [check for _, check in LEVELS], ids=[name for name, _ in LEVELS])
def test_instruction_sets(check):
    check()


# the packed form has one batch entry, so that the checks of empty batches and of single entries do not apply
ON_PACKED = [
    testing.check_subsets,
    testing.check_opcheck,
    testing.check_compile,
    testing.check_poison,
    testing.check_repeat,
    testing.check_checkpoint,
    testing.check_autocast,
    testing.check_strides,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", ON_PACKED, ids=lambda check: check.__name__.removeprefix("check_"))
def test_packed_behaviour(check, backend):
    given = case("packed", 9, B=1, D=8, lengths=(2, 0, 7), causal=True, decay="token", state=True)
    check(accel.linear_attention, given, backend)


# --- a second oracle: one token after the other ---

MAPS = {
    "identity": lambda x: x,
    "elu1": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "relu": lambda x: x.clamp_min(0),
    "squared_relu": lambda x: x.clamp_min(0) ** 2,
    "exp": lambda x: x.exp(),
}


def recurrence(q, k, v, feature_map, decay, state, normalize, eps):
    """``(out, state)`` of heads that all have their own q, k and v, in float64."""
    kv, k_sum = state
    rows = []
    for t in range(q.shape[2]):
        shrink = decay[:, :, t].exp()
        feature = MAPS[feature_map](k[:, :, t])
        kv = shrink[..., None, None] * kv + torch.einsum("bhd,bhe->bhde", feature, v[:, :, t])
        k_sum = shrink[..., None] * k_sum + feature
        asked = MAPS[feature_map](q[:, :, t])
        row = torch.einsum("bhd,bhde->bhe", asked, kv)
        rows.append(row / ((asked * k_sum).sum(-1) + eps)[..., None] if normalize else row)
    return torch.stack(rows, 2), (kv, k_sum)


def drawn(T, H=3, D=8, E=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, H, T, n, generator=generator).to(dtype) for n in (D, D, E))
    decay = -torch.rand(2, H, T, generator=generator)
    state = torch.randn(2, H, D, E, generator=generator), torch.rand(2, H, D, generator=generator)
    return q, k, v, decay, state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("T", [1, 31, 150])
def test_recurrence(T, feature_map, normalize, backend):
    q, k, v, decay, state = drawn(T)
    given = {"feature_map": feature_map, "normalize": normalize, "eps": 1e-3}
    normalize = normalize and feature_map != "identity"  # whose sums may be near 0
    given["normalize"] = normalize
    out, found = accel.linear_attention(
        *(q, k, v), causal=True, log_decay=decay, initial_state=state, return_state=True, backend=backend, **given
    )
    wide = [x.double() for x in (q, k, v)]
    expected, (kv, k_sum) = recurrence(
        *wide, feature_map, decay.double(), [x.double() for x in state], normalize, given["eps"]
    )
    assert_close(out, expected, "linear", torch.float32)
    assert_close(found[0], kv, "linear", torch.float32)
    if normalize:
        assert_close(found[1], k_sum, "linear", torch.float32)
    else:
        assert found[1] is None


# --- states ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("cut", [1, 64, 100])
def test_two_halves_are_the_whole(cut, dtype, backend):
    q, k, v, decay, state = drawn(131, dtype=dtype)
    given = {"causal": True, "return_state": True, "backend": backend}
    whole, after = accel.linear_attention(q, k, v, log_decay=decay, initial_state=state, **given)
    found = []
    for part in (slice(0, cut), slice(cut, None)):
        pieces = [x[:, :, part] for x in (q, k, v)]
        out, state = accel.linear_attention(*pieces, log_decay=decay[:, :, part], initial_state=state, **given)
        found.append(out)
    assert_close(torch.cat(found, 2), whole.double(), "linear", dtype)
    for got, expected in zip(state, after, strict=True):
        assert_close(got, expected.double(), "linear", torch.float32)


STATES = {
    "causal": {"causal": True, "decay": True},
    "no_decay": {"causal": True, "decay": False},
    "all": {"causal": False, "decay": False},
    "sum": {"causal": True, "decay": True, "normalize": False},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("asked", STATES.values(), ids=STATES)
@pytest.mark.parametrize("what", ["out", "state", "both"])
def test_gradients_of_states(what, asked, packed, backend):
    """Through the initial state, and from the final one, of a call that gives both."""
    q, k, v, decay, (kv, k_sum) = drawn(150)
    given = dict(asked)
    if not given.pop("decay"):
        decay = None
    if packed:
        q, k, v = [x[:1] for x in (q, k, v)]
        decay = None if decay is None else decay[:1]
        kv, k_sum = torch.cat([kv, kv[:1]]), torch.cat([k_sum, k_sum[:1]])
        given["cu_seqlens_q"] = cumulative((0, 83, 67))
    normalize = given.get("normalize", True)

    def grads(backend, convert):
        leaves = [convert(x).requires_grad_() for x in (q, k, v, kv, k_sum)]
        q_, k_, v_, kv_, sum_ = leaves
        decay_ = None if decay is None else convert(decay).requires_grad_()
        leaves = [x for x in (*leaves[: 5 if normalize else 4], decay_) if x is not None]
        out, (kv_out, sum_out) = accel.linear_attention(
            *(q_, k_, v_), log_decay=decay_, initial_state=(kv_, sum_), return_state=True, backend=backend, **given
        )
        parts = [out] if what == "out" else [kv_out, sum_out] if what == "state" else [out, kv_out, sum_out]
        parts = [x for x in parts if x is not None]
        upstream = [testing.running.random_like(x, i) for i, x in enumerate(parts)]
        return torch.autograd.grad(parts, leaves, upstream, allow_unused=True, materialize_grads=True)

    got = grads(backend, lambda x: x.clone())
    want = grads("reference", lambda x: x.double())
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, "linear_grad", torch.float32, f"gradient {i}")


# --- what must not leak ---

HALF_OR_NOT = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", "qkv")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", HALF_OR_NOT, ids=str)
def test_not_finite(dtype, value, which, backend):
    """It makes the rows that see it NaN, and leaves the bits of the others."""
    q, k, v, decay, _ = drawn(150, dtype=dtype)
    clean = accel.linear_attention(q, k, v, causal=True, log_decay=decay, backend=backend)
    tensors = {"q": q, "k": k, "v": v}
    tensors[which] = tensors[which].clone()
    tensors[which][1, 2, 70, 3] = value
    out = accel.linear_attention(**tensors, causal=True, log_decay=decay, backend=backend)
    spoilt = torch.zeros(out.shape[:3], dtype=torch.bool)
    spoilt[1, 2, slice(70, 71 if which == "q" else None)] = True
    assert out[spoilt].isnan().all()
    assert torch.equal(out[~spoilt], clean[~spoilt])


@pytest.mark.parametrize("which", "qkv")
def test_not_finite_in_pairs(which):
    with testing.at_level(IN_PAIRS):
        test_not_finite(torch.bfloat16, math.nan, which, "cpu")
        test_not_finite_where_masked(False, torch.bfloat16, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF_OR_NOT, ids=str)
@pytest.mark.parametrize("state", [True, False])
def test_not_finite_where_masked(state, dtype, backend):
    q, k, v, decay, _ = drawn(70, dtype=dtype)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, 11] = mask[1, :5] = False
    given = {"causal": True, "log_decay": decay, "key_mask": mask, "backend": backend, "return_state": state}

    def made(k, v):
        result = accel.linear_attention(q, k, v, **given)
        return [result[0], *result[1]] if state else [result]

    clean = made(k, v)
    k, v = k.clone(), v.clone()
    k[0, :, 11] = math.nan
    v[1, :, :5] = math.inf
    assert all(torch.equal(a, b) for a, b in zip(made(k, v), clean, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("feature_map", ["relu", "squared_relu"])
def test_rows_of_no_weight(feature_map, dtype, backend):
    """relu of 8 features: whole rows weigh nothing, others next to nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 512, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    for eps in (0.0, 1e-6):
        out = accel.linear_attention(q, k, v, causal=True, feature_map=feature_map, eps=eps, backend=backend)
        weights = MAPS[feature_map](q) @ MAPS[feature_map](k).transpose(-2, -1)
        nothing = weights.tril().sum(-1) == 0.0
        assert nothing.any()
        assert (out[nothing] == 0.0).all()
        grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        for x in (out, *grads):
            assert x.isfinite().all()
        assert (grads[0][nothing] == 0.0).all()


# --- arguments ---

GOOD = {"q": zeros(2, 4, 6, 8), "k": zeros(2, 2, 6, 8), "v": zeros(2, 2, 6, 16), "causal": True}
DECAY = torch.full((2,), -0.1)
BAD = [
    Bad("map", ValueError, r"one of identity, elu1, relu.*got 'gelu'", {"feature_map": "gelu"}),
    Bad("map_none", ValueError, r"feature_map must be one of .*None", {"feature_map": None}),
    Bad("cosformer", ValueError, r"max_length at least 1, got 'cosformer'", {"feature_map": "cosformer"}),
    Bad("position", ValueError, r"position=-1", {"feature_map": ("cosformer", 9), "position": -1}),
    Bad("performer", ValueError, r"\(M, 8\).*\(5, 7\)", {"feature_map": ("performer", zeros(5, 7))}),
    Bad("softmax", ValueError, r"excludes causal", {"feature_map": "softmax"}),
    Bad("tokens", ValueError, r"as many queries as keys.*7", {"q": zeros(2, 4, 7, 8)}),
    Bad("heads", ValueError, r"must divide.*\(2, 3, 6, 8\)", {"q": zeros(2, 3, 6, 8)}),
    Bad("state_heads", ValueError, r"must divide", {"q": zeros(2, 12, 6, 8), "k": zeros(2, 4, 6, 8),
                                                     "v": zeros(2, 6, 6, 16)}),
    Bad("no_heads", ValueError, r"must divide", {"k": zeros(2, 0, 6, 8)}),
    Bad("sizes", ValueError, r"do not fit", {"k": zeros(2, 2, 6, 9)}),
    Bad("dims", ValueError, r"head size\), got .*\(2, 6, 8\)", {"q": zeros(2, 6, 8)}),
    Bad("dtypes", TypeError, r"one dtype", {"k": zeros(2, 2, 6, 8, dtype=torch.float16)}),
    Bad("scale", ValueError, r"scale=inf", {"scale": math.inf}),
    Bad("eps", ValueError, r"eps=-1", {"eps": -1.0}),
    Bad("decay_above_0", ValueError, r"at most 0.*0\.5", {"log_decay": torch.tensor([-1.0, 0.5])}),
    Bad("decay_shape", ValueError, r"\(2, 2, 6\), got \(4,\)", {"log_decay": torch.zeros(4)}),
    Bad("decay_all", ValueError, r"needs causal=True", {"log_decay": DECAY, "causal": False}),
    Bad("mask_dtype", TypeError, r"boolean", {"key_mask": zeros(2, 6)}),
    Bad("mask_shape", ValueError, r"\(2, 6\), got .*\(2, 5\)", {"key_mask": zeros(2, 5, dtype=torch.bool)}),
    Bad("state_shape", ValueError, r"kv.*\(2, 2, 8, 16\), got \(2, 2, 8, 8\)",
        {"initial_state": (zeros(2, 2, 8, 8), zeros(2, 2, 8))}),
    Bad("state_dtype", TypeError, r"float32, got torch.bfloat16",
        {"initial_state": (zeros(2, 2, 8, 16, dtype=torch.bfloat16), zeros(2, 2, 8))}),
    Bad("state_sum", ValueError, r"k_sum=None", {"initial_state": (zeros(2, 2, 8, 16), None)}),
    Bad("state_kind", TypeError, r"pair", {"initial_state": zeros(2, 2, 8, 16)}),
    Bad("packed_mask", ValueError, r"key_mask", {"key_mask": zeros(2, 6, dtype=torch.bool),
                                                  "cu_seqlens_q": cumulative((6,))}),
    Bad("packed_batch", ValueError, r"\(1, H, total, D\)", {"cu_seqlens_q": cumulative((6,))}),
]  # fmt: skip


@each(BAD)
def test_bad_call(bad):
    check_bad(accel.linear_attention, GOOD, bad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    q = zeros(2, 3, 0, 8)
    state = torch.ones(2, 3, 8, 8), torch.ones(2, 3, 8)
    out, after = accel.linear_attention(q, q, q, causal=True, initial_state=state, return_state=True, backend=backend)
    assert out.shape == (2, 3, 0, 8)
    assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))


def test_a_callable_maps_features():
    q, k, v, _, _ = drawn(20)
    got = accel.linear_attention(q, k, v, feature_map=lambda x: torch.cat([x.relu(), (-x).relu()], -1) + 0.1)
    wide = [torch.cat([x.relu(), (-x).relu()], -1) + 0.1 for x in (q, k)]
    expected = accel.linear_attention(*wide, v, feature_map="identity", backend="reference")
    assert_close(got, expected.double(), "linear", torch.float32)
    with pytest.raises(ValueError, match=r"must keep \(B, H, tokens\)"):
        accel.linear_attention(q, k, v, feature_map=lambda x: x[0])


@pytest.mark.parametrize("backend", BACKENDS[:-1])
def test_denominators_are_kept_for_a_backward_alone(backend):
    q = torch.ones(1, 2, 5, 8)
    made = {}

    def watched(*given):
        *_, made["den"] = found = forward(*given)
        return found

    leaf = OP.backend(backend)
    forward = leaf.forward
    object.__setattr__(leaf, "forward", watched)
    try:
        for wanted, shape in ((False, (0,)), (True, (1, 2, 5))):
            out = accel.linear_attention(q.clone().requires_grad_(wanted), q, q, causal=True, backend=backend)
            assert out.requires_grad is wanted
            assert made["den"].shape == shape
    finally:
        object.__setattr__(leaf, "forward", forward)
