"""Window attention: awkward calls as data for the common checks, independent oracles, and bad input."""

import dataclasses
import itertools
import math

import pytest
import torch

import accel
from accel import dispatch, testing
from accel.ops.windows.window_attention import OP, relative_position_index
from accel.testing import Case, assert_close, check_op

BACKENDS = ("cpu", "reference")
LN_100 = math.log(100.0)


def split_heads(x, name, kwargs):
    """q, k and v differ in size by orders, and so do their gradients: each is compared apart, head by head."""
    heads = kwargs["num_heads"]
    if name == "out":
        return {"out": x.unflatten(-1, (heads, -1))}
    if name in ("qkv", "qkv_bias"):
        parts = x.unflatten(-1, (3, heads, -1))
        return {f"{letter} of {name}": parts.select(-3, i) for i, letter in enumerate("qkv")}
    return {name: x}


def case(
    name,
    size,
    window,
    shift=None,
    *,
    heads=2,
    head_dim=8,
    batch=2,
    table=True,
    bias=False,
    cosine=False,
    qkv_bias=False,
    small=torch.float32,
    change=None,
    family="softmax",
    **kwargs,
):
    """A case with random tensors; ``small`` is the dtype of the small ones (None: that of qkv), and
    ``change(tensors)`` edits the values in place."""

    def make(dtype, device, seed):
        generator = torch.Generator().manual_seed(seed)
        inner = torch.float64 if dtype == torch.float64 else small or dtype
        channels, tokens = heads * head_dim, math.prod(window)

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        tensors = {"qkv": normal(batch, *size, 3 * channels).to(device, dtype)}
        if table:
            tensors["bias_table"] = normal(math.prod(2 * w - 1 for w in window), heads).to(device, inner)
        if bias:
            tensors["bias"] = normal(heads, tokens, tokens).to(device, inner)
        if cosine:
            tensors["logit_scale"] = (1.5 + normal(heads, 1, 1)).to(device, inner)
        if qkv_bias:
            tensors["qkv_bias"] = normal(3 * channels).to(device, inner)
        if change is not None:
            change(tensors)
        return tensors, {"num_heads": heads, "window_size": window, "shift_size": shift, **kwargs}

    return Case(name, make, family=family, split=split_heads, sums=("logit_scale",), batched=("qkv",))


def zero_vectors(tensors):
    tensors["qkv"][:, 1, :, :] = 0.0


def above_ln_100(tensors):
    tensors["logit_scale"][0] = 5.0


def large_logits(tensors):
    """Logits of up to about 1e4, exact in fp32: what remains is the softmax itself."""
    qkv = tensors["qkv"]
    third = qkv.shape[-1] // 3
    qkv[..., : 2 * third] = (qkv[..., : 2 * third] * 16).round().clamp(-60, 60)
    tensors["bias_table"].copy_(tensors["bias_table"].round() * 64)


def some_minus_inf(tensors):
    tensors["bias"][:, ::3, 1::2] = -math.inf


def one_key_each(tensors):
    """Every query attends to one key of its own, with weight 1; q and k are 0, the rest small integers: exact."""
    qkv, bias = tensors["qkv"], tensors["bias"]
    third = qkv.shape[-1] // 3
    qkv.mul_(3).round_()
    qkv[..., : 2 * third] = 0.0
    bias.fill_(-1000.0)
    tokens = bias.shape[-1]
    for h, head in enumerate(bias):
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(h))
        head[torch.arange(tokens), order] = 0.0
    if "qkv_bias" in tensors:
        tensors["qkv_bias"].mul_(3).round_()
        tensors["qkv_bias"][: 2 * third] = 0.0


def integers(tensors):
    for tensor in tensors.values():
        tensor.mul_(2).round_()


EXACT = {"table": False, "bias": True, "change": one_key_each, "family": "exact", "mask_value": -8.0}
TIMM = {"pad_order": "roll_then_pad"}

