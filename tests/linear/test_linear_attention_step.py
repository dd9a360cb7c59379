"""One token of linear attention: against the op over all tokens, in place, on any layout, lean and traced alike."""

import math

import pytest
import torch
from _bad import Bad, check_bad, each, zeros
from torch.utils.flop_counter import FlopCounterMode

import accel
from accel import dispatch, testing
from accel.ops.linear.linear_attention_step import OP
from accel.testing import assert_close
from accel.testing.values import LEVELS

HALF = (torch.bfloat16, torch.float16)


def backends():
    args, how = OP.example("cpu", torch.float32)
    found = dispatch.reasons(OP, OP.prepare(*args, **how))
    return [name for name, reason in found.items() if reason is None and name != "triton"]


every_backend = pytest.mark.parametrize("backend", backends())


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_rows(kv):
    return kv.contiguous()


def by_columns(kv):
    return kv.transpose(-1, -2).contiguous().transpose(-1, -2)


def in_a_larger_cache(kv):
    whole = torch.full((kv.shape[0] + 1, kv.shape[1] + 2, *kv.shape[2:]), math.nan, dtype=kv.dtype)
    part = whole[:-1, 1:-1]
    return part.copy_(kv)


LAYOUTS = (by_rows, by_columns, in_a_larger_cache)


def inputs(B=2, H=(4, 4, 4), D=16, E=16, T=5, dtype=torch.float32, decay="token"):
    """q, k, v of T tokens, a state to begin with and log_decay, or None."""
    heads = max(H[1:])
    q, k, v = [noise(B, h, T, n, seed=i, dtype=dtype) for i, (h, n) in enumerate(zip(H, (D, D, E), strict=True))]
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    state = noise(B, heads, D, E, seed=3, dtype=inner), noise(B, heads, D, seed=4, dtype=inner).abs() + 1.0
    shape = {"token": (B, heads, T), "head": (heads,), None: ()}[decay]
    return (q, k, v), state, -noise(*shape, seed=5, dtype=inner).abs() if shape else None


def walk(tokens, state, decay, backend, **how):
    """Every token by a step of its own. The state that was given changes."""
    rows = []
    for t in range(tokens[0].shape[2]):
        at = decay if decay is None or decay.dim() == 1 else decay[:, :, t : t + 1]
        given = [x[:, :, t : t + 1] for x in tokens]
        rows.append(accel.linear_attention_step(*given, state, log_decay=at, backend=backend, **how))
    return torch.cat(rows, 2)


def expected_of(tokens, state, decay, **how):
    given = [x.double() for x in tokens]
    kv, k_sum = state
    start = kv.double(), None if k_sum is None else k_sum.double()
    decay = None if decay is None else decay.double()
    return accel.linear_attention(
        *given, causal=True, initial_state=start, return_state=True, log_decay=decay, backend="reference", **how
    )


SHAPES = {
    "one of all": {"B": 1, "H": (1, 1, 1), "D": 1, "E": 1},
    "vectors": {"D": 32, "E": 64},
    "odd": {"B": 3, "H": (2, 2, 2), "D": 13, "E": 19},
    "wide": {"B": 1, "H": (2, 2, 2), "D": 129, "E": 200},
    "grouped queries": {"H": (6, 2, 2), "D": 24, "E": 40},
    "Mamba-2": {"H": (2, 2, 6), "D": 8, "E": 5},
    "one key head": {"H": (4, 1, 2)},
    "one value head": {"H": (2, 4, 1)},
    "many": {"B": 2, "H": (16, 16, 16), "D": 64, "E": 64, "T": 2},
}


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", SHAPES)
def test_steps_are_the_op_over_all_tokens(name, layout, backend):
    for decay in ("token", "head", None):
        tokens, state, log_decay = inputs(**SHAPES[name], decay=decay)
        for feature_map, normalize in (("identity", False), ("elu1", True)):
            how = {"feature_map": feature_map, "normalize": normalize, "scale": 0.7, "eps": 1e-3}
            out, (kv, k_sum) = expected_of(tokens, state, log_decay, **how)
            mine = (layout(state[0]), state[1].clone())
            found = walk(tokens, mine, log_decay, backend, **how)
            what = f"{decay}, {feature_map}"
            assert_close(found, out, "linear", torch.float32, what)
            assert_close(mine[0], kv, "linear", torch.float32, f"{what}: kv")
            if normalize:
                assert_close(mine[1], k_sum, "linear", torch.float32, f"{what}: k_sum")
            else:
                assert torch.equal(mine[1], state[1]), "what no output needs is left as it is"


