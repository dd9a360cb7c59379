"""Shifted-window attention of Swin Transformer v1, v2 and Video Swin, between the qkv and the output projection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import backends, dispatch, library, philox
from accel.backends import KERNEL_DTYPES, check_beside, check_floating, inner_dtype, integer
from accel.ops.grid import relative_position_index

LN_100 = math.log(100.0)
NORM_EPS = 1e-12


class Args(NamedTuple):
    """The checked arguments every backend receives. Maps are always ``(B, Z, Y, X, .)``; a 2-D map has Z = 1."""

    qkv: Tensor  # (B, Z, Y, X, 3·C) contiguous, the last axis as (3, H, D)
    bias_table: Tensor | None  # ((2·wz−1)·(2·wy−1)·(2·wx−1), H)
    bias: Tensor | None  # (H, N, N), instead of the table
    head_scale: Tensor | None  # (H,) fp32 (fp64 beside fp64): cosine attention, its factor per head
    qkv_bias: Tensor | None  # (3·C,) what a padded token holds; zeros if None
    seed: Tensor | None  # (1,) int64 where dropout_p > 0
    num_heads: int
    window: list[int]  # [wz, wy, wx]
    shift: list[int]  # [sz, sy, sx], already clamped: backends take it literally
    scale: float  # factor of q·k where head_scale is None
    roll_first: bool  # roll the map, then pad it (timm); else pad, then roll
    mask_value: float
    dropout_p: float


class Sizes(NamedTuple):
    """What follows from the shapes alone."""

    head_dim: int
    tokens: int  # N, tokens of a window
    windows: int  # windows of one image
    padded: tuple[int, int, int]


def sizes(qkv: Tensor, num_heads: int, window: Sequence[int]) -> Sizes:
    padded = [-(-qkv.shape[i + 1] // window[i]) * window[i] for i in range(3)]
    windows = math.prod([padded[i] // window[i] for i in range(3)])
    return Sizes(qkv.shape[-1] // (3 * num_heads), math.prod(window), windows, (padded[0], padded[1], padded[2]))


# --- the definition ---


def _partition(x: Tensor, window: Sequence[int]) -> Tensor:
    """``(B, Z, Y, X, F)`` of whole windows to ``(B, windows, N, F)``."""
    b, z, y, x_, f = x.shape
    wz, wy, wx = window
    x = x.view(b, z // wz, wz, y // wy, wy, x_ // wx, wx, f).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, (z // wz) * (y // wy) * (x_ // wx), wz * wy * wx, f)


def _reverse(x: Tensor, window: Sequence[int], padded: Sequence[int]) -> Tensor:
    """The inverse of :func:`_partition`."""
    b, _, _, f = x.shape
    (wz, wy, wx), (z, y, x_) = window, padded
    x = x.view(b, z // wz, y // wy, x_ // wx, wz, wy, wx, f).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(b, z, y, x_, f)


def _regions(window: Sequence[int], shift: Sequence[int], padded: Sequence[int], device: torch.device) -> Tensor:
    """A label per token of every window, int64 ``(windows, N)``; tokens of different label are masked apart.

    Along an axis with a shift only the last window holds two regions: what was rolled around, and the rest.
    """
    label = torch.zeros((1, 1, 1), dtype=torch.int64, device=device)
    for i in range(3):
        at = torch.arange(padded[i], device=device)
        axis = (at >= padded[i] - shift[i]).long() if shift[i] else torch.zeros_like(at)
        label = label * 2 + axis.view([-1 if j == i else 1 for j in range(3)])
    return _partition(label[None, ..., None], window)[0, ..., 0]


def _normalize(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (norm > 0) / norm.clamp_min(NORM_EPS)  # a zero vector stays zero, its gradient too


def reference(
    qkv: Tensor,
    bias_table: Tensor | None,
    bias: Tensor | None,
    head_scale: Tensor | None,
    qkv_bias: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    window: list[int],
    shift: list[int],
    scale: float,
    roll_first: bool,
    mask_value: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The op in plain torch, fp32 or fp64 inside: output ``(B, Z, Y, X, C)`` and log-sum-exp ``(B·windows, H, N)``."""
    inner = inner_dtype(qkv)
    head_dim, tokens, windows, padded = sizes(qkv, num_heads, window)
    batch, (size_z, size_y, size_x) = qkv.shape[0], qkv.shape[1:4]
    x = qkv.to(inner)
    fill = torch.zeros(qkv.shape[-1], dtype=inner, device=qkv.device) if qkv_bias is None else qkv_bias.to(inner)
    back = [-s for s in shift]
    if roll_first:
        x = torch.roll(x, back, (1, 2, 3))
    for axis in (1, 2, 3):
        short = padded[axis - 1] - x.shape[axis]
        if short or axis == 3:  # always once, so that qkv_bias has a gradient, of zeros, where nothing is padded
            shape = [*x.shape[:axis], short, *x.shape[axis + 1 :]]
            x = torch.cat([x, fill.expand(shape)], axis)
    if not roll_first:
        x = torch.roll(x, back, (1, 2, 3))

    x = _partition(x, window).view(batch, windows, tokens, 3, num_heads, head_dim).permute(3, 0, 1, 4, 2, 5)
    q, k, v = x[0], x[1], x[2]  # (B, windows, H, N, D)
    if head_scale is None:
        logits = (q * scale) @ k.transpose(-2, -1)
    else:
        logits = _normalize(q) @ _normalize(k).transpose(-2, -1) * head_scale.to(inner)[:, None, None]
    if bias_table is not None:
        index = relative_position_index(window, qkv.device)
        logits = logits + bias_table.to(inner)[index].permute(2, 0, 1)
    if bias is not None:
        logits = logits + bias.to(inner)
    if any(shift):
        label = _regions(window, shift, padded, qkv.device)
        apart = label[:, None, :] != label[:, :, None]  # (windows, N, N)
        logits = logits + (apart.to(inner) * mask_value)[:, None]
    lse = torch.logsumexp(logits, -1)
    p = torch.softmax(logits, -1)
    if dropout_p > 0.0:
        assert seed is not None
        p = p * philox.keep_mask(seed, tuple(p.shape), dropout_p) / (1.0 - dropout_p)
    out = (p @ v).permute(0, 1, 3, 2, 4).reshape(batch, windows, tokens, num_heads * head_dim)

    out = _reverse(out, window, padded)
    if roll_first:
        out = torch.roll(out[:, :size_z, :size_y, :size_x], shift, (1, 2, 3))
    else:
        out = torch.roll(out, shift, (1, 2, 3))[:, :size_z, :size_y, :size_x]
    return out.to(qkv.dtype).contiguous(), lse.reshape(batch * windows, num_heads, tokens)


