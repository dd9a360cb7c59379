"""Every op where sizes vary: one graph serves them all, and export takes every size as dynamic, or by a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.export import Dim

import accel
from accel import dispatch


class Call(NamedTuple):
    """A call of an op. A shape names its sizes; those that are numbers follow from what is not a tensor."""

    function: Callable[..., Tensor]
    shapes: tuple[str, ...]
    sizes: dict[str, tuple[int, int, int]]
    named: str  # those that nothing has to divide


def softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    out = accel.softmax_attention(q, k, v, bias=bias, causal=True)
    assert isinstance(out, Tensor)
    return out


def windows(qkv: Tensor, table: Tensor, qkv_bias: Tensor) -> Tensor:
    return accel.window_attention(
        qkv, table, num_heads=2, window_size=(4, 3), shift_size=(2, 1), qkv_bias=qkv_bias, scale=0.25
    )


def whole_map(qkv: Tensor) -> Tensor:
    """The window is the map, as in Video Swin where the map is the smaller of the two."""
    return accel.window_attention(qkv, num_heads=2, window_size=qkv.shape[1:3])


def levels(high: Tensor, low: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """A pyramid whose levels are as large as the maps, as a detector builds it."""
    value = torch.cat([high.flatten(3), low.flatten(3)], -1).permute(0, 3, 1, 2)
    shapes = [(x.shape[3], x.shape[4]) for x in (high, low)]
    return accel.ms_deform_attn(value, shapes, None, locations, weights)


def there_and_back(x: Tensor, scores: Tensor, weights: Tensor) -> Tensor:
    """To experts that ``scores`` of 0 to 1 name, some of them of nobody, and back to the tokens."""
    rows, plan = accel.moe_permute(x, (scores * 8).long() - 1, 6, capacity=9, align=4)
    return accel.moe_unpermute(rows.square(), plan, weights)


def mixture(x: Tensor, scores: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Experts that ``scores`` of 0 to 1 name, some of them of nobody."""
    return accel.moe_experts(x, (scores * 8).long() - 1, weights, torch.cat([gate, up], 1), down)


# Sizes of the first turn all differ: a graph takes two that are equal there for one and the same.
CALLS = {
    "softmax_attention": Call(
        softmax,
        ("B H T D", "B K S D", "B K S E", "B H T S"),
        {
            "B": (3, 2, 5),
            "H": (4, 6, 10),
            "K": (2, 3, 5),
            "T": (5, 9, 3),
            "S": (7, 11, 4),
            "D": (16, 24, 8),
            "E": (24, 8, 32),
        },
        "BTS",
    ),
    "gau_attention": Call(
        lambda q, k, v, gate, bias: accel.gau_attention(q, k, v, gate, bias=bias, causal=True),
        ("B H T D", "B K S D", "B K S E", "B H T E", "B H T S"),
        {
            "B": (3, 2, 5),
            "H": (4, 6, 10),
            "K": (2, 3, 5),
            "T": (5, 9, 3),
            "S": (7, 11, 4),
            "D": (16, 24, 8),
            "E": (24, 8, 32),
        },
        "BTS",
    ),
    "flash_mix": Call(
        lambda *given: accel.flash_mix(*given, chunk_size=4, causal=True),
        ("B T D", "B T D", "B T F", "B T F", "B T E", "B T E"),
        {"B": (3, 2, 5), "T": (13, 9, 37), "D": (16, 24, 8), "F": (8, 6, 12), "E": (24, 8, 32)},
        "BT",
    ),
    "linear_attention": Call(
        lambda *given: accel.linear_attention(*given, causal=True),
        ("B H T D", "B H T D", "B H T E"),
        {"B": (2, 3, 4), "H": (3, 5, 2), "T": (60, 9, 37), "D": (16, 24, 8), "E": (24, 8, 32)},
        "BT",
    ),
    "window_attention": Call(
        windows,
        ("B Y X C", "35 2", "C"),
        {"B": (3, 2, 5), "Y": (9, 12, 14), "X": (10, 8, 13), "C": (24, 48, 72)},
        "BYX",
    ),
    "window_attention of whole maps": Call(
        whole_map, ("B Y X C",), {"B": (3, 2, 5), "Y": (4, 3, 6), "X": (5, 4, 3), "C": (24, 48, 72)}, "BYX"
    ),
    "deform_conv2d": Call(
        lambda *given: accel.deform_conv2d(*given[:-1], padding=1, mask=given[-1]),
        ("B C Y X", "B 18 Y X", "O C 3 3", "O", "B 9 Y X"),
        {"B": (2, 3, 5), "C": (4, 6, 3), "Y": (5, 9, 4), "X": (6, 5, 11), "O": (7, 4, 9)},
        "BYXO",
    ),
    "deform_attention2d": Call(
        lambda *given: accel.deform_attention2d(*given, kernel_size=3, padding=1),
        ("B Y X C", "B Y X G 9 2", "B Y X G 9"),
        {"B": (3, 2, 5), "Y": (5, 9, 4), "X": (6, 5, 11), "C": (16, 24, 10), "G": (4, 2, 5)},
        "BYX",
    ),
    "ms_deform_attn": Call(
        levels,
        ("B M D Y X", "B M D V U", "B Q M 2 P 2", "B Q M 2 P"),
        {
            "B": (3, 2, 5),
            "M": (4, 2, 3),
            "D": (8, 5, 4),
            "Q": (7, 9, 3),
            "P": (9, 4, 5),
            "Y": (6, 9, 4),
            "X": (5, 8, 7),
            "V": (10, 5, 2),
            "U": (11, 6, 3),
        },
        "BMDQPYXVU",
    ),
    "moe_route": Call(
        lambda logits, bias: accel.moe_route(
            logits, 4, score="sigmoid", bias=bias, num_groups=2, topk_groups=1, group_score="max"
        )[0],
        ("T X", "X"),
        {"T": (5, 9, 3), "X": (10, 8, 14)},
        "T",
    ),
    "moe_permute": Call(
        lambda x, scores: accel.moe_permute(x, (scores * 8).long() - 1, 6, align=4)[0],
        ("T C", "T K"),
        {"T": (5, 9, 3), "C": (7, 4, 12), "K": (2, 3, 5)},
        "TCK",
    ),
    "moe_unpermute": Call(
        there_and_back,
        ("T C", "T K", "T K"),
        {"T": (5, 9, 3), "C": (7, 4, 12), "K": (2, 3, 6)},
        "TCK",
    ),
    "grouped_linear": Call(
        lambda x, weight, bias: accel.grouped_linear(x, weight, torch.arange(weight.shape[0] + 1), bias),
        ("N C", "X O C", "X O"),
        {"N": (7, 9, 11), "C": (5, 4, 12), "X": (3, 6, 2), "O": (8, 10, 7)},
        "NCXO",
    ),
    "moe_experts": Call(
        mixture,
        ("T C", "T K", "T K", "X I C", "X I C", "X C I"),
        {"T": (5, 9, 3), "C": (7, 4, 12), "K": (2, 3, 5), "X": (4, 6, 3), "I": (6, 5, 8)},
        "TCKXI",
    ),
    "fp8_linear": Call(
        accel.fp8_linear,
        ("B T K", "N K", "N"),
        {"B": (3, 2, 5), "T": (7, 9, 4), "K": (150, 200, 260), "N": (140, 190, 300)},  # several blocks: one is its own
        "BT",
    ),
    "ps_roi_align": Call(
        lambda input, boxes: accel.ps_roi_align(input, boxes, (2, 3), 6.0),
        ("B C Y X", "K 5"),
        {"B": (2, 3, 5), "C": (12, 18, 24), "Y": (7, 9, 4), "X": (8, 5, 11), "K": (4, 7, 3)},
        "BYXK",
    ),
    "ps_roi_pool": Call(
        lambda input, boxes: accel.ps_roi_pool(input, boxes, (2, 3), 6.0),
        ("B C Y X", "K 5"),
        {"B": (2, 3, 5), "C": (12, 18, 24), "Y": (7, 9, 4), "X": (8, 5, 11), "K": (4, 7, 3)},
        "BYXK",
    ),
}


