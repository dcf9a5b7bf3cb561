"""Inputs of the selections, and how tests cut them over ranks."""

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

RULES = ["topk", "threshold", "quantile"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make_inputs(shape, dtype, kind, seed, device):
    """(entropy, response mask, group ids)"""
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.empty(shape).exponential_(generator=generator)
    if kind == "tied":
        entropy = (entropy * 4).round() / 4
    elif kind == "constant":
        entropy.fill_(1.5)
    elif kind == "zeros":  # the two zeros are one value
        entropy = torch.where(torch.rand(shape, generator=generator) < 0.5, 0.0, -0.0)
    elif kind == "special":
        special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, -1.0, 2.0, 1e-45])
        special[0] = -special[0]  # a NaN with its sign set
        choice = torch.randint(len(special), shape, generator=generator)
        entropy = torch.where(torch.rand(shape, generator=generator) < 0.5, special[choice], entropy)
    mask = torch.rand(shape, generator=generator) < (0.0 if kind == "all masked" else 0.7)
    groups = torch.randint(3, (shape[0],), generator=generator)
    return entropy.to(device, dtype), mask.to(device), groups.to(device)


# ---- Over ranks

GROUPS: list[Any] = []


def make_groups() -> None:
    """On every rank: the groups of the first 1 to 8 ranks."""
    GROUPS.extend(dist.new_group(range(size)) for size in range(1, 9))


def cut_up(batch: list[Tensor], parts: int, generator: random.Random) -> Iterator[list[Tensor]]:
    """Parts of any length, also empty ones."""
    ends = sorted(generator.randrange(len(batch[0]) + 1) for _ in range(parts - 1))
    for begin, end in itertools.pairwise([0, *ends, len(batch[0])]):
        yield [tensor[begin:end] for tensor in batch]


def make_steps(tokens: int, seed: int, tied: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """log_prob, old_log_prob, advantages and response mask of a batch, flat; NaN outside the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens, generator=generator) < 0.8
    log_prob, noise, advantage = torch.randn(3, tokens, dtype=torch.float64, generator=generator)
    log_prob, noise = -log_prob.abs(), 0.3 * noise
    if tied:
        log_prob, noise, advantage = log_prob.round(), noise.round(), advantage.sign()
    values = [log_prob, log_prob + noise, advantage]
    return [*(torch.where(mask, value, math.nan).to(dtype) for value in values), mask]
