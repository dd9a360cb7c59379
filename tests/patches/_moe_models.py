"""Tiny mixtures of experts of transformers' real classes, and batches padded on either side."""

import torch
from _transformers_models import DECODER, LEFT, RIGHT, TEXT, randomize, text, transformers

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
    )


def qwen3_moe():
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**DECODER, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24)
    )


def deepseek_v3():
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **TEXT, **LATENT, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
            moe_intermediate_size=24, first_k_dense_replace=1, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def gpt_oss():
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, rope_parameters=ROPE
        )
    )


MODELS = {
    "Mixtral": (mixtral, 2),
    "Qwen3-MoE": (qwen3_moe, 2),
    "DeepSeek-V3": (deepseek_v3, 1),
    "GPT-OSS": (gpt_oss, 2),
}
"""Each with its layers of experts."""
INPUTS = {"none": text(None), "left": text(LEFT), "right": text(RIGHT)}


def build(name):
    """A model of transformers' own experts in a loop, with a bias of the choice where there is one."""
    model = randomize(MODELS[name][0]())
    model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(5)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model
