"""Awkward calls of gated attention as data, for the checks of every backend."""

import torch
from _pairs import (
    batch_entry_without_keys,
    cumulative,
    no_keys_at_all,
    padding,
    random_index,
    rows_without_keys,
    some_minus_inf,
    toeplitz_index,
)

from accel import BlockCausal, BlockDiffusion, Grid2D, PrefixLM, T5Buckets, testing
from accel.ops.linear.gau_strips import ACTIVATIONS
from accel.testing import Case

BACKENDS = ("cpu", "torch", "reference")
FP32 = (torch.float32,)


def case(
    name,
    T,
    S=None,
    *,
    B=2,
    H=1,
    Hkv=None,
    D=16,
    E=24,
    gate=True,
    mask=None,
    bias=None,
    rows=None,
    lengths=None,
    lengths_k=None,
    small=torch.float32,
    heads=True,
    layout=None,
    change=None,
    family="gau",
    dtypes=testing.KERNEL_DTYPES,
    **kwargs,
):
    """A case with random tensors: ``mask`` and ``bias`` are shapes, ``rows`` those of the table, ``lengths`` of packed
    sequences, ``heads`` whether there is an axis of them; ``small`` is the dtype of the small tensors (None: that of
    q), and ``change(tensors)`` edits the values in place."""
    S = T if S is None else S

    def make(dtype, device, seed):
        generator = torch.Generator().manual_seed(seed)
        inner = torch.float64 if dtype == torch.float64 else small or dtype

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        main = {"q": normal(B, H, T, D), "k": normal(B, Hkv or H, S, D), "v": normal(B, Hkv or H, S, E)}
        if gate:
            main["gate"] = normal(B, H, T, E)
        tensors = {n: (layout or (lambda x: x))(x).to(device, dtype) for n, x in main.items()}
        if not heads:
            tensors = {n: x.squeeze(1) for n, x in tensors.items()}
        if bias is not None:
            tensors["bias"] = normal(*bias).to(device, inner)
        if rows is not None:
            tensors["bias_table"] = normal(rows, H).to(device, inner)
        if mask is not None:
            tensors["mask"] = (torch.rand(mask, generator=generator) < 0.7).to(device)
        if change is not None:
            change(tensors)
        given = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()}
        if lengths is not None:
            given["cu_seqlens_q"] = cumulative(lengths, device=device)
        if lengths_k is not None:
            given["cu_seqlens_k"] = cumulative(lengths_k, device=device)
        return tensors, given

    given = [n for n, there in (("q", True), ("k", True), ("v", True), ("gate", gate)) if there]
    batched = [*given, *(n for n, shape in (("mask", mask), ("bias", bias)) if shape and shape[0] == B > 1)]
    sums = ("bias_table",) if rows == 1 else ()
    return Case(name, make, family, dtypes, sums=sums, batched=tuple(batched), autocast=tuple(given))


