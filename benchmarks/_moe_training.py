"""A small language model whose blocks hold experts, trained with each way to keep them busy alike: losses and loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import accel
from accel.benchmarks.flash_training import LanguageModel, Text, sources, train

EXPERTS, CHOICES = 8, 2
METHODS = ("nothing", "a loss over the batch", "a loss over each sequence", "a bias of the choice")
LOSS, RATE = 1e-2, 1e-2
"""The factor of the losses, and how far the bias moves in a step."""

TEXT = Text(channels=64, blocks=2, tokens=256, batch=4, steps=300)


@dataclass
class Curve:
    """One number a step."""

    loss: list[float] = field(default_factory=list)
    """Of the next byte, in nats, without what balances."""
    imbalance: list[float] = field(default_factory=list)
    """The largest load of an expert over the mean one, the mean over blocks."""


class Block(nn.Module):
    """Causal attention and experts; keeps the routing of its last call, and how many sequences it was of."""

    def __init__(self, channels: int, method: str) -> None:
        super().__init__()
        self.attention = accel.nn.MultiHeadAttention(channels, channels // 16, batch_first=True, causal=True)
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(2)])
        rate = RATE if method == METHODS[3] else None
        how = {"score": "sigmoid", "balance_rate": rate}
        self.experts = accel.nn.MoE(channels, channels, EXPERTS, CHOICES, **how)  # type: ignore[arg-type]
        self.method = method
        self.routing: accel.nn.Routing | None = None
        self.sequences = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        out, self.routing = self.experts(self.norms[1](x), return_routing=True)
        self.sequences = x.shape[0]
        return x + out

    def balance_loss(self) -> Tensor:
        assert self.routing is not None
        logits, _, indices = self.routing
        if self.method == METHODS[1]:
            return LOSS * accel.moe_balance_loss(logits, indices, score="sigmoid")
        if self.method == METHODS[2]:
            return LOSS * accel.moe_balance_loss(
                logits, indices, kind="sequence", score="sigmoid", batch=self.sequences
            )
        return logits.new_zeros(())

    def imbalance(self) -> float:
        assert self.routing is not None
        return accel.moe_load(self.routing.indices, EXPERTS).imbalance.item()


def balanced_models(text: Text, seed: int, tick: Callable[[], None] = lambda: None) -> dict[str, Curve]:
    """A curve for each method; all models begin alike, and see the same bytes."""
    data = sources(text.bytes)
    return {method: _trained(method, data, text, seed, tick) for method in METHODS}


def _trained(method: str, data: Tensor, text: Text, seed: int, tick: Callable[[], None]) -> Curve:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [Block(text.channels, method) for _ in range(text.blocks)]
        model = LanguageModel(text.channels, blocks)
    curve = Curve()

    def after() -> None:
        curve.imbalance.append(sum(block.imbalance() for block in blocks) / len(blocks))
        for block in blocks:
            if block.experts.balance is not None:
                block.experts.balance.update()
        tick()

    curve.loss = train(model, data, text, seed, after, lambda: sum(block.balance_loss() for block in blocks))
    return curve
