"""Multi-head attention: torch's module over :func:`accel.softmax_attention`, with the rules and biases of that op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.ops.attention.softmax_attention import softmax_attention
from accel.ops.rules import Grid2D, T5Buckets, grid_index

__all__ = ["MultiHeadAttention"]

Relative = T5Buckets | Grid2D | str

# --- what the module computes; torch's own module holds the same attributes, so patching it runs this too ---


def attend_heads(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attend: Callable[..., Any] = softmax_attention,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    **rules: Any,
) -> Tensor:
    """All of multi-head attention but the output projection, with the parameters that ``module`` holds now.

    ``rules`` are further arguments of the op. The result is shaped as ``query``.
    """
    check_inputs(query, key, value)
    batch_axis = 0 if module.batch_first or query.dim() == 2 else 1
    q, k, v = heads_of(module, query, key, value, batch_axis)
    extra = int(module.bias_k is not None) + int(module.add_zero_attn)
    if is_causal and "causal" not in rules:
        taken = not extra and ("window" not in rules or q.shape[2] == k.shape[2])
        if attn_mask is None and not taken:
            raise ValueError(
                "is_causal needs attn_mask beside add_bias_kv and add_zero_attn, and beside a window over "
                f"{k.shape[2]} keys of {q.shape[2]} queries"
            )
        # With key padding torch leaves the hint and reads the mask, so a wrong hint means the same here.
        if taken and (key_padding_mask is None or attn_mask is None):
            attn_mask, rules["causal"] = None, "top_left"
    rules.update(_dense_masks(key_padding_mask, attn_mask, q, k.shape[2]))
    k, v = _with_extra_keys(module, k, v)
    for name, seen in (("mask", 1.0), ("bias", 0.0)):
        if extra and name in rules:
            rules[name] = F.pad(rules[name], (0, extra), value=seen)
    out = attend(q, k, v, dropout_p=module.dropout if module.training else 0.0, **rules)
    out = out.transpose(1, 2) if batch_axis == 0 else out.permute(2, 0, 1, 3)
    return out.reshape(query.shape)


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    dims = query.dim()
    if dims not in (2, 3) or key.dim() != dims or value.dim() != dims or key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            "query, key and value must be (tokens, channels) or batches of that, key and value of one length: "
            f"{tuple(query.shape)=}, {tuple(key.shape)=}, {tuple(value.shape)=}"
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The projection. A bias of another dtype is added in the wider of both, and the product's dtype stays, as torch
    does for some layouts of ``x``, where it refuses others."""
    if bias is None or bias.dtype == weight.dtype:
        return F.linear(x, weight, bias)
    out = F.linear(x, weight)
    return (out + bias).to(out.dtype)


def _project(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
    """The three projections, as one product where the inputs are one tensor."""
    heads, bias = module.num_heads, module.in_proj_bias
    kv_width = module.embed_dim // heads * getattr(module, "num_kv_heads", heads)
    widths = [module.embed_dim, kv_width, kv_width]
    if module.in_proj_weight is None:
        weights: Any = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    elif query is key and key is value:
        return linear(query, module.in_proj_weight, bias).split(widths, -1)
    else:
        weights = module.in_proj_weight.split(widths)
    biases = (None, None, None) if bias is None else bias.split(widths)
    return [linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]


def define_projections(module: Any, bias: bool, where: dict[str, Any]) -> None:
    """The parameters of the projections in and out, under torch's names, undrawn but for those of ``out_proj``."""

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, **where))

    width, kv_width = module.embed_dim, module.head_dim * module.num_kv_heads
    one_size = module.kdim == width and module.vdim == width
    module.in_proj_weight = parameter(width + 2 * kv_width, width) if one_size else None
    module.q_proj_weight = None if one_size else parameter(width, width)
    module.k_proj_weight = None if one_size else parameter(kv_width, module.kdim)
    module.v_proj_weight = None if one_size else parameter(kv_width, module.vdim)
    module.in_proj_bias = parameter(width + 2 * kv_width) if bias else None
    module.out_proj = nn.Linear(width, width, bias=bias, **where)


