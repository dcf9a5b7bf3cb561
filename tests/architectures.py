"""Configurations of tiny models of several architectures, for `save_model_of` in tiny_model.py."""

from typing import Any

from transformers import (
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from tiny_model import SHARED

_LAYERS: dict[str, Any] = SHARED | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_WITHOUT_GROUPS = {key: value for key, value in _LAYERS.items() if key not in ("num_key_value_heads", "head_dim")}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_LAYERS),
    "gemma2": Gemma2Config(**_LAYERS),
    "gemma3": Gemma3TextConfig(**_LAYERS),
    "gpt2": GPT2Config(**SHARED, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "mistral": MistralConfig(**_LAYERS),
    "mixtral": MixtralConfig(**_LAYERS, **_EXPERTS),
    "qwen3_moe": Qwen3MoeConfig(**_LAYERS, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
    "cohere2": Cohere2Config(**_LAYERS),
    "granite": GraniteConfig(**_LAYERS, logits_scaling=2.0),
    "phi": PhiConfig(**_WITHOUT_GROUPS),  # its head has a bias
    "gpt_neox": GPTNeoXConfig(**_WITHOUT_GROUPS),
    "opt": OPTConfig(**_WITHOUT_GROUPS, ffn_dim=48, word_embed_proj_dim=32),
    "gpt_oss": GptOssConfig(**_LAYERS, **_EXPERTS),
}
# They change the logits after the head.
CHANGES_LOGITS = ("gemma2", "cohere2", "granite")
