"""An update of verl's actor, as contenders of bench_llm_step: FSDP2 with one rank, in a process of its own.

What this package changes in verl, and the configuration that verl reads, hold for a whole process.
"""

import os
import socket
from functools import cache
from typing import Any

import torch
from torch import Tensor

MODEL = "actor_rollout_ref.model"
ACTOR = "actor_rollout_ref.actor"
VERLS_KERNELS = (f"{ACTOR}.entropy_top_kernel=verl",)


def _join_group_of_one() -> None:
    """What torchrun sets for a single process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ |= address | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "RAY_LOCAL_WORLD_SIZE": "1"}


@cache
def _worker(model: str, device: str, sequences: int, *overrides: str) -> Any:
    """verl's actor. With `device` "cpu" it runs on this package's platform for tests."""
    _join_group_of_one()
    # An installed package's entry point loads the plugin; this one need not be installed.
    modules = ["cpu", "plugin"] if device == "cpu" else ["plugin"]
    os.environ["VERL_USE_EXTERNAL_MODULES"] = ",".join(f"entropy_rl.integrations.verl.{name}" for name in modules)
    import verl  # noqa: F401  # loads those modules
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf
    from verl.models.transformers import monkey_patch
    from verl.workers.engine_workers import ActorRolloutRefWorker

    monkey_patch.is_trl_available = lambda: False  # verl 0.9 then imports a class that TRL 1.16 does not have
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            overrides=[
                *(["+entropy_rl=cpu"] if device == "cpu" else []),
                f"{MODEL}.path={model}",
                f"++{MODEL}.override_config.attn_implementation=sdpa",
                f"{MODEL}.use_remove_padding=false",
                f"{MODEL}.enable_gradient_checkpointing=false",
                f"{ACTOR}.strategy=fsdp2",
                f"{ACTOR}.fsdp_config.model_dtype=fp32",
                f"{ACTOR}.ppo_micro_batch_size_per_gpu={sequences}",
                f"{ACTOR}.optim.lr=1e-6",
                "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
                *overrides,
            ],
        )
    OmegaConf.resolve(config)
    worker = ActorRolloutRefWorker(config=config.actor_rollout_ref, role="actor")
    worker.init_model()
    return worker


def _batch(sequences: int, fused: bool, given: dict[str, Tensor]) -> Any:
    """The batch of TRL's form as verl's trainer passes it to an engine."""
    from verl.utils import tensordict_utils as tu

    lengths = given["completion_mask"].sum(1).tolist()

    def rows(name: str) -> list[Tensor]:
        return [row[:length] for row, length in zip(given[name], lengths, strict=True)]

    def nested(values: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    prompts, responses = list(given["prompt_ids"]), rows("completion_ids")
    tokens = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    mask = nested([row.long() for row in rows("completion_mask")])
    advantages = [value.expand(length) for value, length in zip(given["advantages"], lengths, strict=True)]
    fields = {
        "input_ids": nested(tokens),
        "position_ids": nested([torch.arange(len(row), device=row.device) for row in tokens]),
        "prompts": nested(prompts),
        "responses": nested(responses),
        "response_mask": mask,
        "loss_mask": mask.clone(),
        "old_log_probs": nested(rows("old_per_token_logps")),
        "entropy": nested(rows("old_entropy")),
        "advantages": nested(advantages),
    }
    others = {
        "temperature": 1.0,
        "global_batch_size": sequences,
        "micro_batch_size_per_gpu": sequences,
        "use_dynamic_bsz": False,
        "use_remove_padding": False,
        "use_fused_kernels": fused,
        "calculate_entropy": False,
    }
    return tu.get_tensordict(fields, non_tensor_dict=others)


def step(model: str, overrides: tuple[str, ...], **given: Tensor) -> None:
    """One update of verl's actor: forward, loss, backward, clipping and AdamW.

    Args:
        model: a directory.
        overrides: of verl's configuration.
        given: the inputs of bench_llm_step.
    """
    sequences, device = len(given["prompt_ids"]), given["prompt_ids"].device.type
    worker = _worker(model, device, sequences, *overrides)
    engine = worker.actor.engine
    batch = _batch(sequences, f"{MODEL}.use_fused_kernels=true" in overrides, given)
    with engine.train_mode():
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(batch, worker.loss_fn)
        engine.optimizer_step()
    engine.optimizer_zero_grad()  # the next step begins without gradients
