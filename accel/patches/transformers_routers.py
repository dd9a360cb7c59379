"""transformers: routers that compute one of the scores of :func:`accel.moe_route`, as data.

A router's own product makes the logits, in the dtype in which its class makes them; what follows is one call. It
returns what its class returns, in the class's dtypes. Where a class leaves a token's experts unsorted, the best comes
first here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.patches.entry import why_not_version

LEAST = 1 << 14
"""Logits of a call on a CPU, below which a router without groups keeps its class's few lines: they took 9 µs for 64
logits, 13 for 1024 and 397 for 32768 on one core of an AMD EPYC, and ours 22, 26 and 262. Those with groups were slower
than ours at any size."""

Given = Mapping[str, Any]
"""The arguments of a call behind the hidden states, by name."""


def _always(module: Any) -> bool:
    return True


def _never(module: Any) -> bool:
    return False


def _no_bias(module: Any, given: Given) -> Tensor | None:
    return None


def _of_logits(logits: Tensor, x: Tensor) -> torch.dtype:
    return logits.dtype


def _served(module: Any) -> str | None:
    return None


def _one(module: Any) -> float:
    return 1.0


@dataclass(frozen=True)
class Router:
    """How one class of router is a call of :func:`accel.moe_route`."""

    score: str | Callable[[Any], str]
    logits: Callable[[Any, Tensor], Tensor]
    """``logits(module, hidden_states)``: ``(T, X)``, as the class makes and returns them."""
    needs: tuple[str, ...] = ("weight",)
    """What is read of a module, but for ``top_k``."""
    dtype: Callable[[Tensor, Tensor], torch.dtype] = _of_logits
    """Of the weights, by the logits and the hidden states."""
    bias: Callable[[Any, Given], Tensor | None] = _no_bias
    groups: Callable[[Any], bool] = _never
    group_score: str = "top2_sum"
    renormalize: Callable[[Any], bool] = _always
    eps: float | Callable[[Any], float] = 1e-20
    scale: Callable[[Any], float] = _one
    why_not: Callable[[Any], str | None] = _served
    flattens: bool = True
    """Whether the class makes ``(T, C)`` of hidden states with more axes."""


def why_not(router: Router, module: Any) -> str | None:
    return why_not_version(module, "top_k", *router.needs) or router.why_not(module)


def why_not_call(router: Router, module: Any, hidden_states: Tensor, **given: Any) -> str | None:
    if hidden_states.numel() == 0:
        return "there are no tokens to route"
    if hidden_states.dim() != 2 and not router.flattens:
        return f"its hidden states have {hidden_states.dim()} axes, and it takes 2"
    if hidden_states.device.type == "cpu" and not router.groups(module):
        tokens = hidden_states.numel() // hidden_states.shape[-1]
        if tokens * getattr(module, "num_experts", 1 << 9) < LEAST:
            return "its tokens are few, for which the lines of its class take less time"
    return None


def compute(
    router: Router, module: Any, attend: Callable[..., Any], hidden_states: Tensor, **given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    logits = router.logits(module, hidden_states)
    how: dict[str, Any] = {"score": router.score(module) if callable(router.score) else router.score}
    if router.groups(module):
        how |= {"num_groups": module.num_group, "topk_groups": module.topk_group, "group_score": router.group_score}
    weights, indices = attend(
        logits,
        module.top_k,
        bias=router.bias(module, given),
        renormalize=bool(router.renormalize(module)),
        eps=router.eps(module) if callable(router.eps) else router.eps,
        scale=float(router.scale(module)),
        **how,
    )
    return logits, weights.to(router.dtype(logits, hidden_states)), indices


# --- logits ---


def _flat(module: Any, x: Tensor) -> Tensor:
    return F.linear(x.reshape(-1, x.shape[-1]), module.weight)


def _in_fp32(module: Any, x: Tensor) -> Tensor:
    return F.linear(x.reshape(-1, x.shape[-1]).float(), module.weight.float())


def _to_fp32(module: Any, x: Tensor) -> Tensor:
    return _flat(module, x).float()


def _from_fp32(module: Any, x: Tensor) -> Tensor:
    return _flat(module, x.float())


def _like_weight(module: Any, x: Tensor) -> Tensor:
    return _flat(module, x.to(module.weight.dtype))


def _biased(module: Any, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def _biased_in_fp32(module: Any, x: Tensor) -> Tensor:
    return F.linear(x.float(), module.weight.float(), module.bias.float())


def _multiplied(module: Any, x: Tensor) -> Tensor:
    return _in_fp32(module, x) * module.output_multiplier


def _capped(module: Any, x: Tensor) -> Tensor:
    logits, cap = _to_fp32(module, x), module.router_logit_softcapping
    return torch.tanh(logits / cap) * cap if cap > 0.0 else logits


def _without_autocast(module: Any, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _in_fp32(module, x)


def _by_classifier(module: Any, x: Tensor) -> Tensor:
    return _in_fp32(module.classifier, x)


def _by_gate(module: Any, x: Tensor) -> Tensor:
    logits: Tensor = module.gate(x.view(-1, x.shape[-1]))
    return logits.to(torch.float32)


def _by_wg(module: Any, x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    logits: Tensor = module.wg(x.float() if module.wg.weight.dtype == torch.float32 else x)
    return logits


# --- the rest of a call ---


def _of_input(logits: Tensor, x: Tensor) -> torch.dtype:
    return x.dtype


def _fp32(logits: Tensor, x: Tensor) -> torch.dtype:
    return torch.float32


def _own_bias(module: Any, given: Given) -> Tensor | None:
    bias: Tensor | None = module.e_score_correction_bias
    return bias


def _given_bias(module: Any, given: Given) -> Tensor | None:
    return given.get("e_score_correction_bias")


def _given_expert_bias(module: Any, given: Given) -> Tensor | None:
    return given.get("expert_bias") if getattr(module, "use_expert_bias", True) else None


def _if_asked(module: Any) -> bool:
    return bool(module.norm_topk_prob)


def _scaled(module: Any) -> float:
    return float(module.routed_scaling_factor)


_FUNCTIONS = {"Sigmoid": "sigmoid", "SqrtSoftplusActivation": "sqrt_softplus"}


def _score_fn(module: Any) -> str:
    return _FUNCTIONS[type(module.score_fn).__name__]


def _why_not_score_fn(module: Any) -> str | None:
    name = type(module.score_fn).__name__
    return None if name in _FUNCTIONS else f"its score is a {name}, which moe_route does not know"


def _in_best_groups(module: Any) -> bool:
    return bool(module.topk_method == "group_limited_greedy")


def _why_not_method(module: Any) -> str | None:
    known = ("greedy", "group_limited_greedy")
    return None if module.topk_method in known else f"its topk_method is {module.topk_method!r}, not one of {known}"


def _why_not_groups(module: Any) -> str | None:
    return None if module.num_group is None else "experts outside its groups count as 0, and may win over negative ones"


def _selection(module: Any) -> str:
    return "softmax_topk" if module.expert_selection_fn == "softmax" else "sigmoid"


def _why_not_selection(module: Any) -> str | None:
    asked = module.expert_selection_fn
    return None if asked in ("softmax", "sigmoid") else f"its expert_selection_fn is {asked!r}"


# --- the classes ---

_GROUPS = ("weight", "num_group", "topk_group")
_BIAS, _SCALE, _NORM = "e_score_correction_bias", "routed_scaling_factor", "norm_topk_prob"

_DEEPSEEK_V3 = Router(
    "sigmoid", _in_fp32, (*_GROUPS, _BIAS, _SCALE, _NORM), bias=_own_bias, groups=_always, renormalize=_if_asked,
    scale=_scaled,
)  # fmt: skip
_AXK2 = Router(
    "sigmoid", _in_fp32, (*_GROUPS, _BIAS, _SCALE, _NORM), bias=_own_bias, renormalize=_if_asked, scale=_scaled,
    why_not=_why_not_groups,
)  # fmt: skip
_BEAM = Router(
    "sigmoid", _in_fp32, (*_GROUPS, _BIAS, _NORM), bias=_own_bias, groups=_always, renormalize=_if_asked
)  # fmt: skip
_DEEPSEEK_V2 = Router(
    "softmax", _in_fp32, (*_GROUPS, _SCALE, "topk_method"), groups=_in_best_groups, group_score="max",
    renormalize=_never, scale=_scaled, why_not=_why_not_method,
)  # fmt: skip
_MISTRAL = Router("softmax", _flat, (*_GROUPS, _SCALE, _NORM), groups=_always, renormalize=_if_asked, scale=_scaled)
_MISTRAL_LARGE = Router("softmax", _in_fp32, (*_GROUPS, _SCALE), groups=_always, scale=_scaled)
_DEEPSEEK_V4 = Router(
    _score_fn, _flat, ("weight", "score_fn", _BIAS, _SCALE), bias=_own_bias, scale=_scaled, why_not=_why_not_score_fn
)
_INKLING2 = Router(
    _score_fn, _from_fp32, ("weight", "score_fn", _BIAS, _SCALE), bias=_own_bias, scale=_scaled,
    why_not=_why_not_score_fn,
)  # fmt: skip
_HUNYUAN = Router(
    "sigmoid", _in_fp32, ("weight", "router_scaling_factor"), bias=_given_bias, scale=lambda m: m.router_scaling_factor
)
_AFMOE = Router("sigmoid", _by_gate, ("gate", "route_scale"), bias=_given_expert_bias, scale=lambda m: m.route_scale)
_LFM2 = Router(
    "sigmoid", _flat, ("weight", "use_expert_bias", _SCALE, _NORM), bias=_given_expert_bias, renormalize=_if_asked,
    eps=1e-6, scale=_scaled, flattens=False,
)  # fmt: skip
_MINIMAX_M2 = Router("sigmoid", _like_weight, dtype=_fp32, bias=_given_bias, eps=0.0)
_MINIMAX_M3 = Router("sigmoid", _like_weight, ("weight", _BIAS), dtype=_fp32, bias=_own_bias, eps=0.0)
_MUSE_SPARK = Router(
    "sigmoid", _multiplied, ("weight", "output_multiplier", "norm_topk_prob_eps", _BIAS, _SCALE), bias=_own_bias,
    eps=lambda m: m.norm_topk_prob_eps, scale=_scaled,
)  # fmt: skip
_FLINT = Router("sigmoid", _without_autocast, ("weight", _NORM), renormalize=_if_asked, eps=0.0)
_LAGUNA = Router(
    "sigmoid", _capped, ("weight", "router_logit_softcapping", _BIAS), dtype=_of_input, bias=_own_bias, eps=0.0
)
_COHERE2 = Router(
    _selection, _flat, ("weight", "expert_selection_fn", _NORM), dtype=_of_input, renormalize=_if_asked, eps=0.0,
    why_not=_why_not_selection, flattens=False,
)  # fmt: skip
_LONGCAT = Router(
    "softmax", _by_classifier, ("classifier", _BIAS, _SCALE), bias=_own_bias, renormalize=_never, scale=_scaled
)
_QWEN = Router("softmax", _flat, ("weight", _NORM), renormalize=_if_asked)
_QWEN_VL = Router("softmax", _flat)
_MIXTRAL = Router("softmax", _flat, dtype=_fp32)
_LARA = Router("softmax", _in_fp32, ("weight", _NORM), dtype=_of_input, renormalize=_if_asked)
_HUNYUAN_V1 = Router("softmax", _by_wg, ("wg",))
_JAMBA = Router("softmax", _flat, dtype=_of_input, renormalize=_never, flattens=False)
_GRANITE = Router("softmax_topk", _to_fp32, dtype=_of_input, flattens=False)
_ARIA = Router("softmax_topk", _flat, flattens=False)
_GPT_OSS = Router("softmax_topk", _biased, ("weight", "bias"), flattens=False)
_PRIVACY_FILTER = Router(
    "softmax_topk", _biased_in_fp32, ("weight", "bias"), scale=lambda m: 1.0 / m.top_k, flattens=False
)

_CLASSES: dict[Router, tuple[str, ...]] = {
    _DEEPSEEK_V3: (
        *("axk1.AXK1TopkRouter", "bailing_hybrid.BailingHybridTopkRouter", "deepseek_v3.DeepseekV3TopkRouter"),
        *("deepseek_v32.DeepseekV32TopkRouter", "dots1.Dots1TopkRouter", "dots3_note.Dots3NoteTextTopkRouter"),
        *("exaone_moe.ExaoneMoeTopkRouter", "glm4_moe.Glm4MoeTopkRouter", "glm4_moe_lite.Glm4MoeLiteTopkRouter"),
        *("glm4v_moe.Glm4vMoeTextTopkRouter", "glm5_next.Glm5NextTextTopkRouter", "glm_moe_dsa.GlmMoeDsaTopkRouter"),
        *("hy_v4.HYV4TopkRouter", "hy_v4_vl.HYV4VLTopkRouter", "kimi_linear.KimiLinearTopkRouter"),
        *("mimo_v2_flash.MiMoV2FlashTopkRouter", "nemotron_h.NemotronHTopkRouter", "solar_open.SolarOpenTopkRouter"),
    ),
    _QWEN: (
        *("flex_olmo.FlexOlmoTopKRouter", "mellum.MellumTopKRouter", "olmoe.OlmoeTopKRouter"),
        *("qwen2_moe.Qwen2MoeTopKRouter", "qwen3_moe.Qwen3MoeTopKRouter", "qwen3_next.Qwen3NextTopKRouter"),
        *("qwen3_omni_moe.Qwen3OmniMoeThinkerTextTopKRouter", "qwen3_omni_moe.Qwen3OmniMoeTalkerTextTopKRouter"),
        "qwen4_exp.Qwen4ExpTextTopKRouter",
    ),
    _QWEN_VL: (
        *("qwen3_5_moe.Qwen3_5MoeTopKRouter", "qwen3_omni_moe.Qwen3OmniMoeTextTopKRouter"),
        "qwen3_vl_moe.Qwen3VLMoeTextTopKRouter",
    ),
    _GRANITE: (
        *("granitemoe.GraniteMoeTopKRouter", "granitemoe_swa.GraniteMoeSWATopKRouter"),
        *("granitemoehybrid.GraniteMoeHybridTopKRouter", "granitemoeshared.GraniteMoeSharedTopKRouter"),
    ),
    _DEEPSEEK_V2: (
        *("deepseek_ocr2.DeepseekOcr2TextTopkRouter", "deepseek_v2.DeepseekV2TopkRouter"),
        "unlimited_ocr.UnlimitedOcrTextTopkRouter",
    ),
    _AXK2: ("axk2.AXK2TopkRouter",),
    _BEAM: ("beam.BeamTopKRouter",),
    _MISTRAL: ("mistral4.Mistral4TopkRouter",),
    _MISTRAL_LARGE: ("mistral_large4.MistralLarge4TextTopkRouter",),
    _DEEPSEEK_V4: ("deepseek_v4.DeepseekV4TopKRouter",),
    _INKLING2: ("inkling2.Inkling2TopKRouter", "inkling2_loop.Inkling2LoopTopKRouter"),
    _HUNYUAN: ("hy_v3.HYV3TopKRouter", "dots3_note.Dots3NoteVisionTopKRouter"),
    _AFMOE: ("afmoe.AfmoeTokenChoiceRouter",),
    _LFM2: ("lfm2_moe.Lfm2MoeTopKRouter",),
    _MINIMAX_M2: ("minimax_m2.MiniMaxM2TopKRouter",),
    _MINIMAX_M3: ("minimax_m3_vl.MiniMaxM3VLTopKRouter", "step3p7.Step3p7TopKRouter"),
    _MUSE_SPARK: ("muse_spark.MuseSparkTopkRouter",),
    _FLINT: ("flint.FlintTopKRouter",),
    _LAGUNA: ("laguna.LagunaTopKRouter",),
    _COHERE2: ("cohere2_moe.Cohere2MoeTopKRouter",),
    _LONGCAT: ("longcat_flash.LongcatFlashTopkRouter",),
    _MIXTRAL: ("minimax.MiniMaxTopKRouter", "mixtral.MixtralTopKRouter"),
    _LARA: ("lara_mini.LaraMiniTopKRouter",),
    _HUNYUAN_V1: ("hunyuan_v1_moe.HunYuanMoEV1Gate",),
    _JAMBA: ("jamba.JambaTopKRouter",),
    _ARIA: ("aria.AriaTextTopKRouter",),
    _GPT_OSS: ("gpt_oss.GptOssTopKRouter",),
    _PRIVACY_FILTER: ("openai_privacy_filter.OpenAIPrivacyFilterTopKRouter",),
}
ROUTERS: dict[str, Router] = {name: router for router, names in _CLASSES.items() for name in names}
"""By family and class."""

LEFT: dict[str, str] = {
    **dict.fromkeys(
        ("ernie4_5_moe.Ernie4_5_MoeTopKRouter", "ernie4_5_vl_moe.Ernie4_5_VLMoeMoeTopKRouter"),
        "it divides by a sum that is bounded from below, not by one with a small number added",
    ),
    **dict.fromkeys(
        ("gemma4.Gemma4TextRouter", "diffusion_gemma.DiffusionGemmaTextRouter"),
        "it returns the probabilities of all experts, which are then at hand",
    ),
    "kolibri1.Kolibri1TopKRouter": "its bias is added to logits, not to scores",
    "inkling.InklingTopkRouter": "its shared experts are weighed together with those that are chosen",
    "phimoe.PhimoeTopKRouter": "it draws its experts one after the other, with a gradient of its own",
    "jetmoe.JetMoeTopKGating": "it returns tokens sorted by expert",
    "zaya.ZayaRouter": "it hands its hidden states on to the router of the next layer",
    "llama4.Llama4Router": "it returns a score for every expert",
}
"""Routers that are known and left to their classes, each with the reason."""
