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


def test_parquet(overrides: Overrides, problems_path: Path) -> None:
    del overrides["reward.custom_reward_function.path"]
    train_problems, validation, scorer = load_tasks(
        overrides | {"data.train_files": f"[{problems_path},{problems_path}]", "data.train_max_samples": 20}
    )
    assert len(train_problems) == 20 and validation == []
    assert train_problems[3] == tasks.Problem([{"role": "user", "content": "3 + 9 ="}], "sums", "12", {"index": 3})
    assert train_problems[3].where == f"data.train_files={problems_path}: row 3"
    assert scorer(train_problems[3:5], ["12", "12"]) == [(1.0, None), (0.0, None)]


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


@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        ("", "it is ''; a number or an expression was expected"),
        (" $. $", "it is ' $. $'; a number or an expression was expected"),
        ("nan", "it is 'nan'; a number or an expression was expected"),
        (float("nan"), "it is nan; a finite number was expected"),
        ({"target": ["2"]}, "it is a dict; a text or a number was expected"),
        (["2"], "it is a list; a text or a number was expected"),
        (b"2", "it is a bytes; a text or a number was expected"),
        (True, "it is a bool; a text or a number was expected"),
    ],
)
@pytest.mark.parametrize("key", ["data.train_files", "data.val_files"])
def test_a_ground_truth_that_no_answer_can_equal(
    key: str,
    truth: Any,
    expected: str,
    overrides: Overrides,
    tmp_path: Path,
    write_parquet: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stops the run at its start, unless a reward function of the user's reads it."""
    path = write_parquet(tmp_path / "truth.parquet", [ROW | {"reward_model": {"ground_truth": truth}}] * 2)
    load_tasks(overrides | {key: path})
    del overrides["reward.custom_reward_function.path"]
    message = error_of(overrides | {key: path}, capsys)
    assert f"{key}={path}: row 0: no answer can equal reward_model.ground_truth: {expected}" in message


def test_a_wrong_file(overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "problems.json"
    text.write_text("[]")
    mistakes = {text: "not a Parquet file", tmp_path / "no.parquet": "there is no such file", tmp_path: "a directory"}
    for path, expected in mistakes.items():
        for key in ("data.train_files", "data.val_files"):
            message = error_of(overrides | {key: path}, capsys)
            assert f"{key}={path}" in message and expected in message and "verl's format was expected" in message


def test_reasoning_gym_trains(overrides: Overrides, tmp_path: Path) -> None:
    """A task by its name, with its own settings and its own scorer."""
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
    first, second, third = scorer([problem] * 3, [right, wrong, problem.ground_truth])
    assert first == (1.0, None) and second.reward < 1.0 and third.reward < 1.0

    assert train.main(as_arguments(overrides)) == 0
    assert "val-core/reasoning_gym/chain_sum/reward/mean@1" in (tmp_path / "run/metrics.jsonl").read_text()


def test_reasoning_gym_without_a_system_prompt_scores_the_bare_answer(overrides: Overrides) -> None:
    for key in ("data.train_files", "reward.custom_reward_function.path"):
        del overrides[key]
    overrides |= {"data.reasoning_gym.name": "chain_sum", "data.reasoning_gym.system_prompt": "null"}
    overrides |= {"data.reasoning_gym.size": 2, "data.reasoning_gym.val_size": 0}
    problems, validation, scorer = load_tasks(overrides)
    assert validation == [] and len(problems[0].messages) == 1
    assert scorer(problems[:1], [f" {problems[0].ground_truth}\n"]) == [(1.0, None)]


SEVEN_TASKS = [
    "chain_sum",
    "basic_arithmetic",
    "gcd",
    "leg_counting",
    "prime_factorization",
    "spell_backward",
    "sudoku",
]


@pytest.mark.parametrize("task", SEVEN_TASKS)
@pytest.mark.parametrize("seed", [0, 2**31 + 5])
def test_no_validation_problem_is_a_training_problem(task: str, seed: int, overrides: Overrides) -> None:
    for key in ("data.train_files", "reward.custom_reward_function.path"):
        del overrides[key]
    overrides |= {"data.reasoning_gym.name": task, "data.reasoning_gym.seed": seed}
    overrides |= {"data.reasoning_gym.size": 300, "data.reasoning_gym.val_size": 50}
    problems, validation, _ = load_tasks(overrides)
    questions = [problem.messages[-1]["content"] for problem in validation]
    assert not {problem.messages[-1]["content"] for problem in problems} & set(questions)
    assert len(set(questions)) == len(questions) > 25
    # The validation problems do not depend on how many training problems there are.
    fewer = load_tasks(overrides | {"data.reasoning_gym.size": 20})[1]
    assert set(questions) <= {problem.messages[-1]["content"] for problem in fewer}


def test_validation_problems_that_repeat_others_are_counted(
    overrides: Overrides, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sums of two digits: 90 or so of the 100 are among 1,000 training problems."""
    for key in ("data.train_files", "reward.custom_reward_function.path"):
        del overrides[key]
    task = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "allow_negation": "false"}
    overrides |= {f"+data.reasoning_gym.config.{key}": value for key, value in task.items()}
    overrides |= {"data.reasoning_gym.name": "chain_sum", "data.reasoning_gym.val_size": 50}
    problems, validation, _ = load_tasks(overrides | {"data.reasoning_gym.size": 100})
    questions = {problem.messages[-1]["content"] for problem in problems}
    assert not questions & {problem.messages[-1]["content"] for problem in validation}
    assert f"{50 - len(validation)} validation problems repeat others" in capsys.readouterr().out
    assert 0 < len(validation) < 50
    message = error_of(overrides | {"data.reasoning_gym.size": 20_000}, capsys)
    assert "data.reasoning_gym.val_size=50: each validation problem is a training problem too" in message


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
        ("raise SystemExit(3)", "cannot be imported: SystemExit"),
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
