"""Any configuration of transformers made tiny: widths of 64, two layers, 4 heads, 64 words, maps of a few patches.

What is small is found by the names of the fields, so that a family that is new in the library is swept unasked. A
family whose parts must fit each other in a way that names do not tell has a line in ``EXTRA``.
"""

import dataclasses
import re
import sys
from pathlib import Path

WIDTH, HEADS, LAYERS, WORDS, MAP, PATCH = 64, 4, 2, 64, 32, 8
HEAD = WIDTH // HEADS
FIRST_SPECIAL = 40
"""Tokens of a model's own, for images and the like, are numbered from here; text is drawn from below."""

_NAMED = {
    "head_dim": HEAD, "attention_head_size": HEAD, "d_kv": HEAD, "kv_channels": HEAD, "v_head_dim": HEAD,
    "qk_nope_head_dim": HEAD, "qk_rope_head_dim": HEAD, "global_head_dim": HEAD, "index_head_dim": 16,
    "index_n_heads": 2, "index_topk": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "vocab_size": WORDS,
    "max_position_embeddings": 128, "n_positions": 128, "max_source_positions": 64, "max_target_positions": 64,
    "num_mel_bins": 16, "num_queries": 6, "sliding_window": 4, "attention_chunk_size": 4, "chunk_size": 8,
    "local_attention": 4, "attention_window": 4, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "num_shared_experts": 1, "max_window_layers": 1, "mamba_d_state": 8, "state_size": 8, "mamba_d_conv": 4,
    "mamba_chunk_size": 8, "n_groups": 1, "mamba_n_groups": 1, "window_size": 4, "num_hash_buckets": 64,
    "layer_norm_eps": 1e-5, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "layerdrop": 0.0,
    "suppress_tokens": None, "begin_suppress_tokens": None, "forced_eos_token_id": None,
    "forced_bos_token_id": None,
    "apply_spec_augment": False, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "image_size": MAP,
    "patch_size": PATCH, "use_timm_backbone": False, "use_pretrained_backbone": False,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
    "mlp_ratio": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "num_codevectors_per_group": 8, "codebook_size": 32, "query_pre_attn_scalar": HEAD,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": WORDS, "num_kv_shared_layers": 0,
    "out_hidden_size": WIDTH,
}  # fmt: skip
_PATTERNS = (
    (r".*(num|n)_(key_value|kv|query)_(heads|groups)|.*kv_heads|num_global_key_value_heads", "groups"),
    (r"(.*_)?(heads|n_head|num_head|nhead|num_heads_k)", HEADS),
    (r"(.*_)?(layers|n_layer|num_layer|depth|num_blocks)", LAYERS),
    (r"(num|n)_(local_|routed_)?experts", 4),
    (r"(ffn|intermediate|inner|mlp|feedforward|d_ff).*|.*(ffn_dim|intermediate_size)", 96),
    (r".*(hidden_size|hidden_dim|_dim|_size|_width|_channels|_features|embd|d_model|dim|width|emb)", WIDTH),
)
_KEPT = re.compile(
    r"(kernel|window|stride|patch|image|pool|group|batch|state|step|tubelet|context|spatial|num_channels|in_channels|"
    r"out_indices|frames|vocab_size|sampl|type_vocab|in_chans|audio_channels)"
)
_SPECIAL = re.compile(r".*(_token_id|_token_index|_token_ids)$")
_UNSAID = {"head_dim": HEAD, "num_experts_per_tok": 2}
"""What some configurations leave to the checkpoint."""
_TEXT_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2}
_TEXT_IDS |= {"cls_token_id": 1, "mask_token_id": 3}


def _resnet():
    import transformers

    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]
    )


_DETR = {"backbone_config": _resnet, "backbone": None}
_SWIN = {"depths": [1, 1], "num_heads": [2, 2], "patch_size": 4, "window_size": 4, "encoder_stride": 8}
EXTRA = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    **dict.fromkeys(("detr", "conditional_detr", "dab-detr", "deformable_detr", "table-transformer"), _DETR),
    **dict.fromkeys(("swin", "donut-swin", "maskformer-swin"), _SWIN),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gptj": {"rotary_dim": 8},
    "esm": {"vocab_size": WORDS, "token_dropout": True, "mask_token_id": 3, "pad_token_id": 0},
    "mpnet": {"relative_attention_num_buckets": 32},
    "nystromformer": {"num_landmarks": 11, "segment_means_seq_len": 11},
    "xmod": {"default_language": "en_XX"},
}


