"""The benchmarks of the ops: their rivals compute the same, and they cost what is stated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType

import pytest
import torch
from _bench import rows_of

import accel
from accel.benchmarks import (
    _boxes,
    _choice,
    _mamba2,
    deform_attention2d,
    flash_mix,
    gau_attention,
    harness,
    linear_attention,
    linear_attention_step,
    ms_deform_attn,
    ps_roi_align,
    ps_roi_pool,
    softmax_attention,
    window_attention,
)
from accel.benchmarks.harness import Case, Cost
from accel.ops.attention.softmax_attention import OP

HALF_TOO = (torch.float32, torch.bfloat16)
pytestmark = pytest.mark.usefixtures("one_thread")


def _compute_the_same(cases: Iterable[Case], providers: Sequence[str] = ("accel", "eager")) -> None:
    for case in cases:
        for part in _choice.narrowed(case, harness.MODES, providers):
            rows = rows_of(part)
            assert {row.provider for row in rows} == set(providers)
            for row in rows:
                assert row.status == "ok", f"{row.label} {row.mode} {row.provider}: {row.reason}"


# --- softmax attention ---


def _small_cases(monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """One case of each kind, with few tokens."""
    monkeypatch.setattr(softmax_attention, "LENGTHS", [5, 1, 11, 8])
    small = {"kv_heads": 2, "tokens": 40, "heads": 4, "size": 8}
    yield from softmax_attention._table_cases("cpu", torch.float32, harness.MODES, 24)
    for shape in (softmax_attention.PLAIN[0], softmax_attention.PLAIN[3]):
        changed = dataclasses.replace(shape, **small)
        yield softmax_attention._plain_case(changed, "cpu", torch.float32, harness.MODES)
    for rules in ({"window": (6, 0)}, {"pattern": accel.BlockCausal(8)}):
        masked = softmax_attention.Shape("mask", "small", 40, heads=2, kv_heads=2, size=8, rules=rules)
        yield softmax_attention._mask_case(masked, "cpu", torch.float32, harness.MODES)
    yield softmax_attention._packed_case("cpu", torch.float32, harness.MODES)


def test_the_rivals_of_softmax_attention_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for case in _small_cases(monkeypatch):
        for row in rows_of(case):
            assert row.status == "ok", f"{row.label} {row.mode} {row.provider}: {row.reason}"
            seen.add(row.provider)
            if row.provider.startswith("accel"):
                assert row.backend in ("cpu", "reference")
    assert seen == {"accel", "sdpa", "sdpa without bias", "accel without mask"}


def test_an_index_in_any_order_has_no_rule() -> None:
    index = softmax_attention._arbitrary(24, "cpu")
    assert torch.equal(index.sort(0)[0][:, 0], softmax_attention._toeplitz(24, "cpu")[:, 0])
    args = OP.prepare(*[torch.zeros(1, 1, 24, 8)] * 3, bias_table=torch.zeros(47, 1), bias_index=index)
    assert args.line is None


def test_the_share_of_live_tiles() -> None:
    window = softmax_attention.Shape("mask", "window", 256, rules={"window": (63, 0)})
    assert softmax_attention.live_tiles(window) == (4 + 3) / 16
    assert softmax_attention.live_tiles(dataclasses.replace(window, rules={"window": (0, 0)})) == 4 / 16
    blocks = dataclasses.replace(window, rules={"pattern": accel.BlockCausal(128)})
    assert softmax_attention.live_tiles(blocks) == (4 * 2 + 4 * 2 - 4) / 16
    for shape in softmax_attention.MASKS:
        seen = softmax_attention.ours(shape.rules, "reference")
        ones = torch.eye(shape.tokens)[None, None]
        small = torch.zeros(1, 1, shape.tokens, 8)
        assert int((seen(small, small, ones) > 0).sum()) == round(shape.live * shape.tokens**2)


def test_the_padded_batch_does_the_stated_work() -> None:
    lengths = softmax_attention.drawn_lengths()
    assert lengths == softmax_attention.LENGTHS
    assert (len(lengths), min(lengths) >= 32, max(lengths) <= 512) == (16, True, True)
    assert pytest.approx(16 * max(lengths) ** 2 / sum(n**2 for n in lengths)) == softmax_attention.SAVED


# --- window attention ---

SMALL = (
    window_attention.Shape("small", 2, (14, 21), 24, 3, (7, 7), (3, 3)),
    window_attention.Shape("small", 2, (14, 14), 24, 3, (7, 7), (0, 0)),
    window_attention.Shape("covered", 1, (7, 14), 24, 3, (7, 7), (3, 3)),
    window_attention.Shape("padded", 1, (9, 16), 24, 3, (7, 7), (3, 3)),
    window_attention.Shape("cosine", 1, (8, 8), 24, 3, (4, 4), (2, 2), cosine=True),
    window_attention.Shape("video", 1, (4, 8, 8), 24, 3, (2, 4, 4), (1, 2, 2)),
)


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_the_eager_rival_is_the_reference_in_float64(shape: window_attention.Shape) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [x.double() for x in window_attention._inputs(shape, "cpu", torch.float32, False)(generator)]
    expected = window_attention.ours(shape, "reference")(*inputs)
    got = window_attention.core(shape, "cpu")(*inputs)
    if (
        shape.cosine
    ):  # F.normalize divides by max(norm, eps), the reference treats a zero vector apart: not the same bits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    else:
        assert torch.equal(got, expected)
    sdpa = window_attention.core(shape, "cpu", window_attention._attend_sdpa)(*inputs)
    torch.testing.assert_close(sdpa, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SMALL[:4], ids=str)
def test_the_block_rival_is_torchvisions_function(shape: window_attention.Shape) -> None:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    generator = torch.Generator().manual_seed(0)
    inputs = window_attention._inputs(shape, "cpu", torch.float32, True)(generator)
    x, table, w1, b1, w2, b2 = (t.double() for t in inputs)
    index = window_attention.relative_position_index(shape.window).flatten()
    bias = swin._get_relative_position_bias(table, index, list(shape.window))
    expected = swin.shifted_window_attention(
        x, w1, w2, bias, list(shape.window), shape.heads, list(shape.shift), qkv_bias=b1, proj_bias=b2
    )
    assert torch.equal(window_attention.block(shape, "cpu")(x, table, w1, b1, w2, b2), expected)
    ours = window_attention.ours_block(shape, "reference")(x, table, w1, b1, w2, b2)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_costs_are_those_of_the_memory_floor() -> None:
    shape = window_attention.Shape("stage 1", 64, (56, 56), 96, 3, (7, 7), (0, 0))
    cost = window_attention.costs(shape, 2, harness.MODES)
    tokens = 64 * 56 * 56
    assert cost["forward"] == Cost(4 * tokens * 49 * 96, 8 * tokens * 96)
    assert cost["backward"] == Cost(10 * tokens * 49 * 96, 14 * tokens * 96)


# --- deformable sampling ---


@pytest.mark.parametrize("variant", ["uniform", "local"])
def test_the_rival_of_ms_deform_attn_computes_the_same(variant: str) -> None:
    levels = ((9, 13), (5, 7), (2, 3))
    shape = ms_deform_attn.Shape("small", variant, 0, 2, 3, 8, levels)
    _compute_the_same(ms_deform_attn._case(shape, "cpu", dtype, harness.MODES) for dtype in HALF_TOO)
    inputs = [x.double() for x in ms_deform_attn._inputs(shape, "cpu", torch.float32)(torch.Generator().manual_seed(0))]
    by_queries = ms_deform_attn.reference(shape, at_once=100)(*inputs)
    assert torch.equal(by_queries, ms_deform_attn.ours(shape, "reference")(*inputs))


def test_local_locations_are_near_their_query() -> None:
    shape = next(s for s in ms_deform_attn._shapes(1) if s.variant == "local")
    _, locations, weights = ms_deform_attn._inputs(shape, "cpu", torch.float32)(torch.Generator().manual_seed(0))
    assert torch.allclose(weights.sum((3, 4)), torch.ones(()))
    assert locations.shape[1] == shape.count == 22223
    x, y = locations[0, 30 * 167 + 120, :, 0].mean((0, 1)).tolist()  # row 30, column 120 of the first level
    assert (x * 167, y * 100) == pytest.approx((120.5, 30.5), abs=2.5)


@pytest.mark.parametrize("softmax", [True, False], ids=["DCNv3", "DCNv4"])
def test_the_rival_of_deform_attention2d_computes_the_same(softmax: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deform_attention2d.Shape, "size", (5, 7))
    shape = deform_attention2d.Shape(2, softmax, batch=2)
    _compute_the_same(deform_attention2d._case(shape, "cpu", dtype, harness.MODES) for dtype in HALF_TOO)
    assert str(shape) == "B2 5×7 C128 G8 3×3"


# --- boxes ---

HEAD = _boxes.Shape("small", 2, 2, 9, 30, 31)


@pytest.mark.parametrize("module", [ps_roi_align, ps_roi_pool], ids=["ps_roi_align", "ps_roi_pool"])
def test_the_rival_of_boxes_is_the_reference_in_float64(module: ModuleType) -> None:
    sampling = (ps_roi_align.RATIO,) if module is ps_roi_align else ()
    case = _boxes._case(module.OP, module.axis, HEAD, "cpu", torch.float32, *sampling)
    (x,) = case.inputs(torch.Generator().manual_seed(0))
    boxes = _boxes.boxes(HEAD, "cpu")
    expected = module.OP.function(x.double(), boxes.double(), _boxes.BINS, _boxes.SCALE, *sampling, backend="reference")
    assert expected.abs().min(-1).values.max() > 0
    torch.testing.assert_close(case.reference(x.double()), expected, rtol=1e-12, atol=1e-12)
    _compute_the_same(_boxes._case(module.OP, module.axis, HEAD, "cpu", dtype, *sampling) for dtype in HALF_TOO)


def test_boxes_lie_in_their_images() -> None:
    for shape in _boxes.SHAPES:
        boxes = _boxes.boxes(shape, "cpu")
        assert boxes.shape == (shape.boxes, 5)
        assert boxes[:, 0].unique().tolist() == list(range(shape.batch))
        assert (boxes[:, 1:3] >= 0).all()
        assert (boxes[:, 3] < shape.width / _boxes.SCALE).all()
        assert (boxes[:, 4] < shape.height / _boxes.SCALE).all()


def test_the_cost_of_boxes_counts_pixels_with_a_weight() -> None:
    whole = torch.ones(9, _boxes.BINS, 30), torch.ones(9, _boxes.BINS)
    cost = _boxes.costs(lambda low, high, size: (torch.ones(9, 7, size), whole[1]), HEAD, "cpu", 4, ["forward"])
    assert cost == {"forward": Cost(2 * 9 * 49 * 30 * 31 * 2, (2 * 30 * 31 + 9) * 98 * 4)}


# --- linear attention ---


@pytest.mark.parametrize("shape", linear_attention.CPU, ids=lambda shape: shape.group)
def test_the_rivals_of_linear_attention_compute_the_same(shape: linear_attention.Shape) -> None:
    small = dataclasses.replace(shape, tokens=320, heads=2, size=8)
    case = linear_attention._case(small, "cpu", torch.float32, harness.MODES)
    case = dataclasses.replace(case, providers=tuple([p for p in case.providers if p.name != "compile"]))
    rows = list(rows_of(case))
    assert {row.provider for row in rows} == {p.name for p in case.providers}
    for row in rows:
        assert row.status == "ok", f"{row.label} {row.mode} {row.provider}: {row.reason}"
    inputs = [x.double() for x in case.inputs(torch.Generator().manual_seed(1))]
    decay = linear_attention.slopes(small, inputs[0])
    expected = accel.linear_attention(*inputs, log_decay=decay, **small.how(), backend="reference")
    torch.testing.assert_close(case.reference(*inputs), expected, rtol=1e-9, atol=1e-9)


def test_what_linear_attention_costs() -> None:
    found = linear_attention.costs(linear_attention.Shape("causal", "", 10, 2, 3, 4), 4, harness.MODES)
    state = 2 * 2 * 3 * 10 * 4 * 4  # one product of each token with a state, in FLOPs
    assert found["forward"] == Cost(2 * state, 4 * 2 * 3 * 10 * 4 * 4)
    assert found["backward"] == Cost(6 * state, 7 * 2 * 3 * 10 * 4 * 4)
    assert found["forward+backward"] == Cost(8 * state, 11 * 2 * 3 * 10 * 4 * 4)


@pytest.mark.parametrize("module", [linear_attention, gau_attention, flash_mix], ids=lambda module: module.NAME)
def test_goals_by_the_machine(module: ModuleType) -> None:
    found: dict[str, dict[tuple[str, str], float]] = {}
    for goal in module.GOALS:
        if goal.machine:
            assert goal.where["dtype"] == ("bf16" if goal.machine == "dots" else "fp32")
            about = goal.where["group"] + goal.where["mode"], goal.rival
            assert about not in found.setdefault(goal.machine, {}), "two goals for one figure"
            found[goal.machine][about] = goal.at_least or 0.0
    assert found["even"].keys() == found["wide"].keys() >= found["dots"].keys()
    assert all(found["wide"][about] > bound for about, bound in found["even"].items())
    rivals = {rival for _, rival in found["even"]}
    assert {"eager", "compile"} <= rivals
    assert rivals <= set(module.PROVIDERS)


def test_the_rows_of_a_token_differ_in_their_length_alone() -> None:
    shapes = [shape for shape in linear_attention.CPU if shape.growing]
    assert [shape.tokens for shape in shapes] == [4096, 16384, 65536]
    assert {dataclasses.replace(shape, variant="", tokens=0) for shape in shapes} == {
        linear_attention.Shape("a token", "", 0, growing=True)
    }
    cases = [linear_attention._case(shape, "cpu", torch.float32, ["forward"]) for shape in shapes]
    assert [case.tokens for case in cases] == [4096, 16384, 65536]


def test_the_scan_of_mamba2_is_transformers_own() -> None:
    home = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    before = home.mamba2_chunk_scan
    small = _mamba2.Shape(tokens=150, batch=2, heads=3, size=8, state=16, chunk=64)
    case = _mamba2.case("linear_attention", small, "cpu", ["forward", "forward+backward"])
    _compute_the_same([case], ("accel", "transformers"))
    assert home.mamba2_chunk_scan is before
    inputs = [x.double() for x in case.inputs(torch.Generator().manual_seed(1))]
    x, dt, a, b, c = inputs
    state, rows = torch.zeros(2, 3, 8, 16).double(), []
    for t in range(150):  # the recurrence itself
        step = dt[:, t, :, None, None]
        state = torch.exp(step * a[:, None, None]) * state + step * x[:, t, :, :, None] * b[:, t, :, None]
        rows.append((state * c[:, t, :, None]).sum(-1))
    torch.testing.assert_close(case.reference(*inputs), torch.stack(rows, 1), rtol=1e-10, atol=1e-10)


def test_a_scan_that_goes_to_transformers_is_no_row_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    small = _mamba2.Shape(tokens=20, heads=2, size=8, state=16, chunk=16)
    case = _mamba2.case("linear_attention", small, "cpu", ["forward"])
    growing = dataclasses.replace(case, inputs=lambda generator: _grown(case.inputs(generator)))
    ours = next(row for row in rows_of(growing) if row.provider == "accel")
    assert (ours.status, "left the call to transformers" in ours.reason) == ("FAIL", True)


def _grown(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    x, dt, a, b, c = inputs
    return x, dt, -a, b, c  # states that grow, which the op does not allow


def test_what_the_scan_costs() -> None:
    found = _mamba2.costs(_mamba2.Shape(tokens=10, batch=2, heads=3, size=4, state=5), ["forward", "forward+backward"])
    forward, given, out = 4 * 20 * 3 * 4 * 5, 20 * (3 * 4 + 3 + 2 * 5) * 4, 20 * 3 * 4 * 4
    assert found["forward"] == Cost(forward, given + out)
    assert found["forward+backward"] == Cost(4 * forward, 3 * given + 2 * out)


# --- gated attention ---


@pytest.mark.parametrize("dtype", HALF_TOO)
@pytest.mark.parametrize("causal", [True, False])
def test_the_rivals_of_gated_attention_compute_the_same(causal: bool, dtype: torch.dtype) -> None:
    shape = gau_attention.Shape(300, causal, 2, 16, 24)
    case = gau_attention._case(shape, "cpu", dtype, harness.MODES)
    _compute_the_same([case], ("accel", "strips", "eager"))
    inputs = [x.double() for x in case.inputs(torch.Generator().manual_seed(1))]
    expected = accel.gau_attention(*inputs, causal=causal, backend="reference")
    torch.testing.assert_close(case.reference(*inputs), expected, rtol=1e-10, atol=1e-10)


def test_what_gated_attention_costs() -> None:
    shape = gau_attention.Shape(10, True, 2, 3, 4)
    found, pairs = gau_attention.costs(shape, 4, harness.MODES), 2 * 10 * 10 // 2
    given, out = 2 * 10 * (2 * 3 + 2 * 4) * 4, 2 * 10 * 4 * 4
    assert found["forward"] == Cost(2 * pairs * (3 + 4), given + out)
    assert found["backward"] == Cost(2 * pairs * (3 * 3 + 2 * 4), 2 * given + out)
    assert found["forward+backward"] == Cost(2 * pairs * (4 * 3 + 3 * 4), 3 * given + 2 * out)
    whole = gau_attention.costs(dataclasses.replace(shape, causal=False), 4, ["forward"])
    assert whole["forward"].flops == 2 * found["forward"].flops


def test_gated_attention_has_the_rows_that_people_have() -> None:
    assert [(str(shape), shape.group) for shape in gau_attention.CPU] == [
        ("B1 T2048 s128 E1024", "causal 2048"),
        ("B1 T2048 s128 E1024", "full 2048"),
        ("B1 T4096 s128 E1024", "causal 4096"),
        ("B8 T17 s128 E512", "RTMPose 17"),
    ]


# --- FLASH's chunks ---


@pytest.mark.parametrize("dtype", HALF_TOO)
@pytest.mark.parametrize("causal", [True, False])
def test_the_rival_of_flash_mix_computes_the_same(causal: bool, dtype: torch.dtype) -> None:
    shape = flash_mix.Shape("small", causal, 150, 2, 16, 24, 32)  # the last chunk is not whole
    case = flash_mix._case(shape, "cpu", dtype, harness.MODES)
    _compute_the_same([case])
    inputs = [x.double() for x in case.inputs(torch.Generator().manual_seed(1))]
    within, across = ([*inputs] for _ in range(2))
    within[2], across[0] = torch.zeros_like(within[2]), torch.zeros_like(across[0])
    parts = [case.reference(*given).abs().mean() for given in (within, across)]
    assert 0.2 < parts[0] / parts[1] < 5, "one part is too small to be judged"


@pytest.mark.parametrize("causal", [True, False])
def test_the_rival_of_flash_mix_is_the_middle_of_flash_pytorch(causal: bool) -> None:
    flash = pytest.importorskip("flash_pytorch").FLASH
    layer = flash(dim=12, group_size=8, query_key_dim=6, expansion_factor=2.0, causal=causal).double()
    found: list[torch.Tensor] = []
    layer.to_out.register_forward_pre_hook(lambda module, given: found.append(given[0]))
    torch.nn.init.normal_(layer.qk_offset_scale.gamma)
    torch.nn.init.zeros_(layer.rel_pos_bias.relative_attention_bias.weight)
    x = torch.randn(2, 21, 12, generator=torch.Generator().manual_seed(0)).double()
    layer(x)
    hidden = layer.norm(x)
    v, gate = layer.to_hidden(hidden).chunk(2, -1)
    quad_q, lin_q, quad_k, lin_k = layer.qk_offset_scale(layer.to_qk(hidden))
    shape = flash_mix.Shape("small", causal, 21, 2, 6, 24, 8)
    got = flash_mix.eager(shape)(quad_q, quad_k, lin_q, lin_k, v, gate)
    torch.testing.assert_close(got, found[0], rtol=1e-10, atol=1e-12)


def test_what_flash_mix_costs() -> None:
    found = flash_mix.costs(flash_mix.Shape("", False, 16, 2, 3, 5, 8), 4, harness.MODES)
    narrow, wide, state = 2 * 32 * 8 * 3, 2 * 32 * 8 * 5, 2 * 32 * 3 * 5
    given, out = 32 * (4 * 3 + 2 * 5) * 4, 32 * 5 * 4
    assert found["forward"] == Cost(narrow + wide + 2 * state, given + out)
    assert found["backward"] == Cost(3 * narrow + 2 * wide + 4 * state, 2 * given + out)
    assert found["forward+backward"] == Cost(4 * narrow + 3 * wide + 6 * state, 3 * given + 2 * out)


def test_the_rival_of_a_token_computes_the_same() -> None:
    case = linear_attention_step._case(linear_attention_step.Shape(2, 3, 8, None), "cpu", torch.float32)
    for row in rows_of(case):
        assert row.status == "ok", f"{row.label} {row.mode} {row.provider}: {row.reason}"
    inputs = case.inputs(torch.Generator().manual_seed(1))
    before = inputs[3].clone()
    for provider in case.providers:
        provider.build()(*inputs)
        torch.testing.assert_close(inputs[3], before, rtol=1e-6, atol=1e-6)  # so that every call computes the same


def test_what_a_token_costs() -> None:
    shape = linear_attention_step.Shape(2, 3, 8, None)
    assert shape.cost(4) == Cost(2 * 2 * 6 * 64, 2 * 6 * 64 * 4 + 4 * 6 * 8 * 4)
