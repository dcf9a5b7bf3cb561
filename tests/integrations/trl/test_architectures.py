"""Two steps on tiny models of other architectures, and with LoRA adapters, end as under TRL's own trainer."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from trl import GRPOTrainer

from architectures import CONFIGS
from grpo import TRLS_RULE, log_of, make_trainer
from tiny_model import save_model_of


def steps(model: Path, output: Path, *arguments: Any, peft_config: LoraConfig | None = None, **settings: Any) -> list:
    trainer = make_trainer(model, output, *arguments, peft_config=peft_config, max_steps=2, **settings)
    trainer.train()
    return log_of(trainer)


@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps_are_trls(name: str, adapters: bool, tmp_path: Path) -> None:
    model = save_model_of(CONFIGS[name], tmp_path / "model")
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False, r=4) if adapters else None
    theirs = steps(model, tmp_path, GRPOTrainer, top_entropy_quantile=0.2, peft_config=lora)
    assert len(theirs) == 2
    for head in ("selected_rows", "trl"):
        ours = steps(model, tmp_path, entropy_lm_head=head, peft_config=lora, **TRLS_RULE)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_two_steps_with_adapters_and_a_trained_head_are_trls(tmp_path: Path) -> None:
    model = save_model_of(CONFIGS["llama"], tmp_path / "model")
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], init_lora_weights=False, r=4)
    theirs = steps(model, tmp_path, GRPOTrainer, top_entropy_quantile=0.2, peft_config=lora)
    for head in ("selected_rows", "trl"):
        ours = steps(model, tmp_path, entropy_lm_head=head, peft_config=lora, **TRLS_RULE)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)