def test_every_op_is_here() -> None:
    assert {name.split(" ")[0] for name in CALLS} == {n for n, op in dispatch.OPS.items() if op.differentiable}


def given(call: Call, turn: int, train: bool = False) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(turn)
    shapes = [[int(n) if n.isdigit() else call.sizes[n][turn] for n in shape.split()] for shape in call.shapes]
    return tuple(torch.rand(shape, generator=generator).requires_grad_(train) for shape in shapes)


def results(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and the gradients where they are wanted."""
    out = function(*tensors)
    if not tensors[0].requires_grad:
        return [out]
    grads = torch.autograd.grad(out.square().sum(), tensors, allow_unused=True)
    return [out.detach(), *[grad for grad in grads if grad is not None]]


def check_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest) -> Call:
    op = dispatch.OPS[request.param.split(" ")[0]]
    if not any("cpu" in b.devices and not b.extra for b in op.backends):
        pytest.skip(f"{op.name} has no kernel for the CPU, and of plain torch no graph serves every size")
    found: Call = CALLS[request.param]
    return found


def test_one_graph_serves_every_size(call: Call) -> None:
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    compiled = torch.compile(call.function, backend="aot_eager", fullgraph=True, dynamic=True)
    for turn in range(3):
        tensors = given(call, turn, train=True)
        check_same(results(compiled, tensors), results(call.function, tensors))
    torch._dynamo.reset()
    assert counters["stats"]["unique_graphs"] - before == 1


class Alone(nn.Module):
    """A function as the module that export takes."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


def exported(call: Call, dims: dict[str, Any]) -> Any:
    """The call exported at its first sizes, those in ``dims`` left open."""
    spec = tuple(
        {i: dims[n] for i, n in enumerate(shape.split()) if n in dims and not n.isdigit()} for shape in call.shapes
    )
    return torch.export.export(Alone(call.function), given(call, 0), dynamic_shapes={"tensors": spec}).module()


def test_export_takes_every_size_as_dynamic(call: Call) -> None:
    program = exported(call, dict.fromkeys(call.sizes, Dim.DYNAMIC))
    for turn in range(3):
        check_same([program(*given(call, turn))], [call.function(*given(call, turn))])


def test_export_takes_sizes_by_name(call: Call) -> None:
    fixed = {n: (sizes[0],) * 3 for n, sizes in call.sizes.items() if n not in call.named}
    call = call._replace(sizes={**call.sizes, **fixed})
    program = exported(call, {n: Dim(n, min=min(call.sizes[n]), max=64) for n in call.named})
    for turn in range(3):
        check_same([program(*given(call, turn))], [call.function(*given(call, turn))])
