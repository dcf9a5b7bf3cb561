"""Runs in each of two processes of `accelerate launch`: assertions, and the steps that test_ranks.py compares.

accelerate launch two_ranks.py MODEL OUTPUT
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from entropy_rl.integrations.trl import EntropyGRPOTrainer
from entropy_rl.report.rollouts import read_rollouts
from grpo import (
    LOSS_TYPES,
    MINI_BATCH,
    assert_same_step,
    make_batch,
    make_trainer,
    optimizer_step,
    rows_of,
    spoil,
)

AS_TRL = {"entropy_top_rule": "quantile", "entropy_top_ranks": "global", "entropy_top_normalize": "response"}

# Dual-token constraints: the tokens that were not selected train too, with their own clip range and KL coefficient.
DUAL = {"entropy_rest_weight": 1.0, "entropy_rest_clip_ratio_low": 0.1, "entropy_rest_clip_ratio_high": 0.3}
DUAL |= {"entropy_rest_kl_loss_coef": 0.1, "beta": 0.05}

# Settings of steps that do not depend on the number of ranks.
STEPS: list[dict[str, Any]] = [
    *({"loss_type": loss_type} for loss_type in LOSS_TYPES),
    *(
        {"entropy_top_rule": rule, "loss_type": loss_type}
        for rule in ("threshold", "quantile")
        for loss_type in ("dapo", "grpo", "bnpo")
    ),
    {"loss_type": "bnpo", "entropy_top_normalize": "response"},
    {"loss_type": "bnpo", "beta": 0.1},
    {"loss_type": "dr_grpo", "entropy_coef": 0.1},
    {"loss_type": "bnpo", "use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.1},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"entropy_top_score": "surprisal"},
    {"entropy_top_score": "random"},
    {"entropy_top_score": "random", "loss_type": "grpo", "entropy_top_rule": "quantile"},
    {"entropy_top_score": f"{__file__}:entropy_times_advantage"},
    {"entropy_rest_weight": 0.3},
    {"entropy_rest_weight": 0.3, "loss_type": "grpo"},
    {"entropy_rest_weight": 0.3, "loss_type": "bnpo", "token_weight": f"{__file__}:only_high_entropies"},
    {"entropy_veto_probability": 0.2, "entropy_veto_entropy": 4.07, "entropy_rest_weight": 1.0},
    *({"loss_type": loss_type, **DUAL} for loss_type in ("dapo", "grpo", "bnpo")),
    {"entropy_top_scope": "sequence", "entropy_top_ranks": "local"},
    {"entropy_top_scope": "sequence", "entropy_top_ranks": "local", "entropy_top_rule": "quantile"},
    {"entropy_top_scope": "sequence", "entropy_top_ranks": "local", "loss_type": "grpo"},
]
# Settings of a step in which each rank selects from its own tokens. It is the mean of the steps of the ranks by
# themselves.
APART = {"entropy_top_scope": "mini_batch", "loss_type": "bnpo", "beta": 0.1, "entropy_coef": 0.1}


def entropy_times_advantage(log_prob: Tensor, entropy: Tensor, advantages: Tensor, response_mask: Tensor) -> Tensor:
    """A score of a user's."""
    return entropy * advantages.abs()


def only_high_entropies(log_prob: Tensor, entropy: Tensor, advantages: Tensor, response_mask: Tensor) -> Tensor:
    """Weights of a user's; some are 0."""
    return (entropy - 4).clamp(min=0)


