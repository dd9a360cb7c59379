"""Products of grouped rows: awkward counts as data for the common checks, an oracle, work that is cut, bad input."""

import numpy as np
import pytest
import torch
from _bad import Bad, check_bad, each, zeros
from _expert_cases import linear_case as case

import accel
from accel import dispatch, testing
from accel.ops.moe.grouped_linear import OP
from accel.testing import assert_close, assert_same

CASES = [
    case("one of all", [1], 1, 1),
    case("plain", [3, 0, 5, 1], 8, 6, bias=True),
    case("transposed", [3, 0, 5, 1], 8, 6, transposed=True, bias=True),
    case("tail", [2, 4], 5, 7, tail=3, kind=torch.int32),
    case("none at all", [0, 0, 0], 5, 7, tail=4, bias=True),
    case("eight and nine", [8, 9, 7, 16, 17], 33, 35),
    case("eight and nine, transposed", [8, 9, 7, 16, 17], 33, 35, transposed=True),
    case("deep", [3, 20], 517, 70, bias=True),
    case("deep, transposed", [3, 20], 517, 70, transposed=True),
    case("many rows", [0, 131, 2], 40, 67),
    case("one has all", [0, 0, 300, 0], 64, 97, bias=True),
    case("wide", [9, 2], 31, 300),
    case("wide, transposed", [9, 2], 31, 300, transposed=True),
    case("exact", [3, 0, 9, 40], 11, 13, bias=True, whole=True, dtypes=(torch.float32, torch.float16)),
]
BEHAVIOUR = [
    case("plain", [2, 0, 3], 4, 6, bias=True, tail=1),
    case("many, transposed", [11, 2], 5, 3, transposed=True),
]
GRADIENTS = [
    case("plain", [2, 0, 1], 3, 2, bias=True, tail=1),
    case("transposed", [1, 2], 2, 3, transposed=True),
]
BACKENDS = ["cpu", "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

# Of a batch of rows none is alone: offsets say how many there are, so what is empty and what is alone is tried below.
CHECKS = [
    (name, check)
    for name, check in testing.check_op(accel.grouped_linear, CASES, BEHAVIOUR, GRADIENTS, BACKENDS)
    if name.split("-")[1] not in ("empty", "batch")
]


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


def by_name(name):
    return next(c for c in CASES if c.name == name)


def some(backend, counts=(3, 0, 2), C=5, O=4, tail=2, dtype=torch.float32, **how):  # noqa: E741
    """Tensors and arguments of a call that ``backend`` can run."""
    tensors, kwargs = case("some", counts, C, O, tail=tail, bias=True, **how).make(dtype, "cpu", 1)
    testing.require(accel.grouped_linear, backend, tensors, kwargs)
    return tensors, kwargs


@pytest.mark.parametrize("name", ["plain", "transposed", "tail", "eight and nine", "none at all"])
def test_reference_is_the_definition(name):
    tensors, kwargs = by_name(name).make(torch.float64, "cpu", 3)
    x, weight, bias = (None if t is None else t.numpy() for t in map(tensors.get, ("x", "weight", "bias")))
    offsets, outputs = kwargs["offsets"].tolist(), weight.shape[2 if kwargs["transposed"] else 1]
    want = np.zeros((x.shape[0], outputs))
    for n in range(x.shape[0]):
        for e in range(len(offsets) - 1):
            if offsets[e] <= n < offsets[e + 1]:
                w = weight[e].T if kwargs["transposed"] else weight[e]
                want[n] = w @ x[n] + (0.0 if bias is None else bias[e])
    got = accel.grouped_linear(**tensors, **kwargs, backend="reference")
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-12)


@every_backend
def test_no_rows_and_no_experts(backend):
    tensors, kwargs = some(backend, (0, 0, 0), tail=0)
    got = testing.run(accel.grouped_linear, tensors, kwargs, backend)
    assert got.out.shape == (0, 4)
    for name, grad in got.grads.items():
        assert_same(grad, torch.zeros_like(tensors[name]), name)
    none = {n: t if n == "x" else t[:0] for n, t in tensors.items()}
    offsets = torch.zeros(1, dtype=torch.int64)
    assert_same(accel.grouped_linear(**{**none, "x": zeros(3, 5)}, offsets=offsets), zeros(3, 4), "no experts")


@every_backend
def test_rows_and_experts_that_do_not_meet_have_no_gradient(backend):
    tensors, kwargs = some(backend)
    got = testing.run(accel.grouped_linear, tensors, kwargs, backend)
    assert not got.out[5:].any()
    assert not got.grads["x"][5:].any()
    for name in ("weight", "bias"):
        assert not got.grads[name][1].any(), name
        assert got.grads[name][0].any(), name


@every_backend
@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES)
def test_what_is_not_finite_stays_with_its_row_and_expert(backend, dtype):
    for rows in (3, 20):  # few and many of a group
        for transposed in (False, True):
            tensors, kwargs = some(backend, (rows, 0, 5), C=7, dtype=dtype, transposed=transposed)
            clean = testing.run(accel.grouped_linear, tensors, kwargs, backend)
            tensors["x"][0] = float("nan")
            tensors["x"][-1] = float("inf")  # of a row without an expert
            got = testing.run(accel.grouped_linear, tensors, kwargs, backend)
            assert got.out[0].isnan().all()
            assert_same(got.out[1:], clean.out[1:], "the other rows")
            assert_same(got.grads["x"], clean.grads["x"], "gradients of rows")
            assert_same(got.grads["weight"][1:], clean.grads["weight"][1:], "gradients of other experts")


