"""Tiny configurations of many architectures: those that are computed packed, and those that must be padded.

They include heads of 64, 128 and 256, value heads of another size than key heads, windows, caps, sinks, experts, and
every kind of post-processing after an output layer.
"""

from collections.abc import Mapping

from transformers import (
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    Lfm2Config,
    LlamaConfig,
    MiniCPM3Config,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    NemotronConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    RobertaConfig,
    StableLmConfig,
)

SPECIALS = ("<eos>", "<pad>")
VOCABULARY = 256 + len(SPECIALS)
MAX_LENGTH_TOKENS = 256
WINDOW_TOKENS = 6
LONG_TOKENS = 24
_IDS = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
_SIZES = _IDS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH_TOKENS,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": MAX_LENGTH_TOKENS // 8,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
    "original_max_position_embeddings": LONG_TOKENS,
}
PACKED: Mapping[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "qwen2": Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_SIZES, head_dim=128),
    "mistral": MistralConfig(**_SIZES, sliding_window=WINDOW_TOKENS),
    "mistral-full": MistralConfig(**_SIZES, sliding_window=None, head_dim=64),
    "gemma2": Gemma2Config(
        **_SIZES,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW_TOKENS,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3": Gemma3TextConfig(
        **_SIZES,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=WINDOW_TOKENS,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": Phi3Config(**_SIZES),
    "gpt-neox": GPTNeoXConfig(**_SIZES),
    "olmo2": Olmo2Config(**_SIZES),
    "cohere": CohereConfig(**_SIZES, logit_scale=2.0),
    "gpt-oss": GptOssConfig(
        **_SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW_TOKENS, rope_parameters=_YARN
    ),
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2),
    "granite": GraniteConfig(**_SIZES, logits_scaling=0.5),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=MAX_LENGTH_TOKENS,
        bos_token_id=None,
        eos_token_id=256,
    ),
    "minicpm3": MiniCPM3Config(**(_SIZES | {"num_key_value_heads": 4}), **_LATENT, dim_model_base=8, v_head_dim=8),
    "deepseek-v3": DeepseekV3Config(
        **(_SIZES | {"num_key_value_heads": 4}), **_LATENT, v_head_dim=12, first_k_dense_replace=2
    ),
    "hyperclovax": HyperCLOVAXConfig(**_SIZES, logits_scaling=3.0),
    "longrope": Phi3Config(**_SIZES, original_max_position_embeddings=LONG_TOKENS, rope_parameters=_LONGROPE),
}
PADDED: Mapping[str, PreTrainedConfig] = {
    "lfm2": Lfm2Config(**_SIZES, layer_types=["conv", "full_attention"]),
    "qwen3-next": Qwen3NextConfig(
        **_SIZES,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "bloom": BloomConfig(**_IDS, hidden_size=32, n_layer=2, n_head=4),
    "mpt": MptConfig(**_IDS, d_model=32, n_layers=2, n_heads=4, max_seq_len=MAX_LENGTH_TOKENS),
    "roberta": RobertaConfig(**(_SIZES | {"max_position_embeddings": MAX_LENGTH_TOKENS + 258}), is_decoder=True),
    "stablelm": StableLmConfig(**_SIZES),
    "nemotron": NemotronConfig(**_SIZES),
}
CONFIGS: Mapping[str, PreTrainedConfig] = {**PACKED, **PADDED}
