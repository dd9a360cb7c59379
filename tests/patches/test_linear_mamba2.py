"""The scans of Mamba-2 in transformers' six families: the functions alone, whole models, and text that goes on."""

import importlib
import inspect

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from _linear_models import backends, every_backend, gradients, noise
from _transformers_models import (
    DECODER,
    IDS,
    LEFT,
    RIGHT,
    assert_same,
    assert_same_gradients,
    outputs,
    randomize,
    text,
)
from _transformers_models import gradients as gradients_of_model
from torch.nn import functional as F

import accel
from accel.patches import FUNCTIONS, transformers_mamba2
from accel.testing import assert_close

MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 4,
    "mamba_expand": 2,
}  # fmt: skip
TEXT = {"vocab_size": 50, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HYBRID = {**DECODER, "num_attention_heads": 4}
WRITE = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def mamba2():
    return transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            **TEXT, num_heads=4, head_dim=16, state_size=8, n_groups=2, chunk_size=4, num_hidden_layers=2
        )
    )


def bamba():
    return transformers.BambaForCausalLM(transformers.BambaConfig(**HYBRID, **MAMBA, attn_layer_indices=[0]))


def zamba2():
    return transformers.Zamba2ForCausalLM(
        transformers.Zamba2Config(
            **TEXT, num_hidden_layers=3, mamba_d_state=8, mamba_ngroups=2, n_mamba_heads=4, chunk_size=4,
            intermediate_size=48, num_attention_heads=4, adapter_rank=4, layers_block_type=["mamba", "hybrid", "mamba"],
        )
    )  # fmt: skip


def falcon_h1():
    return transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**HYBRID, **MAMBA, mamba_d_ssm=64))


def nemotron_h():
    return transformers.NemotronHForCausalLM(
        transformers.NemotronHConfig(
            **TEXT, layers_block_type=["mamba", "attention", "mamba"], num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=16, n_groups=2, chunk_size=4,
            intermediate_size=48,
        )
    )  # fmt: skip


def granitemoehybrid():
    return transformers.GraniteMoeHybridForCausalLM(
        transformers.GraniteMoeHybridConfig(
            **HYBRID, **MAMBA, layer_types=["mamba", "attention"], num_local_experts=2, shared_intermediate_size=48
        )
    )


# family: model, layers that scan
MODELS = {
    "mamba2": (mamba2, 2),
    "bamba": (bamba, 1),
    "zamba2": (zamba2, 3),
    "falcon_h1": (falcon_h1, 2),
    "nemotron_h": (nemotron_h, 2),
    "granitemoehybrid": (granitemoehybrid, 1),
}


def build(family):
    # the hybrid layer of Zamba2 makes a rounding error of larger weights tenfold
    return randomize(MODELS[family][0](), 0.1 if family == "zamba2" else 0.2)


HOMES = {family: importlib.import_module(f"transformers.models.{family}.modeling_{family}") for family in MODELS}
home = HOMES.__getitem__


def row(report, family, name="mamba2_chunk_scan"):
    return next(r for r in report.rows if r.name == f"{home(family).__name__}.{name}")


# --- the functions alone ---


def tokens(dtype=torch.float32, T=11):
    """hidden_states, dt, A, B, C, D, dt_bias and initial_states of 2 sequences, 4 heads in 2 groups."""
    given = [noise(2, T, 4, 6), noise(2, T, 4, seed=1), -noise(4, seed=2).exp(), noise(2, T, 2, 5, seed=3)]
    given += [noise(2, T, 2, 5, seed=4), noise(4, seed=5), noise(4, seed=6), noise(2, 4, 6, 5, seed=7)]
    return [x.to(dtype) for x in given]


def scan_of(family, **options):
    def call(x, dt, A, B, C, D=None, dt_bias=None, states=None):
        scan = home(family).mamba2_chunk_scan
        return scan(x, dt, A, B, C, chunk_size=4, D=D, z=None, dt_bias=dt_bias, initial_states=states, **options)

    return call


PLAIN = {"dt_softplus": True, "return_final_states": True}