def tiny(cls, groups=2, **given):
    """An instance of the configuration class ``cls``, with the fields of ``given`` as they are.

    ``groups`` is the number of heads of keys and values, where the class can have fewer than of queries.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    default = _default(cls, given)
    values = {}
    for field in dataclasses.fields(cls):
        value = _value(default, field)
        if not field.name.startswith("_") and field.name not in given:
            small = _small(field.name, value, groups)
            if small is not value:
                values[field.name] = small
    values |= _kinds_of_layers(known, default)
    if "rope_parameters" in known and _mentions(cls, "mrope_section"):
        rotary = _value(default, {f.name: f for f in dataclasses.fields(cls)}["rope_parameters"])
        base = {"rope_type": "default", "rope_theta": 10000.0}
        values["rope_parameters"] = _rotary({"mrope_section": [], **(rotary if isinstance(rotary, dict) else base)})
    for key, spec in getattr(cls, "sub_configs_defaults", {}).items():
        part = getattr(default, key, None)
        if key not in given and not (spec.optional and part is None):
            values[key] = _part(spec, part, groups)
    values |= {k: v() if callable(v) else v for k, v in EXTRA.get(getattr(cls, "model_type", None), {}).items()}
    return cls(**{k: v for k, v in values.items() if k in known} | given)


def _default(cls, given):
    try:
        return cls(**given)
    except Exception:  # a composite that cannot be made of nothing: the defaults of its fields are what there is
        return None


def _value(default, field):
    return field.default if default is None else vars(default).get(field.name, field.default)


def _mentions(cls, word):
    """Whether the code of the class's model speaks of ``word``."""
    code = Path(sys.modules[cls.__module__].__file__)
    return any(word in path.read_text() for path in code.parent.glob("modeling_*.py"))


def _part(spec, default, groups):
    from transformers import PreTrainedConfig

    cls = type(default) if isinstance(default, PreTrainedConfig) else spec.config_class
    if not issubclass(cls, PreTrainedConfig):
        cls = spec.get_config_class(spec.model_type)
    known = {field.name for field in dataclasses.fields(cls)}
    given = {k: v for k, v in spec.init_kwargs.items() if k in known and not isinstance(v, int)}
    return tiny(cls, groups, **given)


def _small(name, value, groups):
    """The tiny value of a field; the value itself where it says nothing about size."""
    if value is None:
        return {"num_key_value_heads": groups, **_UNSAID}.get(name)
    if _SPECIAL.fullmatch(name) and not name.startswith("num_"):
        return _token(name, value)
    if name in _NAMED and value is not None and isinstance(value, bool) == isinstance(_NAMED[name], bool):
        return _of_its_kind(name, value, _NAMED[name])
    if isinstance(value, dict):
        return _rotary(value)
    if isinstance(value, list | tuple) and value and all(type(x) is int for x in value):
        return type(value)(_listed(name, value))
    if type(value) is int:
        return _number(name, value, groups)
    return value


def _of_its_kind(name, value, small):
    """``small``, or less, in the type that the field has; a list of one number for each stage."""
    if isinstance(value, list | tuple) and small is not None:
        return [small] * len(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or small is None:
        return small
    return type(value)(small if name == "image_size" else min(value, small))


def _token(name, value):
    if name in _TEXT_IDS and isinstance(value, int | list | tuple):
        return _TEXT_IDS[name]
    if type(value) is int and value >= FIRST_SPECIAL:
        return FIRST_SPECIAL + sum(map(ord, name)) % (WORDS - FIRST_SPECIAL)
    return value


def _rotary(value):
    """Rotary positions of several axes, whose parts add up to half of what is rotated of a head."""
    if "mrope_section" not in value:
        return {k: _rotary(v) if isinstance(v, dict) else v for k, v in value.items()} if value else value
    half = int(HEAD * value.get("partial_rotary_factor", 1.0)) // 2
    rest = half // 4
    return {**value, "mrope_section": [half - 2 * rest, rest, rest]}


def _number(name, value, groups):
    for pattern, small in _PATTERNS:
        if re.fullmatch(pattern, name) and not (_KEPT.search(name) and value < 64):
            return min(value, groups if small == "groups" else small)
    return value


def _listed(name, values):
    if name == "depths":
        return [1] * len(values)
    if "heads" in name:
        return [min(x, 2) for x in values]
    if re.search(r"(index|indices|layers?$)", name):
        return sorted({min(x, LAYERS - 1) for x in values})
    if _KEPT.search(name) or max(values) < 32:
        return values
    return [min(x, WIDTH) for x in values]


def _kinds_of_layers(known, default):
    """One layer of each kind, where a configuration lists the kinds of its layers."""
    found = {}
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(default, name, None)
        if kinds and isinstance(kinds, list | tuple) and name in known:
            found[name] = list(dict.fromkeys(kinds))
    if not found:
        return {}
    count = max(LAYERS, *map(len, found.values()))
    return {**{name: (kinds * count)[:count] for name, kinds in found.items()}, "num_hidden_layers": count}
