"""What the trainer learns from: problems, and who scores the answers.

Two sources: Parquet files in verl's format, scored by math-verify or by a reward function of the user's, and the
generated tasks of reasoning-gym, scored by the task itself.
"""

import difflib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from entropy_rl.config import ConfigError
from entropy_rl.errors import one_line

# (data_source, solution_str, ground_truth, extra_info) -> reward: the signature of verl's reward functions.
Scorer = Callable[[str, str, Any, dict[str, Any]], float]


@dataclass(frozen=True)
class Problem:
    messages: list[dict[str, str]]  # role and content
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any] = field(default_factory=dict)


def load_tasks(config: DictConfig) -> tuple[list[Problem], list[Problem], Scorer]:
    """Training problems, validation problems (none, if none are configured) and their scorer.

    Raises:
        ConfigError: a file, column, task or reward function that is not as expected.
    """
    data = config.data
    if data.reasoning_gym.name is not None:
        train, validation, scorer = _load_reasoning_gym(data.reasoning_gym)
    else:
        train = _load_files("data.train_files", data.train_files, data)
        validation = _load_files("data.val_files", data.val_files, data) if data.val_files is not None else []
        scorer = score_math
    if config.reward.custom_reward_function.path is not None:
        scorer = _load_reward_function(**config.reward.custom_reward_function)
    return _first(train, data.train_max_samples), _first(validation, data.val_max_samples), scorer


def score_math(data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    """1.0 if math-verify finds in the answer what equals `ground_truth` (LaTeX or a plain expression), else 0.0."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    truth = parse(f"\\boxed{{{ground_truth}}}", [LatexExtractionConfig()])
    answer = parse(solution_str, [ExprExtractionConfig(), LatexExtractionConfig()])
    return float(verify(truth, answer)) if truth and answer else 0.0


def _first(problems: list[Problem], count: int) -> list[Problem]:
    return problems if count == -1 else problems[:count]


def _load_files(key: str, files: str | ListConfig, data: DictConfig) -> list[Problem]:
    return [
        problem
        for name in ([files] if isinstance(files, str) else files)
        for problem in _load_file(key, Path(name).expanduser(), data.prompt_key, data.reward_fn_key)
    ]


def _load_file(key: str, path: Path, prompt_column: str, source_column: str) -> list[Problem]:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise ConfigError(f"{key}={path}: there is no such file; a Parquet file in verl's format was expected")
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
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
        or not all(isinstance(m.get("content"), str) for m in messages)
    ):
        raise ConfigError(f"{where}: column {prompt_column} must hold a list of {{role, content}}, both texts")
    if not isinstance(reward_model, dict) or reward_model.get("ground_truth") is None:
        raise ConfigError(f"{where}: column reward_model must hold {{ground_truth: ...}}")
    return Problem(messages, str(row[source_column]), reward_model["ground_truth"], row.get("extra_info") or {})


def _load_reasoning_gym(settings: DictConfig) -> tuple[list[Problem], list[Problem], Scorer]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS
    from reasoning_gym.utils import SYSTEM_PROMPTS, extract_answer

    # reasoning-gym's tasks log through the root logger at import; only what is wrong is of interest here.
    logging.getLogger("reasoning_gym").setLevel(logging.WARNING)
    name = settings.name
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3)
        raise ConfigError(
            f"data.reasoning_gym.name={name}: no task of reasoning-gym has this name"
            + (f"; nearest: {', '.join(close)}" if close else "")
            + f"; the {len(DATASETS)} names are listed by: python -c "
            "'from reasoning_gym.factory import DATASETS; print(*sorted(DATASETS))'"
        )

    def create(size: int, seed: int) -> Any:
        task = OmegaConf.to_container(settings.config)
        try:
            return reasoning_gym.create_dataset(name, size=size, seed=seed, **task)
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(f"data.reasoning_gym.config={task}: {name} refuses it: {one_line(error)}") from None

    system = settings.system_prompt and {"role": "system", "content": SYSTEM_PROMPTS[settings.system_prompt]}
    train = create(settings.size, settings.seed)
    validation = create(settings.val_size, settings.seed + 1) if settings.val_size else []

    def problems(dataset: Any) -> list[Problem]:
        return [
            Problem(
                [*([system] if system else []), {"role": "user", "content": entry["question"]}],
                f"reasoning_gym/{name}",
                entry["answer"],
                {"entry": entry},
            )
            for entry in dataset
        ]

    def score(data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
        answer = extract_answer(solution_str)
        # Without a system prompt nobody asked for <answer> tags.
        if answer is None and system is None:
            answer = solution_str.strip()
        return float(train.score_answer(answer, extra_info["entry"]))

    return problems(train), problems(validation), score


def _load_reward_function(path: str, name: str) -> Scorer:
    key = "reward.custom_reward_function"
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{key}.path={path}: there is no such file; a Python file was expected")
    spec = importlib.util.spec_from_file_location("entropy_rl_custom_reward", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{key}.path={path}: a Python file, its name ending in .py, was expected")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{key}.path={path}: it cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{key}.name={name}: {path} has no function of this name")

    def score(data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
        result = function(
            data_source=data_source, solution_str=solution_str, ground_truth=ground_truth, extra_info=extra_info
        )
        return float(result["score"] if isinstance(result, dict) else result)

    return score
