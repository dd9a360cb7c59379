"""Training FLASH beside softmax attention: the time of a token by the length of the text, and two language models.

A block of FLASH is two of its layers, as the paper has them, and one of softmax is attention and a feed-forward
network; both have as many parameters. They compute different functions, so each is judged by its own in float64.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import accel
from accel import dispatch
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import Case, Cost, Provider, Short, UnavailableError
from accel.nn.attention import attend_heads
from accel.ops.linear.flash_mix import OP as MIX

NAME = "flash_training"
PROVIDERS = ("accel", "softmax")
TRAINING = "forward+backward"
CHANNELS, HEAD, CHUNK = 256, 64, 256
T5 = accel.T5Buckets(bidirectional=False)

# --- blocks of equal size ---


class FlashBlock(nn.Module):
    def __init__(self, channels: int, relative: bool = False) -> None:
        super().__init__()
        how: dict[str, Any] = {"causal": True, "chunk_size": CHUNK, "norm": "layer"}
        how["relative"] = T5 if relative else None
        self.layers = nn.Sequential(*[accel.nn.FLASH(channels, **how) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class SoftmaxBlock(nn.Module):
    """``parameters`` are those of the whole; ``attend`` stands in for our op where it is given."""

    def __init__(self, channels: int, parameters: int, relative: bool = False) -> None:
        super().__init__()
        how: dict[str, Any] = {"batch_first": True, "causal": True, "relative": T5 if relative else None}
        self.attention = accel.nn.MultiHeadAttention(channels, channels // HEAD, **how)
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(2)])
        rest = parameters - count(self) - channels
        hidden = round(rest / (2 * channels + 1))
        self.feed = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))
        self.attend: Callable[..., Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        if self.attend is None:
            mixed = self.attention(h, h, h, need_weights=False)[0]
        else:
            mixed = self.attention.out_proj(attend_heads(self.attention, h, h, h, self.attend))
        x = x + mixed
        out: Tensor = x + self.feed(self.norms[1](x))
        return out


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **rules: Any) -> Tensor:
    """For float64, in which our op would keep every weight."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# --- the time of a token ---


@dataclass(frozen=True)
class Blocks:
    """Both blocks, as functions of the input and the parameters of both: a call takes those of one."""

    flash: FlashBlock
    softmax: SoftmaxBlock

    @classmethod
    def drawn(cls, channels: int, seed: int = 0, relative: bool = False) -> Blocks:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            flash = FlashBlock(channels, relative)
            return cls(flash, SoftmaxBlock(channels, count(flash), relative))

    def parameters(self) -> list[Tensor]:
        return [p.detach() for block in (self.flash, self.softmax) for p in block.parameters()]

    def _names(self, block: nn.Module) -> list[str]:
        return [name for name, _ in block.named_parameters()]

    def of_flash(self, x: Tensor, *parameters: Tensor) -> Tensor:
        names = self._names(self.flash)
        out: Tensor = functional_call(self.flash, dict(zip(names, parameters, strict=False)), (x,))
        return out

    def backend(self, x: Tensor, *parameters: Tensor) -> str:
        """Of the part within chunks."""
        layer: Any = self.flash.layers[0]
        q, v = (x.new_empty(1, CHUNK, size) for size in (layer.query_key_dim, layer.inner_dim))
        return dispatch.select(MIX, MIX.prepare(q, q, q, q, v, v, causal=True)).name

    def of_softmax(self, x: Tensor, *parameters: Tensor) -> Tensor:
        names = self._names(self.softmax)
        mine = parameters[-len(names) :]
        self.softmax.attend = _sdpa if x.dtype == torch.float64 else None
        out: Tensor = functional_call(self.softmax, dict(zip(names, mine, strict=True)), (x,))
        return out


def _cost(blocks: Blocks, tokens: int) -> Cost:
    """Of FLASH's block, by its products: three for each parameter of a dense layer and token, and those of the mix. The
    rates of softmax rows count that work, too."""
    dense = sum(p.numel() for p in blocks.flash.parameters() if p.dim() == 2 and min(p.shape) > 4)
    layer: Any = blocks.flash.layers[0]
    size, width = layer.query_key_dim, layer.inner_dim
    seen = CHUNK // 2
    mix = 2 * seen * (4 * size + 3 * width) + 12 * size * width
    return Cost(tokens * (6 * dense + 2 * mix), 4 * (3 * count(blocks.flash) + 4 * tokens * CHANNELS))


