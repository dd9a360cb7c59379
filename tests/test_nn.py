"""The drop-in modules against torchvision's: one seed gives one model, states load both ways, outputs agree."""

import copy

import pytest
import torch

pytest.importorskip("torchvision")

from torchvision.models import swin_transformer as tv
from torchvision.models.video import swin_transformer as tv3d

import accel
from accel.testing import assert_close

PAIRS = {
    "v1": (accel.nn.ShiftedWindowAttention, tv.ShiftedWindowAttention),
    "v2": (accel.nn.ShiftedWindowAttentionV2, tv.ShiftedWindowAttentionV2),
    "3d": (accel.nn.ShiftedWindowAttention3d, tv3d.ShiftedWindowAttention3d),
}

# name of the pair, window, shift, map; the last ones are smaller than the window along one axis or all
CASES = [
    ("v1", [4, 4], [0, 0], (8, 8)),
    ("v1", [4, 3], [2, 1], (9, 11)),
    ("v1", [4, 4], [2, 2], (3, 9)),
    ("v2", [3, 4], [1, 2], (7, 9)),
    ("v2", [4, 4], [2, 2], (4, 5)),
    ("3d", [2, 3, 4], [1, 1, 2], (5, 7, 9)),
    ("3d", [4, 3, 3], [2, 1, 1], (3, 7, 5)),
    ("3d", [4, 3, 3], [2, 1, 1], (2, 2, 8)),
]


def pair(kind, window, shift, dim=8, heads=2, dtype=torch.float64, **options):
    """Our module and torchvision's with the same random parameters."""
    ours, theirs = (cls(dim, window, shift, heads, **options).to(dtype) for cls in PAIRS[kind])
    torch.manual_seed(1)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def run(module, x, weight):
    x = x.clone().requires_grad_()
    out = module(x)
    (out * weight).sum().backward()
    return out, {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def inputs(size, dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shape = (2, *size, dim)
    return (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "window", "shift", "size"), CASES)
def test_equals_torchvision(kind, window, shift, size, bias):
    ours, theirs = pair(kind, window, shift, qkv_bias=bias, proj_bias=bias)
    x, weight = inputs(size)
    (out, grads), (expected, expected_grads) = run(ours, x, weight), run(theirs, x, weight)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    assert list(grads) == list(expected_grads)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", PAIRS)
def test_fp32_within_the_tolerance_table(kind):
    window, shift, size = ([2, 3, 4], [1, 1, 2], (5, 7, 9)) if kind == "3d" else ([4, 4], [2, 2], (9, 11))
    ours, theirs = pair(kind, window, shift, dtype=torch.float32)
    x, weight = inputs(size, dtype=torch.float32)
    out, grads = run(ours, x, weight)
    expected, expected_grads = run(theirs.double(), x.double(), weight.double())
    assert_close(out, expected, "softmax", torch.float32, "output")
    assert_close(grads["x"], expected_grads["x"], "softmax_grad", torch.float32, "gradient")


@pytest.mark.parametrize("kind", PAIRS)
def test_one_seed_gives_the_same_state(kind):
    window = [2, 3, 4] if kind == "3d" else [3, 4]
    states = []
    for cls in PAIRS[kind]:
        torch.manual_seed(5)
        states.append(cls(8, window, [1] * len(window), 2).state_dict())
    ours, theirs = states
    assert list(ours) == list(theirs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("kind", PAIRS)
def test_state_dict_loads_both_ways(kind):
    axes = 3 if kind == "3d" else 2
    ours, theirs = pair(kind, [2, 3, 4][-axes:], [1] * axes)
    fresh = copy.deepcopy(theirs)
    for parameter in fresh.parameters():
        torch.nn.init.zeros_(parameter)
    fresh.load_state_dict(ours.state_dict())
    x, _ = inputs((5, 7, 9)[-axes:])
    torch.testing.assert_close(fresh(x), ours(x), rtol=1e-11, atol=1e-11)


def test_takes_the_place_of_the_attention_layer_in_torchvisions_block():
    block = tv.SwinTransformerBlock(8, 2, [4, 4], [2, 2], attn_layer=accel.nn.ShiftedWindowAttention).double().eval()
    original = tv.SwinTransformerBlock(8, 2, [4, 4], [2, 2]).double().eval()
    original.load_state_dict(block.state_dict())
    x, _ = inputs((9, 6))
    torch.testing.assert_close(block(x), original(x), rtol=1e-11, atol=1e-11)


def test_dropout_follows_training():
    ours, _ = pair("v1", [4, 4], [2, 2], attention_dropout=0.5, dropout=0.5)
    x, _ = inputs((9, 6))
    torch.manual_seed(0)
    first, second = ours(x), ours(x)
    assert not torch.equal(first, second)
    assert 0.3 < float((first == 0).double().mean()) < 0.7  # what the output dropout took
    ours.eval()
    assert torch.equal(ours(x), ours(x))


def test_dropped_attention_weights_average_to_the_undropped_output():
    ours, theirs = pair("v1", [4, 4], [2, 2], attention_dropout=0.3)
    x, _ = inputs((4, 9))
    torch.manual_seed(0)
    with torch.no_grad():
        mean = torch.stack([ours(x) for _ in range(200)]).mean(0)
        expected = theirs.eval()(x)
    assert float((mean - expected).abs().mean() / expected.abs().mean()) < 0.1


def test_bad_arguments_name_their_values():
    with pytest.raises(ValueError, match=r"2 integers.*\[4, 4, 4\]"):
        accel.nn.ShiftedWindowAttention(8, [4, 4, 4], [0, 0, 0], 2)
    with pytest.raises(ValueError, match="num_heads=3"):
        accel.nn.ShiftedWindowAttentionV2(8, [4, 4], [0, 0], 3)
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 8\)"):
        accel.nn.ShiftedWindowAttention3d(8, [2, 2, 2], [0, 0, 0], 2)(torch.zeros(2, 4, 4, 8))


def test_a_window_of_one_is_finite():
    module = accel.nn.ShiftedWindowAttentionV2(8, [1, 1], [0, 0], 2)
    assert torch.isfinite(module(torch.randn(1, 3, 2, 8))).all()


@pytest.mark.parametrize("kind", PAIRS)
def test_compiles_in_one_graph(kind):
    size = (3, 7, 5) if kind == "3d" else (9, 6)
    window, shift = ([4, 3, 3], [2, 1, 1]) if kind == "3d" else ([4, 4], [2, 2])
    ours, _ = pair(kind, window, shift)
    x, weight = inputs(size)
    expected, expected_grads = run(ours, x, weight)
    ours.zero_grad()
    out, grads = run(torch.compile(ours, fullgraph=True, backend="aot_eager"), x, weight)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grads["x"], expected_grads["x"], rtol=1e-10, atol=1e-10)
