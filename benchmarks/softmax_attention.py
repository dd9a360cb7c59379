"""Softmax attention: rows, rivals, costs and goals.

The rival is ``scaled_dot_product_attention`` as models call it: a relative bias is gathered from its table into a dense
tensor at every call, and padded sequences are computed whole with their padding masked. Yardsticks that compute
something else of the same inputs stand beside: attention without the bias, and without the mask.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import accel
from accel import dispatch
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import Case, Cost, Pick, Provider, Short
from accel.ops.attention.softmax_attention import OP

NAME = "softmax_attention"
PROVIDERS = ("accel", "sdpa", "sdpa without bias", "accel without mask", "triton", "sdpa efficient")
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """Queries, keys and heads of a row, and the rules it has (the arguments of our op)."""

    group: str
    variant: str
    tokens: int
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    size: int = 64
    rules: Mapping[str, Any] = field(default_factory=dict)
    live: float = 1.0  # the share of pairs that some tile must compute
    family: str = "softmax_few"  # of accel.testing.TOLERANCES

    @property
    def pairs(self) -> float:
        return self.batch * self.heads * self.tokens * self.tokens * self.live

    def __str__(self) -> str:
        kv = "" if self.kv_heads == self.heads else f"/{self.kv_heads}"
        return f"B{self.batch} T{self.tokens} h{self.heads}{kv} D{self.size}"


# --- costs ---


def costs(pairs: float, tokens: int, shape: Shape, itemsize: int, modes: Sequence[str]) -> dict[str, Cost]:
    """Two products forward (q·k, p·v) and five backward over the pairs that are seen.

    Forward reads q, k, v and writes the output; backward reads them with the output and its gradient, and writes
    three gradients. ``tokens`` counts those of all batch entries.
    """
    matmul = int(2 * pairs * shape.size)
    q, kv = tokens * shape.heads * shape.size * itemsize, 2 * tokens * shape.kv_heads * shape.size * itemsize
    forward, backward = Cost(2 * matmul, 2 * q + kv), Cost(5 * matmul, 4 * q + 2 * kv)
    both = Cost(forward.flops + backward.flops, forward.moved + backward.moved)
    known = {"forward": forward, "backward": backward, "forward+backward": both}
    return {mode: known[mode] for mode in modes}


# --- what is computed ---


def ours(rules: Mapping[str, Any], backend: str | None = None) -> Function:
    def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        out = accel.softmax_attention(q, k, v, bias_table=table, **rules, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return function


def reference(rules: Mapping[str, Any]) -> Function:
    """Our reference a batch entry and key head at a time, which keeps one head's weights and no more."""
    function = ours(rules, "reference")

    def by_head(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        group = q.shape[1] // k.shape[1]
        entries = []
        for b in range(q.shape[0]):
            heads = []
            for h in range(k.shape[1]):
                mine = slice(h * group, (h + 1) * group)
                part = [q[b : b + 1, mine], k[b : b + 1, h : h + 1], v[b : b + 1, h : h + 1]]
                part += [] if table is None else [table[:, mine]]
                heads.append(checkpoint(function, *part, use_reentrant=False))
            entries.append(torch.cat(heads, 1))
        return torch.cat(entries)

    return by_head


def sdpa(rules: Mapping[str, Any], index: Tensor | None = None) -> Function:
    """torch's own, its bias gathered from the table as timm and transformers do."""

    def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        mask = None
        if table is not None and index is not None:
            mask = table[index].permute(2, 0, 1).unsqueeze(0).to(q.dtype)
            if q.device.type == "cuda":
                mask = mask.contiguous()  # as its kernel for biases needs it
        how = {"is_causal": bool(rules.get("causal", False)), "enable_gqa": q.shape[1] != k.shape[1]}
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **how)

    return function


def without_table(function: Function) -> Function:
    return lambda q, k, v, table: function(q, k, v)


