"""A small Llama trained in bf16 and with its linear layers in eight bits: the same weights, text and steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import accel
from accel.benchmarks._torchvision import allow_import
from accel.benchmarks.flash_training import Text, train
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import UnavailableError

NAME = "fp8_training"
SEEDS = (0, 1, 2)
LAST = 50  # steps whose losses are averaged
TEXT = Text(channels=256, blocks=3, tokens=128, batch=8, rate=1e-3)
PLAIN, EIGHT = "bf16", "FP8"
EACH = "Llama in FP8: largest difference of the last losses to bf16, %"
MEAN = "Llama in FP8: mean difference of the last losses to bf16, %"
GOALS = (
    Goal(EACH, "fp8_linear", "value", "cpu", at_most=1.0),
    Goal(MEAN, "fp8_linear", "value", "cpu", at_most=0.5),
)


@dataclass
class Course:
    """Losses a step, in nats a byte, of one seed."""

    plain: list[float]
    eight: list[float]

    def difference(self) -> float:
        """Of the mean of the last steps, in percent of bf16's."""
        plain, eight = [sum(line[-LAST:]) / len(line[-LAST:]) for line in (self.plain, self.eight)]
        return 100 * (eight - plain) / plain


def differences(courses: Mapping[str, Course]) -> dict[str, float]:
    """The figures of the goals."""
    found = [course.difference() for course in courses.values()]
    return {EACH: max(map(abs, found)), MEAN: abs(sum(found) / len(found))}


def topics() -> Tensor:
    """The bytes of Python's help texts."""
    import pydoc_data.topics

    return torch.frombuffer(bytearray(Path(pydoc_data.topics.__file__).read_bytes()), dtype=torch.uint8).long()


class Llama(nn.Module):
    """Logits of a Llama of transformers under autocast to bf16; parameters, which the optimizer sees, in fp32."""

    def __init__(self, text: Text) -> None:
        super().__init__()
        allow_import()
        try:
            import transformers
        except ImportError as error:
            raise UnavailableError("transformers is not installed") from error
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=text.channels, intermediate_size=3 * text.channels, num_attention_heads=4,
            num_key_value_heads=4, num_hidden_layers=text.blocks, max_position_embeddings=text.tokens,
        )  # fmt: skip
        self.model: Any = transformers.LlamaForCausalLM(config)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.model(x, use_cache=False).logits
        return logits.float()


def train_one(
    data: Tensor, text: Text, seed: int, recipe: accel.FP8Recipe | None, tick: Callable[[], None]
) -> list[float]:
    """The losses of one training; in eight bits where there is a recipe."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llama(text)
    if recipe is not None:
        accel.patch(model.model, recipe={"fp8_linear": recipe, "softmax_attention": False})
    return train(model, data, text, seed, tick)


def train_all(text: Text, tick: Callable[[], None] = lambda: None) -> dict[str, Course]:
    """Both trainings of each seed, by its name."""
    data, recipe = topics(), accel.FP8Recipe(size_rule=False)
    return {
        f"seed {seed}": Course(train_one(data, text, seed, None, tick), train_one(data, text, seed, recipe, tick))
        for seed in SEEDS
    }
