"""Classes of attention and of routers that are known and that no patch of a model computes, each with the reason: what
a report says of them."""

from __future__ import annotations

from accel.patches.transformers_routers import LEFT

_CHANNELS = "its softmax is over channels, not over tokens"
_HEADS = "it mixes the heads of its weights, which must be written out for that"
_LINEAR = "its attention is linear: no softmax over pairs of tokens"
_CLASS_TOKEN = "its class token alone asks, which is little work"
_POOLS = "it pools a map once, which is little work"
_TWO = "it subtracts one softmax from another"
_FUNCTION = "its scan is a function, which accel.patch_functions() replaces"
_BY_QUERY = "its query weighs relative positions along each axis, which makes a bias of its own for every image"

UNSERVED: dict[str, str] = {
    f"timm.{path}": reason
    for reason, paths in {
        _CHANNELS: (
            "models.xcit.XCA",
            "models.edgenext.CrossCovarianceAttn",
            "models.davit.ChannelAttention",
            "models.davit.ChannelAttentionV2",
        ),
        _HEADS: ("models.cait.TalkingHeadAttn", "models.efficientformer_v2.Attention2d"),
        _LINEAR: (
            "models.coat.FactorAttnConvRelPosEnc",
            "models.mobilevit.LinearSelfAttention",
            "models.swiftformer.EfficientAdditiveAttention",
            "layers.lambda_layer.LambdaLayer",
        ),
        _CLASS_TOKEN: ("models.cait.ClassAttn", "models.crossvit.CrossAttention", "models.volo.ClassAttention"),
        _POOLS: (
            "layers.attention_pool.AttentionPoolLatent",
            "layers.attention_pool.AttentionPoolPrr",
            "layers.attention_pool2d.AttentionPool2d",
            "layers.attention_pool2d.RotAttentionPool2d",
        ),
        _TWO: ("layers.diff_attention.DiffAttention", "models.vision_transformer.DiffParallelScalingBlock"),
        _BY_QUERY: (
            "layers.bottleneck_attn.BottleneckAttn",
            "layers.halo_attn.HaloAttn",
        ),
        "it predicts its weights from the query alone, without keys": ("models.volo.OutlookAttention",),
        "its maps are pooled before they are projected": ("models.mvitv2.MultiScaleAttentionPoolFirst",),
        "it adds a second softmax, over positions, to its weights": ("models.convit.GPSA",),
        "its heads run one after the other, each on the result of the one before": (
            "models.efficientvit_msra.CascadedGroupAttention",
        ),
        "one projection makes its attention and its MLP, and its forward holds both": (
            "models.vision_transformer.ParallelScalingBlock",
        ),
        "its queries, keys and values are single numbers": ("models.csatv2.SpatialTransformerBlock",),
        "its only head is as wide as the channels of its map": ("layers.non_local_attn.NonLocalAttn",),
        "its weights are made along rows and columns": ("layers.non_local_attn.BatNonLocalAttn",),
        "its projections are written into its forward": ("layers.attention2d.MultiQueryAttentionV2",),
        "it is a grouped convolution": ("models.nextvit.ConvAttention",),
    }.items()
    for path in paths
}
UNSERVED |= {
    f"transformers.models.{family}.modeling_{family}.{name}": _FUNCTION
    for family, name in {
        "mamba2": "Mamba2Mixer",
        "bamba": "BambaMixer",
        "zamba2": "Zamba2MambaMixer",
        "falcon_h1": "FalconH1Mixer",
        "nemotron_h": "NemotronHMamba2Mixer",
        "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    }.items()
}
UNSERVED |= {
    f"transformers.models.{family}.modeling_{family}.{cls}": reason
    for (family, _, cls), reason in [(name.partition("."), reason) for name, reason in LEFT.items()]
}
