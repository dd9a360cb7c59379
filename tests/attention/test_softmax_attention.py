"""Softmax attention: awkward calls as data for the common checks, independent oracles, and bad input."""

import dataclasses
import functools
import gc
import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F

import accel
from accel import BlockCausal, BlockDiffusion, Grid2D, PrefixLM, T5Buckets, dispatch, testing
from accel.ops.attention.rules import grid_index
from accel.ops.attention.softmax_attention import OP
from accel.testing import Case, assert_close, check_op

BACKENDS = ("cpu", "reference")


def cumulative(lengths, dtype=torch.int32, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


# --- layouts of q, k and v ---


def heads_inside_tokens(q, k, v):
    """Views of (B, T, H, D) memory, as a projection makes them."""
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))


def one_projection(q, k, v):
    """Views of one (B, T, 3, H, D) tensor."""
    return torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4).unbind()


def keys_of_one_head(q, k, v):
    """k and v as views of one head that all heads read, stride 0."""
    return q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)


def case(
    name,
    T,
    S=None,
    *,
    B=2,
    H=2,
    Hkv=None,
    D=16,
    E=None,
    mask=None,
    bias=None,
    rows=None,
    slopes=False,
    sinks=False,
    lengths=None,
    lengths_k=None,
    cu_dtype=torch.int32,
    small=torch.float32,
    layout=None,
    change=None,
    family=None,
    dtypes=testing.KERNEL_DTYPES,
    **kwargs,
):
    """A case with random tensors.

    ``mask`` and ``bias`` are shapes, ``rows`` those of the table, ``lengths`` of packed sequences; ``small`` is the
    dtype of the small tensors (None: that of q), and ``change(tensors)`` edits the values in place.
    """
    S = T if S is None else S

    def make(dtype, device, seed):
        generator = torch.Generator().manual_seed(seed)
        inner = torch.float64 if dtype == torch.float64 else small or dtype

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        main = normal(B, H, T, D), normal(B, Hkv or H, S, D), normal(B, Hkv or H, S, E or D)
        tensors = {n: x.to(device, dtype) for n, x in zip("qkv", (layout or (lambda *x: x))(*main), strict=True)}
        if bias is not None:
            tensors["bias"] = normal(*bias).to(device, inner)
        if rows is not None:
            tensors["bias_table"] = normal(rows, H).to(device, inner)
        if slopes:
            tensors["alibi_slopes"] = (0.05 + 0.2 * torch.rand(H, generator=generator)).to(device, inner)
        if sinks:
            tensors["sinks"] = (1.0 + normal(H)).to(device, inner)
        if mask is not None:
            tensors["mask"] = (torch.rand(mask, generator=generator) < 0.7).to(device)
        if change is not None:
            change(tensors)
        given = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()}
        if lengths is not None:
            given["cu_seqlens_q"] = cumulative(lengths, cu_dtype, device)
        if lengths_k is not None:
            given["cu_seqlens_k"] = cumulative(lengths_k, cu_dtype, device)
        return tensors, given

    # whose gradient is a sum over all pairs of a head, of both signs: the fewer the heads, the more chance decides
    sums = ["alibi_slopes", "sinks"]
    sums += ["bias"] if bias is not None and math.prod(bias) <= H else []
    sums += ["bias_table"] if rows == 1 else []
    batched = ["q", "k", "v", *(n for n, shape in (("mask", mask), ("bias", bias)) if shape and shape[0] == B > 1)]
    sharp = {"causal", "window", "pattern", "scale", "dropout_p"} & kwargs.keys() or S == 1
    sharp = sharp or any(x is not None for x in (mask, bias, rows, lengths))
    family = family or ("softmax_few" if sharp else "softmax")
    return Case(name, make, family, dtypes, sums=tuple(sums), batched=tuple(batched), autocast=("q", "k", "v"))


# --- changes of values ---


def padding(*lengths, left=False):
    """Key padding, one length per batch entry."""

    def change(tensors):
        mask = tensors["mask"]
        at = torch.arange(mask.shape[-1], device=mask.device)
        at = at.flip(0) if left else at
        for entry, length in zip(mask, lengths, strict=True):
            entry[:] = at < length

    return change


def rows_without_keys(tensors):
    tensors["mask"][..., ::3, :] = False


def batch_entry_without_keys(tensors):
    tensors["mask"][1] = False


def no_keys_at_all(tensors):
    tensors["mask"].fill_(False)


def some_minus_inf(tensors):
    tensors["bias"][..., ::3] = -math.inf


def whole_rows_minus_inf(tensors):
    tensors["bias"][..., 1::4, :] = -math.inf


def some_sinks_minus_inf(tensors):
    tensors["sinks"][0] = -math.inf


def heavy_sinks(tensors):
    """Sinks that take most of the weight, so that a head's sum over all other weights' gradients is not 0."""
    tensors["sinks"].add_(3.0)


def large_logits(tensors):
    """Logits of up to about 1e4, exact in fp32: what remains is the softmax itself."""
    for name in "qk":
        tensors[name].copy_((tensors[name] * 16).round().clamp(-60, 60))
    tensors["bias_table"].copy_(tensors["bias_table"].round() * 64)


def very_negative_logits(tensors):
    """Every logit near −110, where fp32 has no exponential: a running maximum that starts at 0 leaves nothing."""
    for name in "qk":
        tensors[name].copy_(tensors[name].round())
    tensors["bias"].copy_(tensors["bias"].round() - 110)


def integers(tensors, queries_and_keys=0.0):
    """Small integers; q and k are 0, so that a logit is its bias."""
    for name in "qkv":
        tensors[name].mul_(3).round_()
    for name in "qk":
        tensors[name].mul_(queries_and_keys)


def one_key_each(tensors):
    """Every query takes one key of its own through a dense bias, with weight 1: exact."""
    integers(tensors)
    bias = tensors["bias"].fill_(-1000.0)
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(bias.shape[-1], (*bias.shape[:-1], 1), generator=generator)
    bias.scatter_(-1, chosen.to(bias.device), 0.0)


def one_row_of_the_table(row):
    """Only pairs with this row of the table have weight; the case has one such key for each query."""

    def change(tensors):
        integers(tensors)
        tensors["bias_table"].fill_(-1000.0)
        for one in [row] if isinstance(row, int) else row:
            tensors["bias_table"][one] = 0.0

    return change


def steep_slopes(tensors):
    """Only the key at distance 0 has weight."""
    integers(tensors)
    tensors["alibi_slopes"].fill_(1000.0)


def random_index(T, S, rows, dtype=torch.int64, seed=0):
    return torch.randint(rows, (T, S), generator=torch.Generator().manual_seed(seed)).to(dtype)


