"""Scoring: what an answer is worth, and that no answer ends or holds up a run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from reasoning_gym.utils import extract_answer

from entropy_rl import rewards, train
from entropy_rl.errors import UserError
from entropy_rl.rewards import CustomFunction, MathVerify, ReasoningGym, Scorer
from entropy_rl.tasks import Problem
from training import as_arguments

PROBLEM = Problem([], "sums", "12", {}, "data.train_files=sums.parquet: row 3")


def custom(tmp_path: Path, body: str) -> CustomFunction:
    path = tmp_path / "reward.py"
    path.write_text(
        f"import os, time\ndef compute_score(data_source, solution_str, ground_truth, extra_info):\n {body}\n"
    )
    return CustomFunction(str(path), "compute_score")


# ---- math-verify


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
        # Numbers are numbers, in every notation.
        *(("\\boxed{0.00001}", truth, 1.0) for truth in (1e-05, "1e-05", "1E-5", "1.0e-05", "0.00001", "10^{-5}")),
        *(("\\boxed{e-5}", truth, 0.0) for truth in (1e-05, "1e-05")),
        *((answer, 1e16, 1.0) for answer in ("\\boxed{10^{16}}", "\\boxed{1e16}", "It is 10000000000000000.")),
        ("\\boxed{1e-05}", 1e-05, 1.0),
        ("\\boxed{2e-7}", 1e-7, 0.0),
        ("\\boxed{0}", 1e-7, 0.0),
        ("\\boxed{0.5}", 0.5, 1.0),
        ("\\boxed{7}", 7, 1.0),
        ("\\boxed{7}", 7.0, 1.0),
        ("\\boxed{0.33}", "1/3", 0.0),
        # Plain text around a number.
        *(
            ("\\boxed{7}", truth, 1.0)
            for truth in ("7", "7.", "7,", "= 7", "=7.", "7 dollars", "7 square meters", "7°", "$7", "\\$7", "€7", "+7")
        ),
        *(("\\boxed{7}", truth, 1.0) for truth in ("$7$", "\\boxed{7}", "7\\text{ cm}", "7^\\circ", "x = 7")),
        *(("\\boxed{8}", truth, 0.0) for truth in ("7.", "7 dollars", "7°")),
        ("\\boxed{1234.5}", "1,234.5", 1.0),
        ("\\boxed{-7}", "-7 degrees", 1.0),
        *(("The answer is 50%.", truth, 1.0) for truth in ("50%", "50\\%", "50 %", "50% .")),
        ("\\boxed{50\\%}", "50%", 1.0),
        ("\\boxed{50\\%}", "50\\%", 1.0),
        ("The answer is 51%.", "50%", 0.0),
        # What only looks like a number with a unit.
        ("\\boxed{2\\pi}", "2 \\pi", 1.0),
        ("\\boxed{2}", "2 \\pi", 0.0),
        ("\\boxed{2}", "2 sqrt(3)", 0.0),
        ("\\boxed{1, 2}", "1,2", 1.0),
        ("\\boxed{1.2}", "1,2", 0.0),
        ("\\boxed{7 dollars}", "7 dollars", 1.0),
        ("\\boxed{\\text{Paris}}", "Paris.", 1.0),
    ],
)
def test_math_verify(answer: str, truth: Any, reward: float) -> None:
    assert MathVerify().load()("sums", answer, truth, {}) == reward


# ---- reasoning-gym


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12",
        "<answer>12</answer>",
        "<answer> \n12 </answer> and <answer>13</answer>",
        "<answer>1<answer>2</answer>3</answer>",
        "</answer><answer>5",
        "<answer>1</answer><answer>2",
        "<answer></answer>",
        "<answer>1</answer></answer>",
    ],
)
def test_extract_answer_is_reasoning_gyms(text: str) -> None:
    assert rewards.extract_answer(text) == extract_answer(text)


def test_extract_answer_takes_linear_time() -> None:
    begin = time.perf_counter()
    assert rewards.extract_answer("<answer>" * 1_000_000) is None
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize(
    ("task", "answer"),
    [("prime_factorization", "abc"), ("boxnet", "-1"), ("game_of_life", "{}"), ("coin_flip", "1e999")],
)
def test_an_answer_on_which_a_task_raises_gets_a_low_score(task: str, answer: str) -> None:
    source = ReasoningGym(task, 1, 0, {}, asks_for_tags=True)
    problem = Problem([], task, "", {"entry": source.dataset()[0]})
    right = f"<answer>{problem.extra_info['entry']['answer']}</answer>"
    for processes in (0, 1):
        scorer = Scorer(source, processes, 30.0)
        found = scorer([problem] * 2, [f"<answer>{answer}</answer>", right])
        assert found[0] == (0.0, "error") and found[1].fault is None
        assert found[1].reward > 0 or task == "boxnet"  # whose problems have no answer
        scorer.close()


# ---- Processes


def test_scores_come_in_order_from_parallel_processes(tmp_path: Path) -> None:
    source = custom(tmp_path, "return {'score': float(solution_str), 'process': os.getpid()}")
    scorer = Scorer(source, 3, 10.0)
    assert [score.reward for score in scorer([PROBLEM] * 100, [str(i) for i in range(100)])] == list(range(100))
    assert scorer([], []) == []
    scorer.close()


def test_an_answer_that_takes_too_long(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a single bytecode, as in a regular expression. The answers beside it get their scores."""
    source = custom(tmp_path, "return float(solution_str) if solution_str != 'x' else len(str(7 ** (7 ** 9)))")
    scorer = Scorer(source, 1, 0.5)
    begin = time.perf_counter()
    found = scorer([PROBLEM] * 5, ["1", "x", "2", "x", "3"])
    assert found == [(1.0, None), (0.0, "timeout"), (2.0, None), (0.0, "timeout"), (3.0, None)]
    assert time.perf_counter() - begin < 10
    shown = capfd.readouterr().err
    assert shown.count("reward.timeout=0.5: an answer took longer to score") == 1 and shown.count("\n") == 1
    assert "(data.train_files=sums.parquet: row 3, data source sums)" in shown
    scorer.close()


