"""The check that only fake kernels can make: whether all tensors are on one device."""

from torch import Tensor


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
