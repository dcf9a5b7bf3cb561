"""Where the metrics of a run go: the terminal, metrics.jsonl, TensorBoard, and at the end a picture of the curves."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

# What the progress bar shows, and under which word.
_BAR = {
    "critic/rewards/mean": "reward",
    "actor/entropy_token_ratio": "selected",
    "actor/entropy": "entropy",
}
# What the terminal prints of a step; metrics.jsonl and TensorBoard have all of it.
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

    `step` is where the run goes on: what a killed run logged after its last checkpoint is taken back first.
    Of the ranks of a run one is active; the others write nothing.
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
            kept.write_text("".join(json.dumps(line) + "\n" for line in self.history))
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
            self._file.write(json.dumps(line) + "\n")
        if self._tensorboard:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
            # A run that goes on after a kill does not log again what came before its checkpoint.
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
    """The lines of a metrics file, without a last one that a kill cut short."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _draw(history: Sequence[dict[str, Any]], path: Path) -> None:
    # The object-oriented interface needs no display and leaves pyplot's global state alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, _CURVES, strict=True):
        for name in sorted({key for line in history for key in line["data"] if _matches(key, names)}):
            points = [(line["step"], line["data"][name]) for line in history if name in line["data"]]
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 20 else "")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        if axes.lines:
            # From zero, or a share that hardly moves would look as if it did.
            if axes.dataLim.ymin >= 0:
                axes.set_ylim(bottom=0)
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def _matches(key: str, names: Sequence[str]) -> bool:
    """Whether `key` is one of `names`, or begins with one that ends in a slash."""
    return any(key == name or (name.endswith("/") and key.startswith(name)) for name in names)
