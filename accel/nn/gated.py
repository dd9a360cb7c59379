"""Layers of gated attention: the gated attention unit and FLASH, in place of attention and feed-forward."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.backends import inner_dtype
from accel.nn import gated_readers
from accel.ops.linear.flash_mix import flash_mix
from accel.ops.linear.gau_attention import gau_attention
from accel.ops.linear.gau_strips import ACTIVATIONS
from accel.ops.rules import T5Buckets

__all__ = ["FLASH", "GatedAttentionUnit", "ScaleNorm"]


class ScaleNorm(nn.Module):
    """``x`` divided by the root mean square of its last axis, times one learned number (Nguyen and Salazar, 2019)."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return x / norm.clamp_min(self.eps) * self.g


def rotate(x: Tensor, size: int, position: int = 0) -> Tensor:
    """Rotary embedding of the first ``size`` channels of ``(..., T, s)``, in neighbouring pairs (Su et al., 2021);
    ``position`` is the first token's."""
    if size == 0:
        return x
    frequency = 10000.0 ** -(torch.arange(0, size, 2, device=x.device, dtype=inner_dtype(x)) / size)
    angle = (torch.arange(x.shape[-2], device=x.device) + position)[:, None] * frequency
    cos, sin = (f(angle).to(x.dtype) for f in (torch.cos, torch.sin))
    even, odd = x[..., 0:size:2], x[..., 1:size:2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    return torch.cat([turned, x[..., size:]], -1)


class _Gated(nn.Module):
    """What both layers have: norm, shift, one dense to gate, value and base, a scale and an offset for each use of the
    base, a bias by distance, and the way out."""

    def __init__(
        self,
        embed_dim: int,
        uses: int,
        query_key_dim: int,
        expansion: float,
        activation: str,
        causal: bool,
        norm: str | None,
        relative: T5Buckets | str | None,
        rows: int,
        rotary: int,
        dropout: float,
        out_dropout: float,
        shift: bool,
        residual: bool | str,
        bias: bool,
    ) -> None:
        super().__init__()
        inner = int(embed_dim * expansion)
        if embed_dim < 1 or query_key_dim < 1 or inner < 1:
            raise ValueError(f"sizes must be at least 1, got {embed_dim=}, {query_key_dim=}, {expansion=}")
        if norm not in ("layer", "scale", None):
            raise ValueError(f"norm must be 'layer', 'scale' or None, got {norm!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if rotary % 2 or not 0 <= rotary <= query_key_dim:
            raise ValueError(f"rotary is an even number of channels up to {query_key_dim=}, got {rotary=}")
        if not 0.0 <= min(dropout, out_dropout) <= max(dropout, out_dropout) < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout=}, {out_dropout=}")
        if not (relative is None or isinstance(relative, T5Buckets) or relative == "toeplitz"):
            raise ValueError(f"relative must be T5Buckets, 'toeplitz' or None, got {relative!r}")
        if relative == "toeplitz" and rows % 2 == 0:
            raise ValueError(f"'toeplitz' takes 2n − 1 rows for n tokens, got {rows=}")
        if residual not in (True, False, "scaled"):
            raise ValueError(f"residual must be True, False or 'scaled', got {residual!r}")
        self.embed_dim, self.inner_dim, self.query_key_dim = embed_dim, inner, query_key_dim
        self.activation, self.causal, self.dropout, self.out_dropout = activation, causal, dropout, out_dropout
        self.relative, self.rotary, self.shift, self.residual = relative, rotary, shift, residual
        self.norm: nn.Module = nn.Identity()
        if norm is not None:
            self.norm = nn.LayerNorm(embed_dim) if norm == "layer" else ScaleNorm()
        self.to_hidden = nn.Linear(embed_dim, 2 * inner + query_key_dim, bias=bias)
        self.gamma = nn.Parameter(torch.empty(uses, query_key_dim))
        self.beta = nn.Parameter(torch.empty(uses, query_key_dim))
        self.table = nn.Parameter(torch.empty(rows, 1)) if relative is not None else None
        self.to_out = nn.Linear(inner, embed_dim, bias=bias)
        self.residual_scale = nn.Parameter(torch.empty(embed_dim)) if residual == "scaled" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in the paper: weights and scales normal with deviation 0.02, offsets and biases 0; of the residual 1."""
        for layer in (self.to_hidden, self.to_out):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.gamma, std=0.02)
        nn.init.zeros_(self.beta)
        if self.table is not None:
            nn.init.normal_(self.table, std=0.02)
        if self.residual_scale is not None:
            nn.init.ones_(self.residual_scale)

    def _inputs(self, x: Tensor, before: Tensor | None, position: int) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """Gate, value, the uses of the base, and what the next token's shift needs; ``before`` is that of the last."""
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must be (B, T, {self.embed_dim}), got {tuple(x.shape)=}")
        hidden = self.norm(x)
        shifted = hidden.shape[-1] - hidden.shape[-1] // 2  # the larger half where it is odd, as torch.chunk cuts
        last = hidden[:, -1:, :shifted]
        if self.shift:
            first = torch.zeros_like(hidden[:, :1, :shifted]) if before is None else before
            moved = torch.cat([first, hidden[:, :-1, :shifted]], 1)
            hidden = torch.cat([moved, hidden[..., shifted:]], -1)
        made = F.silu(self.to_hidden(hidden))
        gate, value, base = made.split([self.inner_dim, self.inner_dim, self.query_key_dim], -1)
        uses = [rotate(base * g + b, self.rotary, position) for g, b in zip(self.gamma, self.beta, strict=True)]
        return gate, value, uses, last

    def _outputs(self, mixed: Tensor, x: Tensor) -> Tensor:
        out: Tensor = F.dropout(self.to_out(mixed), self.out_dropout, self.training)
        if not self.residual:
            return out
        return out + (x if self.residual_scale is None else x * self.residual_scale)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, inner={self.inner_dim}, {self.query_key_dim=}, {self.activation}, {self.causal=}"


class UnitState(NamedTuple):
    """What a :class:`GatedAttentionUnit` remembers of the tokens before: ``k (B, T, s)``, ``v (B, T, E)``, and the
    normed first half of the last one."""

    k: Tensor
    v: Tensor
    last: Tensor


class GatedAttentionUnit(_Gated):
    """A gated attention unit (Hua et al., Transformer Quality in Linear Time, 2022): attention of one head and a gate
    in one layer, quadratic in the tokens; two take the place of attention and feed-forward.

    Args:
        embed_dim: channels of input and output.
        query_key_dim: s.
        expansion: E = ``int(embed_dim · expansion)``.
        activation: of :func:`accel.gau_attention`.
        scale: of q·k; s ** −0.5 if None; ``"length"`` divides the biased logits by T, as flash-pytorch does.
        causal: token i sees tokens j <= i.
        norm: ``"layer"``, ``"scale"`` (:class:`ScaleNorm`) or None.
        relative: the rule of a learned bias by distance: :class:`accel.T5Buckets`; ``"toeplitz"`` for a row per
            distance, row n − 1 being distance 0; or None.
        rows: of its table; 2n − 1 for ``"toeplitz"``, which then serves up to n tokens.
        table_scale: factor of the table.
        rotary: how many channels of queries and keys are rotated, 0 for none.
        dropout: of weights.
        out_dropout: of the output, before the residual; as ``dropout`` if None.
        average: each weight is divided by the number of keys that its query sees; for ``"relu2"`` without ``relative``.
        shift: half of the normed channels are those of the token before.
        residual: the input is added to the output; ``"scaled"``, times a learned number for each channel.
        bias: of the two dense layers.

    Raises:
        ValueError: a size, name or rate that is none of these, or ``average`` beside what it is not for.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        query_key_dim: int = 128,
        expansion: float = 2.0,
        activation: str = "relu2",
        scale: float | str | None = None,
        causal: bool = False,
        norm: str | None = "layer",
        relative: T5Buckets | str | None = None,
        rows: int = 32,
        table_scale: float = 1.0,
        rotary: int = 0,
        dropout: float = 0.0,
        out_dropout: float | None = None,
        average: bool = False,
        shift: bool = False,
        residual: bool | str = True,
        bias: bool = True,
    ) -> None:
        super().__init__(
            *(embed_dim, 2, query_key_dim, expansion, activation, causal, norm, relative, rows, rotary, dropout),
            *(dropout if out_dropout is None else out_dropout, shift, residual, bias),
        )
        if isinstance(scale, str) and scale != "length":
            raise ValueError(f"scale must be a number, 'length' or None, got {scale=}")
        if average and (activation != "relu2" or relative is not None):
            raise ValueError(f"average is for relu2 without relative, got {activation=}, {relative=}")
        self.scale, self.table_scale, self.average = scale, table_scale, average

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, key_mask: Tensor | None = None) -> Tensor:
        shrink = 1.0 / max(k.shape[1], 1) if self.scale == "length" else 1.0
        scale = shrink if isinstance(self.scale, str) else self.scale
        rules: dict[str, Any] = {"mask": None if key_mask is None else key_mask[:, None]}
        if self.table is not None:
            table, index = self._table(q.shape[1], k.shape[1])
            rules |= {"bias_table": table * (self.table_scale * shrink), "bias_index": index}
        if self.average:
            q = q * self._seen(q, k, key_mask)[..., None].rsqrt().to(q.dtype)  # before the square: no sum overflows
        dropout = self.dropout if self.training else 0.0
        return gau_attention(
            q, k, v, gate, activation=self.activation, scale=scale, causal=self.causal, dropout_p=dropout, **rules
        )

    def _table(self, queries: int, keys: int) -> tuple[Tensor, Any]:
        """The table and its index, where the last query stands beside the last key."""
        assert self.table is not None
        rows = self.table.shape[0]
        if not isinstance(self.relative, T5Buckets):
            most = rows // 2 + 1
            if keys > most:
                raise ValueError(f"a table of {rows} rows serves up to {most} tokens, got {keys}")
            return self.table[most - queries : most - 1 + keys], "toeplitz"
        if keys == queries:
            return self.table, self.relative
        at = [torch.arange(n, device=self.table.device) for n in (queries, keys)]
        return self.table, self.relative.rows_of(at[0][:, None] + (keys - queries) - at[1], rows)

    def _seen(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """How many keys each query sees, at least 1, ``(B or 1, T or 1)``."""
        queries, keys = q.shape[1], k.shape[1]
        if key_mask is not None:
            seen = key_mask.cumsum(1) if self.causal else key_mask.sum(1, keepdim=True)
        elif self.causal:
            seen = torch.arange(keys - queries + 1, keys + 1, device=q.device)[None]
        else:
            seen = torch.full((1, 1), keys, device=q.device)
        return seen.clamp_min(1).to(inner_dtype(q))

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """``(B, T, embed_dim)`` to the same; ``key_mask (B, T)`` boolean, True where a token takes part as a key."""
        gate, v, (q, k), _ = self._inputs(x, None, 0)
        return self._outputs(self._attend(q, k, v, gate, key_mask), x)

    def step(self, x: Tensor, state: UnitState | None = None) -> tuple[Tensor, UnitState]:
        """The next tokens ``(B, n, embed_dim)`` of a causal unit, in inference, and what the step after them needs."""
        if not self.causal or self.scale == "length":
            raise ValueError(f"a step needs a causal unit whose scale is no length, got {self.causal=}, {self.scale=}")
        position = 0 if state is None else state.k.shape[1]
        gate, v, (q, k), last = self._inputs(x, None if state is None else state.last, position)
        if state is not None:
            k, v = torch.cat([state.k, k], 1), torch.cat([state.v, v], 1)
        return self._outputs(self._attend(q, k, v, gate), x), UnitState(k, v, last)

    @classmethod
    def from_module(cls, module: nn.Module) -> GatedAttentionUnit:
        """The unit with the parameters of flash-pytorch's ``GAU``, mmpose's ``RTMCCBlock`` or bert4torch's
        ``GatedAttention`` (``GatedAttentionUnit`` in its older versions); they are copied.

        The last has no norm and no residual of its own. Where a query sees one of several keys, its ``softmax_plus``
        gives the others, masked ones too, the same weight, and ours gives them none. mmpose's bias by distance is that
        of ``num_token`` tokens; of fewer it takes other entries.

        Raises:
            TypeError: the module is of another class.
            ValueError: it has what the unit has not: mmpose's cross-attention, rotary embedding, drop path, ReLU or
                another number of output channels; bert4torch's other activations, normalizations and frequencies.
        """
        read = gated_readers.read_unit(module)
        return _load(cls(**read.given), read, module)


class FlashState(NamedTuple):
    """What :class:`FLASH` remembers: the sum of whole chunks ``(B, s, E)`` fp32, the quadratic and linear keys and the
    values of the chunk that is not yet whole, the number of tokens before it, and the normed first half of the last."""

    total: Tensor
    quad_k: Tensor
    lin_k: Tensor
    v: Tensor
    position: int
    last: Tensor


class FLASH(_Gated):
    """FLASH (Hua et al., Transformer Quality in Linear Time, 2022): a gated attention unit of mixed chunks, in time
    linear in the tokens.

    Args:
        chunk_size: tokens that see each other pair by pair.
        rows: of the table; 2 · ``chunk_size`` − 1 for ``"toeplitz"``.
        table_scale: factor of the table.
        The others are those of :class:`GatedAttentionUnit`.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        chunk_size: int = 256,
        query_key_dim: int = 128,
        expansion: float = 2.0,
        activation: str = "relu2",
        causal: bool = False,
        norm: str | None = "scale",
        relative: T5Buckets | str | None = None,
        rows: int = 32,
        table_scale: float = 1.0,
        rotary: int = 0,
        dropout: float = 0.0,
        shift: bool = False,
        residual: bool | str = True,
        bias: bool = True,
    ) -> None:
        super().__init__(
            *(embed_dim, 4, query_key_dim, expansion, activation, causal, norm, relative, rows, rotary, dropout),
            *(0.0, shift, residual, bias),
        )
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size=}")
        self.chunk_size, self.table_scale = chunk_size, table_scale

    def _rules(self) -> dict[str, Any]:
        rules: dict[str, Any] = {"chunk_size": self.chunk_size, "causal": self.causal, "activation": self.activation}
        if self.table is not None:
            rules |= {"bias_table": self.table * self.table_scale, "bias_index": self.relative}
        return rules

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """``(B, T, embed_dim)`` to the same; ``key_mask (B, T)`` boolean, True where a token takes part as a key."""
        gate, v, (quad_q, lin_q, quad_k, lin_k), _ = self._inputs(x, None, 0)
        dropout = self.dropout if self.training else 0.0
        mixed: Any = flash_mix(
            quad_q, quad_k, lin_q, lin_k, v, gate, key_mask=key_mask, dropout_p=dropout, **self._rules()
        )
        return self._outputs(mixed, x)

    def step(self, x: Tensor, state: FlashState | None = None) -> tuple[Tensor, FlashState]:
        """The next tokens ``(B, n, embed_dim)`` of a causal layer, in inference, and what the step after them needs,
        whose size does not grow with the tokens before."""
        if not self.causal:
            raise ValueError(f"a step needs a causal layer, got {self.causal=}")
        known = 0 if state is None else state.v.shape[1]
        position = 0 if state is None else state.position
        gate, v, uses, last = self._inputs(x, None if state is None else state.last, position + known)
        quad_q, lin_q, quad_k, lin_k = uses
        total = None
        if state is not None:
            total = state.total
            quad_k, lin_k, v = (
                torch.cat([a, b], 1) for a, b in ((state.quad_k, quad_k), (state.lin_k, lin_k), (state.v, v))
            )
            quad_q, lin_q, gate = (F.pad(y, (0, 0, known, 0)) for y in (quad_q, lin_q, gate))
        mixed, total = flash_mix(
            quad_q, quad_k, lin_q, lin_k, v, gate, initial_state=total, return_state=True, **self._rules()
        )
        whole = v.shape[1] // self.chunk_size * self.chunk_size
        after = FlashState(total, quad_k[:, whole:], lin_k[:, whole:], v[:, whole:], position + whole, last)
        return self._outputs(mixed[:, known:], x), after

    @classmethod
    def from_module(cls, module: nn.Module) -> FLASH:
        """The layer with the parameters of flash-pytorch's ``FLASH``; they are copied.

        Raises:
            TypeError: the module is of another class.
            ValueError: it does not sum up all groups, or its rotary embedding is not the usual one.
        """
        read = gated_readers.read_flash(module)
        return _load(cls(**read.given), read, module)


Layer = TypeVar("Layer", bound=_Gated)


def _load(made: Layer, read: gated_readers.Read, module: nn.Module) -> Layer:
    weight = read.state["to_out.weight"]
    made.to(weight.device, weight.dtype).load_state_dict(read.state)
    if read.norm_eps is not None:
        made.norm.eps = read.norm_eps  # type: ignore[assignment]
    return made.train(module.training)
