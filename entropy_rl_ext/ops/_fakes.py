"""The checks that no kernel can make."""

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor


def check_tensors(*, optional: dict[str, Any] | None = None, **required: Any) -> None:
    """Raises TypeError for an argument that is no tensor, by its type: PyTorch would print all of a list's data.

    Args:
        optional: arguments that may be None.
    """
    given = {name: value for name, value in (optional or {}).items() if value is not None}
    for name, value in (required | given).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {description(value)}; it must be a torch.Tensor")


def check_number(name: str, value: Any) -> None:
    """Raises TypeError for a list or an array in place of a number or a tensor."""
    # torch.compile cannot ask a symbolic number for its type.
    if not torch.compiler.is_compiling() and isinstance(value, Sized) and not isinstance(value, Tensor):
        raise TypeError(f"{name} is {description(value)}; it must be a number or a torch.Tensor")


def description(value: Any) -> str:
    """Type and size of a value, without its data."""
    of = type(value)
    name = of.__qualname__ if of.__module__ == "builtins" else f"{of.__module__}.{of.__qualname__}"
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"of type {name} and shape {list(shape)}"
    return f"of type {name} and length {len(value)}" if isinstance(value, Sized) else f"of type {name}"


def check_same_device(**tensors: Tensor | None) -> None:
    """Raises ValueError where a tensor is on another device than the first.

    If any tensor is on the meta device, the dispatcher calls the fake kernel, and the compiled kernel checks nothing.
    """
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, *others = present
    for name in others:
        if present[name].device != present[first].device:
            raise ValueError(
                f"{name} is on {present[name].device} and {first} on {present[first].device}; "
                "all tensors of one call must be on the same device"
            )
