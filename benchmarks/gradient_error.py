"""Measures the error of an LM head's gradients in bfloat16 against a dense head in float64, for ours and each peer.

    python -m benchmarks.gradient_error

It writes benchmarks/results/gradient_error/bfloat16.json and, from that file, the table of
docs/linear_logprob_entropy.md. It fails if a peer's error is smaller than ours by more than 1 %.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_linear_logprob_entropy import Head, liger, torch_dense, trl, verl
from benchmarks.harness import ROOT, environment
from benchmarks.report import commit_of, with_table
from entropy_rl_ext import linear_logprob_entropy

RESULT = ROOT / "benchmarks" / "results" / "gradient_error" / "bfloat16.json"
PAGE = ROOT / "docs" / "linear_logprob_entropy.md"
ROWS, WIDTH, VOCAB = 1024, 512, 16384
SHARES = (1.0, 0.2)  # the shares of the rows that train
OURS_IN_FLOAT32 = "ours, with the precision `highest`"
HEADS: dict[str, Head] = {
    "**ours**": linear_logprob_entropy,
    OURS_IN_FLOAT32: linear_logprob_entropy,
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
    if head is exact:  # the smallest error that a bfloat16 result can have
        found = [g.bfloat16().double() for g in expected]
    else:
        found = gradients(head, hidden, weight, targets, grad)
    return [((f - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True)]


def table(result: dict[str, Any]) -> str:
    """The table of a result, as Markdown."""
    names, versions = ("torch", "trl", "verl", "liger-kernel"), result["versions"]
    columns = [f"{what}, {share:.0%} of the rows" for share in SHARES for what in ("hidden", "weight")]
    lines = [
        f"{ROWS} rows, H = {WIDTH}, V = {VOCAB}, {result['device_name']}, "
        f"{', '.join(f'{name} {versions[name]}' for name in names)}, {commit_of(result)}, "
        f"{result['date']}.",
        "",
        f"| | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name, found in result["errors"].items():
        cells = found if isinstance(found, str) else " | ".join(f"{error:.2e}" for error in found)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def page(result: dict[str, Any]) -> str:
    """docs/linear_logprob_entropy.md with the table of `result`."""
    return with_table(PAGE, __spec__.name, table(result))


def main() -> None:
    found: dict[str, list[float] | str] = {}
    for name, head in {**HEADS, "the exact gradient, rounded to bfloat16": exact}.items():
        torch.backends.mkldnn.matmul.fp32_precision = "ieee" if name == OURS_IN_FLOAT32 else "none"  # type: ignore[attr-defined]
        try:
            found[name] = [error for share in SHARES for error in errors(head, share)]
        except Exception as error:
            found[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
    result = {**environment("cpu"), "errors": found}
    print(table(result))
    rows = {
        name: row
        for name, row in found.items()
        if name in HEADS and name != OURS_IN_FLOAT32 and not isinstance(row, str)
    }
    best = [min(column) for column in zip(*rows.values(), strict=True)]
    if any(ours > 1.01 * least for ours, least in zip(rows["**ours**"], best, strict=True)):
        sys.exit("the gradient of a peer has a smaller error")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(page(result))


if __name__ == "__main__":
    main()
