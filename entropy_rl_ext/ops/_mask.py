"""Masks given as floats hold 0 and 1 only. Another value is most often an additive mask, or a tensor that is no mask.

On the CPU the kernels raise for it, as `check_mask` does where there is no kernel. On CUDA looking at values would wait
for the device. There the ops make their results NaN where `wrong_values` says so.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def wrong_values(mask: Tensor | None) -> Tensor | None:
    """Where a floating-point mask on CUDA holds neither 0 nor 1, as bool; None for every other mask."""
    if mask is None or not mask.is_cuda or not mask.is_floating_point():
        return None
    return (mask != 0) & (mask != 1)


def any_wrong(*masks: Tensor | None) -> Tensor | None:
    """Whether one of the masks has a wrong value, 0-dim bool; None if none is a floating-point mask on CUDA."""
    found = [wrong.any() for wrong in map(wrong_values, masks) if wrong is not None]
    return torch.stack(found).any() if found else None


def nan_if(wrong: Tensor | None, result: Tensor) -> Tensor:
    """The result, or NaN where `wrong` is true; its gradient likewise."""
    return result if wrong is None else result * torch.ones_like(result).masked_fill(wrong, torch.nan)


def empty_if(wrong: Tensor | None, selection: Tensor) -> Tensor:
    """The selection, or nothing selected where `wrong` is true: booleans have no NaN."""
    return selection if wrong is None else selection.masked_fill(wrong, False)


def check_mask(name: str, mask: Tensor | None) -> None:
    """Raises ValueError for a floating-point mask on the CPU that holds another value than 0 and 1."""
    if mask is None or not mask.is_cpu or not mask.is_floating_point():
        return
    # Neither a compiled graph nor a fake tensor can look at values.
    if torch.compiler.is_compiling() or isinstance(mask, FakeTensor):
        return
    wrong = ((mask != 0) & (mask != 1)).flatten()
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}[{index}] (flat index) is {float(mask.flatten()[index]):g}; "
            "a floating-point mask must hold 0 and 1 only"
        )
