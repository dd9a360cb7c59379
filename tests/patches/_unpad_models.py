"""Padding on both sides, and mixtures of experts, for the tests of flattened batches."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from _transformers_models import DECODER, IDS, RIGHT, gpt_oss

BOTH = torch.ones_like(RIGHT)
BOTH[0, :2] = BOTH[0, 7:] = BOTH[1, :4] = BOTH[2, 6:] = 0
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def padded(model, mask):
    return {"input_ids": IDS.masked_fill(mask == 0, model.config.pad_token_id), "attention_mask": mask}


def moe(name, **options):
    model = getattr(transformers, f"{name}ForCausalLM")
    return model(getattr(transformers, f"{name}Config")(**{**DECODER, **options}))


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTURES = {
    "Mixtral": lambda: moe("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "Qwen2-MoE": lambda: moe("Qwen2Moe", **EXPERTS, num_experts=4, shared_expert_intermediate_size=16),
    "Qwen3-MoE": lambda: moe("Qwen3Moe", **EXPERTS, num_experts=4),
    "OLMoE": lambda: moe("Olmoe", num_experts=4, num_experts_per_tok=2),
    "PhiMoE": lambda: moe("Phimoe", num_local_experts=4, num_experts_per_tok=2, rope_parameters=ROPE),
    "GPT-OSS": gpt_oss,
    "GraniteMoE": lambda: moe("GraniteMoe", num_local_experts=4, num_experts_per_tok=2),
}
