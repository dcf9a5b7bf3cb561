"""Logging of metrics to the terminal, metrics.jsonl, TensorBoard and the picture of the curves."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from entropy_rl.errors import UserError
from entropy_rl.logs import Logs
from training import read_metrics

LOGGERS = ("console", "file", "tensorboard")


def metrics(step: int) -> dict[str, float]:
    found = {"critic/rewards/mean": step / 10, "actor/entropy": 1.5, "actor/entropy_token_ratio": 0.2}
    return found | ({"val-core/sums/reward/mean@1": 0.5} if step % 2 == 0 else {})


def log(directory: Path, first: int, last: int, total: int = 6) -> None:
    logs = Logs(directory, LOGGERS, first - 1, total)
    for step in range(first, last + 1):
        logs.write(step, metrics(step))
    logs.close()


def test_the_terminal_shows_reward_selected_share_and_entropy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(tmp_path, 1, 6)
    captured = capsys.readouterr()
    assert (
        "step 4: val-core/sums/reward/mean@1:0.5 - critic/rewards/mean:0.4 - actor/entropy:1.5"
        in captured.out + captured.err
    )
    assert "6/6" in captured.err and "reward=0.600, selected=0.200, entropy=1.500" in captured.err


def test_a_resumed_run_takes_back_what_was_logged_after_its_checkpoint(tmp_path: Path) -> None:
    log(tmp_path, 1, 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "da')  # cut short by a kill
    log(tmp_path, 4, 6)
    assert read_metrics(tmp_path) == [{"step": step, "data": metrics(step)} for step in range(1, 7)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rewards = events.Scalars("critic/rewards/mean")
    assert [event.step for event in rewards] == [1, 2, 3, 4, 5, 6]
    assert rewards[5].value == pytest.approx(0.6)


def test_curves_are_drawn(tmp_path: Path) -> None:
    log(tmp_path, 1, 6)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_steps_has_empty_curves(tmp_path: Path) -> None:
    log(tmp_path, 1, 0)
    assert (tmp_path / "curves.png").is_file()


def test_metrics_are_json(tmp_path: Path) -> None:
    """NaN and infinity are null, in a resumed run too, and the curves have a gap there."""

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for step in (1, 2):
        logs = Logs(tmp_path, ["file"], step - 1, 2)
        logs.write(step, {"actor/entropy": float("nan"), "actor/grad_norm": float("-inf"), "actor/pg_clipfrac": 0.5})
        logs.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    data = {"actor/entropy": None, "actor/grad_norm": None, "actor/pg_clipfrac": 0.5}
    assert [json.loads(line, parse_constant=no_constant) for line in lines] == [
        {"step": step, "data": data} for step in (1, 2)
    ]


@pytest.mark.parametrize(
    "line",
    [b"\0" * 40, b'{"step": 2, "da\0\0": 3}', b"{}", b"[1]", b'{"step": null, "data": {}}', b'{"step": 2}', b"\xff"],
    ids=repr,
)
def test_a_damaged_line_is_named(line: bytes, tmp_path: Path) -> None:
    log(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + second)
    with pytest.raises(UserError) as error:
        Logs(tmp_path, ["file"], 2, 4)
    message = str(error.value)
    assert message.startswith(f"{path}: line 2 is damaged (") and "\n" not in message and "remove the line" in message


def test_names_of_data_sources_are_not_mathematics(tmp_path: Path) -> None:
    logs = Logs(tmp_path, ["file"], 0, 1)
    logs.write(1, {"val-core/a$b_{$/reward/mean@1": 0.5, "val-core/$\\frac$/reward/mean@1": 0.5})
    logs.close()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
