"""Functions that the tests of the trainer share."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

ACTOR = "actor_rollout_ref.actor"


def entropy_times_advantage(log_prob: Tensor, entropy: Tensor, advantages: Tensor, response_mask: Tensor) -> Tensor:
    """A score of a user's."""
    return entropy * advantages.abs()


def entropy_weight(log_prob: Tensor, entropy: Tensor, advantages: Tensor, response_mask: Tensor) -> Tensor:
    """Weights of a user's; some are 0."""
    return (entropy - 0.2).clamp(min=0)


def only_high_entropies(log_prob: Tensor, entropy: Tensor, advantages: Tensor, response_mask: Tensor) -> Tensor:
    return entropy * (entropy >= 4.07)


def as_arguments(overrides: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in overrides.items()]


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics on which two equal runs agree."""
    return [
        line | {"data": {k: v for k, v in line["data"].items() if not k.startswith(("timing_s/", "perf/"))}}
        for line in lines
    ]


def broken_copy(model: Path, path: Path, pattern: str, content: bytes | None) -> Path:
    """A copy of a model without the files that match `pattern` (content None), or with other content in one file."""
    shutil.copytree(model, path)
    if content is None:
        for file in path.glob(pattern):
            file.unlink()
    else:
        (path / pattern).write_bytes(content)
    return path
