"""Which response tokens carry the policy gradient, over what they compete, and what their loss is divided by.

Scope: the tokens of one micro-batch (`select_tokens`), or of the whole mini-batch (`select_mini_batch`), whose mask is
the same however the mini-batch is cut into micro-batches. Its entropies must be there before the first micro-batch
trains: from a forward of their own (`prepass`), or from the pass that computed the old log-probabilities.

Ranks: "local", each rank by itself; or "global", the tokens of all ranks of a process group as if they were one batch,
rank after rank. Then ranks exchange histograms, not entropies, and every rank must take part, with tokens or without.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_rl_ext import global_top_mask

RULES = ("topk", "threshold", "quantile")
RANKS = ("local", "global")

# Loss modes that weigh a sequence as a whole: a selection of tokens is accepted and not applied.
SEQUENCE_MODES = ("gspo", "geo_mean")

# Loss modes that choose tokens of their own by covariances over all response tokens.
COVARIANCE_MODES = ("clip_cov", "kl_cov")

# Metrics that are means over the response tokens of how far the policy has moved.
PROBABILITY_RATIO_METRICS = frozenset({"actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl"})

# 2048 counters of 8 bytes to a histogram.
_DIGIT_BITS = 11


def select_tokens(
    entropy: Tensor,
    response_mask: Tensor,
    top_ratio: float,
    rule: str = "topk",
    ranks: str = "local",
    group: dist.ProcessGroup | None = None,
    *,
    complement: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Selects the response tokens of highest entropy, or with `complement` all others.

    Args:
        entropy: any shape, float32, bfloat16, float16 or float64; may be empty.
        response_mask: the same shape, any dtype, nonzero = response token.
        top_ratio: share of the response tokens to keep, in (0, 1].
        rule: "topk", "threshold" or "quantile", as in `entropy_rl_ext.global_top_mask`.
        ranks: "local", or "global": a collective of all ranks of `group`, who give the same top_ratio, rule and dtype;
            shapes may differ.
        group: process group of any backend that reduces tensors of this device; None: the default group. Without
            one, this process is the only rank.
        complement: the response tokens that this rule leaves out, in place of those that it keeps.

    Returns:
        The mask, bool, of the shape of `entropy`, and the metric `actor/entropy_threshold`: the lowest entropy that
        the rule keeps, in nats (inf where it keeps only NaN; 0 where nothing). With "global", both are those of
        `global_top_mask` on the concatenated batches of all ranks, bit for bit: ties go to the lowest rank, then to the
        lowest flat index.

    Raises:
        ValueError: as `global_top_mask`, or an unknown `ranks`.
    """
    if ranks not in RANKS:
        raise ValueError(f"ranks is {ranks!r}; it must be one of {', '.join(map(repr, RANKS))}")
    if ranks == "global" and dist.is_available() and dist.is_initialized():
        selected, threshold = _select_over_ranks(entropy.detach(), response_mask, top_ratio, rule, group)
    else:
        selected = global_top_mask(entropy.detach(), response_mask, top_ratio, rule=rule)
        # One element more, for a batch without any. NaN ranks highest: it is the lowest only where nothing else is.
        lowest = torch.where(selected & ~entropy.isnan(), entropy.detach(), torch.inf).flatten()
        threshold = torch.cat([lowest, lowest.new_full((1,), torch.inf)]).amin()
        threshold = torch.where(selected.any(), threshold, 0.0)
    if complement:
        selected = (response_mask != 0) & ~selected
    return selected, {"actor/entropy_threshold": threshold}


