"""How far gradients of an LM head in bfloat16 are from those of a dense head in float64: ours and each peer's.

    python -m benchmarks.gradient_error

Prints docs/linear_logprob_entropy.md's table; fails where a peer's error is smaller than ours by more than 1 %.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bench_linear_logprob_entropy import Head, liger, torch_dense, trl, verl
from entropy_rl_ext import linear_logprob_entropy

ROWS, WIDTH, VOCAB = 1024, 512, 16384
HEADS: dict[str, Head] = {
    "**ours**": linear_logprob_entropy,
    "TRL, `ChunkedLogProbFunction`": trl,
    "verl, `FusedLinearForPPO`": verl,
    "Liger, fused linear scaled cross entropy": liger,
    "torch, logits held": torch_dense,
}


def gradients(head: Head, hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor) -> list[Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    log_prob, _ = head(hidden, weight, targets)
    return [g.double() for g in torch.autograd.grad(log_prob, (hidden, weight), grad.to(log_prob.dtype))]


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = (hidden.double() @ weight.double().t()).log_softmax(-1)
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), log_p


def errors(head: Callable[..., tuple[Tensor, ...]], share: float) -> list[float]:
    """Relative error, in the Frobenius norm, of the gradients of hidden states and weight."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).bfloat16()
    weight = (torch.randn(VOCAB, WIDTH, generator=generator) * 3 / WIDTH**0.5).bfloat16()
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    grad = torch.randn(ROWS, generator=generator) * (torch.rand(ROWS, generator=generator) < share)
    expected = gradients(exact, hidden.double(), weight.double(), targets, grad.double())
    if head is exact:  # the least that an answer in bfloat16 can have
        found = [g.bfloat16().double() for g in expected]
    else:
        found = gradients(head, hidden, weight, targets, grad)
    return [((f - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True)]


def main() -> None:
    shares = (1.0, 0.2)
    columns = [f"{what}, {share:.0%} of the rows" for share in shares for what in ("hidden", "weight")]
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (1 + 2 * len(shares)) + "|")
    table = {}
    for name, head in {**HEADS, "the exact gradient, rounded to bfloat16": exact}.items():
        try:
            table[name] = [error for share in shares for error in errors(head, share)]
        except Exception as error:
            print(f"| {name} | failed: {type(error).__name__}: {str(error).splitlines()[0]} |")
            continue
        print(f"| {name} | " + " | ".join(f"{error:.2e}" for error in table[name]) + " |")
    rows = {name: row for name, row in table.items() if name in HEADS}
    best = [min(column) for column in zip(*rows.values(), strict=True)]
    if any(ours > 1.01 * least for ours, least in zip(rows["**ours**"], best, strict=True)):
        sys.exit("a peer's gradient is nearer")


if __name__ == "__main__":
    main()
