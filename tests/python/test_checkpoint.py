"""Checkpoints: a resumed run is the uninterrupted one, bit for bit, and no kill damages a complete checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from entropy_rl import checkpoint, train
from training import ACTOR, as_arguments, read_metrics, without_times

Overrides = dict[str, Any]

# Runs the trainer. It creates a marker file and hangs in the middle of the checkpoint of step 4.
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
    """Five steps with all options that have a state or a schedule. Saves after steps 2, 4 and 5."""
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
    if not isinstance(a, list | tuple):  # betas are a tuple at first, and a list once they were loaded
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
    """From the checkpoint of step 2. metrics.jsonl still has what the first run logged later."""
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
    """SIGKILL while step 4 is saved, or while the older checkpoint is removed.

    The last complete checkpoint remains, and the run that resumes from it equals the uninterrupted one.
    """
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


def test_disable_starts_a_new_run(long_run: Overrides, uninterrupted: Path) -> None:
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
    """10 comes after 9. Files and directories of other programs and half-written checkpoints do not count."""
    for name in ("global_step_9", "global_step_10", "global_step_11.partial", "global_step_x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer.pt").touch()
    (tmp_path / "global_step_12/actor").mkdir(parents=True)
    (tmp_path / "global_step_13").touch()
    assert checkpoint.find_latest(tmp_path) == tmp_path / "global_step_10"
    assert checkpoint.find_latest(tmp_path / "nowhere") is None


# ---- Several runs in one directory


def steps_in(directory: Path) -> list[str]:
    return sorted(path.name.removeprefix("global_step_") for path in directory.glob("global_step_*"))


def test_a_run_keeps_what_another_run_wrote(
    overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An older run leaves checkpoint 3. A new run of two steps keeps one checkpoint, its own."""
    directory = tmp_path / "run"
    overrides |= {"trainer.save_freq": 1, "trainer.resume_mode": "disable"}
    assert train.main(as_arguments(overrides | {"trainer.total_training_steps": 3})) == 0
    for step in ("1", "2"):
        shutil.rmtree(directory / f"global_step_{step}")
    old = (directory / "global_step_3/checkpoint.json").read_text()
    capsys.readouterr()
    changes = {"trainer.total_training_steps": 2, "trainer.max_actor_ckpt_to_keep": 1}
    assert train.main(as_arguments(overrides | changes)) == 0
    assert "has checkpoints of an earlier run: global_step_3; this run replaces" in capsys.readouterr().out
    assert steps_in(directory) == ["2", "3"]
    assert (directory / "global_step_3/checkpoint.json").read_text() == old

    # auto resumes the last run, and names the checkpoint that it leaves out.
    overrides |= {"trainer.resume_mode": "auto", "trainer.total_training_steps": 3}
    assert checkpoint.find_latest(directory) == directory / "global_step_2"
    assert train.main(as_arguments(overrides)) == 0
    shown = capsys.readouterr().out
    assert f"resuming from {directory / 'global_step_2'}" in shown
    assert f"global_step_3 of {directory}: not resumed, because an earlier run or branch wrote them" in shown
    assert [line["step"] for line in read_metrics(directory)] == [1, 2, 3]