def toeplitz_index(T, S, rows, dtype=torch.int64):
    """A tensor that depends on i − j alone, and not one row per distance."""
    return ((torch.arange(T)[:, None] - torch.arange(S) + S - 1) // 3 % rows).to(dtype)


FP32 = (torch.float32,)
WHOLE = {"bias_index": "toeplitz"}
T5 = {"bias_index": T5Buckets(), "rows": 32, "scale": 1.0}
T5_ONE_WAY = {"bias_index": T5Buckets(bidirectional=False, max_distance=50), "rows": 20}
PACKED = {"B": 1, "lengths": (7, 0, 1, 13, 0, 29, 17)}  # 67 tokens
PACKED_CROSS = {"B": 1, "lengths": (7, 0, 1, 13, 5, 29), "lengths_k": (3, 4, 11, 0, 5, 41)}  # 55 and 64
EVEN = {"B": 1, "lengths": (6, 0, 2, 14, 22)}  # 44
EXACT = {"family": "exact"}

PLAIN = [
    case("plain", 33, D=32),
    case("plain_64", 64, D=64, B=1),
    case("plain_200", 200, D=64, B=1, H=1),
    case("plain_large", 131, 293, D=128, B=1, H=1),
    case("scale_1", 17, 23, scale=1.0),
    case("scale_negative", 17, 23, scale=-0.3),
    case("scale_0", 17, 23, scale=0.0),
    case("fewer_queries", 5, 67),
    case("more_queries", 67, 5),
    case("one_query", 1, 71),
    case("one_query_of_many_heads", 1, 139, H=8, Hkv=2, D=64),
    case("one_key", 37, 1, sinks=True),
    case("one_of_each", 1, 1, B=3, H=5, sinks=True),
    case("prime", 61, 59, H=3, D=24),
    case("tile_edges", 65, 129, B=1, D=32),
    case("before_the_edges", 63, 127, B=1, D=32),
    case("gqa", 19, 31, H=6, Hkv=2),
    case("gqa_3", 19, 31, H=6, Hkv=3, B=1, causal=True),
    case("mqa", 23, 70, H=5, Hkv=1),
    case("head_size_8", 29, 31, D=8),
    case("head_size_40", 29, 31, D=40),
    case("head_size_80", 29, 31, D=80, causal=True),
    case("head_size_96", 29, 31, D=96, H=1),
    case("head_size_256", 33, 70, D=256, B=1, H=2),
    case("value_size_128", 33, 70, D=192, E=128, B=1, causal=True),
    case("value_size_larger", 21, 34, D=8, E=72, H=4, Hkv=2),
    case("value_size_8", 21, 34, D=48, E=8),
    case("heads_inside_tokens", 37, 41, D=32, layout=heads_inside_tokens, causal=True),
    case("one_projection", 41, D=24, H=3, layout=one_projection),
    case("keys_of_one_head", 23, 31, H=4, layout=keys_of_one_head),
    case(
        "large_logits", 37, 70, rows=106, scale=0.25, change=large_logits, family="softmax_10000", dtypes=FP32, **WHOLE
    ),
    case("very_negative", 37, 70, bias=(37, 70), scale=0.25, change=very_negative_logits, family="softmax_100"),
]

MASKS = [
    case("causal", 37, causal=True),
    case("causal_150", 150, B=1, H=1, D=64, causal=True),
    case("causal_more_keys", 29, 131, B=1, causal=True),
    case("causal_more_queries", 70, 29, causal=True),
    case("causal_more_queries_150", 150, 70, B=1, H=1, causal=True, sinks=True),
    case("top_left", 37, causal="top_left"),
    case("top_left_more_keys", 29, 70, causal="top_left"),
    case("top_left_more_queries", 70, 29, causal="top_left"),
    case("causal_one_query", 1, 71, causal=True),
    case("causal_one_key", 71, 1, H=6, causal=True, sinks=True),
    case("window_5_3", 41, window=(5, 3)),
    case("window_0_0", 41, window=(0, 0), sinks=True),
    case("window_left_only", 41, 67, window=(9, -1)),
    case("window_right_only", 67, 41, window=(-1, 4)),
    case("window_0_7_more_keys", 31, 71, window=(0, 7)),
    case("window_causal", 70, window=(8, 5), causal=True, Hkv=1),
    case("window_causal_more_queries", 71, 31, window=(8, -1), causal=True),
    case("window_top_left", 41, 67, window=(3, 6), causal="top_left"),
    case("window_bare_200", 211, B=1, H=1, window=(17, 5)),
    case("window_causal_300", 300, B=1, H=1, D=64, window=(31, 0)),
    case("window_wider_than_all", 19, 31, window=(2**31, 2**40)),
    case("padding_right", 23, 70, mask=(2, 1, 1, 70), change=padding(70, 33)),
    case("padding_left", 23, 70, mask=(2, 1, 1, 70), change=padding(41, 67, left=True)),
    case("padding_left_causal", 71, mask=(2, 1, 1, 71), change=padding(30, 71, left=True), causal=True),
    case("padding_holes", 23, 70, mask=(2, 1, 1, 70)),
    case("padding_one_key", 23, 70, mask=(2, 1, 1, 70), change=padding(1, 2)),
    case("padding_200", 37, 200, B=2, H=1, mask=(2, 1, 1, 200), change=padding(130, 61), D=64),
    case("mask_full", 23, 31, mask=(2, 2, 23, 31)),
    case("mask_of_batch", 23, 31, mask=(2, 1, 23, 31)),
    case("mask_of_heads", 23, 31, mask=(1, 2, 23, 31)),
    case("mask_3d", 23, 31, mask=(2, 23, 31)),
    case("mask_2d", 37, 137, mask=(37, 137)),
    case("mask_1d", 23, 31, mask=(31,)),
    case("mask_of_queries", 23, 31, mask=(2, 1, 23, 1)),
    case("mask_of_one_head", 23, 31, H=5, mask=(5, 1, 1)),
    case("mask_gqa", 23, 31, H=4, Hkv=2, mask=(2, 4, 23, 31)),
    case("rows_without_keys", 23, 70, mask=(2, 1, 23, 70), change=rows_without_keys),
    case("rows_without_keys_causal", 70, 37, mask=(70, 37), change=rows_without_keys, causal=True),
    case("batch_entry_without_keys", 23, 31, mask=(2, 1, 1, 31), change=batch_entry_without_keys),
    case("no_keys_at_all", 23, 31, mask=(31,), change=no_keys_at_all),
    case("prefix_int", 47, pattern=PrefixLM(19)),
    case("prefix_more_keys", 37, 61, pattern=PrefixLM(40)),
    case("prefix_more_queries", 61, 37, pattern=PrefixLM(3)),
    case("prefix_list", 47, pattern=PrefixLM([0, 33])),
    case("prefix_tensor", 47, B=3, pattern=PrefixLM(torch.tensor([100, 1, 18]))),
    case("prefix_huge", 19, 31, pattern=PrefixLM(2**40)),
    case("block_causal", 47, pattern=BlockCausal(7)),
    case("block_causal_1", 47, pattern=BlockCausal(1)),
    case("block_causal_more_keys", 37, 61, pattern=BlockCausal(8)),
    case("block_causal_more_queries", 61, 37, pattern=BlockCausal(5)),
    case("block_causal_300", 300, B=1, H=1, pattern=BlockCausal(32), D=64),
    case("block_causal_huge", 19, 31, pattern=BlockCausal(2**31 + 1)),
    case("block_diffusion", 48, pattern=BlockDiffusion(8)),
    case("block_diffusion_uneven", 46, pattern=BlockDiffusion(5)),
    case("block_diffusion_1", 22, pattern=BlockDiffusion(1)),
    case("block_diffusion_wide", 22, pattern=BlockDiffusion(64)),
    case("block_diffusion_262", 262, B=1, H=1, pattern=BlockDiffusion(19), D=64),
    case("diffusion_and_window", 70, pattern=BlockDiffusion(6), window=(43, 2)),
    case("diffusion_and_padding", 46, pattern=BlockDiffusion(5), mask=(2, 1, 1, 46)),
    case("diffusion_and_causal", 46, pattern=BlockDiffusion(5), causal=True),
    case("patterns_together", 46, pattern=[PrefixLM([9, 30]), BlockDiffusion(5), BlockCausal(12)]),
    case("prefix_and_window", 47, 53, pattern=PrefixLM(19), window=(11, 20)),
    case("block_causal_and_mask", 47, pattern=BlockCausal(7), mask=(2, 2, 47, 47)),
    case("prefix_and_causal", 47, pattern=PrefixLM(19), causal=True),
]

PACKS = [
    case("packed", 67, **PACKED),
    case("packed_int64", 67, **PACKED, cu_dtype=torch.int64, H=4, Hkv=2),
    case("packed_one_sequence", 67, B=1, lengths=(67,)),
    case("packed_of_ones", 11, B=1, lengths=(1,) * 11, sinks=True),
    case("packed_300", 300, B=1, H=1, D=64, lengths=(130, 1, 0, 101, 68)),
    case("packed_heads_inside_tokens", 67, **PACKED, layout=heads_inside_tokens, H=3, causal=True),
    case("packed_causal", 67, **PACKED, causal=True),
    case("packed_window", 67, **PACKED, window=(3, 2)),
    case("packed_window_causal", 67, **PACKED, window=(6, 0), causal=True, sinks=True),
    case("packed_sinks_softcap", 67, **PACKED, H=6, sinks=True, softcap=2.0),
    case("packed_prefix_int", 67, **PACKED, pattern=PrefixLM(5)),
    case("packed_prefix_list", 67, **PACKED, pattern=PrefixLM([1, 9, 0, 4, 2, 20, 17])),
    case("packed_block_causal", 67, **PACKED, pattern=BlockCausal(4)),
    case("packed_block_diffusion", 44, **EVEN, pattern=BlockDiffusion(3)),
    case("packed_alibi", 67, **PACKED, slopes=True),
    case("packed_alibi_causal", 67, **PACKED, slopes=True, causal=True),
    case("packed_t5", 67, **PACKED, **T5),
    case("packed_t5_one_way", 67, **PACKED, **T5_ONE_WAY, causal=True),
    case("packed_t5_alibi_window", 67, **PACKED, **T5, slopes=True, window=(11, 4)),
    case("packed_toeplitz", 67, **PACKED, **WHOLE, rows=57),
    case("packed_toeplitz_wide", 67, **PACKED, **WHOLE, rows=201, causal=True),
    case("packed_dropout", 67, **PACKED, dropout_p=0.3, causal=True),
    case("packed_cross", 55, 64, **PACKED_CROSS),
    case("packed_cross_causal", 55, 64, **PACKED_CROSS, causal=True, sinks=True),
    case("packed_cross_top_left", 55, 64, **PACKED_CROSS, causal="top_left", Hkv=1),
    case("packed_cross_window", 55, 64, **PACKED_CROSS, window=(4, 6), cu_dtype=torch.int64),
    case("packed_cross_alibi", 55, 64, **PACKED_CROSS, slopes=True),
    case("packed_cross_t5", 55, 64, **PACKED_CROSS, **T5),
    case("packed_cross_toeplitz", 55, 64, **PACKED_CROSS, **WHOLE, rows=81),
    case("packed_cross_patterns", 55, 64, **PACKED_CROSS, pattern=[PrefixLM([3, 1, 5, 0, 2, 30]), BlockCausal(6)]),
]

BIASES = [
    case("bias_full", 23, 70, bias=(2, 2, 23, 70)),
    case("bias_full_same_dtype", 23, 70, bias=(2, 2, 23, 70), small=None),
    case("bias_of_heads", 37, 41, B=3, bias=(1, 2, 37, 41)),
    case("bias_of_batch", 37, 41, bias=(2, 1, 37, 41), H=3),
    case("bias_3d", 37, 41, bias=(2, 37, 41), B=3),
    case("bias_2d", 37, 141, bias=(37, 141)),
    case("bias_of_keys", 37, 41, bias=(2, 1, 1, 41)),
    case("bias_of_heads_and_keys", 37, 41, bias=(2, 1, 41)),
    case("bias_1d", 37, 70, bias=(70,), H=3),
    case("bias_of_queries", 37, 41, H=6, bias=(2, 6, 37, 1), sinks=True, change=heavy_sinks),
    case("bias_of_one_number_a_head", 37, 41, H=6, bias=(1, 6, 1, 1), sinks=True, change=heavy_sinks, dtypes=FP32),
    case("bias_of_one_number", 37, 41, H=6, bias=(), sinks=True, change=heavy_sinks, dtypes=FP32),
    case("bias_gqa_causal", 41, H=6, Hkv=2, bias=(1, 6, 41, 41), causal=True),
    # more than one run of keys in a backward pass, whose sums are brought together, and of the batch
    case("runs_of_keys", 37, 1100, B=1, H=2, D=8, slopes=True, family="softmax_few"),
    case("runs_of_keys_index", 21, 1100, B=1, H=1, D=8, bias_index=random_index(21, 1100, 30), rows=30),
    case("runs_of_keys_bias", 20, 530, B=2, H=2, D=8, bias=(1, 1, 20, 530)),
    case("runs_of_batches", 5, 7, B=40, H=1, D=8, slopes=True, dtypes=(torch.float32,)),
    case("bias_200_causal", 130, 200, B=1, H=1, bias=(130, 200), causal=True),
    case("minus_inf_in_bias", 23, 70, bias=(2, 1, 23, 70), change=some_minus_inf),
    case("minus_inf_rows_of_bias", 23, 31, bias=(23, 31), change=whole_rows_minus_inf),
    case("bias_and_mask", 23, 31, bias=(1, 2, 23, 31), mask=(2, 1, 1, 31), change=padding(20, 31)),
    case("toeplitz", 37, rows=73, **WHOLE),
    case("toeplitz_same_dtype", 37, rows=73, small=None, **WHOLE),
    case("toeplitz_more_keys", 29, 70, rows=98, **WHOLE, causal=True),
    case("toeplitz_more_queries", 70, 29, rows=98, **WHOLE, window=(7, 20)),
    case("toeplitz_200", 131, 200, B=1, H=2, Hkv=1, rows=330, **WHOLE),
    case("toeplitz_top_left", 29, 70, rows=98, **WHOLE, causal="top_left"),
    case("t5", 70, **T5),
    case("t5_200", 150, 200, B=1, H=1, **T5, D=64),
    case("t5_padding", 70, **T5, mask=(2, 1, 1, 70), change=padding(33, 70)),
    case("t5_decoder", 70, **T5_ONE_WAY, causal=True),
    case("t5_decoder_step", 1, 70, bias_index=T5Buckets(False, 50, q_offset=69), rows=20),
    case("t5_offset", 13, 70, bias_index=T5Buckets(q_offset=57), rows=32),
    case("t5_block_causal", 61, **T5, pattern=BlockCausal(6)),
    case("swin_grid", 42, bias_index=Grid2D(6, 7), rows=143, B=3),
    case("beit_grid", 36, bias_index=Grid2D(5, 7, 1), rows=120),
    case("deit_grid", 37, bias_index=Grid2D(7, 5, 2), rows=120, H=3, Hkv=1),
    case("grid_13_11", 144, bias_index=Grid2D(13, 11, 1), rows=528, B=1, D=32),
    case("grid_of_one_row", 23, bias_index=Grid2D(1, 23), rows=45),
    case("grid_of_one_column", 24, bias_index=Grid2D(23, 1, 1), rows=48, causal=True),
    case("grid_padding_dropout", 36, bias_index=Grid2D(5, 7, 1), rows=120, mask=(2, 1, 1, 36), dropout_p=0.2),
    case("index", 37, 41, bias_index=random_index(37, 41, 19), rows=19, B=3),
    case("index_int32", 23, 70, bias_index=random_index(23, 70, 300, torch.int32), rows=300, small=None),
    case("index_uint8", 23, 70, bias_index=random_index(23, 70, 50, torch.uint8), rows=50),
    case("index_not_contiguous", 23, 31, bias_index=random_index(31, 23, 50).t(), rows=50),
    case(
        "index_one_row",
        23,
        31,
        H=6,
        bias_index=random_index(23, 31, 1),
        rows=1,
        sinks=True,
        change=heavy_sinks,
        dtypes=FP32,
    ),
    case("index_padding", 37, 41, bias_index=random_index(37, 41, 19), rows=19, mask=(2, 1, 1, 41)),
    case("index_200", 137, 200, bias_index=random_index(137, 200, 500), rows=500, B=1, H=2, causal=True),
    case("index_rows_unused", 23, 31, bias_index=random_index(23, 31, 5) * 7, rows=40, window=(9, 9)),
    case("index_toeplitz", 37, 41, bias_index=toeplitz_index(37, 41, 17), rows=17, B=3),
    case("index_toeplitz_rules", 41, 37, bias_index=toeplitz_index(41, 37, 30, torch.int32), rows=30, causal=True),
    case("alibi", 37, 41, H=6, slopes=True),
    case("alibi_same_dtype", 37, 41, H=6, slopes=True, small=None),
    case("alibi_causal", 41, slopes=True, causal=True, H=4, Hkv=2),
    case("alibi_more_queries", 70, 31, slopes=True, causal=True),
    case("alibi_200", 130, 200, B=1, H=5, slopes=True, window=(90, 0)),
    case("alibi_and_toeplitz", 29, 70, H=6, slopes=True, rows=98, **WHOLE),
    case("alibi_and_t5", 47, H=6, slopes=True, **T5),
    case("alibi_and_index", 23, 31, slopes=True, bias_index=random_index(23, 31, 19), rows=19),
    case("alibi_and_grid", 36, slopes=True, bias_index=Grid2D(5, 7, 1), rows=120, H=6),
    case("bias_alibi_and_table", 23, 31, bias=(2, 1, 23, 31), slopes=True, rows=53, **WHOLE),
    case("bias_and_grid", 36, bias=(2, 36, 36), bias_index=Grid2D(5, 7, 1), rows=120),
]

SCORES = [
    case("softcap", 37, 70, softcap=1.5),
    case("softcap_30", 37, 70, softcap=30.0, causal=True, D=64),
    case("softcap_bias", 23, 31, softcap=0.5, bias=(1, 2, 23, 31), rows=53, **WHOLE),
    case("sinks", 37, 70, sinks=True, H=4, Hkv=2),
    case("sinks_same_dtype", 37, 41, sinks=True, small=None),
    case("sinks_rows_without_keys", 23, 31, sinks=True, mask=(2, 1, 23, 31), change=rows_without_keys),
    case("sinks_minus_inf", 31, 23, sinks=True, change=some_sinks_minus_inf, causal=True),
    case("sinks_window", 70, sinks=True, window=(12, 0), H=4, Hkv=1, D=64),
    case("dropout", 37, 41, dropout_p=0.25),
    case("dropout_causal_gqa", 70, dropout_p=0.6, causal=True, H=4, Hkv=2),
    case("dropout_bias", 23, 70, dropout_p=0.3, bias=(1, 2, 23, 70)),
    case("dropout_toeplitz", 131, B=1, dropout_p=0.1, rows=261, **WHOLE),
    case("dropout_index", 23, 31, H=6, dropout_p=0.3, bias_index=random_index(23, 31, 19), rows=19, sinks=True),
    case(
        "everything", 46, H=4, Hkv=2, D=24, E=40, mask=(2, 1, 1, 46), bias=(2, 1, 46, 46), rows=91, slopes=True,
        sinks=True, causal=True, window=(30, -1), pattern=[PrefixLM([9, 30]), BlockDiffusion(5)], softcap=3.0,
        dropout_p=0.2, scale=0.4, layout=heads_inside_tokens, **WHOLE,
    ),
    case(
        "everything_by_index", 36, 36, H=4, Hkv=1, D=8, E=16, mask=(2, 4, 36, 36), bias=(4, 36, 36), rows=120,
        slopes=True, sinks=True, window=(20, 9), pattern=PrefixLM(11), softcap=5.0, dropout_p=0.3,
        bias_index=Grid2D(5, 7, 1),
    ),
    case(
        "everything_packed", 67, **PACKED, H=4, Hkv=2, D=24, E=40, rows=32, slopes=True, sinks=True, causal=True,
        window=(9, -1), pattern=BlockCausal(5), softcap=3.0, dropout_p=0.2, bias_index=T5Buckets(max_distance=20),
    ),
]  # fmt: skip

INTEGERS = [
    case("exact_bias", 37, 70, bias=(2, 2, 37, 70), change=one_key_each, **EXACT),
    case("exact_bias_of_heads", 23, 131, B=3, H=4, Hkv=2, bias=(4, 23, 131), change=one_key_each, **EXACT),
    case("exact_bias_sizes", 23, 31, D=40, E=72, bias=(23, 31), change=one_key_each, **EXACT),
    case("exact_itself", 41, window=(0, 0), change=integers, **EXACT),
    case("exact_itself_more_keys", 29, 70, window=(0, 0), change=integers, causal=True, **EXACT),
    case("exact_itself_more_queries", 70, 29, window=(0, 0), change=integers, layout=heads_inside_tokens, **EXACT),
    case("exact_block_causal_1", 71, pattern=BlockCausal(1), window=(0, -1), change=integers, **EXACT),
    case("exact_noised_blocks", 22, pattern=BlockDiffusion(1), window=(0, 0), change=integers, **EXACT),
    case("exact_one_key", 37, 1, change=integers, H=4, Hkv=2, **EXACT),
    case("exact_toeplitz", 37, 61, rows=97, change=one_row_of_the_table(36), **WHOLE, **EXACT),
    case("exact_toeplitz_gqa", 70, H=4, Hkv=2, rows=139, change=one_row_of_the_table(69), **WHOLE, **EXACT),
    case("exact_t5", 131, B=1, rows=32, bias_index=T5Buckets(), change=one_row_of_the_table(0), **EXACT),
    case("exact_alibi", 70, 133, B=1, slopes=True, change=steep_slopes, **EXACT),
    case("exact_alibi_causal", 37, 70, slopes=True, causal=True, change=steep_slopes, **EXACT),
    case("exact_swin", 42, bias_index=Grid2D(6, 7), rows=143, change=one_row_of_the_table(71), **EXACT),
    case("exact_beit", 36, bias_index=Grid2D(5, 7, 1), rows=120, change=one_row_of_the_table([58, 119]), **EXACT),
    case("exact_packed", 67, **PACKED, window=(0, 0), change=integers, **EXACT),
    case("exact_packed_alibi", 67, **PACKED, slopes=True, change=steep_slopes, **EXACT),
    case("exact_packed_toeplitz", 67, **PACKED, **WHOLE, rows=57, change=one_row_of_the_table(28), **EXACT),
    case("exact_packed_t5", 67, **PACKED, rows=32, bias_index=T5Buckets(), change=one_row_of_the_table(0), **EXACT),
    case("exact_packed_cross", 55, 64, **PACKED_CROSS, window=(0, 0), change=integers, **EXACT),
]

CASES = [*PLAIN, *MASKS, *PACKS, *BIASES, *SCORES, *INTEGERS]

# Small, with a batch of two; between them every tensor that has a gradient.
BEHAVIOUR = [
    case(
        "dense", 5, 7, H=4, Hkv=2, D=8, bias=(2, 1, 5, 7), sinks=True, bias_index=random_index(5, 7, 6), rows=6,
        mask=(2, 1, 1, 7), change=padding(6, 7),
    ),
    case("rules", 6, 7, D=8, causal=True, window=(3, -1), **T5, slopes=True, softcap=2.0, dropout_p=0.3),
]  # fmt: skip
PACKED_BEHAVIOUR = case("packed", 11, B=1, D=8, lengths=(3, 0, 1, 7), causal=True, **T5, sinks=True)

TINY = {"B": 1, "D": 2, "E": 3}
GRADIENTS = [
    case("plain", 3, 4, **TINY, H=2, Hkv=1, softcap=1.5),
    case("bias", 3, 4, **TINY, bias=(1, 2, 3, 4), sinks=True, causal=True),
    case("bias_of_keys", 3, 4, **TINY, bias=(4,), dropout_p=0.3),
    case("toeplitz_alibi", 3, 4, **TINY, rows=6, **WHOLE, slopes=True, window=(1, 1)),
    case("t5", 4, **TINY, rows=8, bias_index=T5Buckets(max_distance=3)),
    case("grid", 5, **TINY, rows=12, bias_index=Grid2D(2, 2, 1), mask=(5,)),
    case("index", 3, 4, **TINY, rows=3, bias_index=random_index(3, 4, 3)),
    case("no_keys", 5, 3, **TINY, causal=True, sinks=True),
    case("packed", 6, **TINY, lengths=(2, 0, 1, 3), slopes=True, rows=5, **WHOLE, sinks=True),
]

# in half precision the reference computes as in fp32
PLAINLY = [dataclasses.replace(c, dtypes=c.dtypes if c in SCORES else FP32) for c in CASES]
CHECKS = [
    *check_op(accel.softmax_attention, CASES, BEHAVIOUR, GRADIENTS, BACKENDS[:1]),
    *check_op(accel.softmax_attention, PLAINLY, BEHAVIOUR, [], BACKENDS[1:]),
]


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_op(check):
    check()


def by_name(name):
    return next(c for c in (*CASES, *BEHAVIOUR) if c.name == name)


def available(backend, tensors, kwargs):
    testing.require(accel.softmax_attention, backend, tensors, kwargs)


# --- what the harness does not reach by itself: packed behaviour, and the gradient through the log-sum-exp ---

# the packed form has one batch entry, so that the checks of empty batches and of single entries do not apply
ON_PACKED = [
    testing.check_subsets,
    testing.check_opcheck,
    testing.check_compile,
    testing.check_poison,
    testing.check_repeat,
    testing.check_checkpoint,
    testing.check_autocast,
]


def test_packed_strides():
    testing.check_strides(accel.softmax_attention, PACKED_BEHAVIOUR, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", ON_PACKED, ids=lambda check: check.__name__.removeprefix("check_"))
def test_packed_behaviour(check, backend):
    check(accel.softmax_attention, PACKED_BEHAVIOUR, backend)


@functools.wraps(accel.softmax_attention)
def with_lse(*args, **kwargs):
    """Output and log-sum-exp as one tensor, so that both have an upstream gradient."""
    out, lse = accel.softmax_attention(*args, **kwargs, return_lse=True)
    return torch.cat([out, lse[..., None].to(out.dtype)], -1)


def apart(x, name, kwargs):
    return {"out": x[..., :-1], "lse": x[..., -1]} if name == "out" else {name: x}


LSE_CASES = [
    "plain", "gqa_3", "causal_more_queries", "rows_without_keys", "no_keys_at_all", "packed_cross_causal",
    "bias_full", "toeplitz_more_keys", "alibi_and_grid", "index", "softcap", "sinks_rows_without_keys",
    "dropout_causal_gqa", "everything", "everything_packed",
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LSE_CASES)
def test_gradient_through_the_log_sum_exp(name, backend):
    given = dataclasses.replace(by_name(name), split=apart)
    for dtype in testing.KERNEL_DTYPES if name in ("plain", "toeplitz_more_keys") else FP32:
        testing.check_values(with_lse, given, backend, dtype)


def test_derivative_of_the_log_sum_exp():
    testing.check_gradcheck(with_lse, GRADIENTS[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", [*LSE_CASES, "large_logits", "very_negative", "value_size_128", "sinks_minus_inf"])
def test_log_sum_exp(name, dtype, backend):
    tensors, kwargs = by_name(name).make(dtype, "cpu", 0)
    available(backend, tensors, kwargs)
    lse = OP.backend(backend).forward(*OP.prepare(**tensors, **kwargs))[1]
    expected = OP.backend("reference").forward(*OP.prepare(**testing.double(tensors), **kwargs))[1]
    assert lse.dtype == torch.float32
    assert_close(lse, expected, "lse", torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys_pass_no_gradient(backend):
    tensors, kwargs = by_name("rows_without_keys").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    tensors = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    out, lse = accel.softmax_attention(**tensors, **kwargs, return_lse=True, backend=backend)
    assert torch.equal(out[:, :, ::3], torch.zeros_like(out[:, :, ::3]))
    assert (lse[:, :, ::3] == -math.inf).all()
    assert lse[:, :, 1::3].isfinite().all()
    lse.square().sum().backward()  # sends −∞ to those rows
    for name in "qk":
        assert tensors[name].grad.isfinite().all(), f"gradient of {name}"
    assert torch.equal(tensors["q"].grad[:, :, ::3], torch.zeros_like(out[:, :, ::3]))
    assert tensors["q"].grad[:, :, 1].abs().min() > 0


# --- the definition, pair by pair ---


def definition(q, k, v, *, seen=None, bias=None, scale=None, softcap=None, sinks=None):
    """Output and log-sum-exp by loops over float64 tensors; ``seen(b, i, j)`` and ``bias(h, i, j)`` are functions."""
    B, H, T, D = q.shape
    group, scale = H // k.shape[1], D**-0.5 if scale is None else scale
    out = torch.zeros(B, H, T, v.shape[3], dtype=torch.float64)
    lse = torch.full((B, H, T), -math.inf, dtype=torch.float64)
    for b, h, i in itertools.product(range(B), range(H), range(T)):
        keys = [j for j in range(k.shape[2]) if seen is None or seen(b, i, j)]
        logits = [scale * float(q[b, h, i] @ k[b, h // group, j]) for j in keys]
        if softcap is not None:
            logits = [softcap * math.tanh(x / softcap) for x in logits]
        if bias is not None:
            logits = [x + bias(h, i, j) for x, j in zip(logits, keys, strict=True)]
        weights = [math.exp(x) for x in logits]
        total = sum(weights) + (0.0 if sinks is None else math.exp(sinks[h]))
        for weight, j in zip(weights, keys, strict=True):
            out[b, h, i] += weight / total * v[b, h // group, j]
        lse[b, h, i] = math.log(total) if total else -math.inf
    return out, lse


def drawn(T, S, B=2, H=2, Hkv=None, D=8, E=4):
    generator = torch.Generator().manual_seed(3)
    shapes = (B, H, T, D), (B, Hkv or H, S, D), (B, Hkv or H, S, E)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def agree(qkv, arguments, **rules):
    """The reference with ``arguments`` is the definition with ``rules``."""
    got = accel.softmax_attention(*qkv, **arguments, return_lse=True, backend="reference")
    for result, expected in zip(got, definition(*qkv, **rules), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)


SIZES = [(9, 9), (5, 11), (11, 5), (1, 7), (7, 1)]


@pytest.mark.parametrize(("T", "S"), SIZES)
@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ({}, lambda p, i, j: True),
        ({"causal": True}, lambda p, i, j: j <= p),
        ({"causal": "bottom_right"}, lambda p, i, j: j <= p),
        ({"causal": "top_left"}, lambda p, i, j: j <= i),
        ({"window": (2, 1)}, lambda p, i, j: p - 2 <= j <= p + 1),
        ({"window": (0, -1)}, lambda p, i, j: p <= j),
        ({"window": (-1, 3)}, lambda p, i, j: j <= p + 3),
        ({"window": (3, 2), "causal": True}, lambda p, i, j: p - 3 <= j <= p),
        ({"window": (1, 2), "causal": "top_left"}, lambda p, i, j: i - 1 <= j <= i),
        ({"pattern": PrefixLM(4)}, lambda p, i, j: j < 4 or j <= p),
        ({"pattern": PrefixLM(4), "window": (1, 4)}, lambda p, i, j: (j < 4 or j <= p) and p - 1 <= j <= p + 4),
        ({"pattern": BlockCausal(3)}, lambda p, i, j: j // 3 <= p // 3),
        ({"pattern": [BlockCausal(4), BlockCausal(3)]}, lambda p, i, j: j // 3 <= p // 3 and j // 4 <= p // 4),
        ({"pattern": BlockCausal(3), "causal": True}, lambda p, i, j: j <= p),
    ],
    ids=lambda x: "definition" if callable(x) else str(x),
)  # fmt: skip
def test_rules_are_their_definition(T, S, arguments, seen):
    agree(drawn(T, S), arguments, seen=lambda b, i, j: seen(i + S - T, i, j))


def three_parts(i, j, half, n):
    """Block diffusion's mask as its paper builds it: (block diagonal) or (offset block causal) or (block causal)."""
    clean_i, clean_j = i >= half, j >= half
    block_i, block_j = i % half // n, j % half // n
    diagonal = block_i == block_j and clean_i == clean_j
    offset = block_i > block_j and clean_j and not clean_i
    causal = block_i >= block_j and clean_j and clean_i
    return diagonal or offset or causal


@pytest.mark.parametrize(("tokens", "n"), [(12, 2), (14, 3), (10, 1), (10, 9), (2, 1), (16, 8)])
def test_block_diffusion_is_its_definition(tokens, n):
    half = tokens // 2
    agree(drawn(tokens, tokens), {"pattern": BlockDiffusion(n)}, seen=lambda b, i, j: three_parts(i, j, half, n))
    agree(
        drawn(tokens, tokens),
        {"pattern": [BlockDiffusion(n), PrefixLM(3)], "window": (half, 2)},
        seen=lambda b, i, j: three_parts(i, j, half, n) and (j < 3 or j <= i) and i - half <= j <= i + 2,
    )


@pytest.mark.parametrize("lengths", [[0, 6], (3, 9), torch.tensor([8, 2]), torch.tensor([1, 20], dtype=torch.int32)])
def test_prefix_of_each_batch_entry(lengths):
    agree(drawn(7, 9), {"pattern": PrefixLM(lengths)}, seen=lambda b, i, j: j < int(lengths[b]) or j <= i + 2)


@pytest.mark.parametrize(("T", "S"), SIZES)
def test_biases_are_their_definition(T, S):
    generator = torch.Generator().manual_seed(5)
    slopes = torch.rand(2, generator=generator, dtype=torch.float64)
    table = torch.randn(T + S - 1, 2, generator=generator, dtype=torch.float64)
    index = random_index(T, S, T + S - 1)
    dense = torch.randn(2, T, S, generator=generator, dtype=torch.float64)
    sinks = torch.randn(2, generator=generator, dtype=torch.float64)

    def alibi(h, i, j):
        return -float(slopes[h]) * abs(i + S - T - j)

    def along(h, i, j):
        return float(table[i - j + S - 1, h])

    def gathered(h, i, j):
        return float(table[index[i, j], h])

    qkv = drawn(T, S, H=2, Hkv=1)
    agree(qkv, {"alibi_slopes": slopes}, bias=alibi)
    agree(qkv, {"bias_table": table, "bias_index": "toeplitz"}, bias=along)
    agree(qkv, {"bias_table": table, "bias_index": index}, bias=gathered)
    for arguments, rule in (({"bias_index": "toeplitz"}, along), ({"bias_index": index}, gathered)):
        agree(
            qkv,
            {"bias_table": table, **arguments, "alibi_slopes": slopes, "bias": dense, "sinks": sinks, "softcap": 1.5,
             "scale": 0.7, "causal": True},
            bias=lambda h, i, j, rule=rule: rule(h, i, j) + alibi(h, i, j) + float(dense[h, i, j]),
            seen=lambda b, i, j: j <= i + S - T, sinks=sinks.tolist(), softcap=1.5, scale=0.7,
        )  # fmt: skip


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 20), (8, 9), (64, 1000), (31, 77)])
def test_t5_buckets_are_those_of_transformers(bidirectional, buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-3000, 3001)  # query − key
    expected = t5.T5Attention._relative_position_bucket(-distance, bidirectional, buckets, max_distance)
    got = T5Buckets(bidirectional, max_distance).rows_of(distance, buckets)
    assert torch.equal(got, expected)
    assert torch.equal(T5Buckets(bidirectional, max_distance, q_offset=7).rows_of(distance - 7, buckets), expected)
    assert expected.unique().numel() > 6, "the distances reach few buckets"


def test_t5_bias_is_that_of_transformers():
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = pytest.importorskip("transformers").T5Config(d_model=16, d_kv=8, num_heads=2)
    for decoder in (False, True):
        config.is_decoder = decoder
        module = t5.T5Attention(config, has_relative_attention_bias=True).double()
        table = module.relative_attention_bias.weight.detach()
        q, k, v = drawn(9, 9)
        bias = module.compute_bias(9, 9).detach()
        expected = accel.softmax_attention(q, k, v, bias=bias, scale=1.0, backend="reference")
        rule = T5Buckets(bidirectional=not decoder)
        got = accel.softmax_attention(q, k, v, bias_table=table, bias_index=rule, scale=1.0, backend="reference")
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        one = T5Buckets(bidirectional=not decoder, q_offset=8)  # the last query alone, as in decoding
        got = accel.softmax_attention(
            q[:, :, 8:], k, v, bias_table=table, bias_index=one, scale=1.0, backend="reference"
        )
        torch.testing.assert_close(got, expected[:, :, 8:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("h", "w"), [(3, 5), (4, 4), (1, 6), (7, 2)])
def test_grids_are_those_of_timm(h, w):
    beit = pytest.importorskip("timm.models.beit")
    swin = pytest.importorskip("timm.models.swin_transformer")
    assert torch.equal(grid_index([h, w, 1]), beit.gen_relative_position_index((h, w)))
    assert torch.equal(grid_index([h, w, 0]), swin.get_relative_position_index(h, w))
    assert Grid2D(h, w, 1).rows == int(grid_index([h, w, 1]).max()) + 1
    assert Grid2D(h, w).rows == int(grid_index([h, w, 0]).max()) + 1
    two = grid_index([h, w, 2])  # the rows of one extra token, each for both
    assert torch.equal(two[1:, 1:], grid_index([h, w, 1]))
    assert torch.equal(two[0, 2:], two[1, 2:])
    assert torch.equal(two[2:, 0], two[2:, 1])
    assert two[:2, :2].unique().tolist() == [Grid2D(h, w, 2).rows - 1]


def test_grid_is_that_of_torchvision():
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    layer = swin.ShiftedWindowAttention(8, [4, 6], [0, 0], 2)
    assert torch.equal(grid_index([4, 6, 0]).flatten(), layer.relative_position_index)
    assert layer.relative_position_bias_table.shape[0] == Grid2D(4, 6).rows


@pytest.mark.parametrize("name", ["swin_grid", "beit_grid", "deit_grid", "grid_of_one_column"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_grid_is_its_index_tensor(name, backend):
    tensors, kwargs = by_name(name).make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    grid = kwargs["bias_index"]
    index = grid_index([grid.h, grid.w, grid.extra])
    one, other = (
        testing.run(accel.softmax_attention, tensors, {**kwargs, "bias_index": i}, backend) for i in (grid, index)
    )
    for key, value in one.named().items():
        family = "softmax_few" if key == "out" else "softmax_few_grad"
        assert_close(other.named()[key], value, family, torch.float32, key)


# --- against torch, and against itself in another form ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("plain", lambda t: {}),
        ("head_size_40", lambda t: {}),
        ("scale_1", lambda t: {"scale": 1.0}),
        ("gqa", lambda t: {"enable_gqa": True}),
        ("value_size_larger", lambda t: {"enable_gqa": True}),
        ("top_left_more_queries", lambda t: {"is_causal": True}),
        ("padding_holes", lambda t: {"attn_mask": t["mask"]}),
        ("rows_without_keys", lambda t: {"attn_mask": t["mask"]}),
        ("bias_of_heads_and_keys", lambda t: {"attn_mask": t["bias"].double()}),
        ("minus_inf_rows_of_bias", lambda t: {"attn_mask": t["bias"].double()}),
    ],
)
def test_torch_agrees(name, arguments, backend):
    tensors, kwargs = by_name(name).make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    got = testing.run(accel.softmax_attention, tensors, kwargs, backend)
    wide = {n: t.double().requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}
    expected = F.scaled_dot_product_attention(wide["q"], wide["k"], wide["v"], **arguments(wide))
    assert_close(got.out, expected, "softmax", torch.float32)
    grads = torch.autograd.grad(expected.sum(), [wide[n] for n in "qkv"])
    for n, grad in zip("qkv", grads, strict=True):
        assert_close(got.grads[n], grad, "softmax_grad", torch.float32, n)


PACKED_NAMES = [
    "packed", "packed_causal", "packed_window", "packed_prefix_list", "packed_block_causal", "packed_block_diffusion",
    "packed_t5_alibi_window", "packed_t5_one_way", "packed_toeplitz_wide", "packed_cross_causal",
    "packed_cross_top_left", "packed_cross_window", "packed_cross_alibi", "packed_cross_t5", "packed_cross_toeplitz",
    "packed_cross_patterns",
]  # fmt: skip


def one_sequence(kwargs, number, queries, keys, rows):
    """The arguments of a call on sequence ``number`` alone."""
    alone = {n: v for n, v in kwargs.items() if not n.startswith("cu_seqlens")}
    if alone.get("bias_index") == "toeplitz":  # a table for these lengths: rows of the packed one
        distance = torch.arange(queries)[:, None] - torch.arange(keys)
        alone["bias_index"] = distance + rows // 2
    patterns = alone.get("pattern")
    if patterns is not None:
        patterns = patterns if isinstance(patterns, list) else [patterns]
        alone["pattern"] = [
            PrefixLM([p.lengths[number]]) if isinstance(p, PrefixLM) and not isinstance(p.lengths, int) else p
            for p in patterns
        ]
    return alone


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PACKED_NAMES)
def test_packed_is_a_loop_over_sequences(name, backend):
    tensors, kwargs = by_name(name).make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    out, lse = accel.softmax_attention(**tensors, **kwargs, return_lse=True, backend=backend)
    starts_q = kwargs["cu_seqlens_q"].tolist()
    starts_k = kwargs.get("cu_seqlens_k", kwargs["cu_seqlens_q"]).tolist()
    table = tensors.get("bias_table")
    pieces = zip(itertools.pairwise(starts_q), itertools.pairwise(starts_k), strict=True)
    for number, ((a, b), (c, d)) in enumerate(pieces):
        alone = {**tensors, "q": tensors["q"][:, :, a:b]}
        alone |= {n: tensors[n][:, :, c:d] for n in "kv"}
        given = one_sequence(kwargs, number, b - a, d - c, 0 if table is None else table.shape[0])
        expected = accel.softmax_attention(**testing.double(alone), **given, return_lse=True, backend="reference")
        assert_close(out[:, :, a:b], expected[0], "softmax", torch.float32, f"sequence {number}")
        assert_close(lse[:, :, a:b], expected[1], "lse", torch.float32, f"log-sum-exp of sequence {number}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_index_that_depends_on_the_distance_takes_the_short_path(backend):
    tensors, kwargs = by_name("index_toeplitz").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    kwargs["bias_index"] = kwargs["bias_index"].clone()
    args = OP.prepare(**tensors, **kwargs)
    assert args.line is not None
    assert args.table is None
    assert args.bias_index is None
    other = kwargs["bias_index"].clone()
    other[-1, -1] = (other[-1, -1] + 1) % tensors["bias_table"].shape[0]
    args = OP.prepare(**tensors, bias_index=other)
    assert args.line is None
    assert torch.equal(args.bias_index.long(), other)
    kwargs["bias_index"][-1, -1] = other[-1, -1]  # what was known of the tensor is no longer true
    assert OP.prepare(**tensors, **kwargs).line is None
    got = accel.softmax_attention(**tensors, **kwargs, backend=backend)
    dense = tensors["bias_table"][other].permute(2, 0, 1)
    expected = accel.softmax_attention(
        **{n: tensors[n].double() for n in "qkv"}, bias=dense.double(), backend="reference"
    )
    assert_close(got, expected, "softmax", torch.float32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "given",
    [
        lambda dtype: {"bias_table": zeros(6, 2).double(), "bias_index": random_index(5, 5, 6, dtype)},
        lambda dtype: {"bias_table": zeros(6, 2).double(), "bias_index": toeplitz_index(5, 5, 6, dtype)},
        lambda dtype: {"cu_seqlens_q": cumulative((2, 3), dtype)},
        lambda dtype: {"cu_seqlens_k": cumulative((2, 3), dtype), "cu_seqlens_q": cumulative((1, 4), dtype)},
    ],
    ids=["index", "toeplitz", "packed", "cross"],
)
def test_what_is_known_of_a_tensor_does_not_keep_it_alive(given, dtype):
    arguments = given(dtype)
    q, k, v = drawn(5, 5, B=1)
    for _ in range(2):
        accel.softmax_attention(q, k, v, **arguments, causal=True, backend="reference")
    gone = [weakref.ref(x) for n, x in arguments.items() if n != "bias_table"]
    arguments.clear()
    gc.collect()
    assert [x() for x in gone] == [None] * len(gone)


def test_an_index_made_in_inference_mode_is_taken():
    q, k, v = drawn(5, 7)
    table = torch.randn(6, 2, dtype=torch.float64)
    call = functools.partial(accel.softmax_attention, q, k, v, bias_table=table, backend="reference")
    with torch.inference_mode():
        index = random_index(5, 7, 6)
        inside = call(bias_index=index)
    assert torch.equal(inside, call(bias_index=random_index(5, 7, 6)))


@pytest.mark.parametrize("name", ["index", "index_toeplitz", "packed_t5", "causal"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_after_inference_mode(name, backend):
    tensors, kwargs = by_name(name).make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    kwargs = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in kwargs.items()}
    with torch.inference_mode():
        inside = accel.softmax_attention(**tensors, **kwargs, backend=backend)
    got = testing.run(accel.softmax_attention, tensors, kwargs, backend)
    testing.assert_same(got.out, inside, "outside of inference mode")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_bias_has_the_gradient_of_each_of_its_elements(backend):
    q, k, v = (x.float() for x in drawn(5, 7, E=8))
    available(backend, {"q": q, "k": k, "v": v}, {})
    whole = torch.randn(2, 1, 5, 7)
    whole[1] = whole[0]
    grads = []
    for bias in (whole, whole[:1].expand(2, 1, 5, 7)):
        bias = bias.detach().requires_grad_()
        accel.softmax_attention(q, k, v, bias=bias, backend=backend)[:, :, :, 0].sum().backward()
        grads.append(bias.grad)
    assert grads[1].shape == whole.shape
    assert_close(grads[1], grads[0], "softmax_grad", torch.float32)


# --- what must not leak ---


def rule_seen(arguments, B, T, S):
    """``(B, T, S)``: which pairs a call's masks allow, from the reference's own weights on the identity."""
    q, k = torch.zeros(B, 1, T, 8, dtype=torch.float64), torch.zeros(B, 1, S, 8, dtype=torch.float64)
    eye = torch.eye(S, dtype=torch.float64).expand(B, 1, S, S)
    return accel.softmax_attention(q, k, eye, **arguments, backend="reference")[:, 0] > 0


LEAKS = {
    "causal": (2, 41, 41, {"causal": True}),
    "window": (2, 41, 70, {"window": (5, 3)}),
    "padding": (2, 23, 70, {"mask": torch.arange(70).view(1, 1, 1, -1) < torch.tensor([33, 70]).view(2, 1, 1, 1)}),
    "dense": (2, 23, 37, {"mask": torch.rand(2, 1, 23, 37, generator=torch.Generator().manual_seed(0)) < 0.1}),
    "blocks": (1, 44, 44, {"pattern": BlockDiffusion(5)}),
    "packed": (1, 67, 67, {"cu_seqlens_q": cumulative(PACKED["lengths"]), "causal": True}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("tensor", ["q", "k", "v"])
@pytest.mark.parametrize("name", LEAKS)
def test_what_is_not_finite_reaches_only_who_may_see_it(name, tensor, value, dtype, backend):
    B, T, S, arguments = LEAKS[name]
    seen = rule_seen(arguments, B, T, S)
    tensors = {n: t.to(dtype) for n, t in zip("qkv", drawn(T, S, B=B, E=8), strict=True)}
    available(backend, tensors, arguments)
    bias = {"alibi_slopes": torch.tensor([0.1, 0.2])} if name != "dense" else {}
    clean = testing.run(accel.softmax_attention, {**tensors, **bias}, arguments, backend, "qkv")
    place = T // 2 if tensor == "q" else S // 2
    tensors[tensor] = tensors[tensor].clone()
    tensors[tensor][0, :, place, 1] = value
    got = testing.run(accel.softmax_attention, {**tensors, **bias}, arguments, backend, "qkv")
    rows = torch.zeros(B, T, dtype=torch.bool)  # queries whose output or gradient may be touched
    rows[0] = seen[0, :, place] if tensor != "q" else torch.arange(T) == place
    keys = (rows[:, :, None] & seen).any(1)
    assert int((~rows[0]).sum()) > 0, "every query sees the place"
    spared_rows, spared_keys = (~x[:, None].expand(-1, 2, -1) for x in (rows, keys))
    if tensor != "q":
        spared_keys[0, :, place] = False
    if math.isnan(value):
        assert got.out[~spared_rows].isnan().any(-1).all(), "it does not reach who sees it"
    testing.assert_same(got.out[spared_rows], clean.out[spared_rows], "output")
    testing.assert_same(got.grads["q"][spared_rows], clean.grads["q"][spared_rows], "gradient of q")
    for n in "kv":
        testing.assert_same(got.grads[n][spared_keys], clean.grads[n][spared_keys], f"gradient of {n}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything(backend):
    """Keys that nobody sees hold NaN: output, gradients and those of bias, table and sinks are as without them."""
    tensors, kwargs = by_name("everything").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    tensors["mask"][..., 30:] = False
    clean = testing.run(accel.softmax_attention, tensors, kwargs, backend)
    dirty = {**tensors, "k": tensors["k"].clone(), "v": tensors["v"].clone()}
    for n in "kv":
        dirty[n][:, :, 30:] = math.nan
    got = testing.run(accel.softmax_attention, dirty, kwargs, backend)
    for key, value in clean.named().items():
        testing.assert_same(got.named()[key], value, key)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_skips_hidden_values(backend):
    """One query, whose keys a kernel may read where they lie: what is hidden and not finite does not reach it."""
    q, k, v = (torch.randn(2, 2, n, 16) for n in (1, 40, 40))
    mask = (torch.arange(40) < 30).view(1, 1, 1, 40)
    available(backend, {"q": q, "k": k, "v": v}, {"mask": mask})
    clean = accel.softmax_attention(q, k, v, mask=mask, backend=backend)
    for x in (k, v):
        x[:, :, 30:] = math.nan
    testing.assert_same(accel.softmax_attention(q, k, v, mask=mask, backend=backend), clean, "out")


# --- outputs, dropout, memory ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_is_fresh(backend):
    tensors, kwargs = by_name("one_projection").make(torch.float32, "cpu", 0)
    available(backend, tensors, kwargs)
    before = {n: t.clone() for n, t in tensors.items()}
    out, lse = accel.softmax_attention(**tensors, **kwargs, return_lse=True, backend=backend)
    out.zero_()
    lse.zero_()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), f"{name} changed with the output"


def test_output_lies_in_memory_as_q_does():
    for name in ("plain", "heads_inside_tokens"):
        tensors, kwargs = by_name(name).make(torch.float32, "cpu", 0)
        available("cpu", tensors, kwargs)
        out = accel.softmax_attention(**tensors, **kwargs, backend="cpu")
        turned = out.transpose(1, 2) if name == "heads_inside_tokens" else out
        assert turned.is_contiguous(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_the_stated_share_and_the_expectation(backend):
    # q and k are 0 and v is 1: an output is the share of the weights kept, over 1 − p
    q, v = torch.zeros(2, 4, 128, 8), torch.ones(2, 4, 64, 8)
    k = torch.zeros(2, 4, 64, 8)
    kwargs = {"dropout_p": 0.3}
    available(backend, {"q": q, "k": k, "v": v}, kwargs)
    torch.manual_seed(0)
    out = accel.softmax_attention(q, k, v, **kwargs, backend=backend)
    assert torch.equal(out[..., :1].expand_as(out), out), "a weight is dropped for all channels of its value"
    kept = out[..., 0] * 0.7 * 64
    assert_close(kept, kept.round(), "softmax", torch.float32)
    draws = kept.numel() * 64
    assert abs(kept.sum().item() / draws - 0.7) < 5 * math.sqrt(0.7 * 0.3 / draws)  # five standard deviations
    assert kept.std() > 0.5 * math.sqrt(64 * 0.7 * 0.3), "rows are drawn alike"
    assert not torch.equal(accel.softmax_attention(q, k, v, **kwargs, backend=backend), out), "the same seed twice"
    torch.manual_seed(0)
    repeated = accel.softmax_attention(q, k, v, **kwargs, backend=backend)
    testing.assert_same(repeated, out, "the generator's seed repeats the draw")


@pytest.mark.parametrize("rule", ["toeplitz", "t5", "alibi", "tensor", "window"])
def test_memory_is_linear_in_the_tokens(rule):
    from accel.benchmarks._machine import peak_memory

    T, heads = 2048, 4
    q = torch.randn(1, heads, T, 16).requires_grad_()
    how = {
        "toeplitz": {"bias_table": torch.zeros(2 * T - 1, heads).requires_grad_(), "bias_index": "toeplitz"},
        "t5": {"bias_table": torch.zeros(32, heads).requires_grad_(), "bias_index": T5Buckets()},
        "alibi": {"alibi_slopes": torch.zeros(heads).requires_grad_()},
        "tensor": {"bias_table": torch.zeros(9, heads).requires_grad_(), "bias_index": random_index(T, T, 9).int()},
        "window": {"window": (300, 0), "pattern": BlockCausal(64), "sinks": torch.zeros(heads).requires_grad_()},
    }[rule]
    available("cpu", {"q": q, "k": q, "v": q}, how)

    def call():
        accel.softmax_attention(q, q, q, **how, backend="cpu").sum().backward()

    call()
    peak = peak_memory(call, "cpu")
    if peak is None:
        pytest.skip("this system does not tell peak memory")
    square = heads * T * T * 4 / 2**20
    assert peak < square / 4, f"{peak:.1f} MiB where one T·S tensor has {square:.0f}"


LEVELS = ["portable", "avx2", "avx512", "avx512_bf16"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "name", ["plain", "gqa_3", "head_size_40", "t5", "index", "everything", "everything_packed", "exact_bias"]
)
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
            testing.check_values(accel.softmax_attention, by_name(name), "cpu", dtype)
    finally:
        extension.set_isa(info["isa"])


def test_flops_are_counted_the_same_for_every_backend():
    from torch.utils.flop_counter import FlopCounterMode

    tensors, kwargs = by_name("value_size_larger").make(torch.float32, "cpu", 0)
    counts = {}
    for backend in BACKENDS:
        if OP.backend(backend).why_not(OP.prepare(**tensors, **kwargs)) is None:
            with FlopCounterMode(display=False) as counter:
                accel.softmax_attention(**tensors, **kwargs, backend=backend)
            counts[backend] = counter.get_total_flops()
    assert counts == dict.fromkeys(counts, 2 * 2 * 4 * 21 * 34 * (8 + 72))


# --- bad input: an error that holds the numbers, before any kernel runs ---


@dataclasses.dataclass
class Bad:
    name: str
    error: type[Exception]
    words: str  # regular expression
    change: dict


def offsets(*values, dtype=torch.int32, device="cpu"):
    return torch.tensor(values, dtype=dtype, device=device)


INT = {"dtype": torch.int64}
META = {"device": "meta"}
BAD = [
    Bad("rank_3", ValueError, r"q must be .*\(4, 6, 8\)", {"q": zeros(4, 6, 8)}),
    Bad("rank_5_of_v", ValueError, r"v must be .*\(1, 2, 4, 7, 8\)", {"v": zeros(1, 2, 4, 7, 8)}),
    Bad("not_a_tensor", TypeError, "q must be .* got list", {"q": [1.0]}),
    Bad("keys_not_a_tensor", TypeError, "k must be .* got NoneType", {"k": None}),
    Bad("integer_q", TypeError, "q must be .*int64", {"q": zeros(2, 4, 6, 8, **INT)}),
    Bad("complex_v", TypeError, "v must be .*complex64", {"v": zeros(2, 2, 7, 8, dtype=torch.complex64)}),
    Bad("dtypes_differ", TypeError, "float32, torch.bfloat16", {"k": zeros(2, 2, 7, 8, dtype=torch.bfloat16)}),
    Bad("k_elsewhere", ValueError, "k is on meta but q is on cpu", {"k": zeros(2, 2, 7, 8, **META)}),
    Bad(
        "batches_differ",
        ValueError,
        r"\(2, 4, 6, 8\).*\(3, 2, 7, 8\)",
        {"k": zeros(3, 2, 7, 8), "v": zeros(3, 2, 7, 8)},
    ),
    Bad("sizes_differ", ValueError, r"\(2, 4, 6, 8\).*\(2, 2, 7, 16\)", {"k": zeros(2, 2, 7, 16)}),
    Bad("keys_and_values_differ", ValueError, r"\(2, 2, 7, 8\).*\(2, 2, 5, 8\)", {"v": zeros(2, 2, 5, 8)}),
    Bad(
        "heads_do_not_divide",
        ValueError,
        r"divide.*\(2, 4, 6, 8\).*\(2, 3, 7, 8\)",
        {"k": zeros(2, 3, 7, 8), "v": zeros(2, 3, 7, 8)},
    ),
    Bad("no_heads_of_keys", ValueError, r"divide.*\(2, 0, 7, 8\)", {"k": zeros(2, 0, 7, 8), "v": zeros(2, 0, 7, 8)}),
    Bad("scale_infinite", ValueError, "scale=inf", {"scale": math.inf}),
    Bad("scale_nan", ValueError, "scale=nan", {"scale": math.nan}),
    Bad("softcap_zero", ValueError, "softcap=0.0", {"softcap": 0.0}),
    Bad("softcap_negative", ValueError, "softcap=-30.0", {"softcap": -30.0}),
    Bad("softcap_nan", ValueError, "softcap=nan", {"softcap": math.nan}),
    Bad("softcap_infinite", ValueError, "softcap=inf", {"softcap": math.inf}),
    Bad("dropout_1", ValueError, "dropout_p=1.0", {"dropout_p": 1.0}),
    Bad("dropout_negative", ValueError, "dropout_p=-0.1", {"dropout_p": -0.1}),
    Bad("dropout_nan", ValueError, "dropout_p=nan", {"dropout_p": math.nan}),
    Bad("causal_word", ValueError, "causal='upper'", {"causal": "upper"}),
    Bad("causal_number", ValueError, "causal=2", {"causal": 2}),
    Bad("window_of_one_number", ValueError, "window=5", {"window": 5}),
    Bad("window_of_three", ValueError, r"window=\(1, 2, 3\)", {"window": (1, 2, 3)}),
    Bad("window_negative", ValueError, r"window=\(-2, 0\)", {"window": (-2, 0)}),
    Bad("window_not_whole", ValueError, r"window=\(1.5, 0\)", {"window": (1.5, 0)}),
    Bad("pattern_of_wrong_kind", TypeError, "pattern must be .* got 'causal'", {"pattern": "causal"}),
    Bad("prefix_for_other_batch", ValueError, r"2 sequences, got \(3,\)", {"pattern": PrefixLM([1, 2, 3])}),
    Bad("prefix_float", ValueError, "float32", {"pattern": PrefixLM([1.0, 2.0])}),
    Bad("prefix_negative", ValueError, r"at least 0.*-1", {"pattern": PrefixLM([3, -1])}),
    Bad("prefix_negative_int", ValueError, r"at least 0.*-2", {"pattern": PrefixLM(-2)}),
    Bad("diffusion_not_square", ValueError, "T=6, S=7", {"pattern": BlockDiffusion(2)}),
    Bad("two_diffusions", ValueError, r"at most one.*n=2.*n=3", {"pattern": [BlockDiffusion(2), BlockDiffusion(3)]}),
    Bad("mask_not_boolean", TypeError, "mask must be boolean.*float32", {"mask": zeros(6, 7)}),
    Bad("mask_not_a_tensor", TypeError, "mask must be boolean.*list", {"mask": [True]}),
    Bad("mask_elsewhere", ValueError, "mask is on meta .* cpu", {"mask": zeros(6, 7, dtype=torch.bool, **META)}),
    Bad("mask_shape", ValueError, r"mask .*\(2, 4, 6, 7\).*\(1, 1, 6, 8\)", {"mask": zeros(6, 8, dtype=torch.bool)}),
    Bad("mask_rank_5", ValueError, r"mask .*\(1, 1, 1, 6, 7\)", {"mask": zeros(1, 1, 1, 6, 7, dtype=torch.bool)}),
    Bad("mask_of_kv_heads", ValueError, r"mask .*\(2, 2, 6, 7\)", {"mask": zeros(2, 2, 6, 7, dtype=torch.bool)}),
    Bad("bias_shape", ValueError, r"bias .*\(2, 4, 6, 7\).*\(1, 4, 7, 6\)", {"bias": zeros(4, 7, 6)}),
    Bad("bias_boolean", TypeError, "bias must be .*bool", {"bias": zeros(6, 7, dtype=torch.bool)}),
    Bad("bias_elsewhere", ValueError, "bias is on meta .* cpu", {"bias": zeros(6, 7, **META)}),
    Bad("table_without_index", TypeError, "bias_index must be .*NoneType", {"bias_table": zeros(12, 4)}),
    Bad("index_without_table", ValueError, "bias_index needs bias_table.*toeplitz", {"bias_index": "toeplitz"}),
    Bad("table_of_other_heads", ValueError, r"\(R, 4\).*\(12, 2\)", {"bias_table": zeros(12, 2), **WHOLE}),
    Bad("table_flat", ValueError, r"\(R, 4\).*\(48,\)", {"bias_table": zeros(48), **WHOLE}),
    Bad("table_empty", ValueError, r"\(0, 4\)", {"bias_table": zeros(0, 4), "bias_index": T5Buckets()}),
    Bad("table_integer", TypeError, "bias_table .*int64", {"bias_table": zeros(12, 4, **INT), **WHOLE}),
    Bad("table_elsewhere", ValueError, "bias_table is on meta", {"bias_table": zeros(12, 4, **META), **WHOLE}),
    Bad("toeplitz_rows", ValueError, r"= 12 rows, got .*\(13, 4\)", {"bias_table": zeros(13, 4), **WHOLE}),
    Bad("index_word", ValueError, "got 'circulant'", {"bias_table": zeros(12, 4), "bias_index": "circulant"}),
    Bad("index_float", TypeError, "bias_index .*float32", {"bias_table": zeros(12, 4), "bias_index": zeros(6, 7)}),
    Bad("index_boolean", TypeError, "bias_index .*bool", {"bias_table": zeros(12, 4), "bias_index": zeros(6, 7) > 0}),
    Bad(
        "index_shape",
        ValueError,
        r"\(6, 7\), got .*\(7, 6\)",
        {"bias_table": zeros(12, 4), "bias_index": zeros(7, 6, **INT)},
    ),
    Bad(
        "index_outside",
        ValueError,
        "from 0 to 12, .*rows 0 to 11",
        {"bias_table": zeros(12, 4), "bias_index": torch.arange(42).view(6, 7) % 13},
    ),
    Bad(
        "index_negative",
        ValueError,
        "from -1 to",
        {"bias_table": zeros(12, 4), "bias_index": torch.arange(42).view(6, 7) % 5 - 1},
    ),
    Bad(
        "index_outside_toeplitz",
        ValueError,
        "from 5 to 5, ",
        {"bias_table": zeros(5, 4), "bias_index": zeros(6, 7, **INT) + 5},
    ),
    Bad(
        "index_elsewhere",
        ValueError,
        "bias_index is on meta",
        {"bias_table": zeros(12, 4), "bias_index": zeros(6, 7, dtype=torch.int64, **META)},
    ),
    Bad("t5_without_room", ValueError, "no room", {"bias_table": zeros(3, 4), "bias_index": T5Buckets()}),
    Bad(
        "t5_distance",
        ValueError,
        "max_distance=8.*16 buckets",
        {"bias_table": zeros(32, 4), "bias_index": T5Buckets(max_distance=8)},
    ),
    Bad(
        "grid_of_other_size",
        ValueError,
        r"T = S = 12 .*T=6, S=7, .*\(35, 4\)",
        {"bias_table": zeros(35, 4), "bias_index": Grid2D(3, 4)},
    ),
    Bad("slopes_shape", ValueError, r"alibi_slopes must be \(4,\).*\(2,\)", {"alibi_slopes": zeros(2)}),
    Bad("slopes_integer", TypeError, "alibi_slopes .*int64", {"alibi_slopes": zeros(4, **INT)}),
    Bad("slopes_elsewhere", ValueError, "alibi_slopes is on meta", {"alibi_slopes": zeros(4, **META)}),
    Bad("sinks_shape", ValueError, r"sinks must be \(4,\).*\(4, 1\)", {"sinks": zeros(4, 1)}),
    Bad("sinks_integer", TypeError, "sinks .*int64", {"sinks": zeros(4, **INT)}),
    Bad("packed_batch", ValueError, r"\(1, H, total, D\), got .*\(2, 4, 6, 8\)", {"cu_seqlens_q": offsets(0, 6)}),
    Bad("cu_k_alone", ValueError, r"cu_seqlens_k needs cu_seqlens_q, got .*\(2,\)", {"cu_seqlens_k": offsets(0, 7)}),
    Bad("no_such_backend", ValueError, "no backend 'cuda9'; it has cpu", {"backend": "cuda9"}),
    Bad(
        "backend_refuses",
        NotImplementedError,
        "multiple of 8 .* not 12",
        {"q": zeros(2, 4, 6, 12), "k": zeros(2, 2, 7, 12), "backend": "cpu"},
    ),
    Bad(
        "backend_refuses_size", NotImplementedError, "up to 256, not 264", {"v": zeros(2, 2, 7, 264), "backend": "cpu"}
    ),
    Bad(
        "backend_refuses_dtype",
        NotImplementedError,
        "not torch.float64",
        {n: zeros(2, h, t, 8, dtype=torch.float64) for n, h, t in (("q", 4, 6), ("k", 2, 7), ("v", 2, 7))}
        | {"backend": "cpu"},
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_input(bad):
    good = {"q": zeros(2, 4, 6, 8), "k": zeros(2, 2, 7, 8), "v": zeros(2, 2, 7, 8)}
    accel.softmax_attention(**good)
    with pytest.raises(bad.error, match=bad.words):
        accel.softmax_attention(**{**good, **bad.change})


EIGHT = offsets(0, 3, 8)
BAD_PACKED = [
    Bad("decreasing", ValueError, r"without falling, got \[0, 5, 3, 8\]", {"cu_seqlens_q": offsets(0, 5, 3, 8)}),
    Bad("negative", ValueError, r"\[0, -2, 8\]", {"cu_seqlens_q": offsets(0, -2, 8)}),
    Bad("too_long", ValueError, r"the 8 packed tokens .*\[0, 3, 9\]", {"cu_seqlens_q": offsets(0, 3, 9)}),
    Bad("too_short", ValueError, r"the 8 packed tokens .*\[0, 3, 7\]", {"cu_seqlens_q": offsets(0, 3, 7)}),
    Bad("does_not_start_at_0", ValueError, r"\[1, 3, 8\]", {"cu_seqlens_q": offsets(1, 3, 8)}),
    Bad(
        "long_list_is_cut",
        ValueError,
        r"\[0, 1, 2, 3, 4, 5, '...', 8, 8, 8, 8, 7\]",
        {"cu_seqlens_q": offsets(*range(9), 8, 8, 8, 7)},
    ),
    Bad("wrong_dtype", TypeError, "cu_seqlens_q must be int32 or int64, got torch.float32", {"cu_seqlens_q": zeros(3)}),
    Bad("int16", TypeError, "got torch.int16", {"cu_seqlens_q": offsets(0, 8, dtype=torch.int16)}),
    Bad("a_list", TypeError, "got list", {"cu_seqlens_q": [0, 8]}),
    Bad("one_number", ValueError, r"\(1,\)", {"cu_seqlens_q": offsets(0)}),
    Bad("two_axes", ValueError, r"\(1, 2\)", {"cu_seqlens_q": offsets([0, 8])}),
    Bad("elsewhere", ValueError, "cu_seqlens_q is on meta", {"cu_seqlens_q": offsets(0, 8, device="meta")}),
    Bad("keys_decrease", ValueError, r"cu_seqlens_k .*\[0, 9, 8\]", {"cu_seqlens_k": offsets(0, 9, 8)}),
    Bad("keys_elsewhere", ValueError, "cu_seqlens_k is on meta", {"cu_seqlens_k": offsets(0, 3, 8, device="meta")}),
    Bad("other_number_of_sequences", ValueError, r"\(3,\).*\(2,\)", {"cu_seqlens_k": offsets(0, 8)}),
    Bad("keys_differ", ValueError, r"\(1, 2, 8, 8\).*\(1, 2, 9, 8\)", {"k": zeros(1, 2, 9, 8), "v": zeros(1, 2, 9, 8)}),
    Bad("dense_mask", ValueError, r"'mask': \(1, 1, 8, 8\)", {"mask": zeros(8, 8, dtype=torch.bool)}),
    Bad("dense_bias", ValueError, r"'bias': \(1, 2, 1, 1\)", {"bias": zeros(2, 1, 1)}),
    Bad(
        "index_tensor",
        ValueError,
        r"a rule, not a tensor of \(8, 8\)",
        {"bias_table": zeros(9, 2), "bias_index": zeros(8, 8, **INT)},
    ),
    Bad("grid", ValueError, r"sequences of 8 tokens", {"bias_table": zeros(21, 2), "bias_index": Grid2D(2, 4)}),
    Bad("toeplitz_even", ValueError, "got 10 rows", {"bias_table": zeros(10, 2), **WHOLE}),
    Bad("toeplitz_short", ValueError, "reach 4, the 7 rows .* reach 3", {"bias_table": zeros(7, 2), **WHOLE}),
    Bad("prefix_for_other_number", ValueError, r"2 sequences, got \(1,\)", {"pattern": PrefixLM([1])}),
    Bad("diffusion_of_odd_length", ValueError, r"even length", {"pattern": BlockDiffusion(2)}),
    Bad(
        "diffusion_of_two_offsets",
        ValueError,
        "as many queries as keys",
        {"pattern": BlockDiffusion(2), "cu_seqlens_k": EIGHT.clone()},
    ),
    Bad(
        "alibi_and_table",
        NotImplementedError,
        "packed alike",
        {
            "cu_seqlens_k": EIGHT.clone(),
            "alibi_slopes": zeros(2),
            "bias_table": zeros(32, 2),
            "bias_index": T5Buckets(),
        },
    ),
]


@pytest.mark.parametrize("bad", BAD_PACKED, ids=lambda bad: bad.name)
def test_bad_packed_input(bad):
    good = {n: zeros(1, 2, 8, 8) for n in "qkv"} | {"cu_seqlens_q": EIGHT}
    accel.softmax_attention(**good)
    with pytest.raises(bad.error, match=bad.words):
        accel.softmax_attention(**{**good, **bad.change})


@pytest.mark.parametrize("rule", [BlockCausal, BlockDiffusion])
@pytest.mark.parametrize("n", [0, -3, 2.5, None])
def test_a_block_has_a_size(rule, n):
    with pytest.raises(ValueError, match=f"{rule.__name__} takes a positive block size, got {n}"):
        rule(n)


@pytest.mark.parametrize("sizes", [(0, 3, 0), (3, 0, 1), (2, 2, -1)])
def test_a_grid_has_sides(sizes):
    with pytest.raises(ValueError, match=f"h={sizes[0]}, w={sizes[1]}, extra={sizes[2]}"):
        Grid2D(*sizes)


def test_zero_and_one_stand_for_false_and_true():
    q, k, v = drawn(5, 5)
    for number in (0, 1):
        got = accel.softmax_attention(q, k, v, causal=number, backend="reference")
        assert torch.equal(got, accel.softmax_attention(q, k, v, causal=bool(number), backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("B", "H", "T", "S", "E"),
    [(0, 2, 3, 4, 8), (2, 0, 3, 4, 8), (2, 2, 0, 4, 8), (2, 2, 3, 0, 8), (2, 2, 0, 0, 8), (2, 2, 3, 4, 0)],
)
def test_nothing_in_nothing_out(B, H, T, S, E, backend):
    q, k, v = (zeros(B, H, n, d).add_(1.0).requires_grad_() for n, d in ((T, 8), (S, 8), (S, E)))
    how = {"bias": zeros(1, 1, T, S).requires_grad_(), "causal": True, "alibi_slopes": zeros(H).requires_grad_()}
    if E == 0 and backend == "cpu":
        with pytest.raises(NotImplementedError, match="not 0"):
            accel.softmax_attention(q, k, v, backend=backend)
        return
    for given in ({}, how):
        out, lse = accel.softmax_attention(q, k, v, **given, return_lse=True, backend=backend)
        assert out.shape == (B, H, T, E)
        assert torch.equal(
            out,
            torch.ones_like(out)
            if S and not given
            else torch.where(lse[..., None] == -math.inf, 0.0, torch.ones_like(out)),
        )
        if S == 0:
            assert (lse == -math.inf).all()
        leaves = [q, k, v, *(x for x in given.values() if isinstance(x, torch.Tensor))]
        for x, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves, allow_unused=True), strict=True):
            assert grad is None or (grad.shape == x.shape and grad.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_keys_leave_the_sink(backend):
    q, none = zeros(1, 2, 3, 8), zeros(1, 2, 0, 8)
    sinks = torch.tensor([0.5, -2.0])
    out, lse = accel.softmax_attention(q, none, none, sinks=sinks, return_lse=True, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(lse, sinks[:, None].expand(2, 3)[None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_of_no_tokens(backend):
    none = zeros(1, 2, 0, 8).requires_grad_()
    out = accel.softmax_attention(none, none, none, cu_seqlens_q=offsets(0, 0, 0), causal=True, backend=backend)
    assert out.shape == (1, 2, 0, 8)
    out.sum().backward()
    assert none.grad.shape == none.shape
