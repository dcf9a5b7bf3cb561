"""kl_loss: the KL penalty of the policy against a reference policy, with its gradient, in one pass."""

from typing import Any

import torch
from torch import Tensor

from ._autograd import call_composite
from ._fakes import check_tensors
from ._loss import loss_and_metrics, register_loss, scalar_tensor
from ._options import check_options


@check_options
def kl_loss(
    log_prob: Tensor,
    ref_log_prob: Tensor,
    response_mask: Tensor,
    *,
    weights: Tensor | None = None,
    kl_loss_type: str = "low_var_kl",
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """Estimated KL divergence of the policy from a reference policy, aggregated over the response tokens.

    With d = log_prob - ref_log_prob, a token's estimate is

        kl, k1           d
        abs              |d|
        mse, k2          d^2 / 2
        low_var_kl, k3   e^-d + d - 1, d clamped to [-20, 20] and the result to [-10, 10]

    A final + (`k3+`) keeps the value and replaces its gradient by d, the gradient of k2, whose expectation is the
    gradient of the KL divergence.

    Args:
        log_prob: [B, S], or [S] for one row; float32, bfloat16, float16 or float64. Only `log_prob` carries a gradient.
        ref_log_prob: the same shape.
        response_mask: the same shape, any dtype, nonzero = in. Other tokens contribute exactly 0. Floats must be 0 or
            1; on CUDA, where looking would wait for the device, others give NaN.
        weights: factor of each token's estimate: the same shape, floating. Divisors do not change. None: 1.
        kl_loss_type: one of the names above.
        loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor: as in `aggregate`.

    Returns:
        0-dim, float32 (float64 for float64 log-probs).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown kl_loss_type or loss_agg_mode, a
            number out of its range, a float in the mask that is neither 0 nor 1.
        TypeError: an argument of another type, such as a list.

    Sources: verl 0.9.1, kl_penalty; joschu.net/blog/kl-approx.html.
    """
    check_tensors(
        log_prob=log_prob, ref_log_prob=ref_log_prob, response_mask=response_mask, optional={"weights": weights}
    )
    return call_composite(
        "kl_loss",
        _kl_loss,
        log_prob,
        ref_log_prob,
        response_mask,
        scalar_tensor("batch_num_tokens", batch_num_tokens, log_prob.device),
        scalar_tensor("global_batch_size", global_batch_size, log_prob.device),
        weights,
        kl_loss_type=kl_loss_type,
        loss_agg_mode=loss_agg_mode,
        dp_size=dp_size,
        loss_scale_factor=loss_scale_factor,
    )


def _kl_loss(*tensors: Tensor | None, **options: Any) -> Tensor:
    return loss_and_metrics("kl_loss", tensors, options)[0]


torch.library.impl("entropy_rl::kl_loss", "CompositeImplicitAutograd", _kl_loss)
register_loss("kl_loss")
