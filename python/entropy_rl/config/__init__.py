"""The configuration of the trainer: train.yaml with the overrides of the command line, every value checked.

An error raises `ConfigError`, whose one line names the key, its value and what is allowed.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from entropy_rl import selection
from entropy_rl.errors import UserError, one_line
from entropy_rl.scores import FUNCTION, SCORES, names_function

LOSS_MODES = (
    "vanilla",
    "gpg",
    "clip_cov",
    "kl_cov",
    "gspo",
    "geo_mean",
    "dppo_tv",
    "dppo_kl",
    "sapo",
    "dro",
    "cispo",
)
LOSS_AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
KL_TYPES = tuple(
    name + straight_through
    for name in ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
    for straight_through in ("", "+")
)
ADV_ESTIMATORS = ("grpo", "rloo", "gpg", "reinforce_plus_plus")
LOGGERS = ("console", "file", "tensorboard", "wandb", "mlflow")
TRACKERS = LOGGERS[2:]  # each is a package of that name


class ConfigError(UserError):
    """An error of the user in the configuration, or in a file that it names."""


class Rule(NamedTuple):
    """What a value may be: in words for an error, and as a test."""

    allowed: str
    holds: Callable[[Any], bool]


def one_of(*names: str) -> Rule:
    return Rule("one of " + ", ".join(names), lambda value: value in names)


def integer(minimum: int, maximum: int | None = None) -> Rule:
    return Rule(
        f"an integer of at least {minimum}" + ("" if maximum is None else f" and at most {maximum}"),
        lambda value: _is_integer(value) and minimum <= value and (maximum is None or value <= maximum),
    )


def number(
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> Rule:
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("above", above), ("of at least", at_least), ("at most", at_most), ("below", below))
        if math.isfinite(bound)
    ]
    return Rule(
        " and ".join(["a number " + bounds[0], *bounds[1:]]) if bounds else "a finite number",
        lambda value: _is_number(value) and above < value < below and at_least <= value <= at_most,
    )


def optional(rule: Rule) -> Rule:
    return Rule(rule.allowed + ", or null", lambda value: value is None or rule.holds(value))


def either(first: Rule, second: Rule) -> Rule:
    return Rule(f"{first.allowed}, or {second.allowed}", lambda value: first.holds(value) or second.holds(value))


def list_of(rule: Rule, length: int | None = None) -> Rule:
    return Rule(
        f"a list{'' if length is None else f' of {length}'}, each {rule.allowed}",
        lambda value: (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and (length is None or len(value) == length)
            and all(rule.holds(item) for item in value)
        ),
    )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


TEXT = Rule("a text", lambda value: isinstance(value, str) and value != "")
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TABLE = Rule("a table of settings", lambda value: isinstance(value, dict))
FILES = optional(Rule("a path or a list of paths", lambda value: TEXT.holds(value) or list_of(TEXT).holds(value)))
RATIO = number(above=0, at_most=1)
# Within these bounds logits over the temperature are finite in float32.
TEMPERATURE = number(at_least=1e-6, at_most=1e6)
SEED = integer(0, 2**32 - 1)
MINUS_ONE = Rule("-1", lambda value: _is_integer(value) and value == -1)
FUNCTION_OF_A_FILE = Rule(FUNCTION, names_function)
ZERO = Rule("0", lambda value: _is_number(value) and value == 0)
ONE = Rule("1", lambda value: _is_integer(value) and value == 1)

RULES: dict[str, Rule] = {
    "data.train_files": FILES,
    "data.val_files": FILES,
    "data.reasoning_gym.name": optional(TEXT),
    "data.reasoning_gym.size": integer(1),
    "data.reasoning_gym.val_size": integer(0),
    "data.reasoning_gym.seed": SEED,
    "data.reasoning_gym.config": TABLE,
    "data.reasoning_gym.system_prompt": optional(
        one_of("default", "simple", "direct", "DeepSeekZero", "chain_of_draft")
    ),
    "data.prompt_key": TEXT,
    "data.reward_fn_key": TEXT,
    "data.train_max_samples": either(MINUS_ONE, integer(1)),
    "data.val_max_samples": either(MINUS_ONE, integer(1)),
    "data.max_prompt_length": integer(1),
    "data.max_response_length": integer(1),
    "data.train_batch_size": integer(1),
    "data.val_batch_size": optional(integer(1)),
    "data.filter_overlong_prompts": FLAG,
    "data.shuffle": FLAG,
    "data.seed": optional(SEED),
    "reward.num_workers": integer(0),
    "reward.timeout": optional(number(above=0)),
    "reward.custom_reward_function.path": optional(TEXT),
    "reward.custom_reward_function.name": TEXT,
    "actor_rollout_ref.model.path": TEXT,
    "actor_rollout_ref.model.enable_gradient_checkpointing": FLAG,
    "actor_rollout_ref.model.trust_remote_code": FLAG,
    "actor_rollout_ref.model.use_fused_kernels": FLAG,
    "actor_rollout_ref.actor.entropy_top_ratio": optional(RATIO),
    "actor_rollout_ref.actor.entropy_top_score": either(one_of(*SCORES), FUNCTION_OF_A_FILE),
    "actor_rollout_ref.actor.entropy_top_rule": one_of(*selection.RULES),
    "actor_rollout_ref.actor.entropy_top_complement": FLAG,
    "actor_rollout_ref.actor.entropy_top_scope": one_of(*selection.SCOPES),
    "actor_rollout_ref.actor.entropy_top_source": one_of("prepass", "old_policy"),
    "actor_rollout_ref.actor.entropy_top_ranks": one_of(*selection.RANKS),
    "actor_rollout_ref.actor.entropy_top_normalize": one_of("selected", "response"),
    "actor_rollout_ref.actor.entropy_rest.weight": number(at_least=0),
    "actor_rollout_ref.actor.entropy_rest.clip_ratio_low": optional(number(at_least=0)),
    "actor_rollout_ref.actor.entropy_rest.clip_ratio_high": optional(number(at_least=0)),
    "actor_rollout_ref.actor.entropy_rest.kl_loss_coef": optional(number(at_least=0)),
    "actor_rollout_ref.actor.entropy_veto.probability": optional(number(above=0, at_most=1)),
    "actor_rollout_ref.actor.entropy_veto.entropy": optional(number(above=0)),
    "actor_rollout_ref.actor.token_weight": optional(FUNCTION_OF_A_FILE),
    "actor_rollout_ref.actor.strategy": one_of("fsdp2", "ddp"),
    "actor_rollout_ref.actor.policy_loss.loss_mode": one_of(*LOSS_MODES),
    "actor_rollout_ref.actor.policy_loss.clip_cov_ratio": RATIO,
    "actor_rollout_ref.actor.policy_loss.clip_cov_lb": number(),
    "actor_rollout_ref.actor.policy_loss.clip_cov_ub": number(),
    "actor_rollout_ref.actor.policy_loss.kl_cov_ratio": RATIO,
    "actor_rollout_ref.actor.policy_loss.ppo_kl_coef": number(at_least=0),
    "actor_rollout_ref.actor.policy_loss.dro_beta": optional(number(above=0)),
    "actor_rollout_ref.actor.loss_agg_mode": one_of(*LOSS_AGG_MODES),
    "actor_rollout_ref.actor.loss_scale_factor": optional(number(above=0)),
    "actor_rollout_ref.actor.clip_ratio": number(at_least=0),
    "actor_rollout_ref.actor.clip_ratio_low": optional(number(at_least=0)),
    "actor_rollout_ref.actor.clip_ratio_high": optional(number(at_least=0)),
    "actor_rollout_ref.actor.clip_ratio_c": number(above=1),
    "actor_rollout_ref.actor.tau_pos": number(above=0),
    "actor_rollout_ref.actor.tau_neg": number(above=0),
    "actor_rollout_ref.actor.ppo_mini_batch_size": integer(1),
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": optional(integer(1)),
    "actor_rollout_ref.actor.ppo_epochs": integer(1),
    "actor_rollout_ref.actor.shuffle": FLAG,
    "actor_rollout_ref.actor.data_loader_seed": SEED,
    "actor_rollout_ref.actor.entropy_coeff": number(),
    "actor_rollout_ref.actor.use_kl_loss": FLAG,
    "actor_rollout_ref.actor.kl_loss_coef": number(at_least=0),
    "actor_rollout_ref.actor.kl_loss_type": one_of(*KL_TYPES),
    "actor_rollout_ref.actor.optim.lr": number(at_least=0),
    "actor_rollout_ref.actor.optim.lr_warmup_steps": integer(-1),
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": number(at_least=0, at_most=1),
    "actor_rollout_ref.actor.optim.lr_scheduler_type": one_of("constant", "cosine"),
    "actor_rollout_ref.actor.optim.min_lr_ratio": number(at_least=0, at_most=1),
    "actor_rollout_ref.actor.optim.num_cycles": number(above=0),
    "actor_rollout_ref.actor.optim.weight_decay": number(at_least=0),
    "actor_rollout_ref.actor.optim.betas": list_of(number(at_least=0, below=1), length=2),
    "actor_rollout_ref.actor.optim.clip_grad": number(above=0),
    "actor_rollout_ref.actor.fsdp_config.dtype": one_of("float32", "bfloat16"),
    "actor_rollout_ref.rollout.n": integer(1),
    "actor_rollout_ref.rollout.temperature": TEMPERATURE,
    "actor_rollout_ref.rollout.top_p": RATIO,
    "actor_rollout_ref.rollout.top_k": either(MINUS_ONE, integer(1)),
    "actor_rollout_ref.rollout.seed": SEED,
    "actor_rollout_ref.rollout.max_num_seqs": integer(1),
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": optional(integer(1)),
    "actor_rollout_ref.rollout.val_kwargs.temperature": either(ZERO, TEMPERATURE),
    "actor_rollout_ref.rollout.val_kwargs.top_p": RATIO,
    "actor_rollout_ref.rollout.val_kwargs.top_k": either(MINUS_ONE, integer(1)),
    "actor_rollout_ref.rollout.val_kwargs.n": integer(1),
    "actor_rollout_ref.rollout.name": TEXT,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": ONE,
    "actor_rollout_ref.nccl_timeout": integer(1),
    "algorithm.adv_estimator": one_of(*ADV_ESTIMATORS),
    "algorithm.norm_adv_by_std_in_grpo": FLAG,
    "algorithm.gamma": number(at_least=0, at_most=1),
    "trainer.total_training_steps": optional(integer(1)),
    "trainer.total_epochs": integer(1),
    "trainer.save_freq": either(MINUS_ONE, integer(1)),
    "trainer.test_freq": either(MINUS_ONE, integer(1)),
    "trainer.val_before_train": FLAG,
    "trainer.resume_mode": one_of("auto", "disable", "resume_path"),
    "trainer.resume_from_path": optional(TEXT),
    "trainer.max_actor_ckpt_to_keep": optional(integer(1)),
    "trainer.default_local_dir": TEXT,
    "trainer.logger": list_of(one_of(*LOGGERS)),
    "trainer.log_samples_freq": either(MINUS_ONE, integer(1)),
    "trainer.rollout_data_dir": optional(TEXT),
    "trainer.project_name": TEXT,
    "trainer.experiment_name": TEXT,
    "trainer.device": one_of("auto", "cuda", "cpu"),
    "trainer.n_gpus_per_node": optional(integer(1)),
    "trainer.nnodes": integer(1),
}


def load(overrides: Sequence[str]) -> DictConfig:
    """Loads train.yaml with `overrides` in Hydra's syntax, and checks every value.

    Raises:
        ConfigError: a key does not exist, a value is not allowed, or keys contradict each other.
    """
    check_keys(overrides)
    try:
        with initialize_config_dir(str(Path(__file__).parent), version_base="1.3"):
            config = compose("train", overrides=list(overrides))
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from None
    check(config)
    return config


def check(config: DictConfig) -> None:
    """Checks every value with its rule, then the values that must fit each other.

    Raises:
        ConfigError: for the first value that is not allowed.
    """
    for key, rule in RULES.items():
        value = OmegaConf.select(config, key)
        if isinstance(value, DictConfig | ListConfig):
            value = OmegaConf.to_container(value)
        if not rule.holds(value):
            raise ConfigError(f"{key}={_text(value)}: it must be {rule.allowed}")

    data, actor, rollout = config.data, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    if (data.train_files is None) == (data.reasoning_gym.name is None):
        raise ConfigError(
            f"data.train_files={_text(data.train_files)}, data.reasoning_gym.name="
            f"{_text(data.reasoning_gym.name)}: exactly one of the two must be set"
        )
    if data.train_batch_size % actor.ppo_mini_batch_size:
        raise ConfigError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size}: it must divide "
            f"data.train_batch_size={data.train_batch_size}"
        )
    micro, responses = actor.ppo_micro_batch_size_per_gpu, actor.ppo_mini_batch_size * rollout.n
    if micro is not None and responses % micro:
        raise ConfigError(
            f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={micro}: it must divide "
            f"ppo_mini_batch_size * rollout.n = {responses}"
        )
    if actor.policy_loss.loss_mode == "dro" and actor.policy_loss.dro_beta is None:
        raise ConfigError("actor_rollout_ref.actor.policy_loss.dro_beta=null: loss_mode dro needs a number above 0")
    found = selection.contradiction(actor)
    if found is not None:
        raise ConfigError(f"actor_rollout_ref.actor.{found.key}={_text(found.value)}: {found.reason}")
    selection.load_functions(actor)
    if (config.trainer.resume_mode == "resume_path") != (config.trainer.resume_from_path is not None):
        raise ConfigError(
            f"trainer.resume_from_path={_text(config.trainer.resume_from_path)}: it must be a path with "
            f"trainer.resume_mode=resume_path, and null otherwise; resume_mode is {config.trainer.resume_mode}"
        )
    for package in TRACKERS:
        if package in config.trainer.logger and find_spec(package) is None:
            raise ConfigError(f"trainer.logger={package}: the package is not installed; pip install {package}")


def check_keys(overrides: Sequence[str]) -> None:
    """Checks that the keys exist. Hydra names an unknown key in several lines, and accepts one that begins with +."""
    unknown = []
    for override in overrides:
        try:
            key = OverridesParser.create().parse_override(override).key_or_group
        except HydraException:
            raise ConfigError(f"{override}: an override must read key=value") from None
        if key in RULES or any(rule is TABLE and key.startswith(table + ".") for table, rule in RULES.items()):
            continue
        close = difflib.get_close_matches(key, RULES, n=3, cutoff=0.5)
        unknown.append(f"{override}: there is no key '{key}'" + (f"; nearest: {', '.join(close)}" if close else ""))
    if unknown:
        raise ConfigError(" | ".join([*unknown, "--help lists all keys"]))


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
