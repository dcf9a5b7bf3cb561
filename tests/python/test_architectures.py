"""The trainer on tiny models of other architectures, with the replaced LM head and with the model's own."""

from pathlib import Path
from typing import Any

import pytest
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

from tiny_model import SHARED, save_model_of

LAYERS: dict[str, Any] = SHARED | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WITHOUT_GROUPS = {key: value for key, value in LAYERS.items() if key not in ("num_key_value_heads", "head_dim")}
# configuration, and whether the op computes the head: of the others, the model changes the logits after it.
ARCHITECTURES: dict[str, tuple[PretrainedConfig, bool]] = {
    "llama": (LlamaConfig(**LAYERS), True),
    "gemma2": (Gemma2Config(**LAYERS), False),
    "gemma3": (Gemma3TextConfig(**LAYERS), True),
    "gpt2": (GPT2Config(**SHARED, n_embd=32, n_layer=2, n_head=2, n_positions=64), True),
    "mistral": (MistralConfig(**LAYERS), True),
    "mixtral": (MixtralConfig(**LAYERS, **EXPERTS), True),
    "qwen3_moe": (Qwen3MoeConfig(**LAYERS, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2), True),
    "cohere2": (Cohere2Config(**LAYERS), False),
    "granite": (GraniteConfig(**LAYERS, logits_scaling=2.0), False),
    "phi": (PhiConfig(**WITHOUT_GROUPS), True),  # its head has a bias
    "gpt_neox": (GPTNeoXConfig(**WITHOUT_GROUPS), True),
    "opt": (OPTConfig(**WITHOUT_GROUPS, ffn_dim=48, word_embed_proj_dim=32), True),
    "gpt_oss": (GptOssConfig(**LAYERS, **EXPERTS), True),
}
COMPARED = ("actor/loss", "actor/entropy", "actor/entropy_threshold", "actor/grad_norm", "actor/entropy_token_ratio")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_steps_with_and_without_the_replaced_head(
    name: str, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, replaced = ARCHITECTURES[name]
    model = save_model_of(config, tmp_path / "model")
    runs = []
    for fused in ("true", "false"):
        changes = {
            "actor_rollout_ref.model.path": model,
            "actor_rollout_ref.model.use_fused_kernels": fused,
            "trainer.default_local_dir": tmp_path / fused,
            "trainer.total_training_steps": 2,
            "reward.num_workers": 0,  # starting them takes longer than the run
        }
        runs.append([line["data"] for line in run(changes)])
        assert ("has no effect for this model" in capsys.readouterr().out) == (fused == "true" and not replaced)
    assert len(runs[0]) == len(runs[1]) == 2
    for step, (with_op, without) in enumerate(zip(*runs, strict=True)):
        for key in COMPARED:
            assert with_op[key] == pytest.approx(without[key], rel=1e-3, abs=1e-5), (step, key)
