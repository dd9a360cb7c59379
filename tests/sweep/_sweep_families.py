"""The families of transformers that every run of the tests sweeps: one of each kind of attention, mask and position."""

QUICK = (
    "albert", "beit", "bert", "bigbird_pegasus", "blip", "bloom", "bridgetower", "clip", "data2vec-vision",
    "deepseek_v3", "deepseek_v4", "electra", "esm", "falcon", "gemma2", "git", "gpt2", "gpt_oss", "lasr_ctc",
    "llama", "llava", "longformer", "mixtral", "mobilebert", "modernbert", "mpt", "mvp", "nllb-moe", "parakeet_ctc",
    "pegasus_x", "qwen2_moe", "qwen3", "sam_vision_model", "siglip", "swin", "t5", "t5gemma", "trocr", "wav2vec2",
    "whisper", "xglm",
)  # fmt: skip
