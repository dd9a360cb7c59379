"""Custom kernels for PyTorch: attention with the biases, masks and gradients that models really have.

Everything here runs on GPU and CPU, has gradients, and refuses in a sentence what it cannot do.
"""

from accel._version import __version__
from accel.dispatch import explain, use
from accel.ops.attention.softmax_attention import softmax_attention
from accel.ops.boxes.ps_roi_align import ps_roi_align
from accel.ops.boxes.ps_roi_pool import ps_roi_pool
from accel.ops.deformable.deform_attention2d import deform_attention2d
from accel.ops.deformable.deform_conv2d import deform_conv2d
from accel.ops.deformable.ms_deform_attn import ms_deform_attn
from accel.ops.fp8.fp8_gemm import fp8_gemm
from accel.ops.fp8.fp8_linear import fp8_linear
from accel.ops.fp8.fp8_quantize import fp8_dequantize, fp8_quantize
from accel.ops.fp8.recipe import FP8Recipe
from accel.ops.linear.flash_mix import flash_mix
from accel.ops.linear.gau_attention import gau_attention
from accel.ops.linear.linear_attention import linear_attention
from accel.ops.linear.linear_attention_step import linear_attention_step
from accel.ops.moe.activations import ExpertActivation
from accel.ops.moe.balance import MoeLoad, moe_balance_loss, moe_load, moe_z_loss
from accel.ops.moe.expert_choice import moe_route_experts
from accel.ops.moe.grouped_linear import grouped_linear
from accel.ops.moe.moe_experts import moe_experts
from accel.ops.moe.moe_permute import moe_permute
from accel.ops.moe.moe_route import moe_route
from accel.ops.moe.moe_unpermute import moe_unpermute
from accel.ops.rules import BlockCausal, BlockDiffusion, Grid2D, PrefixLM, T5Buckets
from accel.ops.windows.window_attention import window_attention
from accel.packing import pad, unpad
from accel.sdpa import scaled_dot_product_attention

__all__ = [
    "BlockCausal",
    "BlockDiffusion",
    "ExpertActivation",
    "FP8Recipe",
    "Grid2D",
    "MoeLoad",
    "PrefixLM",
    "T5Buckets",
    "__version__",
    "deform_attention2d",
    "deform_conv2d",
    "distributed",
    "explain",
    "flash_mix",
    "fp8_checkpoints",
    "fp8_convert",
    "fp8_dequantize",
    "fp8_gemm",
    "fp8_linear",
    "fp8_quantize",
    "gau_attention",
    "grouped_linear",
    "linear_attention",
    "linear_attention_step",
    "moe_balance_loss",
    "moe_experts",
    "moe_load",
    "moe_permute",
    "moe_route",
    "moe_route_experts",
    "moe_unpermute",
    "moe_z_loss",
    "ms_deform_attn",
    "nn",
    "pad",
    "patch",
    "patch_functions",
    "ps_roi_align",
    "ps_roi_pool",
    "scaled_dot_product_attention",
    "softmax_attention",
    "unpad",
    "unpatch",
    "unpatch_functions",
    "use",
    "window_attention",
]

from accel import distributed, integrations, nn
from accel.conversion import fp8_convert
from accel.patch import patch, unpatch
from accel.patch_functions import patch_functions, unpatch_functions
from accel.patches.transformers_fp8 import fp8_checkpoints

integrations.install()
