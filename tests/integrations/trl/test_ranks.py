"""Two processes under `accelerate launch`: what two_ranks.py asserts, and that one process does the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

import two_ranks
from grpo import launch, make_batch, optimizer_step
from two_ranks import WHOLE_STEP


@pytest.fixture(scope="module")
def results(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("ranks")
    launch(Path(two_ranks.__file__), model_path, output, processes=2)
    return torch.load(output / "results.pt")


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo"])
@pytest.mark.parametrize("rule", ["topk", "threshold", "quantile"])
def test_a_step_does_not_depend_on_the_number_of_ranks(
    results: dict[str, Any], trainer: Callable[..., GRPOTrainer], rule: str, loss_type: str, micro_batches: int
) -> None:
    one = trainer(entropy_top_ratio=0.2, entropy_top_rule=rule, loss_type=loss_type, **WHOLE_STEP)
    loss, gradients, metrics = optimizer_step(one, make_batch())
    two_loss, two_gradients, two_metrics = results["steps"][rule, loss_type, micro_batches]
    torch.testing.assert_close(two_loss, loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(two_gradients[name], gradient, rtol=1e-5, atol=1e-6)
    for name in ("entropy_token_ratio", "entropy_threshold"):
        assert two_metrics[name] == pytest.approx(metrics[name], rel=1e-6)


def test_training_goes_on_beside_an_empty_rank(results: dict[str, Any]) -> None:
    assert len(results["logs"]) == 2
    for line in results["logs"]:
        assert 0.15 < line["entropy_token_ratio"] < 0.25 and line["grad_norm"] > 0
