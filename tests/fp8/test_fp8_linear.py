"""A linear layer of eight-bit numbers: its products by hand, what every op must pass, and what is kept of x."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from _bad import Bad, check_bad, each, zeros
from _fp8_cases import E4M3, E5M2, INPUTS, random_matrix

import accel
from accel import FP8Recipe, testing
from accel.ops.fp8 import fp8_gemm, fp8_linear, fp8_quantize, size_rule
from accel.ops.fp8.recipe import BLOCKS, SCALINGS, WEIGHT_BLOCKS
from accel.testing import assert_close, assert_same

PLAIN = "definition"
"""A backend of the tests alone: the reference's arithmetic behind the registered ops and their autograd, in which
another result than the reference's is a fault of what is between, whatever its size."""


@pytest.fixture(scope="module", autouse=True)
def definition():
    before = {op: op.backends for op in (fp8_quantize.OP, fp8_gemm.OP, fp8_linear.OP)}
    for op in (fp8_quantize.OP, fp8_gemm.OP):
        plain = dataclasses.replace(op.backend("reference"), name=PLAIN)
        object.__setattr__(op, "backends", (*before[op][:-1], plain, before[op][-1]))
    *others, reference = before[fp8_linear.OP]
    object.__setattr__(fp8_linear.OP, "backends", (*others, fp8_linear._backend(PLAIN, frozenset()), reference))
    yield
    for op, backends in before.items():
        object.__setattr__(op, "backends", backends)


