"""The command `entropy-rl ablate`: which response tokens should carry the policy gradient?

DIRECTORY/settings.json            what all runs share
DIRECTORY/seed_N/                  the demo's warmed-up model and problems
DIRECTORY/seed_N/ARM/              a run of the trainer, and arm.json, the settings of its arm
DIRECTORY/results/seed_N.ARM.json  the result of a run, written when it has succeeded
DIRECTORY/table.md, curves.png     made from all results
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from entropy_rl import config, demo, pretrained, tasks
from entropy_rl.cli import ARMS
from entropy_rl.errors import UserError, one_line

_ACTOR = "actor_rollout_ref.actor"
_CONFIDENCE = 0.95

Result = dict[str, Any]


class Arm(NamedTuple):
    title: str
    overrides: list[str]


def _selecting(title: str, ratio: str, complement: str = "false", **keys: str) -> Arm:
    """An arm that differs in the selection; `keys` are keys without entropy_top_."""
    keys = {"ratio": ratio, "complement": complement} | keys
    return Arm(title, [f"{_ACTOR}.entropy_top_{key}={value}" for key, value in keys.items()])


def _with(arm: Arm, keys: dict[str, str]) -> Arm:
    return Arm(arm.title, arm.overrides + [f"{_ACTOR}.{key}={value}" for key, value in keys.items()])


# Dual-token constraints, with the values of the authors' script (docs/methods.md).
_ARCHER = {
    "clip_ratio_low": "0.5",
    "clip_ratio_high": "0.5",
    "use_kl_loss": "true",
    "kl_loss_coef": "0",
    "entropy_rest.weight": "1",
    "entropy_rest.clip_ratio_low": "0.2",
    "entropy_rest.clip_ratio_high": "0.2",
    "entropy_rest.kl_loss_coef": "0.001",
}
# Spurious tokens silenced. The paper's bound on the entropy is a quantile of the batch. 0.1 nats is the entropy of a
# choice of 98 % to 2 %: the policy was all but certain of another token.
_STAPO = {"entropy_veto.probability": "0.002", "entropy_veto.entropy": "0.1"}

_ARMS = dict(
    zip(
        ARMS,
        (
            _selecting("all tokens", "null"),
            _selecting("top 50 %", "0.5"),
            _selecting("top 20 %", "0.2"),
            _selecting("top 10 %", "0.1"),
            _selecting("bottom 80 %", "0.2", "true"),
            _selecting("random 20 %", "0.2", score="random"),
            _selecting("random 50 %", "0.5", score="random"),
            _selecting("top 20 % of each response", "0.2", scope="sequence"),
            _with(_selecting("dual-token constraints", "0.2", rule="quantile", scope="sequence"), _ARCHER),
            _with(_selecting("spurious tokens silenced", "1"), _STAPO),
        ),
        strict=True,
    )
)


class Run(NamedTuple):
    seed: int
    arm: str
    directory: Path
    overrides: list[str]
    of_arm: list[str]  # those of them that are the arm's

    def result_path(self) -> Path:
        return self.directory.parents[1] / "results" / f"seed_{self.seed}.{self.arm}.json"


def run(arguments: argparse.Namespace) -> int:
    """Runs what is left to run and writes the table. Raises UserError for an error that the user can fix."""
    output: Path = arguments.output
    arms = [*(arm for arm in ARMS if arm in arguments.arms), *(name for name, _ in arguments.own_arms)]
    runs = [plan(arguments, seed, arm) for seed in range(arguments.seeds) for arm in arms]
    for planned in runs:
        _check(config.load(planned.overrides))
    _claim(output, _shared_settings(arguments))
    for planned in runs:
        _check_arm(output, planned)

    left = [planned for planned in runs if not planned.result_path().exists()]
    if _own_task(arguments):
        for path in {str(config.load(planned.overrides).actor_rollout_ref.model.path) for planned in left}:
            pretrained.check_model(f"actor_rollout_ref.model.path={path}", path)
        if left:
            tasks.load_tasks(config.load(left[0].overrides))  # an error in the files stops here, before anything starts
    else:
        for seed in sorted({planned.seed for planned in left}):
            _prepare_demo(output / f"seed_{seed}", seed, arguments.warmup_steps or demo.WARMUP_STEPS)
    _run_all(left, arguments.jobs)

    results = [_read_result(planned.result_path()) for planned in runs]
    text = table(results)
    (output / "table.md").write_text(text)
    draw(results, output / "curves.png")
    print(text, end="")
    print(f"table, curves and results: {output.resolve()}")
    return 0


def plan(arguments: argparse.Namespace, seed: int, arm: str) -> Run:
    """A run and its command line: the task, then the user's keys, then the keys of the arm, which override both."""
    of_seed: Path = arguments.output / f"seed_{seed}"
    of_arm = _ARMS[arm].overrides if arm in _ARMS else dict(arguments.own_arms)[arm]
    steps = arguments.steps or demo.STEPS
    if _own_task(arguments):
        task = [f"trainer.total_training_steps={steps}"] if arguments.steps else []
    else:
        quarter = max(1, steps // 4)
        task = [
            *demo.training_overrides(of_seed, seed, steps),
            f"trainer.save_freq={quarter}",
            "trainer.max_actor_ckpt_to_keep=1",
        ]
    overrides = [
        *task,
        *arguments.overrides,
        *of_arm,
        f"data.seed={seed}",
        f"actor_rollout_ref.rollout.seed={seed}",
        f"{_ACTOR}.data_loader_seed={seed}",
        "trainer.resume_mode=auto",
        "trainer.logger=[file]",
        f"trainer.default_local_dir={of_seed / arm}",
    ]
    return Run(seed, arm, of_seed / arm, overrides, of_arm)


def _own_task(arguments: argparse.Namespace) -> bool:
    return any(override.startswith("actor_rollout_ref.model.path=") for override in arguments.overrides)


def _shared_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = {"task": "the command line's", "steps": arguments.steps, "overrides": arguments.overrides}
    if not _own_task(arguments):
        settings |= {
            "task": "demo",
            "steps": arguments.steps or demo.STEPS,
            "warmup_steps": arguments.warmup_steps or demo.WARMUP_STEPS,
        }
    return settings


def _check(settings: DictConfig) -> None:
    if settings.data.val_files is None and not (
        settings.data.reasoning_gym.name and settings.data.reasoning_gym.val_size
    ):
        raise UserError("data.val_files=null: the runs are compared on validation problems; a file was expected")


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Claims the directory for runs with these settings.

    Raises:
        UserError: the directory has runs with other settings, which this command must neither count nor resume.
    """
    path = output / "settings.json"
    if path.exists():
        try:
            found = dict(json.loads(path.read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(
                f"--output {output}: {path.name} there is not a file of this command: {one_line(error)}"
            ) from None
        for name in {**found, **settings}:
            if found.get(name) != settings.get(name):
                raise UserError(
                    f"--output {output}: the runs there have {name} {found.get(name)}, and this command has "
                    f"{settings.get(name)}; use the same, or another directory"
                )
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "results").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: it cannot be created: {error.strerror}") from None
    _write(path, settings)


def _check_arm(output: Path, planned: Run) -> None:
    """Raises UserError if the directory has a run of an arm of this name with other settings."""
    path = planned.directory / "arm.json"
    found = json.loads(path.read_text()) if path.exists() else planned.of_arm
    if found != planned.of_arm:
        raise UserError(
            f"--output {output}: the runs of the arm {planned.arm} there have {' '.join(found)}, and this command has "
            f"{' '.join(planned.of_arm)}; use the same, another name or another directory"
        )


def _prepare_demo(directory: Path, seed: int, warmup_steps: int) -> None:
    if directory.exists() and (directory / "warm").exists():
        return
    print(f"seed {seed}: warm-up of the demo's model")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    demo.prepare(partial, seed, warmup_steps)
    partial.rename(directory)


def _run_all(runs: Sequence[Run], jobs: int) -> None:
    executor = ThreadPoolExecutor(jobs)
    try:
        futures = [executor.submit(_train, planned) for planned in runs]
        for future in tqdm(as_completed(futures), total=len(futures), unit="run", disable=not futures):
            future.result()
    finally:
        # After an error or Ctrl-C no further run begins. The runs in progress finish, unless Ctrl-C reached them too.
        executor.shutdown(cancel_futures=True)


def _train(planned: Run) -> None:
    """Trains in a separate process, so that no run inherits state from another one."""
    planned.directory.mkdir(parents=True, exist_ok=True)
    _write(planned.directory / "arm.json", planned.of_arm)
    log = planned.directory / "log.txt"
    with log.open("w") as file:
        status = subprocess.run(
            [sys.executable, "-m", "entropy_rl.train", *planned.overrides], stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if status:
        last = (log.read_text().strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(f"seed {planned.seed}, {_title(planned.arm)}: {last} (status {status}; {log})")
    _write(planned.result_path(), _result(planned))


def _result(planned: Run) -> Result:
    lines = [json.loads(line) for line in (planned.directory / "metrics.jsonl").read_text().splitlines()]
    validation = []
    for line in lines:
        rewards = [value for name, value in line["data"].items() if name.startswith("val-core/")]
        if rewards:
            validation.append([line["step"], sum(rewards) / len(rewards)])
    trained = [line["data"] for line in lines if line["step"] > 0]
    return {
        "arm": planned.arm,
        "seed": planned.seed,
        "validation_reward": validation,  # [step, reward]
        "training_reward": [data["critic/rewards/mean"] for data in trained],
        "entropy": [data["actor/entropy"] for data in trained],
        "entropy_token_ratio": [data.get("actor/entropy_token_ratio", 1.0) for data in trained],
        "seconds": sum(data["timing_s/step"] for data in trained),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _read_result(path: Path) -> Result:
    """A result; a number that was not finite, null in its file, is NaN."""
    found = json.loads(path.read_text())
    lists = {name: values for name, values in found.items() if isinstance(values, list)}
    return found | {name: [math.nan if value is None else value for value in lists[name]] for name in lists}


def _write(path: Path, content: Any) -> None:
    """Writes a file that is complete as soon as it has its name."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


# ---- Results


def _title(arm: str) -> str:
    return _ARMS[arm].title if arm in _ARMS else arm


def _arms_of(results: Sequence[Result]) -> list[str]:
    """The arms that may have results: the command's own, then the user's."""
    return list(dict.fromkeys([*ARMS, *(result["arm"] for result in results)]))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval by Student's t, which is NaN for a single value."""
    from scipy.stats import t

    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, float(t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)) * math.sqrt(variance / len(values))


