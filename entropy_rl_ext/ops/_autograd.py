"""Autograd of the ops: reverse mode, once. Every other derivative raises instead of being silently zero."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

# A registration lives as long as its library object.
_LIBRARY = torch.library.Library("entropy_rl", "FRAGMENT")  # type: ignore[no-untyped-call]


def register_autograd(
    op: str,
    backward: Callable[..., tuple[Tensor | None, ...]],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    *,
    differentiable: int | None = None,
) -> None:
    """As `torch.library.register_autograd`, with two differences.

    Forward-mode differentiation raises, where PyTorch's kernel drops the tangents. And default arguments are not filled
    in, which takes time quadratic in their number: 0.2 ms for the 26 of policy_loss, as long as the rest of a small
    batch.

    Args:
        op: name in the namespace entropy_rl.
        backward: (ctx, *gradients of the outputs) -> a gradient or None for each positional argument of the call.
        setup_context: (ctx, positional arguments, outputs) -> None. `ctx.options` has the keyword arguments.
        differentiable: how many leading arguments carry a gradient; the others are constants. None: all.
    """
    overload = getattr(torch.ops.entropy_rl, op).default

    def below_autograd(keyset: Any, options: dict[str, Any], inputs: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs, **options)

    class Call(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            *inputs, keyset, options = arguments
            outputs = below_autograd(keyset, options, tuple(inputs))
            ctx.options = options
            setup_context(ctx, tuple(inputs), outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return *backward(ctx, *gradients), None, None

    def autograd(keyset: Any, *inputs: Any, **options: Any) -> Any:
        variables = [value for value in inputs[:differentiable] if isinstance(value, Tensor)]
        if forward_ad._current_level >= 0 and any(map(_has_tangent, variables)):
            raise RuntimeError(f"entropy_rl::{op} has no forward-mode derivative; use reverse mode")
        if torch.is_grad_enabled() and any(variable.requires_grad for variable in variables):
            return Call.apply(*inputs, keyset, options)  # type: ignore[no-untyped-call]
        return below_autograd(keyset, options, inputs)

    _LIBRARY.impl(op, autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def register_no_derivative(op: str, why: str) -> None:
    """Gives `entropy_rl::op` an autograd kernel that raises, where PyTorch would only warn."""

    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError(f"entropy_rl::{op} has no derivative: {why}")

    register_autograd(op, backward, lambda *_: None)


def register_constant(op: str) -> None:
    """Autograd of an op whose results are constants, as those of a comparison are."""
    register_autograd(op, lambda *_: (), lambda *_: None, differentiable=0)