BACKENDS = [PLAIN, *[b.name for b in fp8_linear.OP.backends if b.name == "cpu"], "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_scaling = pytest.mark.parametrize("scaling", SCALINGS)


# --- what every op must pass ---


def case(
    name, shape=(3, 130), N=140, *, bias=True, weight_dtype=None, stored=None, kind="normal", whole=False, **recipe
):
    def make(dtype, device, seed):
        x, weight = random_matrix(shape, kind, seed), random_matrix((N, shape[-1]), kind, seed + 1)
        if whole:  # powers of two are quantised without loss
            x, weight = x.sign(), weight.sign()
        tensors = {"x": (0.1 * x if not whole else x).to(device, dtype)}
        kwargs = {"recipe": FP8Recipe(**recipe, size_rule=False)}
        if stored:
            block = [size or None for size in WEIGHT_BLOCKS[stored]]
            q, scale = accel.fp8_quantize(weight, block=block, backend="reference")
            kwargs |= {"weight": q.to(device), "weight_scale": scale.to(device)}
        else:
            tensors["weight"] = weight.to(device, weight_dtype or dtype)
        if bias:
            tensors["bias"] = random_matrix((N,), "normal", seed + 2).to(device, dtype)
            if whole:
                tensors["bias"] = tensors["bias"].sign()
        return tensors, kwargs

    return testing.Case(name, make, "exact" if whole else "fp8", batched=("x",))


CASES = [
    case("block", (37, 300)),
    case("block, batch", (2, 3, 129), 5, bias=False),
    case("block, fp32 weight", (20, 160), 200, weight_dtype=torch.float32),
    case("block, input kept", (37, 300), save="input"),
    case("block, lognormal", (9, 260), kind="lognormal", scale_format="pow2"),
    case("block, e5m2 gradients", (40, 60), 33, grad_dtype=E5M2, scale_format="e8m0"),
    case("row", (37, 300), scaling="row"),
    case("tensor", (37, 300), scaling="tensor"),
    case("weight only", (37, 300), scaling="weight_only"),
    case("one", (1, 1), 1),
    case("long", (300, 7), 9),
    case("stored", (37, 300), stored="block"),
    case("stored rows", (37, 300), stored="row", scaling="row"),
    case("stored whole", (37, 300), stored="tensor", scaling="tensor"),
    case("stored, weight only", (37, 300), stored="block", scaling="weight_only"),
    case("stored rows, weight only", (37, 300), stored="row", scaling="weight_only"),
]
BEHAVIOUR = [
    case("block", (3, 2, 130), 7),
    case("block, input kept", (3, 130), 7, save="input"),
    case("row", (3, 130), 7, scaling="row", bias=False),
    case("weight only", (3, 130), 7, scaling="weight_only"),
    case("stored", (3, 130), 7, stored="block"),
]
# torch's own products, of which all is made here, choose their path by the rows; xᵀ in eight bits does not change with
# x; the backend of the tests is not to be found in the process that guards pages; the gradient of a weight that is not
# quantised is torch's product, whose bits may depend on the number of threads.
CHECKS = [
    (name, check)
    for name, check in testing.check_op(accel.fp8_linear, CASES, BEHAVIOUR, [], BACKENDS)
    if "-batch-" not in name and "guard_pages" not in name and ("inplace" not in name or "kept" in name)
    if not name.endswith("repeat-weight only")
]


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


def test_beside_a_weight_that_is_not_quantised_bits_repeat_and_threads_change_its_gradient_alone():
    given, grad = some()
    how = {"recipe": FP8Recipe(scaling="weight_only", size_rule=False), "backend": "cpu"}
    with testing.threads(1):
        first = gradients(given, grad, **how)
        others = [gradients(given, grad, **how)]
    for count in (2, 3):
        with testing.threads(count):
            others.append({**gradients(given, grad, **how), "weight": first["weight"]})
    for again in others:
        for name, want in first.items():
            testing.assert_same(again[name], want, name)


# --- the products, made by hand ---


def some(shape=(37, 300), N=140, dtype=torch.float32, **change):
    """Tensors that require gradients, and an upstream gradient."""
    x, weight, bias = (random_matrix(s, "normal", i) for i, s in enumerate((shape, (N, shape[-1]), (N,))))
    given = {"x": x.to(dtype), "weight": weight, "bias": bias, **change}
    given = {n: t.clone().requires_grad_() if t is not None else t for n, t in given.items()}
    return given, random_matrix((*shape[:-1], N), "normal", 5, dtype)


def gradients(given, grad, **how):
    leaves = {n: t for n, t in given.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    out = accel.fp8_linear(**given, **{"recipe": FP8Recipe(size_rule=False), **how})
    return {"out": out.detach(), **dict(zip(leaves, torch.autograd.grad(out, leaves.values(), grad), strict=True))}


def check_equal(got, want, what):
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert_same(got[name], expected, f"{what}: {name}")


def there_and_back(x, block, dtype=E4M3, scale_format="fp32"):
    """What is left of a matrix, in float64."""
    block = [size or None for size in block]
    q, scale = accel.fp8_quantize(x, block=block, dtype=dtype, scale_format=scale_format, backend="reference")
    block = [size or whole for size, whole in zip(block, x.shape, strict=True)]
    spread = scale.double().repeat_interleave(block[0], 0)[: x.shape[0]].repeat_interleave(block[1], 1)
    return q.double() * spread[:, : x.shape[1]]


@every_backend
@every_scaling
@pytest.mark.parametrize("dtype", INPUTS)
def test_the_three_products(dtype, scaling, backend):
    given, grad = some(dtype=dtype)
    x, weight, bias = (given[n].detach() for n in ("x", "weight", "bias"))
    recipe = FP8Recipe(scaling=scaling, grad_dtype=E5M2, scale_format="pow2", size_rule=False)
    got = gradients(given, grad, recipe=recipe, backend=backend)

    def rows(t, kind=E4M3):
        return t.double() if scaling == "weight_only" else there_and_back(t, BLOCKS[scaling], kind, "pow2")

    def weights(t):
        return there_and_back(t, WEIGHT_BLOCKS[scaling], scale_format="pow2")

    want = {
        "out": rows(x) @ weights(weight).t() + bias.double(),
        "x": rows(grad, E5M2) @ weights(weight.t().contiguous()).t(),
        "weight": rows(grad.t(), E5M2) @ rows(x.t()).t(),
        "bias": grad.double().sum(0),
    }
    for name, expected in want.items():
        kind = dtype if name in ("out", "x") else torch.float32
        assert got[name].dtype == kind
        assert_close(got[name], expected, "fp8", kind, name)  # the weight's gradient is not rounded to that of x


@every_backend
@pytest.mark.parametrize("stored", ["block", "row", "tensor"])
def test_a_stored_weight_and_the_gradient_of_x(stored, backend):
    """Whose product needs scales along the other axis: those of rows are made anew from the numbers."""
    given, grad = some()
    block = [size or None for size in WEIGHT_BLOCKS[stored]]
    q, scale = accel.fp8_quantize(given["weight"], block=block)
    numbers = there_and_back(given["weight"], WEIGHT_BLOCKS[stored]).detach()
    call = {"x": given["x"], "weight": q, "weight_scale": scale}
    for scaling in (stored, "weight_only"):
        got = gradients(call, grad, recipe=FP8Recipe(scaling=scaling, size_rule=False), backend=backend)
        w = there_and_back(numbers.t().float(), BLOCKS["row"]).t() if scaling == "row" else numbers
        g = grad.double() if scaling == "weight_only" else there_and_back(grad, BLOCKS[scaling])
        assert_close(got["x"], g @ w, "fp8_grad", torch.float32, f"{stored}, {scaling}")


@every_backend
@every_scaling
def test_what_is_kept_changes_no_bit(scaling, backend):
    for dtype in INPUTS:
        given, grad = some(dtype=dtype)
        recipes = [FP8Recipe(scaling=scaling, save=save, size_rule=False) for save in ("fp8", "input")]
        want, got = (gradients(given, grad, recipe=recipe, backend=backend) for recipe in recipes)
        check_equal(got, want, f"{scaling}, {dtype}")


def kept_bytes(given, **how):
    """Bytes that autograd keeps of a call, the arguments' own apart."""
    own = {t.untyped_storage().data_ptr() for t in given.values() if t is not None}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = accel.fp8_linear(**given, **how, backend=PLAIN)
    assert out.requires_grad
    return sum(size for at, size in kept.items() if at not in own), own & kept.keys()


def test_a_byte_an_element_is_kept_and_nothing_that_is_not_needed():
    given, _ = some((64, 256), 128, bias=None)
    x, weight = (given[n].untyped_storage().data_ptr() for n in ("x", "weight"))
    codes = 64 * 256 + 4 * 256  # of xᵀ, and a scale for each of its rows
    quantized = 128 * 256 + 4 * 2
    fp8, plain = FP8Recipe(size_rule=False), FP8Recipe(save="input", size_rule=False)
    assert kept_bytes(given, recipe=fp8) == (codes + quantized, set())
    assert kept_bytes(given, recipe=plain) == (quantized, {x})
    given["weight"].requires_grad_(False)
    for recipe in (fp8, plain):
        assert kept_bytes(given, recipe=recipe) == (quantized, set())
    assert weight not in kept_bytes(given, recipe=fp8)[1]


def test_changing_x_in_place_is_wrong_only_where_it_is_kept():
    given, grad = some()
    leaf = given["x"]
    want = gradients(given, grad, backend=PLAIN)["weight"]
    for save, fails in (("fp8", False), ("input", True)):
        x = leaf.detach().clone()
        out = accel.fp8_linear(**{**given, "x": x}, recipe=FP8Recipe(save=save, size_rule=False), backend=PLAIN)
        x.zero_()
        if fails:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.backward(grad)
        else:
            assert_same(torch.autograd.grad(out, given["weight"], grad)[0], want, "after a change of x")


def test_a_weight_in_eight_bits_is_what_it_was_quantised_from():
    given, grad = some()
    q, scale = accel.fp8_quantize(given["weight"], block=(128, 128))
    want = gradients(given, grad)
    del want["weight"]
    check_equal(gradients({**given, "weight": q, "weight_scale": scale}, grad, recipe=None), want, "stored")
    q, scale = accel.fp8_quantize(given["weight"], block=(128, 128), scale_format="e8m0")
    powers = gradients(given, grad, recipe=FP8Recipe(scale_format="e8m0", size_rule=False))
    del powers["weight"]
    recipe = FP8Recipe(scale_format="pow2", size_rule=False)
    for exponents in (scale, scale.view(torch.uint8)):
        check_equal(gradients({**given, "weight": q, "weight_scale": exponents}, grad, recipe=recipe), powers, "e8m0")


def test_scales_name_the_recipe_where_none_is_given():
    given, _ = some()
    for scaling in ("block", "row", "tensor"):
        block = [size or None for size in WEIGHT_BLOCKS[scaling]]
        q, scale = accel.fp8_quantize(given["weight"], block=block)
        call = {"x": given["x"], "weight": q, "weight_scale": scale}
        want = accel.fp8_linear(**call, recipe=FP8Recipe(scaling=scaling))
        assert_same(accel.fp8_linear(**call), want, scaling)
    assert_same(accel.fp8_linear(**{**call, "weight_scale": scale.view(())}), want, "one number")


def test_an_fp32_weight_is_not_rounded_under_autocast():
    given, grad = some()
    half = {**given, "x": given["x"].detach().bfloat16().requires_grad_()}
    want = gradients(half, grad.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        out = accel.fp8_linear(**given, recipe=FP8Recipe(size_rule=False))
    assert_same(out, want["out"], "under autocast")
    (got,) = torch.autograd.grad(out, given["weight"], grad.bfloat16())
    assert_same(got, want["weight"], "gradient of the weight")
    assert not torch.equal(got, got.bfloat16().float())


@every_backend
def test_empty(backend):
    for shape, N in (((0, 5), 3), ((4, 0), 3), ((4, 5), 0), ((2, 0, 5), 3), ((0, 0), 0)):
        for scaling in SCALINGS:
            given, grad = some(shape, N)
            got = gradients(given, grad, recipe=FP8Recipe(scaling=scaling, size_rule=False), backend=backend)
            assert_same(got["bias"], grad.sum(list(range(len(shape) - 1))), "gradient of the bias")
            if 0 in shape or N == 0:
                assert_same(got["out"], given["bias"].detach().expand(*shape[:-1], N), f"{shape}, {N}, {scaling}")
                assert not got["x"].any()
                assert not got["weight"].any()


@every_scaling
def test_jacobians(scaling):
    """Whose forward runs on a kernel, and whose backward torch batches."""
    given, _ = some((5, 140), 9)
    x, weight, bias = (t.detach() for t in given.values())
    for save in ("fp8", "input"):
        recipe = FP8Recipe(scaling=scaling, save=save, size_rule=False)

        def two(x, weight, backend=PLAIN, recipe=recipe):
            out = accel.fp8_linear(x, weight, bias, recipe=recipe, backend=backend)
            return torch.stack([(out * g).sum() for g in random_matrix((2, 5, 9))])

        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        rows = [torch.autograd.grad(number, leaves, retain_graph=True) for number in two(*leaves)]
        for i, got in enumerate(torch.func.jacrev(two, (0, 1))(x, weight)):
            assert_close(got, torch.stack([row[i] for row in rows]).double(), "fp8_grad", torch.float32, scaling)


# --- compiled ---


def test_compiled_with_sizes_that_vary():
    recipe = FP8Recipe(size_rule=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    call = torch.compile(
        lambda x, w, b: accel.fp8_linear(x, w, b, recipe=recipe, backend=PLAIN),
        backend="aot_eager", fullgraph=True, dynamic=True,
    )  # fmt: skip
    for rows in (37, 5, 130):
        given, grad = some((2, rows, 300))
        out = call(*given.values())
        want = gradients(given, grad, backend=PLAIN)
        assert_same(out.detach(), want.pop("out"), f"{rows} rows")
        found = torch.autograd.grad(out, given.values(), grad)
        check_equal(dict(zip(given, found, strict=True)), want, f"{rows} rows")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


def test_compiled_beside_a_frozen_weight_and_a_stored_one():
    given, grad = some(bias=None)
    q, scale = accel.fp8_quantize(given["weight"], block=(128, 128))
    torch._dynamo.reset()
    for weight, weight_scale in ((given["weight"].detach(), None), (q, scale)):
        args = {"x": given["x"], "weight": weight, "weight_scale": weight_scale}
        call = torch.compile(lambda **kw: accel.fp8_linear(**kw, backend=PLAIN), backend="aot_eager", fullgraph=True)
        out = call(**args)
        want = gradients(args, grad, recipe=None, backend=PLAIN)
        assert_same(out.detach(), want["out"], "compiled")
        assert_same(torch.autograd.grad(out, given["x"], grad)[0], want["x"], "compiled")
    torch._dynamo.reset()


def test_flops():
    products = 2 * 37 * 140 * 300
    testing.check_flops(accel.fp8_linear, CASES[0], [PLAIN], products + 2 * 140 * 300)  # those of quantising the weight
    testing.check_flops(accel.fp8_linear, CASES[0], [PLAIN], 3 * products + 2 * 140 * 300, backward=True)


# --- where plain products are taken ---


def on_amx(monkeypatch):
    monkeypatch.setattr(size_rule, "has_amx", lambda: True)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "block", "row", "tensor"])
def test_plain_products_where_eight_bits_lose(monkeypatch, stored):
    on_amx(monkeypatch)
    eight = stored in WEIGHT_BLOCKS
    least = size_rule.PLAIN_FROM["AMX", "float8" if eight else stored]
    given, grad = some((least, 130), 140, dtype=torch.bfloat16)
    numbers = given["weight"].detach().bfloat16()
    if not eight:
        given["weight"] = given["weight"].detach().to(getattr(torch, stored)).requires_grad_()
    else:
        block = [size or None for size in WEIGHT_BLOCKS[stored]]
        q, scale = accel.fp8_quantize(given["weight"], block=block)
        q.view(torch.uint8)[3, 5] = 0x7F
        given |= {"weight": q, "weight_scale": scale}
        numbers = accel.fp8_dequantize(q, scale, dtype=torch.bfloat16)
    said = accel.explain(accel.fp8_linear, **given)
    assert "-> torch: can run this call" in said
    got = gradients(given, grad, recipe=None)
    plain = {"x": given["x"].detach(), "weight": numbers, "bias": given["bias"].detach().bfloat16()}
    plain = {n: t.requires_grad_() for n, t in plain.items()}
    out = F.linear(**plain)
    assert_same(got.pop("out"), out.detach(), "plain output")
    want = dict(zip(plain, torch.autograd.grad(out, plain.values(), grad), strict=True))
    for name, found in got.items():
        assert found.dtype == given[name].dtype
        assert_close(found, want[name].double(), "fp8", torch.bfloat16, name)


def test_what_the_rule_says(monkeypatch):
    on_amx(monkeypatch)
    given, _ = some((size_rule.PLAIN_FROM["AMX", "float32"], 130), 20, dtype=torch.bfloat16)

    def said(**change):
        lines = accel.explain(accel.fp8_linear, **{**given, **change}).splitlines()
        return next(line for line in lines if " torch: " in line)

    assert "can run" in said()
    assert "size_rule=False" in said(recipe=FP8Recipe(size_rule=False))
    assert "here are 63" in said(x=given["x"][:63])
    assert "torch.float32" in said(x=given["x"].float())
    with accel.use(deterministic=True):
        assert "determinism" in said()
    monkeypatch.setattr(size_rule, "has_amx", lambda: False)
    assert "AMX" in said()
    with pytest.raises(NotImplementedError, match=r"backend 'torch' cannot run this call: .*AMX"):
        accel.fp8_linear(**given, backend="torch")


def test_a_backend_is_there_where_quantiser_and_product_have_it():
    names = [b.name for b in fp8_linear.OP.backends]
    both = {b.name for b in fp8_quantize.OP.backends} & {b.name for b in fp8_gemm.OP.backends}
    assert set(names) - {"torch"} == both
    assert (names[0], names[-1]) == ("torch", "reference")


@pytest.mark.parametrize("scaling", ["block", "weight_only"])
def test_a_backend_refuses_as_quantiser_and_product_do(scaling):
    given, _ = some()
    args = fp8_linear.OP.prepare(**given, recipe=FP8Recipe(scaling=scaling))
    assert fp8_linear._backend(PLAIN, frozenset()).why_not(args) is None
    for op in (fp8_quantize.OP, fp8_gemm.OP):
        before = op.backends
        refusing = dataclasses.replace(op.backend(PLAIN), why_not=lambda args, name=op.name: f"{name} does not like it")
        object.__setattr__(op, "backends", (refusing,))
        assert fp8_linear._backend(PLAIN, frozenset()).why_not(args) == f"{op.name} does not like it"
        object.__setattr__(op, "backends", before)


# --- bad input ---

STORED = {"weight": zeros(5, 300).to(E4M3), "weight_scale": zeros(1, 3)}


def stored(**change):
    return {**STORED, **change}


def scales(*numbers):
    return stored(weight_scale=torch.tensor([numbers]))


@each(
    [
        Bad("integers", TypeError, r"x must be a floating.*torch\.int64", {"x": zeros(4, 300, dtype=torch.int64)}),
        Bad("eight_bits", TypeError, r"x must be float32.*float8_e4m3fn", {"x": zeros(4, 300).to(E4M3)}),
        Bad("weight", TypeError, r"weight must be a floating.*int8", {"weight": zeros(5, 300, dtype=torch.int8)}),
        Bad("depth", ValueError, r"\(4, 300\).*\(5, 301\)", {"weight": zeros(5, 301)}),
        Bad("no_axes", ValueError, r"tuple\(x\.shape\)=\(\)", {"x": zeros()}),
        Bad("bias", ValueError, r"\(N,\) = \(5,\), got \(4,\)", {"bias": zeros(4)}),
        Bad("device", ValueError, "weight is on meta but x is on cpu", {"weight": zeros(5, 300, device="meta")}),
        Bad("recipe", TypeError, r"accel\.FP8Recipe or None, got dict", {"recipe": {}}),
        Bad("scale", TypeError, r"float8 weight, and weight is torch\.float32", {"weight_scale": zeros(1, 3)}),
        Bad("no_scale", ValueError, "has no weight_scale", stored(weight_scale=None)),
        Bad("half_scale", TypeError, r"weight_scale must be float32.*float16", stored(weight_scale=zeros(1, 3).half())),
        Bad("scale_shape", ValueError, r"\(1, 3\), blocks.*\(5, 300\), got \(2, 3\)", stored(weight_scale=zeros(2, 3))),
        Bad("negative", ValueError, r"weight_scale\[0, 1\]=-2", scales(1.0, -2.0, 1.0)),
        Bad("nan", ValueError, r"weight_scale\[0, 0\]=nan", scales(float("nan"), 1.0, 1.0)),
        Bad("other_blocks", ValueError, r"scaling='row'.*\(1, 3\).*'block'", stored(recipe=FP8Recipe(scaling="row"))),
        Bad("scale_device", ValueError, "weight_scale is on meta", stored(weight_scale=zeros(1, 3, device="meta"))),
        Bad("backend", ValueError, "no backend 'mkl'", {"backend": "mkl"}),
    ]
)
def test_bad_input(bad):
    check_bad(accel.fp8_linear, {"x": zeros(4, 300), "weight": zeros(5, 300), "bias": zeros(5)}, bad)


@each(
    [
        Bad("scaling", ValueError, "block, row, tensor, weight_only, got 'rows'", {"scaling": "rows"}),
        Bad("scale_format", ValueError, "fp32, pow2, e8m0, got 'e4m3'", {"scale_format": "e4m3"}),
        Bad("save", ValueError, "fp8, input, got None", {"save": None}),
        Bad("grad_dtype", ValueError, r"float8_e4m3fn.*torch\.bfloat16", {"grad_dtype": torch.bfloat16}),
        Bad("flag", TypeError, "cache_weight must be a bool, got 1", {"cache_weight": 1}),
    ]
)
def test_bad_recipe(bad):
    check_bad(FP8Recipe, {}, bad)


def test_a_recipe_is_a_value():
    assert FP8Recipe() == FP8Recipe()
    assert hash(FP8Recipe()) == hash(FP8Recipe())
    with pytest.raises(dataclasses.FrozenInstanceError):
        FP8Recipe().scaling = "row"
