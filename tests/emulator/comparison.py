"""What the cases of check.py share: dtypes, tolerances and comparisons."""

import math

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def for_dtype(dtype: torch.dtype, double: float, other: float) -> float:
    return double if dtype == torch.float64 else other


def compare(name: str, actual: Tensor, expected: Tensor, atol: float, rtol: float) -> None:
    """Within the tolerance; NaN and infinities equal themselves."""
    actual, expected = actual.detach().cpu().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (actual - expected).abs())
    wrong = ~same & ~(error <= atol + rtol * expected.abs())
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name}{list(at)}: {actual[at]:.9g}, not {expected[at]:.9g} ({int(wrong.sum())} of {wrong.numel()} wrong)"
        )


def equal(name: str, actual: Tensor, expected: Tensor) -> None:
    actual = actual.cpu()
    if not torch.equal(actual, expected):
        wrong = (actual != expected).nonzero()
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{name}: {len(wrong)} of {expected.numel()} differ, first {at}: {actual[at]}, not {expected[at]}"
        )


def largest(grads: list[Tensor]) -> float:
    """The sum of the largest gradient of each output."""
    return sum(g.abs().max().item() for g in grads if g.numel())


def finite_rows(x: Tensor) -> Tensor:
    return torch.isfinite(x.double()).all(-1, keepdim=True)


def lowest_temperature(temperature: float | Tensor) -> float:
    return temperature if isinstance(temperature, float) else 0.5


def gradient_scale(grads: list[Tensor], vocab: int, temperature: float | Tensor) -> float:
    """How large a gradient of the logits can be: a probability times its logarithm, a grad and 1 / temperature."""
    return max(1.0, largest(grads) * (1 + math.log(vocab)) / lowest_temperature(temperature))
