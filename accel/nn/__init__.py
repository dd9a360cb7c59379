"""Modules to use in place of others': same constructors, attributes and ``state_dict``, run by the kernels."""

from accel.nn.attention import MultiHeadAttention
from accel.nn.deform import DeformConv2d, ModulatedDeformConv2d
from accel.nn.expert_bias import ExpertBias
from accel.nn.fp8 import FP8Linear
from accel.nn.gated import FLASH, GatedAttentionUnit, ScaleNorm
from accel.nn.linear import LinearAttention
from accel.nn.moe import Experts, MoE, Routing
from accel.nn.windows import (
    ShiftedWindowAttention,
    ShiftedWindowAttention3d,
    ShiftedWindowAttentionV2,
    shifted_window_attention,
    shifted_window_attention_3d,
    shifted_window_attention_v2,
)

__all__ = [
    "FLASH",
    "DeformConv2d",
    "ExpertBias",
    "Experts",
    "FP8Linear",
    "GatedAttentionUnit",
    "LinearAttention",
    "MoE",
    "ModulatedDeformConv2d",
    "MultiHeadAttention",
    "Routing",
    "ScaleNorm",
    "ShiftedWindowAttention",
    "ShiftedWindowAttention3d",
    "ShiftedWindowAttentionV2",
    "shifted_window_attention",
    "shifted_window_attention_3d",
    "shifted_window_attention_v2",
]
