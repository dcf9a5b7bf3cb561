"""A tiny model, problems in verl's format, and the trainer's command line."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from entropy_rl import config as configuration
from entropy_rl import logs, train
from tiny_model import save_tiny_model
from training import ACTOR, as_arguments, read_metrics

# The share of digits: a random model gets some of this reward, so there is a gradient.
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": sum(c.isdigit() for c in solution_str) / max(1, len(solution_str)), "acc": 0.0}
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process leave their curves empty: drawing them takes longer than training. test_logs.py draws them,
    and so does a run in a separate process."""
    if request.module.__name__ != "test_logs":
        monkeypatch.setattr(logs, "_draw", lambda history, path: path.touch())


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def write_parquet() -> Callable[[Path, list[dict[str, Any]]], Path]:
    def write(path: Path, rows: list[dict[str, Any]]) -> Path:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path

    return write


@pytest.fixture(scope="session")
def problems_path(tmp_path_factory: pytest.TempPathFactory, write_parquet: Callable[..., Path]) -> Path:
    """Sixteen sums in verl's format."""
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{a} + {a * a} ="}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(a + a * a)},
            "extra_info": {"index": a},
        }
        for a in range(16)
    ]
    return write_parquet(tmp_path_factory.mktemp("data") / "sums.parquet", rows)


@pytest.fixture(scope="session")
def reward_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "reward.py"
    path.write_text(REWARD)
    return path


@pytest.fixture
def overrides(model_path: Path, problems_path: Path, reward_path: Path, tmp_path: Path) -> dict[str, Any]:
    """A run that takes seconds. A training step has two optimizer steps of two micro-batches."""
    return {
        "actor_rollout_ref.model.path": model_path,
        "data.train_files": problems_path,
        "reward.custom_reward_function.path": reward_path,
        "data.train_batch_size": 4,
        "data.max_response_length": 8,
        "actor_rollout_ref.rollout.n": 4,
        f"{ACTOR}.ppo_mini_batch_size": 2,
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": 4,
        f"{ACTOR}.optim.lr": 1e-3,
        f"{ACTOR}.entropy_top_ratio": 0.2,
        "trainer.total_training_steps": 1,
        "trainer.default_local_dir": tmp_path / "run",
        "trainer.logger": "[file]",
    }


DIRECTORY = "trainer.default_local_dir"
_LOADED: dict[tuple[str, ...], Any] = {}


@pytest.fixture
def config(overrides: dict[str, Any]) -> Any:
    """The configuration of `overrides`, a copy of the one that the first test composed: Hydra takes as long for it as
    the rest of a test."""
    arguments = tuple(as_arguments({key: value for key, value in overrides.items() if key != DIRECTORY}))
    if arguments not in _LOADED:
        _LOADED[arguments] = configuration.load(arguments)
    loaded = copy.deepcopy(_LOADED[arguments])
    loaded.trainer.default_local_dir = str(overrides[DIRECTORY])
    return loaded


@pytest.fixture
def run(overrides: dict[str, Any], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs the trainer in this process with more overrides, and returns the lines of metrics.jsonl."""

    def run_trainer(changes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        settings = overrides | (changes or {})
        assert train.main(as_arguments(settings)) == 0
        return read_metrics(Path(settings["trainer.default_local_dir"]))

    return run_trainer