@every_backend
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("feature_map", ["identity", "elu1", "relu", "squared_relu", "exp"])
def test_feature_maps_in_half_precision(feature_map, dtype, backend):
    tokens, state, decay = inputs(D=19, E=24, dtype=dtype)
    how = {"feature_map": feature_map, "eps": 1e-3}
    out, (kv, _) = expected_of(tokens, state, decay, **how)
    found = walk(tokens, state, decay, backend, **how)
    assert found.dtype == dtype
    assert_close(found, out, "linear", dtype)
    assert_close(state[0], kv, "linear", torch.float32)


@every_backend
@pytest.mark.parametrize("feature_map", ["elu1", "relu", "squared_relu", "exp"])
def test_feature_maps(feature_map, backend):
    tokens, state, decay = inputs(D=19, E=24)
    tokens = [3 * x for x in tokens]
    out, (kv, k_sum) = expected_of(tokens, state, decay, feature_map=feature_map)
    found = walk(tokens, state, decay, backend, feature_map=feature_map)
    for a, b in ((found, out), (state[0], kv), (state[1], k_sum)):
        assert_close(a, b, "linear", torch.float32)


@every_backend
def test_a_callable_makes_the_features(backend):
    tokens, state, decay = inputs(D=8)
    state = (noise(2, 4, 16, 16, seed=3), noise(2, 4, 16, seed=4).abs())

    def both_sides(x):
        return torch.cat([x, -x], -1).relu()

    out, (kv, _) = expected_of(tokens, state, decay, feature_map=both_sides)
    found = walk(tokens, state, decay, backend, feature_map=both_sides)
    assert_close(found, out, "linear", torch.float32)
    assert_close(state[0], kv, "linear", torch.float32)


def test_float64_on_the_reference():
    tokens, state, decay = inputs(dtype=torch.float64)
    out, (kv, _) = expected_of(tokens, state, decay)
    found = walk(tokens, state, decay, None)
    torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state[0], kv, rtol=1e-12, atol=1e-12)


@every_backend
def test_a_denominator_of_0_gives_0(backend):
    tokens, _, _ = inputs(T=1)
    state = (torch.zeros(2, 4, 16, 16), torch.zeros(2, 4, 16))
    found = walk([-x.abs() for x in tokens], state, None, backend, feature_map="relu", eps=0.0)
    assert torch.equal(found, torch.zeros_like(found))


@every_backend
def test_what_is_not_finite_stays_in_its_head(backend):
    for bad in (math.nan, math.inf):
        tokens, state, decay = inputs(T=2)
        clean = walk(tokens, (state[0].clone(), state[1].clone()), decay, backend)
        tokens[2][1, 2, 0, 3] = bad
        found = walk(tokens, state, decay, backend)
        assert not torch.isfinite(found[1, 2, :, 3]).any()
        found[1, 2], clean[1, 2] = 0.0, 0.0
        assert torch.equal(found, clean)


@every_backend
def test_strided_tokens(backend):
    tokens, state, decay = inputs()
    again = (state[0].clone(), state[1].clone())
    expected = walk(tokens, again, decay, backend)
    wide = [torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2] for x in tokens]
    wide = [x.transpose(1, 2).contiguous().transpose(1, 2) if i else x for i, x in enumerate(wide)]
    assert_close(walk(wide, state, decay, backend), expected.double(), "linear", torch.float32)
    assert_close(state[0], again[0].double(), "linear", torch.float32)


@every_backend
def test_the_version_of_a_state_counts_its_changes(backend):
    tokens, state, decay = inputs(T=1)
    before = [x._version for x in state]
    walk(tokens, state, decay, backend)
    assert all(x._version > b for x, b in zip(state, before, strict=True))
    with torch.inference_mode():
        tokens, state, decay = inputs(T=1)
        assert torch.isfinite(walk(tokens, state, decay, backend)).all()


