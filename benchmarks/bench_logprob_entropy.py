"""logprob_entropy: the forward alone, and with the backward where all rows or a fifth of them have a gradient."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Inputs, compiled
from entropy_rl_ext import logprob_entropy

SHAPES = {
    "quick": [("float32", 5, 1000)],
    "cpu": [("float32", 128, 151936), ("bfloat16", 128, 151936)],
    "cuda": [("bfloat16", 8192, 151936)],
}
# (size, share of the rows with a gradient); a share of None is the forward alone.
GOALS: dict[tuple[str, str, float | None], dict[str, float]] = {
    ("cpu", "float32", 1.0): {"TRL": 10, "torch.compile": 5},
    ("cpu", "float32", 0.2): {"TRL": 18},
    ("cuda", "bfloat16", None): {"copy": 0.95, "TRL": 1.05},
    ("cuda", "bfloat16", 1.0): {"copy": 0.9},
    ("cuda", "bfloat16", 0.2): {"torch": 1.5, "torch.compile": 1.5, "verl": 1.5, "TRL": 1.5},
}


def torch_both(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1)
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def verl(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    return logprobs_from_logits(logits, targets, inplace_backward=False), entropy_from_logits(logits.detach())


def trl(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, targets, entropy_requires_grad=False)


def liger(logits: Tensor, targets: Tensor) -> tuple[Tensor, None]:
    """Only the log-prob: Liger has no entropy of given logits. It gets a clone, because it overwrites its input."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return -liger_cross_entropy(logits.clone(), targets, reduction="none"), None


def quack(logits: Tensor, targets: Tensor) -> tuple[Tensor, None]:
    """Only the log-prob: quack has no entropy."""
    from quack.cross_entropy import cross_entropy

    return -cross_entropy(logits, targets, reduction="none"), None


def forward(function: Callable[..., Any], logits: Tensor, targets: Tensor) -> Any:
    with torch.no_grad():
        return function(logits, targets)


def forward_backward(function: Callable[..., Any], logits: Tensor, targets: Tensor, grad: Tensor) -> Any:
    logits = logits.detach().requires_grad_()
    log_prob, entropy = function(logits, targets)
    return torch.autograd.grad(log_prob, logits, grad.to(log_prob.dtype)), entropy


def compacted(function: Callable[..., Any], logits: Tensor, targets: Tensor, grad: Tensor) -> Any:
    """How a user can skip rows: the forward on all rows, then forward and backward on those with a gradient."""
    forward(function, logits, targets)
    rows = grad.nonzero().squeeze(1)
    logits = logits.detach().requires_grad_()
    log_prob, entropy = function(logits[rows], targets[rows])
    return torch.autograd.grad(log_prob, logits, grad[rows].to(log_prob.dtype)), entropy


def case(size: str, device: torch.device, dtype: str, rows: int, vocab: int, share: float | None) -> Case:
    kind = getattr(torch, dtype)

    def inputs() -> Inputs:
        made = {
            "logits": (3 * torch.randn(rows, vocab, device=device)).to(kind),
            "targets": torch.randint(vocab, (rows,), device=device),
        }
        if share is not None:
            with_gradient = torch.randperm(rows, device=device) < round(share * rows)
            made["grad"] = torch.randn(rows, device=device) * with_gradient
        return made

    matrix = rows * vocab * kind.itemsize
    functions = {"torch": torch_both, "verl": verl, "TRL": trl, "Liger, log-prob only": liger}
    functions["quack, log-prob only"] = quack
    run = forward if share is None else forward_backward
    peers: dict[str, Callable[..., Any]] = {name: partial(run, function) for name, function in functions.items()}
    peers["torch.compile"] = partial(run, compiled(torch_both))
    work, moved = "forward", matrix + 16 * rows
    if share is not None:
        # The backward reads the rows with a gradient and writes all.
        work, moved = f"forward and backward, {share:.0%} of the rows", round((2 + share) * matrix) + 20 * rows
        if share < 1:
            peers["TRL, rows compacted by hand"] = partial(compacted, trl)
    return Case(
        name=f"{work}, {dtype} [{rows}, {vocab}]",
        inputs=inputs,
        ours=partial(run, logprob_entropy),
        peers=peers,
        bytes=moved,
        backward=share is not None,
        goals=GOALS.get((size, dtype, share), {}),
    )


def cases(size: str, device: torch.device) -> Iterator[Case]:
    return (case(size, device, *shape, share) for shape in SHAPES[size] for share in (None, 1.0, 0.2))
