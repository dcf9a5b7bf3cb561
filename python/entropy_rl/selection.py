"""Which response tokens carry the policy gradient, over what they compete, and what their loss is divided by.

Scope: the tokens of one micro-batch (`select_tokens`), or of the whole mini-batch (`select_mini_batch`), whose mask is
the same however the mini-batch is cut into micro-batches. Its entropies must be there before the first micro-batch
trains: from a forward of their own (`prepass`), or from the pass that computed the old log-probabilities.

Ranks: "local", each rank by itself; or "global", the tokens of all ranks of a process group as if they were one batch,
rank after rank. Then ranks exchange histograms, not entropies, and every rank must take part, with tokens or without.

Two losses, clip_cov and kl_cov, choose tokens of their own by covariance: `select_by_covariance` is that choice over a
whole mini-batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_rl_ext import global_top_mask, policy_loss
from entropy_rl_ext.reference import splitmix64

RULES = ("topk", "threshold", "quantile")
RANKS = ("local", "global")

# Loss modes that weigh a sequence as a whole: a selection of tokens is accepted and not applied.
SEQUENCE_MODES = ("gspo", "geo_mean")

# Loss modes that choose tokens of their own by covariances over all response tokens.
COVARIANCE_MODES = ("clip_cov", "kl_cov")

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
    together = _Ranks(ranks, group)
    if together.several:
        _check_shape("response_mask", response_mask, "entropy", entropy)
        # For its checks of the other arguments.
        global_top_mask(entropy.new_empty(0), response_mask.new_empty(0), top_ratio, rule=rule)
        selected, threshold = _select_over_ranks(
            entropy.detach(), response_mask != 0, lambda n: _sought(n, top_ratio, rule), rule, together
        )
    else:
        selected = global_top_mask(entropy.detach(), response_mask, top_ratio, rule=rule)
        # One element more, for a batch without any. NaN ranks highest: it is the lowest only where nothing else is.
        lowest = torch.where(selected & ~entropy.isnan(), entropy.detach(), torch.inf).flatten()
        threshold = torch.cat([lowest, lowest.new_full((1,), torch.inf)]).amin()
        threshold = torch.where(selected.any(), threshold, 0.0)
    if complement:
        selected = (response_mask != 0) & ~selected
    return selected, {"actor/entropy_threshold": threshold}


@torch.no_grad()
def select_by_covariance(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_mode: str,
    ranks: str = "local",
    group: dist.ProcessGroup | None = None,
    *,
    clip_ratio: float = 0.2,
    clip_ratio_low: float | None = None,
    clip_ratio_high: float | None = None,
    clip_cov_ratio: float = 0.0002,
    clip_cov_lb: float = 1.0,
    clip_cov_ub: float = 5.0,
    kl_cov_ratio: float = 0.0002,
    seed: int = 0,
) -> Tensor:
    """The choice that `policy_loss` makes for clip_cov and kl_cov, over all of these tokens and those of other ranks.

    `policy_loss` chooses among the tokens that it is given, as verl does: those of a micro-batch. Slices of this mask,
    given as its `covariance_mask`, make a step that does not depend on how it is cut into micro-batches or over ranks.

    Args:
        log_prob, old_log_prob, advantages: all of the same shape, any, float32, bfloat16, float16 or float64; may be
            empty. The log-probs are those of the policy that the step begins with, and of the one that sampled.
        response_mask: the same shape, any dtype, nonzero = response token.
        loss_mode: "clip_cov" or "kl_cov".
        ranks, group: as in `select_tokens`; with "global" all ranks give the same options.
        seed: of clip_cov's draw, in [0, 2^63), that of the first rank. A token's number depends on its place among the
            response tokens of all ranks, rank after rank. It is another one than `policy_loss` draws.
        Other options: as in `policy_loss`.

    Returns:
        The mask, bool, of the shape of `log_prob`. With covariance (A - mean A)(log p - mean log p), means over n
        response tokens: for kl_cov the max(1, int(n * kl_cov_ratio)) tokens of the largest, ties as in `select_tokens`;
        for clip_cov as many by its ratio, drawn from the unclipped tokens between the bounds, or all of those.

    Raises:
        ValueError: as `policy_loss`, or another loss_mode, an unknown `ranks`, or shapes that differ.

    Sources: "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", arXiv 2505.22617, and
    compute_policy_loss_clip_cov and compute_policy_loss_kl_cov of verl 0.9.1.
    """
    if loss_mode not in COVARIANCE_MODES:
        raise ValueError(f"loss_mode is {loss_mode!r}; it must be one of {', '.join(map(repr, COVARIANCE_MODES))}")
    for name, tensor in {
        "old_log_prob": old_log_prob,
        "advantages": advantages,
        "response_mask": response_mask,
    }.items():
        _check_shape(name, tensor, "log_prob", log_prob)
    low = clip_ratio if clip_ratio_low is None else clip_ratio_low
    high = clip_ratio if clip_ratio_high is None else clip_ratio_high
    # For its checks of the other arguments.
    policy_loss(
        *(tensor.new_empty(0, 0) for tensor in (log_prob, old_log_prob, advantages, response_mask)),
        loss_mode=loss_mode,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_cov_ratio=clip_cov_ratio,
        clip_cov_lb=clip_cov_lb,
        clip_cov_ub=clip_cov_ub,
        kl_cov_ratio=kl_cov_ratio,
        seed=seed,
    )
    together = _Ranks(ranks, group)
    inside = response_mask != 0
    dtype = torch.float64 if log_prob.dtype == torch.float64 else torch.float32
    log_p, old, advantage = (torch.where(inside, x.to(dtype), 0) for x in (log_prob, old_log_prob, advantages))

    # Each rank's response tokens, and the seed.
    counts = torch.zeros(together.size + 1, dtype=torch.int64, device=log_prob.device)
    counts[together.own] = inside.sum()
    if together.own == 0:
        counts[-1] = seed
    # In float64: rounded to float32, the means do not show in which order they were summed.
    sums = torch.stack([log_p.sum(dtype=torch.float64), advantage.sum(dtype=torch.float64)])
    together.all_reduce(counts)
    together.all_reduce(sums)
    n, seed_of_all = counts[:-1].sum(), counts[-1]
    mean_log_p, mean_advantage = (sums / (n + (1e-8 if loss_mode == "clip_cov" else 0.0))).to(dtype)
    covariance = (advantage - mean_advantage) * (log_p - mean_log_p)

    if loss_mode == "kl_cov":
        values, eligible, share = covariance, inside, kl_cov_ratio
    else:
        ratio = (log_p - old).exp()
        clipped = -advantage * ratio.clamp(1 - low, 1 + high) > -advantage * ratio
        eligible = inside & ~clipped & (covariance > clip_cov_lb) & (covariance < clip_cov_ub)
        place = inside.flatten().cumsum(0).view(inside.shape) - 1 + counts[: together.own].sum()
        words = splitmix64(splitmix64(seed_of_all) + place)
        values, share = ((words >> 11) & (2**53 - 1)).double(), clip_cov_ratio
    k = (n * share).long().clamp(min=1)
    chosen, _ = _select_over_ranks(values, eligible, lambda m: (torch.minimum(k, m), None), "topk", together)
    return chosen


def covariance_options(actor: Any) -> dict[str, Any]:
    """The options of `select_by_covariance` that an actor configuration with verl's keys has."""
    own = ("loss_mode", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio")
    return {
        "ranks": actor.entropy_top_ranks,
        **{name: actor[name] for name in ("clip_ratio", "clip_ratio_low", "clip_ratio_high")},
        **{name: actor.policy_loss[name] for name in own},
    }


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

    Where nothing does, and all selection is made before the optimizer step, only the selected tokens need to meet the
    LM head in it. `actor` is an actor configuration with verl's keys.
    """
    loss_mode = actor.policy_loss.loss_mode
    if loss_mode in SEQUENCE_MODES:
        return f"policy_loss.loss_mode={loss_mode}"
    if actor.entropy_coeff != 0:
        return f"entropy_coeff={actor.entropy_coeff}"
    return "use_kl_loss=true" if actor.use_kl_loss else None


def movement_metrics(loss_mode: str) -> set[str]:
    """Metrics that are means over the response tokens of how far the policy has moved.

    clip_cov's clip fraction is none: it is the share of the tokens that were chosen.
    """
    clipped = set() if loss_mode == "clip_cov" else {"actor/pg_clipfrac", "actor/pg_clipfrac_lower"}
    return {"actor/ppo_kl"} | clipped


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


class _Ranks:
    """The ranks whose tokens compete: those of a process group, or this process alone."""

    def __init__(self, ranks: str, group: dist.ProcessGroup | None) -> None:
        if ranks not in RANKS:
            raise ValueError(f"ranks is {ranks!r}; it must be one of {', '.join(map(repr, RANKS))}")
        self._group = group
        self.several = ranks == "global" and dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size(group) if self.several else 1
        self.own = dist.get_rank(group) if self.several else 0

    def all_reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        if self.several:
            dist.all_reduce(tensor, operation, group=self._group)


def _check_shape(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {list(like.shape)}, that of {like_name}")


@torch.no_grad()
def _select_over_ranks(
    values: Tensor,
    eligible: Tensor,
    sought: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    rule: str,
    ranks: _Ranks,
) -> tuple[Tensor, Tensor]:
    """This rank's part of the mask over all ranks' values, and the lowest value that the rule keeps.

    `values` are of any shape and floating dtype, `eligible` bool of that shape. `sought` tells of so many eligible
    values which one the rule seeks, counted from the largest, and for "quantile" how far above it the quantile lies on
    the way up.
    """
    eligible = eligible.flatten()
    keys = _keys(values)
    smallest, largest = torch.iinfo(keys.dtype).min, torch.iinfo(keys.dtype).max
    keys = torch.where(eligible, keys, smallest)

    # `cut` is the smallest key with the digits found so far; of the keys that have them, the k-th largest is sought.
    cut = keys.new_full((), smallest)
    k = weight = None
    bits = torch.iinfo(keys.dtype).bits
    for shift in (*range(bits - _DIGIT_BITS, 0, -_DIGIT_BITS), 0):
        size, bits = 1 << (bits - shift), shift
        digit = (keys >> shift) - (cut >> shift)
        # One counter more, for the keys that do not count.
        digit = torch.where(eligible & (digit >= 0) & (digit < size), digit, size).long()
        counts = torch.zeros(size + 1, dtype=torch.int64, device=keys.device)
        counts = counts.scatter_add_(0, digit, counts.new_ones(()).expand_as(digit))[:size]
        ranks.all_reduce(counts)
        if k is None:
            k, weight = sought(counts.sum())
            k = k.clamp(min=1)  # of no values the first is sought, and not found
        larger = counts.flip(0).cumsum(0).flip(0) - counts  # keys with a larger digit
        found = (larger >= k).sum()
        k = k - larger.take(found)
        cut = (((cut >> shift) + found) << shift).to(keys.dtype)

    lowest = cut
    if rule == "topk":
        ties = keys.eq(cut) & eligible
        ties_of_rank = torch.zeros(ranks.size, dtype=torch.int64, device=keys.device)
        ties_of_rank[ranks.own] = ties.sum()
        ranks.all_reduce(ties_of_rank)
        left = k - ties_of_rank[: ranks.own].sum()
        selected = keys.gt(cut) | (ties & (ties.cumsum(0) <= left))
    elif rule == "threshold":
        selected = keys.ge(cut) & eligible
    else:
        # The next value up is the same one where it occurs more than once.
        next_key = torch.where(keys > cut, keys, largest)
        next_key = torch.cat([next_key, next_key.new_full((1,), largest)]).amin()
        ranks.all_reduce(next_key, dist.ReduceOp.MIN)
        upper = torch.where(k > 1, cut, next_key)
        threshold = _quantile_key(cut, upper, weight)
        selected = keys.ge(threshold) & eligible
        lowest = torch.where(threshold > cut, upper, cut)
    return selected.view(values.shape), _value(lowest).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _sought(n: Tensor, ratio: float, rule: str) -> tuple[Tensor, Tensor | None]:
    """`sought` of a rule: `top_count` and `quantile_position` of csrc/kernels/selection.h."""
    if rule == "quantile":
        position = (n - 1).clamp(min=0).double() * (1.0 - ratio)
        lower = position.floor()
        return n - lower.long(), position - lower
    return torch.minimum(top_k_count(n, ratio).long(), n), None


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
