"""What policy_loss, kl_loss and aggregate share: fakes, autograd, and numbers that change at every step."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from entropy_rl_ext.ops._fakes import check_same_device


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    _, metrics, gradient, row_scale = output
    ctx.inputs, ctx.dtype = len(inputs), inputs[0].dtype
    ctx.mark_non_differentiable(metrics, gradient, row_scale)
    ctx.save_for_backward(gradient, row_scale)


@once_differentiable
def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradient, row_scale = ctx.saved_tensors
    grad_values = gradient * (grad_loss * row_scale).unsqueeze(1)
    return grad_values.to(ctx.dtype), *[None] * (ctx.inputs - 1)


def register_loss(op: str) -> None:
    """Fake and autograd of a forward op: its first argument alone carries a gradient."""
    torch.library.register_fake(op, _fake)
    torch.library.register_autograd(op, _backward, setup_context=_setup_context)
