"""Tiny random-weight models of transformers' classes that do not treat attention and its masks as most do."""

import torch
import transformers
from _transformers_models import DECODER, IMAGE, PIXELS, RIGHT, SMALL, TEXT, both, text

SEQ2SEQ = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "dropout": 0.0, "attention_dropout": 0.0, "decoder_start_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SPEECH = {
    **SMALL, "num_mel_bins": 16, "conv_kernel_size": 3, "subsampling_conv_channels": 8, "dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip
DEEPSEEK = {
    "vocab_size": 50, "hidden_size": 32, "moe_intermediate_size": 16, "num_attention_heads": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "q_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


def git():
    return transformers.GitForCausalLM(transformers.GitConfig(**TEXT, vision_config=IMAGE))


def nllb_moe():
    config = transformers.NllbMoeConfig(**SEQ2SEQ, num_experts=2, expert_capacity=64, moe_token_dropout=0.0,
        encoder_layerdrop=0.0, decoder_layerdrop=0.0, encoder_sparse_step=2, decoder_sparse_step=2)  # fmt: skip
    return transformers.NllbMoeForConditionalGeneration(config)


def pegasus_x():
    config = transformers.PegasusXConfig(**SEQ2SEQ, num_global_tokens=2, block_size=4)
    return transformers.PegasusXForConditionalGeneration(config)


def bigbird_pegasus():
    config = transformers.BigBirdPegasusConfig(**SEQ2SEQ, attention_type="original_full")
    return transformers.BigBirdPegasusForConditionalGeneration(config)


def deepseek_v4():
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    rates = {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}
    config = transformers.DeepseekV4Config(**DEEPSEEK, num_hidden_layers=3, head_dim=16, layer_types=kinds,
        mlp_layer_types=["moe"] * 3, compress_rates=rates, hc_mult=2, sliding_window=4, o_groups=2, o_lora_rank=8,
        num_nextn_predict_layers=0)  # fmt: skip
    return transformers.DeepseekV4ForCausalLM(config)


def deepseek_v32():
    config = transformers.DeepseekV32Config(**DEEPSEEK, num_hidden_layers=1, intermediate_size=48,
        num_key_value_heads=4, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_group=1,
        topk_group=1, first_k_dense_replace=1)  # fmt: skip
    return transformers.DeepseekV32ForCausalLM(config)


def inkling2():
    config = transformers.Inkling2TextConfig(
        **{**DECODER, "num_key_value_heads": 2}, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8,
        sliding_window_size=4, d_rel=4, rel_extent=16, moe_intermediate_size=16, n_routed_experts=4,
        num_experts_per_tok=2, unpadded_vocab_size=50,
    )  # fmt: skip
    return transformers.Inkling2ForCausalLM(config)


def sam():
    vision = {**IMAGE, "output_channels": 16, "global_attn_indexes": [1], "window_size": 2, "mlp_dim": 48,
              "num_pos_feats": 8}  # fmt: skip
    decoder = {"hidden_size": 16, "mlp_dim": 24, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    prompt = {"hidden_size": 16, "image_size": 16, "patch_size": 4, "mask_input_channels": 4}
    return transformers.SamModel(
        transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    )


def clap():
    audio = {"spec_size": 32, "num_mel_bins": 8, "window_size": 2, "patch_embeds_hidden_size": 8, "depths": [1, 1],
             "num_attention_heads": [2, 2], "num_hidden_layers": 2, "hidden_size": 16, "projection_dim": 8}  # fmt: skip
    words = {**TEXT, "projection_dim": 8}
    return transformers.ClapModel(transformers.ClapConfig(text_config=words, audio_config=audio, projection_dim=8))


def parakeet():
    return transformers.ParakeetEncoder(transformers.ParakeetEncoderConfig(**SPEECH))


def lasr():
    return transformers.LasrEncoder(transformers.LasrEncoderConfig(**{**SPEECH, "num_key_value_heads": 4}))


PIXELS_AND_TEXT = {"pixel_values": PIXELS.repeat(2, 1, 1, 1)[:3], **text(RIGHT)}
FEATURES = torch.randn(3, 80, 16, generator=torch.Generator().manual_seed(6))
FEATURE_MASK = torch.ones(3, 80, dtype=torch.long)
FEATURE_MASK[1, 41:] = FEATURE_MASK[2, 9:] = 0
SOUND = {"input_features": FEATURES, "attention_mask": FEATURE_MASK}

# name: model, arguments; each computes something else with transformers' masks for "sdpa" than with those for eager
RELYING = {
    "GIT": (git, PIXELS_AND_TEXT),
    "NLLB-MoE": (nllb_moe, both(RIGHT)),
    "NLLB-MoE, no padding": (nllb_moe, {**both(None), "decoder_attention_mask": None}),
    "Pegasus-X, no padding": (pegasus_x, {**both(None), "decoder_attention_mask": None}),
    "BigBird-Pegasus": (bigbird_pegasus, both(RIGHT)),
    "DeepSeek-V4": (deepseek_v4, text(RIGHT)),
    "DeepSeek-V4, no padding": (deepseek_v4, text(None)),
}


def minimax():
    config = transformers.MiniMaxConfig(**DECODER, num_local_experts=2, num_experts_per_tok=1, block_size=4,
        layer_types=["linear_attention", "full_attention"])  # fmt: skip
    return transformers.MiniMaxForCausalLM(config)
