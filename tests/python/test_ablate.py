"""`entropy-rl ablate` on a tiny model. Most tests run the trainer in this process, to save its start."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from entropy_rl import ablate, cli, config, train
from training import ACTOR, as_arguments

Overrides = dict[str, Any]
Ablate = Callable[..., int]


@pytest.fixture
def task(overrides: Overrides, problems_path: Path) -> Overrides:
    """Two steps, with a checkpoint and four validation problems after each."""
    del overrides["trainer.default_local_dir"]
    return overrides | {
        "data.val_files": problems_path,
        "data.val_max_samples": 4,
        "trainer.total_training_steps": 2,
        "trainer.save_freq": 1,
        "trainer.test_freq": 1,
    }


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of the runs, which run in this process."""
    commands: list[list[str]] = []

    def run_here(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command[3:])
        return SimpleNamespace(returncode=train.main(command[3:]))

    monkeypatch.setattr(subprocess, "run", run_here)
    return commands


def command(output: Path, task: Overrides, *options: str) -> list[str]:
    return ["ablate", f"--output={output}", *options, *as_arguments(task)]


def results_of(output: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (output / "results").iterdir()}


def test_every_arm_with_every_seed_once(
    task: Overrides, tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ablation"
    assert cli.main(command(output, task, "--seeds=2")) == 0
    results = results_of(output)
    assert results.keys() == {f"seed_{seed}.{arm}" for seed in (0, 1) for arm in cli.DEFAULT_ARMS}
    # At most 32 response tokens in a micro-batch, and the share is rounded up.
    shares = {"all": 1, "top_50": 0.5, "top_20": 0.2, "top_10": 0.1, "bottom_80": 0.8, "random_20": 0.2}
    for arm, share in shares.items():
        for seed in (0, 1):
            assert results[f"seed_{seed}.{arm}"]["entropy_token_ratio"] == pytest.approx([share] * 2, abs=1 / 8)
            assert [step for step, _ in results[f"seed_{seed}.{arm}"]["validation_reward"]] == [0, 1, 2]
    first = [results[f"seed_0.{arm}"]["training_reward"][0] for arm in shares]
    assert results["seed_0.top_20"]["entropy"] != results["seed_0.random_20"]["entropy"]
    assert len(set(first)) == 1, "the runs of a seed begin from the same model, problems and samples"
    assert first[0] != results["seed_1.all"]["training_reward"][0]

    shown = capsys.readouterr().out
    table = (output / "table.md").read_text()
    assert table in shown and table.count("\n") == 8
    assert all(f"| {title} |" in table for title in ("all tokens", "top 20 %", "bottom 80 %"))
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")

    assert len(started) == 12
    assert cli.main(command(output, task, "--seeds=2")) == 0
    assert len(started) == 12, "a finished run is not run again"
    assert cli.main(command(output, task, "--seeds=3", "--arms=top_20")) == 0
    assert len(started) == 13, "only the new seed"


def test_the_arms_of_published_methods(task: Overrides, tmp_path: Path, started: list[list[str]]) -> None:
    """They run, and have the settings that docs/methods.md lists."""
    assert cli.main(command(tmp_path, task, "--seeds=1", "--arms=archer,stapo")) == 0
    results = results_of(tmp_path)
    assert results.keys() == {"seed_0.archer", "seed_0.stapo"}
    assert results["seed_0.stapo"]["entropy_token_ratio"] == [1.0, 1.0]
    assert results["seed_0.archer"]["entropy_token_ratio"] == pytest.approx([0.2] * 2, abs=1 / 8)
    page = (Path(__file__).parents[2] / "docs/methods.md").read_text()
    block = page.split("### Dual-token constraints")[1].split("```")[1]
    documented = {line.strip(" \\") for line in block.splitlines() if f"{ACTOR}." in line}
    assert len(documented) == 11 and documented <= set(started[0])


def test_an_arm_of_the_users_own(
    task: Overrides, tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs beside the others, and its name stands for its settings from then on."""
    rest = f"{ACTOR}.entropy_top_ratio=0.2 {ACTOR}.entropy_rest.weight=0.1"
    options = ("--seeds=1", "--arms=top_20")
    assert cli.main(command(tmp_path, task, *options, f"--arm=mine={rest}")) == 0
    assert results_of(tmp_path).keys() == {"seed_0.top_20", "seed_0.mine"}
    assert set(rest.split()) <= set(started[1]) and not set(rest.split()) <= set(started[0])
    table = (tmp_path / "table.md").read_text()
    assert table.index("| top 20 % |") < table.index("| mine |")
    assert results_of(tmp_path)["seed_0.mine"]["entropy"] != results_of(tmp_path)["seed_0.top_20"]["entropy"]
    capsys.readouterr()
    assert cli.main(command(tmp_path, task, *options, f"--arm=mine={ACTOR}.entropy_top_ratio=0.3")) == 2
    message = capsys.readouterr().err
    assert f"the runs of the arm mine there have {rest}, and this command has " in message
    assert len(started) == 2


def test_results_of_runs_without_the_settings_of_their_arm(
    task: Overrides, tmp_path: Path, started: list[list[str]]
) -> None:
    """A directory that an older version made is continued."""
    options = ("--seeds=1", "--arms=top_20")
    assert cli.main(command(tmp_path, task, *options)) == 0
    (tmp_path / "seed_0/top_20/arm.json").unlink()
    assert cli.main(command(tmp_path, task, *options)) == 0
    assert len(started) == 1


def test_an_interrupted_run_resumes_from_its_checkpoint(
    task: Overrides, tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--seeds=1", "--arms=top_20")
    assert cli.main(command(tmp_path / "uncut", task, *options)) == 0

    update, steps = train.update, []

    def dies_in_the_second(*arguments: Any) -> dict[str, float]:
        steps.append(arguments[3])
        if steps == [1, 2]:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(train, "update", dies_in_the_second)
    cut = tmp_path / "cut"
    assert cli.main(command(cut, task, *options)) == 130
    assert not results_of(cut)
    assert cli.main(command(cut, task, *options)) == 0
    assert steps == [1, 2, 2], "the first step is not run again"
    measured = ("training_reward", "validation_reward", "entropy")
    uncut, resumed = (results_of(tmp_path / name)["seed_0.top_20"] for name in ("uncut", "cut"))
    assert [uncut[name] for name in measured] == [resumed[name] for name in measured]


def test_an_error_of_a_run_is_its_last_line(
    task: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a separate process, as for a user."""
    task["data.max_prompt_length"] = 3
    assert cli.main(command(tmp_path / "ablation", task, "--seeds=1", "--arms=all")) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: seed 0, all tokens: error: ") and "a prompt has 7 tokens" in message
    assert "log.txt" in message and not results_of(tmp_path / "ablation")


def test_runs_with_other_settings_are_not_mixed(
    task: Overrides, tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(tmp_path, task, "--seeds=1", "--arms=all")) == 0
    assert cli.main(command(tmp_path, task | {f"{ACTOR}.optim.lr": 1e-4}, "--seeds=1", "--arms=all")) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the runs there have overrides" in message and "another directory" in message
    assert len(started) == 1


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({"data.val_files": "null"}, (), "data.val_files=null: the runs are compared on validation problems"),
        ({f"{ACTOR}.entropy_top_ratoi": 0.2}, (), "there is no key"),
        ({"actor_rollout_ref.model.path": "nowhere"}, (), "nowhere"),
        ({"data.train_files": "nowhere.parquet"}, (), "data.train_files=nowhere.parquet: there is no such file"),
        ({"reward.custom_reward_function.path": "nowhere.py"}, (), "nowhere.py: there is no such file"),
        ({f"{ACTOR}.entropy_top_normalize": "all"}, (), "one of selected, response"),
        ({}, ("--output=/proc/ablation",), "--output /proc/ablation: it cannot be created"),
        ({}, ("--arms=all,top_30",), "top_30: the arms are all, top_50, top_20, top_10, bottom_80, random_20"),
        ({}, ("--arm=mine",), "mine: it must be NAME='KEY=VALUE ...'"),
        ({}, ("--arm=top_20=a=b",), "top_20=a=b: it must be NAME='KEY=VALUE ...'"),
        ({}, ("--arm=a/b=c=d",), "a/b=c=d: it must be NAME='KEY=VALUE ...'"),
        ({}, ("--arm=mine=a='b",), "mine=a='b: No closing quotation"),
        (
            {},
            (f"--arm=mine={ACTOR}.entropy_rest.weight=-1",),
            "entropy_rest.weight=-1: it must be a number of at least",
        ),
        ({}, ("--seeds=0",), "0: it must be an integer of at least 1"),
    ],
)
def test_errors_before_anything_starts(
    changes: Overrides,
    options: tuple[str, ...],
    expected: str,
    task: Overrides,
    tmp_path: Path,
    started: list[list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(command(tmp_path / "ablation", task | changes, *options)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and expected in message
    assert not started


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
def test_a_directory_of_something_else(
    content: str, task: Overrides, tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.json").write_text(content)
    assert cli.main(command(tmp_path, task)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "settings.json there is not a file of this command" in message
    assert not started


def test_the_demos_arms_differ_in_the_selection_alone(tmp_path: Path) -> None:
    arguments = cli._parser().parse_args(["ablate", f"--output={tmp_path}", "--steps=40"])
    arms = [OmegaConf.to_container(config.load(ablate.plan(arguments, 1, arm).overrides)) for arm in cli.ARMS]
    selections = []
    for settings in arms:
        actor, trainer = settings["actor_rollout_ref"]["actor"], settings["trainer"]
        selections.append([actor.pop(f"entropy_top_{key}") for key in ("ratio", "complement", "score", "scope")])
        del trainer["default_local_dir"]
    *same, archer, stapo = (settings["actor_rollout_ref"]["actor"] for settings in arms)
    assert stapo | {"entropy_veto": same[0]["entropy_veto"]} == same[0] != stapo
    of_archer = ("entropy_top_rule", "entropy_rest", "clip_ratio_low", "clip_ratio_high", "use_kl_loss", "kl_loss_coef")
    assert archer | {key: same[0][key] for key in of_archer} == same[0] != archer
    assert selections == [
        [None, False, "entropy", "micro_batch"],
        [0.5, False, "entropy", "micro_batch"],
        [0.2, False, "entropy", "micro_batch"],
        [0.1, False, "entropy", "micro_batch"],
        [0.2, True, "entropy", "micro_batch"],
        [0.2, False, "random", "micro_batch"],
        [0.5, False, "random", "micro_batch"],
        [0.2, False, "entropy", "sequence"],
        [0.2, False, "entropy", "sequence"],
        [1.0, False, "entropy", "micro_batch"],
    ]
    assert all(settings == arms[0] for settings in arms[:-2])
    assert trainer["total_training_steps"] == 40 and trainer["save_freq"] == 10


def test_interval_is_students() -> None:
    """With 2 degrees of freedom, t at 97.5 % is 4.303 (from a printed table)."""
    mean, half = ablate.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert ablate.interval([1.0]) == (1.0, pytest.approx(float("nan"), nan_ok=True))


def test_differences_are_taken_seed_by_seed() -> None:
    """The seeds differ a lot, but the arm is better by one tenth in each: the difference is certain."""
    results = [
        {
            "arm": arm,
            "seed": seed,
            "validation_reward": [[0, 0.0], [1, 0.3 * seed + 0.1 * (arm == "top_20")]],
            "entropy": [1.0],
            "entropy_token_ratio": [1.0],
        }
        for arm in ("all", "top_20")
        for seed in range(3)
    ]
    assert "| +0.100 ± 0.000 |" in ablate.table(results)


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        ("ablation", dict.fromkeys((*cli.DEFAULT_ARMS, "random_50"), 5)),
        (
            "ablation_llm",
            dict.fromkeys(("all", "top_20", "bottom_80", "random_20", "archer", "attenuation"), 3) | {"stapo": 1},
        ),
    ],
)
def test_the_page_has_what_the_committed_results_give(name: str, seeds: dict[str, int], tmp_path: Path) -> None:
    """Checks a table and a plot of docs/ablation.md, and that every run of the comparison is there."""
    root = Path(__file__).parents[2]
    directory = root / "benchmarks/results" / name
    results = [json.loads(path.read_text()) for path in sorted((directory / "results").iterdir())]
    assert {(r["arm"], r["seed"]) for r in results} == {
        (arm, seed) for arm, count in seeds.items() for seed in range(count)
    }
    table = ablate.table(results)
    assert table == (directory / "table.md").read_text()
    page = (root / "docs/ablation.md").read_text()
    assert page.count("| trained on |") == 2 and table in page
    steps = json.loads((directory / "settings.json").read_text())["steps"]
    assert f"for {steps} steps of GRPO" in page and all(len(r["training_reward"]) == steps for r in results)
    ablate.draw(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == (root / f"docs/images/{name}.png").read_bytes()
