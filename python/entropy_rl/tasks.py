"""What the trainer learns from: problems, and the scorer of their answers.

There are two sources: Parquet files in verl's format, scored by math-verify or by the user's reward function, and the
generated tasks of reasoning-gym, scored by the task itself.
"""

import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf

from entropy_rl import distributed
from entropy_rl.config import ConfigError
from entropy_rl.errors import check_file, one_line
from entropy_rl.pretrained import is_conversation
from entropy_rl.rewards import CustomFunction, MathVerify, ReasoningGym, Scorer, Source, refused_truth


@dataclass(frozen=True)
class Problem:
    messages: list[dict[str, str]]  # role and content
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)  # the words that name it in an error


def load_tasks(config: DictConfig) -> tuple[list[Problem], list[Problem], Scorer]:
    """Training problems, validation problems (none if none are configured) and their scorer.

    Raises:
        ConfigError: a file, column, ground truth, task or reward function is not as expected.
    """
    data, reward = config.data, config.reward
    source: Source
    if data.reasoning_gym.name is not None:
        train, validation, source = _generate(data.reasoning_gym)
    else:
        train = _load_files("data.train_files", data.train_files, data)
        validation = _load_files("data.val_files", data.val_files, data) if data.val_files is not None else []
        source = MathVerify()
    if reward.custom_reward_function.path is not None:
        source = CustomFunction(reward.custom_reward_function.path, reward.custom_reward_function.name)
        source.load()  # raises here for what is wrong with the file
    train, validation = _first(train, data.train_max_samples), _first(validation, data.val_max_samples)
    if isinstance(source, MathVerify):
        _check_truths([*train, *validation])
    return train, validation, Scorer(source, _processes(reward.num_workers), reward.timeout)


def _first(problems: list[Problem], count: int) -> list[Problem]:
    return problems if count == -1 else problems[:count]


def _processes(wanted: int) -> int:
    """As many as are wanted, but no more than this rank's share of the processors."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, max(1, processors // ranks))


def _check_truths(problems: list[Problem]) -> None:
    for problem in problems:
        reason = refused_truth(problem.ground_truth)
        if reason is not None:
            raise ConfigError(
                f"{problem.where}: no answer can equal reward_model.ground_truth: {reason}, or a reward function "
                "(reward.custom_reward_function.path)"
            )


# ---- Parquet files


def _load_files(key: str, files: str | ListConfig, data: DictConfig) -> list[Problem]:
    return [
        problem
        for name in ([files] if isinstance(files, str) else files)
        for problem in _load_file(key, Path(name).expanduser(), data.prompt_key, data.reward_fn_key)
    ]


def _load_file(key: str, path: Path, prompt_column: str, source_column: str) -> list[Problem]:
    import pyarrow
    import pyarrow.parquet

    check_file(f"{key}={path}", path, "a Parquet file in verl's format")
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError):
        raise ConfigError(f"{key}={path}: not a Parquet file; one in verl's format was expected") from None
    required = (prompt_column, source_column, "reward_model")
    missing = [name for name in required if name not in table.column_names]
    if missing:
        raise ConfigError(
            f"{key}={path}: no column {', '.join(missing)}; columns {', '.join(required)} were expected, the "
            f"file has {', '.join(table.column_names) or 'none'}"
        )
    if not table.num_rows:
        raise ConfigError(f"{key}={path}: the file has no rows; at least one was expected")
    return [
        _problem(f"{key}={path}: row {number}", row, prompt_column, source_column)
        for number, row in enumerate(table.to_pylist())
    ]


def _problem(where: str, row: dict[str, Any], prompt_column: str, source_column: str) -> Problem:
    messages, reward_model = row[prompt_column], row["reward_model"]
    if not is_conversation(messages):
        raise ConfigError(f"{where}: column {prompt_column} must hold a list of {{role, content}}, both texts")
    if not isinstance(reward_model, dict) or reward_model.get("ground_truth") is None:
        raise ConfigError(f"{where}: column reward_model must hold {{ground_truth: ...}}")
    return Problem(messages, str(row[source_column]), reward_model["ground_truth"], row.get("extra_info") or {}, where)


# ---- reasoning-gym


def _generate(settings: DictConfig) -> tuple[list[Problem], list[Problem], Source]:
    """The problems of a task. No validation problem is a training problem.

    reasoning-gym makes item i from the seed `seed + i`, so that a validation seed next to the training seed would
    give the same problems again. The seeds of validation begin 2^31 further on. Two seeds can still give the same
    problem: such validation problems are left out, and their number is printed.
    """
    from reasoning_gym.factory import DATASETS
    from reasoning_gym.utils import SYSTEM_PROMPTS

    name: str = settings.name
    task = cast(dict[str, Any], OmegaConf.to_container(settings.config))
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3)
        raise ConfigError(
            f"data.reasoning_gym.name={name}: no task of reasoning-gym has this name"
            + (f"; nearest: {', '.join(close)}" if close else "")
            + f"; this prints all {len(DATASETS)} names: python -c "
            "'from reasoning_gym.factory import DATASETS; print(*sorted(DATASETS))'"
        )
    system = settings.system_prompt and {"role": "system", "content": SYSTEM_PROMPTS[settings.system_prompt]}

    def problems(size: int, seed: int) -> tuple[list[Problem], ReasoningGym]:
        source = ReasoningGym(name, size, seed, task, asks_for_tags=bool(system))
        try:
            entries = list(source.dataset())
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(f"data.reasoning_gym.config={task}: {name} refuses it: {one_line(error)}") from None
        return [
            Problem(
                [*([system] if system else []), {"role": "user", "content": entry["question"]}],
                f"reasoning_gym/{name}",
                entry["answer"],
                {"entry": entry},
                f"data.reasoning_gym.name={name}: problem {number}",
            )
            for number, entry in enumerate(entries)
        ], source

    train, source = problems(settings.size, settings.seed)
    if not settings.val_size:
        return train, [], source
    drawn, _ = problems(settings.val_size, (settings.seed + 2**31) % 2**32)
    seen = {problem.messages[-1]["content"] for problem in train}
    validation = []
    for problem in drawn:
        if problem.messages[-1]["content"] not in seen:
            seen.add(problem.messages[-1]["content"])
            validation.append(problem)
    if not validation:
        raise ConfigError(
            f"data.reasoning_gym.val_size={settings.val_size}: each validation problem is a training problem too; "
            f"{name} needs a smaller data.reasoning_gym.size than {settings.size}, or a config with more problems"
        )
    if len(validation) < len(drawn) and distributed.rank() == 0:
        print(
            f"data.reasoning_gym.val_size={settings.val_size}: {len(drawn) - len(validation)} validation problems "
            f"repeat others of training or validation and are left out; {len(validation)} are used"
        )
    return train, validation, source