@every_backend
def test_a_huge_group_is_that_of_its_parts(backend):
    """The work of a group is cut by rows: whichever rows stand side by side, the result is the same."""
    tensors, kwargs = some(backend, (400,), C=19, O=33, tail=0)
    whole = accel.grouped_linear(**tensors, **kwargs, backend=backend)
    for rows in (slice(0, 50), slice(130, 300), slice(399, 400)):
        part = {**tensors, "x": tensors["x"][rows]}
        offsets = torch.tensor([0, part["x"].shape[0]])
        got = accel.grouped_linear(**part, offsets=offsets, backend=backend)
        assert_close(got, whole[rows].double(), "grouped", torch.float32, str(rows))


LEVELS = testing.check_levels(
    accel.grouped_linear,
    map(by_name, ["plain", "eight and nine", "eight and nine, transposed", "deep", "deep, transposed", "exact"]),
)


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in LEVELS])
def test_every_instruction_set(check):
    check()


def test_compiled_offsets_are_checked_by_the_kernel():
    tensors, kwargs = some("cpu", tail=0)
    torch._dynamo.reset()

    def call(x, offsets):
        return accel.grouped_linear(x, tensors["weight"], offsets, backend="cpu")

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert_same(compiled(tensors["x"], kwargs["offsets"]), call(tensors["x"], kwargs["offsets"]), "compiled")
    for wrong, words in (
        ([0, 4, 3, 5], "fall, got 4 and 3"),
        ([0, 1, 2, 6], "within 5 rows, got 6"),
        ([1, 2, 3, 5], "got 1"),
    ):
        with pytest.raises(RuntimeError, match=words):
            compiled(tensors["x"], torch.tensor(wrong))


def test_flops():
    testing.check_flops(accel.grouped_linear, by_name("plain"), BACKENDS[:1], 2 * 9 * 8 * 6)
    testing.check_flops(accel.grouped_linear, by_name("plain"), BACKENDS[:1], 3 * 2 * 9 * 8 * 6, backward=True)


GOOD = {"x": zeros(5, 4), "weight": zeros(2, 3, 4), "offsets": torch.tensor([0, 2, 5]), "bias": zeros(2, 3)}
BAD = [
    Bad("no tensor", TypeError, "x must be a floating point tensor, got list", {"x": [1.0]}),
    Bad(
        "integers",
        TypeError,
        "weight must be a floating point tensor, got torch.int64",
        {"weight": zeros(2, 3, 4).long()},
    ),
    Bad("dtypes", TypeError, "one dtype, got torch.float32 and torch.bfloat16", {"weight": zeros(2, 3, 4).bfloat16()}),
    Bad("axes", ValueError, r"do not fit: tuple\(x.shape\)=\(5, 4, 1\)", {"x": zeros(5, 4, 1)}),
    Bad("sizes", ValueError, r"\(X, O, C\) do not fit.*\(5, 4\).*\(2, 3, 5\)", {"weight": zeros(2, 3, 5)}),
    Bad("turned", ValueError, r"\(X, C, O\) do not fit.*\(2, 3, 4\)", {"transposed": True}),
    Bad("too few offsets", ValueError, r"\(X \+ 1,\) = \(3,\), got .*\(2,\)", {"offsets": torch.tensor([0, 5])}),
    Bad("offsets' dtype", TypeError, "int32 or int64, got torch.float32", {"offsets": zeros(3)}),
    Bad("offsets fall", ValueError, r"got offsets\[1\]=4 and offsets\[2\]=3", {"offsets": torch.tensor([0, 4, 3])}),
    Bad("negative", ValueError, r"offsets\[0\]=-1", {"offsets": torch.tensor([-1, 2, 5])}),
    Bad("too far", ValueError, r"within the 5 rows of x, got offsets\[2\]=6", {"offsets": torch.tensor([0, 2, 6])}),
    Bad("bias", ValueError, r"\(X, O\) = \(2, 3\), got .*\(3, 2\)", {"bias": zeros(3, 2)}),
    Bad("device", ValueError, "weight is on meta but x is on cpu", {"weight": zeros(2, 3, 4, device="meta")}),
    Bad("backend", ValueError, "no backend 'gluon'; it has torch, cpu", {"backend": "gluon"}),
]


@each(BAD)
def test_bad_input(bad):
    check_bad(accel.grouped_linear, GOOD, bad)


def test_double_runs_on_the_reference_alone():
    tensors, kwargs = by_name("plain").make(torch.float64, "cpu", 0)
    assert accel.grouped_linear(**tensors, **kwargs).dtype == torch.float64
    with pytest.raises(NotImplementedError, match=r"backend 'cpu' cannot run this call: ."):
        accel.grouped_linear(**tensors, **kwargs, backend="cpu")
    args = OP.prepare(**tensors, **kwargs)
    assert dispatch.select(OP, args).name == "reference"
