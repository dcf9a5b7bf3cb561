"""Computes gradients and metrics of one optimizer step of verl's FSDP2 engine for each of CASES. Run by torchrun:

torchrun --nproc-per-node RANKS optimizer_step.py MODELS OUTPUT [CASE...]

MODELS/tied and MODELS/untied are models whose LM head shares, or does not share, the weights of the embeddings;
MODELS/four_heads has four attention heads and a tied LM head. MODELS/adapter is a LoRA adapter for MODELS/untied that
trains the LM head too. MODELS/experts is a mixture of experts. MODELS/images takes images.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from vision_model import FRAMES, IMAGE, MERGE, PATCH, VISION_END, VISION_START

ROWS = 8
TEMPERATURE = 0.8
SEED = 3

MINI_BATCH = {"actor.entropy_top_scope": "mini_batch", "actor.entropy_top_ranks": "global"}
OLD_POLICY = MINI_BATCH | {"actor.entropy_top_source": "old_policy"}
SEQUENCE = {"actor.entropy_top_scope": "sequence"}
VETO = {"actor.entropy_veto.probability": 0.02, "actor.entropy_veto.entropy": 3.701, "actor.entropy_top_ratio": 1.0}
TOKEN_WEIGHT = {"actor.token_weight": f"{__file__}:only_high_entropies", "actor.entropy_rest.weight": 0.5}
# Dual-token constraints: the tokens that were not selected train too, with their own clip range and KL coefficient.
DUAL = {"actor.entropy_rest.weight": 1.0, "actor.entropy_rest.clip_ratio_low": 0.1, "actor.clip_ratio_high": 0.5}
DUAL |= {"actor.entropy_rest.clip_ratio_high": 0.2, "actor.entropy_rest.kl_loss_coef": 0.3}
DUAL |= {"actor.use_kl_loss": True, "actor.kl_loss_coef": 0.1, "actor.kl_loss_type": "k2"}
FUSED = {"model.use_fused_kernels": True}

REMOVE_PADDING = {"model.use_remove_padding": True}
VERLS_KERNEL = {"actor.entropy_top_kernel": "verl"}

# The loss modes in which the loss of a token depends on that token only, with the other keys that a mode needs.
TOKEN_MODES: dict[str, dict[str, Any]] = {mode: {} for mode in ("gpg", "dppo_tv", "dppo_kl", "sapo", "cispo")} | {
    "dro": {"actor.policy_loss.dro_beta": 0.1}
}

# The loss modes that choose tokens by covariance, with ratios that choose some of each row.
COVARIANCE_MODES: dict[str, dict[str, Any]] = {
    "clip_cov": {"actor.policy_loss.clip_cov_ratio": 0.1, "actor.policy_loss.clip_cov_lb": 0.0},
    "kl_cov": {"actor.policy_loss.kl_cov_ratio": 0.1},
}

# For each case the overrides under actor_rollout_ref., and the numbers of micro-batches that a rank runs (0: verl's
# dynamic batch size decides). Names that end with "verl" run verl's functions.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "kernel-verl": (VERLS_KERNEL, (2, 0)),
    "remove-padding-verl": (REMOVE_PADDING | VERLS_KERNEL, (2,)),
    "vanilla": ({}, (1, 2, 4, 0)),
    "gpg": ({"actor.policy_loss.loss_mode": "gpg"}, (1, 2, 4)),
    "remove-padding": (REMOVE_PADDING, (2, 0)),
    "normalize-response": ({"actor.entropy_top_normalize": "response"}, (2,)),
    "threshold": ({"actor.entropy_top_rule": "threshold"}, (2,)),
    "seq-mean-token-sum": ({"actor.loss_agg_mode": "seq-mean-token-sum"}, (2,)),
    "weights": ({"weights": True}, (2,)),
    "bonus": ({"actor.entropy_coeff": 0.01}, (2,)),
    "kl": ({"actor.use_kl_loss": True, "actor.kl_loss_coef": 0.1, "actor.kl_loss_type": "k2"}, (2,)),
    "global": ({"actor.entropy_top_ranks": "global"}, (2,)),
    "mini-batch": (MINI_BATCH, (1, 2, 4, 0)),
    **{
        f"mini-batch-{mode}": (MINI_BATCH | {"actor.policy_loss.loss_mode": mode} | others, (1, 2, 4))
        for mode, others in (TOKEN_MODES | COVARIANCE_MODES).items()
    },
    "kl_cov": ({"actor.policy_loss.loss_mode": "kl_cov"} | COVARIANCE_MODES["kl_cov"], (2,)),
    "experts": ({"model": "experts"}, (2,)),
    "mini-batch-experts": (MINI_BATCH | REMOVE_PADDING | {"model": "experts"}, (1, 4)),
    "images": ({"model": "images"}, (1, 4)),
    "mini-batch-images": (MINI_BATCH | {"model": "images"}, (2,)),
    "fused-images": (FUSED | OLD_POLICY | {"model": "images"}, (2,)),
    "mini-batch-weights": (MINI_BATCH | {"weights": True}, (1, 4)),
    "mini-batch-remove-padding": (MINI_BATCH | REMOVE_PADDING | {"weights": True}, (2, 0)),
    "mini-batch-local": (MINI_BATCH | {"actor.entropy_top_ranks": "local"}, (2,)),
    "sequence": (SEQUENCE, (1, 2, 4, 0)),
    "sequence-remove-padding": (SEQUENCE | REMOVE_PADDING, (2, 0)),
    "sequence-quantile": (SEQUENCE | {"actor.entropy_top_rule": "quantile"}, (1, 4)),
    "surprisal": ({"actor.entropy_top_score": "surprisal"}, (2,)),
    "random": ({"actor.entropy_top_score": "random"}, (2,)),
    "mini-batch-surprisal": (MINI_BATCH | {"actor.entropy_top_score": "surprisal"}, (1, 4)),
    "mini-batch-random": (MINI_BATCH | {"actor.entropy_top_score": "random"}, (1, 2, 4)),
    "mini-batch-function": (MINI_BATCH | {"actor.entropy_top_score": f"{__file__}:entropy_times_advantage"}, (1, 4)),
    "fused-random": (FUSED | OLD_POLICY | {"actor.entropy_top_score": "random"}, (2,)),
    "rest": ({"actor.entropy_rest.weight": 0.3}, (2,)),
    "veto": (VETO, (2,)),
    "mini-batch-rest": (MINI_BATCH | {"actor.entropy_rest.weight": 0.3, "weights": True}, (1, 2, 4)),
    "dual": (DUAL, (2,)),
    "mini-batch-dual": (MINI_BATCH | DUAL, (1, 2, 4)),
    "sequence-dual": (SEQUENCE | DUAL, (1, 4)),
    "mini-batch-veto": (MINI_BATCH | VETO, (1, 4)),
    "mini-batch-token-weight": (MINI_BATCH | TOKEN_WEIGHT, (1, 2, 4, 0)),
    "mini-batch-sapo-token-weight": (MINI_BATCH | TOKEN_WEIGHT | {"actor.policy_loss.loss_mode": "sapo"}, (1, 4)),
    "sequence-rest": (SEQUENCE | {"actor.entropy_rest.weight": 0.3}, (2,)),
    "fused-token-weight": (FUSED | OLD_POLICY | TOKEN_WEIGHT, (2,)),
    "old-policy": (OLD_POLICY, (1, 2, 4)),
    "fused": (FUSED, (2,)),
    "fused-triton": (FUSED | {"model.fused_kernel_options.impl_backend": "triton"}, (2,)),
    "fused-mini-batch": (FUSED | MINI_BATCH, (2,)),
    "fused-sequence": (FUSED | SEQUENCE | {"actor.entropy_top_source": "old_policy"}, (2,)),
    "fused-sequence-remove-padding": (
        FUSED | SEQUENCE | REMOVE_PADDING | {"actor.entropy_top_source": "old_policy"},
        (2, 0),
    ),
    "fused-bonus": (FUSED | OLD_POLICY | {"actor.entropy_coeff": 0.01}, (2,)),
    "fused-old-policy": (FUSED | OLD_POLICY, (1, 2, 4)),
    **{
        f"fused-old-policy-{mode}": (FUSED | OLD_POLICY | {"actor.policy_loss.loss_mode": mode} | others, (1, 4))
        for mode, others in COVARIANCE_MODES.items()
    },
    "fused-remove-padding": (FUSED | OLD_POLICY | REMOVE_PADDING, (2, 0)),
    # An LM head that FSDP2 shards separately.
    "fused-untied": (FUSED | {"model": "untied", "actor.entropy_coeff": 0.01}, (2,)),
    "fused-untied-old-policy": (FUSED | OLD_POLICY | {"model": "untied"}, (1, 2)),
}


def _ulysses(size: int) -> dict[str, Any]:
    """Sequence parallelism over `size` ranks."""
    return REMOVE_PADDING | {
        "actor.ulysses_sequence_parallel_size": size,
        "model.override_config.attn_implementation": "packed_cpu",
        "model": "tied" if size == 2 else "four_heads",
    }


# For four ranks: 2 of data times 2 of a sequence, or 4 of a sequence.
ULYSSES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "ulysses-2": (_ulysses(2), (2,)),
    "ulysses-2-random": (_ulysses(2) | MINI_BATCH | {"actor.entropy_top_score": "random"}, (2,)),
    "ulysses-2-clip_cov": (
        _ulysses(2) | MINI_BATCH | {"actor.policy_loss.loss_mode": "clip_cov"} | COVARIANCE_MODES["clip_cov"],
        (2,),
    ),
    "ulysses-2-fused": (_ulysses(2) | FUSED, (2,)),
    "ulysses-2-fused-bonus": (_ulysses(2) | FUSED | OLD_POLICY | {"actor.entropy_coeff": 0.01}, (2,)),
    "ulysses-2-fused-sequence": (_ulysses(2) | FUSED | SEQUENCE, (2,)),
    "ulysses-2-fused-untied": (_ulysses(2) | FUSED | OLD_POLICY | {"model": "untied"}, (2,)),
    "ulysses-2-fused-bucket": (
        # Padding to a multiple of 23, and then to one of the ranks.
        _ulysses(2)
        | FUSED
        | OLD_POLICY
        | {"actor.fsdp_config.pad_to_length": True, "actor.fsdp_config.pad_to_length_bucket": 23},
        (2,),
    ),
    "ulysses-4": (_ulysses(4) | MINI_BATCH, (2,)),
    "ulysses-4-fused": (_ulysses(4) | FUSED | MINI_BATCH, (1,)),
    "ulysses-4-fused-old-policy": (_ulysses(4) | FUSED | OLD_POLICY, (4, 0)),
}


# Two optimizer steps of a LoRA adapter on all tokens: with verl's own loss, and as the top 100 %.
_ALL = {"actor.entropy_top_ratio": 1.0}
_NONE = {"actor.entropy_top_ratio": "null"}
_LORA = {"model.lora_rank": 4}
_WITH_HEAD = {"model": "untied", "model.lora_rank": 4, "model.lora_adapter_path": "{models}/adapter"}
LORA: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "lora-verl": (_LORA | _NONE, (2,)),
    "lora": (_LORA | _ALL, (2,)),
    "lora-fused": (_LORA | _ALL | FUSED | MINI_BATCH, (2,)),
    "lora-head-verl": (_WITH_HEAD | _NONE, (2,)),
    "lora-head": (_WITH_HEAD | _ALL, (2,)),
    "lora-head-fused": (_WITH_HEAD | _ALL | FUSED | MINI_BATCH, (2,)),
}

# All tokens train: with this package installed, and with verl's own configuration.
NULL: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "null": ({"actor.entropy_top_ratio": "null"}, (2,)),
    "stock": (
        # Hydra deletes no key whose value is null.
        {"actor._target_": "verl.workers.config.FSDPActorConfig", "actor.token_weight": "unused"}
        | {
            f"~actor.entropy_top_{key}": None
            for key in ("ratio", "score", "rule", "scope", "source", "ranks", "normalize", "kernel")
        }
        | {f"~actor.{key}": None for key in ("entropy_rest", "entropy_veto", "token_weight")},
        (2,),
    ),
}


def entropy_times_advantage(log_prob: Any, entropy: Any, advantages: Any, response_mask: Any) -> Any:
    """A score of a user's."""
    return entropy * advantages.abs()