class EmptyRankTrainer(EntropyGRPOTrainer):
    """Masks all completions of the last rank, as mask_truncated_completions can."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.accelerator.process_index == self.accelerator.num_processes - 1:
            output["completion_mask"] = torch.zeros_like(output["completion_mask"])
        return output


def main(model: Path, output: Path) -> None:
    torch.set_num_threads(1)

    def trainer(trainer_class: type = EntropyGRPOTrainer, **settings: Any) -> GRPOTrainer:
        return make_trainer(model, output / "run", trainer_class, **settings)

    rank, processes = trainer().accelerator.process_index, trainer().accelerator.num_processes
    assert processes == 2, processes
    unsplit = make_batch()
    batch = rows_of(unsplit, slice(rank * 4, rank * 4 + 4))
    check_steps_of_trl(trainer, batch)
    steps = compared_steps(trainer, batch)
    check_empty_rank(trainer, batch, int(unsplit["completion_mask"][:4].sum()), rank)
    check_no_tokens(trainer, batch)
    trained = trainer(
        EmptyRankTrainer,
        entropy_top_ratio=0.2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=2,
        rollout_data_dir=str(output / "rollouts"),
        **MINI_BATCH,
    )
    trained.train()
    logs = [line for line in trained.state.log_history if "entropy_token_ratio" in line]
    if rank == 0:
        written = [(row.step, len(row.tokens), sum(row.selected or [])) for row in read_rollouts(output / "rollouts")]
        torch.save({"steps": steps, "logs": logs, "written": written}, output / "results.pt")
    trained.accelerator.end_training()


Trainer = Callable[..., GRPOTrainer]


def check_steps_of_trl(trainer: Trainer, batch: dict[str, Tensor]) -> None:
    """With TRL's rule and LM head, our steps have the bits of TRL's."""
    for loss_type in LOSS_TYPES:
        shared = {"loss_type": loss_type, "per_device_train_batch_size": 4}
        theirs = optimizer_step(trainer(GRPOTrainer, top_entropy_quantile=0.2, **shared), batch)
        same_head = trainer(entropy_top_ratio=0.2, entropy_lm_head="trl", **AS_TRL, **shared)
        assert_same_step(optimizer_step(same_head, batch), theirs, rtol=0, atol=0)
        # test_loss.py compares the gradients of the two heads, in one process.
        ours = optimizer_step(trainer(entropy_top_ratio=0.2, **AS_TRL, **shared), batch)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)


def compared_steps(trainer: Trainer, batch: dict[str, Tensor]) -> dict[tuple[str, int], Any]:
    """The steps that test_ranks.py compares, by settings and number of micro-batches."""
    steps = {}
    for n in (1, 2):
        split = {"gradient_accumulation_steps": n, "per_device_train_batch_size": 4 // n}
        for settings in STEPS:
            some = trainer(entropy_top_ratio=0.2, **split, **MINI_BATCH | settings)
            steps[str(settings), n] = averaged(some, optimizer_step(some, batch, n))
        some = trainer(entropy_top_ratio=0.2, **split, **APART)
        steps["apart", n] = averaged(some, optimizer_step(some, batch, n))
    return steps


def check_empty_rank(trainer: Trainer, batch: dict[str, Tensor], tokens: int, rank: int) -> None:
    """A rank without completion tokens takes part in every collective, and the other rank learns. `tokens` are its."""
    empty = dict(batch, completion_mask=batch["completion_mask"] * (rank == 0))
    empty["num_items_in_batch"] = torch.tensor(tokens)
    for scope in ("micro_batch", "mini_batch"):
        for ranks in ("local", "global"):
            some = trainer(
                entropy_top_ratio=0.2, entropy_top_scope=scope, entropy_top_ranks=ranks, per_device_train_batch_size=4
            )
            loss, gradients, metrics = averaged(some, optimizer_step(some, empty))
            assert loss.isfinite() and any(gradient.any() for gradient in gradients.values())
            assert 0.15 < metrics["entropy_token_ratio"][0] < 0.25, metrics
            # NaN on one rank reaches the loss of all, and no rank waits.
            if rank == 1:
                spoil(some.model, int(batch["completion_ids"][0, 0]))
            loss, _, metrics = averaged(some, optimizer_step(some, batch))
            assert loss.isnan() and 0.15 < metrics["entropy_token_ratio"][0] < 0.25, metrics


def check_no_tokens(trainer: Trainer, batch: dict[str, Tensor]) -> None:
    """Without completion tokens on any rank, loss and gradients are 0."""
    nothing = dict(batch, completion_mask=torch.zeros_like(batch["completion_mask"]))
    nothing["num_items_in_batch"] = torch.tensor(0)
    for loss_type in LOSS_TYPES:
        some = trainer(entropy_top_ratio=0.2, loss_type=loss_type, per_device_train_batch_size=4, **MINI_BATCH)
        loss, gradients, _ = averaged(some, optimizer_step(some, nothing))
        assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


def averaged(trainer: GRPOTrainer, step: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, list[float]]]:
    """The step with loss and gradients averaged over the ranks, as data parallelism does."""
    loss, gradients, metrics = step
    loss = trainer.accelerator.reduce(loss, reduction="mean")
    return loss, {name: trainer.accelerator.reduce(g, reduction="mean") for name, g in gradients.items()}, metrics


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
