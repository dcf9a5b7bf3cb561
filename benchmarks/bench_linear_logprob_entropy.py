"""linear_logprob_entropy: the LM head, forward and backward, where all rows train, a fifth of them, or a fifth that is
known before the forward."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Inputs, compiled
from entropy_rl_ext import linear_logprob_entropy

# dtype, rows N, hidden size H, vocabulary V
SHAPES = {
    "quick": [("float32", 20, 16, 1000)],
    # A small model, and SmolLM2-135M.
    "cpu": [("float32", 2048, 1024, 32768), ("float32", 2048, 576, 49152), ("bfloat16", 2048, 576, 49152)],
    "cuda": [("bfloat16", 8192, 4096, 151936)],
}
# The share of the rows that train, and whether it is known before the forward.
ALL, FIFTH, PRESELECTED = (1.0, False), (0.2, False), (0.2, True)
GOALS: dict[tuple[str, tuple[float, bool]], dict[str, float]] = {
    ("cpu", FIFTH): {"TRL": 2.2, "verl": 2.2},
    ("cpu", PRESELECTED): {"TRL": 4.5, "verl": 4.5},
    ("cuda", FIFTH): {"TRL": 2.2, "verl": 2.2, "Liger": 2.2},
    ("cuda", PRESELECTED): {"TRL": 4.5, "verl": 4.5, "Liger": 4.5},
}
TRL_CHUNK = 32768  # _CHUNKED_LOGPROB_CHUNK_SIZE of trl/trainer/utils.py

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def torch_dense(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(hidden @ weight.t(), -1, dtype=torch.float32)
    entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1)
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


torch_compiled = compiled(torch_dense)  # once for the cases of a shape


def verl(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return FusedLinearForPPO()(hidden, weight, targets)


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))[:2]


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    loss, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets, 1.0, -100, 1, True)
    return -loss, entropy


def step(head: Head, hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor) -> Any:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    log_prob, entropy = head(hidden, weight, targets)
    return torch.autograd.grad(log_prob, (hidden, weight), grad.to(log_prob.dtype)), entropy


def ours_preselected(hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor) -> Any:
    return step(partial(linear_logprob_entropy, mask=grad != 0), hidden, weight, targets, grad)


def compacted(head: Head, preselected: bool, hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor) -> Any:
    """A user's own way to skip rows: the forward on all, unless preselected, then both on those with a gradient."""
    if not preselected:
        with torch.no_grad():
            head(hidden, weight, targets)
    rows = grad.nonzero().squeeze(1)
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    log_prob, entropy = head(hidden[rows], weight, targets[rows])
    return torch.autograd.grad(log_prob, (hidden, weight), grad[rows].to(log_prob.dtype)), entropy


def case(
    size: str, device: torch.device, dtype: str, rows: int, width: int, vocab: int, selection: tuple[float, bool]
) -> Case:
    kind, (share, preselected) = getattr(torch, dtype), selection

    def inputs() -> Inputs:
        with_gradient = torch.randperm(rows, device=device) < round(share * rows)
        return {
            "hidden": torch.randn(rows, width, device=device).to(kind),
            "weight": (torch.randn(vocab, width, device=device) * 3 / width**0.5).to(kind),
            "targets": torch.randint(vocab, (rows,), device=device),
            "grad": torch.randn(rows, device=device) * with_gradient,
        }

    heads: dict[str, Head] = {
        "torch, logits held": torch_dense,
        "torch.compile, logits held": torch_compiled,
        "verl": verl,
        "TRL": trl,
        "Liger": liger,
    }
    peers: dict[str, Callable[..., Any]] = {name: partial(step, head) for name, head in heads.items()}
    if share < 1:
        for name in ("TRL", "Liger"):
            peers[f"{name}, rows compacted by hand"] = partial(compacted, heads[name], preselected)
    work = f"{share:.0%} of the rows train{', known before the forward' if preselected else ''}"
    return Case(
        name=f"{work}, {dtype} [{rows}, {width}] x [{vocab}, {width}]",
        inputs=inputs,
        ours=ours_preselected if preselected else partial(step, linear_logprob_entropy),
        peers=peers,
        # The weight is read in the forward and the backward, and its gradient written; so are the hidden states.
        bytes=3 * (vocab + rows) * width * kind.itemsize,
        backward=True,
        goals=GOALS.get((size, selection), {}),
    )


def cases(size: str, device: torch.device) -> Iterator[Case]:
    return (case(size, device, *shape, selection) for shape in SHAPES[size] for selection in (ALL, FIFTH, PRESELECTED))
