"""Stand-ins for the gated attention units of mmpose, bert4torch and MossFormer, which are not installed here.

The same class paths, attributes, parameters and meaning, computed pair by pair from their definitions; they know
nothing of accel.
"""

import math
import sys
import types

import torch
import torch.nn.functional as F
from torch import nn

RTMCC = "mmpose.models.utils.rtmcc_block"


class ScaleNorm(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.scale, self.eps = dim**-0.5, eps
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x):
        size = x.square().sum(-1, keepdim=True).sqrt() * self.scale
        return x / size.clamp(min=self.eps) * self.g


# --- mmpose ---


class Scale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.scale


def rope(x, dim):
    """Channels i and i + half turn together by position · 10000 ** (i / half): the frequencies rise."""
    half = x.shape[-1] // 2
    position = torch.arange(x.shape[dim]).view(-1, *[1] * (x.dim() - dim - 1))
    angle = position * 10000 ** (torch.arange(half) / half)
    angle = angle.view(*[1] * (x.dim() - angle.dim()), *angle.shape)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def mmpose_is_there(monkeypatch):
    """The module of mmpose's block, with the function of its own that the block calls."""
    module = types.ModuleType(RTMCC)
    module.rope = rope
    monkeypatch.setitem(sys.modules, RTMCC, module)


class RTMCCBlock(nn.Module):
    __module__ = RTMCC

    def __init__(
        self,
        num_token,
        dim,
        out_dim=None,
        s=16,
        dropout_rate=0.0,
        attn_type="self-attn",
        act_fn=nn.SiLU,
        bias=False,
        use_rel_bias=True,
        pos_enc=False,
    ):
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        self.s, self.e, self.num_token, self.sqrt_s = s, 2 * dim, num_token, math.sqrt(s)
        self.use_rel_bias, self.attn_type, self.pos_enc = use_rel_bias, attn_type, pos_enc
        self.drop_path, self.act_fn = nn.Identity(), act_fn(inplace=True)
        self.ln, self.o = ScaleNorm(dim), nn.Linear(self.e, out_dim, bias=bias)
        if attn_type == "self-attn":
            self.uv = nn.Linear(dim, 2 * self.e + s, bias=bias)
            self.gamma, self.beta = nn.Parameter(torch.rand(2, s)), nn.Parameter(torch.rand(2, s))
            if use_rel_bias:
                self.w = nn.Parameter(torch.rand(2 * num_token - 1))
        else:
            self.uv = nn.Linear(dim, self.e + s, bias=bias)
            self.k_fc, self.v_fc = nn.Linear(dim, s, bias=bias), nn.Linear(dim, self.e, bias=bias)
            if use_rel_bias:
                self.a, self.b = nn.Parameter(torch.rand(1, s)), nn.Parameter(torch.rand(1, s))
        self.shortcut = dim == out_dim
        if self.shortcut:
            self.res_scale = Scale(dim)
        self.dropout_rate = dropout_rate
        if dropout_rate > 0.0:
            self.dropout = nn.Dropout(dropout_rate)

    def rel_pos_bias(self, seq_len, k_len=None):
        if self.attn_type == "cross-attn":
            a, b = self.a.expand(seq_len, -1), self.b.expand(k_len, -1)
            return rope(a[None], 1) @ rope(b[None], 1).mT
        at = torch.arange(seq_len)
        return self.w[: 2 * seq_len - 1][at[None] - at[:, None] + seq_len - 1][None]

    def _forward(self, inputs):
        x, key, value = (inputs, None, None) if self.attn_type == "self-attn" else inputs
        hidden = self.act_fn(self.uv(self.ln(x)))
        if self.attn_type == "self-attn":
            gate, v, base = hidden[..., : self.e], hidden[..., self.e : 2 * self.e], hidden[..., 2 * self.e :]
            q, k = base * self.gamma[0] + self.beta[0], base * self.gamma[1] + self.beta[1]
        else:
            gate, q = hidden[..., : self.e], hidden[..., self.e :]
            k, v = self.k_fc(key), self.v_fc(value)
        if self.pos_enc:
            q, k = rope(q, 1), rope(k, 1)
        logits = q @ k.mT
        if self.use_rel_bias:
            logits += self.rel_pos_bias(q.shape[1], k.shape[1])  # in place: the sum has the dtype of q·k
        weights = F.relu(logits / self.sqrt_s).square()
        if self.dropout_rate > 0.0:
            weights = self.dropout(weights)
        return self.o(gate * (weights @ v))

    def forward(self, x):
        branch = self.drop_path(self._forward(x))
        if not self.shortcut:
            return branch
        return self.res_scale(x[0] if self.attn_type == "cross-attn" else x) + branch


