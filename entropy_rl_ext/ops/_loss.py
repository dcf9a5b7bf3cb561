"""What policy_loss, kl_loss and aggregate share: fakes, autograd, and numbers that change at every step."""

from typing import Any

import torch
from torch import Tensor

from ._autograd import register_no_derivative
from ._fakes import check_same_device


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    _, metrics, gradient, row_scale = output
    ctx.mark_non_differentiable(metrics, gradient, row_scale)
    ctx.inputs = len(inputs)
    # The values, too: what the backward op does not see could not tell it to refuse a second derivative.
    ctx.save_for_backward(gradient, row_scale, inputs[0])


def register_loss(op: str) -> None:
    """Fakes and autograd of an op's forward and backward: its first argument alone carries a gradient."""
    backward_op = getattr(torch.ops.entropy_rl, f"{op}_backward")

    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return backward_op(grad_loss, *ctx.saved_tensors), *[None] * (ctx.inputs - 1)

    torch.library.register_fake(f"entropy_rl::{op}_forward", _fake)
    torch.library.register_fake(f"entropy_rl::{op}_backward", _fake_backward)
    torch.library.register_autograd(f"entropy_rl::{op}_forward", backward, setup_context=_setup_context)
    register_no_derivative(f"{op}_backward", "second derivatives are not offered")
