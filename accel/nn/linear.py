"""Linear attention as a module: projections around :func:`accel.linear_attention`, and a step for decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accel.backends import inner_dtype
from accel.nn.attention import check_inputs, check_sizes, define_projections, draw_projections, heads_of
from accel.ops.linear import feature_maps
from accel.ops.linear.arguments import State
from accel.ops.linear.linear_attention import linear_attention
from accel.ops.linear.linear_attention_step import linear_attention_step

__all__ = ["LinearAttention"]


class LinearAttention(nn.Module):
    r"""Multi-head linear attention with its projections: time linear in the tokens, and a state of fixed size.

    Projections have the names, shapes and first values of :class:`accel.nn.MultiHeadAttention`'s, so that the
    ``state_dict`` of softmax attention loads into it. What a head computes is :func:`accel.linear_attention`'s formula.

    Args:
        embed_dim: channels C of the queries and the output.
        num_heads: H, dividing C; a head has D = C / H channels.
        bias: whether the projections have biases.
        kdim: channels of the keys; C if None.
        vdim: channels of the values; C if None.
        batch_first: batches are ``(B, T, C)`` instead of ``(T, B, C)``.
        device: where the parameters are made.
        dtype: their dtype.
        num_kv_heads: heads of k, v and the state, Hs, dividing H; H if None.
        feature_map: as in :func:`accel.linear_attention`. The projection of ``("performer", projection)`` becomes a
            buffer.
        causal: query i sees keys j <= i.
        normalize: divide by the sum of the weights.
        scale: factor of the weights.
        log_decay: Hs numbers at most 0, by which a head forgets from token to token, causal only; a buffer. Those of
            retention are log(1 − 2^(−5−h)), of lightning attention −2^(−8(h+1)/H).
        eps: added to the denominator.

    Raises:
        ValueError: sizes that do not divide, an unknown feature map, or decays that do not fit.

    Example:
        >>> layer = accel.nn.LinearAttention(64, 4, batch_first=True, causal=True)
        >>> x = torch.randn(2, 10, 64)
        >>> with torch.no_grad():
        ...     out, state = layer(x, return_state=True)  # (2, 10, 64); the state after the prompt
        ...     next_token = layer.step(out[:, -1], state)  # (2, 64); the state has changed
    """

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    out_proj: nn.Linear
    projection: Tensor | None
    log_decay: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        feature_map: str | tuple[Any, ...] | Callable[[Tensor], Tensor] = "elu1",
        causal: bool = False,
        normalize: bool = True,
        scale: float = 1.0,
        log_decay: Tensor | Sequence[float] | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(embed_dim, num_heads, num_kv_heads)
        if isinstance(feature_map, str) and feature_map not in (*feature_maps.ELEMENTWISE, "softmax"):
            raise ValueError(f"feature_map must be one of {', '.join(feature_maps.NAMES)}, got {feature_map!r}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first
        self.head_dim = embed_dim // num_heads
        self.causal = causal
        self.normalize = normalize
        self.scale = scale
        self.eps = eps
        self._map, projection = feature_map, None
        if isinstance(feature_map, tuple) and feature_map[0] == "performer":
            projection = torch.as_tensor(feature_map[1], device=device)
        self.register_buffer("projection", projection)
        self.register_buffer("log_decay", None if log_decay is None else self._decays(log_decay, device))
        define_projections(self, bias, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def _decays(self, log_decay: Tensor | Sequence[float], device: Any) -> Tensor:
        decays = torch.as_tensor(log_decay, dtype=torch.float32, device=device).detach().clone()
        if not self.causal:
            raise ValueError("log_decay needs causal=True: without an order nothing is past")
        if tuple(decays.shape) != (self.num_kv_heads,) or not bool((decays <= 0.0).all()):
            raise ValueError(f"log_decay must be {self.num_kv_heads} numbers at most 0, one a state, got {log_decay}")
        return decays

    @property
    def feature_map(self) -> Any:
        return self._map if self.projection is None else ("performer", self.projection)

    def reset_parameters(self) -> None:
        """Draw the parameters of the projections to q, k and v, as torch does for its attention."""
        draw_projections(self)

    def _how(self) -> dict[str, Any]:
        names = ("feature_map", "normalize", "scale", "log_decay", "eps")
        return {name: getattr(self, name) for name in names}

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        initial_state: State | None = None,
        return_state: bool = False,
    ) -> Any:
        """Attention of ``query`` to ``key`` and ``value``.

        Args:
            query: ``(T, B, C)``, ``(B, T, C)`` with ``batch_first``, or ``(T, C)``.
            key: the same with S tokens of ``kdim`` channels; ``query`` if None.
            value: the same with S tokens of ``vdim`` channels; ``key`` if None.
            key_padding_mask: boolean ``(B, S)``, or ``(S,)`` unbatched, True for keys that are left out, as in torch's
                attention.
            initial_state: ``(kv, k_sum)``, fp32 ``(B, Hs, F, D)`` and ``(B, Hs, F)``, B = 1 unbatched: of the tokens
                before the first; F is the number of features, D in the plain maps. k_sum is None without ``normalize``.
            return_state: also return the state after the last token.

        Returns:
            The output, shaped as ``query``, or a pair with the state.

        Raises:
            ValueError: shapes that do not fit; the message holds them.
            TypeError: a mask that is not boolean.
        """
        key = query if key is None else key
        value = key if value is None else value
        check_inputs(query, key, value)
        batch_axis = 0 if self.batch_first or query.dim() == 2 else 1
        q, k, v = heads_of(self, query, key, value, batch_axis)
        how: dict[str, Any] = {"causal": self.causal, "initial_state": initial_state, "return_state": return_state}
        if key_padding_mask is not None:
            if key_padding_mask.dtype != torch.bool:
                raise TypeError(
                    f"key_padding_mask must be boolean, True for what is left out, got {key_padding_mask.dtype}"
                )
            how["key_mask"] = ~(key_padding_mask[None] if query.dim() == 2 else key_padding_mask)
        made: Any = linear_attention(q, k, v, **how, **self._how())
        out, state = made if return_state else (made, None)
        out = out.transpose(1, 2) if batch_axis == 0 else out.permute(2, 0, 1, 3)
        out = self.out_proj(out.reshape(query.shape))
        return (out, state) if return_state else out

    def zero_state(self, batch: int) -> State:
        """The state before the first token, ``(kv, k_sum)``, on the device of the parameters."""
        weight = self.out_proj.weight
        sample = weight.new_zeros(1, 1, 1, self.head_dim)
        features = self.head_dim
        if callable(self.feature_map):
            features = self.feature_map(sample).shape[-1]
        elif isinstance(self.feature_map, tuple) and self.feature_map[0] == "cosformer":
            features = 2 * self.head_dim
        kv = weight.new_zeros(batch, self.num_kv_heads, features, self.head_dim, dtype=inner_dtype(weight))
        return kv, kv[..., 0].clone() if self.normalize else None

    def step(self, x: Tensor, state: State) -> Tensor:
        """One token of causal self-attention, for decoding; changes ``state`` in place and has no gradient.

        Args:
            x: ``(B, C)``, the tokens that come next.
            state: ``(kv, k_sum)`` as :meth:`forward` or :meth:`zero_state` gives it.

        Returns:
            ``(B, C)``, as :meth:`forward` would for the last of all tokens.

        Raises:
            ValueError: a module that is not causal, or shapes that do not fit.
            NotImplementedError: a gradient is asked for: call it under ``torch.no_grad()``.
        """
        if not self.causal:
            raise ValueError("step needs causal=True: without an order every token sees those that are yet to come")
        if x.dim() != 2:
            raise ValueError(f"a step is of one token for each entry of the batch, (B, C), got {tuple(x.shape)=}")
        token = x[:, None]
        q, k, v = heads_of(self, token, token, token, 0)
        out: Tensor = self.out_proj(linear_attention_step(q, k, v, state, **self._how()).flatten(1))
        return out

    def extra_repr(self) -> str:
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
        plain = {"num_kv_heads": self.num_heads, "causal": False, "normalize": True, "scale": 1.0}
        if not (isinstance(self._map, str) and self._map == "elu1"):
            text += f", feature_map={self._map if isinstance(self._map, str) else type(self._map).__name__!s}"
        return text + "".join([f", {n}={getattr(self, n)!r}" for n, v in plain.items() if getattr(self, n) != v])
