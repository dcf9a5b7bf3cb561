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
from grpo import make_batch, make_trainer, optimizer_step

AS_TRL = {"entropy_top_rule": "quantile", "entropy_top_ranks": "global", "entropy_top_normalize": "response"}
WHOLE_STEP = {"entropy_top_scope": "mini_batch", "entropy_top_ranks": "global"}


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
    batch = {name: value[rank * 4 :][:4] if value.ndim else value for name, value in whole.items()}

    for loss_type in ("dapo", "grpo"):
        shared = {"loss_type": loss_type, "per_device_train_batch_size": 4}
        theirs = optimizer_step(trainer(GRPOTrainer, top_entropy_quantile=0.2, **shared), batch)
        ours = optimizer_step(trainer(entropy_top_ratio=0.2, **AS_TRL, **shared), batch)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
        for name, gradient in theirs[1].items():
            torch.testing.assert_close(ours[1][name], gradient, rtol=1e-6, atol=1e-6)

    steps = {}
    for rule in ("topk", "threshold", "quantile"):
        for loss_type in ("dapo", "grpo", "cispo"):
            for n in (1, 2):
                some = trainer(
                    entropy_top_ratio=0.2,
                    entropy_top_rule=rule,
                    loss_type=loss_type,
                    gradient_accumulation_steps=n,
                    per_device_train_batch_size=4 // n,
                    **WHOLE_STEP,
                )
                steps[rule, loss_type, n] = averaged(some, optimizer_step(some, batch, n))

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