CASES = [
    case("swin_v1", (14, 14), (7, 7), (3, 3), head_dim=32),
    case("swin_v1_same_dtype", (14, 14), (7, 7), (3, 3), head_dim=32, small=None),
    case("swin_v2", (16, 16), (8, 8), (4, 4), head_dim=32, cosine=True, batch=1),
    case("no_shift", (6, 9), (3, 3)),
    case("padded", (9, 11), (4, 5), (2, 1), qkv_bias=True),
    case("padded_timm", (9, 11), (4, 5), (2, 1), qkv_bias=True, **TIMM),
    case("padded_with_zeros", (9, 11), (4, 5), (2, 1)),
    case("padded_with_zeros_timm", (9, 11), (4, 5), (2, 1), **TIMM),
    case("padded_unshifted", (5, 7), (4, 3), (0, 0), qkv_bias=True, small=None),
    case("prime_map", (13, 17), (5, 3), (4, 2), heads=1, batch=1, qkv_bias=True),
    case("window_covers_map", (5, 6), (8, 8), (4, 4), qkv_bias=True),
    case("window_covers_one_axis", (5, 16), (8, 8), (4, 4), qkv_bias=True),
    case("window_is_map", (6, 6), (6, 6), (3, 3)),
    case("window_is_map_shift_kept", (6, 6), (6, 6), (3, 2), clamp_shift=False),
    case("window_covers_map_shift_kept", (5, 4), (6, 6), (3, 1), clamp_shift=False, qkv_bias=True),
    case("window_covers_map_shift_kept_timm", (5, 4), (6, 6), (3, 1), clamp_shift=False, qkv_bias=True, **TIMM),
    case("not_square", (8, 12), (2, 6), (1, 3)),
    case("shift_on_x", (8, 8), (4, 4), (0, 1)),
    case("shift_on_y", (8, 8), (4, 4), (3, 0)),
    case("row_windows", (3, 10), (1, 5), (0, 2)),
    case("one_pixel_map", (1, 1), (3, 3), (1, 1), qkv_bias=True),
    case("144_tokens", (12, 24), (12, 12), (0, 6), heads=1, head_dim=16, batch=1),
    case("256_tokens", (16, 16), (16, 16), heads=1, head_dim=32, batch=1),
    case("head_size_4", (6, 6), (3, 3), (1, 1), head_dim=4, heads=3),
    case("head_size_20", (6, 6), (3, 3), (1, 1), head_dim=20),
    case("head_size_36", (6, 6), (3, 3), (1, 1), head_dim=36),
    case("head_size_64", (8, 4), (4, 4), (1, 1), head_dim=64, heads=1),
    case("head_size_128", (8, 4), (4, 4), (1, 1), head_dim=128, heads=1),
    case("24_heads", (4, 4), (2, 2), (1, 1), head_dim=32, heads=24, batch=1),
    case("batch_1", (6, 6), (3, 3), (1, 1), batch=1),
    case("batch_3", (6, 6), (3, 3), (1, 1), batch=3),
    case("no_bias", (6, 6), (3, 3), (1, 1), table=False),
    case("own_scale", (6, 6), (3, 3), (1, 1), scale=-0.7),
    case("dense_bias", (6, 6), (3, 3), (1, 1), table=False, bias=True),
    case("dense_bias_same_dtype", (6, 6), (3, 3), (1, 1), table=False, bias=True, small=None),
    case("minus_inf_in_bias", (6, 6), (3, 3), (1, 1), table=False, bias=True, change=some_minus_inf),
    case("mask_200", (6, 6), (3, 3), (1, 1), mask_value=-200.0),
    case("mask_leaks", (6, 6), (3, 3), (1, 2), mask_value=-1.5),
    case("cosine", (6, 7), (3, 4), (1, 2), cosine=True, qkv_bias=True, heads=3),
    case("cosine_same_dtype", (6, 6), (3, 3), (1, 2), cosine=True, small=None),
    case("cosine_dense_bias", (6, 6), (3, 3), (1, 2), cosine=True, table=False, bias=True),
    case("cosine_zero_vectors", (6, 6), (3, 3), (1, 1), cosine=True, change=zero_vectors),
    case("cosine_clamped", (6, 6), (3, 3), (1, 1), cosine=True, change=above_ln_100, family="softmax_100"),
    case(
        "large_logits",
        (6, 6),
        (3, 3),
        (1, 1),
        heads=2,
        head_dim=16,
        scale=0.25,
        change=large_logits,
        family="softmax_10000",
    ),
    case("dropout", (7, 8), (3, 4), (1, 2), dropout_p=0.25),
    case("dropout_cosine", (6, 6), (3, 3), (1, 1), dropout_p=0.6, cosine=True),
    case("video", (4, 6, 9), (2, 3, 3), (1, 1, 2)),
    case("video_padded", (3, 5, 7), (2, 3, 4), (1, 2, 1), qkv_bias=True),
    case("video_padded_timm", (3, 5, 7), (2, 3, 4), (1, 2, 1), qkv_bias=True, **TIMM),
    case("video_covers_depth", (2, 6, 6), (4, 3, 3), (2, 1, 1), table=False, bias=True, qkv_bias=True),
    case("video_392_tokens", (8, 7, 7), (8, 7, 7), (4, 3, 3), heads=1, head_dim=32, batch=1),
    case("one_token", (3, 4), (1, 1), change=integers, family="exact", qkv_bias=True),
    case("exact", (8, 10), (4, 5), (2, 3), **EXACT),
    case("exact_padded", (9, 11), (4, 5), (1, 3), qkv_bias=True, **EXACT),
    case("exact_padded_timm", (9, 11), (4, 5), (1, 3), qkv_bias=True, **EXACT, **TIMM),
    case("exact_video", (3, 5, 7), (2, 3, 4), (1, 2, 1), qkv_bias=True, heads=3, **EXACT),
    case("exact_49", (9, 16), (7, 7), (3, 3), qkv_bias=True, **EXACT),
]

