"""Checkpoints that survive a kill at any moment, and from which a run continues bit for bit.

    default_local_dir/global_step_N/actor/huggingface   weights, configuration and tokenizer, as transformers loads them
    default_local_dir/global_step_N/trainer.pt          optimizer and random states
    default_local_dir/global_step_N/checkpoint.json     checksums of the files, and the checkpoint before this one
    default_local_dir/run.lock                          locked while a run writes to the directory

Weights and optimizer are unsharded, whatever the number of ranks: rank 0 writes them, and a run with any number of
ranks can resume from them.

A checkpoint is written under another name and renamed when every byte is on the disk, so a directory with the name
global_step_N is complete. A run removes no checkpoint but its own: those that it wrote, and those before the one from
which it resumed. A directory global_step_N of another program, without these files, is left alone.
"""

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import socket
import uuid
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from entropy_rl import distributed
from entropy_rl.config import ConfigError
from entropy_rl.errors import one_line

_NAME = re.compile(r"global_step_(\d+)")
_PARTIAL = ".partial"
_PARTIAL_NAME = re.compile(r"global_step_\d+(\.removed)?\.partial")


def model_directory(checkpoint: Path) -> Path:
    return checkpoint / "actor" / "huggingface"


def step_of(checkpoint: Path) -> int:
    """Raises ConfigError if `checkpoint` is not a checkpoint directory."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None or not _is_checkpoint(checkpoint):
        raise ConfigError(
            f"trainer.resume_from_path={checkpoint}: not a checkpoint; a directory global_step_N with a file "
            "trainer.pt was expected"
        )
    return int(match[1])


# ---- The directory of a run


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Creates the directory of a run and locks it against other runs. All ranks call it.

    Raises:
        ConfigError: the directory cannot be created, or another run has locked it.
    """
    with ExitStack() as stack:
        distributed.on_first(lambda: _lock(stack, directory))
        yield


def begin(directory: Path, resumed: Path | None) -> None:
    """Notes in the lock file where the run starts, and prints it on rank 0. Removes what a killed run left behind."""
    if distributed.rank() > 0:
        return
    for path in directory.iterdir():
        if _PARTIAL_NAME.fullmatch(path.name):
            shutil.rmtree(path)
    last_run, present = _start_in(directory), _checkpoints(directory)
    if resumed is not None:
        print(f"resuming from {resumed}")
        here = resumed.parent == directory.resolve()
        further = [path.name for path in present if step_of(path) > step_of(resumed)]
        if here and further:
            print(f"{', '.join(further)} of {directory}: not resumed, because an earlier run or branch wrote them")
        saved_nothing = last_run.get("serial") == _newest(present) != 0
        if here and saved_nothing and last_run["from"] != _manifest(resumed).get("id"):
            print(f"{resumed}: an earlier run wrote it; the last run in {directory} has saved no checkpoint")
    elif present:
        names = ", ".join(path.name for path in present)
        print(
            f"{directory} has checkpoints of an earlier run: {names}; this run replaces those of the steps that it "
            "saves and leaves the others"
        )
    start = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "from": None if resumed is None else _manifest(resumed).get("id"),
        "serial": _newest(present),
    }
    (directory / "run.lock").write_text(json.dumps(start) + "\n")


def find_latest(directory: Path) -> Path | None:
    """The checkpoint that was written last in `directory`, or None."""
    return next(reversed(_checkpoints(directory)), None)


