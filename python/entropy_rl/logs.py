"""Writes the metrics of a run to the terminal, metrics.jsonl and TensorBoard, and draws curves at the end."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from entropy_rl.errors import UserError, one_line

# The metrics of the progress bar, and the words under which it shows them.
_BAR = {
    "critic/rewards/mean": "reward",
    "actor/entropy_token_ratio": "selected",
    "actor/entropy": "entropy",
}
# The metrics that the terminal prints after a step. metrics.jsonl and TensorBoard get all metrics.
_CONSOLE = (
    "critic/rewards/mean",
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


class Logs:
    """Writes the metrics of each step to the configured places.

    Only one rank is active; the others write nothing.

    Args:
        directory: where the files are.
        loggers: console, file and tensorboard, or some of them.
        step: the step from which the run resumes. What a killed run logged after it is removed.
        total_steps: the last step of the run.
        active: whether this rank writes.

    Raises:
        UserError: the metrics.jsonl of the run that is resumed is damaged.
    """

    def __init__(
        self, directory: Path, loggers: Sequence[str], step: int, total_steps: int, *, active: bool = True
    ) -> None:
        self._active = active
        if not active:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self.curves_path = directory / "curves.png"
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
        self._tensorboard = None
        if "tensorboard" in loggers:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
        self.bar = tqdm(total=total_steps, initial=step, unit="step", disable=not self._console)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if not self._active:
            return
        line = {"step": step, "data": metrics}
        self.history.append(line)
        if self._file:
            self._file.write(_as_json(line))
        if self._tensorboard:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
            # A run that resumes after a kill does not log the steps before its checkpoint again.
            self._tensorboard.flush()
        if self._console:
            shown = [name for name in metrics if name.startswith("val-core/")]
            shown += [name for name in _CONSOLE if name in metrics]
            self.bar.write(f"step {step}: " + " - ".join(f"{name}:{metrics[name]:.4g}" for name in shown))
            self.bar.set_postfix({word: f"{metrics[name]:.3f}" for name, word in _BAR.items() if name in metrics})
            self.bar.update(step - self.bar.n)

    def close(self) -> None:
        if not self._active:
            return
        self.bar.close()
        if self._file:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        _draw(self.history, self.curves_path)


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
            if axes.lines:
                # The axis starts at zero, so that a share that hardly changes does not look as if it did.
                if axes.dataLim.ymin >= 0:
                    axes.set_ylim(bottom=0)
                axes.legend(fontsize=7)
        figure.savefig(path, dpi=120)


def _matches(key: str, names: Sequence[str]) -> bool:
    """Whether `key` is one of `names`, or begins with one of them that ends in a slash."""
    return any(key == name or (name.endswith("/") and key.startswith(name)) for name in names)
