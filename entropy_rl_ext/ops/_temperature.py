"""Converts `temperature`, a number or a tensor with one value a row, to the arguments of the ops."""

import torch
from torch import Tensor


def temperature_tensor(temperature: float, row_temperature: Tensor | None) -> Tensor:
    """The temperature as the `_forward` ops take it: 0-dim float64 on the CPU, or one value a row.

    torch.compile keeps a factor of a product symbolic; it would specialise on a fill value or a `float` argument.
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
