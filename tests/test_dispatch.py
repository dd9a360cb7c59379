"""Choosing a backend: the order, the reasons, the settings, and what torch.compile makes of them."""

import logging
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from _absent import without
from torch.utils._pytree import tree_flatten

import accel
from accel import dispatch
from accel.dispatch import Backend, Op
from accel.testing.running import Recorder


class Args(NamedTuple):
    x: torch.Tensor


def refuses(reason):
    return lambda args: reason


def toy(*backends):
    return Op("toy", lambda x: x, lambda x: Args(x), backends, lambda device, dtype: ((torch.zeros(1),), {}))


def backend(name, reason=None, devices=("cpu",)):
    return Backend(name, refuses(reason), lambda *args: name, None, frozenset(devices))


ARGS = Args(torch.zeros(2))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())


def test_the_first_that_can_runs():
    op = toy(backend("far", "the tensors are on cpu", devices=["cuda"]), backend("near"), backend("reference"))
    assert dispatch.select(op, ARGS).name == "near"
    assert dispatch.reasons(op, ARGS) == {"far": "the tensors are on cpu", "near": None, "reference": None}


def test_one_asked_for_runs_or_says_why_not():
    op = toy(backend("fast"), backend("slow"), backend("broken", "it lacks a part"))
    assert dispatch.select(op, ARGS, "slow").name == "slow"
    with pytest.raises(NotImplementedError, match="toy: backend 'broken' cannot run this call: it lacks a part"):
        dispatch.select(op, ARGS, "broken")
    with pytest.raises(ValueError, match="toy has no backend 'other'; it has fast, slow, broken"):
        dispatch.select(op, ARGS, "other")


def test_all_refusing_lists_every_reason():
    op = toy(backend("one", "no A"), backend("two", "no B"))
    with pytest.raises(NotImplementedError, match=r"no backend can run this call; one: no A; two: no B"):
        dispatch.select(op, ARGS)


def test_a_fallback_is_said_once(caplog):
    op = toy(backend("fast", "it lacks a part"), backend("slow"))
    with caplog.at_level(logging.WARNING, "accel"):
        for _ in range(3):
            assert dispatch.select(op, ARGS).name == "slow"
    assert [r.getMessage() for r in caplog.records] == [
        "toy runs on the slower backend 'slow' because fast: it lacks a part"
    ]


def test_another_device_is_no_fallback(caplog):
    op = toy(backend("gpu", "the tensors are on cpu", devices=["cuda"]), backend("slow"))
    with caplog.at_level(logging.WARNING, "accel"), accel.use(strict=True):
        assert dispatch.select(op, ARGS).name == "slow"
    assert not caplog.records


def test_strict_makes_a_fallback_an_error():
    op = toy(backend("fast", "it lacks a part"), backend("slow"))
    with accel.use(strict=True):
        with pytest.raises(NotImplementedError, match=r"'slow' because fast: it lacks a part \(strict mode\)"):
            dispatch.select(op, ARGS)
        with accel.use(strict=False):
            assert dispatch.select(op, ARGS).name == "slow"
        assert dispatch.select(op, ARGS, "slow").name == "slow", "asked for by name, it is no fallback"


def test_use_nests_and_is_undone_by_an_error():
    op = toy(backend("cpu"), backend("triton"), backend("reference"))
    with accel.use(backend="reference"):
        assert dispatch.select(op, ARGS).name == "reference"
        with accel.use(backend="triton", strict=True):
            assert dispatch.select(op, ARGS).name == "triton"
        with accel.use(strict=True):
            assert dispatch.select(op, ARGS).name == "reference", "what is not named is inherited"
        assert dispatch.select(op, ARGS, "cpu").name == "cpu", "the call's own word goes first"
    with pytest.raises(ZeroDivisionError), accel.use(backend="reference", strict=True):
        raise ZeroDivisionError
    assert dispatch.select(op, ARGS).name == "cpu"
    assert not dispatch._settings.strict


def test_determinism_is_asked_for_here_or_of_torch():
    assert not dispatch.deterministic()
    with accel.use(deterministic=True):
        assert dispatch.deterministic()
        with accel.use(strict=True):
            assert dispatch.deterministic(), "what is not named is inherited"
            with accel.use(deterministic=False):
                assert not dispatch.deterministic()
            assert dispatch.deterministic()
    assert not dispatch.deterministic()
    with pytest.raises(ZeroDivisionError), accel.use(deterministic=True):
        raise ZeroDivisionError
    assert not dispatch.deterministic()
    torch.use_deterministic_algorithms(True)
    try:
        with accel.use(deterministic=False):
            assert dispatch.deterministic(), "torch's own switch is not overruled"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("how", ["use", "torch"])
def test_compiled_code_heeds_determinism(how):
    compiled = torch.compile(lambda x: x + int(dispatch.deterministic()), backend="eager", fullgraph=True)
    for asked in (False, True, False):
        if how == "torch":
            torch.use_deterministic_algorithms(asked)
        try:
            with accel.use(deterministic=asked if how == "use" else None):
                assert compiled(torch.zeros(1)).item() == int(asked)
        finally:
            torch.use_deterministic_algorithms(False)


def test_use_of_an_unknown_backend():
    with pytest.raises(ValueError, match="no op has a backend 'gpu'; known: cpu, "), accel.use(backend="gpu"):
        pass


def test_use_passes_over_an_op_without_that_backend():
    with accel.use(backend="triton"):
        assert dispatch.select(toy(backend("only")), ARGS).name == "only"