# --- bert4torch ---


class RopePositionEncoding(nn.Module):
    __module__ = "bert4torch.layers.position_encoding"

    def __init__(self, size, rope_rank="adjacent", rope_theta=10000.0):
        super().__init__()
        self.rope_rank, self.rope_theta, self.scaling_factor, self.ntk_alpha = rope_rank, rope_theta, 1.0, 1.0
        self.embedding_size = size

    def forward(self, x, position_ids):
        frequency = self.rope_theta ** (-torch.arange(0, self.embedding_size, 2) / self.embedding_size)
        turn = torch.polar(torch.ones(()), position_ids[..., None] * frequency).to(torch.complex128)
        pairs = x.unflatten(-1, (-1, 2)) if self.rope_rank == "adjacent" else x.unflatten(-1, (2, -1)).mT
        turned = torch.view_as_real(torch.view_as_complex(pairs.double().contiguous()) * turn).to(x.dtype)
        return (turned if self.rope_rank == "adjacent" else turned.mT).flatten(-2)


class OffsetScale(nn.Module):
    def __init__(self, size, heads, bias=True):
        super().__init__()
        self.bias, self.gamma = bias, nn.Parameter(torch.randn(heads, size))
        if bias:
            self.beta = nn.Parameter(torch.randn(heads, size))

    def forward(self, x):
        return [x * g + (self.beta[i] if self.bias else 0.0) for i, g in enumerate(self.gamma)]


class GatedAttention(nn.Module):
    __module__ = "bert4torch.layers.attention.attention_layer"

    def __init__(
        self,
        hidden_size,
        attention_key_size=16,
        normalization="softmax_plus",
        hidden_fn=F.silu,
        dropout=0.0,
        attention_scale=True,
        bias=True,
        rope_rank=None,
    ):
        super().__init__()
        self.intermediate_size, self.attention_head_size = 2 * hidden_size, attention_key_size
        self.attention_scale, self.normalization, self.hidden_fn = attention_scale, normalization, hidden_fn
        self.is_dropout, self.dropout = dropout > 0.0, nn.Dropout(dropout)
        self.i_dense = nn.Linear(hidden_size, 2 * self.intermediate_size + attention_key_size, bias=bias)
        self.offsetscale = OffsetScale(attention_key_size, 2, bias)
        self.o_dense = nn.Linear(self.intermediate_size, hidden_size, bias=bias)
        self.p_bias = None if rope_rank is None else "rotary"
        if rope_rank is not None:
            self.relative_positions_encoding = RopePositionEncoding(attention_key_size, rope_rank)

    def forward(self, hidden_states, attention_mask, position_ids):
        e = self.intermediate_size
        hidden = self.hidden_fn(self.i_dense(hidden_states))
        gate, v, base = hidden[..., :e], hidden[..., e : 2 * e], hidden[..., 2 * e :]
        q, k = self.offsetscale(base)
        if self.p_bias == "rotary":
            q, k = (self.relative_positions_encoding(x, position_ids) for x in (q, k))
        logits = q @ k.mT
        if self.attention_scale:
            logits = logits / self.attention_head_size**0.5
        live = torch.ones_like(logits)
        if attention_mask is not None:  # (B, 1, 1, T) of ones and zeros
            live = live * attention_mask[:, 0]
            logits = logits - 1e12 * (1 - live)
        seen = live.sum(-1, keepdim=True)
        if self.normalization == "squared_relu":
            weights = F.relu(logits) ** 2 / seen.clamp(min=1.0)
        else:
            plus = seen.log() / math.log(512.0) if self.normalization == "softmax_plus" else 1.0
            weights = torch.softmax(logits * plus, -1)
        if self.is_dropout:
            weights = self.dropout(weights)
        return self.o_dense(gate * (weights @ v))


# --- MossFormer ---