# Small, with a batch of two; between them every tensor that has a gradient.
BEHAVIOUR = [
    case("scaled", (3, 5), (2, 3), (1, 2), heads=2, head_dim=4, qkv_bias=True),
    case("cosine", (3, 4), (2, 2), (1, 1), heads=2, head_dim=4, table=False, bias=True, cosine=True, dropout_p=0.3),
]

GRADIENTS = [
    case("table", (3, 4), (2, 3), (1, 2), head_dim=2, batch=1, qkv_bias=True),
    case("timm_dropout", (3, 4), (2, 3), (1, 2), head_dim=2, batch=1, qkv_bias=True, dropout_p=0.3, **TIMM),
    case("cosine", (2, 3), (2, 2), (1, 1), head_dim=2, batch=1, qkv_bias=True, table=False, bias=True, cosine=True),
    case("cosine_clamped", (2, 2), (2, 2), (1, 1), head_dim=2, batch=1, cosine=True, change=above_ln_100),
    case("video", (2, 2, 3), (1, 2, 2), (0, 1, 1), head_dim=2, batch=1),
]

CHECKS = list(check_op(accel.window_attention, CASES, BEHAVIOUR, GRADIENTS, BACKENDS))


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


def by_name(name):
    return next(c for c in CASES if c.name == name)


# --- oracles ---


