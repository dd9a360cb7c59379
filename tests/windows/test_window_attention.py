"""Window attention: the common checks on awkward calls, independent oracles, and bad input."""

import itertools
import math

import pytest
import torch
from _bad import Bad, check_bad, each, zeros
from _window_cases import BACKENDS, BEHAVIOUR, CASES, GRADIENTS, LN_100, available, by_name

import accel
from accel import dispatch, testing
from accel.ops.windows.window_attention import OP, relative_position_index
from accel.testing import assert_close, check_op

CHECKS = list(check_op(accel.window_attention, CASES, BEHAVIOUR, GRADIENTS, BACKENDS))


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


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


LEVELS = testing.check_levels(
    accel.window_attention,
    map(by_name, ["swin_v1", "padded", "cosine", "head_size_20", "dropout", "exact_video", "one_token"]),
)


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in LEVELS])
def test_every_instruction_set(check):
    check()


def test_compiled_by_inductor():
    tensors, kwargs = BEHAVIOUR[0].make(torch.float32, "cpu", 0)
    backend = next(n for n, r in dispatch.reasons(OP, OP.prepare(**tensors, **kwargs)).items() if r is None)
    testing.check_compile(accel.window_attention, BEHAVIOUR[0], backend, compiler="inductor")


def test_flops_are_counted_the_same_for_every_backend():
    windows, heads, tokens, dim = 2 * 4, 2, 49, 32
    expected = 4 * windows * heads * tokens * tokens * dim
    testing.check_flops(accel.window_attention, by_name("swin_v1"), BACKENDS, expected)


# --- bad input: an error that holds the numbers, before any kernel runs ---


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


@each(BAD)
def test_bad_input(bad):
    good = {"qkv": zeros(1, 4, 4, 96), "bias_table": zeros(49, 2), "num_heads": 2, "window_size": (4, 4)}
    check_bad(accel.window_attention, good, bad)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BEHAVIOUR, ids=str)
def test_the_output_may_be_changed_in_place(case, backend):
    """No backward reads it."""
    tensors, kwargs = case.make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    grads = []
    for change in (lambda out: 2 * out, lambda out: out.mul_(2)):
        given = {n: x.clone().requires_grad_() for n, x in tensors.items()}
        torch.manual_seed(0)
        out = change(accel.window_attention(**given, **kwargs, backend=backend))
        grads.append(torch.autograd.grad(out.sum(), list(given.values()), allow_unused=True))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)
