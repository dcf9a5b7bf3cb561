"""Shared by the tests of the TRL integration: trainers on a tiny model, batches, and optimizer steps."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from entropy_rl.integrations.trl import EntropyGRPOConfig, EntropyGRPOTrainer

LOSS_TYPES = ["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"]
MINI_BATCH = {"entropy_top_scope": "mini_batch", "entropy_top_ranks": "global"}
# The options that select the tokens of TRL's top_entropy_quantile=0.2.
TRLS_RULE = {
    "entropy_top_ratio": 0.2,
    "entropy_top_rule": "quantile",
    "entropy_top_ranks": "global",
    "entropy_top_normalize": "response",
}
PROMPTS = [f"{a} + {a * a} =" for a in range(16)]
SETTINGS = {
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 12,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def share_of_digits(completions: list[str], **_: Any) -> list[float]:
    """A reward that a random model sometimes gets, so that there is a gradient."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def make_trainer(
    model: Path | PreTrainedModel,
    output: Path,
    trainer_class: type = EntropyGRPOTrainer,
    *,
    peft_config: Any = None,
    others: dict[str, Any] | None = None,
    **settings: Any,
) -> GRPOTrainer:
    """`others` are arguments of the trainer, `settings` those of its configuration."""
    config_class = EntropyGRPOConfig if issubclass(trainer_class, EntropyGRPOTrainer) else GRPOConfig
    arguments = {"reward_funcs": share_of_digits, "train_dataset": Dataset.from_dict({"prompt": PROMPTS})}
    return trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) if isinstance(model, Path) else model,
        args=config_class(output_dir=str(output), **SETTINGS | settings),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:2]}),
        peft_config=peft_config,
        **arguments | (others or {}),
    )


def log_of(trainer: GRPOTrainer) -> list[list[float]]:
    """(loss, gradient norm, entropy) of each step."""
    names = ("loss", "grad_norm", "entropy")
    return [[line[name] for name in names] for line in trainer.state.log_history if "loss" in line]


def make_batch(rows: int = 8, *, seed: int = 0, prompt: int = 5, completion: int = 12) -> dict[str, Tensor]:
    """A scored generation batch as TRL holds it: prompts padded on the left, completions on the right."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    completion_mask = (torch.arange(completion) < integers(1, completion + 1, rows, 1)).int()
    return {
        "prompt_ids": integers(2, 97, rows, prompt),
        "prompt_mask": (torch.arange(prompt) >= integers(0, prompt, rows, 1)).int(),
        "completion_ids": integers(2, 97, rows, completion),
        "completion_mask": completion_mask,
        "advantages": normal(rows),
        "num_items_in_batch": completion_mask.sum(),
        # So far from the tiny model's policy that some ratios are below the clipping range and some above.
        "old_per_token_logps": -5 + 2 * normal(rows, completion),
        "ref_per_token_logps": -5 + 2 * normal(rows, completion),
    }


def without(batch: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in names}


def rows_of(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Some rows of a batch. `num_items_in_batch` still counts all rows."""
    return {name: value[rows] if value.ndim else value for name, value in batch.items()}


def spoil(model: PreTrainedModel, token: int) -> None:
    """Makes the embedding of a token NaN, and with it the sequences that contain the token."""

    def put_nan(_: nn.Module, arguments: tuple[Tensor, ...], embeddings: Tensor) -> Tensor:
        return embeddings.masked_fill((arguments[0] == token)[..., None], torch.nan)

    model.model.embed_tokens.register_forward_hook(put_nan)


def optimizer_step(
    trainer: GRPOTrainer, batch: dict[str, Tensor], micro_batches: int = 1
) -> tuple[Tensor, dict[str, Tensor], dict[str, list[float]]]:
    """Loss, gradients and metrics of `batch` in `micro_batches` micro-batches. Nothing is updated.

    If there are more than `gradient_accumulation_steps`, the results are sums over several optimizer steps.
    """
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._step = 0
    trainer._buffered_inputs = split_tensor_dict(batch, micro_batches)
    trainer.current_gradient_accumulation_steps = window = trainer.args.gradient_accumulation_steps
    loss = torch.zeros(())
    for number, inputs in enumerate(trainer._buffered_inputs):
        trainer.accelerator.gradient_state._set_sync_gradients(number % window == window - 1)
        with trainer.compute_loss_context_manager():
            micro_loss = trainer.compute_loss(trainer.model, inputs)
        micro_loss.backward()
        loss += micro_loss.detach()
        trainer._step += 1
    gradients = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    return loss, gradients, dict(trainer._metrics["train"])


def assert_same_step(actual: Any, expected: Any, **tolerance: float) -> None:
    torch.testing.assert_close(actual[0], expected[0], **tolerance)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            actual[1][name], gradient, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_metrics(actual: Any, expected: Any) -> None:
    """Compares the metrics of two steps as TRL logs them: means without NaN."""
    assert actual[2].keys() == expected[2].keys()
    for name in expected[2]:
        one, other = (torch.tensor(step[2][name]).nanmean().item() for step in (actual, expected))
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6, nan_ok=True), name


def largest(step: Any) -> float:
    return max(gradient.abs().max().item() for gradient in step[1].values())


def launch(script: Path, *arguments: str | Path, processes: int) -> None:
    """Runs a script; with more than one process, under `accelerate launch`.

    Fails with what it printed; a hang is a failure.
    """
    folder = Path(__file__).parent
    search_path = [str(folder), str(folder.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search_path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable]
    if processes > 1:
        # With --cpu, accelerate starts one process. --multi_gpu starts all, and the variable keeps them on the CPU.
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", "0"]
        environment["ACCELERATE_USE_CPU"] = "true"
    run = subprocess.run(
        [*command, *map(str, (script, *arguments))],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stdout[-8000:]
