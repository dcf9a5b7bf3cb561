"""One of the processes of `accelerate launch`: what must hold on each, and what test_ranks.py compares.

accelerate launch two_ranks.py MODEL OUTPUT
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from entropy_rl.integrations.trl import EntropyGRPOTrainer
from grpo import (
    LOSS_TYPES,
    WHOLE_STEP,
    assert_same_step,
    make_batch,
    make_trainer,
    optimizer_step,
    rows_of,
    spoil,
)

AS_TRL = {"entropy_top_rule": "quantile", "entropy_top_ranks": "global", "entropy_top_normalize": "response"}

# Of steps that do not depend on the number of ranks.
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
]
# Of a step in which each rank's tokens are apart: it is the mean of those that the ranks would have alone.
APART = {"entropy_top_scope": "mini_batch", "loss_type": "bnpo", "beta": 0.1, "entropy_coef": 0.1}


class EmptyRankTrainer(EntropyGRPOTrainer):
    """The last rank's completions are all masked out, as mask_truncated_completions may do."""

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
    whole = make_batch()
    batch = rows_of(whole, slice(rank * 4, rank * 4 + 4))

    for loss_type in LOSS_TYPES:
        shared = {"loss_type": loss_type, "per_device_train_batch_size": 4}
        theirs = optimizer_step(trainer(GRPOTrainer, top_entropy_quantile=0.2, **shared), batch)
        # That the heads have the same gradients, up to rounding, is a matter of one process.
        same_head = trainer(entropy_top_ratio=0.2, entropy_lm_head="trl", **AS_TRL, **shared)
        assert_same_step(optimizer_step(same_head, batch), theirs, rtol=0, atol=0)
        ours = optimizer_step(trainer(entropy_top_ratio=0.2, **AS_TRL, **shared), batch)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)

    steps = {}
    for n in (1, 2):
        split = {"gradient_accumulation_steps": n, "per_device_train_batch_size": 4 // n}
        for settings in STEPS:
            some = trainer(entropy_top_ratio=0.2, **settings, **split, **WHOLE_STEP)
            steps[str(settings), n] = averaged(some, optimizer_step(some, batch, n))
        some = trainer(entropy_top_ratio=0.2, **split, **APART)
        steps["apart", n] = averaged(some, optimizer_step(some, batch, n))

    # A rank without completion tokens takes part in everything, and the others learn.
    empty = dict(batch, completion_mask=batch["completion_mask"] * (rank == 0))
    empty["num_items_in_batch"] = whole["completion_mask"][:4].sum()
    for scope in ("micro_batch", "mini_batch"):
        for ranks in ("local", "global"):
            some = trainer(
                entropy_top_ratio=0.2, entropy_top_scope=scope, entropy_top_ranks=ranks, per_device_train_batch_size=4
            )
            loss, gradients, metrics = averaged(some, optimizer_step(some, empty))
            assert loss.isfinite() and any(gradient.any() for gradient in gradients.values())
            assert 0.15 < metrics["entropy_token_ratio"][0] < 0.25, metrics
            # NaN on a rank is seen on all, and nobody waits for it.
            if rank == 1:
                spoil(some.model, int(batch["completion_ids"][0, 0]))
            loss, _, metrics = averaged(some, optimizer_step(some, batch))
            assert loss.isnan() and 0.15 < metrics["entropy_token_ratio"][0] < 0.25, metrics

    nothing = dict(batch, completion_mask=torch.zeros_like(batch["completion_mask"]))
    nothing["num_items_in_batch"] = torch.tensor(0)
    for loss_type in LOSS_TYPES:
        some = trainer(entropy_top_ratio=0.2, loss_type=loss_type, per_device_train_batch_size=4, **WHOLE_STEP)
        loss, gradients, _ = averaged(some, optimizer_step(some, nothing))
        assert loss == 0 and not any(gradient.any() for gradient in gradients.values())

    trained = trainer(
        EmptyRankTrainer,
        entropy_top_ratio=0.2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=2,
        **WHOLE_STEP,
    )
    trained.train()
    logs = [line for line in trained.state.log_history if "entropy_token_ratio" in line]
    if rank == 0:
        torch.save({"steps": steps, "logs": logs}, output / "results.pt")


def averaged(trainer: GRPOTrainer, step: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, list[float]]]:
    """As data parallelism averages loss and gradients over the ranks."""
    loss, gradients, metrics = step
    loss = trainer.accelerator.reduce(loss, reduction="mean")
    return loss, {name: trainer.accelerator.reduce(g, reduction="mean") for name, g in gradients.items()}, metrics


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
