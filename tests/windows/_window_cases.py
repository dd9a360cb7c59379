"""Awkward calls of window attention as data, for the checks of every backend."""

import math

import torch

import accel
from accel import testing
from accel.testing import Case

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


def by_name(name):
    return next(c for c in CASES if c.name == name)


def available(backend, tensors, kwargs):
    testing.require(accel.window_attention, backend, tensors, kwargs)
