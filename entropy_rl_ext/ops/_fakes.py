"""What the fake kernels check: the one thing that the compiled kernels are never asked about."""

from torch import Tensor


def check_same_device(**tensors: Tensor | None) -> None:
    """Raises ValueError where a tensor is on another device than the first.

    With a tensor on the meta device the dispatcher takes the fake kernel, whatever the others are on.
    """
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, *others = present
    for name in others:
        if present[name].device != present[first].device:
            raise ValueError(
                f"{name} is on {present[name].device} and {first} on {present[first].device}; "
                "all tensors of one call must be on the same device"
            )
