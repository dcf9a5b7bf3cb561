"""verl's `ppo_loss` with the policy gradient on the highest-entropy tokens."""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils import losses
from verl.workers.utils.padding import no_padding_2_padding

from entropy_rl.selection import select_tokens, token_divisor, top_k_count
from entropy_rl_ext import aggregate, kl_loss, policy_loss

verl_ppo_loss = losses.ppo_loss

# They weigh a sequence as a whole: the ratio is accepted and not applied.
SEQUENCE_LEVEL = ("gspo", "geo_mean")

# Non-tensor field of a micro-batch: response tokens of each micro-batch of the optimizer step, over all ranks.
MICRO_BATCH_TOKENS = "entropy_top_micro_batch_tokens"


def applies(config: Any) -> bool:
    """Whether this actor configuration trains on selected tokens."""
    return getattr(config, "entropy_top_ratio", None) is not None and config.policy_loss.loss_mode not in SEQUENCE_LEVEL


def ppo_loss(
    config: Any, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """What an engine of verl calls for each micro-batch: verl's own function unless `entropy_top_ratio` applies.

    Args:
        config: the actor configuration.
        model_output: `log_probs` and `entropy` of all tokens, nested [B, prompt + response].
        data: the micro-batch as verl's engine hands it over, with MICRO_BATCH_TOKENS.

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

    log_prob = no_padding_2_padding(model_output["log_probs"], data)  # [B, S]
    entropy = no_padding_2_padding(model_output["entropy"], data)
    if config.entropy_coeff == 0:
        entropy = entropy.detach()
    micro_batch_tokens = torch.tensor(data[MICRO_BATCH_TOKENS])
    aggregation = {
        "loss_agg_mode": config.loss_agg_mode,
        "dp_size": data["dp_size"],
        "batch_num_tokens": data["batch_num_tokens"],
        "global_batch_size": data["global_batch_size"],
        "loss_scale_factor": config.loss_scale_factor,
    }
    fields = ("response_mask", "old_log_probs", "advantages", "rollout_is_weights", "ref_log_prob")
    data = data.select(*fields, strict=False).to_padded_tensor()
    response_mask = data["response_mask"].bool()

    selected, means = select_tokens(entropy.detach(), response_mask, config.entropy_top_ratio, config.entropy_top_rule)
    policy_aggregation = dict(aggregation)
    if config.entropy_top_normalize == "selected":
        counts = top_k_count(micro_batch_tokens, config.entropy_top_ratio)
        here = top_k_count(response_mask.sum(), config.entropy_top_ratio)
        policy_aggregation["batch_num_tokens"] = token_divisor(selected.sum(), here, counts.sum().to(here.device))
    loss, policy_metrics = policy_loss(
        log_prob,
        data["old_log_probs"],
        data["advantages"],
        response_mask,
        entropy_mask=selected,
        rollout_is_weights=data.get("rollout_is_weights", None),
        normalize=config.entropy_top_normalize,
        clip_ratio=config.clip_ratio,
        clip_ratio_low=config.clip_ratio_low,
        clip_ratio_high=config.clip_ratio_high,
        clip_ratio_c=config.clip_ratio_c,
        tau_pos=config.tau_pos,
        tau_neg=config.tau_neg,
        seed=int(torch.randint(2**62, ())),  # of clip_cov's draw
        **{name: config.policy_loss[name] for name in _POLICY_LOSS},
        **policy_aggregation,
    )

    means["actor/entropy_token_ratio"] = policy_metrics.pop("actor/entropy_token_ratio")
    metrics = Metric.from_dict(policy_metrics, aggregation=AggregationType.MEAN)
    sums = {"actor/pg_loss": loss}
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
    weight = response_mask.sum() * aggregation["dp_size"] / micro_batch_tokens.sum().clamp(min=1).to(log_prob.device)
    sums |= {name: value * weight for name, value in means.items()}
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
