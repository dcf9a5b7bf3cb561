"""The example script, from its command line."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from grpo import launch

RECIPE = Path(__file__).parents[3] / "recipe" / "entropy_token_rule" / "trl_entropy_top20.py"


@pytest.mark.parametrize("processes", [1, 2])
def test_trains_a_reasoning_gym_task(model_path: Path, tmp_path: Path, processes: int) -> None:
    options = {
        "model_name_or_path": model_path,
        "output_dir": tmp_path,
        "task": "chain_sum",
        "task_size": 16,
        "max_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "max_completion_length": 12,
        "entropy_top_scope": "mini_batch",
        "entropy_top_ranks": "global",
        "bf16": "false",
        "use_cpu": "true",
        "report_to": "none",
    }
    launch(RECIPE, *(text for name, value in options.items() for text in (f"--{name}", value)), processes=processes)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    ratios = [line["entropy_token_ratio"] for line in state["log_history"] if "entropy_token_ratio" in line]
    assert len(ratios) == 2 and all(0.2 <= ratio < 0.25 for ratio in ratios)
    AutoModelForCausalLM.from_pretrained(tmp_path)