# --- backends, fastest first for each device ---

MAX_HEAD_SIZE = 128


def _why_not_size(args: Args) -> str | None:
    """Which head sizes no kernel of ours takes, whatever its language."""
    head_dim = args.qkv.shape[-1] // (3 * args.num_heads)
    if head_dim % 4 or head_dim > MAX_HEAD_SIZE:
        return f"it takes head sizes that are a multiple of 4 up to {MAX_HEAD_SIZE}, not {head_dim}"
    return None


def _why_not_cpu(args: Args) -> str | None:
    return backends.why_not_cpu(args) or _why_not_size(args)


def _fp32(*small: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.float() for x in small]


def _cpu_forward(qkv: Tensor, *args: Any) -> Any:
    return torch.ops.accel_native.window_attention_forward.default(qkv, *_fp32(*args[:4]), *args[4:])


def _cpu_backward(grad_out: Tensor, lse: Tensor, qkv: Tensor, *args: Any) -> Any:
    *args_, needs = args  # lse is not read: whole rows of logits are at hand again, and recomputed exactly
    native = torch.ops.accel_native.window_attention_backward.default
    return native(grad_out, qkv, *_fp32(*args_[:4]), *args_[4:], *needs)


_triton = backends.triton(__name__)


def _why_not_triton(args: Args) -> str | None:
    return _triton.why_not(args) or _why_not_size(args)


# --- declaration ---


