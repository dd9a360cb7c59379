"""transformers: ``forward`` of the experts that go through its registry, and of routers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from accel.patches import transformers_experts, transformers_routers
from accel.patches.entry import Entry, why_not_version

EXPERTS = (
    *("afmoe.Afmoe", "aria.Aria", "axk1.AXK1", "axk2.AXK2", "bailing_hybrid.BailingHybrid", "beam.Beam"),
    *("cohere2_moe.Cohere2Moe", "deepseek_ocr2.DeepseekOcr2Text", "deepseek_v2.DeepseekV2", "deepseek_v3.DeepseekV3"),
    *("deepseek_v32.DeepseekV32", "deepseek_v4.DeepseekV4", "diffusion_gemma.DiffusionGemmaText", "dots1.Dots1"),
    *("dots3_note.Dots3Note", "ernie4_5_moe.Ernie4_5_Moe", "ernie4_5_vl_moe.Ernie4_5_VLMoeMoe"),
    *("exaone_moe.ExaoneMoe", "flex_olmo.FlexOlmo", "flint.Flint", "gemma4.Gemma4Text", "glm4_moe.Glm4Moe"),
    *("glm4_moe_lite.Glm4MoeLite", "glm4v_moe.Glm4vMoeText", "glm5_next.Glm5NextText", "glm_moe_dsa.GlmMoeDsa"),
    *("gpt_oss.GptOss", "granitemoe.GraniteMoe", "granitemoe_swa.GraniteMoeSWA", "granitemoehybrid.GraniteMoeHybrid"),
    *("granitemoeshared.GraniteMoeShared", "hunyuan_v1_moe.HunYuanMoEV1", "hy_v3.HYV3", "hy_v4.HYV4"),
    *("hy_v4_vl.HYV4VL", "inkling.Inkling", "inkling2.Inkling2", "inkling2_loop.Inkling2Loop", "jamba.Jamba"),
    *("kimi_linear.KimiLinear", "kolibri1.Kolibri1", "laguna.Laguna", "lara_mini.LaraMini", "lfm2_moe.Lfm2Moe"),
    *("mellum.Mellum", "mimo_v2_flash.MiMoV2Flash", "minimax.MiniMax", "minimax_m2.MiniMaxM2"),
    *("minimax_m3_vl.MiniMaxM3VL", "mistral4.Mistral4", "mistral_large4.MistralLarge4Text", "mixtral.Mixtral"),
    *("muse_spark.MuseSpark", "nemotron_h.NemotronH", "olmoe.Olmoe", "openai_privacy_filter.OpenAIPrivacyFilter"),
    *("phimoe.Phimoe", "qwen2_moe.Qwen2Moe", "qwen3_5_moe.Qwen3_5Moe", "qwen3_moe.Qwen3Moe"),
    *("qwen3_next.Qwen3Next", "qwen3_omni_moe.Qwen3OmniMoeThinkerText", "qwen3_omni_moe.Qwen3OmniMoeTalkerText"),
    *("qwen3_vl_moe.Qwen3VLMoeText", "qwen4_exp.Qwen4ExpText", "solar_open.SolarOpen"),
    *("unlimited_ocr.UnlimitedOcrText", "zaya.Zaya"),
)
"""Whose classes are these names with ``Experts`` behind."""

_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "config", "down_proj")
_OWN = (None, "eager", "batched_mm", "grouped_mm", transformers_experts.NAME)
"""Implementations that a switch replaces; another was asked for by name."""


def _why_not(module: Any) -> str | None:
    if (reason := why_not_version(module, *_FLAGS)) is not None:
        return reason
    asked = getattr(module.config, "_experts_implementation", None)
    return None if asked in _OWN else f"its experts are set to {asked!r}, not to eager, batched_mm, grouped_mm or accel"


def _why_not_call(module: Any, hidden_states: Tensor, **given: Any) -> str | None:
    if len(given) != 2 or any([x is None for x in given.values()]):
        return "no choice of experts is given"
    return transformers_experts.why_not(hidden_states.device.type, module.down_proj.dtype)


def _experts(module: Any, attend: Callable[..., Tensor], hidden_states: Tensor, **choice: Any) -> Tensor:
    indices = choice["top_k_index" if "top_k_index" in choice else "router_indices"]
    weights = choice["top_k_weights" if "top_k_weights" in choice else "routing_weights"]
    return transformers_experts.compute(module, attend, hidden_states, indices, weights)


def _path(name: str) -> str:
    family, _, cls = name.partition(".")
    return f"transformers.models.{family}.modeling_{family}.{cls}"


ENTRIES = (
    *[Entry(_path(f"{name}Experts"), "forward", _why_not, _experts, _why_not_call, "moe_experts") for name in EXPERTS],
    *[
        Entry(
            _path(name), "forward", partial(transformers_routers.why_not, router),
            partial(transformers_routers.compute, router), partial(transformers_routers.why_not_call, router),
            "moe_route",
        )
        for name, router in transformers_routers.ROUTERS.items()
    ],
)  # fmt: skip
