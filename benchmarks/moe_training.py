"""A small language model of experts, trained with each way to keep them busy alike: its loss, and how loaded they are.

The model, its text and its windows are the same each time; only what balances differs. The Switch loss is taken over
parts of the batch as so many processes would take it, the global loss over the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import accel
from accel.benchmarks.flash_training import LanguageModel, Text, sources, train
from accel.nn.moe import Routing

EXPERTS, TOP_K, INNER = 8, 2, 128
HEAD = 16
PARTS = 4  # of a batch, each of which has a Switch loss of its own
TEXT = Text(channels=64, blocks=2, tokens=128, batch=8)
FACTOR = 0.01
"""Of the loss that balances, as in Switch Transformers."""
RATE = 0.005
"""Of the bias: five times DeepSeek-V3's, since there are but few steps."""


class Block(nn.Module):
    """Attention and a mixture of experts; ``routing`` is that of the last call."""

    def __init__(self, channels: int, rate: float | None) -> None:
        super().__init__()
        self.attention = accel.nn.MultiHeadAttention(channels, channels // HEAD, batch_first=True, causal=True)
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(2)])
        self.moe = accel.nn.MoE(channels, INNER, EXPERTS, TOP_K, balance_rate=rate)
        self.routing: Routing | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        made, self.routing = self.moe(self.norms[1](x), return_routing=True)
        out: Tensor = x + made
        return out


@dataclass
class Course:
    """What a training gave, a number each step."""

    losses: list[float] = field(default_factory=list)  # nats a byte
    imbalance: list[float] = field(default_factory=list)  # largest load over the mean, averaged over layers
    load: list[float] = field(default_factory=list)  # share of each expert of the first layer at the end, largest first


Loss = Callable[[Routing, Text], Tensor]


def _switch(routing: Routing, text: Text) -> Tensor:
    parts = zip(routing.logits.chunk(PARTS), routing.indices.chunk(PARTS), strict=True)
    return torch.stack([accel.moe_balance_loss(*part) for part in parts]).mean()


def _sequence(routing: Routing, text: Text) -> Tensor:
    return accel.moe_balance_loss(routing.logits, routing.indices, kind="sequence", batch=text.batch)


def _global(routing: Routing, text: Text) -> Tensor:
    return accel.moe_balance_loss(routing.logits, routing.indices, kind="global")


METHODS: dict[str, Loss | float | None] = {
    "nothing": None,
    "Switch loss": _switch,
    "sequence loss": _sequence,
    "global loss": _global,
    "bias": RATE,
}
"""A loss, or the rate of :class:`accel.nn.ExpertBias`."""


def train_all(text: Text, seed: int, tick: Callable[[], None] = lambda: None) -> dict[str, Course]:
    """What each method gives."""
    data = sources(text.bytes)
    return {name: _train_one(method, data, text, seed, tick) for name, method in METHODS.items()}


def _train_one(method: Loss | float | None, data: Tensor, text: Text, seed: int, tick: Callable[[], None]) -> Course:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rate = method if isinstance(method, float) else None
        blocks = [Block(text.channels, rate) for _ in range(text.blocks)]
        model = LanguageModel(text.channels, blocks)
    course, shares = Course(), []

    def beside() -> Tensor | float:
        routings = [block.routing for block in blocks if block.routing is not None]
        course.imbalance.append(_imbalance(routings))
        shares.append(accel.moe_load(routings[0].indices, EXPERTS).counts)
        if callable(method):
            return FACTOR * torch.stack([method(routing, text) for routing in routings]).sum()
        return 0.0

    def update() -> None:
        for block in blocks:
            if block.moe.balance is not None:
                block.moe.balance.update()
        tick()

    course.losses = train(model, data, text, seed, update, beside)
    last = torch.stack(shares[-max(1, text.steps // 10) :]).sum(0)
    course.load = (last / last.sum()).sort(descending=True).values.tolist()
    return course


def _imbalance(routings: Sequence[Routing]) -> float:
    every = [accel.moe_load(routing.indices, EXPERTS).imbalance for routing in routings]
    return float(torch.stack(every).mean())
