"""The documented commands that start verl compose, as bash passes them to Python. test_main_ppo.py runs some."""

import os
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from verl.utils.config import omega_conf_to_dataclass

from documentation import ROOT, Command, commands_of

ACTOR = "actor_rollout_ref.actor"
# Replaces "...": verl requires the size of an actor's micro-batches.
OWN = [f"{ACTOR}.ppo_micro_batch_size_per_gpu=1"]


@pytest.mark.parametrize("command", commands_of("verl"), ids=Command.name)
def test_command(command: Command, tmp_path: Path) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    shown = subprocess.run(
        ["bash", "-c", command.text],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    program, overrides = shown.splitlines()[:2], shown.splitlines()[2:]
    assert program == ["-m", "verl.trainer.main_ppo"]
    given = [word for override in overrides for word in (OWN if override == "..." else [override])]
    with initialize_config_module("verl.trainer.config", version_base=None):
        actor = compose("ppo_trainer", overrides=given).actor_rollout_ref.actor
    assert omega_conf_to_dataclass(actor).entropy_top_ratio == 0.2
