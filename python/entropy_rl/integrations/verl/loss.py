"""verl's `ppo_loss` with the policy gradient on the highest-entropy tokens."""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils import losses
from verl.workers.utils.padding import no_padding_2_padding

from entropy_rl.selection import (
    SEQUENCE_MODES,
    movement_metrics,
    needs_all_tokens,
    select_tokens,
    token_divisor,
    top_k_count,
)
from entropy_rl_ext import aggregate, kl_loss, policy_loss

verl_ppo_loss = losses.ppo_loss

# Fields of a micro-batch. Of every one: how many response tokens each micro-batch of the optimizer step has, a tuple,
# first rank first.
MICRO_BATCH_TOKENS = "entropy_top_micro_batch_tokens"
# With the scope mini_batch: its slice of the step's selection, [B, S] as response_mask; and of the step as a whole, []
# and on the device, the selected tokens of all ranks and the lowest entropy that this rank's were selected by.
SELECTED = "entropy_top_selected"
SELECTED_TOKENS = "entropy_top_selected_tokens"
THRESHOLD = "entropy_top_threshold"
# In the loss modes that choose tokens by covariance, the slice of the step's choice, likewise.
CHOSEN = "entropy_top_chosen_by_covariance"
# Where only the selected tokens met the LM head: log-probs of the policy that the selection goes by, [B, S].
KNOWN_LOG_PROBS = "entropy_top_known_log_probs"


def applies(config: Any) -> bool:
    """Whether this actor configuration trains on selected tokens."""
    return getattr(config, "entropy_top_ratio", None) is not None and config.policy_loss.loss_mode not in SEQUENCE_MODES


def preselects(config: Any) -> bool:
    """Whether only the selected tokens need to meet the LM head in the training step."""
    return (
        config.entropy_top_scope == "mini_batch"
        and config.entropy_top_kernel == "entropy_rl"
        and config.use_fused_kernels
        and config.strategy in ("fsdp", "fsdp2")
        and needs_all_tokens(config) is None
    )


