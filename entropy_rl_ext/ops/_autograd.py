"""Autograd of ops that have no derivative."""

from typing import Any, NoReturn

import torch


def register_no_derivative(op: str, why: str) -> None:
    """Gives `entropy_rl::op` an autograd kernel that raises, where PyTorch would only warn and go on."""

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"entropy_rl::{op} has no derivative: {why}")

    torch.library.register_autograd(f"entropy_rl::{op}", backward)
