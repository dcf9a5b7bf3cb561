"""verl's actor configurations with the entropy_top_* keys. User errors stop the driver before anything starts."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import verl.workers.config as verl

from entropy_rl.config import LOSS_MODES, RULES, ConfigError, one_of
from entropy_rl.integrations.verl import loss, plugin
from entropy_rl.selection import contradiction, load_functions, setting

_PREFIX = "actor_rollout_ref.actor."
_KEYS = ("ratio", "score", "rule", "scope", "source", "ranks", "normalize")
_REST = {"weight": 0.0, "clip_ratio_low": None, "clip_ratio_high": None, "kl_loss_coef": None}
_OF_TABLES = (*(f"entropy_rest.{name}" for name in _REST), "entropy_veto.probability", "entropy_veto.entropy")
_RULES = {key: RULES[f"{_PREFIX}{key}"] for key in (*(f"entropy_top_{key}" for key in _KEYS), "token_weight")} | {
    "entropy_top_kernel": one_of("entropy_rl", "verl")
}


@dataclass
class _EntropyTop:
    """The keys of conf/actor/entropy_top.yaml. `entropy_rl.selection.OPTIONS` documents them."""

    entropy_top_ratio: float | None = None
    entropy_top_score: str = "entropy"
    entropy_top_rule: str = "topk"
    entropy_top_scope: str = "micro_batch"
    entropy_top_source: str = "prepass"
    entropy_top_ranks: str = "local"
    entropy_top_normalize: str = "selected"
    entropy_rest: dict[str, Any] = field(default_factory=_REST.copy)
    entropy_veto: dict[str, Any] = field(default_factory=lambda: {"probability": None, "entropy": None})
    token_weight: str | None = None
    entropy_top_kernel: str = "entropy_rl"

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        for name, rule in _RULES.items():
            _check(name, getattr(self, name), rule)
        for name in _OF_TABLES:
            _check(name, setting(self, name), RULES[f"{_PREFIX}{name}"])
        found = contradiction(self)
        if found is not None:
            text = "null" if found.value is None else found.value
            raise ConfigError(f"{_PREFIX}{found.key}={text}: {found.reason}")
        if self.entropy_top_ratio is None:
            return
        _check("policy_loss.loss_mode", self.policy_loss.loss_mode, one_of(*LOSS_MODES))  # type: ignore[attr-defined]
        if not loss.applies(self):
            warnings.warn(
                f"{_PREFIX}entropy_top_ratio={self.entropy_top_ratio} is not applied: loss_mode "
                f"{self.policy_loss.loss_mode} has one ratio per sequence",  # type: ignore[attr-defined]
                stacklevel=2,
            )
            return
        load_functions(self)
        plugin.require()
        from entropy_rl.integrations.verl import engine

        engine.install(self.entropy_top_kernel)


@dataclass
class FSDPActorConfig(_EntropyTop, verl.FSDPActorConfig):
    """For actor_rollout_ref.actor.strategy fsdp and fsdp2."""


@dataclass
class McoreActorConfig(_EntropyTop, verl.McoreActorConfig):
    """For actor_rollout_ref.actor.strategy megatron."""

    def __post_init__(self) -> None:
        if self.entropy_top_ratio is not None and self.entropy_top_scope != "micro_batch":
            # Only the last stage of a pipeline would see the entropies of a prepass.
            _check("entropy_top_source", self.entropy_top_source, one_of("old_policy"))
        if self.entropy_top_ratio is not None and self.megatron.dynamic_context_parallel:
            # Its scheduler splits the batch without the function that this package replaces.
            raise ConfigError(
                f"{_PREFIX}megatron.dynamic_context_parallel=true: it must be false with entropy_top_ratio"
            )
        super().__post_init__()


def check_run(config: Any) -> None:
    """Raises ConfigError if a run's configuration, a DictConfig, contradicts the selection of its actor."""
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    if not loss.applies(actor):
        return
    attention = model.get("override_config", {}).get("attn_implementation", "flash_attention_2")
    ranks = max(each.get("ulysses_sequence_parallel_size", 1) for each in (actor, actor.get("fsdp_config", {})))
    if ranks > 1 and attention in ("eager", "sdpa", "flex_attention"):
        raise ConfigError(
            f"actor_rollout_ref.model.override_config.attn_implementation={attention}: it must be flash attention (on "
            f"a CPU packed_cpu) with {_PREFIX}ulysses_sequence_parallel_size={ranks}; verl exchanges heads around no "
            "other"
        )
    if actor.entropy_top_scope == "micro_batch" or actor.entropy_top_source != "old_policy":
        return
    correction = config.algorithm.get("rollout_correction") or {}
    for key, value, keeps_none in (
        ("algorithm.rollout_correction.bypass_mode", correction.get("bypass_mode", False), True),
        ("trainer.use_v1", config.trainer.get("use_v1", True), False),
    ):
        if value == keeps_none:
            raise ConfigError(
                f"{_PREFIX}entropy_top_source=old_policy: it must be prepass with {key}={str(value).lower()}, which "
                "keeps no entropies of the old policy"
            )


def _check(name: str, value: Any, rule: Any) -> None:
    if not rule.holds(value):
        text = "null" if value is None else value
        raise ConfigError(f"{_PREFIX}{name}={text}: it must be {rule.allowed}")