@pytest.mark.skipif("cpu" not in backends(), reason="no kernels for the CPU are built here")
def test_the_short_way_and_the_long_way_run_the_kernel():
    tokens, state, decay = inputs(T=1)
    made = []
    for how in ({}, {"backend": "cpu"}):
        own = (state[0].clone(), state[1].clone())
        made.append((walk(tokens, own, decay, how.get("backend")), *own))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    args, how = OP.example("cpu", torch.float32)
    assert dispatch.select(OP, OP.prepare(*args, **how)).name == "cpu"


@pytest.mark.parametrize("level", LEVELS)
def test_instruction_sets(level):
    with testing.at_level(level):
        for name in ("one of all", "odd", "wide", "grouped queries"):
            for layout in (by_rows, by_columns):
                test_steps_are_the_op_over_all_tokens(name, layout, "cpu")
        for feature_map in ("elu1", "relu", "squared_relu", "exp"):
            test_feature_maps(feature_map, "cpu")
            for dtype in HALF:
                test_feature_maps_in_half_precision(feature_map, dtype, "cpu")


def test_threads_change_nothing(one_thread):
    made = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        tokens, state, decay = inputs(B=4, H=(16, 16, 16), D=64, E=64, T=1)
        made.append((walk(tokens, state, decay, None), *state))
    for found in made[1:]:
        if "cpu" in backends():
            assert all(torch.equal(a, b) for a, b in zip(found, made[0], strict=True))


def test_a_layout_without_order_runs_on_the_reference():
    tokens, state, decay = inputs()
    out, (kv, _) = expected_of(tokens, state, decay)
    mine = (torch.stack([state[0], state[0]], -1)[..., 0], state[1])
    assert "not a matrix a head" in accel.explain(
        accel.linear_attention_step, *[x[:, :, :1] for x in tokens], mine, log_decay=decay[:, :, :1]
    )
    assert_close(walk(tokens, mine, decay, None), out, "linear", torch.float32)
    assert_close(mine[0], kv, "linear", torch.float32)


@every_backend
def test_an_empty_batch(backend):
    tokens, state, decay = inputs(B=1, T=1)
    none = (state[0][:0], state[1][:0])
    if backend == "reference":
        assert walk([x[:0] for x in tokens], none, decay[:0], backend).shape == (0, 4, 1, 16)
    assert walk([x[:0] for x in tokens], none, decay[:0], None).shape == (0, 4, 1, 16)


@every_backend
def test_compiled_in_one_graph(backend):
    def call(q, k, v, kv, k_sum, g):
        kv = kv + 1.0  # a state made in the graph, and one handed in
        return accel.linear_attention_step(q, k, v, (kv, k_sum), log_decay=g, backend=backend), kv

    tokens, state, decay = inputs(T=1)
    expected = call(*tokens, state[0], state[1].clone(), decay)
    torch._dynamo.reset()
    mine = state[1].clone()
    with torch.no_grad():
        found = torch.compile(call, fullgraph=True, backend="aot_eager")(*tokens, state[0], mine, decay)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not torch.equal(mine, state[1]), "the state that was handed in has changed"


