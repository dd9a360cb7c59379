"""Linear layers in eight bits by ``patch`` and ``fp8_convert``: which ones, how near, undone, trained, and refused."""

import copy

import pytest
import torch
from torch import nn

import accel

BLOCK = accel.FP8Recipe(size_rule=False)
RECIPE = {"fp8_linear": BLOCK}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 140)
        self.up = nn.Linear(140, 300)
        self.router = nn.Linear(140, 4, bias=False)
        self.down = nn.Linear(300, 140, bias=False)
        self.tied = nn.Linear(140, 16, bias=False)
        self.tied.weight = self.embedding.weight
        self.lm_head = nn.Linear(140, 7)

    def forward(self, x):
        h = self.embedding(x)
        h = h + self.down(torch.tanh(self.up(h))) * self.router(h).softmax(-1)[..., :1]
        return self.lm_head(h), self.tied(h)


X = torch.arange(24).view(2, 12) % 16


def relative(a, b):
    return float((a - b).norm() / b.norm())


def run(net, x=X):
    net.zero_grad()
    out = net(x)[0]
    out.square().mean().backward()
    return out.detach(), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def test_it_is_taken_only_when_named():
    net = Net()
    with pytest.raises(ValueError, match="nothing to replace"):
        accel.patch(net)
    report = accel.patch(net, ops="fp8_linear")
    assert [row.name for row in report.replaced] == ["up", "down"]
    assert {row.name: row.reason for row in report.skipped} == {
        "router": "it is a router, whose choices eight bits would change",
        "tied": "its weight is shared: embedding.weight, tied.weight",
        "lm_head": "it is an output layer, which stays in full precision",
    }


def test_near_the_plain_model_with_all_gradients_and_undone_to_the_bit():
    net = Net()
    out, grads = run(net)
    with accel.patch(net, recipe=RECIPE) as report:
        got, got_grads = run(net)
        assert not report.uncalled()
        assert 1e-5 < relative(got, out) < 0.05
        assert got_grads.keys() == grads.keys()
        for name, grad in grads.items():
            assert relative(got_grads[name], grad) < 0.15, name
        assert got_grads["up.weight"].dtype == torch.float32
    again, again_grads = run(net)
    assert torch.equal(again, out)
    assert all(torch.equal(again_grads[name], grad) for name, grad in grads.items())


def test_the_recipe_is_heeded():
    net = Net()
    exact = run(net)[0]
    errors = {}
    for scaling in ("block", "row", "tensor", "weight_only"):
        with accel.patch(net, recipe={"fp8_linear": accel.FP8Recipe(scaling=scaling, size_rule=False)}):
            errors[scaling] = relative(run(net)[0], exact)
    assert len(set(errors.values())) == 4, errors
    assert errors["weight_only"] < errors["block"]


def test_a_copy_of_a_patched_model_keeps_the_recipe():
    net = Net()
    accel.patch(net, recipe={"fp8_linear": accel.FP8Recipe(scaling="weight_only", size_rule=False)})
    want = run(net)[0]
    twin = copy.deepcopy(net)
    accel.unpatch(net)
    assert torch.equal(run(twin)[0], want)


def test_compiled_checkpointed_and_under_autocast():
    net = Net()
    accel.patch(net, recipe=RECIPE)
    want = run(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    got = compiled(X)[0]
    assert relative(got.detach(), want[0]) < 1e-5
    net.zero_grad()
    out = torch.utils.checkpoint.checkpoint(lambda x: net(x)[0], X, use_reentrant=False)
    out.square().mean().backward()
    assert torch.equal(out.detach(), want[0])
    for name, grad in want[1].items():
        assert torch.equal(net.get_parameter(name).grad, grad), name
    with torch.autocast("cpu", torch.bfloat16):
        half = net(X)[0]
    assert half.dtype == torch.bfloat16
    assert relative(half.float(), want[0]) < 0.05


def test_a_weight_that_another_replacement_reads_is_left():
    torch.manual_seed(0)
    attention = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.Sequential(attention, nn.Linear(64, 64))
    report = accel.patch(model, recipe=RECIPE)
    reasons = {row.name: row.reason for row in report.skipped}
    assert reasons["0.linear1"] == "its weight is read by the fast path of TransformerEncoderLayer"
    assert [row.name for row in report.replaced if row.op == "fp8_linear"] == ["1"]


@pytest.mark.parametrize(
    ("recipe", "error", "words"),
    [
        ({"fp8_linear": "block"}, TypeError, r"FP8Recipe of fp8_linear.*'block'"),
        ({"softmax_attention": BLOCK}, TypeError, "softmax_attention=FP8Recipe"),
        ({"fp8": True}, ValueError, "no replacement uses an op 'fp8'"),
    ],
)
def test_a_recipe_of_another_kind_is_refused(recipe, error, words):
    with pytest.raises(error, match=words):
        accel.patch(Net(), recipe=recipe)


# --- fp8_convert ---


def test_half_the_bytes_and_back():
    net = Net().bfloat16()
    plain = copy.deepcopy(net)
    report = accel.fp8_convert(net)
    assert report.converted == ["up", "down"]
    assert set(report.left) == {"router", "tied", "lm_head"}
    assert report.bytes_after < 0.55 * report.bytes_before  # a bias keeps its dtype
    assert net.up.weight.dtype == torch.float8_e4m3fn
    assert relative(net(X)[0].float(), plain(X)[0].float()) < 0.05
    assert "2 linear layers converted" in str(report)
    back = accel.fp8_convert(net, "master", dtype=torch.bfloat16)
    assert back.converted == ["up", "down"]
    assert net.up.weight.dtype == torch.bfloat16
    assert relative(net.up.weight.float(), plain.up.weight.float()) < 0.03


def test_bytes_of_large_layers():
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False)).bfloat16()
    report = accel.fp8_convert(model)
    assert report.bytes_after <= 0.51 * report.bytes_before


def test_a_layer_in_two_places_stays_one():
    shared = nn.Linear(130, 130)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert accel.fp8_convert(model).converted == ["a", "b"]
    assert model["a"] is model["b"]
    assert model["a"].weight.dtype == torch.float8_e4m3fn


def test_skip_hooks_and_patched_layers():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].register_forward_hook(lambda *given: None)
    accel.patch(model[2:3], recipe=RECIPE)
    report = accel.fp8_convert(model, skip="0")
    assert report.converted == ["3"]
    assert report.left == {
        "0": "named in skip",
        "1": "it carries hooks, which would be lost",
        "2": "it is patched: call accel.unpatch first",
    }


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"storage": "int8"}, ValueError, "fp8, master, got 'int8'"),
        ({"dtype": torch.float32}, ValueError, "storage='master'"),
        ({"storage": "master", "dtype": torch.int32}, TypeError, r"torch\.int32"),
        ({"skip": nn.Linear}, ValueError, "nothing to convert in Net"),
    ],
)
def test_bad_input(given, error, words):
    with pytest.raises(error, match=words):
        accel.fp8_convert(Net(), **given)