def table(results: Sequence[Result]) -> str:
    """The results as Markdown. Differences are by seed: the runs of a seed share their model and their problems."""
    last = {(result["arm"], result["seed"]): result["validation_reward"][-1][1] for result in results}
    lines = [
        "| trained on | share of tokens | seeds | validation reward before | after | minus all tokens, seed by seed "
        "| entropy at the end, nats |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in _arms_of(results):
        own = [result for result in results if result["arm"] == arm]
        if not own:
            continue
        ratios = [ratio for result in own for ratio in result["entropy_token_ratio"]]
        seeds = [result["seed"] for result in own]
        differences = [last[arm, seed] - last["all", seed] for seed in seeds if ("all", seed) in last]
        before = [result["validation_reward"][0][1] for result in own]
        cells = [
            _title(arm),
            f"{sum(ratios) / len(ratios):.1%}",
            str(len(seeds)),
            f"{sum(before) / len(before):.3f}",
            _with_interval([last[arm, seed] for seed in seeds]),
            _with_interval(differences, "+.3f") if differences and arm != "all" else "",
            _with_interval([result["entropy"][-1] for result in own]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _with_interval(values: Sequence[float], style: str = ".3f") -> str:
    mean, half = interval(values)
    return f"{mean:{style}}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def draw(results: Sequence[Result], path: Path) -> None:
    """Plots each run as a thin line, and the mean over the seeds of an arm as a thick one."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.5), layout="constrained")
    arms = [arm for arm in _arms_of(results) if any(result["arm"] == arm for result in results)]
    colors = colormaps["tab10" if len(arms) <= 10 else "tab20"]
    panels = (
        ("validation reward", lambda result: result["validation_reward"]),
        ("training reward", lambda result: list(enumerate(result["training_reward"], 1))),
        ("entropy of the policy, nats", lambda result: list(enumerate(result["entropy"], 1))),
    )
    for axes, (title, points) in zip(figure.subplots(1, 3), panels, strict=True):
        for number, arm in enumerate(arms):
            color = colors(number % colors.N)
            curves = [points(result) for result in results if result["arm"] == arm]
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), color=color, linewidth=0.6, alpha=0.35)
            steps = [step for step, _ in curves[0]]
            means = [sum(values) / len(values) for values in zip(*([y for _, y in c] for c in curves), strict=True)]
            axes.plot(steps, means, color=color, linewidth=2, label=_title(arm))
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