def only_high_entropies(log_prob: Any, entropy: Any, advantages: Any, response_mask: Any) -> Any:
    """Weights of a user's; some are 0."""
    return entropy * (entropy > 3.701)


def rows() -> list[dict[str, torch.Tensor]]:
    """Sequences of different lengths. Some tokens in the responses are not the policy's own."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(ROWS):
        prompt, response = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((2, 6), (12, 40)))
        tokens = torch.randint(2, 42, (prompt + response,), generator=generator)
        mask = torch.rand(response, generator=generator) < 0.9
        mask[0] = True
        result.append(
            {
                "prompt": tokens[:prompt],
                "response": tokens[prompt:],
                "mask": mask,
                "old_log_prob": -3 * torch.rand(response, generator=generator) - 1,
                "old_entropy": 3 + torch.rand(response, generator=generator),
                "ref_log_prob": -3 * torch.rand(response, generator=generator) - 1,
                "advantage": torch.randn((), generator=generator).expand(response).contiguous(),
                "weight": torch.rand(response, generator=generator) + 0.5,
            }
        )
    return result


def with_image(index: int, prompt: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A row's prompt after an image of four or of eight tokens; and the image, as its processor gives it."""
    grid = torch.tensor([[1, 4, 4 << index % 2]])  # in patches
    generator = torch.Generator().manual_seed(index)
    pixels = torch.randn(int(grid.prod()), 3 * FRAMES * PATCH**2, generator=generator)
    tokens = [VISION_START, *[IMAGE] * (len(pixels) // MERGE**2), VISION_END]
    return torch.cat([torch.tensor(tokens), prompt]), {"pixel_values": pixels, "image_grid_thw": grid}


def positions_with_image(length: int, grid: torch.Tensor) -> torch.Tensor:
    """[4, length]: places of the tokens of `with_image`, and their times, rows and columns in Qwen2-VL's rotation."""
    height, width = (int(patches) // MERGE for patches in grid[0, 1:])
    row, column = (
        values.flatten() for values in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    image = 1 + torch.stack([torch.zeros_like(row), row, column])
    rest = 1 + max(height, width) + torch.arange(length - 1 - height * width)
    rotation = torch.cat([torch.zeros(3, 1, dtype=torch.int64), image, rest.expand(3, -1)], 1)
    return torch.cat([torch.arange(length)[None], rotation])


def batch(indices: list[int], case: dict[str, Any], count: int) -> Any:
    """The rows as verl's trainer passes them to an engine, for `count` micro-batches."""
    from tensordict import NonTensorStack
    from verl.utils import tensordict_utils as tu

    part = [rows()[index] for index in indices]
    images: list[dict[str, torch.Tensor]] = []
    if directory(case) == "images":
        prompts, images = map(list, zip(*map(with_image, indices, (row["prompt"] for row in part)), strict=True))
        part = [row | {"prompt": prompt} for row, prompt in zip(part, prompts, strict=True)]

    def nested(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    tokens = [torch.cat([row["prompt"], row["response"]]) for row in part]
    fields = {
        "input_ids": nested(tokens),
        "position_ids": nested([torch.arange(len(ids)) for ids in tokens]),
        "prompts": nested([row["prompt"] for row in part]),
        "responses": nested([row["response"] for row in part]),
        "response_mask": nested([row["mask"].long() for row in part]),
        "loss_mask": nested([row["mask"].long() for row in part]),
        "old_log_probs": nested([row["old_log_prob"] for row in part]),
        "ref_log_prob": nested([row["ref_log_prob"] for row in part]),
        "entropy": nested([row["old_entropy"] for row in part]),
        "advantages": nested([row["advantage"] for row in part]),
        "row": torch.tensor(indices),
    }
    if case.get("weights"):
        fields["rollout_is_weights"] = nested([row["weight"] for row in part])
    if images:
        fields["position_ids"] = nested(
            [positions_with_image(len(ids), image["image_grid_thw"]) for ids, image in zip(tokens, images, strict=True)]
        )
        fields["multi_modal_inputs"] = NonTensorStack(*images)
    return tu.get_tensordict(
        fields,
        non_tensor_dict={
            "temperature": TEMPERATURE,
            "global_batch_size": ROWS,
            "micro_batch_size_per_gpu": len(indices) // max(1, count),
            "use_dynamic_bsz": count == 0,
            "max_token_len_per_gpu": 80 // case.get("actor.ulysses_sequence_parallel_size", 1),
            "use_remove_padding": case.get("model.use_remove_padding", False),
            "use_fused_kernels": case.get("model.use_fused_kernels", False),
            "calculate_entropy": False,
        },
    )


def qwen3_config() -> Any:
    """A configuration of the tiny models, for engines that build a model of their own."""
    from transformers import Qwen3Config

    return Qwen3Config(vocab_size=97, architectures=["Qwen3ForCausalLM"])


def directory(case: dict[str, Any]) -> str:
    return case.get("model", "tied")


def run(models: str, name: str) -> dict[Any, dict[str, Any]]:
    """The results of a step, for each number of micro-batches; with LoRA also of a second step."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf
    from transformers import Qwen3ForCausalLM
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.engine_workers import ActorRolloutRefWorker

    case, counts = (CASES | ULYSSES | LORA | NULL)[name]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            overrides=[
                "+entropy_rl=cpu",
                f"actor_rollout_ref.model.path={models}/{directory(case)}",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
                "actor_rollout_ref.actor.optim.lr=1e-2",
                "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
                "actor_rollout_ref.actor.entropy_top_ratio=0.2",
                *(
                    f"actor_rollout_ref.{key}={str(value).format(models=models)}"
                    for key, value in case.items()
                    if "." in key and value is not None
                ),
                *(f"~actor_rollout_ref.{key[1:]}" for key in case if key.startswith("~")),
            ],
        )
    OmegaConf.resolve(config)
    forward = Qwen3ForCausalLM.forward
    torch.manual_seed(0)  # of an adapter's first weights
    worker = ActorRolloutRefWorker(config=config.actor_rollout_ref, role="actor")
    worker.init_model()
    ours = hasattr(FSDPEngineWithLMHead.prepare_model_outputs, "__wrapped__")
    assert ours == (name not in NULL and not name.endswith("verl"))
    share = ROWS // worker.actor.engine.get_data_parallel_size()
    first = worker.actor.engine.get_data_parallel_rank() * share
    mine = list(range(first, first + share))
    try:
        results = {count: step(worker, batch(mine, case, count), update=name in LORA) for count in counts}
        if name in LORA:
            results["second"] = step(worker, batch(mine, case, *counts))
        return results
    finally:
        Qwen3ForCausalLM.forward = forward  # verl replaces it by a fused one in the whole process


def step(worker: Any, data: Any, *, update: bool = False) -> dict[str, Any]:
    """One optimizer step's gradients and metrics, with the rows of each micro-batch of each data-parallel rank.

    And how many tokens met the fused LM head in the forward that trains, in all micro-batches of a step.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from verl.utils import tensordict_utils as tu
    from verl.utils.metric import Metric
    from verl.workers.engine.fsdp import transformer_impl

    from entropy_rl.integrations.verl import engine as ours

    torch.manual_seed(SEED + dist.get_rank())  # the seed of the first rank counts
    engine = worker.actor.engine
    partition: list[list[int]] = []
    head_rows: list[int] = []
    prepare, op = transformer_impl.prepare_micro_batches, ours.linear_logprob_entropy

    def watch(*args: Any, **options: Any) -> Any:
        micro_batches, indices = prepare(*args, **options)
        partition[:] = [micro_batch["row"].tolist() for micro_batch in micro_batches]  # a prepass has the same
        return micro_batches, indices

    def count(hidden: Any, weight: Any, targets: Any, *, mask: Any = None, **options: Any) -> Any:
        if torch.is_grad_enabled():
            head_rows.append(targets.numel() if mask is None else int(mask.sum()))
        return op(hidden, weight, targets, mask=mask, **options)

    outputs = None
    if tu.get_non_tensor_data(data, "use_remove_padding", False):
        outputs = response_outputs(engine, data)
    transformer_impl.prepare_micro_batches, ours.linear_logprob_entropy = watch, count
    try:
        with engine.train_mode():
            engine.optimizer_zero_grad()
            output = engine.forward_backward_batch(data, worker.loss_fn)
            gradients = {
                name: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
                for name, p in engine.module.named_parameters()
                if p.grad is not None
            }
            if update:
                engine.optimizer_step()
    finally:
        transformer_impl.prepare_micro_batches, ours.linear_logprob_entropy = prepare, op
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (partition, head_rows, outputs, output["metrics"]))
    # As verl collects them: from the first rank of each sequence.
    metrics = [metrics for *_, metrics in everyone[:: engine.ulysses_sequence_parallel_size]]
    return {
        "gradients": gradients,
        "micro_batches": [partition for partition, *_ in everyone[:: engine.ulysses_sequence_parallel_size]],
        "head_rows": [rows for _, rows, *_ in everyone],  # of each rank and micro-batch
        "outputs": [outputs for *_, outputs, _ in everyone],
        "metrics": {
            name: Metric.aggregate_dp([each[name] for each in metrics])
            for name, value in metrics[0].items()
            if isinstance(value, Metric)
        },
    }


def response_outputs(engine: Any, data: Any) -> dict[int, tuple[torch.Tensor, ...]]:
    """Log-probs and entropies of the response tokens of each row, from a forward of the engine."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import response_from_nested

    data = data.clone(recurse=False)
    tu.assign_non_tensor(data, calculate_entropy=True)
    with engine.eval_mode():
        output = engine.forward_backward_batch(data, None, forward_only=True)["model_output"]
    nested = (response_from_nested(output[name], data["response_mask"]) for name in ("log_probs", "entropy"))
    return dict(zip(data["row"].tolist(), zip(*(values.unbind() for values in nested), strict=True), strict=True))


def main(models: str, output: str, *names: str) -> None:
    import torch.distributed as dist

    # verl's own functions first, because nothing removes ours from the engine's class.
    everything = sorted(CASES | LORA, key=lambda name: not name.endswith("verl"))
    results = {name: run(models, name) for name in names or everything}
    if dist.get_rank() == 0:
        torch.save(results, Path(output))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
