"""Checkpoints that survive a kill at any moment, and from which a run continues bit for bit.

    default_local_dir/global_step_N/actor/huggingface   weights, configuration, tokenizer, as transformers loads them
    default_local_dir/global_step_N/trainer.pt          optimizer and random states

A checkpoint is written beside its place and renamed into it when every byte is on the disk: a directory that
bears the name global_step_N is whole.
"""

import os
import pickle
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entropy_rl.config import ConfigError
from entropy_rl.errors import one_line

_NAME = re.compile(r"global_step_(\d+)")
_PARTIAL = ".partial"


def model_directory(checkpoint: Path) -> Path:
    return checkpoint / "actor" / "huggingface"


def find_latest(directory: Path) -> Path | None:
    """The whole checkpoint with the highest step in `directory`, or None."""
    return next(reversed(_checkpoints(directory)), None)


def step_of(checkpoint: Path) -> int:
    """Raises ConfigError if `checkpoint` is not a checkpoint directory."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None or not (checkpoint / "trainer.pt").is_file():
        raise ConfigError(
            f"trainer.resume_from_path={checkpoint}: not a checkpoint; a directory global_step_N with a file "
            "trainer.pt was expected"
        )
    return int(match[1])


def save(
    directory: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: Optimizer,
    keep: int | None,
) -> Path:
    """Writes directory/global_step_{step}, then removes all but the `keep` newest checkpoints (None: keeps all)."""
    final = directory / f"global_step_{step}"
    partial = directory / (final.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(model_directory(partial))
    tokenizer.save_pretrained(model_directory(partial))
    torch.save({"optimizer": optimizer.state_dict(), "random": _random_states()}, partial / "trainer.pt")
    for path in [*partial.rglob("*"), partial]:
        _flush_to_disk(path)
    # A run that went back to an earlier step comes by here again.
    if final.exists():
        _remove(final)
    partial.rename(final)
    _flush_to_disk(directory)
    if keep is not None:
        for old in _checkpoints(directory)[:-keep]:
            _remove(old)
    return final


def remove_partial(directory: Path) -> None:
    """Removes what a killed run left half written or half removed."""
    for path in directory.glob("global_step_*" + _PARTIAL):
        shutil.rmtree(path)


def restore(checkpoint: Path, optimizer: Optimizer) -> None:
    """Brings back optimizer and random states; the weights are those of `model_directory(checkpoint)`."""
    try:
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{checkpoint / 'trainer.pt'}: it cannot be read: {one_line(error)}") from None
    optimizer.load_state_dict(state["optimizer"])
    _set_random_states(state["random"])


def _checkpoints(directory: Path) -> list[Path]:
    """All whole checkpoints, oldest step first."""
    return sorted((path for path in directory.glob("global_step_*") if _NAME.fullmatch(path.name)), key=step_of)


def _remove(checkpoint: Path) -> None:
    # First a name that is not a checkpoint's: a kill in the middle of removing must not leave half of one.
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(checkpoint.name + ".removed" + _PARTIAL)))


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": _numpy_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _numpy_state() -> tuple[Any, ...]:
    name, keys, *rest = numpy.random.get_state(legacy=True)
    return (name, keys.tolist(), *rest)


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
