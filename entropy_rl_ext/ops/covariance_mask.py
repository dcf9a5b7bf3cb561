"""covariance_mask: the tokens that clip_cov and kl_cov choose by covariance, over several micro-batches and ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from ._fakes import check_tensors
from ._mask import any_wrong, check_mask, empty_if
from ._options import check_options
from ._select_over_ranks import Ranks, select_over_ranks
from .policy_loss import policy_loss

LOSS_MODES = ("clip_cov", "kl_cov")


@check_options
@torch.no_grad()
def covariance_mask(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_mode: str,
    *,
    group: dist.ProcessGroup | None = None,
    clip_ratio: float = 0.2,
    clip_ratio_low: float | Tensor | None = None,
    clip_ratio_high: float | Tensor | None = None,
    clip_cov_ratio: float = 0.0002,
    clip_cov_lb: float = 1.0,
    clip_cov_ub: float = 5.0,
    kl_cov_ratio: float = 0.0002,
    seed: int = 0,
) -> Tensor:
    """The tokens that `policy_loss` chooses for clip_cov and kl_cov, chosen among all of these tokens and those of
    other ranks.

    `policy_loss` chooses among the tokens that it is given, as verl does: those of one micro-batch. Pass it slices of
    this mask as `covariance_mask`, and the step does not depend on its split into micro-batches and ranks.

    Args:
        log_prob, old_log_prob, advantages: the same shape, any; float32, bfloat16, float16 or float64; may be empty.
            The log-probs are those of the policy before the optimizer step, and of the policy that sampled.
        response_mask: the same shape, any dtype, nonzero = response token. Floats must be 0 or 1.
        loss_mode: "clip_cov" or "kl_cov".
        group: as in `global_top_mask`; all ranks pass the same options.
        seed: seed of clip_cov's draw, in [0, 2^63); the first rank's seed is used. A token's random number depends on
            its place among the response tokens of all ranks, rank after rank. `policy_loss` draws other numbers.
        Other options: as in `policy_loss`.

    Returns:
        Bool, the shape of `log_prob`. The covariance is (A - mean A)(log p - mean log p), with means over all n
        response tokens. kl_cov chooses the max(1, int(n * kl_cov_ratio)) tokens of the largest covariance; ties go to
        the lowest rank, then to the lowest flat index. clip_cov draws max(1, int(n * clip_cov_ratio)) of the unclipped
        tokens whose covariance lies between the bounds, or takes all of those where they are fewer.

    Raises:
        ValueError: as `policy_loss`, another loss_mode, or shapes that differ. On CUDA, where reading the values would
            wait for the device, a float in `response_mask` that is neither 0 nor 1 gives a mask without any token.

    Sources: "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", arXiv 2505.22617, and
    compute_policy_loss_clip_cov and compute_policy_loss_kl_cov of verl 0.9.1.
    """
    check_tensors(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages, response_mask=response_mask)
    if loss_mode not in LOSS_MODES:
        raise ValueError(f"loss_mode is {loss_mode!r}; it must be one of {', '.join(map(repr, LOSS_MODES))}")
    batch = {"old_log_prob": old_log_prob, "advantages": advantages, "response_mask": response_mask}
    low = clip_ratio if clip_ratio_low is None else clip_ratio_low
    high = clip_ratio if clip_ratio_high is None else clip_ratio_high
    of_tokens = {
        name: value
        for name, value in {"clip_ratio_low": low, "clip_ratio_high": high}.items()
        if isinstance(value, Tensor)
    }
    for name, tensor in (batch | of_tokens).items():
        if tensor.shape != log_prob.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; it must be {list(log_prob.shape)}, that of log_prob"
            )
    # policy_loss checks the other arguments, before anything is sent.
    policy_loss(
        *(tensor.new_empty(0, 0) for tensor in (log_prob, *batch.values())),
        loss_mode=loss_mode,
        clip_ratio_low=low.new_empty(0, 0) if isinstance(low, Tensor) else low,
        clip_ratio_high=high.new_empty(0, 0) if isinstance(high, Tensor) else high,
        clip_cov_ratio=clip_cov_ratio,
        clip_cov_lb=clip_cov_lb,
        clip_cov_ub=clip_cov_ub,
        kl_cov_ratio=kl_cov_ratio,
        seed=seed,
    )
    check_mask("response_mask", response_mask)
    inside = empty_if(any_wrong(response_mask), response_mask != 0)
    ranks = Ranks(group)
    dtype = torch.float64 if log_prob.dtype == torch.float64 else torch.float32
    log_p, old, advantage = (torch.where(inside, x.to(dtype), 0) for x in (log_prob, old_log_prob, advantages))
    counts, first_seed, means = _totals(log_p, advantage, inside, seed, loss_mode, ranks)
    n = counts.sum()
    covariance = (advantage - means[1]) * (log_p - means[0])

    if loss_mode == "kl_cov":
        values, eligible, share = covariance, inside, kl_cov_ratio
    else:
        ratio = (log_p - old).exp()
        clipped = -advantage * ratio.clamp(_tensor(1 - low, ratio), _tensor(1 + high, ratio)) > -advantage * ratio
        eligible = inside & ~clipped & (covariance > clip_cov_lb) & (covariance < clip_cov_ub)
        place = inside.flatten().cumsum(0).view(inside.shape) - 1 + counts[: ranks.own].sum()
        values, share = random_numbers(first_seed, place), clip_cov_ratio
    k = (n * share).long().clamp(min=1)
    # The op keeps int(n * (k / n) + 0.9999) of n values, which is k whatever the rounding.
    chosen, _ = select_over_ranks(
        values,
        eligible,
        lambda _: (k, None),
        lambda mask: (k.double() / mask.sum().clamp(min=1)).clamp(max=1),
        "topk",
        ranks,
        need_lowest=False,
    )
    return chosen


def _tensor(bound: float | Tensor, like: Tensor) -> Tensor:
    # A conversion of a number would copy it from the host and wait.
    return bound.to(like.dtype) if isinstance(bound, Tensor) else like.new_full((), bound)


def _totals(
    log_p: Tensor, advantage: Tensor, inside: Tensor, seed: int, loss_mode: str, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """Response tokens of each rank [ranks], the first rank's seed, and the means of log_p and advantage [2]."""
    counts = torch.zeros(ranks.size + 1, dtype=torch.int64, device=inside.device)
    counts[ranks.own] = inside.sum()
    if ranks.own == 0:
        counts[-1].fill_(seed)  # an assignment would copy the number from the host and wait
    # Summed in float64 and rounded to float32, the means do not depend on the order of the sum.
    sums = torch.stack([log_p.sum(dtype=torch.float64), advantage.sum(dtype=torch.float64)])
    ranks.all_reduce(counts)
    ranks.all_reduce(sums)
    n = counts[:-1].sum().double() + (1e-8 if loss_mode == "clip_cov" else 0.0)
    return counts[:-1], counts[-1], (sums / n).to(log_p.dtype)


def random_numbers(seed: Tensor, place: Tensor) -> Tensor:
    """A random integer in [0, 2^53) for each place, as float64."""
    return ((_splitmix64(_splitmix64(seed) + place) >> 11) & (2**53 - 1)).double()


def _splitmix64(state: Tensor) -> Tensor:
    """The next word of splitmix64 (Steele, Lea, Flood, 2014) after each state; int64 stands for unsigned words."""
    word = state - 0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        word = (word ^ (word >> shift & (1 << 64 - shift) - 1)) * factor
    return word ^ (word >> 31 & (1 << 33) - 1)
