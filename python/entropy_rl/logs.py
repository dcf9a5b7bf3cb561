"""Writes the metrics and samples of a run to the terminal, to files and to trackers, and draws curves at the end."""

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from entropy_rl import progress
from entropy_rl.errors import UserError, one_line
from entropy_rl.report.page import last_user_message
from entropy_rl.report.rollouts import Rollout, write_rollouts

# The metrics of the progress bar, and the words under which it shows them.
_BAR = {
    "critic/rewards/mean": "reward",
    "actor/entropy_token_ratio": "selected",
    "actor/entropy": "entropy",
}
# The metrics that the terminal prints after a step. The files and trackers get all metrics.
_CONSOLE = (
    "critic/rewards/mean",
    "critic/rewards/zero_std_ratio",
    "actor/entropy",
    "actor/entropy_token_ratio",
    "actor/entropy_threshold",
    "actor/pg_loss",
    "actor/pg_clipfrac",
    "actor/ppo_kl",
    "actor/kl_loss",
    "actor/grad_norm",
    "response_length/mean",
    "timing_s/step",
)
_CURVES = (
    ("reward", ("critic/rewards/mean", "val-core/")),
    ("entropy, nats", ("actor/entropy", "actor/entropy_threshold")),
    ("selected share of response tokens", ("actor/entropy_token_ratio",)),
    ("clipped share of response tokens", ("actor/pg_clipfrac",)),
    ("gradient norm", ("actor/grad_norm",)),
    ("response length, tokens", ("response_length/mean",)),
)
# The longest prompt and response, in characters, that the terminal shows of a sample.
_PROMPT_LENGTH, _RESPONSE_LENGTH = 400, 1200


@dataclass(frozen=True)
class Histogram:
    """Numbers of at least 0, counted in bins of equal width."""

    end: float  # of the last bin; the first begins at 0
    counts: list[float]
    total: float  # of the numbers
    squares: float  # the total of their squares


class Tracker(Protocol):
    """A library that keeps metrics. It writes to its own place, or to a server."""

    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, directory: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        # A run that resumes after a kill does not log the steps before its checkpoint again.
        self._writer.flush()

    def histogram(self, step: int, name: str, values: Histogram) -> None:
        bins = len(values.counts)
        self._writer.add_histogram_raw(
            name,
            min=0.0,
            max=values.end,
            num=sum(values.counts),
            sum=values.total,
            sum_squares=values.squares,
            bucket_limits=[values.end * (i + 1) / bins for i in range(bins)],
            bucket_counts=values.counts,
            global_step=step,
        )

    def close(self) -> None:
        self._writer.close()