def test_a_leaf_keeps_what_kept_it_from_loading(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, "_leaves", {})
    (tmp_path / "broken_leaf.py").write_text("raise OSError('undefined symbol: _Z3foov')")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        module, reason = dispatch.leaf("broken_leaf")
        assert module is None
        assert reason == "broken_leaf did not load: OSError: undefined symbol: _Z3foov"
    assert dispatch.leaf("json")[1] is None


def test_explain_marks_what_would_run(monkeypatch):
    monkeypatch.setitem(dispatch._leaves, "accel._C", (None, "accel._C did not load: ImportError: no such file"))
    qkv = torch.zeros(1, 4, 4, 24)
    text = accel.explain(accel.window_attention, qkv, num_heads=2, window_size=(4, 4))
    assert text.splitlines()[0] == "window_attention:"
    assert "    cpu: accel._C did not load: ImportError: no such file" in text.splitlines()
    assert any(line.startswith(" ->") for line in text.splitlines())
    asked = accel.explain(accel.window_attention, qkv, num_heads=2, window_size=(4, 4), backend="reference")
    assert " -> reference: can run this call" in asked.splitlines()
    with accel.use(backend="reference"):
        assert " -> reference:" in accel.explain(accel.window_attention, qkv, num_heads=2, window_size=(4, 4))
    with pytest.raises(ValueError, match=r"relu is no op of accel; ops: .*softmax_attention.*window_attention"):
        accel.explain(torch.relu, qkv)


def test_the_reason_of_a_missing_part_reaches_the_caller(monkeypatch):
    monkeypatch.setitem(dispatch._leaves, "accel._C", (None, "accel._C did not load: ImportError: no such file"))
    with pytest.raises(NotImplementedError, match=r"'cpu' cannot run this call: accel\._C did not load.*no such file"):
        accel.window_attention(torch.zeros(1, 4, 4, 24), num_heads=2, window_size=(4, 4), backend="cpu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qkv": torch.zeros(1, 4, 4, 24, dtype=torch.float64)}, "not torch.float64"),
        ({"qkv": torch.zeros(1, 4, 4, 36)}, "head sizes that are a multiple of 4 up to 128, not 6"),
        ({"qkv": torch.zeros(1, 4, 4, 6 * 132)}, "head sizes that are a multiple of 4 up to 128, not 132"),
    ],
)
def test_kernels_refuse_what_they_do_not_compute(monkeypatch, change, words):
    monkeypatch.setitem(dispatch._leaves, "accel._C", (object(), None))
    call = {"num_heads": 2, "window_size": (4, 4), **change}
    with pytest.raises(NotImplementedError, match=words):
        accel.window_attention(**call, backend="cpu")
    assert accel.window_attention(**call, backend="reference").dtype == change["qkv"].dtype


COLD_COMPILE = """
import torch
import accel

qkv = torch.randn(1, 5, 6, 24)
call = lambda x: accel.window_attention(x, num_heads=2, window_size=(4, 4), shift_size=(1, 1))
compiled = torch.compile(call, backend="eager", fullgraph=True)
for grad in (False, True):
    torch._dynamo.reset()
    got = compiled(qkv.clone().requires_grad_(grad))
    assert torch.equal(got, call(qkv)), (got - call(qkv)).abs().max()
print("compiled")
"""


@pytest.mark.parametrize("absent", [(), ("accel._C", "triton")], ids=["as it is", "only the reference"])
def test_compiling_before_any_call(absent):
    """What is imported, logged or cached at the first call happens under the compiler's eyes here."""
    code = without(*absent) + COLD_COMPILE
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    assert child.stdout.splitlines()[-1] == "compiled"
    if absent:
        assert child.stderr.count("runs on the slower backend 'reference' because cpu: accel._C did not load") == 1


@pytest.mark.parametrize("op", dispatch.OPS.values(), ids=lambda op: op.name)
def test_tensors_without_data_give_the_shape_of_the_output(op):
    """On torch's meta device, where sizes and FLOPs of a model are counted before it has memory."""
    args, kwargs = op.example("cpu", torch.float32)
    want, _ = tree_flatten(op.function(*args, **kwargs))
    args, kwargs = op.example("meta", torch.float32)
    made, _ = tree_flatten(op.function(*args, **kwargs))
    for got, expected in zip(made, want, strict=True):
        assert got.device.type == "meta"
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)


class Labelled(torch.Tensor):
    """A subclass, which may have something to say of each op."""


def test_only_a_call_that_nothing_is_to_see_goes_past_the_registered_op() -> None:
    q = torch.randn(1, 2, 5, 8)

    def ops_of(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        with torch.profiler.profile() as profile:
            out = accel.softmax_attention(x, q, q, backend="cpu")
        return out, any(event.key == "accel::softmax_attention_forward" for event in profile.key_averages())

    plain, seen = ops_of(q)
    assert not seen
    for other in (q.as_subclass(Labelled), q.clone().requires_grad_()):
        out, seen = ops_of(other)
        assert seen, type(other)
        torch.testing.assert_close(out.detach().as_subclass(torch.Tensor), plain, rtol=0, atol=0)
    with Recorder() as recorder:
        torch.testing.assert_close(accel.softmax_attention(q, q, q, backend="cpu"), plain, rtol=0, atol=0)
    assert [call[0].name() for call in recorder.calls] == ["accel::softmax_attention_forward"]