def draw_projections(module: Any) -> None:
    for weight in (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight):
        if weight is not None:
            nn.init.xavier_uniform_(weight)
    if module.in_proj_bias is not None:
        nn.init.zeros_(module.in_proj_bias)
        nn.init.zeros_(module.out_proj.bias)


def heads_of(module: Any, query: Tensor, key: Tensor, value: Tensor, batch_axis: int) -> list[Tensor]:
    """q, k and v as the op takes them, ``(B, H, tokens, D)``: views of the projections."""
    size = module.embed_dim // module.num_heads
    order = (0, 2, 1, 3) if batch_axis == 0 else (1, 2, 0, 3)
    split = [x.unflatten(-1, (x.shape[-1] // size, size)) for x in _project(module, query, key, value)]
    return [(x.unsqueeze(0) if x.dim() == 3 else x).permute(order) for x in split]


def _with_extra_keys(module: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The learned key and value of ``add_bias_kv`` and the zeros of ``add_zero_attn``, behind the others."""
    batch, heads, _, size = k.shape
    if module.bias_k is not None:
        extra = [x.view(1, heads, 1, size).expand(batch, -1, -1, -1) for x in (module.bias_k, module.bias_v)]
        k, v = torch.cat([k, extra[0].to(k.dtype)], 2), torch.cat([v, extra[1].to(v.dtype)], 2)
    if module.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    return k, v


def _dense_masks(key_padding_mask: Tensor | None, attn_mask: Tensor | None, q: Tensor, keys: int) -> dict[str, Tensor]:
    """torch's masks, in which True keeps a query from a key, as the op's ``mask`` and ``bias``."""
    batch, heads, queries, _ = q.shape
    given: list[Tensor] = []
    if key_padding_mask is not None:
        shape = tuple(key_padding_mask.shape)
        if shape != (batch, keys) and (batch, shape) != (1, (keys,)):
            raise ValueError(f"key_padding_mask must be ({batch}, {keys}), or ({keys},) unbatched, got {shape}")
        given.append(key_padding_mask.reshape(batch, 1, 1, keys))
    if attn_mask is not None:
        shape = tuple(attn_mask.shape)
        if shape not in ((queries, keys), (batch * heads, queries, keys)):
            raise ValueError(
                f"attn_mask must be ({queries}, {keys}) or ({batch * heads}, {queries}, {keys}), got {shape}"
            )
        given.append(attn_mask.reshape(-1, heads if len(shape) == 3 else 1, queries, keys))
    out: dict[str, Tensor] = {}
    for x in given:
        if x.dtype == torch.bool:
            out["mask"] = out["mask"] & ~x if "mask" in out else ~x
        elif x.is_floating_point():
            out["bias"] = out["bias"] + x if "bias" in out else x
        else:
            raise TypeError(f"a mask is boolean, True where a key is left out, or floating, got {x.dtype}")
    return out


# --- weights in plain torch, for those who ask to see them ---


def _dense_index(rule: Relative, rows: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """Which row of the table every pair takes, ``(T, S)``."""
    if isinstance(rule, Grid2D):
        return grid_index((rule.h, rule.w, rule.extra), device)
    distance = torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)
    return rule.rows_of(distance, rows) if isinstance(rule, T5Buckets) else distance + keys - 1


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    window: Sequence[int] | None = None,
    bias_table: Tensor | None = None,
    bias_index: Any = None,
) -> Tensor:
    """The softmax itself, ``(B, H, T, S)``; the arguments are those of the op. Rows that see nothing are 0."""
    queries, keys = q.shape[2], k.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = (q * q.shape[3] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    if bias_table is not None:
        index = _dense_index(bias_index, bias_table.shape[0], queries, keys, q.device)
        logits = logits + bias_table[index].permute(2, 0, 1)
    left, right = (-1, -1) if window is None else window
    right = 0 if causal else right
    before = torch.arange(queries, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    if causal != "top_left":
        before = before + (keys - queries)
    hidden = torch.zeros_like(before, dtype=torch.bool) if mask is None else ~mask
    if left >= 0:
        hidden = hidden | (before > left)
    if right >= 0:
        hidden = hidden | (-before > right)
    logits = logits.masked_fill(hidden, float("-inf"))
    nothing = (logits == float("-inf")).all(-1, keepdim=True)
    return torch.where(nothing, 0.0, torch.softmax(torch.where(nothing, 0.0, logits), -1)).to(q.dtype)


def _attend_in_torch(found: list[Tensor], q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, **how: Any) -> Tensor:
    """Stands in for the op, and leaves the weights in ``found``."""
    found.append(F.dropout(attention_weights(q, k, **how), dropout_p))
    return found[0] @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


# --- the module ---


class MultiHeadAttention(nn.Module):
    r"""Multi-head attention with its projections, as :class:`torch.nn.MultiheadAttention`, over the kernels.

    Parameters and ``state_dict`` are those of torch's module, drawn in its order: one seed gives equal weights, and
    states load both ways. What torch's module has not comes after ``dtype``, by name.

    Args:
        embed_dim: channels E of the queries and the output.
        num_heads: H, dividing E; a head has D = E / H channels.
        dropout: probability in [0, 1) that an attention weight is dropped in training.
        bias: whether the projections have biases.
        add_bias_kv: append a learned key and value, seen by every query.
        add_zero_attn: append a key and a value of zeros, seen by every query.
        kdim: channels of the keys; E if None.
        vdim: channels of the values; E if None.
        batch_first: batches are ``(B, T, E)`` instead of ``(T, B, E)``.
        device: where the parameters are made.
        dtype: their dtype.
        num_kv_heads: heads of k and v, dividing H; fewer than H is grouped-query attention. Their projections then
            have D · num_kv_heads rows.
        causal: query i sees keys j <= i + S − T, without a mask tensor.
        window: ``(left, right)``, how far from its own place a query sees, inclusive, −1 without bound.
        relative: :class:`accel.T5Buckets`, :class:`accel.Grid2D` or ``"toeplitz"``: a learned bias by relative
            position, the parameter ``relative_position_bias_table (R, H)``.
        relative_rows: R: the number of buckets for ``T5Buckets`` (32 if None); for ``"toeplitz"`` 2·L − 1 where no
            sequence is longer than L; ``Grid2D`` has its own.

    Raises:
        ValueError: sizes that do not divide, a probability outside [0, 1), a table without its size, or rules by
            position together with keys that have none (``add_bias_kv``, ``add_zero_attn``).
    """

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    out_proj: nn.Linear

    _qkv_same_embed_dim = False
    """Asked by torch's encoder layer before its fast path, which would pass by ``causal`` and ``relative``."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        causal: bool = False,
        window: Sequence[int] | None = None,
        relative: Relative | None = None,
        relative_rows: int | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(embed_dim, num_heads, num_kv_heads)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout=}")
        if (add_bias_kv or add_zero_attn) and (causal or window is not None or relative is not None):
            raise ValueError(
                "the keys of add_bias_kv and add_zero_attn have no position, so no rule goes by it: "
                f"{causal=}, {window=}, {relative=}"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout = dropout
        self.batch_first = batch_first
        self.head_dim = embed_dim // num_heads
        self.add_zero_attn = add_zero_attn
        self.causal = causal
        self.window = None if window is None else (int(window[0]), int(window[1]))
        self.relative = relative
        self._define(bias, add_bias_kv, relative_rows, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def _define(self, bias: bool, add_bias_kv: bool, relative_rows: int | None, where: dict[str, Any]) -> None:
        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **where))

        define_projections(self, bias, where)
        kv_width = self.head_dim * self.num_kv_heads
        self.bias_k = parameter(1, 1, kv_width) if add_bias_kv else None
        self.bias_v = parameter(1, 1, kv_width) if add_bias_kv else None
        rows = _table_rows(self.relative, relative_rows)
        self.relative_position_bias_table = parameter(rows, self.num_heads) if rows else None

    def reset_parameters(self) -> None:
        """Draw the parameters of the projections to q, k and v, the extra keys and the table, as torch does."""
        draw_projections(self)
        if self.bias_k is not None and self.bias_v is not None:
            nn.init.xavier_normal_(self.bias_k)
            nn.init.xavier_normal_(self.bias_v)
        if self.relative_position_bias_table is not None:
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` to ``key`` and ``value``.

        Args:
            query: ``(T, B, E)``, ``(B, T, E)`` with ``batch_first``, or ``(T, E)``.
            key: the same with S tokens of ``kdim`` channels.
            value: the same with S tokens of ``vdim`` channels.
            key_padding_mask: ``(B, S)``, or ``(S,)`` unbatched: boolean, True for keys that are left out, or floating,
                added to the logits.
            need_weights: return the attention weights too; they are computed in plain torch, in memory of T·S. Unlike
                torch's module, this one does so only where it is asked.
            attn_mask: ``(T, S)`` or ``(B·H, T, S)``: boolean, True where a query may **not** see a key, or floating,
                added to the logits; a floating one has a gradient.
            average_attn_weights: return the mean of the weights over heads.
            is_causal: ``attn_mask`` is the causal mask, and need not be read. Without ``attn_mask`` it stands for it:
                keys j <= i.

        Returns:
            The output, shaped as ``query``, and the weights ``(B, T, S)``, ``(B, H, T, S)`` if not averaged, unbatched
            without B; or None. A query that sees no key gives the bias of the output projection.

        Raises:
            ValueError: shapes that do not fit; the message holds them.
            TypeError: a mask that is neither boolean nor floating.
        """
        inputs = (self, query, key, value)
        how: dict[str, Any] = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "is_causal": is_causal}
        how |= self._rules(query, key)
        if not need_weights:
            return self.out_proj(attend_heads(*inputs, **how)), None
        found: list[Tensor] = []
        out = self.out_proj(attend_heads(*inputs, partial(_attend_in_torch, found), **how))
        weights = found[0].mean(1) if average_attn_weights else found[0]
        return out, weights.squeeze(0) if query.dim() == 2 else weights

    def _rules(self, query: Tensor, key: Tensor) -> dict[str, Any]:
        """The op's arguments by position."""
        rules: dict[str, Any] = {"causal": True} if self.causal else {}
        if self.window is not None:
            rules["window"] = self.window
        table: Tensor | None = self.relative_position_bias_table
        if table is not None:
            axis = 1 if self.batch_first and query.dim() == 3 else 0
            if self.relative == "toeplitz":
                table = _middle(table, query.shape[axis], key.shape[axis])
            rules |= {"bias_table": table, "bias_index": self.relative}
        return rules

    def extra_repr(self) -> str:
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
        plain = {"num_kv_heads": self.num_heads, "causal": False, "window": None, "relative": None}
        return text + "".join(f", {n}={getattr(self, n)!r}" for n, v in plain.items() if getattr(self, n) != v)


def check_sizes(embed_dim: int, num_heads: int, num_kv_heads: int) -> None:
    if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
        raise ValueError(f"num_heads must divide embed_dim, got {embed_dim=}, {num_heads=}")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads, got {num_heads=}, {num_kv_heads=}")


def _table_rows(relative: Relative | None, rows: int | None) -> int:
    """How many rows the table of ``relative`` has; 0 for none."""
    if relative is None:
        if rows is not None:
            raise ValueError(f"relative_rows is for a relative bias, got {rows} and none")
        return 0
    if isinstance(relative, Grid2D):
        if rows not in (None, relative.rows):
            raise ValueError(f"{relative} has {relative.rows} rows, got relative_rows={rows}")
        return relative.rows
    if isinstance(relative, T5Buckets):
        rows = 32 if rows is None else rows
        relative.rows_of(torch.zeros(1, dtype=torch.int64), rows)  # which refuses numbers that leave no room
        return rows
    if relative != "toeplitz":
        raise ValueError(f"relative must be T5Buckets, Grid2D or 'toeplitz', got {relative!r}")
    if rows is None or rows < 1 or rows % 2 == 0:
        raise ValueError(f"'toeplitz' needs relative_rows = 2·L − 1 for sequences of up to L tokens, got {rows}")
    return rows


def _middle(table: Tensor, queries: int, keys: int) -> Tensor:
    """The part of a Toeplitz table, whose middle row is distance 0, that T queries and S keys reach."""
    longest = (table.shape[0] + 1) // 2
    if max(queries, keys) > longest:
        raise ValueError(f"the table is for up to {longest} tokens, got {queries} queries and {keys} keys")
    return table[longest - keys : longest - 1 + queries]