def test_a_branch_keeps_what_the_other_branch_wrote(long_run: Overrides, uninterrupted: Path) -> None:
    """A branch from step 2 of a run with checkpoints 2, 4 and 5, to step 4, that keeps one checkpoint.

    It replaces checkpoint 4, removes 2, from which it resumed, and leaves 5.
    """
    long_run |= {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": uninterrupted / "global_step_2"}
    long_run |= {"trainer.default_local_dir": uninterrupted, "trainer.max_actor_ckpt_to_keep": 1}
    assert train.main(as_arguments(long_run | {"trainer.total_training_steps": 4})) == 0
    assert steps_in(uninterrupted) == ["4", "5"]


def test_a_run_that_saved_nothing_is_not_resumed_without_a_word(
    overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(as_arguments(overrides | {"trainer.save_freq": 1})) == 0
    changes = {"trainer.total_training_steps": 2, "trainer.resume_mode": "disable"}
    assert train.main(as_arguments(overrides | changes)) == 0
    for expected in (True, False):
        capsys.readouterr()
        assert train.main(as_arguments(overrides | {"trainer.total_training_steps": 2})) == 0
        shown = capsys.readouterr().out
        # The second time, the last run did resume from this checkpoint.
        message = f"an earlier run wrote it; the last run in {tmp_path / 'run'} has saved no checkpoint"
        assert (message in shown) is expected


def test_directories_of_other_programs_are_left_alone(
    overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "run/global_step_7/actor/model.pt"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"verl's")
    (tmp_path / "run/global_step_8.partial.bak").mkdir()
    overrides |= {"trainer.save_freq": 1, "trainer.max_actor_ckpt_to_keep": 1}
    assert train.main(as_arguments(overrides)) == 0
    assert steps_in(tmp_path / "run") == ["1", "7", "8.partial.bak"] and other.read_bytes() == b"verl's"
    capsys.readouterr()
    assert train.main(as_arguments(overrides | {"trainer.total_training_steps": 7})) == 2
    message = capsys.readouterr().err
    assert "global_step_7 there is not a checkpoint of this trainer" in message and message.count("\n") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1]


def test_a_second_run_in_a_directory_is_refused(
    overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    program = (
        f"import fcntl; f = open({str(directory / 'run.lock')!r}, 'a')\n"
        "fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline()
    (directory / "run.lock").write_text('{"process": 12, "host": "node-3"}\n')
    assert train.main(as_arguments(overrides)) == 2
    message = capsys.readouterr().err
    assert f"trainer.default_local_dir={directory}: another run writes there (process 12 on node-3)" in message
    assert message.count("\n") == 1 and not (directory / "metrics.jsonl").exists()
    holder.communicate(b"\n")
    assert train.main(as_arguments(overrides)) == 0
    assert train.main(as_arguments(overrides)) == 0, "a lock ends with its run"


# ---- Damaged checkpoints


@pytest.fixture
def saved(overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert train.main(as_arguments(overrides | {"trainer.save_freq": 1})) == 0
    capsys.readouterr()
    return tmp_path / "run/global_step_1"


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


WEIGHTS = "actor/huggingface/model.safetensors"
DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated weights": (
        WEIGHTS,
        lambda path: os.truncate(path, 1000),
        "the file is damaged: it has 1000 bytes and was",
    ),
    "a bit of the weights": (WEIGHTS, flip_a_bit, "the file is damaged: its checksum is not that of checkpoint.json"),
    "missing weights": (WEIGHTS, Path.unlink, "the file is missing"),
    "missing configuration": ("actor/huggingface/config.json", Path.unlink, "the file is missing"),
    "missing optimizer": ("trainer.pt", Path.unlink, "the file is missing"),
    "a bit of the optimizer": ("trainer.pt", flip_a_bit, "the file is damaged: its checksum"),
    "no JSON": ("checkpoint.json", lambda path: path.write_bytes(b"\0" * 9), "it is damaged: "),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_named(
    what: str, overrides: Overrides, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, damage, expected = DAMAGE[what]
    damage(saved / name)
    assert train.main(as_arguments(overrides | {"trainer.total_training_steps": 2})) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {saved / name}: {expected}") and message.count("\n") == 1
    assert message.endswith(f"remove {saved} or set trainer.resume_from_path\n")


def without_manifest(checkpoint_directory: Path) -> None:
    (checkpoint_directory / "checkpoint.json").unlink()


def test_a_checkpoint_of_an_earlier_version_resumes(
    long_run: Overrides, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no checkpoint.json; the newest has the highest step."""
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    shutil.rmtree(directory / "global_step_5")
    for path in directory.glob("global_step_*"):
        without_manifest(path)
    (directory / "run.lock").unlink()
    capsys.readouterr()
    long_run |= {"trainer.default_local_dir": directory, "trainer.max_actor_ckpt_to_keep": 1}
    assert train.main(as_arguments(long_run)) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "global_step" in line] == [
        f"resuming from {directory / 'global_step_4'}"
    ]
    assert_same_run(directory, uninterrupted)
    assert steps_in(directory) == ["2", "4", "5"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"random": []}, "it has no optimizer state; "),
        ({}, "it has no optimizer and no random state; "),
        ([1], "it has no optimizer and no random state; "),
        ({"optimizer": {}, "random": []}, "its optimizer state does not fit the model: "),
        ({"optimizer": {"state": {}, "param_groups": [{"params": ["x"]}]}, "random": []}, "does not fit the model: "),
    ],
)
def test_a_state_that_lacks_a_part(
    content: Any, expected: str, overrides: Overrides, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_manifest(saved)
    torch.save(content, saved / "trainer.pt")
    assert train.main(as_arguments(overrides | {"trainer.total_training_steps": 2})) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {saved / 'trainer.pt'}: ") and message.count("\n") == 1
    assert expected in message


def test_weights_of_an_earlier_version_that_are_damaged(
    overrides: Overrides, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the checkpoint, not the model that the run began with."""
    without_manifest(saved)
    os.truncate(saved / WEIGHTS, 1000)
    assert train.main(as_arguments(overrides | {"trainer.total_training_steps": 2})) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {saved / 'actor/huggingface'}: no Hugging Face causal language model")


def test_a_checkpoint_of_another_model(
    overrides: Overrides, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(overrides["actor_rollout_ref.model.path"], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 65}))
    assert train.main(as_arguments(overrides | {"actor_rollout_ref.model.path": other})) == 2
    message = capsys.readouterr().err
    assert f"actor_rollout_ref.model.path={other}: {saved} is a checkpoint of another model: its" in message
    assert "its intermediate_size is 64, and 65 here" in message and message.count("\n") == 1


# ---- What saving needs


def test_a_model_that_cannot_be_saved_stops_the_run_at_its_start(
    overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its generation configuration has a temperature without do_sample, which transformers refuses to write."""
    path = tmp_path / "model"
    shutil.copytree(overrides["actor_rollout_ref.model.path"], path)
    generation = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(generation | {"temperature": 0.6}))
    overrides |= {"actor_rollout_ref.model.path": path}
    assert train.main(as_arguments(overrides | {"trainer.save_freq": 1})) == 2
    message = capsys.readouterr().err
    assert "cannot be saved as it is configured: GenerationConfig is invalid" in message and "temperature" in message
    assert f"actor_rollout_ref.model.path={path}: " in message and message.count("\n") == 1
    assert not any((tmp_path / "run").glob("global_step_*")) and not (tmp_path / "run/metrics.jsonl").exists()
    assert train.main(as_arguments(overrides)) == 0, "a run that saves nothing needs nothing for it"


def test_too_little_space_stops_the_run_at_its_start(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert train.main(as_arguments(overrides | {"trainer.save_freq": 1})) == 2
    assert f"trainer.default_local_dir={tmp_path / 'run'}: a checkpoint needs 0.0 GB" in capsys.readouterr().err
