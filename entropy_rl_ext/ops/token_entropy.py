"""token_entropy: entropy of softmax(logits / temperature), by the kernels of logprob_entropy without targets."""

import torch
from torch import Tensor

from ._autograd import call_composite
from ._fakes import check_tensors
from ._options import check_options
from ._temperature import split_temperature, temperature_tensor
from .logprob_entropy import logprob_entropy_forward


@check_options
def token_entropy(logits: Tensor, *, mask: Tensor | None = None, temperature: float | Tensor = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature) of each row.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64; any strides (a copy is made only where the
            last dimension is not contiguous).
        mask: [...], any dtype; rows with 0 are not read, and their entropy and gradient are 0. Floats must be 0 or 1.
        temperature: a number in [2^-126, 2^126], or a tensor that broadcasts to [...], one value a row. Where `mask`
            is 0 a row's may have any value.

    Returns:
        [...], float32 (float64 for float64 logits), differentiable with respect to `logits`. Arithmetic is
        float32 (float64). -inf logits have probability 0; a row that is all -inf, or holds +inf or NaN,
        gives NaN in its own row only.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty vocabulary, a number out of its range, a
            float in `mask` that is neither 0 nor 1. On CUDA, where reading the values would wait for the device, a bad
            per-row temperature or value of `mask` gives NaN for its own row instead.
        TypeError: an argument of another type, such as a list.

    Source: the token entropy of "Beyond the 80/20 Rule", arXiv 2506.01939, Eq. 1.
    """
    check_tensors(logits=logits, optional={"mask": mask})
    number, row_temperature = split_temperature(temperature, logits)
    return call_composite("token_entropy", _token_entropy, logits, mask, number, row_temperature)


def _token_entropy(
    logits: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    row_temperature: Tensor | None = None,
) -> Tensor:
    entropy: Tensor
    _, entropy, _ = logprob_entropy_forward(logits, None, mask, temperature_tensor(temperature, row_temperature, mask))
    return entropy


torch.library.impl("entropy_rl::token_entropy", "CompositeImplicitAutograd", _token_entropy)
