"""token_entropy: entropy of softmax(logits / temperature), one online-softmax pass over the logits."""

from typing import Any

import torch
from torch import Tensor

from ._autograd import register_no_derivative
from ._fakes import check_same_device
from ._temperature import split_temperature, temperature_tensor


def token_entropy(logits: Tensor, *, mask: Tensor | None = None, temperature: float | Tensor = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature) of each row.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64; any strides (a copy is made only where the
            last dimension is not contiguous).
        mask: [...], any dtype, nonzero = in. Rows left out are not read; their entropy and gradient are 0.
        temperature: a number above 0, or a tensor that broadcasts to [...], one value a row.

    Returns:
        [...], float32 (float64 for float64 logits), differentiable with respect to `logits`. Arithmetic is
        float32 (float64). -inf logits have probability 0; a row that is all -inf, or holds +inf or NaN,
        gives NaN in its own row alone.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty vocabulary, a temperature that is not
            above 0 (on CUDA a per-row temperature is not looked at; one that is not above 0 gives NaN).

    Source: the token entropy of "Beyond the 80/20 Rule", arXiv 2506.01939, Eq. 1.
    """
    number, row_temperature = split_temperature(temperature, logits)
    entropy: Tensor = torch.ops.entropy_rl.token_entropy(logits, mask, number, row_temperature)
    return entropy


@torch.library.impl("entropy_rl::token_entropy", "CompositeImplicitAutograd")
def _token_entropy(
    logits: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    row_temperature: Tensor | None = None,
) -> Tensor:
    entropy: Tensor
    entropy, _ = torch.ops.entropy_rl.token_entropy_forward(
        logits, mask, temperature_tensor(temperature, row_temperature)
    )
    return entropy


@torch.library.register_fake("entropy_rl::token_entropy_forward")
def _(logits: Tensor, mask: Tensor | None, temperature: Tensor) -> tuple[Tensor, Tensor]:
    check_same_device(logits=logits, mask=mask)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[:-1]
    return logits.new_empty(rows, dtype=dtype), logits.new_empty((*rows, 2), dtype=dtype)


@torch.library.register_fake("entropy_rl::token_entropy_backward")
def _(
    grad_entropy: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    entropy: Tensor,
    statistics: Tensor,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, mask, temperature = inputs
    entropy, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(logits, mask, temperature, entropy, statistics)


def _backward(ctx: Any, grad_entropy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, mask, temperature, entropy, statistics = ctx.saved_tensors
    grad_logits = torch.ops.entropy_rl.token_entropy_backward(
        grad_entropy, logits, mask, temperature, entropy, statistics
    )
    return grad_logits, None, None


torch.library.register_autograd("entropy_rl::token_entropy_forward", _backward, setup_context=_setup_context)
register_no_derivative("token_entropy_backward", "second derivatives are not offered")
