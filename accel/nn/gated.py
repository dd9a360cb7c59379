"""Layers of gated attention: the gated attention unit and FLASH, in place of attention and feed-forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.flash_mix import flash_mix
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
    frequency = 10000.0 ** -(torch.arange(0, size, 2, device=x.device) / size)
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
        relative: T5Buckets | None,
        rows: int,
        rotary: int,
        dropout: float,
        shift: bool,
        residual: bool,
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
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout=}")
        self.embed_dim, self.inner_dim, self.query_key_dim = embed_dim, inner, query_key_dim
        self.activation, self.causal, self.dropout = activation, causal, dropout
        self.relative, self.rotary, self.shift, self.residual = relative, rotary, shift, residual
        self.norm: nn.Module = nn.Identity()
        if norm is not None:
            self.norm = nn.LayerNorm(embed_dim) if norm == "layer" else ScaleNorm()
        self.to_hidden = nn.Linear(embed_dim, 2 * inner + query_key_dim, bias=bias)
        self.gamma = nn.Parameter(torch.empty(uses, query_key_dim))
        self.beta = nn.Parameter(torch.empty(uses, query_key_dim))
        self.table = nn.Parameter(torch.empty(rows, 1)) if relative is not None else None
        self.to_out = nn.Linear(inner, embed_dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in the paper: weights and scales normal with deviation 0.02, offsets and biases 0."""
        for layer in (self.to_hidden, self.to_out):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.gamma, std=0.02)
        nn.init.zeros_(self.beta)
        if self.table is not None:
            nn.init.normal_(self.table, std=0.02)

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
        out: Tensor = self.to_out(mixed)
        return out + x if self.residual else out

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
        relative: :class:`accel.T5Buckets` for a learned bias by distance, or None.
        rows: of its table.
        table_scale: factor of the table.
        rotary: how many channels of queries and keys are rotated, 0 for none.
        dropout: of weights, and of the output.
        shift: half of the normed channels are those of the token before.
        residual: the input is added to the output.
        bias: of the two dense layers.
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
        relative: T5Buckets | None = None,
        rows: int = 32,
        table_scale: float = 1.0,
        rotary: int = 0,
        dropout: float = 0.0,
        shift: bool = False,
        residual: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(
            *(embed_dim, 2, query_key_dim, expansion, activation, causal, norm, relative, rows, rotary, dropout),
            *(shift, residual, bias),
        )
        if isinstance(scale, str) and scale != "length":
            raise ValueError(f"scale must be a number, 'length' or None, got {scale=}")
        self.scale, self.table_scale = scale, table_scale

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, **rules: Any) -> Tensor:
        shrink = 1.0 / max(k.shape[1], 1) if self.scale == "length" else 1.0
        scale = shrink if isinstance(self.scale, str) else self.scale
        if self.table is not None:
            queries, keys = q.shape[1], k.shape[1]
            index: Any = self.relative
            if keys > queries:  # a step: its distances count from the tokens before
                at = [torch.arange(n, device=q.device) for n in (queries, keys)]
                index = index.rows_of(at[0][:, None] + (keys - queries) - at[1], self.table.shape[0])
            rules |= {"bias_table": self.table * (self.table_scale * shrink), "bias_index": index}
        dropout = self.dropout if self.training else 0.0
        return gau_attention(
            q, k, v, gate, activation=self.activation, scale=scale, causal=self.causal, dropout_p=dropout, **rules
        )

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """``(B, T, embed_dim)`` to the same; ``key_mask (B, T)`` boolean, True where a token takes part as a key."""
        gate, v, (q, k), _ = self._inputs(x, None, 0)
        mask = None if key_mask is None else key_mask[:, None]
        mixed = self._attend(q, k, v, gate, mask=mask)
        out: Tensor = self.to_out(mixed)
        out = F.dropout(out, self.dropout, self.training)
        return out + x if self.residual else out

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
        """The unit with the parameters of flash-pytorch's ``GAU``; they are copied.

        Raises:
            TypeError: the module is of another class.
        """
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if not (kind.startswith("flash_pytorch.") and kind.endswith(".GAU")):
            raise TypeError(f"from_module takes flash_pytorch's GAU, not {kind}")
        m: Any = module
        s, embed_dim = m.offsetscale.gamma.shape[1], m.to_qk[0].in_features
        made = cls(
            embed_dim,
            query_key_dim=s,
            expansion=m.to_out[0].in_features / embed_dim,
            activation=_activation_of(m.attn_fn),
            scale="length",
            causal=m.causal,
            norm=_norm_of(m.norm),
            relative=T5Buckets(bidirectional=not m.causal, max_distance=m.rel_pos_bias.max_distance),
            rows=m.rel_pos_bias.num_buckets,
            table_scale=m.rel_pos_bias.scale,
            dropout=m.dropout.p,
            residual=m.add_residual,
        )
        _copy(made, m, m.offsetscale, m.to_out[0], [0, 1])
        return made


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
        relative: T5Buckets | None = None,
        rows: int = 32,
        table_scale: float = 1.0,
        rotary: int = 0,
        dropout: float = 0.0,
        shift: bool = False,
        residual: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(
            *(embed_dim, 4, query_key_dim, expansion, activation, causal, norm, relative, rows, rotary, dropout),
            *(shift, residual, bias),
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
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if not (kind.startswith("flash_pytorch.") and kind.endswith(".FLASH")):
            raise TypeError(f"from_module takes flash_pytorch's FLASH, not {kind}")
        m: Any = module
        if not m.causal and not m.reduce_group_non_causal_attn:
            raise ValueError("FLASH with reduce_group_non_causal_attn=False sees no other chunk in its linear part")
        embed_dim, s = m.to_qk[0].in_features, m.qk_offset_scale.gamma.shape[1]
        made = cls(
            embed_dim,
            chunk_size=m.group_size,
            query_key_dim=s,
            expansion=m.to_out.in_features / embed_dim,
            activation=_activation_of(m.attn_fn),
            causal=m.causal,
            norm=_norm_of(m.norm),
            relative=T5Buckets(bidirectional=not m.causal, max_distance=m.rel_pos_bias.max_distance),
            rows=m.rel_pos_bias.num_buckets,
            table_scale=m.rel_pos_bias.scale,
            rotary=_rotary_of(m.rotary_pos_emb),
            dropout=m.dropout.p,
            shift=m.shift_tokens,
        )
        _copy(made, m, m.qk_offset_scale, m.to_out, [0, 1, 2, 3])
        return made


# --- reading flash-pytorch's layers ---


def _activation_of(module: nn.Module) -> str:
    found = {"ReLUSquared": "relu2", "LaplacianAttnFn": "laplace"}.get(type(module).__name__)
    if found is None:
        raise ValueError(f"the activation must be ReLUSquared or LaplacianAttnFn, got {type(module).__name__}")
    return found


def _norm_of(module: nn.Module) -> str:
    found = {"LayerNorm": "layer", "ScaleNorm": "scale"}.get(type(module).__name__)
    if found is None:
        raise ValueError(f"the norm must be LayerNorm or ScaleNorm, got {type(module).__name__}")
    return found


def _rotary_of(module: Any) -> int:
    """How many channels it rotates."""
    if module is None:
        return 0
    size = 2 * module.freqs.numel()
    usual = 10000.0 ** -(torch.arange(0, size, 2, device=module.freqs.device) / size)
    if not torch.allclose(module.freqs.detach().float(), usual) or getattr(module, "use_xpos", False):
        raise ValueError("the rotary embedding has other frequencies than 10000 ** (−2i / size)")
    return size


@torch.no_grad()
def _copy(made: _Gated, module: Any, offsets: Any, to_out: nn.Linear, order: list[int]) -> None:
    if isinstance(made.norm, ScaleNorm):
        made.norm.g.copy_(module.norm.g)
        made.norm.eps = module.norm.eps
    else:
        made.norm.load_state_dict(module.norm.state_dict())
        made.norm.eps = module.norm.eps
    hidden, base = module.to_hidden[0], module.to_qk[0]
    for name in ("weight", "bias"):
        value, gate = getattr(hidden, name).chunk(2)
        getattr(made.to_hidden, name).copy_(torch.cat([gate, value, getattr(base, name)]))
        getattr(made.to_out, name).copy_(getattr(to_out, name))
    made.gamma.copy_(offsets.gamma[order])
    made.beta.copy_(offsets.beta[order])
    assert made.table is not None
    made.table.copy_(module.rel_pos_bias.relative_attention_bias.weight)
    made.to(base.weight.device, base.weight.dtype).train(module.training)