def _case(blocks: Blocks, tokens: int, device: str, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        x = torch.randn(1, tokens, CHANNELS, generator=generator, device=device)
        return tuple([t.to(device, dtype) for t in (x, *blocks.parameters())])

    return Case(
        op=NAME,
        group="block",
        variant=f"T {tokens >> 10}K",
        shape=f"B1 T{tokens} C{CHANNELS}, {count(blocks.flash)} parameters",
        dtype=dtype,
        inputs=make,
        reference=blocks.of_flash,
        providers=(
            Provider("accel", lambda: blocks.of_flash, backend=blocks.backend),
            Provider("softmax", lambda: blocks.of_softmax, computes=blocks.of_softmax),
        ),
        costs={TRAINING: _cost(blocks, tokens)},
        family="linear",
        tokens=tokens,
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """In float32, in which most people train on a CPU."""
    if torch.float32 in dtypes:
        blocks = Blocks.drawn(CHANNELS)
        for tokens in (1024, 4096, 16384):
            yield _case(blocks, tokens, device, torch.float32)


SHORT = Short(rivals=("softmax",), cpu=(), cuda=())
GOALS = (
    Goal(
        "FLASH: time a token of 1K, 4K and 16K, forward+backward, the longest over the shortest",
        NAME,
        "spread",
        "cpu",
        {"group": "block", "dtype": "fp32", "mode": TRAINING},
        at_most=1.25,
    ),
)

# --- language models on the sources of Python's own library ---


@dataclass(frozen=True)
class Text:
    """Sizes of the models and their training."""

    channels: int = 128
    blocks: int = 2
    tokens: int = 512
    batch: int = 4
    steps: int = 300
    rate: float = 2e-3
    bytes: int = 4 << 20


def sources(most: int) -> Tensor:
    """The bytes of the standard library's modules in the order of their names, the first ``most``."""
    found, length = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found.append(path.read_bytes())
        length += len(found[-1])
        if length >= most:
            break
    if not length:
        raise UnavailableError(f"there are no sources in {sysconfig.get_paths()['stdlib']}")
    return torch.frombuffer(bytearray(b"".join(found)[:most]), dtype=torch.uint8).long()


class LanguageModel(nn.Module):
    """Blocks between an embedding of bytes and logits of the next."""

    def __init__(self, channels: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, channels)
        self.blocks = nn.Sequential(*blocks)
        self.to_logits = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 256))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.to_logits(self.blocks(self.embedding(x)))
        return logits


def language_models(text: Text, seed: int, tick: Callable[[], None] = lambda: None) -> dict[str, list[float]]:
    """Losses a step, in nats a byte, of a FLASH model and a softmax model of as many parameters on the same bytes."""
    data = sources(text.bytes)
    losses: dict[str, list[float]] = {}
    for name in ("FLASH", "softmax"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            both = [Blocks.drawn(text.channels, seed + i, relative=True) for i in range(text.blocks)]
            model = LanguageModel(text.channels, [b.flash if name == "FLASH" else b.softmax for b in both])
        losses[name] = train(model, data, text, seed, tick)
    return losses


def _windows(data: Tensor, text: Text, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Bytes from anywhere, and beside each the one that follows it."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - text.tokens, (text.batch,), generator=generator)
        window = data[starts[:, None] + torch.arange(text.tokens + 1)]
        yield window[:, :-1], window[:, 1:]


def train(
    model: nn.Module,
    data: Tensor,
    text: Text,
    seed: int,
    tick: Callable[[], None],
    beside: Callable[[], Tensor | float] = lambda: 0.0,
) -> list[float]:
    """Losses a step, in nats a byte. What ``beside`` gives after each forward is added to what is minimised."""
    windows = _windows(data, text, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=text.rate, weight_decay=0.01)
    warm = max(1, text.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm))
    losses = []
    for _ in range(text.steps):
        given, following = next(windows)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(given).flatten(0, 1), following.flatten())
        (loss + beside()).backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        tick()
    return losses
