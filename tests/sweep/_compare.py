"""One row of a sweep: what a model computes with accel's kernels beside what it computes without them."""

import dataclasses

import torch
from torch import nn

SPREAD = 0.1
"""Of random weights: more makes logits so large that a softmax has one weight and its gradient is rounding."""
SAME = 1e-3
"""Largest difference of outputs and gradients, as a part of the largest value: rounding gives 1e-5, a lost mask 0.1."""

_NOT_COMPARED = ("past_key_values", "attentions", "cross_attentions", "decoder_attentions", "encoder_attentions")


@dataclasses.dataclass
class Row:
    family: str
    way: str
    """How the kernels were asked for."""
    status: str
    """``equal``, ``refused``, ``DIFFERS``, ``FAILS``, ``UNUSED``; the last three are faults. ``no attention``."""
    replaced: int = 0
    calls: int = 0
    difference: float = 0.0
    note: str = ""

    @property
    def right(self):
        return self.status in ("equal", "refused", "no attention")

    def __str__(self):
        how = f"{self.calls} calls, {self.difference:.0e}" if self.status == "equal" else f"{self.difference:.0e}"
        return f"{self.way}: {self.status} {how} {self.note}".rstrip()


def randomize(model):
    """Every parameter away from its initial value: tables and biases that start at zero hide mistakes."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                around = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
                parameter.copy_(around + SPREAD * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tensors(out, masks):
    """The floating-point tensors of an output, those laid out like one of ``masks`` at its tokens only."""
    if isinstance(out, torch.Tensor):
        if out.is_floating_point() and out.numel():
            mask = next((mask for mask in masks if out.dim() > 2 and out.shape[:2] == mask.shape), None)
            yield out if mask is None else out[mask.bool()]
    elif hasattr(out, "items"):
        for key, value in out.items():
            if key not in _NOT_COMPARED:
                yield from tensors(value, masks)
    elif isinstance(out, list | tuple):
        for value in out:
            yield from tensors(value, masks)


def run(model, inputs):
    """Outputs and every parameter's gradient of ``model(**inputs)``."""
    masks = [inputs[name] for name in ("decoder_attention_mask", "attention_mask") if name in inputs]
    model.zero_grad()
    torch.manual_seed(4)  # some draw numbers of their own, for patches that are masked out
    found = list(tensors(model(**inputs), masks))
    generator = torch.Generator().manual_seed(9)
    total = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in found if x.requires_grad)
    if isinstance(total, torch.Tensor):
        total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in found], gradients


def difference(found, expected):
    """The largest difference as a part of the largest value, of outputs one by one and of gradients together."""
    outputs, gradients = expected
    if [x.shape for x in found[0]] != [x.shape for x in outputs]:
        return float("inf")
    parts = [_relative(a, b, float(b.abs().max())) for a, b in zip(found[0], outputs, strict=True)]
    if gradients:
        if list(found[1]) != list(gradients):
            return float("inf")
        largest = max(float(g.abs().max()) for g in gradients.values() if g.numel())
        parts += [_relative(found[1][n], g, largest) for n, g in gradients.items()]
    return max(parts, default=0.0)


def _relative(a, b, largest):
    if not a.numel():
        return 0.0
    if torch.equal(a.isnan(), b.isnan()):
        a, b = a.nan_to_num(), b.nan_to_num()
    error = float((a - b).abs().max())
    return error / max(largest, 1e-6) if error == error else float("inf")


def finite(expected):
    return all(bool(x.isfinite().all()) for x in [*expected[0], *expected[1].values()])


def has_attention(model: nn.Module):
    return any("attention" in type(m).__name__.lower() or "attn" in type(m).__name__.lower() for m in model.modules())