def _lock(stack: ExitStack, directory: Path) -> None:
    import fcntl

    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context((directory / "run.lock").open("a"))
    except OSError as error:
        raise ConfigError(f"trainer.default_local_dir={directory}: it cannot be created: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        other = _start_in(directory)
        raise ConfigError(
            f"trainer.default_local_dir={directory}: another run writes there (process {other.get('process')} on "
            f"{other.get('host')}); end it, or choose another directory"
        ) from None


def _start_in(directory: Path) -> dict[str, Any]:
    """What the last run in the directory noted when it began."""
    try:
        return dict(json.loads((directory / "run.lock").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


# ---- Saving


def check_saving(
    directory: Path, steps: Collection[int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Checks at the start of a run that it will be able to save after `steps`. All ranks call it.

    Raises:
        ConfigError: transformers refuses to save the model, there is too little space, or a directory of another
            program has the name of a checkpoint.
    """
    distributed.on_first(lambda: _check_saving(directory, steps, model, tokenizer))


def _check_saving(
    directory: Path, steps: Collection[int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    where = f"trainer.default_local_dir={directory}"
    for path in directory.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) in steps and not _is_checkpoint(path):
            raise ConfigError(
                f"{where}: {path.name} there is not a checkpoint of this trainer, and this run would write one of "
                "that name; choose another directory"
            )
    if not steps:
        return
    # Weights and AdamW's two moments, in float32.
    needed, free = 12 * sum(parameter.numel() for parameter in model.parameters()), shutil.disk_usage(directory).free
    if free < needed:
        raise ConfigError(f"{where}: a checkpoint needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there")
    trial = directory / f"global_step_0{_PARTIAL}"
    try:
        # Everything but the weights.
        model.save_pretrained(trial, state_dict={})
        tokenizer.save_pretrained(trial)
    except Exception as error:
        raise ConfigError(
            f"actor_rollout_ref.model.path={model.name_or_path}: the model cannot be saved as it is configured: "
            f"{one_line(error)}"
        ) from None
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def save(
    directory: Path,
    step: int,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: Optimizer,
    keep: int | None,
    previous: Path | None,
) -> Path:
    """Writes directory/global_step_{step} and returns it. All ranks call it, and return when it is complete.

    Args:
        keep: how many of the run's checkpoints stay, the newest; None: all.
        previous: the checkpoint that this run wrote last or resumed from.
    """
    final = directory / f"global_step_{step}"
    weights, optimizer_state = distributed.full_state(model, optimizer)
    random_states = distributed.gather(_random_states())
    if distributed.rank() == 0:
        state = {"optimizer": optimizer_state, "random": random_states}
        parent = None if previous is None or not previous.is_dir() else _manifest(previous).get("id")
        _write(final, distributed.unwrapped(model), weights, tokenizer, state, parent)
        if keep is not None:
            for old in _line(final)[keep:]:
                _remove(old)
    distributed.barrier()
    return final


def _write(
    final: Path,
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    parent: str | None,
) -> None:
    partial = final.with_name(final.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(model_directory(partial), state_dict=weights)
    tokenizer.save_pretrained(model_directory(partial))
    torch.save(state, partial / "trainer.pt")
    manifest = {
        "id": uuid.uuid4().hex,
        "parent": parent,
        "serial": _newest(_checkpoints(final.parent)) + 1,
        "files": {
            str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        },
    }
    (partial / "checkpoint.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*partial.rglob("*"), partial]:
        _flush_to_disk(path)
    # A run that resumed from an earlier step, or began anew, reaches this step again.
    if final.exists():
        _remove(final)
    partial.rename(final)
    _flush_to_disk(final.parent)


def _line(checkpoint: Path) -> list[Path]:
    """The checkpoints of a run in their directory, newest first: this one, the one before it, and so on."""
    by_id = {_manifest(path).get("id"): path for path in _checkpoints(checkpoint.parent)}
    line = [checkpoint]
    while (parent := _manifest(line[-1]).get("parent")) is not None and parent in by_id:
        line.append(by_id[parent])
    return line


def _checkpoints(directory: Path) -> list[Path]:
    """All complete checkpoints, in the order in which they were written."""
    found = [path for path in directory.glob("global_step_*") if _NAME.fullmatch(path.name) and _is_checkpoint(path)]
    return sorted(found, key=lambda path: (_serial(path), step_of(path)))


def _newest(checkpoints: Collection[Path]) -> int:
    return max(map(_serial, checkpoints), default=0)


def _serial(checkpoint: Path) -> int:
    """The place of a checkpoint in the order of writing; 0 if an earlier version wrote it, which did not note it."""
    return int(_manifest(checkpoint).get("serial", 0))


def _is_checkpoint(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("checkpoint.json", "trainer.pt"))


def _manifest(checkpoint: Path) -> dict[str, Any]:
    """checkpoint.json; empty if an earlier version, which did not write it, wrote the checkpoint."""
    path = checkpoint / "checkpoint.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: it is damaged: {one_line(error)}; {_way_out(checkpoint)}") from None


def _remove(checkpoint: Path) -> None:
    # Renamed first: a kill while it is being removed must not leave half a checkpoint under the name of one.
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(checkpoint.name + ".removed" + _PARTIAL)))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- Resuming


def verify(checkpoint: Path, model_path: str, *, trust_remote_code: bool = False) -> None:
    """Checks a checkpoint before a run resumes from it. All ranks call it.

    Raises:
        ConfigError: a file is missing or damaged, or the checkpoint is of another model than the one at `model_path`.
    """
    distributed.on_first(lambda: _verify(checkpoint, model_path, trust_remote_code))


def _verify(checkpoint: Path, model_path: str, trust_remote_code: bool) -> None:
    files = _manifest(checkpoint).get("files", {"trainer.pt": {}, "actor/huggingface/config.json": {}})
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise ConfigError(f"{path}: the file is missing; {_way_out(checkpoint)}")
        if expected and path.stat().st_size != expected["bytes"]:
            raise ConfigError(
                f"{path}: the file is damaged: it has {path.stat().st_size} bytes and was written with "
                f"{expected['bytes']}; {_way_out(checkpoint)}"
            )
        if expected and _sha256(path) != expected["sha256"]:
            raise ConfigError(
                f"{path}: the file is damaged: its checksum is not that of checkpoint.json; {_way_out(checkpoint)}"
            )
    try:
        saved, given = (
            AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).to_dict()
            for path in (model_directory(checkpoint), model_path)
        )
    except Exception:  # loading the model and the tokenizer names what is wrong with them
        return
    for key in sorted(saved.keys() & given.keys()):
        if saved[key] != given[key] and (key == "model_type" or _is_size(key, saved[key])):
            raise ConfigError(
                f"actor_rollout_ref.model.path={model_path}: {checkpoint} is a checkpoint of another model: its {key} "
                f"is {saved[key]}, and {given[key]} here; give the model that the run began with, or another "
                "trainer.default_local_dir"
            )


def _is_size(key: str, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and not key.endswith("_token_id")


def restore(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Restores optimizer and random states. The weights are those of `model_directory(checkpoint)`.

    A rank that did not exist when the checkpoint was written keeps its own random state.
    """
    path = checkpoint / "trainer.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path}: it cannot be read: {one_line(error)}; {_way_out(checkpoint)}") from None
    missing = [name for name in ("optimizer", "random") if not isinstance(state, dict) or name not in state]
    if missing:
        raise ConfigError(f"{path}: it has no {' and no '.join(missing)} state; {_way_out(checkpoint)}")
    try:
        saved = {name for group in state["optimizer"]["param_groups"] for name in group["params"]}
        own = {name for name, _ in distributed.unwrapped(model).named_parameters()}
        if saved != own:
            raise ValueError(f"only one of the two has {', '.join(sorted(saved ^ own)[:3])}")
        distributed.load_optimizer(model, optimizer, state["optimizer"])
    except (KeyError, RuntimeError, ValueError, TypeError, AssertionError, AttributeError) as error:
        raise ConfigError(
            f"{path}: its optimizer state does not fit the model: {type(error).__name__}: {one_line(error)}; "
            f"{_way_out(checkpoint)}"
        ) from None
    if distributed.rank() < len(state["random"]):
        _set_random_states(state["random"][distributed.rank()])


def _way_out(checkpoint: Path) -> str:
    return f"to resume from an earlier checkpoint, remove {checkpoint} or set trainer.resume_from_path"


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": _numpy_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _numpy_state() -> tuple[Any, ...]:
    name, keys, *rest = cast(tuple[Any, ...], numpy.random.get_state(legacy=True))
    return (name, keys.tolist(), *rest)


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
