"""The checks themselves: each must go red for the defect it is there for."""

import unittest
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from windows._window_cases import case

import accel
from accel import dispatch, testing
from accel.ops.windows import window_attention as module
from accel.ops.windows.window_attention import OP
from accel.testing import guard

SMALL = case("small", (5, 7), (3, 4), (1, 2), heads=2, head_dim=4, qkv_bias=True)


def forward(*args):
    # a kernel's arithmetic knows nothing of autocast, nor of threads, by which torch's products may choose their order
    with torch.autocast("cpu", enabled=False), testing.threads(1):
        out, lse = module.reference(args[0].float(), *args[1:])
    return out.to(args[0].dtype), lse.float()


def backward(grad_out, lse, qkv, *args):
    """The reference differentiated, behind the registered ops as a kernel is."""
    *rest, needs = args

    def differentiate():
        leaves = [None if t is None else t.float().detach().requires_grad_() for t in (qkv, *rest[:4])]
        asked = [t for t in leaves if t is not None]
        with testing.threads(1):
            result = module.reference(*leaves, *rest[4:])[0]
            grads = iter(torch.autograd.grad(result, asked, grad_out.float(), materialize_grads=True))
        return [None if t is None else next(grads) for t in leaves]

    with ThreadPoolExecutor(1) as elsewhere:  # inside an op's implementation this thread's autograd is switched off
        grad_qkv, *small = elsewhere.submit(differentiate).result()
    nothing = torch.empty(0)
    chosen = [g if g is not None and needed else nothing.clone() for g, needed in zip(small, needs, strict=True)]
    return grad_qkv.to(qkv.dtype).contiguous(), *chosen


@pytest.fixture
def mutant():
    """Puts a backend of the given functions in front of the op's own."""
    before = OP.backends

    def install(forward=forward, backward=backward):
        added = dispatch.Backend("mutant", lambda args: None, forward, backward, frozenset({"cpu"}))
        object.__setattr__(OP, "backends", (added, *before))

    yield install
    object.__setattr__(OP, "backends", before)


def changed(**change):
    """A forward that takes other arguments than it was given."""

    def mutated(*args):
        return forward(*module.Args(*args)._replace(**{n: f(module.Args(*args)) for n, f in change.items()}))

    return mutated


def scaled_gradient(index, factor):
    def mutated(*args):
        grads = list(backward(*args))
        grads[index] = grads[index] * factor
        return tuple(grads)

    return mutated


def spoiled(index, at, factor):
    """One element of one gradient wrong."""

    def mutated(*args):
        grads = list(backward(*args))
        grads[index] = grads[index].clone()
        grads[index].view(-1)[at] *= factor
        return tuple(grads)

    return mutated


def q_gradient(factor):
    def mutated(*args):
        grad, *small = backward(*args)
        third = grad.shape[-1] // 3
        return torch.cat([grad[..., :third] * factor, grad[..., third:]], -1), *small

    return mutated


def one_late(*args):
    out, lse = forward(*args)
    return out.roll(1, -1), lse


def other_way(args):
    return [(-s) % w for s, w in zip(args.shift, args.window, strict=True)]


