"""Configurations, batches and selections of optimizer steps, without a model."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from entropy_rl.selection import StepSelection, TokenSelection

SEED = 5


def configuration(**changes: Any) -> Any:
    """An actor configuration with verl's keys; `changes` are keys without entropy_top_, the loss mode, the clip ratios,
    those of the KL penalty, and the tables and keys of the weights."""
    values = {"ratio": 0.3, "rule": "topk", "scope": "mini_batch", "ranks": "global", "normalize": "selected"}
    loss = {"loss_mode": "vanilla", "clip_cov_ratio": 0.2, "clip_cov_lb": -0.5, "clip_cov_ub": 1.5}
    loss |= {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.1, "dro_beta": None}
    loss |= {name: changes.pop(name) for name in ("loss_mode",) if name in changes}
    actor = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0}
    actor |= {"tau_pos": 1.0, "tau_neg": 1.05, "policy_loss": Keys(loss)}
    actor |= {"use_kl_loss": False, "kl_loss_coef": 0.001, "kl_loss_type": "low_var_kl"}
    own = (*actor, "entropy_rest", "entropy_veto", "token_weight")
    actor |= {name: changes.pop(name) for name in own if name in changes}
    return Keys(actor | {f"entropy_top_{name}": value for name, value in (values | changes).items()})


class Keys(SimpleNamespace):
    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(**values)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def make_batch(seed: int = 0, rows: int = 6, length: int = 20) -> dict[str, Tensor]:
    """A rank's share of a mini-batch, with ties among the entropies. Rows 2 and 3 have no response tokens."""
    generator = torch.Generator().manual_seed(seed)
    entropy, old, noise, advantages = torch.randn(4, rows, length, generator=generator)
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=generator)
    lengths[2:4] = 0
    return {
        "log_prob": -old.abs(),
        "entropy": (4 * entropy.abs()).round() / 4,
        "old_log_prob": -old.abs() + 0.3 * noise,
        "advantages": advantages,
        "response_mask": torch.arange(length) < lengths[:, None],
    }


def micro_batches(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    parts = zip(*(value.split(size) for value in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


def select(config: Any, batch: dict[str, Tensor], size: int) -> tuple[StepSelection, list[TokenSelection | None]]:
    """The selection of a step in micro-batches of so many rows, and the part of each."""
    parts = micro_batches(batch, size)
    step = StepSelection(config)
    step.count_tokens(torch.stack([part["response_mask"].sum() for part in parts]), seed=SEED)
    tokens: list[TokenSelection | None] = [None] * len(parts)
    if step.before_step:
        chosen = step.select_mini_batch(**batch, seed=SEED)
        tokens = [*chosen.split([len(part["entropy"]) for part in parts])]
    return step, tokens
