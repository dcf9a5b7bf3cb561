"""The trainer on tiny models of other architectures, with the replaced LM head and with the model's own."""

from pathlib import Path
from typing import Any

import pytest

from architectures import CHANGES_LOGITS, CONFIGS
from tiny_model import save_model_of

COMPARED = ("actor/loss", "actor/entropy", "actor/entropy_threshold", "actor/grad_norm", "actor/entropy_token_ratio")


@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps_with_and_without_the_replaced_head(
    name: str, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model_of(CONFIGS[name], tmp_path / "model")
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
        says_why = "has no effect for this model" in capsys.readouterr().out
        assert says_why == (fused == "true" and name in CHANGES_LOGITS)
    assert len(runs[0]) == len(runs[1]) == 2
    for step, (with_op, without) in enumerate(zip(*runs, strict=True)):
        for key in COMPARED:
            assert with_op[key] == pytest.approx(without[key], rel=1e-3, abs=1e-5), (step, key)
