"""A mixture of experts as a layer: router, experts, and a shared expert beside them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from accel.nn.expert_bias import ExpertBias
from accel.ops.moe.activations import ExpertActivation, activate, check_activation
from accel.ops.moe.moe_experts import moe_experts
from accel.ops.moe.moe_permute import moe_permute
from accel.ops.moe.moe_route import moe_route
from accel.ops.moe.plan import at_least

__all__ = ["Experts", "MoE", "Routing"]


class Experts(nn.Module):
    """The experts of a mixture, called as those of transformers are: ``experts(x, indices, weights)``.

    Args:
        num_experts: X.
        embed_dim: C, of the tokens.
        inner_dim: I, between an expert's two products.
        activation: as in :func:`accel.moe_experts`.
        gated: whether a gate multiplies the up projection.
        bias: whether both products have one.
        device, dtype: of the parameters.

    Attributes:
        gate_up_proj: ``(X, 2I, C)``, the gate's rows first; ``(X, I, C)`` without a gate.
        down_proj: ``(X, C, I)``.
        gate_up_bias, down_bias: ``(X, 2I)`` and ``(X, C)``, or None.

    Raises:
        ValueError: a size below 1, or an activation that is not known; the message holds it.
    """

    def __init__(
        self,
        num_experts: int,
        embed_dim: int,
        inner_dim: int,
        *,
        activation: str | ExpertActivation = "silu",
        gated: bool = True,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = at_least(num_experts, "num_experts", 1)
        self.embed_dim, self.inner_dim = at_least(embed_dim, "embed_dim", 1), at_least(inner_dim, "inner_dim", 1)
        self.activation, self.gated = check_activation(activation, gated), gated
        rows = (2 if gated else 1) * inner_dim

        def made(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.gate_up_proj, self.down_proj = made(rows, embed_dim), made(embed_dim, inner_dim)
        self.gate_up_bias: nn.Parameter | None = made(rows) if bias else None
        self.down_bias: nn.Parameter | None = made(embed_dim) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``torch.nn.Linear`` does for each expert: uniform within one over the root of the inputs."""
        for weight, bias in ((self.gate_up_proj, self.gate_up_bias), (self.down_proj, self.down_bias)):
            bound = weight.shape[-1] ** -0.5
            for parameter in (weight, bias):
                if parameter is not None:
                    nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """``x`` (T, C), ``indices`` and ``weights`` (T, K); ``(T, C)``. See :func:`accel.moe_experts`."""
        return moe_experts(
            x,
            indices,
            weights,
            self.gate_up_proj,
            self.down_proj,
            activation=self.activation,
            gated=self.gated,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
        )

    def extra_repr(self) -> str:
        gate = "" if self.gated else ", gated=False"
        return f"{self.num_experts}, {self.embed_dim}, {self.inner_dim}, activation={self.activation.function!r}{gate}"


class _Shared(nn.Module):
    """An expert that every token has."""

    def __init__(
        self, embed_dim: int, inner_dim: int, activation: ExpertActivation, gated: bool, bias: bool, **made: Any
    ) -> None:
        super().__init__()
        self.activation, self.gated = activation, gated
        self.gate_up_proj = nn.Linear(embed_dim, (2 if gated else 1) * inner_dim, bias=bias, **made)
        self.down_proj = nn.Linear(inner_dim, embed_dim, bias=bias, **made)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(activate(self.gate_up_proj(x), self.activation, self.gated, False))
        return out


class Routing(NamedTuple):
    """What a router decided, for the losses."""

    logits: Tensor
    """``(T, X)``, float32 (float64 beside float64): for :func:`accel.moe_balance_loss` and :func:`accel.moe_z_loss`."""
    weights: Tensor
    """``(T, K)``, likewise."""
    indices: Tensor
    """``(T, K)`` int64, as chosen: what a capacity dropped is still in it, and so are tokens outside of the mask."""


