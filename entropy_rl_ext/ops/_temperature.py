"""`temperature` as callers give it (a number, or a tensor with one value a row) as the ops take it."""

import torch
from torch import Tensor


def temperature_tensor(temperature: float, row_temperature: Tensor | None) -> Tensor:
    """The form in which the kernels' ops take it: 0-dim float64 on the CPU, or one value a row.

    Written as a product because torch.compile keeps a factor symbolic where it would specialise on a fill
    value or on a `float` argument.
    """
    if row_temperature is not None:
        return row_temperature
    return torch.ones((), dtype=torch.float64, device="cpu") * temperature


def split_temperature(temperature: float | Tensor, logits: Tensor) -> tuple[float, Tensor | None]:
    """Returns (number, None) or (1.0, tensor of shape `logits.shape[:-1]`)."""
    if not isinstance(temperature, Tensor):
        return temperature, None
    if not temperature.is_floating_point():
        temperature = temperature.to(torch.float32)
    try:
        return 1.0, temperature.expand(logits.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"temperature has shape {list(temperature.shape)}; it must be a number or broadcast to "
            f"{list(logits.shape[:-1])}, one value for each row of logits"
        ) from None
