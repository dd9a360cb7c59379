"""accel.nn.FP8Linear: nn.Linear's interface, both storages, checkpoints, and quantised weights that are kept."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import accel
from accel import FP8Recipe
from accel.nn import FP8Linear, fp8_cache
from accel.testing import assert_same

E4M3 = torch.float8_e4m3fn
SCALINGS = ("block", "row", "tensor", "weight_only")


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(K=300, N=140, bias=True, dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Linear(K, N, bias, dtype=dtype)


def bits(t):
    return t.view(torch.uint8) if t.dtype == E4M3 else t


def check_tensors(got, want):
    assert got.keys() == want.keys()
    for name, t in want.items():
        assert got[name].dtype == t.dtype
        assert_same(bits(got[name]), bits(t), name)


# --- in place of nn.Linear ---


def test_it_is_a_linear_layer():
    torch.manual_seed(3)
    want = nn.Linear(20, 30, False, "cpu", torch.bfloat16)
    torch.manual_seed(3)
    got = FP8Linear(20, 30, False, "cpu", torch.bfloat16)
    assert isinstance(got, nn.Linear)
    check_tensors(got.state_dict(), want.state_dict())
    assert [n for n, p in got.named_parameters() if p.requires_grad] == ["weight"]
    assert "in_features=20" in repr(got)
    assert "scaling='row'" in repr(FP8Linear(2, 2, recipe=FP8Recipe(scaling="row")))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_the_op(scaling, dtype):
    layer, x = linear(), noise(3, 7, 300, dtype=dtype)
    recipe = FP8Recipe(scaling=scaling, size_rule=False)
    for module in (FP8Linear.from_linear(layer, recipe), FP8Linear.from_linear(layer, recipe, storage="fp8")):
        want = accel.fp8_linear(x, layer.weight, layer.bias, recipe=recipe)
        assert_same(module(x), want, f"{scaling}, {module.storage}")


def test_from_linear_shares_parameters_and_to_linear_gives_them_back():
    layer = linear().eval()
    module = FP8Linear.from_linear(layer, FP8Recipe(scaling="row"))
    assert module.weight is layer.weight
    assert module.bias is layer.bias
    assert not module.training
    assert module.storage == "master"
    back = module.to_linear()
    assert type(back) is nn.Linear
    assert back.weight is layer.weight
    assert back.bias is layer.bias


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("scale_format", ["fp32", "e8m0"])
def test_eight_bits_to_a_master_and_back_are_the_same_bits(scaling, scale_format):
    recipe = FP8Recipe(scaling=scaling, scale_format=scale_format)
    stored = FP8Linear.from_linear(linear(160, 131), recipe, storage="fp8")
    assert stored.weight.dtype == E4M3
    kind = torch.float32 if scale_format == "fp32" else torch.float8_e8m0fnu
    assert stored.weight_scale_inv.dtype == stored.bfloat16().weight_scale_inv.dtype == kind
    assert not stored.weight.requires_grad
    for through in (stored.to_linear(), FP8Linear.from_linear(stored, recipe, storage="master")):
        assert through.weight.dtype == torch.float32
        assert through.weight.requires_grad
        again = FP8Linear.from_linear(through, recipe, storage="fp8")
        check_tensors(again.state_dict(), stored.state_dict())
    assert stored.to_linear(torch.bfloat16).weight.dtype == torch.bfloat16
    shared = FP8Linear.from_linear(stored, recipe, storage="fp8")
    assert shared.weight is stored.weight


def test_scales_are_kept_as_a_checkpoint_has_them():
    powers = FP8Linear.from_linear(linear(160, 131), FP8Recipe(scale_format="e8m0"), storage="fp8")
    plain = FP8Linear(160, 131, dtype=E4M3)
    plain.load_state_dict(powers.state_dict())
    check_tensors(plain.state_dict(), powers.state_dict())
    x = noise(3, 160)
    want = accel.fp8_linear(x, powers.weight, powers.bias, weight_scale=powers.weight_scale_inv)
    assert_same(plain(x), want, "scales as powers of two")


def test_a_stored_weight_gives_gradients_to_input_and_bias_alone():
    module = FP8Linear.from_linear(linear(), storage="fp8")
    x = noise(5, 300).requires_grad_()
    module(x).square().sum().backward()
    assert x.grad.any()
    assert module.bias.grad.any()
    assert module.weight.grad is None
    optimizer = torch.optim.AdamW(module.parameters())
    before = bits(module.weight).clone()
    optimizer.step()
    assert torch.equal(bits(module.weight), before)


def test_a_layer_is_made_in_eight_bits():
    module = FP8Linear(300, 140, dtype=E4M3)
    assert module.weight_scale_inv.shape == (2, 3)
    assert module(noise(2, 300)).std() > 0.1
    module.reset_parameters()
    assert module(noise(2, 300)).std() > 0.1
    meta = FP8Linear(300, 140, device="meta", dtype=E4M3)
    assert meta.weight.is_meta
    assert meta.weight_scale_inv.shape == (2, 3)
    loaded = meta.to_empty(device="cpu")
    loaded.load_state_dict(module.state_dict())
    check_tensors(loaded.state_dict(), module.state_dict())
    assert_same(loaded(noise(2, 300)), module(noise(2, 300)), "loaded")


@pytest.mark.parametrize("storage", ["master", "fp8"])
def test_copies_and_casts(storage):
    module = FP8Linear.from_linear(linear(), storage=storage)
    x = noise(4, 300)
    want = module(x)
    file = io.BytesIO()  # pickle alone takes no float8
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert_same(other(x), want, "copied")
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half.bias.dtype == torch.bfloat16
    if storage == "fp8":
        check_tensors({k: v for k, v in half.state_dict().items() if k != "bias"}, weights(module))
        assert_same(half.float().weight_scale_inv, module.weight_scale_inv, "scales")
        assert half.double().weight.dtype == E4M3
        assert half.to("meta").weight_scale_inv.is_meta
    else:
        assert half.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def weights(module):
    return {k: v for k, v in module.state_dict().items() if k != "bias"}


def test_half_the_bytes_of_bfloat16():
    module = FP8Linear.from_linear(linear(1024, 1024, bias=False), storage="fp8")
    assert sum(t.numel() * t.element_size() for t in module.state_dict().values()) <= 0.51 * 2 * 1024 * 1024


def test_compiled_and_checkpointed():
    for storage in ("master", "fp8"):
        module = FP8Linear.from_linear(linear(), FP8Recipe(cache_weight=True), storage=storage)
        x = noise(4, 300).requires_grad_()
        leaves = [x, *[p for p in module.parameters() if p.requires_grad]]

        def run(call, x=x, leaves=leaves):
            out = call(x)
            return [out.detach(), *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view_as(out))]

        want = run(module)
        torch._dynamo.reset()
        calls = [
            torch.compile(module, backend="aot_eager", fullgraph=True),
            lambda x, module=module: checkpoint(module, x, use_reentrant=False),
        ]
        for call in calls:
            for a, b in zip(run(call), want, strict=True):
                assert_same(a, b, storage)
    torch._dynamo.reset()


# --- checkpoints ---


def saved(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file)


def test_an_fp8_checkpoint_is_loaded():
    stored = nn.Sequential(FP8Linear.from_linear(linear(), storage="fp8"))
    assert list(stored.state_dict()) == ["0.weight", "0.bias", "0.weight_scale_inv"]
    checkpoint = saved(stored)
    x = noise(3, 300)
    for assign in (False, True):
        other = nn.Sequential(FP8Linear(300, 140, dtype=E4M3))
        assert other.load_state_dict(checkpoint, assign=assign) == ([], [])
        assert_same(other(x), stored(x), "loaded")
        master = nn.Sequential(FP8Linear(300, 140))
        assert master.load_state_dict(checkpoint, assign=assign) == ([], [])
        assert_same(master[0].weight, stored[0].to_linear().weight, "numbers")
        assert_same(master(x), stored(x), "a master")
    assert checkpoint.keys() == stored.state_dict().keys()


def test_scales_of_a_checkpoint_may_be_exponents():
    recipe = FP8Recipe(scale_format="e8m0")
    stored = FP8Linear.from_linear(linear(), recipe, storage="fp8")
    scale = stored.weight_scale_inv.to(torch.float8_e8m0fnu)
    for given in (scale, scale.view(torch.uint8)):
        for assign in (False, True):
            other = FP8Linear(300, 140, dtype=E4M3)
            other.load_state_dict({**stored.state_dict(), "weight_scale_inv": given}, assign=assign)
            check_tensors(other.state_dict(), stored.state_dict())


@pytest.mark.parametrize(
    ("storage", "change", "words"),
    [
        ("fp8", {"0.weight_scale_inv": None}, "0.weight is torch.float8_e4m3fn and there is no 0.weight_scale_inv"),
        ("master", {"0.weight_scale_inv": None}, "there is no 0.weight_scale_inv"),
        ("fp8", {"0.weight_scale_inv": torch.ones(3, 3)}, r"0.weight_scale_inv must be \(2, 3\).*got \(3, 3\)"),
        ("fp8", {"0.weight_scale_inv": torch.ones(140, 1)}, r"0.weight_scale_inv is \(140, 1\) and must be \(2, 3\)"),
        ("master", {"0.weight_scale_inv": torch.ones(3, 3)}, r"0.weight_scale_inv must be \(2, 3\).*got \(3, 3\)"),
        ("fp8", {"0.weight_scale_inv": torch.ones(2, 3).half()}, "0.weight_scale_inv must be float32.*float16"),
        ("fp8", {"0.weight": torch.ones(140, 300)}, "0.weight is torch.float32 and this layer stores float8"),
        ("fp8", {"0.weight": torch.ones(140, 150).byte()}, "0.weight is torch.uint8, and this layer"),
        ("master", {"0.weight": torch.ones(140, 150).byte()}, "0.weight is torch.uint8, and this layer"),
        ("fp8", {"0.activation_scale": torch.ones(())}, "0.activation_scale is a static scale"),
        ("master", {"0.input_scale": torch.ones(())}, "0.input_scale is a static scale"),
    ],
)
def test_a_checkpoint_that_does_not_fit(storage, change, words):
    checkpoint = {**nn.Sequential(FP8Linear.from_linear(linear(), storage="fp8")).state_dict(), **change}
    checkpoint = {k: v for k, v in checkpoint.items() if v is not None}
    module = nn.Sequential(FP8Linear(300, 140, dtype=E4M3 if storage == "fp8" else None))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=words):
        module.load_state_dict(checkpoint)
    check_tensors(module.state_dict(), before)


def test_bad_layers():
    with pytest.raises(TypeError, match=r"accel\.FP8Recipe or None, got str"):
        FP8Linear(2, 2, recipe="block")
    with pytest.raises(TypeError, match=r"torch\.nn\.Linear, got Conv1d"):
        FP8Linear.from_linear(nn.Conv1d(2, 2, 1))
    with pytest.raises(ValueError, match="master, fp8, got 'fp4'"):
        FP8Linear.from_linear(linear(), storage="fp4")
    eight = linear()
    eight.weight = nn.Parameter(eight.weight.detach().to(E4M3), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"Linear\.weight is torch\.float8_e4m3fn and there is no Linear\.weight_scale"
    ):
        FP8Linear.from_linear(eight)


# --- quantised weights that are kept ---


@pytest.fixture
def counted(monkeypatch):
    """How many weights were quantised so far, as a list."""
    made, remember = [], fp8_cache.remember

    def counting(weight, key, make):
        return remember(weight, key, lambda: made.append(key) or make())

    monkeypatch.setattr(fp8_cache, "remember", counting)
    return made


def cached(scaling="block"):
    return FP8Linear.from_linear(linear(), FP8Recipe(scaling=scaling, cache_weight=True))


def check_fresh(module, x):
    recipe = FP8Recipe(scaling=module.recipe.scaling)
    assert_same(module(x), accel.fp8_linear(x, module.weight, module.bias, recipe=recipe), "the weight as it is")


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_weight_is_quantised_once_between_steps(counted, scaling):
    module, x = cached(scaling), noise(4, 300).requires_grad_()
    plain = FP8Linear.from_linear(module, FP8Recipe(scaling=scaling))
    for _ in range(3):
        got = torch.autograd.grad(module(x).square().sum(), [x, module.weight])
        for a, b in zip(got, torch.autograd.grad(plain(x).square().sum(), [x, module.weight]), strict=True):
            assert_same(a, b, "gradients")
    with torch.no_grad():
        check_fresh(module, x)
    assert len(counted) == 1


OPTIMIZERS = {
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "AdamW, a loop": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_of_an_optimizer_leaves_a_weight_behind(name, counted):
    module, x = cached(), noise(4, 300)
    optimizer = OPTIMIZERS[name](module.parameters())

    def closure():
        optimizer.zero_grad()
        loss = module(x).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        before = module.weight.detach().clone()
        optimizer.step(closure)
        assert not torch.equal(module.weight, before)
        check_fresh(module, x)


CHANGES = {
    "in place": lambda m: (m.weight.data.mul_(-2.0), m.invalidate()),
    "counted": lambda m: torch.no_grad()(m.weight.mul_)(-2.0),
    "other data": lambda m: setattr(m.weight, "data", -2.0 * m.weight.data),
    "another parameter": lambda m: setattr(m, "weight", nn.Parameter(-2.0 * m.weight.detach())),
    "state_dict": lambda m: m.load_state_dict({k: -2.0 * v for k, v in m.state_dict().items()}),
    "state_dict, assigned": lambda m: m.load_state_dict({k: -2.0 * v for k, v in m.state_dict().items()}, assign=True),
    "cast": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "moved": lambda m: m._apply(lambda t: -2.0 * t),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_weight_that_changed_is_quantised_anew(name, counted):
    module, x = cached(), noise(4, 300)
    check_fresh(module, x)
    CHANGES[name](module)
    check_fresh(module, x)
    assert len(counted) == 2


def test_what_is_kept_is_forgotten_where_memory_may_be_used_again():
    module = cached()
    for change in (lambda: module.to(torch.float32), lambda: module.load_state_dict(module.state_dict())):
        module(noise(4, 300))
        assert module.weight in fp8_cache._quantized._known
        change()
        assert module.weight not in fp8_cache._quantized._known


def test_what_was_kept_for_inference_serves_training():
    module, x = cached(), noise(4, 300).requires_grad_()
    with torch.inference_mode():
        module(x)
    module(x).sum().backward()
    assert module.weight.grad.any()


def test_a_kept_weight_dies_with_its_parameter():
    module = cached()
    module(noise(4, 300))
    kept = fp8_cache._quantized._known
    before = len(kept)
    assert module.weight in kept
    del module
    assert len(kept) == before - 1


def test_sharded_weights_are_not_kept():
    module = cached()
    module.weight._fsdp_flattened = True
    with pytest.raises(NotImplementedError, match="cache_weight=True cannot be used under FSDP"):
        module(noise(4, 300))