class MoE(nn.Module):
    r"""A mixture of experts in place of a feed-forward layer: each token goes to K of X experts, and the sum of what
    they make, weighed by the router, is added to what a shared expert makes of every token.

    Args:
        embed_dim: C.
        inner_dim: I of each expert.
        num_experts: X.
        top_k: K, from 1 to X.
        score: ``"softmax"``, ``"softmax_topk"``, ``"sigmoid"`` or ``"sqrt_softplus"``, as in :func:`accel.moe_route`.
        num_groups, topk_groups, group_score: experts come from the best groups alone, as there.
        renormalize: whether the weights of a token are divided by their sum, as there.
        scale: factor of the weights, as there.
        balance_rate: γ of :class:`accel.nn.ExpertBias`, which then is ``balance`` and moves the choice towards an even
            load (call ``moe.balance.follow(optimizer)``, or its ``update()`` once a step); None for no such bias.
        activation, gated, bias: of all experts, as in :class:`accel.nn.Experts`.
        shared_dim: I of the shared expert; 0 for none.
        capacity_factor: f, more than 0: an expert takes at most ⌈f · T · K / X⌉ choices of a call, those of the largest
            weights; the others add nothing, and the rest of a token's weights stay as they are. None drops nothing.
        group: processes whose load ``balance`` adds up.
        device, dtype: of the parameters. The router's weights and product are float32 whatever ``dtype`` is (float64
            beside float64), also under autocast: a choice that rounding turned is another expert.

    Attributes:
        router: ``torch.nn.Linear`` from C to X without a bias.
        experts: :class:`accel.nn.Experts`.
        shared: the shared expert, or None.
        balance: :class:`accel.nn.ExpertBias`, or None.

    Raises:
        ValueError: sizes or names that do not fit; the message holds them.

    Example:
        >>> moe = accel.nn.MoE(512, 256, num_experts=16, top_k=4, score="sigmoid", balance_rate=1e-3, shared_dim=256)
        >>> out = moe(x)
        >>> out, routing = moe(x, return_routing=True)
        >>> loss = loss + 1e-3 * accel.moe_z_loss(routing.logits)

    Follows Shazeer et al. (2017), Fedus et al., Switch Transformers (2021), and Dai et al., DeepSeekMoE (2024).
    """

    def __init__(
        self,
        embed_dim: int,
        inner_dim: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        num_groups: int | None = None,
        topk_groups: int | None = None,
        group_score: str = "top2_sum",
        renormalize: bool = True,
        scale: float = 1.0,
        balance_rate: float | None = None,
        activation: str | ExpertActivation = "silu",
        gated: bool = True,
        bias: bool = False,
        shared_dim: int = 0,
        capacity_factor: float | None = None,
        group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.experts = Experts(
            num_experts, embed_dim, inner_dim, activation=activation, gated=gated, bias=bias, device=device, dtype=dtype
        )
        if capacity_factor is not None and not 0.0 < capacity_factor < math.inf:
            raise ValueError(f"capacity_factor must be None or more than 0 and finite, got {capacity_factor=}")
        self.top_k, self.capacity_factor = top_k, capacity_factor
        self.how: dict[str, Any] = {
            "score": score,
            "num_groups": num_groups,
            "topk_groups": topk_groups,
            "group_score": group_score,
            "renormalize": renormalize,
            "scale": scale,
        }
        moe_route(torch.zeros(1, num_experts), top_k, **self.how)  # says what is wrong with them
        inner = torch.float64 if dtype == torch.float64 else torch.float32
        self.router = nn.Linear(embed_dim, num_experts, bias=False, device=device, dtype=inner)
        shared = at_least(shared_dim, "shared_dim", 0)
        self.shared = _Shared(embed_dim, shared, self.experts.activation, gated, bias, **made) if shared else None
        self.balance = (
            ExpertBias(num_experts, balance_rate, group=group, device=device) if balance_rate is not None else None
        )

    def _apply(self, fn: Any, recurse: bool = True) -> MoE:
        """A model that is cast keeps its routers in float32."""
        before = self.router.weight.detach()
        super()._apply(fn, recurse)
        weight = self.router.weight
        if weight.dtype in (torch.float16, torch.bfloat16) and before.dtype == torch.float32:
            self.router.weight = nn.Parameter(before.to(weight.device), weight.requires_grad)
        return self

    def route(self, x: Tensor) -> Routing:
        """The choice for tokens ``(T, C)``."""
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router(x.to(self.router.weight.dtype))
        bias = None if self.balance is None else self.balance.bias.clone()  # which may move before the backward
        return Routing(logits, *moe_route(logits, self.top_k, bias=bias, **self.how))

    def forward(self, x: Tensor, mask: Tensor | None = None, *, return_routing: bool = False) -> Any:
        """Tokens ``(..., C)`` to tokens of the same shape.

        Args:
            x: floating, in the dtype of the experts or under autocast.
            mask: ``(...)``, True for tokens that take part: the others have no expert but the shared one, and count for
                no load and no capacity.
            return_routing: whether to return the :class:`accel.nn.Routing` of the flattened tokens, too.

        Returns:
            ``out``, or ``(out, routing)``.

        Raises:
            ValueError: a mask that does not fit; the message holds its shape.
        """
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.route(tokens)
        indices = routing.indices
        if mask is not None:
            if mask.shape != x.shape[:-1]:
                raise ValueError(f"mask must be {tuple(x.shape[:-1])}, as the tokens of x, got {tuple(mask.shape)}")
            indices = torch.where(mask.reshape(-1, 1) != 0, indices, -1)
        if self.balance is not None:
            self.balance(indices)
        if self.capacity_factor is not None:
            indices = self._within_capacity(routing, indices, self.capacity_factor)
        out = self.experts(tokens, indices, routing.weights)
        if self.shared is not None:
            out = out + self.shared(tokens)
        out = out.view(x.shape)
        return (out, routing) if return_routing else out

    def _within_capacity(self, routing: Routing, indices: Tensor, factor: float) -> Tensor:
        """``indices`` with −1 in place of what an expert has no room for."""
        experts = self.router.out_features  # of all processes, where they are spread
        capacity = math.ceil(factor * indices.shape[0] * self.top_k / experts)
        tokens = routing.logits.detach()[:, :1]  # of which the rows are of no interest
        _, plan = moe_permute(tokens, indices, experts, weights=routing.weights, capacity=capacity, drop="score")
        return torch.where(plan.destination < 0, -1, indices)

    def extra_repr(self) -> str:
        asked = {k: v for k, v in self.how.items() if v is not None}
        return ", ".join([f"top_k={self.top_k}", *[f"{k}={v!r}" for k, v in asked.items()]])