def select_mini_batch(
    entropies: Sequence[Tensor],
    response_masks: Sequence[Tensor],
    top_ratio: float,
    rule: str = "topk",
    ranks: str = "local",
    group: dist.ProcessGroup | None = None,
    *,
    complement: bool = False,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """`select_tokens` over all micro-batches of an optimizer step; returns the mask of each.

    The micro-batches may be of any shapes, and with ranks "global" of another number on each rank.
    """
    if not entropies:
        raise ValueError("entropies is empty; a rank without tokens gives one empty tensor")
    selected, metrics = select_tokens(
        torch.cat([entropy.flatten() for entropy in entropies]),
        torch.cat([mask.flatten() for mask in response_masks]),
        top_ratio,
        rule,
        ranks,
        group,
        complement=complement,
    )
    parts = selected.split([entropy.numel() for entropy in entropies])
    return [part.view(entropy.shape) for part, entropy in zip(parts, entropies, strict=True)], metrics


@contextmanager
def prepass(device: torch.device) -> Iterator[None]:
    """A forward before the optimizer step, for its entropies alone.

    It has no gradient, and leaves the random-number state of the CPU and of `device` as it found it. So dropout draws
    in the step as if the prepass had not been, and draws the same in both where they run the same micro-batches in the
    same order: then the entropies are those that the step itself will see.
    """
    devices = [] if device.type == "cpu" else [device]
    with torch.no_grad(), torch.random.fork_rng(devices, device_type="cuda" if not devices else device.type):
        yield


def needs_all_tokens(actor: Any) -> str | None:
    """What of the loss needs the log-probs or entropies of tokens that were not selected; None: nothing.

    Where nothing does, and the selection is made before the optimizer step, only the selected tokens need to meet the
    LM head in it. `actor` is an actor configuration with verl's keys.
    """
    loss_mode = actor.policy_loss.loss_mode
    if loss_mode in SEQUENCE_MODES or loss_mode in COVARIANCE_MODES:
        return f"policy_loss.loss_mode={loss_mode}"
    if actor.entropy_coeff != 0:
        return f"entropy_coeff={actor.entropy_coeff}"
    return "use_kl_loss=true" if actor.use_kl_loss else None


def top_k_count(response_tokens: Tensor, ratio: float, *, complement: bool = False) -> Tensor:
    """How many of so many response tokens `select_tokens` selects under the rule topk. Any shape; float64."""
    count = torch.floor(response_tokens.double() * ratio + 0.9999).clamp(min=1)
    count = torch.where(response_tokens > 0, count, 0.0)
    return response_tokens - count if complement else count


def token_divisor(selected: Tensor, micro_batch_count: Tensor, mini_batch_count: Tensor) -> Tensor:
    """Divisor (`batch_num_tokens`) with which the micro-batches' losses add up to a mean over the selected tokens.

    For the scope micro-batch, where the selected tokens of the step are not known before all of it has run. The counts
    are `top_k_count` of this micro-batch, and its sum over all micro-batches of the optimizer step: both are known
    before any of them has run. Under the rule topk the divisor is that sum, so that every selected token of the step
    weighs the same. The other rules may keep more tokens; there each micro-batch's mean over its own selected tokens
    is weighed by its share of the counts. `selected` is how many the micro-batch selected.
    """
    return selected * mini_batch_count / micro_batch_count.clamp(min=1)


# ---- Over ranks
#
# A radix select: rounds of 11 bits find the key of rank k, counted from the largest, among the keys of all processes.
# A round costs one all-reduced histogram, of the keys that share the digits found before. Keys are integers, so that
# nothing depends on how the tokens are split; every number stays on the device, so that nothing waits for it.


@torch.no_grad()
def _select_over_ranks(
    entropy: Tensor, response_mask: Tensor, top_ratio: float, rule: str, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The mask, and the lowest entropy selected."""
    if response_mask.shape != entropy.shape:
        raise ValueError(
            f"response_mask has shape {list(response_mask.shape)}; it must be {list(entropy.shape)}, that of entropy"
        )
    # For its checks of the other arguments.
    global_top_mask(entropy.new_empty(0), response_mask.new_empty(0), top_ratio, rule=rule)
    inside = (response_mask != 0).flatten()
    keys = _keys(entropy)
    smallest, largest = torch.iinfo(keys.dtype).min, torch.iinfo(keys.dtype).max
    keys = torch.where(inside, keys, smallest)

    # `cut` is the smallest key with the digits found so far; of the keys that have them, the k-th largest is sought.
    cut = keys.new_full((), smallest)
    k = weight = None
    bits = torch.iinfo(keys.dtype).bits
    for shift in (*range(bits - _DIGIT_BITS, 0, -_DIGIT_BITS), 0):
        size, bits = 1 << (bits - shift), shift
        digit = (keys >> shift) - (cut >> shift)
        # One counter more, for the keys that do not count.
        digit = torch.where(inside & (digit >= 0) & (digit < size), digit, size).long()
        counts = torch.zeros(size + 1, dtype=torch.int64, device=keys.device)
        counts = counts.scatter_add_(0, digit, counts.new_ones(()).expand_as(digit))[:size]
        dist.all_reduce(counts, group=group)
        if k is None:
            k, weight = _sought(counts.sum(), top_ratio, rule)
        larger = counts.flip(0).cumsum(0).flip(0) - counts  # keys with a larger digit
        found = (larger >= k).sum()
        k = k - larger.take(found)
        cut = (((cut >> shift) + found) << shift).to(keys.dtype)

    lowest = cut
    if rule == "topk":
        ties = keys.eq(cut) & inside
        ties_of_rank = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=keys.device)
        own = dist.get_rank(group)
        ties_of_rank[own] = ties.sum()
        dist.all_reduce(ties_of_rank, group=group)
        left = k - ties_of_rank[:own].sum()
        selected = keys.gt(cut) | (ties & (ties.cumsum(0) <= left))
    elif rule == "threshold":
        selected = keys.ge(cut) & inside
    else:
        # The next value up is the same one where it occurs more than once.
        next_key = torch.where(keys > cut, keys, largest)
        next_key = torch.cat([next_key, next_key.new_full((1,), largest)]).amin()
        dist.all_reduce(next_key, dist.ReduceOp.MIN, group=group)
        upper = torch.where(k > 1, cut, next_key)
        threshold = _quantile_key(cut, upper, weight)
        selected = keys.ge(threshold) & inside
        lowest = torch.where(threshold > cut, upper, cut)
    return selected.view(entropy.shape), _value(lowest).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _sought(n: Tensor, ratio: float, rule: str) -> tuple[Tensor, Tensor]:
    """Which of n keys is sought, counted from the largest, and how far above it the quantile lies on the way up.

    `top_count` and `quantile_position` of csrc/kernels/selection.h. Of no keys the first is sought, and not found.
    """
    if rule == "quantile":
        position = (n - 1).clamp(min=0).double() * (1.0 - ratio)
        lower = position.floor()
        return (n - lower.long()).clamp(min=1), position - lower
    count = torch.minimum(top_k_count(n, ratio).long(), n)
    return count.clamp(min=1), torch.zeros_like(n, dtype=torch.float64)


def _quantile_key(lower: Tensor, upper: Tensor, weight: Tensor) -> Tensor:
    """`quantile_key` of csrc/kernels/selection.h: the same float64 operations, each rounded by itself."""
    low, high = _value(lower).double(), _value(upper).double()
    key = _keys((low + weight * (high - low)).to(_value(lower).dtype)).view(())
    stays = (weight == 0) | (lower == upper) | (low == -torch.inf)
    return torch.where(stays, lower, torch.minimum(key, upper))


# The integer types in which keys are kept, with the float type of their values and the bits of its infinity.
_VALUES = {torch.int32: (torch.float32, 0x7F800000), torch.int64: (torch.float64, 0x7FF0000000000000)}


def _keys(entropy: Tensor) -> Tensor:
    """Integers in the order of the entropies, [n] int32 (int64 for float64), flat.

    NaN is the largest integer, -0.0 is 0.0, and no entropy is the smallest integer.
    """
    dtype = torch.int64 if entropy.dtype == torch.float64 else torch.int32
    value_dtype, infinity = _VALUES[dtype]
    bits = entropy.to(value_dtype).flatten().view(dtype)
    magnitude = bits & torch.iinfo(dtype).max
    keys = torch.where(bits < 0, -magnitude, magnitude)
    return torch.where(magnitude > infinity, torch.iinfo(dtype).max, keys)


def _value(key: Tensor) -> Tensor:
    """The entropy of a key; 0 for the smallest integer."""
    bits = torch.where(key < 0, torch.iinfo(key.dtype).min - key, key)
    return bits.view(_VALUES[key.dtype][0])