def exactly(x, dt, A, B, C, D, dt_bias, states):
    """One token after the other, in float64."""
    dt = F.softplus(dt + dt_bias)
    B, C = B.repeat_interleave(2, 2), C.repeat_interleave(2, 2)
    rows = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None, None]
        states = torch.exp(step * A[:, None, None]) * states + step * x[:, t, :, :, None] * B[:, t, :, None]
        rows.append((states * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(rows, 1), states


@every_backend
@pytest.mark.parametrize("family", MODELS)
def test_the_scan_computes_the_same(family, backend):
    expected, expected_gradients = gradients(exactly, tokens(torch.float64))
    own, _ = gradients(scan_of(family, **PLAIN), tokens())
    with accel.patch_functions() as report, accel.use(backend=backend):
        found, found_gradients = gradients(scan_of(family, **PLAIN), tokens())
        asked = row(report, family)
        assert (asked.calls, asked.fallbacks, asked.backend) == (1, {}, backend)
    for a, b, c in zip(found, expected, own, strict=True):
        assert_close(a, b, "linear", torch.float32)
        assert (a.dtype, a.stride()) == (c.dtype, c.contiguous().stride())
    for a, b in zip(found_gradients, expected_gradients, strict=True):
        assert_close(a, b, "linear_grad", torch.float32)


@pytest.mark.usefixtures("on_reference")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_all", [True, False])
def test_dtypes_and_what_may_be_left_out(dtype, with_all):
    given = tokens(dtype)
    given[2] = given[2].float()  # as the mixers hand it over
    given = given if with_all else given[:5]
    options = {"dt_softplus": with_all, "dt_limit": (0.01, 0.9)}
    expected = scan_of("mamba2", **options)(*given)
    with accel.patch_functions() as report:
        found = scan_of("mamba2", **options)(*given)
        assert row(report, "mamba2").calls == 1
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("on_reference")
def test_under_autocast():
    given = tokens()
    exact, _ = exactly(*tokens(torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        own = scan_of("mamba2", **PLAIN)(*given)[0]
        with accel.patch_functions() as report:
            found = scan_of("mamba2", **PLAIN)(*given)[0]
            assert row(report, "mamba2").calls == 1
    assert found.dtype == own.dtype
    errors = [float((x - exact).abs().max()) for x in (found, own)]
    assert errors[0] <= 2 * errors[1] + 2**-8 * float(exact.abs().max()), errors


def test_a_wrong_decay_is_seen(monkeypatch):
    expected = scan_of("bamba", **PLAIN)(*tokens())
    with accel.patch_functions() as report, accel.use(backend="reference"):
        stand = row(report, "bamba").replacement
        op = stand.attend
        monkeypatch.setattr(stand, "attend", lambda *a, log_decay, **how: op(*a, log_decay=1.01 * log_decay, **how))
        found = scan_of("bamba", **PLAIN)(*tokens())
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(found, expected, strict=True))


# --- one token alone ---

UPDATE = "mamba2_selective_state_update"


def token(dtype=torch.float32):
    """state, hidden_states, dt, A, B, C, D, z and dt_bias, expanded as the mixers do it."""
    x, dt, A, B, C, D, dt_bias, state = tokens(dtype, T=1)
    dt, A = dt.transpose(1, 2).expand(-1, -1, 6), A.float()[:, None, None].expand(-1, 6, 5)
    return {
        "state": state.float(), "hidden_states": x[:, 0], "dt": dt, "A": A, "B": B[:, 0], "C": C[:, 0],
        "D": D[:, None].expand(-1, 6), "z": noise(2, 4, 6, seed=9).to(dtype),
        "dt_bias": dt_bias[:, None].expand(-1, 6), "dt_softplus": True,
    }  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("backend", backends("linear_attention_step"))
def test_a_token_computes_the_same(backend, family):
    """With all there is and without what may be left out, whose states go on apart."""
    kinds = [(dtype, out) for dtype in (torch.float32, torch.bfloat16) for out in ((), ("D", "z"), ("dt_bias",))]
    given, mine = [
        [{n: x for n, x in token(dtype).items() if n not in left_out} for dtype, left_out in kinds] for _ in range(2)
    ]
    original = getattr(home(family), UPDATE)
    expected = [original(**kind) for kind in given]
    with accel.patch_functions() as report, accel.use(backend=backend):
        found = [getattr(home(family), UPDATE)(**kind) for kind in mine]
        asked = row(report, family, UPDATE)
        assert (asked.calls, asked.fallbacks, asked.backend) == (len(kinds), {}, backend)
    for (dtype, _), own, theirs, a, b in zip(kinds, mine, given, found, expected, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b.double(), "linear", dtype)
        assert_close(own["state"], theirs["state"].double(), "linear", dtype)


def test_tokens_of_another_kind_go_to_the_original():
    half = {**token(), "state": token()["state"].bfloat16()}
    uneven = {**token(), "A": -noise(4, 6, 5, seed=2, dtype=torch.float32).exp()}
    asked = {**token(), "hidden_states": token()["hidden_states"].requires_grad_()}
    packed = {**token(), "seq_idx": torch.zeros(2, dtype=torch.int32)}
    expected = [
        getattr(home("mamba2"), UPDATE)(**{**given, "state": given["state"].clone()}) for given in (half, uneven)
    ]
    with accel.patch_functions() as report, accel.use(backend="reference"):
        function = getattr(home("mamba2"), UPDATE)
        assert all(torch.equal(function(**x), y) for x, y in zip((half, uneven), expected, strict=True))
        assert function(**asked).requires_grad
        with pytest.raises(ValueError, match="can't keep packed sequences apart"):
            function(**packed)
        found = row(report, "mamba2", UPDATE)
        assert found.calls == 0
        assert list(found.fallbacks) == [
            "its state is torch.bfloat16, and that of the op is torch.float32",
            "its A, dt and dt_bias are not expanded from a number a head",
            "a gradient is asked for, and the op has none",
            "seq_idx is given, and without mamba_ssm the function refuses packed sequences",
        ]


# --- whole models ---


@every_backend
@pytest.mark.parametrize("family", MODELS)
def test_models_compute_the_same(family, backend):
    model, count = build(family), MODELS[family][1]
    for mask in (LEFT, RIGHT):
        expected, expected_gradients = gradients_of_model(model, text(mask))
        with accel.patch_functions() as report, accel.use(backend=backend):
            found, found_gradients = gradients_of_model(model, text(mask))
            asked = row(report, family)
            assert (asked.calls, asked.fallbacks, asked.backend) == (count, {}, backend)
        assert_same(found, expected)
        assert_same_gradients(found_gradients, expected_gradients)
        assert all(torch.equal(a, b) for a, b in zip(outputs(model, text(mask)), expected, strict=True))


@every_backend
@pytest.mark.parametrize("family", MODELS)
def test_they_write_the_same_text(family, backend):
    model, count = build(family), MODELS[family][1]
    expected = model.generate(IDS, attention_mask=LEFT, **WRITE)
    with accel.patch_functions() as report, accel.use(backend=backend):
        found = model.generate(IDS, attention_mask=LEFT, **WRITE)
        assert (row(report, family).calls, row(report, family).fallbacks) == (count, {})
        steps = row(report, family, UPDATE)
        assert (steps.calls, steps.fallbacks) == (count * (len(found.logits) - 1), {})
    assert torch.equal(found.sequences, expected.sequences)
    assert_same(found.logits, expected.logits)


# --- what goes to the original ---


def test_calls_of_another_kind_go_to_the_original():
    x, dt, A, B, C, *_ = tokens()
    scan = scan_of("mamba2")
    growing = scan(x, dt.abs(), -A, B, C)
    negative = scan_of("mamba2", dt_limit=(-1.0, 1.0))(x, dt, A, B, C)
    with accel.patch_functions() as report, accel.use(backend="reference"):
        assert torch.equal(scan(x, dt.abs(), -A, B, C), growing)
        assert torch.equal(scan_of("mamba2", dt_limit=(-1.0, 1.0))(x, dt, A, B, C), negative)
        for name in ("seq_idx", "cu_seqlens"):
            with pytest.raises(ValueError, match="can't keep packed sequences apart"):
                scan_of("mamba2", **{name: torch.zeros(2, 11, dtype=torch.int32)})(x, dt, A, B, C)
        with pytest.raises(TypeError, match="required positional argument"):
            home("mamba2").mamba2_chunk_scan(x, dt, A, B)
        found = row(report, "mamba2").fallbacks
        assert row(report, "mamba2").calls == 0
    packed = "is given, and without mamba_ssm the function refuses packed sequences"
    names = [n for n in inspect.signature(home("mamba2").mamba2_chunk_scan).parameters if n != "kwargs"]
    assert found == {
        "its states may grow, which the op does not allow": 2,
        f"seq_idx {packed}": 1,
        f"cu_seqlens {packed}": 1,
        f"it is not called with its arguments, {', '.join(names)}": 1,
    }


def test_where_only_the_reference_computes_the_original_does(monkeypatch):
    monkeypatch.setattr(accel.patches.stand, "_verdicts", {("linear_attention", "cpu", torch.float32): "it is slow"})
    expected = scan_of("mamba2", **PLAIN)(*tokens())
    with accel.patch_functions() as report:
        found = scan_of("mamba2", **PLAIN)(*tokens())
        assert row(report, "mamba2").fallbacks == {"it is slow": 1}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_kernel_of_mamba_ssm_stays():
    def with_kernel():
        is_new_implementation = True

        def wrapped():
            return is_new_implementation

        return wrapped

    assert transformers_mamba2._why_not(with_kernel()) == "the kernel of mamba_ssm stands behind it"
    assert transformers_mamba2._why_not(home("mamba2").mamba2_chunk_scan) is None


def test_every_function_of_the_table_is_there_and_comes_back():
    before = {t: getattr(home(t.split(".")[2]), t.rpartition(".")[2]) for t in FUNCTIONS if "mamba2_" in t}
    assert len(before) == len(transformers_mamba2.FUNCTIONS)
    with accel.patch_functions() as report:
        assert {r.name for r in report.replaced} >= before.keys()
        for target, original in before.items():
            assert getattr(home(target.split(".")[2]), target.rpartition(".")[2]) is not original
    for target, original in before.items():
        assert getattr(home(target.split(".")[2]), target.rpartition(".")[2]) is original


def test_the_report_of_a_model_names_the_way():
    model = build("bamba")
    report = accel.patch(model)
    assert any("accel.patch_functions() replaces" in sentence for sentence in report.unserved), report.unserved
    with pytest.raises(ValueError, match=r"accel.patch_functions\(\) replaces"):
        accel.patch(build("mamba2"))


@pytest.mark.usefixtures("on_reference")
def test_the_scan_compiles_in_one_graph():
    given = tokens()
    with accel.patch_functions() as report:
        expected = scan_of("mamba2", **PLAIN)(*given)
        found = torch.compile(scan_of("mamba2", **PLAIN), fullgraph=True, backend="aot_eager")(*given)
        assert row(report, "mamba2").replacement.compiled
    assert_same(found, expected)
