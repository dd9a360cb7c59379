"""Models with attention of torch.nn, timm, torchvision and diffusers, small enough for float64 on one core."""

import pytest
import torch
from torch import nn

import accel

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image(channels=3):
    return noise(2, channels, 16, 16)


def padding(*lengths, longest):
    """True where a token is padding."""
    return torch.arange(longest) >= torch.tensor(lengths)[:, None]


# --- models, small enough for float64 on one core ---

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def encoder(batch_first=True, **options):
    options = {"dim_feedforward": 48, "dropout": 0.0, "batch_first": batch_first, **options}
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, **options), 2)


class Translator(nn.Module):
    """torch.nn.Transformer under the masks it is trained with."""

    def __init__(self, **options):
        super().__init__()
        self.model = nn.Transformer(32, 2, 2, 2, 48, 0.0, batch_first=True, **options)

    def forward(self, source, target):
        pad = padding(9, 6, longest=9)
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=target.dtype)
        return self.model(
            source, target, tgt_mask=causal, src_key_padding_mask=pad, memory_key_padding_mask=pad, tgt_is_causal=True
        )


class DetrDecoderLayer(nn.Module):
    """The first half of DETR's decoder: places are added to queries and keys, not to values."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(32, 2)
        self.multihead_attn = nn.MultiheadAttention(32, 2)
        self.norm = nn.LayerNorm(32)

    def forward(self, target, memory, place, query_place, need_weights=False):
        q = target + query_place
        target = self.norm(target + self.self_attn(q, q, target, need_weights=False)[0])
        attended = self.multihead_attn(
            target + query_place, memory + place, memory,
            key_padding_mask=padding(7, 11, longest=11), need_weights=need_weights,
        )  # fmt: skip
        return target + attended[0]


def detr_inputs():
    return noise(5, 2, 32), noise(11, 2, 32, seed=1), noise(11, 2, 32, seed=2), noise(5, 2, 32, seed=3)


class UNetBlock(nn.Module):
    """The attention block of Stable Diffusion's UNet, self- and cross-attention."""

    def __init__(self):
        super().__init__()
        unets = pytest.importorskip("diffusers.models.unets.unet_2d_blocks")
        self.block = unets.CrossAttnDownBlock2D(
            32, 32, 16, num_layers=1, num_attention_heads=2, cross_attention_dim=24, resnet_groups=4
        )

    def forward(self, x, temb, text, mask=None):
        return self.block(x, temb, text, encoder_attention_mask=mask)[0]


class VaeAttention(nn.Module):
    """The attention of Stable Diffusion's autoencoder: on a map, behind a group norm, with the residual in it."""

    def __init__(self):
        super().__init__()
        attention = pytest.importorskip("diffusers.models.attention_processor")
        self.attn = attention.Attention(
            32, heads=2, dim_head=16, bias=True, norm_num_groups=4, residual_connection=True, rescale_output_factor=2.0
        )

    def forward(self, x):
        return self.attn(x)


def unet():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), norm_num_groups=4,
        layers_per_block=1, cross_attention_dim=24, attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D",
        "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return model


