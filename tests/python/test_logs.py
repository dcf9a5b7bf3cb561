"""Logging of metrics to the terminal, metrics.jsonl, TensorBoard and the picture of the curves."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from entropy_rl.errors import UserError
from entropy_rl.logs import Histogram, Logs
from entropy_rl.report.rollouts import Rollout, read_rollouts
from training import read_metrics

LOGGERS = ("console", "file", "tensorboard")


def settings(*loggers: str) -> DictConfig:
    trainer = {"logger": list(loggers), "project_name": "sums", "experiment_name": "first"}
    return OmegaConf.create({"trainer": trainer, "data": {"seed": None}})


def metrics(step: int) -> dict[str, float]:
    found = {"critic/rewards/mean": step / 10, "actor/entropy": 1.5, "actor/entropy_token_ratio": 0.2}
    return found | ({"val-core/sums/reward/mean@1": 0.5} if step % 2 == 0 else {})


def log(directory: Path, first: int, last: int, total: int = 6) -> None:
    logs = Logs(directory, settings(*LOGGERS), first - 1, total)
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


def test_curves_have_whole_steps_on_the_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[float] = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *_, **__: ticks.extend(t for axes in self.axes for t in axes.get_xticks())
    )
    log(tmp_path, 1, 3)
    assert len(ticks) > 6 and all(tick == int(tick) for tick in ticks)


def test_a_run_without_steps_has_empty_curves(tmp_path: Path) -> None:
    log(tmp_path, 1, 0)
    assert (tmp_path / "curves.png").is_file()


def test_metrics_are_json(tmp_path: Path) -> None:
    """NaN and infinity are null, in a resumed run too, and the curves have a gap there."""

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for step in (1, 2):
        logs = Logs(tmp_path, settings("file"), step - 1, 2)
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
        Logs(tmp_path, settings("file"), 2, 4)
    message = str(error.value)
    assert message.startswith(f"{path}: line 2 is damaged (") and "\n" not in message and "remove the line" in message


def test_names_of_data_sources_are_not_mathematics(tmp_path: Path) -> None:
    logs = Logs(tmp_path, settings("file"), 0, 1)
    logs.write(1, {"val-core/a$b_{$/reward/mean@1": 0.5, "val-core/$\\frac$/reward/mean@1": 0.5})
    logs.close()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_configuration_is_saved(tmp_path: Path) -> None:
    config = settings("console")
    Logs(tmp_path, config, 0, 1).close()
    assert OmegaConf.load(tmp_path / "config.yaml") == config


PROMPT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1 =<|im_end|>\n<|im_start|>assistant\n"


def test_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the terminal the question, the reward and the response, shortened; in the file everything."""
    logs = Logs(tmp_path, settings("console", "file"), 0, 30)
    long = "x" * 5000
    rollouts = [Rollout(PROMPT, "so\n 3", 0.0, 20, ["so", "\n", " 3"]), Rollout(PROMPT, long, 1.0, 20, [long])]
    logs.samples(20, rollouts)
    logs.close()
    shown = capsys.readouterr().out
    assert "step 20, a response with reward 0 to: 1 + 1 =\n    so\n     3\n" in shown
    assert "reward 1" in shown and "(3800 more characters)" in shown and "Be brief" not in shown
    assert read_rollouts(tmp_path / "samples") == rollouts


def test_samples_are_written_where_metrics_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = Logs(tmp_path, settings("tensorboard"), 0, 1)
    logs.samples(1, [Rollout(PROMPT, " 2", 1.0, 1, [" 2"])])
    logs.close()
    assert not (tmp_path / "samples").exists() and capsys.readouterr().out == ""


def test_histograms_go_to_tensorboard(tmp_path: Path) -> None:
    values = Histogram(end=2.0, counts=[3.0, 1.0], total=2.5, squares=2.25)
    for loggers in (("tensorboard",), ("file",)):
        logs = Logs(tmp_path, settings(*loggers), 0, 1)
        logs.histogram(1, "actor/entropy", values)
        logs.close()
    (event,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Histograms("actor/entropy")
    found = event.histogram_value
    assert (event.step, found.min, found.max, found.num, found.sum, found.sum_squares) == (1, 0, 2, 4, 2.5, 2.25)
    assert (found.bucket_limit, found.bucket) == ([1, 2], [3, 1])


def test_a_warning_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = Logs(tmp_path, settings("file"), 0, 3)
    for step in (1, 2):
        logs.warn("gradient", f"step {step}: no gradient")
    logs.warn("other", "something else")
    logs.close()
    assert capsys.readouterr().err == "warning: step 1: no gradient\nwarning: something else\n"


def test_wandb_gets_the_configuration_and_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(log=lambda data, step: calls.append((step, data)), finish=lambda: calls.append("finish"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **arguments: calls.append(arguments) or run))
    config = settings("wandb")
    logs = Logs(tmp_path, config, 0, 1)
    logs.write(1, metrics(1))
    logs.close()
    expected = {"project": "sums", "name": "first", "dir": str(tmp_path), "config": OmegaConf.to_container(config)}
    assert calls == [expected, (1, metrics(1)), "finish"]


def test_mlflow_gets_the_configuration_and_names_that_it_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def recorder(name: str) -> Any:
        return lambda *arguments, **named: calls.append((name, *arguments, *named.values()))

    names = ("set_experiment", "start_run", "log_dict", "log_metrics", "end_run")
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(**{name: recorder(name) for name in names}))
    config = settings("mlflow")
    logs = Logs(tmp_path, config, 1, 2)
    logs.write(2, metrics(2))
    logs.close()
    logged = {name.replace("@", "_"): value for name, value in metrics(2).items()}
    assert "val-core/sums/reward/mean_1" in logged
    assert calls == [
        ("set_experiment", "sums"),
        ("start_run", "first"),
        ("log_dict", OmegaConf.to_container(config), "config.yaml"),
        ("log_metrics", logged, 2),
        ("end_run",),
    ]


def test_a_tracker_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(UserError, match=r"trainer\.logger=wandb: it does not start: no API key configured"):
        Logs(tmp_path, settings("wandb"), 0, 1)