def heads_inside_tokens(x):
    """A view of (B, T, H, D) memory, as a projection makes it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def integers(tensors):
    """Small integers, so that with a scale that is a power of two every sum is exact in fp32 and fits into bf16."""
    for name in ("q", "k", "v", "gate"):
        if name in tensors:
            tensors[name].round_().clamp_(-2, 2)
    for name in ("q", "k"):
        tensors[name][..., 2:] = 0.0


def one_step_each(tensors):
    """One key of each query has weight 1 through the bias, all others 0: exact in every dtype."""
    for name in ("q", "k"):
        tensors[name].zero_()
    for name in ("v", "gate"):
        tensors[name].mul_(3).round_()
    bias = tensors["bias"].fill_(-3.0)
    at = torch.randint(bias.shape[-1], (*bias.shape[:-1], 1), generator=torch.Generator().manual_seed(1))
    bias.scatter_(-1, at.to(bias.device), 1.0)


def one_row_of_the_table(tensors):
    for name in ("q", "k"):
        tensors[name].zero_()
    for name in ("v", "gate"):
        tensors[name].mul_(3).round_()
    tensors["bias_table"].fill_(-2.0)
    tensors["bias_table"][0] = 1.0


WHOLE = {"bias_index": "toeplitz"}
T5 = {"bias_index": T5Buckets(), "rows": 32}
PACKED = {"B": 1, "lengths": (7, 0, 1, 13, 0, 29, 17)}  # 67 tokens
PACKED_CROSS = {"B": 1, "lengths": (7, 0, 1, 13, 5, 29), "lengths_k": (3, 4, 11, 0, 5, 41)}  # 55 and 64

PLAIN = [
    *(case(f"{name}", 37, 70, activation=name) for name in ACTIVATIONS),
    *(case(f"{name}_causal_bias", 70, activation=name, causal=True, bias=(2, 1, 70, 70)) for name in ACTIVATIONS),
    *(case(f"{name}_without_gate", 33, gate=False, activation=name, rows=65, **WHOLE) for name in ACTIVATIONS),
    case("one_of_each", 1, 1, D=8, E=8, B=3),
    case("one_query", 1, 71),
    case("one_query_of_many_heads", 1, 600, B=1, H=4, Hkv=1, mask=(1, 1, 1, 600), bias=(1, 4, 1, 600)),
    case("few_queries", 3, 300, causal=True, E=136, activation="laplace", dropout_p=0.2),
    case("one_key", 37, 1, activation="silu"),
    case("prime", 61, 59, H=3, D=24, E=40),
    case("tile_edges", 65, 257, B=1, D=32),
    case("strips", 531, 259, B=1, D=8, E=16, causal=True),
    case("value_size_8", 29, 41, E=8, D=8),
    case("value_size_520", 67, 41, E=520, B=1),
    case("value_size_1032_causal", 131, E=1032, B=1, D=128, causal=True, dtypes=FP32),
    case("s_128", 33, 70, D=128, E=64),
    case("gqa", 19, 31, H=6, Hkv=2),
    case("mqa_causal", 70, H=5, Hkv=1, causal=True, **T5),
    case("heads_inside_tokens", 37, 41, H=2, layout=heads_inside_tokens, causal=True),
    case("without_heads", 37, 41, heads=False, bias=(2, 37, 41), mask=(2, 37, 41)),
    case("scale_negative", 17, 23, scale=-0.3),
    case("scale_0", 17, 23, scale=0.0, activation="laplace"),
]

MASKS = [
    case("causal", 137, causal=True),
    case("causal_more_keys", 29, 131, B=1, causal=True),
    case("causal_more_queries", 70, 29, causal=True, activation="silu"),
    case("top_left_more_keys", 29, 70, causal="top_left"),
    case("window_5_3", 41, window=(5, 3)),
    case("window_causal_300", 300, B=1, window=(31, 0)),
    case("window_laplace", 41, 67, window=(9, 2), activation="laplace"),
    case("padding_right", 23, 70, mask=(2, 1, 1, 70), change=padding(70, 33)),
    case("padding_left_causal", 71, mask=(2, 1, 1, 71), change=padding(30, 71, left=True), causal=True),
    case("mask_full", 23, 31, H=2, mask=(2, 2, 23, 31), activation="sigmoid"),
    case("mask_2d", 37, 137, mask=(37, 137)),
    case("rows_without_keys", 23, 70, mask=(2, 1, 23, 70), change=rows_without_keys, activation="laplace"),
    case("rows_without_keys_softmax", 23, 70, mask=(2, 1, 23, 70), change=rows_without_keys, activation="softmax_plus"),
    case("batch_entry_without_keys", 23, 31, mask=(2, 1, 1, 31), change=batch_entry_without_keys, activation="sigmoid"),
    case("no_keys_at_all", 23, 31, mask=(31,), change=no_keys_at_all, activation="softmax"),
    case("prefix_list", 47, pattern=PrefixLM([0, 33])),
    case("block_causal_300", 300, B=1, pattern=BlockCausal(32), activation="sigmoid"),
    case("block_diffusion_262", 262, B=1, pattern=BlockDiffusion(19)),
    case("patterns_softmax_plus", 46, pattern=[BlockDiffusion(5), PrefixLM([9, 30])], activation="softmax_plus"),
]

PACKS = [
    case("packed", 67, **PACKED),
    case("packed_causal_t5", 67, **PACKED, causal=True, bias_index=T5Buckets(False, 50), rows=20),
    case("packed_toeplitz", 67, **PACKED, **WHOLE, rows=57, activation="laplace"),
    case("packed_softmax_plus", 67, **PACKED, activation="softmax_plus", H=2),
    case("packed_300", 300, B=1, lengths=(130, 1, 0, 101, 68), causal=True),
    case("packed_cross", 55, 64, **PACKED_CROSS, activation="silu"),
    case("packed_cross_causal_t5", 55, 64, **PACKED_CROSS, causal=True, **T5),
    case("packed_dropout", 67, **PACKED, dropout_p=0.3, causal=True),
]

BIASES = [
    case("bias_full_same_dtype", 23, 70, bias=(2, 1, 23, 70), small=None),
    case("bias_of_heads", 37, 41, B=3, H=2, bias=(1, 2, 37, 41)),
    case("bias_2d", 37, 141, bias=(37, 141), activation="laplace"),
    case("bias_of_keys", 37, 41, bias=(2, 1, 1, 41)),
    case("bias_of_queries", 37, 41, bias=(2, 1, 37, 1)),
    case("minus_inf_in_bias", 23, 70, bias=(2, 1, 23, 70), change=some_minus_inf, activation="silu"),
    case("minus_inf_softmax_plus", 23, 70, bias=(2, 1, 23, 70), change=some_minus_inf, activation="softmax_plus"),
    case("toeplitz", 37, rows=73, **WHOLE),
    case("toeplitz_300", 300, 130, rows=429, B=1, **WHOLE, causal=True),
    case("toeplitz_softmax", 37, 70, rows=106, **WHOLE, activation="softmax"),
    case("t5_one_way", 70, bias_index=T5Buckets(False, 50), rows=20, causal=True),
    case("t5_laplace", 70, **T5, mask=(2, 1, 1, 70), change=padding(33, 70), activation="laplace"),
    case("grid", 42, bias_index=Grid2D(6, 7), rows=143, B=3),
    case("grid_extra", 37, bias_index=Grid2D(5, 7, 2), rows=120, H=2),
    case("grid_300", 300, bias_index=Grid2D(13, 23, 1), rows=25 * 45 + 3, B=1),
    case("index", 37, 41, bias_index=random_index(37, 41, 19), rows=19, B=3),
    case("index_300", 300, 41, bias_index=random_index(300, 41, 19, torch.int32), rows=19, B=1, activation="silu"),
    case("index_toeplitz", 37, 41, bias_index=toeplitz_index(37, 41, 17), rows=17),
    case("bias_and_table", 23, 31, bias=(2, 1, 23, 31), rows=53, **WHOLE),
]

OTHERS = [
    case("dropout", 37, 41, dropout_p=0.25),
    case("dropout_causal_300", 300, B=1, dropout_p=0.6, causal=True, activation="softmax"),
    case("fp16_scale", 300, B=1, D=128, E=64, scale=300.0**-2, activation="laplace"),
    case("everything", 47, H=4, Hkv=2, causal=True, window=(30, 0), mask=(2, 1, 1, 47), bias=(2, 1, 47, 1), **T5,
         dropout_p=0.2),
]  # fmt: skip

EXACT = [
    case("exact", 37, 70, change=integers, scale=0.5, family="exact", dtypes=FP32),
    case("exact_causal_520", 131, E=520, B=1, change=integers, scale=0.5, causal=True, family="exact", dtypes=FP32),
    case("exact_gqa", 33, 41, H=4, Hkv=2, change=integers, scale=1.0, window=(9, 5), family="exact", dtypes=FP32),
    case("exact_few", 2, 301, E=520, B=1, change=integers, scale=0.5, causal=True, family="exact", dtypes=FP32),
    case("exact_bias", 37, 70, bias=(2, 1, 37, 70), change=one_step_each, family="exact"),
    case("exact_toeplitz", 37, rows=73, change=one_row_of_the_table, family="exact", **WHOLE),
]

CASES = [*PLAIN, *MASKS, *PACKS, *BIASES, *OTHERS, *EXACT]

# Small, with a batch of two; between them every tensor that has a gradient.
BEHAVIOUR = [
    case(
        "dense", 5, 7, H=4, Hkv=2, D=8, E=8, bias=(2, 1, 5, 7), bias_index=random_index(5, 7, 6), rows=6,
        mask=(2, 1, 1, 7), change=padding(6, 7), activation="laplace",
    ),
    case("rules", 6, 7, H=2, D=8, E=16, causal=True, window=(3, -1), **T5, dropout_p=0.3),
    case("by_row", 6, 7, H=2, D=8, E=16, causal=True, bias=(2, 1, 6, 7), activation="softmax_plus"),
]  # fmt: skip
PACKED_BEHAVIOUR = case("packed", 11, B=1, D=8, E=8, lengths=(3, 0, 1, 7), causal=True, **T5)

TINY = {"B": 1, "D": 2, "E": 3}
GRADIENTS = [
    *(case(name, 3, 4, **TINY, H=2, Hkv=1, activation=name, causal=True) for name in ACTIVATIONS),
    case("bias", 3, 4, **TINY, bias=(1, 1, 3, 4), activation="silu", dropout_p=0.3),
    case("toeplitz", 3, 4, **TINY, rows=6, **WHOLE, window=(1, 1), activation="laplace"),
    case("grid", 5, **TINY, rows=12, bias_index=Grid2D(2, 2, 1), mask=(5,), activation="sigmoid"),
    case("index", 3, 4, **TINY, rows=3, bias_index=random_index(3, 4, 3), gate=False, activation="softmax_plus"),
    case("packed", 6, **TINY, lengths=(2, 0, 1, 3), rows=5, **WHOLE, activation="laplace"),
]


def by_name(name):
    return next(c for c in (*CASES, *BEHAVIOUR) if c.name == name)
