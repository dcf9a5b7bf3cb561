"""global_top_mask by the steps that several processes take, all of them in this one: sums stand in for all-reduces."""

import torch
from torch import Tensor

from entropy_rl_ext.ops.global_top_mask import digit_shifts

ops = torch.ops.entropy_rl


def find_key(values: list[Tensor], masks: list[Tensor], k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The key of the k-th largest value, which of the values with that key it is, and how many each process has."""
    key = None
    for shift in digit_shifts(values[0].dtype):
        counts = torch.stack([ops.global_top_mask_counts(*own, key, shift) for own in zip(values, masks, strict=True)])
        key, k = ops.global_top_mask_key(counts.sum(0), key, k, shift)
    assert key is not None
    return key, k, counts.index_select(1, (key & (counts.shape[1] - 1)).view(1)).flatten()


def select(values: list[Tensor], masks: list[Tensor], k: Tensor, rule: str, weight: Tensor | None = None):
    """(mask, lowest) of every process."""
    key, k, ties = find_key(values, masks, k)
    parts = list(zip(values, masks, strict=True))
    next_key = None
    if rule == "quantile":
        next_key = torch.stack([ops.global_top_mask_next_key(*own, key) for own in parts]).amin()
    found = (key, k, ties if rule == "topk" else None)
    return [ops.global_top_mask_at_key(*own, *found, i, next_key, weight) for i, own in enumerate(parts)]