def efficient(function: Function) -> Function:
    """Through torch's memory-efficient kernel, the one on a GPU that takes a bias with a gradient."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return function(*inputs)

    return call


def _backend(rules: Mapping[str, Any]) -> Callable[..., str]:
    def name(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> str:
        return dispatch.select(OP, OP.prepare(q, k, v, bias_table=table, **rules)).name

    return name


def _provider(name: str, function: Function, computes: Function | None = None, **more: Any) -> Provider:
    return Provider(name, lambda: function, computes=computes, **more)


def _inputs(shape: Shape, device: str, dtype: torch.dtype, rows: int = 0) -> Callable[..., tuple[Tensor, ...]]:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        main = [normal(shape.batch, h, shape.tokens, shape.size).to(dtype) for h in heads]
        # parameters are kept in fp32 beside half inputs, too; as training leaves them, a softmax is not one key's
        return (*main, normal(rows, shape.heads) / 2) if rows else tuple(main)

    return make


def _case(
    shape: Shape,
    device: str,
    dtype: torch.dtype,
    modes: Sequence[str],
    providers: Sequence[Provider],
    rows: int = 0,
) -> Case:
    tokens = shape.batch * shape.tokens
    return Case(
        op=NAME,
        group=shape.group,
        variant=shape.variant,
        shape=str(shape),
        dtype=dtype,
        inputs=_inputs(shape, device, dtype, rows),
        reference=reference(shape.rules),
        providers=tuple(providers),
        costs=costs(shape.pairs, tokens, shape, dtype.itemsize, modes),
        family=shape.family,
    )


# --- a relative bias from a table, with its gradient ---


def _t5(tokens: int, device: str) -> Tensor:
    at = torch.arange(tokens, device=device)
    return accel.T5Buckets().rows_of(at[:, None] - at, 32)


def _toeplitz(tokens: int, device: str) -> Tensor:
    at = torch.arange(tokens, device=device)
    return at[:, None] - at + tokens - 1


def _arbitrary(tokens: int, device: str) -> Tensor:
    """The rows of a Toeplitz index in another order: as many rows of the table, and no rule between neighbours."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).to(device)
    return _toeplitz(tokens, device)[order]


def _table_cases(
    device: str,
    dtype: torch.dtype,
    modes: Sequence[str],
    tokens: int,
    batch: int = 1,
) -> Iterator[Case]:
    found: list[tuple[str, str, Callable[[int, str], Tensor], Any, int]] = [
        ("toeplitz", "T5 buckets", _t5, accel.T5Buckets(), 32),
        ("index", "any order", _arbitrary, None, 2 * tokens - 1),
        ("toeplitz", "every distance", _toeplitz, "toeplitz", 2 * tokens - 1),
    ]
    for kind, variant, dense, rule, rows in found:
        index = dense(tokens, device)
        rules = {"bias_index": index if rule is None else rule}
        shape = Shape(f"{kind} {tokens}", variant, tokens, batch=batch, rules=rules)
        providers = [
            _provider("accel", ours(rules), backend=_backend(rules)),
            _provider("sdpa", sdpa(rules, index)),
        ]
        if kind == "toeplitz" and dtype == torch.float32:
            providers.append(_provider("sdpa without bias", without_table(sdpa({})), without_table(reference({}))))
        if device == "cuda":
            providers.append(_provider("sdpa efficient", efficient(sdpa(rules, index))))
        yield _case(shape, device, dtype, modes, providers, rows)


# --- no bias ---

PLAIN = (
    Shape("plain", "T 512", 512),
    Shape("plain", "T 1024", 1024),
    Shape("plain", "T 2048", 2048),
    Shape("plain", "T 1024 causal", 1024, rules={"causal": True}, live=0.5),
    Shape("plain", "T 2048 causal", 2048, rules={"causal": True}, live=0.5),
    Shape("plain", "T 1024 D 128", 1024, size=128),
    Shape("plain", "T 1024 D 128 causal", 1024, size=128, rules={"causal": True}, live=0.5),
    Shape("plain", "T 1024 causal, 4 heads share a key", 1024, kv_heads=2, rules={"causal": True}, live=0.5),
    Shape("short", "T 256", 256),
    Shape("short", "T 256 causal", 256, rules={"causal": True}, live=0.5),
)

LONG = tuple(
    Shape("8K", variant, 8192, 2, 16, 16, 128, {"causal": True} if live < 1 else {}, live, "softmax_long")
    for variant, live in (("full", 1.0), ("causal", 0.5))
)


def _plain_case(shape: Shape, device: str, dtype: torch.dtype, modes: Sequence[str]) -> Case:
    providers = [
        _provider("accel", ours(shape.rules), backend=_backend(shape.rules)),
        _provider("sdpa", sdpa(shape.rules)),
    ]
    if device == "cuda":
        providers.append(_provider("triton", ours(shape.rules, "triton"), backend=lambda *inputs: "triton"))
    return _case(shape, device, dtype, modes, providers)


# --- masks: time against that without one ---

SPAN = 256
MASKED = 2048  # tokens


def _window_share(tokens: int, span: int) -> float:
    """Of the pairs, those in the window itself, up to ``span`` keys a query."""
    return sum(min(i + 1, span) for i in range(tokens)) / tokens**2


MASKS = (
    Shape("mask", "window", MASKED, rules={"window": (SPAN - 1, 0)}, live=_window_share(MASKED, SPAN)),
    Shape("mask", "blocks", MASKED, rules={"pattern": accel.BlockCausal(SPAN)}, live=(1 + SPAN / MASKED) / 2),
)