def _fake(args: Args) -> tuple[Tensor, Tensor]:
    qkv = args.qkv
    _, tokens, windows, _ = sizes(qkv, args.num_heads, args.window)
    out = qkv.new_empty([*qkv.shape[:-1], qkv.shape[-1] // 3])
    return out, qkv.new_empty((qkv.shape[0] * windows, args.num_heads, tokens), dtype=torch.float32)


def _backward_fake(args: Args, made: Sequence[bool]) -> tuple[Tensor, ...]:
    small = [x.shape if x is not None and wanted else (0,) for x, wanted in zip(args[1:5], made[1:], strict=True)]
    return torch.empty_like(args.qkv), *[args.qkv.new_empty(shape, dtype=torch.float32) for shape in small]


def _product_flops(args: Args) -> int:
    """FLOPs of one (N × D) · (D × N) product in every window and head."""
    head_dim, tokens, windows, _ = sizes(args.qkv, args.num_heads, args.window)
    return 2 * args.qkv.shape[0] * windows * args.num_heads * tokens * tokens * head_dim


# --- the public function ---


def _triple(values: Sequence[int], name: str, rank: int, fill: int) -> list[int]:
    """``values`` for the two or three axes of a map of ``rank`` 4 or 5, with the missing first axis filled in."""
    if isinstance(values, int) or len(values) != rank - 2:
        raise ValueError(f"{name} must hold {rank - 2} integers for qkv of rank {rank}, got {name}={values!r}")
    try:
        out = [integer(v) for v in values]
    except TypeError:
        raise TypeError(f"{name} must hold integers, got {name}={values!r}") from None
    return out if rank == 5 else [fill, *out]


def _prepare(
    qkv: Tensor,
    bias_table: Tensor | None = None,
    *,
    num_heads: int,
    window_size: Sequence[int],
    shift_size: Sequence[int] | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    qkv_bias: Tensor | None = None,
    pad_order: str = "pad_then_roll",
    mask_value: float = -100.0,
    clamp_shift: bool = True,
    dropout_p: float = 0.0,
) -> Args:
    """Check a public call and bring it to the form the backends take."""
    check_floating(qkv, "qkv")
    if qkv.dim() not in (4, 5):
        raise ValueError(f"qkv must be (B, Hh, Ww, 3·C) or (B, D, Hh, Ww, 3·C), got {tuple(qkv.shape)=}")
    for name, x in (("bias_table", bias_table), ("bias", bias), ("logit_scale", logit_scale), ("qkv_bias", qkv_bias)):
        if x is not None:
            check_beside(x, name, qkv, "qkv")
    if num_heads < 1 or qkv.shape[-1] == 0 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(f"the last axis of qkv must be 3·H·D for {num_heads=}, got {tuple(qkv.shape)=}")
    window = _triple(window_size, "window_size", qkv.dim(), 1)
    shift = [0, 0, 0] if shift_size is None else _triple(shift_size, "shift_size", qkv.dim(), 0)
    if min(window) < 1:
        raise ValueError(f"window_size must be positive, got {window_size=}")
    if any(not 0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(f"shift_size must be at least 0 and below window_size, got {shift_size=}, {window_size=}")
    if pad_order not in ("pad_then_roll", "roll_then_pad"):
        raise ValueError(f"pad_order must be 'pad_then_roll' or 'roll_then_pad', got {pad_order=}")
    if not -math.inf < mask_value < math.inf:
        raise ValueError(f"mask_value is added to logits and must be finite, got {mask_value=}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p=}")
    tokens = math.prod(window)
    if bias_table is not None and bias is not None:
        raise ValueError(f"give bias_table or bias, not both: {tuple(bias_table.shape)=}, {tuple(bias.shape)=}")
    rows = math.prod([2 * w - 1 for w in window])
    if bias_table is not None and tuple(bias_table.shape) != (rows, num_heads):
        raise ValueError(
            f"bias_table must be ({rows}, {num_heads}) for {window_size=}, {num_heads=}, got {tuple(bias_table.shape)=}"
        )
    if bias is not None and tuple(bias.shape) != (num_heads, tokens, tokens):
        raise ValueError(
            f"bias must be ({num_heads}, {tokens}, {tokens}) for {window_size=}, {num_heads=}, got {tuple(bias.shape)=}"
        )
    if qkv_bias is not None and tuple(qkv_bias.shape) != (qkv.shape[-1],):
        raise ValueError(f"qkv_bias must be ({qkv.shape[-1]},), got {tuple(qkv_bias.shape)=}")
    if logit_scale is not None and scale is not None:
        raise ValueError(f"give scale or logit_scale, not both: {scale=}, {tuple(logit_scale.shape)=}")
    if logit_scale is not None and logit_scale.numel() != num_heads:
        raise ValueError(f"logit_scale must have {num_heads=} elements, got {tuple(logit_scale.shape)=}")

    qkv = library.autocast(qkv)
    if qkv.dim() == 4:
        qkv = qkv.unsqueeze(1)
    if clamp_shift:
        padded = sizes(qkv, num_heads, window).padded
        shift = [0 if window[i] >= padded[i] else shift[i] for i in range(3)]
    head_scale = None
    if logit_scale is not None:
        head_scale = logit_scale.reshape(num_heads).to(inner_dtype(qkv)).clamp(max=LN_100).exp()
    return Args(
        qkv=qkv.contiguous(),
        bias_table=None if bias_table is None else bias_table.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        head_scale=head_scale,
        qkv_bias=None if qkv_bias is None else qkv_bias.contiguous(),
        seed=philox.new_seed(qkv.device) if dropout_p > 0.0 else None,
        num_heads=num_heads,
        window=window,
        shift=shift,
        scale=(qkv.shape[-1] // (3 * num_heads)) ** -0.5 if scale is None else float(scale),
        roll_first=pad_order == "roll_then_pad",
        mask_value=float(mask_value),
        dropout_p=float(dropout_p),
    )


_run = library.differentiable(
    "window_attention",
    Args,
    reference,
    gradients=5,
    always=1,
    outputs=["out", "lse"],
    keep_outputs=["lse"],
    fake=_fake,
    flops=lambda args: 2 * _product_flops(args),
    backward_fake=_backward_fake,
    backward_flops=lambda args, made: 5 * _product_flops(args),
)


def window_attention(
    qkv: Tensor,
    bias_table: Tensor | None = None,
    *,
    num_heads: int,
    window_size: Sequence[int],
    shift_size: Sequence[int] | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    qkv_bias: Tensor | None = None,
    pad_order: str = "pad_then_roll",
    mask_value: float = -100.0,
    clamp_shift: bool = True,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    r"""Attention inside shifted windows: roll, pad, partition, attend, reverse and roll back, in one kernel.

    In every window of N tokens and every head, with i, j tokens of the window,

    .. math:: o_i = \sum_j \mathrm{softmax}_j(s\, q_i \cdot k_j + b_{ij} + m_{ij})\, v_j

    where ``b`` is the relative position bias and ``m`` is ``mask_value`` between tokens that only the roll made
    neighbours, else 0. With ``logit_scale`` q and k are divided by their norm (at least 1e-12) and
    ``s = exp(min(logit_scale, ln 100))`` per head (Swin v2); a zero vector stays zero and has zero gradient.

    Padded tokens take part like any other: they hold ``qkv_bias``, which is what a projection makes of a zero.

    Args:
        qkv: ``(B, Hh, Ww, 3·C)`` or, for 3-D windows, ``(B, D, Hh, Ww, 3·C)``; float32, bfloat16, float16, and float64
            on the reference. The last axis is q, k, v, each ``(H, head size)``. Under autocast it is cast as a
            matrix product's operand would be.
        bias_table: ``((2·wh−1)·(2·ww−1), H)``, with a leading ``(2·wd−1)·`` in 3-D: row
            ``(yi−yj+wh−1)·(2·ww−1) + (xi−xj+ww−1)``. Any floating dtype; has a gradient.
        num_heads: H, dividing C.
        window_size: ``(wh, ww)`` or ``(wd, wh, ww)``. Maps that are no multiple of it are padded at the far end.
        shift_size: cyclic shift per axis, ``0 <= shift < window``; zeros if None.
        bias: ``(H, N, N)`` in place of ``bias_table``; has a gradient.
        scale: factor of q·k; head size ** −0.5 if None.
        logit_scale: H elements in any shape, in place of ``scale``: cosine attention. Has a gradient.
        qkv_bias: ``(3·C,)`` held by padded tokens, zeros if None; its gradient is what these tokens receive.
        pad_order: ``"pad_then_roll"`` (torchvision, transformers, Video Swin) or ``"roll_then_pad"`` (timm). They
            differ only where the map is no multiple of the window and the shift is not 0.
        mask_value: finite, added to the logits of tokens to be kept apart.
        clamp_shift: zero the shift of an axis whose window covers the padded map (torchvision); False takes it
            as given.
        dropout_p: probability in [0, 1) that a weight is dropped; drawn anew at each call from torch's generator.
        backend: one of the op's backends by name, or None for the first that can run the call.

    Returns:
        ``(B, Hh, Ww, C)`` or ``(B, D, Hh, Ww, C)`` in the dtype of ``qkv``, contiguous.

    Raises:
        TypeError: a tensor that must be floating is not.
        ValueError: shapes, sizes or devices that do not fit; the message holds them.
        NotImplementedError: ``backend`` cannot run this call; the message says why.

    Follows Liu et al., Swin Transformer (2021), Swin Transformer V2 (2022) and Video Swin Transformer (2022).
    """
    args = _prepare(
        qkv,
        bias_table,
        num_heads=num_heads,
        window_size=window_size,
        shift_size=shift_size,
        bias=bias,
        scale=scale,
        logit_scale=logit_scale,
        qkv_bias=qkv_bias,
        pad_order=pad_order,
        mask_value=mask_value,
        clamp_shift=clamp_shift,
        dropout_p=dropout_p,
    )
    out = _run(args, backend)[0]
    return out if qkv.dim() == 5 else out.squeeze(1)


def _example(device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    qkv = torch.zeros(1, 7, 7, 96, device=device, dtype=dtype)
    return (qkv, torch.zeros(169, 1, device=device)), {"num_heads": 1, "window_size": (7, 7)}


OP = dispatch.register(
    dispatch.Op(
        name="window_attention",
        function=window_attention,
        prepare=_prepare,
        example=_example,
        backends=(
            dispatch.Backend("cpu", _why_not_cpu, _cpu_forward, _cpu_backward, frozenset({"cpu"}), KERNEL_DTYPES),
            dispatch.Backend(
                "triton", _why_not_triton, _triton.forward, _triton.backward, frozenset({"cuda"}), KERNEL_DTYPES
            ),
            dispatch.Backend("reference", lambda args: None, reference),
        ),
    )
)
