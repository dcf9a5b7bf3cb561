"""Which response tokens carry the policy gradient, and what their loss is divided by."""

import torch
from torch import Tensor

from entropy_rl_ext import global_top_mask


def select_tokens(entropy: Tensor, response_mask: Tensor, ratio: float, rule: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The mask [B, S] (bool) of the selected tokens of a micro-batch, and the metric `actor/entropy_threshold`.

    The threshold is the lowest entropy that was selected, in nats; 0 where nothing was.
    """
    selected = global_top_mask(entropy, response_mask, ratio, rule=rule)
    lowest = torch.where(selected, entropy, torch.inf).amin()
    return selected, {"actor/entropy_threshold": torch.where(selected.any(), lowest, 0.0)}


def top_k_count(response_tokens: Tensor, ratio: float) -> Tensor:
    """How many of so many response tokens `global_top_mask` keeps under the rule topk. Any shape; float64."""
    count = torch.floor(response_tokens.double() * ratio + 0.9999).clamp(min=1)
    return torch.where(response_tokens > 0, count, 0.0)


def token_divisor(selected: Tensor, micro_batch_count: Tensor, mini_batch_count: Tensor) -> Tensor:
    """Divisor (`batch_num_tokens`) with which the micro-batches' losses add up to a mean over the selected tokens.

    The counts are `top_k_count` of this micro-batch, and its sum over all micro-batches of the optimizer step: both
    are known before any of them has run. Under the rule topk the divisor is that sum, so that every selected token
    of the step weighs the same. The other rules may keep more tokens; there each micro-batch's mean over its own
    selected tokens is weighed by its share of the counts.
    """
    return selected.sum() * mini_batch_count / micro_batch_count.clamp(min=1)