def live_tiles(shape: Shape, side: int = 64) -> float:
    """The share of ``side`` × ``side`` tiles in which any pair is seen: what is left where the others are skipped."""
    args = OP.prepare(*[torch.empty(1, 1, shape.tokens, 8)] * 3, **shape.rules)
    assert args.rows is not None
    first, end = args.rows[0, :, 0], args.rows[0, :, 1]
    live = 0
    for at in range(0, shape.tokens, side):
        rows = slice(at, at + side)
        low, high = int(first[rows].min()), int(end[rows].max())
        live += -(-high // side) - low // side
    return live / (-(-shape.tokens // side)) ** 2


def _mask_case(shape: Shape, device: str, dtype: torch.dtype, modes: Sequence[str]) -> Case:
    providers = [
        _provider("accel", ours(shape.rules), backend=_backend(shape.rules)),
        _provider("accel without mask", ours({}), reference({}), backend=_backend({})),
    ]
    return _case(shape, device, dtype, modes, providers)


# --- a packed batch against the padded one ---


def drawn_lengths(count: int = 16, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randint(32, 512) for _ in range(count)]


LENGTHS = drawn_lengths()
SAVED = len(LENGTHS) * max(LENGTHS) ** 2 / sum(n * n for n in LENGTHS)
"""Pairs of the padded batch over pairs of the real tokens."""


class Packed:
    """The two forms of one batch. The inputs hold both: packed ``(1, H, total, D)``, then padded ``(B, H, S, D)``."""

    def __init__(self, device: str) -> None:
        self.starts = [0, *itertools.accumulate(LENGTHS)]
        self.cu_seqlens = torch.tensor(self.starts, dtype=torch.int32, device=device)
        self.real = torch.arange(max(LENGTHS), device=device) < torch.tensor(LENGTHS, device=device)[:, None]

    def ours(self, *inputs: Tensor) -> Tensor:
        return ours({"cu_seqlens_q": self.cu_seqlens})(*inputs[:3])

    def backend(self, *inputs: Tensor) -> str:
        return _backend({"cu_seqlens_q": self.cu_seqlens})(*inputs[:3])

    def reference(self, *inputs: Tensor) -> Tensor:
        pieces = itertools.pairwise(self.starts)
        return torch.cat([reference({})(*[x[:, :, a:b] for x in inputs[:3]]) for a, b in pieces], 2)

    def padded(self, *inputs: Tensor) -> Tensor:
        q, k, v = inputs[3:]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.real[:, None, None])

    def padded_reference(self, *inputs: Tensor) -> Tensor:
        q, k, v = inputs[3:]
        each = [reference({})(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n]) for b, n in enumerate(LENGTHS)]
        return torch.cat(each)


def _packed_case(device: str, dtype: torch.dtype, modes: Sequence[str]) -> Case:
    packed = Packed(device)
    shape = Shape("packed", "lengths 32 to 512", packed.starts[-1])

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        wide = (len(LENGTHS), shape.heads, max(LENGTHS), shape.size)
        padded = [torch.randn(wide, generator=generator, device=device).to(dtype) for _ in range(3)]
        joined = [x.transpose(1, 2)[packed.real].transpose(0, 1)[None].contiguous() for x in padded]
        return *joined, *padded

    pairs = shape.heads * sum(n * n for n in LENGTHS)
    providers = [
        _provider("accel", packed.ours, backend=packed.backend),
        _provider("sdpa", packed.padded, packed.padded_reference),
    ]
    return Case(
        op=NAME,
        group=shape.group,
        variant=shape.variant,
        shape=f"{len(LENGTHS)} sequences, {packed.starts[-1]} tokens, longest {max(LENGTHS)}",
        dtype=dtype,
        inputs=make,
        reference=packed.reference,
        providers=tuple(providers),
        costs=costs(pairs, packed.starts[-1], shape, dtype.itemsize, modes),
        family="softmax_few",
    )


# --- all rows ---


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """All rows of the op, those that goals are about first."""
    both = ["forward", "forward+backward"]
    if device == "cuda":
        yield from _cuda_cases(dtypes)
        return
    for dtype in dtypes:
        for tokens in (512, 1024):
            yield from _table_cases(device, dtype, both, tokens)
        for shape in PLAIN:
            yield _plain_case(shape, device, dtype, both)
        yield _packed_case(device, dtype, both)
        for shape in MASKS:
            yield _mask_case(shape, device, dtype, both)


def _cuda_cases(dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    modes = ["forward", "backward"]
    for dtype in dtypes:
        for shape in LONG:
            yield _plain_case(shape, "cuda", dtype, modes)
        yield from _table_cases("cuda", dtype, ["forward", "forward+backward"], 2048, batch=8)
        yield _packed_case("cuda", dtype, modes)
        for shape in MASKS:
            yield _mask_case(shape, "cuda", dtype, modes)


SHORT = Short(
    rivals=("sdpa",),
    cpu=(
        Pick("T5's bias, 512 tokens", "toeplitz 512", "T5 buckets"),
        Pick("causal, 1024 tokens", "plain", "T 1024 causal", ("forward",)),
        Pick("packed batch against padded", "packed", "lengths 32 to 512", ("forward",)),
    ),
    cuda=(
        Pick("causal, 8192 tokens", "8K", "causal"),
        Pick("T5's bias, 2048 tokens", "toeplitz 2048", "T5 buckets"),
        Pick("8192 tokens", "8K", "full"),
    ),
)


# --- goals ---

HALF_DOT_PRODUCTS = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
TABLE_BOUNDS = {
    # dtype and mode -> how many times as fast as SDPA at 512 and at 1024 tokens
    ("fp32", "forward"): (1.8, 2.3),
    ("bf16", "forward"): (3.0, 3.0),
    ("fp32", "forward+backward"): (1.6, 2.0),
    ("bf16", "forward+backward"): (1.6, 2.0),
}


def _speed(name: str, group: str, dtype: str, mode: str, at_least: float, rival: str = "sdpa", **more: Any) -> Goal:
    where = {"group": group, "dtype": dtype, "mode": mode, **more.pop("where", {})}
    return Goal(f"{name}, {mode}, {dtype}", NAME, "speedup", "cpu", where, rival, at_least=at_least, **more)


def _cpu_goals() -> Iterator[Goal]:
    for (dtype, mode), bounds in TABLE_BOUNDS.items():
        for tokens, bound in zip((512, 1024), bounds, strict=True):
            yield _speed(f"bias by distance, T {tokens}", f"toeplitz {tokens}", dtype, mode, bound)
            yield _speed(f"bias by any index, T {tokens}", f"index {tokens}", dtype, mode, 1.5)
        where = {"group": "toeplitz 1024", "dtype": dtype, "mode": mode}
        growth = f"bias by distance, {mode}, {dtype}: peak memory of T 1024 over that of T 512"
        # linear is 2 and a dense bias 4; short rows fit in part into pages that the process holds already
        yield Goal(growth, NAME, "growth", "cpu", where, at_most=3.0, base={"group": "toeplitz 512"})
    for tokens in (512, 1024):
        name = f"bias by distance, T {tokens}, against SDPA without any bias"
        yield _speed(name, f"toeplitz {tokens}", "fp32", "forward", 1 / 1.2, "sdpa without bias")
    yield _speed("plain", "plain", "fp32", "forward", 1.0)
    if HALF_DOT_PRODUCTS:
        yield _speed("plain", "plain", "bf16", "forward", 1.8)
    for dtype in ("fp32", "bf16"):
        name = "packed against padded, over the work saved"
        yield _speed(name, "packed", dtype, "forward", 0.9, per=SAVED)
        for shape in MASKS:
            only = {"variant": shape.variant}
            name = f"{shape.variant} against no mask, over the tiles saved"
            saved = 1 / live_tiles(shape)
            yield _speed(name, "mask", dtype, "forward", 0.8, "accel without mask", per=saved, where=only)


def _cuda_goals() -> Iterator[Goal]:
    rates = {
        ("causal", "forward"): 640,
        ("full", "forward"): 690,
        ("causal", "backward"): 540,
        ("full", "backward"): 590,
    }
    for (variant, mode), rate in rates.items():
        where = {"group": "8K", "variant": variant, "dtype": "bf16", "mode": mode}
        yield Goal(f"8K {variant}, {mode}, bf16, TFLOP/s", NAME, "rate", "cuda", where, at_least=rate)
    for variant in ("causal", "full"):
        where = {"group": "8K", "variant": variant, "dtype": "bf16", "mode": "forward"}
        name = f"8K {variant}, forward, bf16, TFLOP/s of our own Triton"
        yield Goal(name, NAME, "rate", "cuda", where, at_least=470, of="triton")
    where = {"group": "toeplitz 2048", "dtype": "bf16", "mode": "forward+backward"}
    name = "bias by distance, T 2048, forward+backward, bf16, against the memory-efficient kernel"
    yield Goal(name, NAME, "speedup", "cuda", where, "sdpa efficient", at_least=3.0)


GOALS = (*_cpu_goals(), *_cuda_goals())
