"""Reading gated attention units of other libraries: what :mod:`accel.nn.gated` makes its layers of.

None of the libraries is imported: a module is known by the path of its class.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.ops.rules import T5Buckets


class Read(NamedTuple):
    """What a layer of ours is made of."""

    given: dict[str, Any]  # the arguments of its class
    state: dict[str, Tensor]  # its state_dict
    norm_eps: float | None


def read_unit(module: nn.Module) -> Read:
    """Of ``GatedAttentionUnit``."""
    library, name = _kind(module)
    if (library, name) == ("flash_pytorch", "GAU"):
        return _flash_pytorch_unit(module)
    if (library, name) == ("mmpose", "RTMCCBlock"):
        return _mmpose(module)
    if library == "bert4torch" and name in ("GatedAttention", "GatedAttentionUnit"):
        return _bert4torch(module)
    raise TypeError(
        "from_module takes flash_pytorch's GAU, mmpose's RTMCCBlock and bert4torch's GatedAttention, not "
        f"{type(module).__module__}.{name}"
    )


def read_flash(module: nn.Module) -> Read:
    """Of ``FLASH``."""
    library, name = _kind(module)
    if (library, name) != ("flash_pytorch", "FLASH"):
        raise TypeError(f"from_module takes flash_pytorch's FLASH, not {type(module).__module__}.{name}")
    m: Any = module
    if not m.causal and not m.reduce_group_non_causal_attn:
        raise ValueError("FLASH with reduce_group_non_causal_attn=False sees no other chunk in its linear part")
    rotary = 0
    if m.rotary_pos_emb is not None:
        freqs = m.rotary_pos_emb.freqs.detach()
        rotary = 2 * freqs.numel()
        usual = 10000.0 ** -(torch.arange(0, rotary, 2, device=freqs.device) / rotary)
        if not torch.allclose(freqs.float(), usual) or getattr(m.rotary_pos_emb, "use_xpos", False):
            raise ValueError("the rotary embedding has other frequencies than 10000 ** (−2i / size)")
    return _flash_pytorch(m, m.qk_offset_scale, m.to_out, rotary=rotary, shift=m.shift_tokens, chunk_size=m.group_size)


def _kind(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__.partition(".")[0], type(module).__name__


def _expansion(inner: int, embed_dim: int) -> float:
    """Of which ``int(embed_dim · expansion)`` is ``inner``, whatever the division rounds to."""
    return (inner + 0.5) / embed_dim


def _one_of(names: dict[str, str], module: Any, what: str) -> str:
    found = names.get(type(module).__name__)
    if found is None:
        raise ValueError(f"the {what} must be {' or '.join(names)}, got {type(module).__name__}")
    return found


# --- flash-pytorch ---


def _flash_pytorch_unit(m: Any) -> Read:
    how = {"scale": "length", "out_dropout": m.dropout.p, "residual": m.add_residual}
    return _flash_pytorch(m, m.offsetscale, m.to_out[0], **how)


def _flash_pytorch(m: Any, offsets: Any, to_out: nn.Linear, **how: Any) -> Read:
    norm = _one_of({"LayerNorm": "layer", "ScaleNorm": "scale"}, m.norm, "norm")
    given = {
        "embed_dim": to_out.out_features,
        "query_key_dim": offsets.gamma.shape[1],
        "expansion": _expansion(to_out.in_features, to_out.out_features),
        "activation": _one_of({"ReLUSquared": "relu2", "LaplacianAttnFn": "laplace"}, m.attn_fn, "activation"),
        "causal": m.causal,
        "norm": norm,
        "relative": T5Buckets(bidirectional=not m.causal, max_distance=m.rel_pos_bias.max_distance),
        "rows": m.rel_pos_bias.num_buckets,
        "table_scale": m.rel_pos_bias.scale,
        "dropout": m.dropout.p,
    }
    state = {f"norm.{name}": x for name, x in m.norm.state_dict().items() if norm == "layer" or name == "g"}
    for name in ("weight", "bias"):
        value, gate = getattr(m.to_hidden[0], name).chunk(2)
        state[f"to_hidden.{name}"] = torch.cat([gate, value, getattr(m.to_qk[0], name)])
        state[f"to_out.{name}"] = getattr(to_out, name)
    state |= {"gamma": offsets.gamma, "beta": offsets.beta}
    state["table"] = m.rel_pos_bias.relative_attention_bias.weight
    return Read(given | how, state, m.norm.eps)


# --- mmpose ---


def _mmpose(m: Any) -> Read:
    for amiss, words in (
        (m.attn_type != "self-attn", f"attn_type={m.attn_type!r}"),
        (m.pos_enc, f"pos_enc={m.pos_enc}, whose frequencies rise to 10⁴ radians a token"),
        (not isinstance(m.drop_path, nn.Identity), f"drop_path={type(m.drop_path).__name__}"),
        (not isinstance(m.act_fn, nn.SiLU), f"act_fn={type(m.act_fn).__name__}, not SiLU"),
        (not m.shortcut, f"{m.o.out_features} output channels for {m.uv.in_features}"),
    ):
        if amiss:
            raise ValueError(f"an RTMCCBlock cannot be a GatedAttentionUnit with {words}")
    given = {
        "embed_dim": m.uv.in_features,
        "query_key_dim": m.s,
        "expansion": _expansion(m.e, m.uv.in_features),
        "norm": "scale",
        "dropout": m.dropout_rate,
        "out_dropout": 0.0,
        "residual": "scaled",
        "bias": m.uv.bias is not None,
    }
    state = {"norm.g": m.ln.g, "gamma": m.gamma, "beta": m.beta, "residual_scale": m.res_scale.scale}
    state |= _dense("to_hidden", m.uv) | _dense("to_out", m.o)
    if m.use_rel_bias:  # inside its division by √s
        given |= {"relative": "toeplitz", "rows": m.w.numel(), "table_scale": m.s**-0.5}
        state["table"] = m.w.flip(0)[:, None]  # by query − key, where mmpose goes by key − query
    return Read(given, state, m.ln.eps)


def _dense(name: str, layer: nn.Linear) -> dict[str, Tensor]:
    return {f"{name}.{key}": x for key, x in layer.named_parameters()}


# --- bert4torch ---

ACTIVATIONS = {"softmax": "softmax", "softmax_plus": "softmax_plus", "squared_relu": "relu2"}


def _bert4torch(m: Any) -> Read:
    if m.hidden_fn is not F.silu and not isinstance(m.hidden_fn, nn.SiLU):
        raise ValueError(f"the activation must be silu, got {getattr(m.hidden_fn, '__name__', m.hidden_fn)}")
    if m.normalization not in ACTIVATIONS:
        raise ValueError(f"normalization must be one of {', '.join(ACTIVATIONS)}, got {m.normalization!r}")
    size, rotated = m.attention_head_size, m.p_bias == "rotary"
    given = {
        "embed_dim": m.i_dense.in_features,
        "query_key_dim": size,
        "expansion": _expansion(m.intermediate_size, m.i_dense.in_features),
        "activation": ACTIVATIONS[m.normalization],
        "average": m.normalization == "squared_relu",
        "scale": None if m.attention_scale else 1.0,
        "norm": None,
        "rotary": size if rotated else 0,
        "dropout": m.dropout.p if m.is_dropout else 0.0,
        "out_dropout": 0.0,
        "residual": False,
        "bias": m.i_dense.bias is not None,
    }
    gamma = m.offsetscale.gamma
    state = {"gamma": gamma, "beta": m.offsetscale.beta if m.offsetscale.bias else torch.zeros_like(gamma)}
    state |= _dense("to_hidden", m.i_dense) | _dense("to_out", m.o_dense)
    if rotated and _turns_halves(m.relative_positions_encoding):
        _pair_up(state, size)
    return Read(given, state, None)


def _turns_halves(rope: Any) -> bool:
    """Whether channel i turns with channel i + s/2, not with its neighbour."""
    if type(rope).__name__ not in ("RopePositionEncoding", "RoPEPositionEncoding"):
        raise ValueError(f"the rotary embedding must be the plain one, got {type(rope).__name__}")
    if (rope.rope_theta, rope.scaling_factor or 1, rope.ntk_alpha or 1) != (10000, 1, 1):
        raise ValueError(
            "the rotary embedding has other frequencies than 10000 ** (−2i / size), got "
            f"{rope.rope_theta=}, {rope.scaling_factor=}, {rope.ntk_alpha=}"
        )
    return bool(rope.rope_rank != "adjacent")


def _pair_up(state: dict[str, Tensor], size: int) -> None:
    """Bring channels i and i + s/2 side by side: q·k does not know in which order its channels come."""
    order = torch.arange(size).view(2, -1).t().flatten()
    for name, x in state.items():
        if name in ("gamma", "beta"):
            state[name] = x[:, order.to(x.device)]
        elif name.startswith("to_hidden."):
            state[name] = torch.cat([x[:-size], x[-size:][order.to(x.device)]])