class Rotary(nn.Module):
    """The first channels turned in pairs, by frequencies that are learned."""

    def __init__(self, size):
        super().__init__()
        self.freqs = nn.Parameter(1.0 / (1 + torch.arange(size // 2)))

    def rotate_queries_or_keys(self, x):
        angle = torch.arange(x.shape[-2])[:, None] * self.freqs
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        size = 2 * self.freqs.numel()
        even, odd = x[..., 0:size:2], x[..., 1:size:2]
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
        return torch.cat([turned, x[..., size:]], -1)


class Moss(nn.Module):
    """What the blocks share: plain projections stand for the convolutions, which are not looked at."""

    def __init__(self, dim, group_size=256, query_key_dim=16, causal=False, dropout=0.0, rotary=8, expansion=4):
        super().__init__()
        self.group_size, self.causal = group_size, causal
        self.rotary_pos_emb = Rotary(rotary) if rotary else None
        self.dropout = nn.Dropout(dropout)
        self.to_hidden, self.to_qk = nn.Linear(dim, dim * expansion), nn.Linear(dim, query_key_dim)
        self.qk_offset_scale = OffsetScale(query_key_dim, 4)
        self.to_out = nn.Linear(dim * expansion // 2, dim)

    def uses(self, x):
        v, u = self.to_hidden(x).chunk(2, -1)
        return *self.qk_offset_scale(F.silu(self.to_qk(x))), v, u

    def out(self, x, v, u, attended):
        by_v, by_u = attended
        return x + self.to_out(by_u * v * torch.sigmoid(by_v * u))

    def rotated(self, *uses):
        turn = self.rotary_pos_emb
        return uses if turn is None else [turn.rotate_queries_or_keys(x) for x in uses]

    def weights(self, x, quad_q, lin_q, quad_k, lin_k, mask, group):
        """Of every pair, ``(B, T, T)``: relu² of the logits in a group, and the linear part beyond."""
        tokens = x.shape[-2]
        at = torch.arange(tokens)
        row, column = at[:, None], at[None]
        same, before = row // group == column // group, row // group > column // group
        quad = self.dropout(F.relu(quad_q @ quad_k.mT / group) ** 2) * same
        linear = lin_q @ lin_k.mT / (group if self.causal else tokens)
        if self.causal:
            quad, linear = quad * (row >= column), linear * before
        return (quad + linear) * (1.0 if mask is None else mask[:, None])


class FLASH_ShareA_FFConvM(Moss):  # noqa: N801
    __module__ = "clearvoice.models.mossformer2_ss.mossformer2_block"

    def forward(self, x, *, mask=None):
        quad_q, lin_q, quad_k, lin_k, v, u = self.uses(x)
        return self.out(x, v, u, self.cal_attention(x, quad_q, lin_q, quad_k, lin_k, v, u, mask))

    def cal_attention(self, x, quad_q, lin_q, quad_k, lin_k, v, u, mask=None):
        weights = self.weights(x, *self.rotated(quad_q, lin_q, quad_k, lin_k), mask, self.group_size)
        return map(weights.to(v.dtype).matmul, (v, u))


class MossFormerBlock(FLASH_ShareA_FFConvM):
    __module__ = "modelscope.models.audio.separation.mossformer_block"


class MossFormer(Moss):
    __module__ = "clearvoice.models.mossformer_gan_se.mossformer"

    def forward(self, x):
        batch = x.shape[0]
        x = x.flatten(0, 1)
        quad_q, lin_q, quad_k, lin_k, v, u = self.uses(x)
        return self.out(x, v, u, self.cal_attention(x, quad_q, lin_q, quad_k, lin_k, v, u, batch))

    def cal_attention(self, x, quad_q, lin_q, quad_k, lin_k, v, u, B, mask=None):
        quad_q, lin_q, quad_k, lin_k = self.rotated(quad_q, lin_q, quad_k, lin_k)
        weights = self.weights(x, quad_q, lin_q, quad_k, lin_k, mask, x.shape[1])
        q, k = (y.unflatten(0, (B, -1)) for y in (quad_q, quad_k))
        along = self.dropout(F.relu(torch.einsum("btqc,bsqc->bqts", q, k) / q.shape[1]) ** 2)
        along = along * ~torch.eye(q.shape[1], dtype=torch.bool)
        made = []
        for y in (v, u):
            others = torch.einsum("bqts,bsqe->btqe", along.to(y.dtype), y.unflatten(0, (B, -1)))
            made.append(weights.to(y.dtype) @ y + others.flatten(0, 1))
        return made
