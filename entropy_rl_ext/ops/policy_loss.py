"""policy_loss: every policy loss of verl, with its gradient and metrics, from one op."""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from ._autograd import call_composite
from ._fakes import check_number, check_tensors
from ._loss import loss_and_metrics, register_loss, scalar_tensor
from ._options import check_options

# The op returns all metrics; each loss mode reports those that verl reports for it.
_METRICS = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower", "actor/entropy_token_ratio")
_UNREPORTED = {
    "gpg": {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"},
    "clip_cov": {"actor/pg_clipfrac_lower"},
    "kl_cov": {"actor/pg_clipfrac", "actor/pg_clipfrac_lower"},
    "dro": {"actor/pg_clipfrac", "actor/pg_clipfrac_lower"},
}


@check_options
def policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    loss_mode: str = "vanilla",
    entropy_mask: Tensor | None = None,
    covariance_mask: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    loss_agg_mode: str = "token-mean",
    normalize: str = "selected",
    clip_ratio: float = 0.2,
    clip_ratio_low: float | Tensor | None = None,
    clip_ratio_high: float | Tensor | None = None,
    clip_ratio_c: float = 3.0,
    clip_cov_ratio: float = 0.0002,
    clip_cov_lb: float = 1.0,
    clip_cov_ub: float = 5.0,
    kl_cov_ratio: float = 0.0002,
    ppo_kl_coef: float = 0.1,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    dro_beta: float | None = None,
    seed: int | Tensor = 0,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss over the selected response tokens, with verl's formulas, clamps and metric names.

    Every tensor is [B, S], or [S] for one row, of any strides, on one device. log-probs, advantages and weights are
    float32, bfloat16, float16 or float64; masks are of any dtype, nonzero = in, and floats must be 0 or 1. Tokens
    outside the mask contribute exactly 0 to loss, gradient and metrics, even if they are NaN. If no token is selected
    the loss is 0.

    Args:
        log_prob: log-probabilities under the policy that trains. Only they carry a gradient.
        old_log_prob: log-probabilities under the policy before this update.
        advantages: advantage of each token.
        response_mask: which tokens are response tokens.
        loss_mode: vanilla, gpg, clip_cov, kl_cov, gspo, geo_mean, dppo_tv, dppo_kl, sapo, dro or cispo.
        entropy_mask: which tokens train (see `global_top_mask`). It narrows `response_mask` where the loss is
            aggregated; metrics, covariances and the sequence sums use all response tokens. gspo and geo_mean have
            one ratio a sequence: they accept the mask, do not apply it, and warn once.
        covariance_mask: for clip_cov, the tokens to drop; for kl_cov, the tokens whose loss gets the penalty. None:
            each of the two chooses among the response tokens of this call. The function `covariance_mask` chooses
            among those of several calls and ranks.
        rollout_is_weights: factor of each token's loss.
        loss_agg_mode: token-mean, token-sum, seq-mean-token-sum, seq-mean-token-sum-norm or
            seq-mean-token-mean. sapo is always seq-mean-token-mean, geo_mean always the mean over rows.
        normalize: what a mean divides by: "selected" tokens (Eq. 6 of the paper) or all "response" tokens
            (TRL). At ratio 0.2, "selected" gives a loss and a gradient five times as large. A row counts in a
            mean over rows if it has such a token.
        clip_ratio, clip_ratio_low, clip_ratio_high: how far the ratio may go below and above 1 before it is
            clipped; for dppo_tv and dppo_kl the divergence allowed. clip_ratio, a number, is the default of the other
            two. Each of those is a number, or a tensor with the clip ratio of each token, of the shape of log_prob,
            float32, bfloat16, float16 or float64, finite and 0 or above in response tokens. gspo clips the sequence's
            ratio, and geo_mean the token's log-ratio, with the clip ratios of the token. The arithmetic with a tensor
            is that of the result's dtype; with numbers, 1 - low and 1 + high are computed in float64.
        clip_ratio_c: dual clip of vanilla (above 1); truncation of the ratio for dppo_tv and dppo_kl.
        clip_cov_ratio, clip_cov_lb, clip_cov_ub: clip_cov drops max(1, int(ratio * response tokens)) tokens,
            drawn at random from the unclipped ones whose covariance lies between the bounds.
        kl_cov_ratio, ppo_kl_coef: kl_cov adds coef * |log ratio| to the loss of the max(1, int(ratio *
            response tokens)) tokens of the largest covariance, the first ones where covariances are equal.
        tau_pos, tau_neg: temperatures of sapo for advantages above 0 and the others.
        dro_beta: penalty of dro; required there.
        seed: seed of clip_cov's draw. With the same seed, the draw is the same on every device.
        dp_size: data-parallel ranks whose gradients are averaged.
        batch_num_tokens: divisor of token-mean, over all ranks and micro-batches; None: this batch's tokens.
            Count the tokens that `normalize` names.
        global_batch_size: likewise for the means over rows.
        loss_scale_factor: divisor of seq-mean-token-sum-norm; None: S.

    `seed`, `batch_num_tokens` and `global_batch_size` may be 0-dim tensors on the device. On CUDA, where looking at
    values would wait for the device, a divisor below 0 gives a loss of NaN, a clip ratio in a tensor that is below 0 or
    not finite gives its token a loss and a gradient of NaN, and a float in a mask that is neither 0 nor 1 gives a loss
    and metrics of NaN.

    Returns:
        (loss, metrics). The loss is 0-dim, float32 (float64 for float64 log-probs), as is all arithmetic. The
        metrics are 0-dim tensors on the device: those of `actor/pg_clipfrac`, `actor/ppo_kl` and
        `actor/pg_clipfrac_lower` that verl reports for this loss mode, and with `entropy_mask`
        `actor/entropy_token_ratio`, the share of response tokens that train.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown loss_mode, loss_agg_mode or normalize,
            a covariance_mask with another loss_mode than its two, a number out of its range, a float in a mask
            that is neither 0 nor 1, dp_size > 1 without the divisor that the aggregation needs.
        TypeError: an argument of another type, such as a list.

    Sources: verl 0.9.1, verl/trainer/ppo/core_algos.py; "Beyond the 80/20 Rule", arXiv 2506.01939.
    """
    check_tensors(
        log_prob=log_prob,
        old_log_prob=old_log_prob,
        advantages=advantages,
        response_mask=response_mask,
        optional={
            "entropy_mask": entropy_mask,
            "covariance_mask": covariance_mask,
            "rollout_is_weights": rollout_is_weights,
        },
    )
    low, token_low = _number_or_tensor("clip_ratio_low", clip_ratio_low)
    high, token_high = _number_or_tensor("clip_ratio_high", clip_ratio_high)
    # A warning cannot be part of a compiled graph.
    if entropy_mask is not None and loss_mode in ("gspo", "geo_mean") and not torch.compiler.is_compiling():
        _warn_not_applied(loss_mode)
    loss, values = call_composite(
        "policy_loss",
        _policy_loss,
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        entropy_mask,
        covariance_mask,
        rollout_is_weights,
        scalar_tensor("batch_num_tokens", batch_num_tokens, log_prob.device),
        scalar_tensor("global_batch_size", global_batch_size, log_prob.device),
        scalar_tensor("seed", seed, log_prob.device) if loss_mode == "clip_cov" else None,
        token_low,
        token_high,
        loss_mode=loss_mode,
        normalize=normalize,
        clip_ratio=clip_ratio,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=clip_ratio_c,
        clip_cov_ratio=clip_cov_ratio,
        clip_cov_lb=clip_cov_lb,
        clip_cov_ub=clip_cov_ub,
        kl_cov_ratio=kl_cov_ratio,
        ppo_kl_coef=ppo_kl_coef,
        tau_pos=tau_pos,
        tau_neg=tau_neg,
        dro_beta=dro_beta,
        loss_agg_mode=loss_agg_mode,
        dp_size=dp_size,
        loss_scale_factor=loss_scale_factor,
    )
    metrics = dict(zip(_METRICS, values.unbind(), strict=True))
    unreported = _UNREPORTED.get(loss_mode, set())
    if entropy_mask is None:
        unreported = unreported | {"actor/entropy_token_ratio"}
    return loss, {name: value for name, value in metrics.items() if name not in unreported}


def _number_or_tensor(name: str, value: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    if isinstance(value, Tensor):
        return None, value
    check_number(name, value)
    return value, None


@functools.cache
def _warn_not_applied(loss_mode: str) -> None:
    warnings.warn(f"entropy_mask is not applied: loss_mode '{loss_mode}' has one ratio a sequence", stacklevel=3)


def _policy_loss(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    return loss_and_metrics("policy_loss", tensors, options)


torch.library.impl("entropy_rl::policy_loss", "CompositeImplicitAutograd", _policy_loss)
register_loss("policy_loss")
