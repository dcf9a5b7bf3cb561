"""verl's `ppo_loss` with the policy gradient on the highest-entropy tokens."""

from dataclasses import fields
from typing import Any

from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils import losses
from verl.workers.utils.padding import no_padding_2_padding

from entropy_rl.selection import (
    HIGHEST_SHARE,
    LOWEST_SHARE,
    SEQUENCE_MODES,
    StepSelection,
    TokenSelection,
    needs_all_tokens,
)
from entropy_rl_ext import aggregate

verl_ppo_loss = losses.ppo_loss

# Fields that `engine` adds to a micro-batch: the optimizer step's StepSelection, the number of the micro-batch, and the
# seed of clip_cov's draw.
STEP = "entropy_top_step"
NUMBER = "entropy_top_micro_batch"
SEED = "entropy_top_seed"
# If the selection is made before the step, its part of the TokenSelection: one field per tensor, [B, S] as
# response_mask.
TOKENS = {field.name: f"entropy_top_{field.name}" for field in fields(TokenSelection)}


def applies(config: Any) -> bool:
    """Whether this actor configuration trains on selected tokens."""
    return getattr(config, "entropy_top_ratio", None) is not None and config.policy_loss.loss_mode not in SEQUENCE_MODES


def only_selected(config: Any) -> bool:
    """Whether the training step can run the LM head on the selected tokens only."""
    return (
        config.entropy_top_scope != "micro_batch"
        and config.entropy_top_kernel == "entropy_rl"
        and config.use_fused_kernels
        and config.strategy in ("fsdp", "fsdp2", "megatron")
        and needs_all_tokens(config) is None
    )


def ppo_loss(
    config: Any, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """The loss that verl's engines call for each micro-batch. Without `entropy_top_ratio` it is verl's own function.

    Args:
        config: the actor configuration.
        model_output: `log_probs` and `entropy` of all tokens, nested [B, prompt + response].
        data: the micro-batch as verl's engine passes it, with the fields that `engine` adds.
        dp_group: the ranks that share the batch.

    Returns:
        The loss, scaled so that the gradients of the micro-batches add up to the optimizer step's; and metrics.
    """
    if not applies(config):
        return verl_ppo_loss(config, model_output, data, dp_group)
    if NUMBER not in data or "entropy" not in model_output:
        raise RuntimeError(
            "actor_rollout_ref.actor.entropy_top_ratio is set, but this engine does not prepare its micro-batches for "
            "it; actor_rollout_ref.actor.strategy must be fsdp, fsdp2 or megatron"
        )
    step: StepSelection = tu.get_non_tensor_data(data, STEP, None)
    number, seed, ranks = data[NUMBER], data[SEED], data["dp_size"]
    log_prob, entropy = (no_padding_2_padding(model_output[name], data) for name in ("log_probs", "entropy"))  # [B, S]
    if config.entropy_coeff == 0:
        entropy = entropy.detach()
    aggregation = {
        "loss_agg_mode": config.loss_agg_mode,
        "dp_size": ranks,
        "batch_num_tokens": data["batch_num_tokens"],
        "global_batch_size": data["global_batch_size"],
        "loss_scale_factor": config.loss_scale_factor,
    }
    tensors = ("response_mask", "old_log_probs", "advantages", "rollout_is_weights", "ref_log_prob", *TOKENS.values())
    data = data.select(*tensors, strict=False).to_padded_tensor()
    response_mask, tokens = data["response_mask"].bool(), _tokens(data)
    loss, means = step.policy_loss(
        number,
        log_prob,
        entropy,
        data["old_log_probs"],
        data["advantages"],
        response_mask,
        tokens,
        rollout_is_weights=data.get("rollout_is_weights", None),
        seed=seed,
        **aggregation,
    )
    # verl adds up over micro-batches and averages over ranks.
    sums = {"actor/pg_loss": loss} | {name: value * ranks for name, value in means.items()}
    lowest, highest = step.shares[-1].unbind()
    metrics = {
        LOWEST_SHARE: Metric(aggregation=AggregationType.MIN, value=-lowest),
        HIGHEST_SHARE: Metric(aggregation=AggregationType.MAX, value=highest),
    }
    if tokens is None or tokens.log_prob is None:  # the entropies of all tokens are there
        sums["actor/entropy_loss"] = bonus = aggregate(entropy, response_mask, **aggregation)
        if config.entropy_coeff != 0:
            loss = loss - config.entropy_coeff * bonus
    if config.use_kl_loss:
        term, penalty = step.kl_loss(log_prob, data["ref_log_prob"], response_mask, **aggregation)
        loss = loss + term
        sums["kl_loss"] = penalty
        metrics["kl_coef"] = config.kl_loss_coef
    return loss, metrics | Metric.from_dict(sums, aggregation=AggregationType.SUM)


def _tokens(data: TensorDict) -> TokenSelection | None:
    """The micro-batch's part of the step's selection; None if there was none before the step."""
    if TOKENS["mask"] not in data:
        return None
    tokens = TokenSelection(**{name: data.get(key, None) for name, key in TOKENS.items()})
    for name in ("mask", "selected", "vetoed"):  # verl's batches hold masks as integers
        value = getattr(tokens, name)
        setattr(tokens, name, None if value is None else value.bool())
    return tokens
