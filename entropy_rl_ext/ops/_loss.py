"""What policy_loss, kl_loss and aggregate share: fakes, autograd, and numbers that change at every step."""

from typing import Any

import torch
from torch import Tensor

from ._autograd import register_no_derivative
from ._fakes import check_same_device

# Its registrations live as long as it.
_LIBRARY = torch.library.Library("entropy_rl", "FRAGMENT")  # type: ignore[no-untyped-call]


def scalar_tensor(name: str, value: float | Tensor | None, device: torch.device) -> Tensor | None:
    """A number as a 0-dim tensor: as a plain argument, each new value would be compiled or captured anew."""
    if value is None or isinstance(value, Tensor):
        return value
    if value < 0:
        raise ValueError(f"{name} is {value}; it must be 0 or above")
    one = torch.ones((), dtype=torch.int64 if name == "seed" else torch.float64, device=device)
    # A product keeps a symbolic number symbolic, where a fill value would be specialised on.
    return one * value


def _fake(values: Tensor, *others: Tensor | None, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_same_device(values=values, **{f"argument {i}": other for i, other in enumerate(others, 2)})
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return (
        values.new_empty((), dtype=dtype),
        values.new_empty(4, dtype=dtype),
        values.new_empty(values.shape, dtype=dtype),
        values.new_empty(values.shape[0], dtype=dtype),
    )


def _fake_backward(grad_loss: Tensor, gradient: Tensor, row_scale: Tensor, values: Tensor) -> Tensor:
    check_same_device(grad_loss=grad_loss, gradient=gradient, row_scale=row_scale, values=values)
    return values.new_empty(values.shape)


def register_loss(op: str) -> None:
    """Fakes and autograd of an op's forward and backward: its first argument alone carries a gradient.

    The autograd kernel is `torch.library.register_autograd`'s without its completion of default arguments, whose
    time is quadratic in their number: 0.2 ms for the 26 of policy_loss, as long as the rest of a small batch.
    """
    forward_op = getattr(torch.ops.entropy_rl, f"{op}_forward").default
    backward_op = getattr(torch.ops.entropy_rl, f"{op}_backward")

    def below_autograd(keyset: Any, options: dict[str, Any], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs: tuple[Tensor, ...] = forward_op.redispatch(
                keyset & torch._C._after_autograd_keyset, *tensors, **options
            )
        return outputs

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, options: dict[str, Any], *tensors: Tensor | None) -> tuple[Tensor, ...]:
            outputs = below_autograd(keyset, options, *tensors)
            _, metrics, gradient, row_scale = outputs
            ctx.mark_non_differentiable(metrics, gradient, row_scale)
            # The values, too: what the backward op does not see could not tell it to refuse a second derivative.
            ctx.save_for_backward(gradient, row_scale, tensors[0])
            ctx.others = len(tensors) - 1
            return outputs

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
            return None, None, backward_op(grad_loss, *ctx.saved_tensors), *[None] * ctx.others

    def autograd(keyset: Any, values: Tensor, *others: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and values.requires_grad:
            outputs: tuple[Tensor, ...] = Loss.apply(keyset, options, values, *others)  # type: ignore[no-untyped-call]
            return outputs
        return below_autograd(keyset, options, values, *others)

    torch.library.register_fake(f"entropy_rl::{op}_forward", _fake)
    torch.library.register_fake(f"entropy_rl::{op}_backward", _fake_backward)
    _LIBRARY.impl(f"{op}_forward", autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
    register_no_derivative(f"{op}_backward", "second derivatives are not offered")
