"""Autograd of the ops: reverse mode, once. Every other derivative raises instead of being silently zero."""

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_Result = TypeVar("_Result")

# A registration lives as long as its library object.
_LIBRARY = torch.library.Library("entropy_rl", "FRAGMENT")  # type: ignore[no-untyped-call]


def register_autograd(
    op: str,
    backward: Callable[..., tuple[Tensor | None, ...]],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    *,
    differentiable: int | None = None,
) -> Callable[..., Any]:
    """As `torch.library.register_autograd`, with two differences.

    Forward-mode differentiation raises, where PyTorch's kernel drops the tangents. And default arguments are not filled
    in, which takes time quadratic in their number: 0.2 ms for the 26 of policy_loss, as long as the rest of a small
    batch.

    Args:
        op: name in the namespace entropy_rl.
        backward: (ctx, *gradients of the outputs) -> a gradient or None for each positional argument of the call.
        setup_context: (ctx, positional arguments, outputs) -> None. `ctx.options` has the keyword arguments, and
            `ctx.direct` says whether the call is one of the function that is returned here.
        differentiable: how many leading arguments carry a gradient; the others are constants. None: all.

    Returns:
        The op as a function of the same arguments. For plain tensors it skips the dispatcher's first half, which would
        only come back to Python for autograd.
    """
    overload = getattr(torch.ops.entropy_rl, op).default

    def below_autograd(keyset: Any, options: dict[str, Any], inputs: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if keyset is None:
                return overload(*inputs, **options)
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs, **options)

    class Call(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            *inputs, keyset, options = arguments
            outputs = below_autograd(keyset, options, tuple(inputs))
            ctx.options, ctx.direct = options, keyset is None
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

    def call(*inputs: Any, **options: Any) -> Any:
        if are_plain(*inputs):
            return autograd(None, *inputs, **options)
        return overload(*inputs, **options)

    _LIBRARY.impl(op, autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
    return call


def call_composite(op: str, composite: Callable[..., _Result], *arguments: Any, **options: Any) -> _Result:
    """`torch.ops.entropy_rl.<op>`, which is `composite`, without a trip through the dispatcher unless compiled."""
    if torch.compiler.is_compiling():
        result: _Result = getattr(torch.ops.entropy_rl, op)(*arguments, **options)
        return result
    return composite(*arguments, **options)


def are_plain(*values: Tensor | None) -> bool:
    """Whether nothing but reverse-mode autograd acts on these values: no subclass, no transform, no tangent."""
    return (
        all(type(value) is Tensor for value in values if value is not None)
        and not torch._C._are_functorch_transforms_active()
        # Of torch.autograd.grad(is_grads_batched=True).
        and not torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")
        and forward_ad._current_level < 0
    )


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def register_no_derivative(op: str, why: str) -> None:
    """Gives `entropy_rl::op` an autograd kernel that raises, where PyTorch would only warn."""

    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError(f"entropy_rl::{op} has no derivative: {why}")

    register_autograd(op, backward, lambda *_: None)


def register_constant(op: str) -> Callable[..., Any]:
    """Autograd of an op whose results are constants, as those of a comparison are."""
    return register_autograd(op, lambda *_: (), lambda *_: None, differentiable=0)
