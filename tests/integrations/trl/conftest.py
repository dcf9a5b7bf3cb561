"""A tiny model, and trainers on it."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from trl import GRPOTrainer

from grpo import make_trainer
from tiny_model import save_tiny_model


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def trainer(model_path: Path, tmp_path: Path) -> Callable[..., GRPOTrainer]:
    """Makes a trainer: (trainer class, settings of its configuration) -> trainer."""
    return functools.partial(make_trainer, model_path, tmp_path / "run")


@pytest.fixture(scope="session")
def pair(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[GRPOTrainer, GRPOTrainer]:
    """TRL's trainer, and this package's with TRL's rule."""
    output = tmp_path_factory.mktemp("pair")
    return make_trainer(model_path, output, GRPOTrainer), make_trainer(model_path, output, entropy_top_rule="quantile")
