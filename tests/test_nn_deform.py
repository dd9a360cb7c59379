"""The deformable modules: torchvision's constructor and state, and mmcv's DCNv2 layer with its older names."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F

import accel
from accel.nn import DeformConv2d, ModulatedDeformConv2d
from accel.testing import assert_close

OPTIONS = [
    {},
    {"padding": 1},
    {"stride": 2, "padding": (1, 0)},
    {"stride": (2, 1), "dilation": (1, 2), "groups": 2, "bias": False},
    {"kernel_size": (2, 5), "padding": (1, 2)},
    {"kernel_size": 1},
]


def build(cls, channels=(4, 6), **options):
    torch.manual_seed(3)
    return cls(*channels, **{"kernel_size": 3, **options})


def positions(module, size, groups=1, dtype=torch.float64, seed=0):
    """An input of the given size, with random offsets and a mask that fit the module."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((2, module.in_channels, *size), generator=generator, dtype=dtype)
    shape = F.conv2d(
        x, module.weight.detach().to(dtype), None, module.stride, module.padding, module.dilation, module.groups
    ).shape
    taps = math.prod(module.kernel_size)
    offset = torch.randn((2, 2 * groups * taps, *shape[2:]), generator=generator, dtype=dtype)
    return x, offset, torch.rand((2, groups * taps, *shape[2:]), generator=generator, dtype=dtype)


# --- torchvision's module ---


