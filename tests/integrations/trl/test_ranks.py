"""Two processes under `accelerate launch` run the assertions of two_ranks.py and give the steps of one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

import two_ranks
from grpo import MINI_BATCH, assert_same_metrics, assert_same_step, largest, launch, make_batch, optimizer_step, rows_of
from two_ranks import APART, STEPS


@pytest.fixture(scope="module")
def results(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("ranks")
    launch(Path(two_ranks.__file__), model_path, output, processes=2)
    return torch.load(output / "results.pt")


@pytest.mark.parametrize("settings", STEPS, ids=str)
@pytest.mark.filterwarnings("ignore:importance_sampling_level")
def test_a_step_does_not_depend_on_the_number_of_ranks(
    results: dict[str, Any], trainer: Callable[..., GRPOTrainer], settings: dict[str, Any]
) -> None:
    step = optimizer_step(trainer(entropy_top_ratio=0.2, **MINI_BATCH | settings), make_batch())
    for micro_batches in (1, 2):
        two = results["steps"][str(settings), micro_batches]
        assert_same_step(two, step, rtol=1e-5, atol=1e-6 * max(1.0, largest(step)))
        assert_same_metrics(two, step)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_each_local_rank_has_its_own_mean(
    results: dict[str, Any], trainer: Callable[..., GRPOTrainer], micro_batches: int
) -> None:
    settings = {"entropy_top_ratio": 0.2, "per_device_train_batch_size": 4, **APART}
    batch = make_batch()
    steps = [optimizer_step(trainer(**settings), rows_of(batch, rows)) for rows in (slice(4), slice(4, 8))]
    mean = [
        (steps[0][0] + steps[1][0]) / 2,
        {name: (steps[0][1][name] + steps[1][1][name]) / 2 for name in steps[0][1]},
    ]
    assert_same_step(results["steps"]["apart", micro_batches], mean, rtol=1e-5, atol=1e-6 * max(1.0, largest(mean)))


def test_training_continues_with_an_empty_rank(results: dict[str, Any]) -> None:
    assert len(results["logs"]) == 2
    for line in results["logs"]:
        assert 0.15 < line["entropy_token_ratio"] < 0.25 and line["grad_norm"] > 0


def test_the_completions_of_all_ranks_are_written(results: dict[str, Any]) -> None:
    """Two micro-batches of four completions on each rank; those of the empty rank have no tokens."""
    for step, line in enumerate(results["logs"], start=1):
        rows = [(tokens, selected) for number, tokens, selected in results["written"] if number == step]
        assert len(rows) == 16 and sum(tokens == 0 for tokens, _ in rows) == 8
        tokens, selected = map(sum, zip(*rows, strict=True))
        assert selected / tokens == pytest.approx(line["entropy_token_ratio"])