class Wandb:
    def __init__(self, directory: Path, config: DictConfig) -> None:
        import wandb

        self._run = wandb.init(
            project=config.trainer.project_name,
            name=config.trainer.experiment_name,
            dir=str(directory),
            config=OmegaConf.to_container(config),
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    def __init__(self, config: DictConfig) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(config.trainer.project_name)
        mlflow.start_run(run_name=config.trainer.experiment_name)
        mlflow.log_dict(OmegaConf.to_container(config), "config.yaml")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        # MLflow allows no @ and no $ in a name.
        allowed = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in metrics.items()}
        self._mlflow.log_metrics(allowed, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class Logs:
    """Writes the metrics and samples of a run to the places that `trainer.logger` names.

    The configuration is always written, to config.yaml. Only one rank is active; the others write nothing.

    Args:
        directory: where the files are.
        config: a configuration of train.yaml.
        step: the step from which the run resumes. What a killed run logged after it is removed.
        total_steps: the last step of the run.
        active: whether this rank writes.

    Raises:
        UserError: the metrics.jsonl of the run that is resumed is damaged, or a tracker refuses to start.
    """

    def __init__(
        self, directory: Path, config: DictConfig, step: int, total_steps: int, *, active: bool = True
    ) -> None:
        self._active = active
        if not active:
            return
        loggers = config.trainer.logger
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.history: list[dict[str, Any]] = []
        self._console = "console" in loggers
        self._file = None
        if "file" in loggers:
            path = directory / "metrics.jsonl"
            self.history = [line for line in _read_lines(path) if line["step"] <= step] if step else []
            kept = path.with_name(path.name + ".partial")
            kept.write_text("".join(map(_as_json, self.history)))
            kept.replace(path)
            self._file = path.open("a", buffering=1)
        OmegaConf.save(config, directory / "config.yaml")
        starts: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(directory, step),
            "wandb": lambda: Wandb(directory, config),
            "mlflow": lambda: MLflow(config),
        }
        self._trackers: list[Tracker] = []
        for name in starts.keys() & set(loggers):
            try:
                self._trackers.append(starts[name]())
            except Exception as error:
                raise UserError(f"trainer.logger={name}: it does not start: {one_line(error)}") from None
        self._warned: set[str] = set()
        self.bar = tqdm(total=total_steps, initial=step, unit="step", disable=not self._console)
        progress.attach(self.bar if self._console else None)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if not self._active:
            return
        line = {"step": step, "data": metrics}
        self.history.append(line)
        if self._file:
            self._file.write(_as_json(line))
        for tracker in self._trackers:
            tracker.write(step, metrics)
        if self._console:
            progress.clear()
            shown = [name for name in metrics if name.startswith("val-core/")]
            shown += [name for name in _CONSOLE if name in metrics]
            self.bar.write(f"step {step}: " + " - ".join(f"{name}:{metrics[name]:.4g}" for name in shown))
            self.bar.set_postfix({word: f"{metrics[name]:.3f}" for name, word in _BAR.items() if name in metrics})
            self.bar.update(step - self.bar.n)

    def samples(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Shows responses with their rewards on the terminal, and writes them to samples/STEP.jsonl."""
        if not self._active:
            return
        if self._console:
            for rollout in rollouts:
                prompt = _shortened(last_user_message(rollout.input), _PROMPT_LENGTH)
                response = _shortened(rollout.output, _RESPONSE_LENGTH)
                reward = "no" if rollout.score is None else f"{rollout.score:.4g}"
                self.bar.write(f"step {step}, a response with reward {reward} to: {prompt}\n{_indented(response)}")
        if self._file:
            (self._directory / "samples").mkdir(exist_ok=True)
            write_rollouts(self._directory / "samples" / f"{step}.jsonl", rollouts)

    def histogram(self, step: int, name: str, values: Histogram) -> None:
        """Writes a histogram to TensorBoard, if the run logs to it."""
        if self._active:
            for tracker in self._trackers:
                if isinstance(tracker, TensorBoard):
                    tracker.histogram(step, name, values)

    def warn(self, kind: str, text: str) -> None:
        """Prints a warning to stderr, whatever the loggers are; of each kind only the first one."""
        if self._active and kind not in self._warned:
            self._warned.add(kind)
            self.bar.write(f"warning: {text}", file=sys.stderr)

    def close(self) -> None:
        if not self._active:
            return
        progress.attach(None)
        self.bar.close()
        if self._file:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()
        _draw(self.history, self._directory / "curves.png")


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}… ({len(text) - length} more characters)"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a last line that a kill cut short."""
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            value = json.loads(line)
            found.append({"step": int(value["step"]), "data": dict(value["data"])})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: line {number} is damaged ({type(error).__name__}: {one_line(error)}); a JSON object with "
                "step and data was expected: remove the line, or the file if its metrics may be lost"
            ) from None
    return found


def _as_json(line: dict[str, Any]) -> str:
    """One line of metrics.jsonl. JSON has no NaN and no infinity: they are null."""
    data = {name: None if value is None or not math.isfinite(value) else value for name, value in line["data"].items()}
    return json.dumps({"step": line["step"], "data": data}, allow_nan=False) + "\n"


def _draw(history: Sequence[dict[str, Any]], path: Path) -> None:
    # The object-oriented interface needs no display and leaves pyplot's global state alone.
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # The name of a data source is no mathematics, even with a dollar sign.
    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(12, 6), layout="constrained")
        for axes, (title, names) in zip(figure.subplots(2, 3).flat, _CURVES, strict=True):
            for name in sorted({key for line in history for key in line["data"] if _matches(key, names)}):
                found = [(line["step"], line["data"][name]) for line in history if name in line["data"]]
                points = [(step, math.nan if value is None else value) for step, value in found]
                axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 20 else "")
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if axes.lines:
                # The axis starts at zero, so that a share that hardly changes does not look as if it did.
                if axes.dataLim.ymin >= 0:
                    axes.set_ylim(bottom=0)
                axes.legend(fontsize=7)
        figure.savefig(path, dpi=120)


def _matches(key: str, names: Sequence[str]) -> bool:
    """Whether `key` is one of `names`, or begins with one of them that ends in a slash."""
    return any(key == name or (name.endswith("/") and key.startswith(name)) for name in names)
