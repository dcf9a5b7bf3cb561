"""Inputs and timing that the benchmarks of policy_loss, kl_loss and aggregate share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Inputs

SHAPES = {"quick": (4, 64), "cpu": (64, 4096), "cuda": (512, 4096)}


def make_tokens(shape: tuple[int, int], device: torch.device) -> Inputs:
    """A policy near the old one, advantages, and rows of different lengths."""
    rows, tokens = shape
    log_prob = -torch.rand(shape, device=device).pow(2) * 4
    return {
        "log_prob": log_prob,
        "old_log_prob": (log_prob + 0.2 * torch.randn(shape, device=device)).clamp(max=0),
        "advantages": torch.randn(shape, device=device),
        "response_mask": torch.arange(tokens, device=device)
        < torch.randint(tokens // 2, tokens + 1, (rows, 1), device=device),
    }


def forward_backward(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss and its gradient for the first input. `loss` returns the loss, or a tuple that begins with it."""

    def run(log_prob: Tensor, **others: Tensor) -> Any:
        log_prob = log_prob.detach().requires_grad_()
        result = loss(log_prob, **others)
        value = result[0] if isinstance(result, tuple) else result
        return result, torch.autograd.grad(value, log_prob)

    return run
