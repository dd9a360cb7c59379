"""Awkward calls of mixed chunk attention as data, for the checks of every backend."""

import torch
from _pairs import cumulative, random_index

from accel import Grid2D, T5Buckets, testing
from accel.ops.linear.gau_strips import ACTIVATIONS
from accel.testing import Case

BACKENDS = ("cpu", "torch", "reference")
FP32 = (torch.float32,)


def case(
    name,
    T,
    chunk,
    *,
    B=2,
    s=16,
    s2=12,
    E=24,
    gate=True,
    rows=None,
    mask=False,
    state=False,
    lengths=None,
    layout=None,
    change=None,
    family="gau",
    dtypes=testing.KERNEL_DTYPES,
    **kwargs,
):
    """A case with random tensors: ``rows`` of the table, ``lengths`` of packed sequences, ``state`` whether it begins
    with one; ``change(tensors)`` edits the values in place."""

    def make(dtype, device, seed):
        generator = torch.Generator().manual_seed(seed)
        inner = torch.float64 if dtype == torch.float64 else torch.float32

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        sizes = {"quad_q": s, "quad_k": s, "lin_q": s2, "lin_k": s2, "v": E} | ({"gate": E} if gate else {})
        tensors = {n: (layout or (lambda x: x))(normal(B, T, size)).to(device, dtype) for n, size in sizes.items()}
        if rows is not None:
            tensors["bias_table"] = normal(rows, 1).to(device, inner)
        if state:
            tensors["initial_state"] = normal(B if lengths is None else len(lengths), s2, E).to(device, inner)
        if mask:
            tensors["key_mask"] = (torch.rand(B, T, generator=generator) < 0.7).to(device)
        if change is not None:
            change(tensors)
        given = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()}
        given = {"chunk_size": chunk, "quad_scale": 0.3, "lin_scale": 0.2, **given}
        if lengths is not None:
            given["cu_seqlens"] = cumulative(lengths, device=device)
        return tensors, given

    main = ["quad_q", "quad_k", "lin_q", "lin_k", "v", *(["gate"] if gate else [])]
    batched = [*main, *(["key_mask"] if mask else []), *(["initial_state"] if state else [])]
    return Case(name, make, family, dtypes, batched=tuple(batched), autocast=tuple(main))


def integers(tensors):
    """Small integers, so that with scales that are powers of two every sum is exact in fp32."""
    for name in ("quad_q", "quad_k", "lin_q", "lin_k", "v", "gate", "initial_state"):
        if name in tensors:
            tensors[name].round_().clamp_(-2, 2)
    for name in ("quad_q", "quad_k"):
        tensors[name][..., 2:] = 0.0


WHOLE = {"bias_index": "toeplitz"}
PACKED = {"B": 1, "lengths": (7, 0, 1, 13, 0, 29, 17)}  # 67 tokens

PLAIN = [
    *(case(f"{name}", 37, 16, activation=name) for name in ACTIVATIONS),
    *(case(f"{name}_causal", 70, 32, activation=name, causal=True, rows=63, **WHOLE) for name in ACTIVATIONS),
    case("one_token", 1, 8, causal=True, state=True, E=8, s=8, s2=8, B=3),
    case("one_chunk", 61, 64, s=5, s2=7, E=9),
    case("prime_causal", 131, 61, causal=True, s=12, s2=5, E=40, state=True),
    case("blocks", 300, 300, B=1, s=8, E=8, causal=True),
    case("blocks_full", 531, 270, B=1, s=8, E=16),
    case("default_chunks", 530, 256, B=1, causal=True),
    case("value_size_8", 29, 8, E=8, causal=True, state=True),
    case("value_size_1", 29, 8, E=1, s=1, s2=1, causal=True, state=True),
    case("value_size_200", 150, 50, E=200, B=1, s2=40, causal=True, state=True),
    case("value_size_300_full", 150, 64, E=300, B=1, s2=33),
    case("s_128", 70, 32, s=128, s2=128, E=136, causal=True, B=1),
    case("without_gate", 41, 16, gate=False, causal=True, state=True),
    case("without_scales", 41, 16, quad_scale=None, lin_scale=None),
    case("scales_0", 41, 16, quad_scale=0.0, lin_scale=0.0, activation="laplace", causal=True),
]