# name: model, inputs, modules that are replaced
MODELS = {
    "torch encoder": (encoder, lambda: (noise(2, 9, 32),), 4),
    "torch encoder, tokens first": (lambda: encoder(False), lambda: (noise(9, 2, 32),), 4),
    "torch encoder, norm first, GELU": (
        lambda: encoder(norm_first=True, activation="gelu", bias=False), lambda: (noise(2, 9, 32),), 4,
    ),
    "torch encoder, unbatched": (encoder, lambda: (noise(9, 32),), 4),
    "torch transformer": (Translator, lambda: (noise(2, 9, 32), noise(2, 7, 32, seed=1)), 8),
    "torch transformer, norm first": (
        lambda: Translator(norm_first=True), lambda: (noise(2, 9, 32), noise(2, 7, 32, seed=1)), 8,
    ),
    "DETR decoder": (DetrDecoderLayer, detr_inputs, 2),
    "torchvision ViT": (lambda: TorchvisionViT(16, 4, 2, 2, 32, 48, num_classes=5), lambda: (image(),), 2),
    "timm ViT": (lambda: VisionTransformer(**VIT), lambda: (image(),), 2),
    "timm ViT, norms of q and k": (
        lambda: VisionTransformer(**VIT, qk_norm=True, scale_attn_norm=True, qkv_bias=False), lambda: (image(),), 2,
    ),
    "timm BEiT": (lambda: Beit(**VIT, use_abs_pos_emb=False, use_rel_pos_bias=True), lambda: (image(),), 2),
    "timm BEiT, one bias for all": (lambda: Beit(**VIT, use_shared_rel_pos_bias=True), lambda: (image(),), 2),
    "timm BEiT, no bias": (lambda: Beit(**VIT, qkv_bias=False), lambda: (image(),), 2),
    "timm EVA": (lambda: Eva(**VIT, use_rot_pos_emb=True), lambda: (image(),), 2),
    "timm EVA, three projections": (
        lambda: Eva(**VIT, use_rot_pos_emb=True, qkv_fused=False, scale_attn_inner=True), lambda: (image(),), 2,
    ),
    "timm EVA, rope attention": (
        lambda: Eva(**VIT, use_rot_pos_emb=True, attn_type="rope"), lambda: (image(),), 2,
    ),
    "diffusers block": (UNetBlock, lambda: (noise(2, 32, 8, 8), noise(2, 16), noise(2, 5, 24)), 2),
    "diffusers block, text mask": (
        UNetBlock,
        lambda: (noise(2, 32, 8, 8), noise(2, 16), noise(2, 5, 24), -1e4 * padding(5, 3, longest=5)[:, None]),
        2,
    ),
    "diffusers VAE attention": (VaeAttention, lambda: (noise(2, 32, 4, 6),), 1),
    "diffusers UNet": (unet, lambda: (noise(2, 4, 8, 8), torch.tensor([3, 7]), noise(2, 5, 24)), 8),
}  # fmt: skip


def randomize(model, dtype=torch.float64):
    """Every parameter away from its initial value: tables and biases that start at zero hide mistakes."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.2)
    return model.to(dtype)


def build(name, dtype=torch.float64):
    make, inputs, count = MODELS[name]
    given = [x.to(dtype) if x.is_floating_point() else x for x in inputs()]
    return randomize(make(), dtype), given, count


def tensor(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def gradients(model, inputs):
    model.zero_grad()
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = tensor(model(*inputs))
    (out * noise(*out.shape, seed=9).to(out.dtype)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads | {f"input {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}


def assert_compiles_as_one_graph(module, inputs):
    """Patched and compiled it computes what the class computes."""
    reference, expected = gradients(module, inputs)
    report = accel.patch(module)
    module.compile(fullgraph=True, backend="aot_eager")
    out, found = gradients(module, inputs)
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-11)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-10)
    assert not report.uncalled()


def assert_same_function(model, inputs, count):
    """In training mode: what is dropped elsewhere, in the MLP of a bias say, is drawn alike by the class and by us."""
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    reference, expected = drawn_gradients(model, inputs)
    report = accel.patch(model)
    assert len(report.replaced) == count, str(report)
    assert not report.skipped
    out, found = drawn_gradients(model, inputs)
    assert served(report) == [1] * count
    scale = max(1.0, float(reference.abs().max()))
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-12 * scale)
    assert list(found) == list(expected)
    for parameter, gradient in expected.items():
        error = float((found[parameter] - gradient).abs().max())
        assert error <= 1e-10 * max(float(gradient.abs().max()), 1.0), f"{parameter}: {error}"
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == types
    assert report.verify(*inputs) <= 1e-12 * scale

    assert len(accel.unpatch(model)) == count
    again, _ = drawn_gradients(model, inputs)
    assert torch.equal(again, reference)


def drawn_gradients(model, inputs):
    torch.manual_seed(7)
    return gradients(model, inputs)


def served(report):
    """Calls of each row; fails on one that went to the class's own code."""
    assert not any(row.fallbacks for row in report.rows), str(report)
    return [row.calls for row in report.rows]


def change_op(monkeypatch, report, change):
    """Let every call of the op in a patched model pass through ``change(op, q, k, v, **how)``."""
    for row in report.replaced:
        op = row.replacement.attend
        monkeypatch.setattr(row.replacement, "attend", lambda *a, _op=op, **how: change(_op, *a, **how))
