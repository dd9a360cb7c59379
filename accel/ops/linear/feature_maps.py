"""Feature maps of linear attention: those that kernels apply to each element, and those applied before them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.backends import inner_dtype

ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu1": lambda x: F.elu(x) + 1.0,
    "relu": torch.relu,
    "squared_relu": lambda x: torch.relu(x).square(),
    "exp": torch.exp,
}
"""Fused into kernels, with their derivatives."""

NAMES = (*ELEMENTWISE, "softmax", '("cosformer", max_length)', '("performer", projection)', "a callable")
MOST_FEATURES = 512


def check(feature_map: Any, q: Tensor, *, causal: bool, packed: bool, has_state: bool, position: Any) -> str:
    """The name of a feature map that can be used so."""
    name = feature_map[0] if isinstance(feature_map, tuple) and feature_map else feature_map
    if callable(name):
        return "callable"
    if name in ELEMENTWISE:
        return str(name)
    if name == "softmax":
        if causal or packed or has_state:
            given = {"causal": causal, "cu_seqlens_q": packed, "initial_state or return_state": has_state}
            named = " and ".join([what for what, asked in given.items() if asked])
            raise ValueError(f"feature_map='softmax' is a softmax over all keys of a call, which excludes {named}")
    elif name == "cosformer":
        length = feature_map[1] if isinstance(feature_map, tuple) and len(feature_map) == 2 else None
        if not isinstance(length, int | torch.SymInt) or length < 1:
            raise ValueError(f'cosformer is ("cosformer", max_length), max_length at least 1, got {feature_map!r}')
        if position < 0:
            raise ValueError(f"position must be at least 0, got {position=}")
    elif name == "performer":
        projection = feature_map[1] if isinstance(feature_map, tuple) and len(feature_map) == 2 else None
        if not isinstance(projection, Tensor) or not projection.is_floating_point():
            raise TypeError(f'performer is ("performer", projection), a floating tensor, got {feature_map!r:.80}')
        if projection.dim() != 2 or projection.shape[1] != q.shape[3] or not 1 <= projection.shape[0] <= MOST_FEATURES:
            raise ValueError(
                f"the projection of performer is (M, {q.shape[3]}), M from 1 to {MOST_FEATURES}, "
                f"got {tuple(projection.shape)}"
            )
        if projection.device != q.device:
            raise ValueError(f"the projection of performer is on {projection.device} but q is on {q.device}")
        if has_state:
            raise ValueError("performer is scaled by the largest feature of all keys of a call: it carries no state")
    else:
        raise ValueError(f"feature_map must be one of {', '.join(NAMES)}, got {feature_map!r:.80}")
    return str(name)


def apply(
    feature_map: Any, name: str, q: Tensor, k: Tensor, key_mask: Tensor | None, places: Callable[[Tensor], Any]
) -> tuple[Tensor, Tensor]:
    """Features of q and k under a map that no kernel applies. ``places(x)``: the position of each token of x."""
    if name == "callable":
        found = feature_map(q), feature_map(k)
        for before, after, what in ((q, found[0], "q"), (k, found[1], "k")):
            if not isinstance(after, Tensor) or after.dim() != 4 or after.shape[:3] != before.shape[:3]:
                shape = tuple(after.shape) if isinstance(after, Tensor) else type(after).__name__
                raise ValueError(f"feature_map must keep (B, H, tokens) of {what} {tuple(before.shape)}, gave {shape}")
        return found[0].to(q.dtype), found[1].to(k.dtype)
    inner = inner_dtype(q)
    wide_q, wide_k = q.to(inner), k.to(inner)
    if name == "softmax":
        if key_mask is not None:
            wide_k = wide_k.masked_fill(~key_mask[:, None, :, None], torch.finfo(inner).min)
        found = wide_q.softmax(-1), wide_k.softmax(-2)
    elif name == "cosformer":
        found = (
            _cosformer(wide_q, places(q), feature_map[1]),
            _cosformer(wide_k, places(k), feature_map[1]),
        )
    else:
        projection = feature_map[1].detach().to(inner)
        seen = None if key_mask is None else key_mask[:, None, :, None]
        found = _performer(wide_q, projection, None, by_row=True), _performer(wide_k, projection, seen, by_row=False)
    return found[0].to(q.dtype), found[1].to(k.dtype)


def _cosformer(x: Tensor, places: Tensor, max_length: int) -> Tensor:
    """relu(x) times the cosine and the sine of π/2 · (position + 1) / max_length: ``2·D`` features."""
    angle = (places.to(x.dtype) + 1.0)[:, None] * (0.5 * math.pi / max_length)
    positive = torch.relu(x)
    return torch.cat([positive * angle.cos(), positive * angle.sin()], -1)


def _performer(x: Tensor, projection: Tensor, seen: Tensor | None, *, by_row: bool) -> Tensor:
    """FAVOR+: M^−½ (exp(ω·x̂ − |x̂|²/2 − c) + 1e-4) of x̂ = x·D^−¼; c is the largest ω·x̂ of the row, or of all tokens.

    All factors go into what has a number a token, or into the projection: each pass over the features takes as long as
    the kernel behind them.
    """
    features, size = projection.shape
    along = x @ (projection * size**-0.25).t()
    if along.numel() == 0:
        return along
    shown = along.detach() if seen is None else along.detach().masked_fill(~seen, -math.inf)
    largest = shown.amax(-1, keepdim=True) if by_row else shown.amax((-1, -2), keepdim=True)
    largest = torch.where(largest == -math.inf, 0.0, largest)
    less = x.square().sum(-1, keepdim=True) * (0.5 * size**-0.5) + (largest + 0.5 * math.log(features))
    return torch.exp(along - less) + 1e-4 * features**-0.5
