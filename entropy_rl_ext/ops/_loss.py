"""What policy_loss, kl_loss and aggregate share: fakes, autograd, and numbers that change at every step."""

from typing import Any

import torch
from torch import Tensor

from ._autograd import register_autograd, register_no_derivative
from ._fakes import check_same_device


def scalar_tensor(name: str, value: float | Tensor | None, device: torch.device) -> Tensor | None:
    """A number as a 0-dim tensor: as a plain argument, each new value would be compiled or captured anew."""
    if value is None or isinstance(value, Tensor):
        return value
    if value < 0:
        raise ValueError(f"{name} is {value}; it must be 0 or above")
    one = torch.ones((), dtype=torch.int64 if name == "seed" else torch.float64, device=device)
    # A product keeps a symbolic number symbolic; torch.compile would specialise on a fill value.
    return one * value


def register_loss(op: str) -> None:
    """Fakes and autograd of an op's forward and backward. Only its first argument carries a gradient."""
    forward, backward = (getattr(torch.ops.entropy_rl, f"{op}_{part}") for part in ("forward", "backward"))
    names = [argument.name for argument in forward.default._schema.arguments]

    def fake(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        check_same_device(**dict(zip(names, tensors, strict=False)))
        values = tensors[0]
        assert values is not None
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        return (
            values.new_empty((), dtype=dtype),
            values.new_empty(4, dtype=dtype),
            values.new_empty(values.shape, dtype=dtype),
            values.new_empty(values.shape[0], dtype=dtype),
        )

    def fake_backward(grad_loss: Tensor, gradient: Tensor, row_scale: Tensor, values: Tensor) -> Tensor:
        check_same_device(grad_loss=grad_loss, gradient=gradient, row_scale=row_scale, values=values)
        return values.new_empty(values.shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        _, metrics, gradient, row_scale = outputs
        ctx.mark_non_differentiable(metrics, gradient, row_scale)
        # The values, too: without them the backward op could not tell that it must refuse a second derivative.
        ctx.save_for_backward(gradient, row_scale, inputs[0])
        ctx.constants = len(inputs) - 1

    def differentiate(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return backward(grad_loss, *ctx.saved_tensors), *[None] * ctx.constants

    torch.library.register_fake(f"entropy_rl::{op}_forward", fake)
    torch.library.register_fake(f"entropy_rl::{op}_backward", fake_backward)
    register_autograd(f"{op}_forward", differentiate, setup_context, differentiable=1)
    register_no_derivative(f"{op}_backward", "second derivatives are not offered")
