"""Problems and their scorers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from entropy_rl import tasks, train
from entropy_rl.config import load
from training import as_arguments

Overrides = dict[str, Any]
ROW = {
    "data_source": "sums",
    "prompt": [{"role": "user", "content": "1 + 1 ="}],
    "reward_model": {"style": "rule", "ground_truth": "2"},
}


def load_tasks(overrides: Overrides) -> Any:
    return tasks.load_tasks(load(as_arguments(overrides)))


def error_of(overrides: Overrides, capsys: pytest.CaptureFixture[str]) -> str:
    assert train.main(as_arguments(overrides)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    ("answer", "truth", "reward"),
    [
        ("The sum is 3/4.", "\\frac{3}{4}", 1.0),
        ("so \\boxed{0.75}", "3/4", 1.0),
        ("x = 12", "12", 1.0),
        ("The answer is 13.", "12", 0.0),
        ("I do not know", "12", 0.0),
        ("", "12", 0.0),
        ("\\boxed{(1, 2)}", "(1,2)", 1.0),
        ("\\boxed{", "12", 0.0),
    ],
)
def test_math_verify_scores(answer: str, truth: str, reward: float) -> None:
    assert tasks.score_math("sums", answer, truth, {}) == reward


def test_parquet(overrides: Overrides, problems_path: Path) -> None:
    del overrides["reward.custom_reward_function.path"]
    train_problems, validation, scorer = load_tasks(
        overrides | {"data.train_files": f"[{problems_path},{problems_path}]", "data.train_max_samples": 20}
    )
    assert len(train_problems) == 20 and validation == []
    assert train_problems[3] == tasks.Problem([{"role": "user", "content": "3 + 9 ="}], "sums", "12", {"index": 3})
    assert scorer("sums", "12", "12", {}) == 1.0


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"question": "1 + 1"}], "no column prompt, data_source, reward_model"),
        ([{"data_source": "sums", "prompt": ROW["prompt"]}], "no column reward_model; columns prompt, data_source"),
        ([ROW | {"prompt": "1 + 1 ="}], "row 0: column prompt must hold a list of {role, content}"),
        ([ROW | {"prompt": [{"text": "1"}]}], "row 0: column prompt must hold a list of {role, content}"),
        ([ROW | {"prompt": [{"role": "user", "content": None}]}], "prompt must hold a list of {role, content}, both"),
        ([ROW, ROW | {"reward_model": {"style": "rule"}}], "row 1: column reward_model must hold {ground_truth"),
    ],
)
def test_a_wrong_column(
    rows: list[dict[str, Any]],
    expected: str,
    overrides: Overrides,
    tmp_path: Path,
    write_parquet: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_parquet(tmp_path / "wrong.parquet", rows)
    message = error_of(overrides | {"data.train_files": path}, capsys)
    assert f"data.train_files={path}" in message and expected in message


def test_a_wrong_file(overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "problems.json"
    text.write_text("[]")
    for path, expected in ((text, "not a Parquet file"), (tmp_path / "missing.parquet", "there is no such file")):
        for key in ("data.train_files", "data.val_files"):
            message = error_of(overrides | {key: path}, capsys)
            assert f"{key}={path}" in message and expected in message and "verl's format was expected" in message


def test_reasoning_gym_trains(overrides: Overrides, tmp_path: Path) -> None:
    """A task by its name, with settings of its own, scored by its own scorer."""
    for key in ("data.train_files", "reward.custom_reward_function.path"):
        del overrides[key]
    overrides |= {
        "data.reasoning_gym.name": "chain_sum",
        "data.reasoning_gym.size": 8,
        "data.reasoning_gym.val_size": 4,
        "data.reasoning_gym.system_prompt": "direct",
        "+data.reasoning_gym.config.max_terms": 2,
    }
    problems, validation, scorer = load_tasks(overrides)
    assert (len(problems), len(validation)) == (8, 4)
    problem = problems[0]
    assert [message["role"] for message in problem.messages] == ["system", "user"]
    assert problem.extra_info["entry"]["metadata"]["num_terms"] == 2
    right, wrong = f"<answer>{problem.ground_truth}</answer>", f"<answer>{problem.ground_truth}1</answer>"
    assert scorer("", right, problem.ground_truth, problem.extra_info) == 1.0
    assert scorer("", wrong, problem.ground_truth, problem.extra_info) < 1.0
    assert scorer("", problem.ground_truth, problem.ground_truth, problem.extra_info) < 1.0

    assert train.main(as_arguments(overrides)) == 0
    assert "val-core/reasoning_gym/chain_sum/reward/mean@1" in (tmp_path / "run/metrics.jsonl").read_text()


def test_reasoning_gym_without_a_system_prompt_scores_the_bare_answer(overrides: Overrides) -> None:
    for key in ("data.train_files", "reward.custom_reward_function.path"):
        del overrides[key]
    overrides |= {"data.reasoning_gym.name": "chain_sum", "data.reasoning_gym.system_prompt": "null"}
    overrides |= {"data.reasoning_gym.size": 2, "data.reasoning_gym.val_size": 0}
    problems, validation, scorer = load_tasks(overrides)
    assert validation == [] and len(problems[0].messages) == 1
    assert scorer("", f" {problems[0].ground_truth}\n", "", problems[0].extra_info) == 1.0


def test_a_wrong_reasoning_gym_task(overrides: Overrides, capsys: pytest.CaptureFixture[str]) -> None:
    del overrides["data.train_files"]
    message = error_of(overrides | {"data.reasoning_gym.name": "chain_sums"}, capsys)
    assert "data.reasoning_gym.name=chain_sums" in message and "nearest: chain_sum" in message
    overrides["data.reasoning_gym.name"] = "chain_sum"
    for setting, value in (("terms", 2), ("min_terms", -1)):
        message = error_of(overrides | {f"+data.reasoning_gym.config.{setting}": value}, capsys)
        assert f"data.reasoning_gym.config={{'{setting}': {value}}}: chain_sum refuses it" in message


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, "there is no such file; a Python file was expected"),
        ("import nothing_of_this_name", "cannot be imported: ModuleNotFoundError"),
        ("def other(): pass", "has no function of this name"),
    ],
)
def test_a_wrong_reward_function(
    source: str | None, expected: str, overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "reward.py"
    if source is not None:
        path.write_text(source)
    message = error_of(overrides | {"reward.custom_reward_function.path": path}, capsys)
    assert "reward.custom_reward_function." in message and expected in message
