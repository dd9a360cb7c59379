"""A small DeepSeek-V3 in the format of its FP8 checkpoints: scales of 128 x 128 blocks, a projection of 160 rows."""

import json

import torch
from safetensors.torch import save_file

import accel

QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def config(transformers, dense=False):
    """With ``dense`` no layer has experts."""
    return transformers.DeepseekV3Config(
        vocab_size=128, hidden_size=256, intermediate_size=384, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        n_group=2, topk_group=1, kv_lora_rank=128, q_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=32,
        v_head_dim=64, first_k_dense_replace=2 if dense else 1, max_position_embeddings=128, attention_dropout=0.0,
    )  # fmt: skip


def write(transformers, path, scale_format="fp32", dense=False, change=lambda tensors, settings: None):
    """Write a checkpoint with random weights; return a model with what its codes stand for, and the tensors written.
    ``change(tensors, settings)`` may spoil either."""
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(config(transformers, dense)).eval()
    tensors = {}

    def put(name, weight):
        q, scale = accel.fp8_quantize(weight, block=(128, 128), scale_format=scale_format)
        tensors[name], tensors[f"{name}_scale_inv"] = q, scale
        return accel.fp8_dequantize(q, scale)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp.experts." in name:
                base, _, kind = name.rpartition(".")
                names = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else [kind]
                for e, weight in enumerate(parameter):
                    parts = weight.chunk(len(names))
                    made = [put(f"{base}.{e}.{n}.weight", part) for n, part in zip(names, parts, strict=True)]
                    weight.copy_(torch.cat(made))
            elif parameter.dim() == 2 and "_proj" in name:
                parameter.copy_(put(name, parameter))
            else:
                tensors[name] = parameter.detach().clone()
    kind = {"scale_fmt": "ue8m0"} if scale_format == "e8m0" else {}
    settings = {**QUANTIZATION, **kind}
    change(tensors, settings)
    path.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    written = {**model.config.to_dict(), "architectures": ["DeepseekV3ForCausalLM"], "quantization_config": settings}
    (path / "config.json").write_text(json.dumps(written, default=str))
    return model, tensors