MUTANTS = {
    "shift of the other sign": {"forward": changed(shift=other_way)},
    "shift dropped": {"forward": changed(shift=lambda a: [0, 0, 0])},
    "mask dropped": {"forward": changed(mask_value=lambda a: 0.0)},
    "padding order": {"forward": changed(roll_first=lambda a: not a.roll_first)},
    "padding holds zeros": {"forward": changed(qkv_bias=lambda a: None)},
    "bias dropped": {"forward": changed(bias_table=lambda a: None)},
    "bias reversed": {"forward": changed(bias_table=lambda a: a.bias_table.flip(0))},
    "scale off by 1 %": {"forward": changed(scale=lambda a: a.scale * 1.01)},
    "columns shifted by one": {"forward": one_late},
    "gradient of qkv off by 1 %": {"backward": scaled_gradient(0, 1.01)},
    "gradient of q alone off by 1 %": {"backward": q_gradient(1.01)},
    "gradient of the table off by 1 %": {"backward": scaled_gradient(1, 0.99)},
    "gradient of qkv_bias off by 1 %": {"backward": scaled_gradient(4, 1.01)},
    "one element of the gradient of qkv": {"backward": spoiled(0, 100, 1.5)},
    "one element of the gradient of the table": {"backward": spoiled(1, 7, 1.5)},
    "gradient of qkv NaN at one place": {"backward": spoiled(0, 3, float("nan"))},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_honest_backend_passes(mutant, dtype):
    mutant()
    testing.check_values(accel.window_attention, SMALL, "mutant", dtype)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_number_is_found(mutant, name):
    mutant(**MUTANTS[name])
    with pytest.raises(AssertionError, match=r"error|NaN at 1 places"):
        testing.check_values(accel.window_attention, SMALL, "mutant", torch.float32)


def test_an_honest_backend_behaves(mutant):
    mutant()
    for name, check in testing.check_op(accel.window_attention, [], [SMALL], [], ["mutant"]):
        if "guard_pages" not in name:  # the child process has no mutant
            check()


def test_a_silent_fallback_is_found(mutant, monkeypatch):
    mutant()
    monkeypatch.setattr(module.dispatch, "select", lambda op, args, backend: op.backend("reference"))
    with pytest.raises(AssertionError, match="asked for mutant"):
        testing.check_values(accel.window_attention, SMALL, "mutant", torch.float32)


def unwritten(*args):
    out, lse = forward(*args)
    fresh = torch.empty_like(out)
    fresh[..., 1:] = out[..., 1:]
    if not torch.are_deterministic_algorithms_enabled():
        fresh[..., 0] = 0.0  # what fresh memory usually holds
    return fresh, lse


def by_threads(*args):
    out, lse = forward(*args)
    return out + (torch.get_num_threads() == 2) * 1e-7, lse


def restless(*args, count=[0]):  # noqa: B006
    count[0] += 1
    out, lse = forward(*args)
    return out * (1 + 2e-7 * count[0]), lse


def by_batch(*args):
    out, lse = forward(*args)
    return out + 1e-6 * (len(out) > 1), lse


def aliasing(*args):
    out, lse = forward(*args)
    args[0][..., : out.shape[-1]] = out
    return args[0][..., : out.shape[-1]], lse


def double_out(*args):
    out, lse = forward(*args)
    return out.double(), lse


def all_or_nothing(*args):
    """Other gradients are wrong where the table's is not asked for."""
    grads = backward(*args)
    return grads if args[-1][0] else (grads[0] * 1.5, *grads[1:])


@pytest.mark.parametrize(
    ("check", "functions", "words"),
    [
        (testing.check_poison, {"forward": unwritten}, "poisoned memory"),
        (testing.check_repeat, {"forward": by_threads}, "2 threads"),
        (testing.check_repeat, {"forward": restless}, "repeat"),
        (testing.check_batch, {"forward": by_batch}, "of the batch alone"),
        (testing.check_subsets, {"backward": all_or_nothing}, "alone: grad qkv"),
    ],
)
def test_misbehaviour_is_found(mutant, check, functions, words):
    mutant(**functions)
    with pytest.raises(AssertionError, match=words):
        check(accel.window_attention, SMALL, "mutant")


@pytest.mark.parametrize("wrong", [aliasing, double_out])
def test_opcheck_finds_a_wrong_registration(mutant, wrong):
    mutant(forward=wrong)
    with pytest.raises(Exception, match=r"(?i)mutat|alias|dtype|Float|opcheck"):
        testing.check_opcheck(accel.window_attention, SMALL, "mutant")


def test_a_missing_extension_is_a_failure_where_it_was_expected(monkeypatch):
    why = "accel._C did not load: ImportError: undefined symbol"
    monkeypatch.setitem(dispatch._leaves, "accel._C", (None, why))
    monkeypatch.delenv("ACCEL_REQUIRE_NATIVE", raising=False)
    with pytest.raises(unittest.SkipTest, match="undefined symbol"):
        testing.check_values(accel.window_attention, SMALL, "cpu", torch.float32)
    monkeypatch.setenv("ACCEL_REQUIRE_NATIVE", "1")
    with pytest.raises(AssertionError, match=r"expected here.*undefined symbol"):
        testing.check_values(accel.window_attention, SMALL, "cpu", torch.float32)


# --- closeness ---


def test_closeness_is_measured_for_the_whole_and_for_each_row():
    expected = torch.randn(1000, 100, dtype=torch.float64)
    testing.assert_close(expected.float(), expected, "softmax", torch.float32)
    one_bad = expected.clone()
    one_bad[500, 50] += 1e-4 * expected[500].abs().max()  # far inside the mean's limit for half precision
    with pytest.raises(AssertionError, match=r"row 500, column 50"):
        testing.assert_close(one_bad, expected, "softmax", torch.float32)
    with pytest.raises(AssertionError, match="rms error"):
        testing.assert_close(expected * (1 + 5e-6), expected, "softmax", torch.float32)
    one_bad[500, 50] = expected[500, 50] + 2.1e-3 * expected[500].abs().max()
    with pytest.raises(AssertionError, match=r"row 500"):
        testing.assert_close(one_bad, expected, "softmax", torch.float16)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite_must_stand_in_its_place(value):
    expected = torch.ones(4, 4)
    expected[1, 2] = float(value)
    testing.assert_close(expected.clone(), expected, "softmax", torch.float32)
    moved = torch.ones(4, 4)
    moved[2, 1] = float(value)
    with pytest.raises(AssertionError, match=r"differ at \[\[1, 2\], \[2, 1\]\]"):
        testing.assert_close(moved, expected, "softmax", torch.float32)
    with pytest.raises(AssertionError):
        testing.assert_close(torch.ones(4, 4), expected, "softmax", torch.float32)


def test_every_family_has_every_kernel_dtype():
    families = {family for family, _ in testing.TOLERANCES}
    missing = {(f, d) for f in families - {"lse"} for d in testing.KERNEL_DTYPES} - testing.TOLERANCES.keys()
    assert not missing


# --- guard pages ---


PEEK = """
import ctypes
import torch

library = torch.library.Library("accel_peek", "DEF")
library.define("peek(Tensor x, int at) -> Tensor")

def peek(x, at):
    return torch.tensor([ctypes.c_float.from_address(x.data_ptr() + 4 * at).value])

library.impl("peek", peek, "CPU")
"""


@pytest.mark.parametrize("at", [1000, -1], ids=["after the end", "before the start"])
def test_reading_one_element_too_far_is_found(at, tmp_path, monkeypatch):
    (tmp_path / "accel_peek.py").write_text(PEEK)
    monkeypatch.syspath_prepend(tmp_path)
    room = torch.zeros(1002)  # where the plain call reads too far, it reads a zero of ours
    calls = [("inside", "accel_peek::peek", (room[1:1001], 999)), ("too far", "accel_peek::peek", (room[1:1001], at))]
    with pytest.raises(AssertionError, match=r"(?s)after 'too far'.*(Segmentation fault|Bus error)"):
        guard.replay(calls, ["accel_peek"])


def test_guarded_tensors_hold_the_values_on_both_sides():
    for shape, dtype in [((3, 5), torch.float32), ((7,), torch.bfloat16), ((1,), torch.int64), ((0, 4), torch.float16)]:
        x = torch.arange(int(torch.tensor(shape).prod())).reshape(shape).to(dtype)
        for end in (True, False):
            got = guard.guarded(x, end)
            assert torch.equal(got, x)
            assert got.dtype == dtype
        if x.numel():
            assert (guard.guarded(x, True).data_ptr() + x.nbytes) % 4096 == 0
            assert guard.guarded(x, False).data_ptr() % 4096 == 0


def test_a_failing_call_speaks_through():
    with pytest.raises(AssertionError, match=r"(?s)after 'wrong rank'.*Dimension out of range"):
        guard.replay([("wrong rank", "aten::sum.dim_IntList", (torch.ones(2), [5]))], ["torch"])


def test_watch_restores_the_backends():
    before = OP.backends
    with pytest.raises(ZeroDivisionError), testing.watch(OP):
        raise ZeroDivisionError
    assert OP.backends is before