def theirs():
    return pytest.importorskip("torchvision.ops").DeformConv2d


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_built_as_torchvisions(options):
    ours, other = build(DeformConv2d, **options), build(theirs(), **options)
    assert repr(ours) == repr(other)
    assert list(ours.state_dict()) == list(other.state_dict())
    for name, value in other.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(ours, name) == getattr(other, name), name
    other.load_state_dict(ours.state_dict())
    ours.load_state_dict(other.state_dict())


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_computes_the_op(options, with_mask):
    module = build(DeformConv2d, **options).double()
    x, offset, mask = positions(module, (8, 9), groups=2)
    given = (x, offset, mask) if with_mask else (x, offset)
    expected = accel.deform_conv2d(
        x, offset, module.weight, module.bias, module.stride, module.padding, module.dilation,
        mask if with_mask else None,
    )  # fmt: skip
    out = module(*given)
    assert torch.equal(out, expected)
    out.sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.count_nonzero() > 0, name
    if with_mask:
        assert torch.equal(module(x, offset, mask=mask), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_without_offsets_it_is_a_convolution(options):
    module = build(DeformConv2d, **options).double()
    x, offset, _ = positions(module, (8, 9))
    expected = F.conv2d(x, module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups)
    torch.testing.assert_close(module(x, torch.zeros_like(offset)), expected, rtol=1e-12, atol=1e-12)


# --- mmcv's layer ---


@pytest.mark.parametrize("deform_groups", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_new_layer_is_half_of_a_convolution(options, deform_groups):
    module = build(ModulatedDeformConv2d, deform_groups=deform_groups, **options).double()
    bound = 1 / math.sqrt(4 * math.prod(module.kernel_size))
    assert 0.5 * bound < module.weight.abs().max() <= bound
    assert all(p.count_nonzero() == 0 for name, p in module.named_parameters() if name != "weight")
    assert module.conv_offset.out_channels == 3 * deform_groups * math.prod(module.kernel_size)
    x, _, _ = positions(module, (8, 9))
    expected = F.conv2d(x, module.weight / 2, None, module.stride, module.padding, module.dilation, module.groups)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_a_new_layer_gives_no_gradient_to_offsets_at_the_border():
    """At exactly −1, where taps stand that reach one pixel past the map: as in mmcv, not as in torchvision."""
    module = build(ModulatedDeformConv2d, padding=1).double()
    x, offset, _ = positions(module, (4, 5))
    seen = []
    module.conv_offset.register_forward_hook(lambda module, given, out: seen.append(out) or out.retain_grad())
    module(x).square().sum().backward()
    tap = torch.arange(9)[:, None, None]
    row, column = torch.arange(4)[:, None] - 1 + tap // 3, torch.arange(5) - 1 + tap % 3
    border = (row == -1) | (column == -1)
    grad = seen[0].grad[:, :18].unflatten(1, (9, 2)).transpose(1, 2)
    assert grad[..., border].count_nonzero() == 0
    assert grad[..., ~border].count_nonzero() > 0
    offset = torch.zeros_like(offset).requires_grad_()
    accel.deform_conv2d(x, offset, module.weight, padding=1).square().sum().backward()
    assert offset.grad.unflatten(1, (9, 2)).transpose(1, 2)[..., border].count_nonzero() > 0


def trained(dtype=torch.float64, **options):
    """A layer whose every parameter is random."""
    module = build(ModulatedDeformConv2d, **options).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("deform_groups", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_offsets_and_mask_come_from_one_convolution(options, deform_groups):
    module = trained(deform_groups=deform_groups, **options)
    x, _, _ = positions(module, (8, 9))
    taps = deform_groups * math.prod(module.kernel_size)
    predicted = F.conv2d(
        x, module.conv_offset.weight, module.conv_offset.bias, module.stride, module.padding, module.dilation
    )
    assert predicted.shape[1] == 3 * taps
    expected = accel.deform_conv2d(
        x, predicted[:, : 2 * taps], module.weight, module.bias, module.stride, module.padding, module.dilation,
        torch.sigmoid(predicted[:, 2 * taps :]),
    )  # fmt: skip
    out = module(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.count_nonzero() > 0, name


def test_single_precision_is_within_the_tolerance_table():
    module = trained(torch.float32, padding=1)
    x, _, _ = positions(module, (8, 9), dtype=torch.float32)
    assert_close(module(x), copy.deepcopy(module).double()(x.double()), "deform_conv", torch.float32)


def test_it_stays_in_half_under_autocast():
    module = trained(torch.float32, padding=1)
    x, _, _ = positions(module, (8, 9), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


class Block(torch.nn.Module):
    """A layer with neighbours, as a backbone holds it: the older names stand beside it."""

    def __init__(self, **options):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(4, 4, 1)
        self.conv2 = trained(torch.float32, channels=(4, 4), padding=1, **options)

    def forward(self, x):
        return self.conv2(self.conv1(x))


def load_as_mmengine_does(module, state):
    """Every layer is shown the whole state, of which torch hands it only what begins with its name."""
    metadata = getattr(state, "_metadata", {})
    state = state.copy()

    def load(part, prefix=""):
        part._load_from_state_dict(state, prefix, metadata.get(prefix[:-1], {}), True, missing, [], errors)
        for name, child in part.named_children():
            load(child, f"{prefix}{name}.")

    missing, errors = [], []
    load(module)
    assert not missing
    assert not errors
    assert set(state) == set(module.state_dict())


RENAMED = {
    "now": "conv2.conv_offset.",
    "conv_offset_mask": "conv2.conv_offset_mask.",
    "beside": "conv2_offset.",
}


@pytest.mark.parametrize("version", [None, 1, 2])
@pytest.mark.parametrize("names", RENAMED)
@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_mmcv_load_by_every_name_they_had(names, bias, version):
    source, target = Block(bias=bias), Block(bias=bias)
    for parameter in target.parameters():
        torch.nn.init.zeros_(parameter)
    now = source.state_dict()
    mmcv = ["weight", "bias", "conv_offset.weight", "conv_offset.bias"]
    assert [n for n in now if n.startswith("conv2.")] == [f"conv2.{n}" for n in mmcv if bias or n != "bias"]
    state = type(now)((n.replace("conv2.conv_offset.", RENAMED[names]), v) for n, v in now.items())
    if version is not None:
        state._metadata = {"conv2": {"version": version}}
    before = list(state)
    load_as_mmengine_does(target, state)
    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(target(x), source(x))
    if names == "beside":
        return
    for parameter in target.parameters():
        torch.nn.init.zeros_(parameter)
    target.load_state_dict(state)
    assert list(state) == before, "the caller's state was changed"
    assert torch.equal(target(x), source(x))


def test_a_layer_alone_loads_and_saves():
    source, target = trained(padding=1), build(ModulatedDeformConv2d, padding=1).double()
    state = source.state_dict()
    target.load_state_dict({n.replace("conv_offset.", "conv_offset_mask."): v for n, v in state.items()})
    saved = io.BytesIO()
    torch.save(target.state_dict(), saved)
    saved.seek(0)
    loaded = torch.load(saved)
    assert loaded._metadata[""]["version"] == 2
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[n], state[n]) for n in state)


def test_missing_offsets_are_reported_by_their_name():
    state = {n: v for n, v in trained().state_dict().items() if not n.startswith("conv_offset")}
    with pytest.raises(RuntimeError, match=r"Missing key.*conv_offset.weight.*conv_offset.bias"):
        build(ModulatedDeformConv2d).load_state_dict(state)


# --- both ---


@pytest.mark.parametrize("cls", [DeformConv2d, ModulatedDeformConv2d])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": 3}, "in_channels=4, out_channels=6, groups=3"),
        ({"groups": 4}, "in_channels=4, out_channels=6, groups=4"),
        ({"groups": 0}, "groups=0"),
        ({"kernel_size": 0}, "kernel_size=0"),
        ({"kernel_size": (1, 2, 3)}, r"kernel_size=\(1, 2, 3\)"),
        ({"padding": -1}, "padding=-1"),
        ({"stride": 0}, "stride=0"),
        ({"dilation": (1, 0)}, r"dilation=\(1, 0\)"),
    ],
    ids=str,
)
def test_numbers_that_cannot_be(cls, options, words):
    with pytest.raises(ValueError, match=words):
        build(cls, **options)


def test_deform_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="in_channels=4, deform_groups=3"):
        build(ModulatedDeformConv2d, deform_groups=3)


def test_repr_says_what_is_not_usual():
    assert "(4, 6, kernel_size=(3, 3), stride=(1, 1))" in repr(build(DeformConv2d))
    text = repr(build(ModulatedDeformConv2d, padding=1, deform_groups=2, bias=False))
    assert "4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False, deform_groups=2" in text


@pytest.mark.parametrize("cls", [DeformConv2d, ModulatedDeformConv2d])
def test_compiles_in_one_graph(cls):
    module = build(cls, padding=1)
    x, offset, mask = positions(module, (6, 7), dtype=torch.float32)
    given = (x, offset, mask) if cls is DeformConv2d else (x,)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*given), module(*given).double(), "deform_conv", torch.float32)
    torch._dynamo.reset()
