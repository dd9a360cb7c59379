"""Awkward calls of linear attention as data, for the checks of every backend."""

import itertools

import torch

from accel import testing
from accel.ops.linear.feature_maps import ELEMENTWISE
from accel.testing import Case

FP32 = (torch.float32,)


def cumulative(lengths, dtype=torch.int32, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)


def heads_inside_tokens(x):
    """A view of (B, T, H, D) memory, as a projection makes it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def keys_of_one_head(x):
    return x[:, :1].expand_as(x)


def case(
    name,
    T,
    S=None,
    *,
    B=2,
    H=(2, 2, 2),
    D=16,
    E=None,
    decay=None,
    mask=False,
    state=False,
    lengths=None,
    lengths_k=None,
    projection=None,
    layout=None,
    change=None,
    family=None,
    dtypes=testing.KERNEL_DTYPES,
    **kwargs,
):
    """A case with random tensors. ``H``: the heads of q, k and v; ``decay``: "head" or "token"; ``state``: an initial
    one; ``lengths`` of packed sequences; ``projection``: the rows of performer's; ``change(tensors)`` edits values in
    place."""
    S = T if S is None else S
    E = D if E is None else E
    Hs = max(H[1:])

    def make(dtype, device, seed):
        generator = torch.Generator().manual_seed(seed)
        inner = torch.float64 if dtype == torch.float64 else torch.float32

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        main = normal(B, H[0], T, D), normal(B, H[1], S, D), normal(B, H[2], S, E)
        tensors = {n: (layout or (lambda x: x))(x.to(device, dtype)) for n, x in zip("qkv", main, strict=True)}
        if decay is not None:
            shape = (Hs,) if decay == "head" else (B, Hs, T)
            tensors["log_decay"] = (-0.3 * torch.rand(shape, generator=generator)).to(device, inner)
        if mask:
            tensors["key_mask"] = (torch.rand(B, S, generator=generator) < 0.7).to(device)
        given = dict(kwargs)
        if lengths is not None:
            given["cu_seqlens_q"] = cumulative(lengths, device=device)
        if lengths_k is not None:
            given["cu_seqlens_k"] = cumulative(lengths_k, device=device)
        if projection is not None:
            given["feature_map"] = ("performer", normal(projection, D).to(device, inner))
        if state:
            N = B if lengths is None else len(lengths)
            F = projection or (2 * D if isinstance(kwargs.get("feature_map"), tuple) else D)
            kv, k_sum = normal(N, Hs, F, E).to(device), normal(N, Hs, F).abs().to(device)
            given["initial_state"] = (kv, k_sum)
        if change is not None:
            change(tensors)
        return tensors, given

    outside = feature_map_of(kwargs) not in ELEMENTWISE  # features are rounded once more
    if family is None:  # divided by sums of few weights, or by all of them
        few = kwargs.get("normalize", True) and (kwargs.get("causal") or mask or lengths or S <= 5 or outside)
        family = "linear_few" if few else "linear"
    # a gradient that is a sum over all tokens of a head, of both signs
    sums = ("log_decay",) if decay == "head" else ()
    batched = ["q", "k", "v", *(["log_decay"] if decay == "token" else []), *(["key_mask"] if mask else [])]
    return Case(name, make, family, dtypes, sums=sums, batched=tuple(batched), autocast=("q", "k", "v"))


def feature_map_of(kwargs):
    return kwargs.get("feature_map", "elu1")


def integers(tensors):
    """Whole numbers whose sums stay exact in fp32."""
    for name in "qkv":
        tensors[name].round_().clamp_(-2.0, 2.0)


def steep(tensors):
    """Decay of −10 000 among little: a cumulative sum in fp32 forgets the little."""
    tensors["log_decay"].fill_(-0.001)[..., 40::67] = -1e4


def heavy(tensors):
    """−30 each: nothing is remembered, and what is computed from the ends of a block overflows."""
    tensors["log_decay"].fill_(-30.0)


def none(tensors):
    tensors["log_decay"].zero_()


def one_entry_masked(tensors):
    tensors["key_mask"][1] = False


CAUSAL = {"causal": True}
SUM = {"normalize": False}
RELU = {"feature_map": "relu"}
PACKED = {"B": 1, "lengths": (7, 0, 1, 13, 0, 70, 17)}  # 108 tokens
PACKED_CROSS = {"B": 1, "lengths": (7, 0, 1, 13, 5, 29), "lengths_k": (3, 4, 11, 0, 5, 41)}  # 55 and 64

CASES = [
    case("plain", 33),
    case("plain_200", 200, D=64, B=1),
    case("cross", 23, 70, E=24),
    case("cross_fewer_keys", 70, 5),
    case("one_query", 1, 37),
    case("one_of_each", 1, B=3, H=(5, 5, 5), eps=20.0),  # else the gradients of q and k cancel
    case("one_token_causal", 1, B=3, H=(5, 5, 5), **CAUSAL, eps=20.0),
    case("causal", 37, **CAUSAL),
    case("causal_prime", 131, D=24, E=40, H=(3, 3, 3), **CAUSAL),
    case("causal_64", 64, D=64, B=1, **CAUSAL),
    case("causal_65", 65, D=64, B=1, **CAUSAL),
    case("causal_200", 200, D=64, B=1, **CAUSAL),
    case("causal_1500", 1500, D=8, B=1, H=(1, 1, 1), **CAUSAL),
    case("size_8", 29, D=8, **CAUSAL),
    case("size_256", 70, D=256, B=1, H=(1, 1, 1), **CAUSAL),
    case("value_size_larger", 70, D=8, E=136, B=1, **CAUSAL),
    case("value_size_8", 70, D=72, E=8, B=1, **CAUSAL),
    case("gqa", 70, H=(6, 2, 2), **CAUSAL),
    case("mqa", 70, H=(5, 1, 1), B=1),
    case("mamba_heads", 70, H=(1, 1, 6), decay="token", **CAUSAL, **SUM, feature_map="identity"),
    case("mamba_groups", 70, H=(2, 2, 6), B=1, decay="token", **CAUSAL, **SUM, feature_map="identity"),
    case("more_keys_than_values", 40, H=(4, 4, 2), **CAUSAL),
    case("gqa_of_few_keys", 40, H=(8, 2, 4), **CAUSAL, decay="head"),
    case("heads_inside_tokens", 41, layout=heads_inside_tokens, **CAUSAL),
    case("keys_of_one_head", 41, layout=keys_of_one_head, **CAUSAL),
    case("sum", 70, **CAUSAL, **SUM),
    case("identity_sum", 150, **CAUSAL, **SUM, feature_map="identity", scale=0.25),
    case("relu", 70, D=64, **CAUSAL, **RELU),
    case("relu_8", 150, D=8, **CAUSAL, **RELU, family="linear_few"),
    case("squared_relu_8", 150, D=8, **CAUSAL, feature_map="squared_relu", family="linear_few"),
    case("relu_all", 70, **RELU, eps=1e-5),
    case("exp", 70, **CAUSAL, feature_map="exp"),
    case("scale", 70, **CAUSAL, scale=0.01, eps=0.1),
    case("scale_negative", 40, **CAUSAL, **SUM, scale=-0.5),
    case("masked", 70, mask=True),
    case("masked_causal", 70, mask=True, **CAUSAL, decay="token"),
    case("masked_entry", 40, mask=True, change=one_entry_masked),
    case("state", 70, **CAUSAL, state=True),
    case("state_all", 40, 23, state=True),
    case("state_decay", 70, **CAUSAL, state=True, decay="head", H=(4, 2, 2)),
    case("state_sum", 70, **CAUSAL, **SUM, state=True, decay="token"),
    case("head_decay", 150, **CAUSAL, decay="head"),
    case("token_decay", 150, **CAUSAL, decay="token", B=1),
    case("token_decay_identity", 150, **CAUSAL, **SUM, feature_map="identity", decay="token", B=1),
    case("no_decay", 70, **CAUSAL, decay="token", change=none),
    case("heavy_decay", 150, **CAUSAL, **SUM, decay="token", change=heavy),
    case("steep_decay", 150, **CAUSAL, decay="token", change=steep, family="linear_few"),
    case("packed", 108, **PACKED),
    case("packed_causal", 108, **PACKED, **CAUSAL, decay="token"),
    case("packed_causal_head", 108, **PACKED, **CAUSAL, decay="head", H=(4, 2, 2)),
    case("packed_state", 108, **PACKED, **CAUSAL, state=True, decay="token"),
    case("packed_cross", 55, 64, **PACKED_CROSS, E=24),
    case("packed_cross_state", 55, 64, **PACKED_CROSS, state=True),
    case("softmax", 40, 70, feature_map="softmax"),
    case("softmax_masked", 40, feature_map="softmax", mask=True),
    case("cosformer", 70, **CAUSAL, feature_map=("cosformer", 100), position=9),
    case("cosformer_packed", 108, **PACKED, feature_map=("cosformer", 128)),
    case("performer", 40, projection=24),
    case("performer_masked", 40, projection=24, mask=True, **CAUSAL),
]

EXACT = [
    case(f"exact_{T}", T, D=8, B=1, H=(1, 1, 1), **CAUSAL, **SUM, feature_map="identity", change=integers,
         family="exact", dtypes=FP32)
    for T in range(1, 131)
]  # fmt: skip

BEHAVIOUR = [
    case("tiny", 5, D=8, H=(2, 1, 1), **CAUSAL, decay="token", dtypes=(torch.float32, torch.bfloat16)),
    case("tiny_all", 5, 7, D=8, E=16, mask=True),
]
GRADIENTS = [
    case("tiny", 4, D=3, B=1, H=(2, 1, 1), **CAUSAL, decay="token"),
    case("tiny_state", 3, D=2, E=3, B=2, H=(1, 1, 2), **CAUSAL, decay="head", state=True),
    case("tiny_all", 3, 4, D=2, B=1, H=(1, 1, 1), mask=True, feature_map=("cosformer", 9)),
    case("tiny_packed", 5, D=2, B=1, H=(1, 1, 1), lengths=(2, 3), **CAUSAL),
]


def by_name(name):
    return next(c for c in CASES if c.name == name)