def ppo_loss(
    config: Any, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """What an engine of verl calls for each micro-batch: verl's own function unless `entropy_top_ratio` applies.

    Args:
        config: the actor configuration.
        model_output: `log_probs` and `entropy` of all tokens, nested [B, prompt + response].
        data: the micro-batch as verl's engine hands it over, with the fields that `engine` adds.
        dp_group: the ranks that the batch is shared by.

    Returns:
        The loss, scaled so that the micro-batches' gradients add up to the optimizer step's; and metrics.
    """
    if not applies(config):
        return verl_ppo_loss(config, model_output, data, dp_group)
    if MICRO_BATCH_TOKENS not in data or "entropy" not in model_output:
        raise RuntimeError(
            "actor_rollout_ref.actor.entropy_top_ratio is set, but this engine does not prepare its micro-batches for "
            "it; actor_rollout_ref.actor.strategy must be fsdp, fsdp2 or megatron"
        )

    ranks = data["dp_size"]
    log_prob = no_padding_2_padding(model_output["log_probs"], data)  # [B, S]
    entropy = no_padding_2_padding(model_output["entropy"], data)
    if config.entropy_coeff == 0:
        entropy = entropy.detach()
    micro_batch_tokens = torch.tensor(data[MICRO_BATCH_TOKENS], device=log_prob.device).view(ranks, -1)
    aggregation = {
        "loss_agg_mode": config.loss_agg_mode,
        "dp_size": ranks,
        "batch_num_tokens": data["batch_num_tokens"],
        "global_batch_size": data["global_batch_size"],
        "loss_scale_factor": config.loss_scale_factor,
    }
    policy_aggregation = dict(aggregation)
    whole_step = config.entropy_top_scope == "mini_batch"
    if whole_step:
        selected_tokens = data[SELECTED_TOKENS]
        means = {"actor/entropy_threshold": data[THRESHOLD]}
    tensors = ("response_mask", "old_log_probs", "advantages", "rollout_is_weights", "ref_log_prob")
    data = data.select(*tensors, SELECTED, CHOSEN, KNOWN_LOG_PROBS, strict=False).to_padded_tensor()
    response_mask = data["response_mask"].bool()
    draws = config.policy_loss.loss_mode == "clip_cov" and CHOSEN not in data

    if whole_step:
        selected = data[SELECTED].bool()
    else:
        selected, means = select_tokens(
            entropy.detach(),
            response_mask,
            config.entropy_top_ratio,
            config.entropy_top_rule,
            config.entropy_top_ranks,
            dp_group,
        )
    if config.entropy_top_normalize == "selected":
        if whole_step:
            policy_aggregation["batch_num_tokens"] = selected_tokens
        else:
            here, own, at_a_time = selected.sum(), response_mask.sum(), micro_batch_tokens
            if config.entropy_top_ranks == "global":  # the micro-batches that all ranks run at the same time are one
                both = torch.stack([here, own])
                torch.distributed.all_reduce(both, group=dp_group)
                here, own, at_a_time = *both, micro_batch_tokens.sum(0)
            counts = top_k_count(at_a_time, config.entropy_top_ratio)
            own_count = top_k_count(own, config.entropy_top_ratio)
            policy_aggregation["batch_num_tokens"] = token_divisor(here, own_count, counts.sum())
    preselected = KNOWN_LOG_PROBS in data
    if preselected:  # the others have no part in the loss, only in its metrics
        log_prob = torch.where(selected, log_prob, data[KNOWN_LOG_PROBS])
    loss, policy_metrics = policy_loss(
        log_prob,
        data["old_log_probs"],
        data["advantages"],
        response_mask,
        entropy_mask=selected,
        covariance_mask=data.get(CHOSEN, None),
        rollout_is_weights=data.get("rollout_is_weights", None),
        normalize=config.entropy_top_normalize,
        clip_ratio=config.clip_ratio,
        clip_ratio_low=config.clip_ratio_low,
        clip_ratio_high=config.clip_ratio_high,
        clip_ratio_c=config.clip_ratio_c,
        tau_pos=config.tau_pos,
        tau_neg=config.tau_neg,
        seed=int(torch.randint(2**62, ())) if draws else 0,
        **{name: config.policy_loss[name] for name in _POLICY_LOSS},
        **policy_aggregation,
    )

    means |= policy_metrics
    sums = {"actor/pg_loss": loss}
    metrics = {}
    if not preselected:
        bonus = aggregate(entropy, response_mask, **aggregation)
        sums["actor/entropy_loss"] = bonus
        if config.entropy_coeff != 0:
            loss = loss - config.entropy_coeff * bonus
    if config.use_kl_loss:
        penalty = kl_loss(
            log_prob, data["ref_log_prob"], response_mask, kl_loss_type=config.kl_loss_type, **aggregation
        )
        loss = loss + config.kl_loss_coef * penalty
        sums["kl_loss"] = penalty
        metrics["kl_coef"] = config.kl_loss_coef
    # verl averages over ranks and adds up over micro-batches: so weighted, the sum is a mean over all tokens.
    tokens = response_mask.sum() * ranks
    response_tokens = micro_batch_tokens.sum()
    moved = movement_metrics(config.policy_loss.loss_mode)
    for name, value in means.items():
        total = response_tokens
        if preselected and config.entropy_top_source == "old_policy" and name in moved:
            # What the policy, which may have moved since, does to the others is not known: they entered as unmoved.
            name, total = f"{name}_selected", selected_tokens
        sums[name] = value * tokens / total.clamp(min=1)
    return loss, metrics | Metric.from_dict(sums, aggregation=AggregationType.SUM)


_POLICY_LOSS = (
    "loss_mode",
    "clip_cov_ratio",
    "clip_cov_lb",
    "clip_cov_ub",
    "kl_cov_ratio",
    "ppo_kl_coef",
    "dro_beta",
)
