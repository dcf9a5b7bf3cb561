"""What policy_loss, kl_loss and aggregate share: fakes, autograd, and numbers that change at every step."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._autograd import are_plain, register_autograd, register_no_derivative
from ._fakes import check_number, check_same_device
from ._mask import any_wrong, nan_if

# By the name of an op, its forward.
_FORWARDS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]] = {}


def scalar_tensor(name: str, value: float | Tensor | None, device: torch.device) -> Tensor | None:
    """A number as a 0-dim tensor: as a plain argument, each new value would be compiled or captured anew."""
    if value is None or isinstance(value, Tensor):
        return value
    check_number(name, value)
    if value < 0:
        raise ValueError(f"{name} is {value}; it must be 0 or above")
    one = torch.ones((), dtype=torch.int64 if name == "seed" else torch.float64, device=device)
    # A product keeps a symbolic number symbolic; torch.compile would specialise on a fill value.
    return one * value


def loss_and_metrics(op: str, tensors: tuple[Tensor | None, ...], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The results of an op's forward that its caller sees, NaN where a mask is wrong (`_mask.py`)."""
    loss, metrics, _, _ = _FORWARDS[op](*tensors, **options)
    if not loss.is_cuda:
        return loss, metrics
    masks = [tensor for name, tensor in zip(_names(op), tensors, strict=False) if name.endswith("mask")]
    wrong = any_wrong(*masks)
    return nan_if(wrong, loss), nan_if(wrong, metrics)


@functools.cache
def _names(op: str) -> tuple[str, ...]:
    """The arguments of an op's forward, in order."""
    return tuple(argument.name for argument in getattr(torch.ops.entropy_rl, f"{op}_forward").default._schema.arguments)


def register_loss(op: str) -> None:
    """Fakes and autograd of an op's forward and backward. Only its first argument carries a gradient."""
    backward = getattr(torch.ops.entropy_rl, f"{op}_backward").default

    def fake(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        check_same_device(**dict(zip(_names(op), tensors, strict=False)))
        values = tensors[0]
        assert values is not None
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        return (
            values.new_empty((), dtype=dtype),
            values.new_empty(4, dtype=dtype),
            values.new_empty(values.shape, dtype=dtype),
            values.new_empty(values.shape[0] if values.dim() == 2 else 1, dtype=dtype),
        )

    def fake_backward(grad_loss: Tensor, gradient: Tensor, row_scale: Tensor, values: Tensor) -> Tensor:
        check_same_device(grad_loss=grad_loss, gradient=gradient, row_scale=row_scale, values=values)
        return values.new_empty(values.shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        _, metrics, gradient, row_scale = outputs
        ctx.mark_non_differentiable(metrics, gradient, row_scale)
        ctx.set_materialize_grads(False)  # or the backward would get zeros for these three, one as large as the input
        # The values, too: without them the backward op could not tell that it must refuse a second derivative.
        ctx.save_for_backward(gradient, row_scale, inputs[0])
        ctx.constants = len(inputs) - 1

    def differentiate(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, *[None] * ctx.constants
        gradient, row_scale, values = ctx.saved_tensors
        # A direct call's gradient is known to loss_and_metrics alone, which has dropped it.
        may_reuse = ctx.direct and values.dtype == gradient.dtype
        scaled = _scaled_in_place(grad_loss, gradient) if may_reuse else None
        grad_values = backward(grad_loss, gradient, row_scale, values) if scaled is None else scaled
        return grad_values, *[None] * ctx.constants

    torch.library.register_fake(f"entropy_rl::{op}_forward", fake)
    torch.library.register_fake(f"entropy_rl::{op}_backward", fake_backward)
    _FORWARDS[op] = register_autograd(f"{op}_forward", differentiate, setup_context, differentiable=1)
    register_no_derivative(f"{op}_backward", "second derivatives are not offered")


def _scaled_in_place(grad_loss: Tensor, gradient: Tensor) -> Tensor | None:
    """The result of an op's backward in the memory of its gradient, or None where that may be needed again.

    Only on the CPU, where row_scale is 1, the first write to new memory takes longer than the arithmetic, and one can
    look at the factor: most often it is 1.
    """
    if not gradient.is_cpu or not are_plain(grad_loss, gradient) or torch.is_grad_enabled():
        return None
    if torch._C._autograd._get_current_graph_task_keep_graph():  # the caller may run this backward again
        return None
    factor = grad_loss.item()
    if factor == 1:
        return gradient
    # 0 times a factor that is not finite would not be 0.
    return gradient.mul_(factor) if math.isfinite(factor) else None