def test_what_a_function_prints_and_reads_does_not_reach_the_trainer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scorer = Scorer(custom(tmp_path, "print('hello'); return len(open(0).read())"), 1, 10.0)
    assert scorer([PROBLEM], ["1"]) == [(0.0, None)]
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err == "hello\n"
    scorer.close()


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return None", "it returned None; a finite number, or a dictionary with one as `score`, was expected"),
        ("return [1.0]", "it returned a list; a finite number"),
        ("return '1.0'", "it returned a str; a finite number"),
        ("return {'acc': 1.0}", "it returned a dictionary without `score`"),
        ("return {'score': None}", "it returned None;"),
        ("return float('nan')", "it returned nan;"),
        ("return {'score': float('-inf')}", "it returned -inf;"),
        ("return ground_truth['target']", "it raised TypeError in "),
        ("return 1 / 0", "reward.py:3: division by zero"),
    ],
)
def test_a_wrong_reward_function_is_named(processes: int, body: str, expected: str, tmp_path: Path) -> None:
    """With the function, the row and the data source, in one line."""
    scorer = Scorer(custom(tmp_path, body), processes, 10.0)
    with pytest.raises(UserError) as error:
        scorer([PROBLEM], ["1"])
    message = str(error.value)
    assert message.startswith("reward.custom_reward_function.name=compute_score: it ") and "\n" not in message
    assert expected in message
    assert message.endswith("; this was for data.train_files=sums.parquet: row 3, data source sums")
    scorer.close()


@pytest.mark.parametrize(
    "body", ["import numpy; return numpy.float32(0.5)", "import torch; return {'score': torch.tensor(0.5)}"]
)
def test_numbers_of_numpy_and_torch_are_rewards(body: str, tmp_path: Path) -> None:
    assert Scorer(custom(tmp_path, body))([PROBLEM], ["1"]) == [(0.5, None)]


def test_a_reward_function_that_ends_its_process(tmp_path: Path) -> None:
    scorer = Scorer(custom(tmp_path, "os._exit(9)"), 1, 10.0)
    with pytest.raises(UserError, match="the process that scores an answer ended with status 9; this was for data"):
        scorer([PROBLEM], ["1"])
    scorer.close()


def test_processes_end_with_their_scorer(tmp_path: Path) -> None:
    scorer = Scorer(custom(tmp_path, "return os.getpid()"), 1, 10.0)
    (score,) = scorer([PROBLEM], ["1"])
    os.kill(int(score.reward), 0)
    del scorer
    with pytest.raises(ProcessLookupError):
        os.kill(int(score.reward), 0)


def test_ctrl_c_does_not_wait_for_an_answer_that_takes_long(tmp_path: Path) -> None:
    custom(tmp_path, "open('started', 'w').close(); time.sleep(600)")
    program = (  # what a shell runs in the background ignores SIGINT, and so do its children
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from entropy_rl.rewards import CustomFunction, Scorer; from entropy_rl.tasks import Problem\n"
        "Scorer(CustomFunction('reward.py', 'compute_score'), 2, None)([Problem([], '', '')] * 40, [''] * 40)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.PIPE)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=300)
    assert shown.rstrip().endswith(b"KeyboardInterrupt")


def test_a_process_that_starts_while_the_scorer_closes_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its thread would wait for it, and the interpreter for the thread."""
    worker, started = rewards._Worker(custom(tmp_path, "time.sleep(600)"), None), []
    start = subprocess.Popen

    def close_meanwhile(*arguments: Any, **options: Any) -> Any:
        started.append(start(*arguments, **options))
        worker.close()
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", close_meanwhile)
    with pytest.raises(RuntimeError, match="the scorer is closed"):
        worker.score([("sums", "12", "12", {})])
    assert started[0].wait(10) == -signal.SIGKILL


# ---- In a run


def test_nan_rewards_stop_a_run(overrides: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = custom(tmp_path, "return float('nan')")
    overrides |= {"reward.custom_reward_function.path": source.path, "trainer.total_training_steps": 3}
    assert train.main(as_arguments(overrides)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: reward.custom_reward_function.name=compute_score: it returned nan; a finite")
    assert f"data.train_files={overrides['data.train_files']}: row " in message and "data source sums" in message
    assert message.count("\n") == 1


def test_the_share_of_timeouts_is_a_metric(run: Any, tmp_path: Path) -> None:
    source = custom(tmp_path, "time.sleep(60 * (solution_str[:1] < '@')); return 1.0")
    (line,) = run({"reward.custom_reward_function.path": source.path, "reward.timeout": 0.05})
    share = line["data"]["reward/timeout_ratio"]
    assert 0 < share < 1 and line["data"]["critic/rewards/mean"] == pytest.approx(1 - share)
    assert line["data"]["reward/error_ratio"] == 0