def naive(qkv, *, num_heads, window, shift, roll_first, mask_value, fill, bias, scale=None, head_scale=None):
    """The definition, token by token, on a float64 ``(B, Y, X, 3·C)`` map with a dense bias ``(H, N, N)``."""
    batch, *size, width = qkv.shape
    dim = width // (3 * num_heads)
    padded = [-(-n // w) * w for n, w in zip(size, window, strict=True)]
    out = torch.zeros(batch, *size, num_heads * dim, dtype=torch.float64)

    def source(at):
        """The pixel that stands at ``at`` of the rolled and padded map, or None for padding."""
        if roll_first:
            if any(a >= n for a, n in zip(at, size, strict=True)):
                return None
            return tuple((a + s) % n for a, s, n in zip(at, shift, size, strict=True))
        at = tuple((a + s) % n for a, s, n in zip(at, shift, padded, strict=True))
        return at if all(a < n for a, n in zip(at, size, strict=True)) else None

    def wrapped(at):
        return tuple(s > 0 and a >= n - s for a, s, n in zip(at, shift, padded, strict=True))

    corners = itertools.product(*(range(0, n, w) for n, w in zip(padded, window, strict=True)))
    for b, corner, h in itertools.product(range(batch), list(corners), range(num_heads)):
        slots = [
            tuple(c + o for c, o in zip(corner, offset, strict=True))
            for offset in itertools.product(*(range(w) for w in window))
        ]
        pixels = [source(slot) for slot in slots]
        q, k, v = (
            [(fill if p is None else qkv[b, p[0], p[1]])[start : start + dim] for p in pixels]
            for start in ((part * num_heads + h) * dim for part in range(3))
        )
        for i, pixel in enumerate(pixels):
            if pixel is None:
                continue
            logits = []
            for j in range(len(slots)):
                if head_scale is None:
                    logit = scale * float(q[i] @ k[j])
                else:
                    norms = max(float(q[i].norm()), 1e-12) * max(float(k[j].norm()), 1e-12)
                    logit = float(head_scale[h]) * float(q[i] @ k[j]) / norms
                logit += float(bias[h, i, j])
                if wrapped(slots[i]) != wrapped(slots[j]):
                    logit += mask_value
                logits.append(logit)
            top = max(logits)
            weights = [math.exp(x - top) for x in logits]
            total = sum(weights)
            mean = sum((w / total * x for w, x in zip(weights, v, strict=True)), torch.zeros(dim, dtype=torch.float64))
            out[(b, *pixel, slice(h * dim, (h + 1) * dim))] = mean
    return out


def naive_table_bias(table, window):
    """The dense bias by the formula of the docstring."""
    (wh, ww), heads = window, table.shape[1]
    tokens = list(itertools.product(range(wh), range(ww)))
    rows = [[(yi - yj + wh - 1) * (2 * ww - 1) + xi - xj + ww - 1 for yj, xj in tokens] for yi, xi in tokens]
    return torch.stack([torch.stack([table[row, h] for row in rows]) for h in range(heads)])


@pytest.mark.parametrize(
    "name",
    ["padded", "padded_timm", "window_is_map_shift_kept", "window_covers_map_shift_kept_timm", "not_square",
     "cosine", "cosine_zero_vectors", "mask_leaks", "window_covers_one_axis"],
)  # fmt: skip
def test_reference_is_the_definition(name):
    tensors, kwargs = by_name(name).make(torch.float64, "cpu", 1)
    args = OP.prepare(**tensors, **kwargs)
    table = tensors.get("bias_table")
    fill = tensors.get("qkv_bias", torch.zeros(tensors["qkv"].shape[-1], dtype=torch.float64))
    scale = tensors.get("logit_scale")
    expected = naive(
        tensors["qkv"],
        num_heads=kwargs["num_heads"],
        window=kwargs["window_size"],
        shift=args.shift[1:],
        roll_first=kwargs.get("pad_order") == "roll_then_pad",
        mask_value=kwargs.get("mask_value", -100.0),
        fill=fill,
        bias=naive_table_bias(table, kwargs["window_size"]),
        scale=args.scale,
        head_scale=None if scale is None else scale.flatten().clamp(max=LN_100).exp(),
    )
    got = accel.window_attention(**tensors, **kwargs, backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def projected(size, channels, heads, seed=0):
    """A map and a projection with dyadic values, so that every way of computing qkv gives the same bits."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(-8, 9, shape, generator=generator).double() / 8  # noqa: E731
    x, weight, bias = draw(2, *size, channels), draw(3 * channels, channels), draw(3 * channels)
    return x, weight, bias, torch.eye(channels, dtype=torch.float64)


@pytest.mark.parametrize("cosine", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [((14, 14), (7, 7), (3, 3)), ((9, 11), (4, 5), (2, 1)), ((5, 16), (8, 8), (4, 4)), ((6, 6), (8, 8), (4, 4))],
)
def test_reference_is_torchvision(size, window, shift, cosine):
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    heads, channels = 2, 16
    x, weight, bias, eye = projected(size, channels, heads)
    if cosine:
        bias[channels : 2 * channels] = 0.0  # torchvision clears the bias of k in v2
    table = torch.randn(math.prod(2 * w - 1 for w in window), heads, dtype=torch.float64)
    index = relative_position_index(window)
    logit_scale = torch.tensor([1.0, 6.0], dtype=torch.float64).view(heads, 1, 1) if cosine else None
    expected = swin.shifted_window_attention(
        x, weight, eye, table[index].permute(2, 0, 1)[None], list(window), heads, list(shift),
        qkv_bias=bias.clone(), proj_bias=None, logit_scale=logit_scale,
    )  # fmt: skip
    qkv = torch.nn.functional.linear(x, weight, bias)
    got = accel.window_attention(
        qkv, table, num_heads=heads, window_size=window, shift_size=shift, qkv_bias=bias, logit_scale=logit_scale,
        backend="reference",
    )  # fmt: skip
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("size", "window", "shift"), [((4, 6, 9), (2, 3, 3), (1, 1, 2)), ((3, 5, 7), (2, 3, 4), (1, 2, 1))]
)
def test_reference_is_torchvision_3d(size, window, shift):
    video = pytest.importorskip("torchvision.models.video.swin_transformer")
    heads, channels = 2, 16
    x, weight, bias, eye = projected(size, channels, heads)
    table = torch.randn(math.prod(2 * w - 1 for w in window), heads, dtype=torch.float64)
    dense = table[relative_position_index(window)].permute(2, 0, 1)
    expected = video.shifted_window_attention_3d(
        x, weight, eye, dense[None], list(window), heads, list(shift), qkv_bias=bias
    )
    qkv = torch.nn.functional.linear(x, weight, bias)
    call = {"num_heads": heads, "window_size": window, "shift_size": shift, "qkv_bias": bias, "backend": "reference"}
    assert torch.equal(accel.window_attention(qkv, table, **call), expected)
    assert torch.equal(accel.window_attention(qkv, bias=dense.contiguous(), **call), expected)


# --- what the common checks do not ask ---


def available(backend, tensors, kwargs):
    testing.require(accel.window_attention, backend, tensors, kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_window(backend, value):
    tensors, kwargs = by_name("not_square").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    clean = testing.run(accel.window_attention, tensors, kwargs, backend)
    qkv = tensors["qkv"].clone()
    qkv[0, 2, 4] = value
    got = testing.run(accel.window_attention, {**tensors, "qkv": qkv}, kwargs, backend)
    # shift (1, 3), window (2, 6): rows 1-2 and columns 3-8 of the map share the window of pixel (2, 4)
    hit = torch.zeros(2, 8, 12, dtype=torch.bool)
    hit[0, 1:3, 3:9] = True
    assert got.out[hit].isnan().any()
    testing.assert_same(got.out[~hit], clean.out[~hit], "output outside the window")
    testing.assert_same(got.grads["qkv"][~hit], clean.grads["qkv"][~hit], "gradient outside the window")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["swin_v1", "padded", "cosine", "minus_inf_in_bias", "video_padded"])
def test_log_sum_exp(backend, dtype, name):
    tensors, kwargs = by_name(name).make(dtype, "cpu", 0)
    available(backend, tensors, kwargs)
    lse = OP.backend(backend).forward(*OP.prepare(**tensors, **kwargs))[1]
    expected = OP.backend("reference").forward(*OP.prepare(**testing.double(tensors), **kwargs))[1]
    assert lse.dtype == torch.float32
    assert_close(lse, expected, "lse", torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_is_contiguous_and_fresh(backend):
    tensors, kwargs = by_name("padded_timm").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    out = accel.window_attention(**tensors, **kwargs, backend=backend)
    assert out.is_contiguous()
    assert out.shape == (2, 9, 11, 16)
    before = {n: t.clone() for n, t in tensors.items()}
    out.zero_()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), f"{name} changed with the output"


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_the_stated_share_and_the_expectation(backend):
    # q, k and the bias are 0 and v is 1: an output is the share of the N weights kept, over 1 − p
    qkv = torch.zeros(8, 16, 16, 3 * 32)
    qkv[..., 64:] = 1.0
    kwargs = {"num_heads": 8, "window_size": (4, 4), "dropout_p": 0.3}
    available(backend, {"qkv": qkv}, kwargs)
    torch.manual_seed(0)
    out = accel.window_attention(qkv, **kwargs, backend=backend).unflatten(-1, (8, 4))
    assert torch.equal(out[..., :1].expand_as(out), out), "a weight is dropped for all of its head's channels"
    kept = out[..., 0] * 0.7 * 16
    assert_close(kept, kept.round(), "softmax", torch.float32)
    draws = kept.numel() * 16
    assert abs(kept.sum().item() / draws - 0.7) < 5 * math.sqrt(0.7 * 0.3 / draws)  # five standard deviations
    again = accel.window_attention(qkv, **kwargs, backend=backend).unflatten(-1, (8, 4))
    assert not torch.equal(again, out), "two calls drew the same seed"
    torch.manual_seed(0)
    repeated = accel.window_attention(qkv, **kwargs, backend=backend).unflatten(-1, (8, 4))
    testing.assert_same(repeated, out, "the generator's seed repeats the draw")


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_orders_differ_only_where_they_must(backend):
    def both(name, **change):
        tensors, kwargs = by_name(name).make(torch.float32, "cpu", 0)
        available(backend, tensors, kwargs)
        orders = ("pad_then_roll", "roll_then_pad")
        return [
            accel.window_attention(**tensors, **{**kwargs, **change, "pad_order": o}, backend=backend) for o in orders
        ]

    assert torch.equal(*both("no_shift", shift_size=(1, 2)))
    assert torch.equal(*both("padded", shift_size=(0, 0)))
    first, second = both("padded")
    assert (first - second).abs().max() > 0.1


LEVELS = ["portable", "avx2", "avx512", "avx512_bf16"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["swin_v1", "padded", "cosine", "head_size_20", "dropout", "exact_video", "one_token"])
def test_every_instruction_set(level, name):
    tensors, kwargs = by_name(name).make(torch.float32, "cpu", 0)
    available("cpu", tensors, kwargs)
    extension = dispatch.leaf("accel._C")[0]
    info = extension.build_info()
    if level not in info["isa_built"] or LEVELS.index(level) > LEVELS.index(info["isa_highest"]):
        pytest.skip(f"built for {info['isa_built']}, and this processor has {info['isa_highest']}")
    extension.set_isa(level)
    try:
        assert extension.build_info()["isa"] == level
        for dtype in testing.KERNEL_DTYPES:
            testing.check_values(accel.window_attention, by_name(name), "cpu", dtype)
    finally:
        extension.set_isa(info["isa"])


def test_compiled_by_inductor():
    tensors, kwargs = BEHAVIOUR[0].make(torch.float32, "cpu", 0)
    backend = next(n for n, r in dispatch.reasons(OP, OP.prepare(**tensors, **kwargs)).items() if r is None)
    testing.check_compile(accel.window_attention, BEHAVIOUR[0], backend, compiler="inductor")


def test_flops_are_counted_the_same_for_every_backend():
    from torch.utils.flop_counter import FlopCounterMode

    tensors, kwargs = by_name("swin_v1").make(torch.float32, "cpu", 0)
    counts = {}
    for backend in BACKENDS:
        if OP.backend(backend).why_not(OP.prepare(**tensors, **kwargs)) is None:
            with FlopCounterMode(display=False) as counter:
                accel.window_attention(**tensors, **kwargs, backend=backend)
            counts[backend] = counter.get_total_flops()
    windows, heads, tokens, dim = 2 * 4, 2, 49, 32
    assert counts == dict.fromkeys(counts, 4 * windows * heads * tokens * tokens * dim)


# --- bad input: an error that holds the numbers, before any kernel runs ---


@dataclasses.dataclass
class Bad:
    name: str
    error: type[Exception]
    words: str  # regular expression
    change: dict


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


BAD = [
    Bad("rank_3", ValueError, r"\(4, 4, 96\)", {"qkv": zeros(4, 4, 96)}),
    Bad("rank_6", ValueError, r"\(1, 1, 1, 4, 4, 96\)", {"qkv": zeros(1, 1, 1, 4, 4, 96)}),
    Bad("not_a_tensor", TypeError, "qkv must be .* got list", {"qkv": [1.0]}),
    Bad("integer_qkv", TypeError, "qkv must be .* got torch.int64", {"qkv": zeros(1, 4, 4, 96, dtype=torch.int64)}),
    Bad("complex_qkv", TypeError, "torch.complex64", {"qkv": zeros(1, 4, 4, 96, dtype=torch.complex64)}),
    Bad("channels_not_3c", ValueError, r"num_heads=2.*\(1, 4, 4, 95\)", {"qkv": zeros(1, 4, 4, 95)}),
    Bad("no_channels", ValueError, r"\(1, 4, 4, 0\)", {"qkv": zeros(1, 4, 4, 0)}),
    Bad("heads_do_not_divide", ValueError, r"num_heads=5.*\(1, 4, 4, 96\)", {"num_heads": 5, "bias_table": None}),
    Bad("no_heads", ValueError, "num_heads=0", {"num_heads": 0}),
    Bad("negative_heads", ValueError, "num_heads=-1", {"num_heads": -1}),
    Bad("window_of_one_number", ValueError, "window_size=4", {"window_size": 4}),
    Bad("window_of_wrong_rank", ValueError, r"2 integers .* rank 4, got .*\(4, 4, 4\)", {"window_size": (4, 4, 4)}),
    Bad("window_2d_on_video", ValueError, r"3 integers .* rank 5", {"qkv": zeros(1, 4, 4, 4, 96)}),
    Bad("window_zero", ValueError, r"window_size=\(4, 0\)", {"window_size": (4, 0)}),
    Bad("shift_is_window", ValueError, r"shift_size=\(4, 0\).*window_size=\(4, 4\)", {"shift_size": (4, 0)}),
    Bad("shift_negative", ValueError, r"shift_size=\(0, -1\)", {"shift_size": (0, -1)}),
    Bad("shift_of_wrong_rank", ValueError, r"shift_size=\(1,\)", {"shift_size": (1,)}),
    Bad("table_too_long", ValueError, r"\(49, 2\) .*\(50, 2\)", {"bias_table": zeros(50, 2)}),
    Bad("table_too_short", ValueError, r"\(49, 2\) .*\(48, 2\)", {"bias_table": zeros(48, 2)}),
    Bad("table_of_other_heads", ValueError, r"\(49, 2\) .*\(49, 3\)", {"bias_table": zeros(49, 3)}),
    Bad("table_flat", ValueError, r"\(49, 2\) .*\(98,\)", {"bias_table": zeros(98)}),
    Bad("integer_table", TypeError, "bias_table .*torch.int32", {"bias_table": zeros(49, 2, dtype=torch.int32)}),
    Bad("table_elsewhere", ValueError, "bias_table is on meta .* cpu", {"bias_table": zeros(49, 2, device="meta")}),
    Bad("qkv_bias_elsewhere", ValueError, "qkv_bias is on meta .* cpu", {"qkv_bias": zeros(96, device="meta")}),
    Bad("both_biases", ValueError, r"not both.*\(49, 2\).*\(2, 16, 16\)", {"bias": zeros(2, 16, 16)}),
    Bad("bias_shape", ValueError, r"\(2, 16, 16\) .*\(2, 16, 15\)", {"bias_table": None, "bias": zeros(2, 16, 15)}),
    Bad("bias_for_one_head", ValueError, r"\(2, .*\(1, 16, 16\)", {"bias_table": None, "bias": zeros(1, 16, 16)}),
    Bad("qkv_bias_shape", ValueError, r"\(96,\), got .*\(32,\)", {"qkv_bias": zeros(32)}),
    Bad("scale_twice", ValueError, r"scale=0.5.*\(2,\)", {"scale": 0.5, "logit_scale": zeros(2)}),
    Bad("logit_scale_shape", ValueError, r"num_heads=2 .*\(3, 1, 1\)", {"logit_scale": zeros(3, 1, 1)}),
    Bad("integer_logit_scale", TypeError, "logit_scale .*int64", {"logit_scale": zeros(2, dtype=torch.int64)}),
    Bad("pad_order", ValueError, "pad_order='roll'", {"pad_order": "roll"}),
    Bad("mask_infinite", ValueError, "mask_value=-inf", {"mask_value": -math.inf}),
    Bad("mask_nan", ValueError, "mask_value=nan", {"mask_value": math.nan}),
    Bad("dropout_1", ValueError, "dropout_p=1.0", {"dropout_p": 1.0}),
    Bad("dropout_negative", ValueError, "dropout_p=-0.1", {"dropout_p": -0.1}),
    Bad("dropout_nan", ValueError, "dropout_p=nan", {"dropout_p": math.nan}),
    Bad("no_such_backend", ValueError, "no backend 'cuda9'; it has cpu", {"backend": "cuda9"}),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_input(bad):
    good = {"qkv": zeros(1, 4, 4, 96), "bias_table": zeros(49, 2), "num_heads": 2, "window_size": (4, 4)}
    accel.window_attention(**good)
    with pytest.raises(bad.error, match=bad.words):
        accel.window_attention(**{**good, **bad.change})


@pytest.mark.parametrize("size", [(0, 4), (4, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_map_without_pixels_is_empty(backend, size):
    qkv = zeros(2, *size, 96).requires_grad_()
    kwargs = {"num_heads": 2, "window_size": (4, 4), "shift_size": (2, 2), "backend": backend}
    available(backend, {"qkv": qkv}, {n: v for n, v in kwargs.items() if n != "backend"})
    out = accel.window_attention(qkv, zeros(49, 2), **kwargs)
    assert out.shape == (2, *size, 32)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape
