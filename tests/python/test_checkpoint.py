"""Checkpoints: a resumed run is the uninterrupted one, bit for bit, and a kill costs no whole checkpoint."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_rl import checkpoint, train
from training import ACTOR, as_arguments, read_metrics, without_times

Overrides = dict[str, Any]

# Runs the trainer, and hangs in the middle of the checkpoint of step 4, once it has said so.
HANG = """
import shutil, sys, time
from pathlib import Path
from entropy_rl import checkpoint, train

def hang_in(module, name, when):
    original = getattr(module, name)
    def function(path, *args, **kwargs):
        if when(Path(path)):
            Path(sys.argv[1]).touch()
            time.sleep(600)
        return original(path, *args, **kwargs)
    setattr(module, name, function)

if sys.argv[2] == "writing":
    hang_in(checkpoint, "_flush_to_disk", lambda path: path.match("global_step_4.partial/trainer.pt"))
else:
    hang_in(shutil, "rmtree", lambda path: path.name == "global_step_2.removed.partial")
sys.exit(train.main(sys.argv[3:]))
"""


@pytest.fixture
def long_run(overrides: Overrides) -> Overrides:
    """Five steps, with everything on that has a state or a schedule, saved after the second, fourth and fifth."""
    return overrides | {
        "trainer.total_training_steps": 5,
        "trainer.save_freq": 2,
        f"{ACTOR}.shuffle": "true",
        f"{ACTOR}.use_kl_loss": "true",
        f"{ACTOR}.policy_loss.loss_mode": "clip_cov",
        f"{ACTOR}.optim.lr_scheduler_type": "cosine",
        "trainer.logger": "[file,tensorboard]",
    }


@pytest.fixture
def uninterrupted(long_run: Overrides, tmp_path: Path) -> Path:
    directory = tmp_path / "uninterrupted"
    assert train.main(as_arguments(long_run | {"trainer.default_local_dir": directory})) == 0
    return directory


def assert_equal_state(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_state(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_state(x, y)
    else:
        assert a == b


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimizer, random states and every metric, bit for bit."""
    last = "global_step_5"
    weights = [checkpoint.model_directory(path / last) / "model.safetensors" for path in (a, b)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    states = [torch.load(path / last / "trainer.pt", weights_only=True) for path in (a, b)]
    assert_equal_state(*states)
    assert without_times(read_metrics(a)) == without_times(read_metrics(b))


@pytest.mark.parametrize("how", ["auto", "resume_path"])
def test_resume_continues_bit_for_bit(how: str, long_run: Overrides, uninterrupted: Path, tmp_path: Path) -> None:
    """From the second step's checkpoint, with what the first run logged later still in metrics.jsonl."""
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    if how == "auto":
        for later in ("global_step_4", "global_step_5"):
            shutil.rmtree(directory / later)
    else:
        long_run |= {"trainer.resume_from_path": directory / "global_step_2"}
    long_run |= {"trainer.resume_mode": how, "trainer.default_local_dir": directory}
    assert train.main(as_arguments(long_run)) == 0
    assert_same_run(directory, uninterrupted)


@pytest.mark.parametrize(("when", "survivor"), [("writing", 2), ("removing", 4)])
def test_kill_while_saving(when: str, survivor: int, long_run: Overrides, uninterrupted: Path, tmp_path: Path) -> None:
    """SIGKILL while step 4 is being saved, or while the older checkpoint goes: the last whole one is there, and from
    it the run ends as if nothing had happened."""
    directory, marker = tmp_path / "run", tmp_path / "marker"
    if when == "removing":
        long_run["trainer.max_actor_ckpt_to_keep"] = 1
    arguments = as_arguments(long_run | {"trainer.default_local_dir": directory})
    process = subprocess.Popen(
        [sys.executable, "-c", HANG, str(marker), when, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        while not marker.exists():
            assert process.poll() is None, "the run ended before it saved the fourth step"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert any(path.name.endswith(".partial") for path in directory.iterdir())
    assert checkpoint.find_latest(directory) == directory / f"global_step_{survivor}"

    assert train.main(arguments) == 0
    assert not any(path.name.endswith(".partial") for path in directory.iterdir())
    assert_same_run(directory, uninterrupted)


def test_disable_starts_anew(long_run: Overrides, uninterrupted: Path) -> None:
    before = read_metrics(uninterrupted)
    long_run |= {"trainer.resume_mode": "disable", "trainer.default_local_dir": uninterrupted}
    assert train.main(as_arguments(long_run)) == 0
    assert without_times(read_metrics(uninterrupted)) == without_times(before)


def test_a_finished_run_has_nothing_to_do(long_run: Overrides, uninterrupted: Path) -> None:
    before = read_metrics(uninterrupted)
    assert train.main(as_arguments(long_run | {"trainer.default_local_dir": uninterrupted})) == 0
    assert read_metrics(uninterrupted) == before


def test_only_the_newest_are_kept(long_run: Overrides, tmp_path: Path) -> None:
    long_run |= {"trainer.save_freq": 1, "trainer.max_actor_ckpt_to_keep": 2}
    assert train.main(as_arguments(long_run)) == 0
    assert sorted(path.name for path in (tmp_path / "run").glob("global_step_*")) == [
        "global_step_4",
        "global_step_5",
    ]


@pytest.mark.parametrize("name", ["global_step_7", "elsewhere"])
def test_a_path_that_is_no_checkpoint(
    name: str, overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    overrides |= {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": tmp_path / name}
    assert train.main(as_arguments(overrides)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"trainer.resume_from_path={tmp_path / name}: not a checkpoint" in message


def test_a_checkpoint_that_cannot_be_read(
    overrides: Overrides, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run/global_step_1"
    shutil.copytree(model_path, checkpoint.model_directory(path))
    (path / "trainer.pt").write_bytes(b"not one")
    assert train.main(as_arguments(overrides)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"{path}/trainer.pt: it cannot be read" in message


def test_latest_is_by_number(tmp_path: Path) -> None:
    """10 comes after 9, and neither other files nor half-written checkpoints count."""
    for name in ("global_step_9", "global_step_10", "global_step_11.partial", "global_step_x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer.pt").touch()
    assert checkpoint.find_latest(tmp_path) == tmp_path / "global_step_10"
    assert checkpoint.find_latest(tmp_path / "nowhere") is None
