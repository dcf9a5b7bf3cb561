"""Advantages from one reward a response, with verl's formulas.

Every function takes rewards [B], the response mask [B, S] and the index of each response's problem [B] (int64,
0 .. P-1), and returns advantages [B, S], 0 outside the mask. A response that is alone with its problem has no
baseline but 0. A rank holds all responses to a problem; what is over the batch is over those of all ranks.
"""

import torch
from torch import Tensor

from entropy_rl.distributed import reduce


def grpo(rewards: Tensor, mask: Tensor, problem: Tensor, *, norm_by_std: bool = True) -> Tensor:
    """(r - mean) / (std + 1e-6) within the problem; without `norm_by_std` r - mean, as in Dr. GRPO.

    Source: arXiv 2402.03300 and 2503.20783.
    """
    count, mean = _group_mean(rewards, problem)
    advantages = rewards - torch.where(count > 1, mean, 0.0)
    if norm_by_std:
        squares = torch.zeros_like(rewards).scatter_add_(0, problem, (rewards - mean) ** 2)[problem]
        std = torch.sqrt(squares / (count - 1).clamp(min=1))
        advantages = advantages / (torch.where(count > 1, std, 1.0) + 1e-6)
    return advantages[:, None] * mask


def rloo(rewards: Tensor, mask: Tensor, problem: Tensor) -> Tensor:
    """r minus the mean of the problem's other responses. Source: arXiv 2402.14740."""
    count, mean = _group_mean(rewards, problem)
    advantages = torch.where(count > 1, (rewards - mean) * count / (count - 1).clamp(min=1), rewards)
    return advantages[:, None] * mask


def gpg(rewards: Tensor, mask: Tensor, problem: Tensor) -> Tensor:
    """(r - mean) * B / (number of nonzero rewards). Source: arXiv 2504.02546."""
    count, mean = _group_mean(rewards, problem)
    scale = reduce(torch.ones_like(rewards).sum()) / reduce(torch.count_nonzero(rewards)).clamp(min=1)
    advantages = scale * (rewards - torch.where(count > 1, mean, 0.0))
    return advantages[:, None] * mask


def reinforce_plus_plus(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Discounted return of the reward that the last token gets, whitened over all tokens of the batch.

    Source: arXiv 2501.03262.
    """
    mask = mask.to(rewards.dtype)
    length = mask.sum(-1, keepdim=True)
    steps_to_go = (length - mask.cumsum(-1)).clamp(min=0)
    returns = rewards[:, None] * gamma**steps_to_go * mask
    tokens = reduce(mask.sum())
    mean = reduce((returns * mask).sum()) / (tokens + 1e-8)
    variance = reduce(((returns - mean) ** 2 * mask).sum()) / (tokens + 1e-8) * tokens / (tokens - 1).clamp(min=1)
    return (returns - mean) * torch.rsqrt(variance + 1e-8) * mask


def _group_mean(rewards: Tensor, problem: Tensor) -> tuple[Tensor, Tensor]:
    """Size and mean reward of each response's group, both [B]."""
    zeros = torch.zeros_like(rewards)
    count = zeros.scatter_add(0, problem, torch.ones_like(rewards))[problem]
    return count, zeros.scatter_add(0, problem, rewards)[problem] / count