@every_backend
def test_sizes_that_vary_make_one_graph(backend):
    def call(q, k, v, kv, k_sum, g):
        return accel.linear_attention_step(q, k, v, (kv, k_sum), log_decay=g, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for B, H, D, E in ((2, 4, 16, 24), (3, 6, 8, 40)):
            tokens, state, decay = inputs(B=B, H=(H, H, H), D=D, E=E, T=1)
            mine = [x.clone() for x in state]
            expected = walk(tokens, state, decay, backend)
            torch.testing.assert_close(compiled(*tokens, *mine, decay), expected, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(mine[0], state[0], rtol=1e-6, atol=1e-6)


def test_opcheck():
    tokens, state, decay = inputs(T=1)
    given = (*tokens, *state, decay, "elu1", True, 1.0, 1e-6, backends()[0])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.accel.linear_attention_step.default, given, test_utils=tests)


def test_flops_are_counted():
    tokens, state, decay = inputs(T=1)
    if "cpu" not in backends():
        pytest.skip("the reference is counted as plain torch")
    with FlopCounterMode(display=False) as counter:
        walk(tokens, state, decay, "cpu")
    assert counter.get_total_flops() == 2 * 2 * state[0].numel()


@every_backend
def test_autocast(backend):
    tokens, state, decay = inputs(T=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert walk(tokens, state, decay, backend).dtype == torch.bfloat16
        assert walk(tokens, state, decay, None).dtype == torch.bfloat16
    assert state[0].dtype == torch.float32


@every_backend
def test_gradients_are_refused(backend):
    tokens, state, decay = inputs(T=1)
    words = "linear_attention_step has no gradient, and 1 of its tensors require one: call it under torch.no_grad"
    for i in range(5):
        given = [x.clone() for x in (*tokens, *state)]
        given[i].requires_grad_()
        before = given[3].detach().clone()
        for asked in (backend, None):
            with pytest.raises(NotImplementedError, match=words):
                accel.linear_attention_step(*given[:3], tuple(given[3:]), log_decay=decay, backend=asked)
        assert torch.equal(given[3].detach(), before), "a refused step changes nothing"
        with torch.no_grad():
            accel.linear_attention_step(*given[:3], tuple(given[3:]), log_decay=decay, backend=backend)


GOOD = {
    "q": zeros(2, 4, 1, 8),
    "k": zeros(2, 2, 1, 8),
    "v": zeros(2, 2, 1, 6),
    "state": (zeros(2, 2, 8, 6), zeros(2, 2, 8)),
}
BAD = [
    Bad("three axes", ValueError, r"q must be \(B, H, tokens, head size\), got .*\(2, 4, 8\)", {"q": zeros(2, 4, 8)}),
    Bad("two tokens", ValueError, r"a step is of one token.*\(2, 4, 2, 8\)", {"q": zeros(2, 4, 2, 8)}),
    Bad("dtypes", TypeError, "must have one dtype, got torch.float32, torch.bfloat16",
        {"k": zeros(2, 2, 1, 8).bfloat16()}),
    Bad("heads", ValueError, "heads of q, k and v must divide", {"q": zeros(2, 3, 1, 8)}),
    Bad("no pair", TypeError, "state must be a pair .*got Tensor", {"state": zeros(2, 2, 8, 6)}),
    Bad("no sums", ValueError, "k_sum=None, which normalize=True needs", {"state": (zeros(2, 2, 8, 6), None)}),
    Bad("state's shape", ValueError, r"kv of state must be \(2, 2, 8, 6\), got \(2, 4, 8, 6\)",
        {"state": (zeros(2, 4, 8, 6), zeros(2, 2, 8))}),
    Bad("sums' shape", ValueError, r"k_sum of state must be \(2, 2, 8\), got \(2, 2, 6\)",
        {"state": (zeros(2, 2, 8, 6), zeros(2, 2, 6))}),
    Bad("state's dtype", TypeError, "kv of state must be torch.float32 beside torch.float32, got torch.bfloat16",
        {"state": (zeros(2, 2, 8, 6).bfloat16(), zeros(2, 2, 8))}),
    Bad("decay", ValueError, r"log_decay must be \(Hs,\) = \(2,\) or \(B, Hs, 1\) = \(2, 2, 1\), got \(2, 2\)",
        {"log_decay": zeros(2, 2)}),
    Bad("map", ValueError, "feature_map must be one of identity, elu1, .*got 'softmax'", {"feature_map": "softmax"}),
    Bad("scale", ValueError, "scale must be finite.*scale=nan", {"scale": math.nan}),
    Bad("eps", ValueError, "eps at least 0 and finite, got .*eps=-1.0", {"eps": -1.0}),
    Bad("device", ValueError, "kv of state is on meta but q is on cpu",
        {"state": (zeros(2, 2, 8, 6, device="meta"), zeros(2, 2, 8))}),
]  # fmt: skip


@each(BAD)
def test_bad_calls(bad):
    check_bad(accel.linear_attention_step, GOOD, bad)
