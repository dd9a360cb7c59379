"""A call of softmax attention with random tensors as a case, the layouts they come in, and changes of their values."""

import math

import torch
from _pairs import cumulative

from accel import testing
from accel.testing import Case

BACKENDS = ("cpu", "reference")


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


def turned(tensors, name):
    """The values of a tensor in memory whose last two axes have changed places."""
    tensors[name] = tensors[name].mT.contiguous().mT


LEAST = torch.finfo(torch.float32).min


def huge(value):
    """Of every three rows, one carries ``value`` for all keys, and one for half of them and twice that elsewhere."""

    def change(tensors):
        bias = tensors["bias"]
        bias[..., 1::3, :] = bias[..., 2::3, :] = value
        bias[..., 2::3, ::2] *= 2

    return change


def filled(name, value, upto=None):
    """All of a bias or a table, or what it has for the first keys, is ``value``."""

    def change(tensors):
        tensors[name][..., :upto] = value

    return change


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


def drawn(T, S, B=2, H=2, Hkv=None, D=8, E=4):
    generator = torch.Generator().manual_seed(3)
    shapes = (B, H, T, D), (B, Hkv or H, S, D), (B, Hkv or H, S, E)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
