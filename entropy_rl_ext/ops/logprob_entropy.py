"""logprob_entropy: log-probability of the target and entropy, one online-softmax pass over the logits."""

from typing import Any

import torch
from torch import Tensor

from ._autograd import call_composite, register_autograd, register_no_derivative
from ._fakes import check_same_device, check_tensors
from ._options import check_options
from ._temperature import split_temperature, temperature_tensor


@check_options
def logprob_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target, and the row's entropy, under softmax(logits / temperature).

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64; any strides (a copy is made only where the
            last dimension is not contiguous).
        targets: [...], any integer dtype, in [0, V). Where `mask` is 0 a target may have any value, such as -100.
        mask: [...], any dtype; rows with 0 are not read, and their results and gradients are 0. Floats must be 0 or 1.
        temperature: a number in [2^-126, 2^126], or a tensor that broadcasts to [...], one value a row. Where `mask`
            is 0 a row's may have any value.
        entropy_grad: whether the entropy carries a gradient; an entropy bonus needs it, selection does not.

    Returns:
        (log_prob, entropy), both [...], in nats, float32 (float64 for float64 logits). Arithmetic is float32
        (float64). The backward does not read rows whose incoming gradients are zero. -inf logits have
        probability 0; a row that is all -inf, or holds +inf or NaN, gives NaN in its own row only.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty vocabulary, a number out of its range, a
            target outside the vocabulary, a float in `mask` that is neither 0 nor 1. On CUDA, where reading the values
            would wait for the device, a bad target, per-row temperature or value of `mask` gives NaN for its own row
            instead.
        TypeError: an argument of another type, such as a list.
    """
    check_tensors(logits=logits, targets=targets, optional={"mask": mask})
    number, row_temperature = split_temperature(temperature, logits)
    return call_composite(
        "logprob_entropy", _logprob_entropy, logits, targets, mask, number, row_temperature, entropy_grad
    )


def _logprob_entropy(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    row_temperature: Tensor | None = None,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    log_prob, entropy, _ = logprob_entropy_forward(
        logits, targets, mask, temperature_tensor(temperature, row_temperature, mask)
    )
    return log_prob, entropy if entropy_grad else entropy.detach()


torch.library.impl("entropy_rl::logprob_entropy", "CompositeImplicitAutograd", _logprob_entropy)


# The kernels of logprob_entropy and token_entropy. Without targets log_prob is empty, of shape [0].


@torch.library.register_fake("entropy_rl::logprob_entropy_forward")
def _(
    logits: Tensor, targets: Tensor | None, mask: Tensor | None, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_same_device(logits=logits, targets=targets, mask=mask)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[:-1]
    return (
        logits.new_empty(rows if targets is not None else 0, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty((*rows, 2), dtype=dtype),
    )


@torch.library.register_fake("entropy_rl::logprob_entropy_backward")
def _(
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor,
    entropy: Tensor,
    max_log_sum: Tensor,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, mask, temperature = inputs
    log_prob, entropy, max_log_sum = output
    ctx.mark_non_differentiable(max_log_sum, *([log_prob] if targets is None else []))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, mask, temperature, entropy, max_log_sum)


def _backward(
    ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    logits, targets, mask, temperature, entropy, max_log_sum = ctx.saved_tensors
    grad_logits = torch.ops.entropy_rl.logprob_entropy_backward(
        grad_log_prob, grad_entropy, logits, targets, mask, temperature, entropy, max_log_sum
    )
    return grad_logits, None, None, None


logprob_entropy_forward = register_autograd("logprob_entropy_forward", _backward, _setup_context, differentiable=1)
register_no_derivative("logprob_entropy_backward", "second derivatives are not offered")
