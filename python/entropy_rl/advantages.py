"""Advantages from one reward for each response, with verl's formulas.

Every function takes rewards [B], the response mask [B, S] and the index of each response's problem [B] (int64,
0 .. P-1), and returns advantages [B, S], which are 0 outside the mask. If a problem has only one response, its baseline
is 0. A rank holds all responses to a problem. Statistics over the batch cover the responses of all ranks.

Rewards are measured from the lowest one before they are averaged, so that equal rewards give advantages of exactly 0:
the mean of equal float32 numbers can differ from them in the last bit, and the division by a tiny standard deviation
would make an advantage of that difference.
"""

import torch
from torch import Tensor

from entropy_rl.distributed import reduce


def grpo(rewards: Tensor, mask: Tensor, problem: Tensor, *, norm_by_std: bool = True) -> Tensor:
    """(r - mean) / (std + 1e-6) within the problem; without `norm_by_std` r - mean, as in Dr. GRPO.

    Source: arXiv 2402.03300 and 2503.20783.
    """
    count, deviation = _group_deviation(rewards, problem)
    advantages = torch.where(count > 1, deviation, rewards)
    if norm_by_std:
        squares = torch.zeros_like(rewards).scatter_add_(0, problem, deviation**2)[problem]
        std = torch.sqrt(squares / (count - 1).clamp(min=1))
        advantages = advantages / (torch.where(count > 1, std, 1.0) + 1e-6)
    return advantages[:, None] * mask


def rloo(rewards: Tensor, mask: Tensor, problem: Tensor) -> Tensor:
    """r minus the mean of the problem's other responses. Source: arXiv 2402.14740."""
    count, deviation = _group_deviation(rewards, problem)
    advantages = torch.where(count > 1, deviation * count / (count - 1).clamp(min=1), rewards)
    return advantages[:, None] * mask


def gpg(rewards: Tensor, mask: Tensor, problem: Tensor) -> Tensor:
    """(r - mean) * B / (number of nonzero rewards). Source: arXiv 2504.02546."""
    count, deviation = _group_deviation(rewards, problem)
    scale = reduce(torch.ones_like(rewards).sum()) / reduce(torch.count_nonzero(rewards)).clamp(min=1)
    advantages = scale * torch.where(count > 1, deviation, rewards)
    return advantages[:, None] * mask


def reinforce_plus_plus(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Discounted returns, whitened over all tokens of the batch. The last token of a response gets its reward.

    Source: arXiv 2501.03262.
    """
    inside = mask.bool()
    mask = mask.to(rewards.dtype)
    length = mask.sum(-1, keepdim=True)
    steps_to_go = (length - mask.cumsum(-1)).clamp(min=0)
    returns = rewards[:, None] * gamma**steps_to_go
    lowest = reduce(returns.masked_fill(~inside, torch.inf).amin(), torch.distributed.ReduceOp.MIN)
    returns = (returns - lowest.nan_to_num(posinf=0.0)).masked_fill(~inside, 0.0)
    tokens = reduce(mask.sum())
    mean = reduce(returns.sum()) / (tokens + 1e-8)
    variance = reduce(((returns - mean) ** 2 * mask).sum()) / (tokens + 1e-8) * tokens / (tokens - 1).clamp(min=1)
    return (returns - mean) * torch.rsqrt(variance + 1e-8) * mask


def _group_deviation(rewards: Tensor, problem: Tensor) -> tuple[Tensor, Tensor]:
    """The size of each response's group, and the reward minus the group's mean, both [B]."""
    zeros = torch.zeros_like(rewards)
    count = zeros.scatter_add(0, problem, torch.ones_like(rewards))[problem]
    above = rewards - zeros.scatter_reduce(0, problem, rewards, "amin", include_self=False)[problem]
    return count, above - zeros.scatter_add(0, problem, above)[problem] / count
