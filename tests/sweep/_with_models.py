"""Models for tests beside other libraries: a few thousand parameters, in float32, with kernels in every layer."""

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")

import transformers
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer


def timm_swin():
    """The patched method of a block, which is not its forward, reads what its attention would call."""
    return SwinTransformer(
        img_size=16, patch_size=2, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4, num_classes=5,
        drop_path_rate=0.0,
    )  # fmt: skip


def hf_swin():
    """The patched forward joins the weights of its projections."""
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4, drop_path_rate=0.0
    )
    return transformers.SwinModel(config)


def vit():
    """timm's: projections are called, only the dropout of weights is not."""
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5)


def llama():
    """transformers': attention by its registry."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


PICTURE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(14).view(2, 7)
MODELS = {"timm_swin": timm_swin, "hf_swin": hf_swin, "vit": vit, "llama": llama}
ATTENTION = {
    "timm_swin": ["qkv", "proj"],
    "hf_swin": ["q_proj", "v_proj"],
    "vit": ["qkv", "proj"],
    "llama": ["q_proj", "v_proj"],
}
"""Names of projections, as adapters are told them."""


def build(name):
    """A model in eval mode, and its input."""
    torch.manual_seed(3)
    return MODELS[name]().eval(), IDS if name == "llama" else PICTURE


def out(model, x):
    result = model(x)
    for field in ("logits", "last_hidden_state"):
        result = getattr(result, field, result)
    return result


def run(model, x):
    with torch.no_grad():
        return out(model, x)


def same(found, expected, limit=2e-5):
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)