RULES = [
    case("mask", 43, 16, mask=True),
    case("mask_causal", 71, 32, mask=True, causal=True, state=True),
    case("mask_blocks", 300, 290, mask=True, B=1, s=8, E=8, activation="sigmoid"),
    case("toeplitz", 43, 16, rows=31, **WHOLE),
    case("toeplitz_short", 11, 16, rows=31, **WHOLE, causal=True),
    case("toeplitz_blocks", 300, 290, B=1, rows=579, **WHOLE, s=8, E=8, causal=True),
    case("t5", 70, 32, rows=20, bias_index=T5Buckets(False, 50), causal=True, mask=True),
    case("t5_short", 19, 32, rows=32, bias_index=T5Buckets()),
    case("grid", 84, 42, rows=143, bias_index=Grid2D(6, 7)),
    case("index", 43, 16, rows=19, bias_index=random_index(16, 16, 19)),
    case("index_short", 11, 16, rows=19, bias_index=random_index(16, 16, 19), mask=True),
    case("index_blocks", 300, 290, B=1, rows=19, bias_index=random_index(290, 290, 19, torch.int32), s=8, E=8),
    case("packed", 67, 16, **PACKED),
    case("packed_causal", 67, 8, **PACKED, causal=True, state=True),
    case("packed_scales", 67, 16, **PACKED, lin_scale=None, rows=31, **WHOLE),
    case("packed_300", 300, 64, B=1, lengths=(130, 1, 0, 101, 68), causal=True, activation="silu"),
    case("dropout", 43, 16, dropout_p=0.25),
    case("dropout_causal", 300, 256, B=1, dropout_p=0.6, causal=True, mask=True),
    case("dropout_packed", 67, 16, **PACKED, dropout_p=0.3, causal=True),
    case("everything", 75, 32, mask=True, rows=63, **WHOLE, state=True, causal=True, dropout_p=0.2),
]

EXACT = [
    case("exact", 37, 16, change=integers, quad_scale=0.5, lin_scale=0.25, family="exact", dtypes=FP32),
    case("exact_causal", 131, 32, E=136, B=1, change=integers, quad_scale=0.5, lin_scale=0.25, causal=True, state=True,
         family="exact", dtypes=FP32),
]  # fmt: skip

CASES = [*PLAIN, *RULES, *EXACT]

# Small, with a batch of two; between them every tensor that has a gradient.
BEHAVIOUR = [
    case("causal", 11, 4, s=8, s2=4, E=8, rows=7, **WHOLE, causal=True, state=True, mask=True, activation="laplace"),
    case("full", 6, 3, s=8, s2=4, E=16, rows=6, bias_index=random_index(3, 3, 6), dropout_p=0.3),
]
PACKED_BEHAVIOUR = case("packed", 11, 4, B=1, s=8, s2=4, E=8, lengths=(3, 0, 1, 7), causal=True, state=True)

TINY = {"B": 1, "s": 2, "s2": 2, "E": 3}
GRADIENTS = [
    *(case(name, 5, 2, **TINY, activation=name, causal=True, state=True) for name in ACTIVATIONS),
    case("full", 5, 3, **TINY, rows=5, **WHOLE, activation="silu", dropout_p=0.3, mask=True),
    case("packed", 6, 2, **TINY, lengths=(2, 0, 1, 3), rows=3, bias_index=random_index(2, 2, 3), activation="laplace"),
]


def by_name(name):
    return next(c for c in (*CASES, *BEHAVIOUR) if c.name == name)
