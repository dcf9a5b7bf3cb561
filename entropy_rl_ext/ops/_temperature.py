"""Converts `temperature`, a number or a tensor with one value a row, to the arguments of the ops."""

import torch
from torch import Tensor

from ._fakes import check_number
from ._mask import wrong_values
from ._options import host_number


def temperature_tensor(temperature: float, row_temperature: Tensor | None, mask: Tensor | None) -> Tensor:
    """The temperature as the `_forward` ops take it: 0-dim float64 on the CPU, or one value a row.

    It is NaN for rows whose value in `mask` is wrong (`_mask.py`), which makes their results NaN.
    """
    wrong = wrong_values(mask)
    if wrong is None:
        if row_temperature is not None:
            return row_temperature
        return host_number(temperature)
    if row_temperature is None:
        row_temperature = torch.ones_like(wrong, dtype=torch.float64) * temperature
    # For masks of another shape the op raises.
    fits = row_temperature.shape == wrong.shape
    return row_temperature.masked_fill(wrong, torch.nan) if fits else row_temperature


def split_temperature(temperature: float | Tensor, logits: Tensor) -> tuple[float, Tensor | None]:
    """Returns (number, None) or (1.0, tensor of shape `logits.shape[:-1]`)."""
    check_number("temperature", temperature)
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
