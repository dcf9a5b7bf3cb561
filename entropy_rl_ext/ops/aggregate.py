"""aggregate: reduces a [B, S] tensor to one number over the tokens of a mask, as losses are reduced."""

from typing import Any

import torch
from torch import Tensor

from ._autograd import call_composite
from ._fakes import check_tensors
from ._loss import loss_and_metrics, register_loss, scalar_tensor
from ._options import check_options


@check_options
def aggregate(
    values: Tensor,
    mask: Tensor,
    *,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """Aggregates token values to one number. An entropy bonus is `coeff * aggregate(entropy, response_mask)`.

        token-mean               sum over tokens / tokens
        token-sum                sum over tokens
        seq-mean-token-sum       mean over rows of the sum over the row's tokens
        seq-mean-token-sum-norm  the same, divided by loss_scale_factor
        seq-mean-token-mean      mean over rows of the mean over the row's tokens

    each times dp_size. Tokens count where the mask is nonzero, and rows where they have such a token. Without any
    token the result is 0.

    Args:
        values: [B, S], or [S] for one row; float32, bfloat16, float16 or float64; differentiable.
        mask: the same shape, any dtype, nonzero = in. A value outside the mask contributes exactly 0, even if it is
            NaN. Floats must be 0 or 1; on CUDA, where looking would wait for the device, others give NaN.
        loss_agg_mode: one of the names above.
        dp_size: data-parallel ranks whose gradients are averaged.
        batch_num_tokens: tokens to divide by in token-mean, over all ranks and micro-batches; this batch's
            where None. A number or a 0-dim tensor on the device, 0 or above. On CUDA, where looking at a tensor's
            value would wait for the device, one below 0 gives NaN.
        global_batch_size: rows to divide by in the means over rows, likewise.
        loss_scale_factor: divisor of seq-mean-token-sum-norm; None: S.

    Returns:
        0-dim, float32 (float64 for float64 values).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown loss_agg_mode, a number out of its
            range, a float in the mask that is neither 0 nor 1, dp_size > 1 without the divisor that the mode needs.
        TypeError: an argument of another type, such as a list.

    Source: verl 0.9.1, agg_loss.
    """
    check_tensors(values=values, mask=mask)
    return call_composite(
        "aggregate",
        _aggregate,
        values,
        mask,
        scalar_tensor("batch_num_tokens", batch_num_tokens, values.device),
        scalar_tensor("global_batch_size", global_batch_size, values.device),
        loss_agg_mode=loss_agg_mode,
        dp_size=dp_size,
        loss_scale_factor=loss_scale_factor,
    )


def _aggregate(*tensors: Tensor | None, **options: Any) -> Tensor:
    return loss_and_metrics("aggregate", tensors, options)[0]


torch.library.impl("entropy_rl::aggregate", "CompositeImplicitAutograd", _aggregate)
register_loss("aggregate")
