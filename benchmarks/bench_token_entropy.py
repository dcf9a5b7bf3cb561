"""token_entropy: one read of [rows, vocab] logits."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case, compiled
from entropy_rl_ext import token_entropy

# (dtype, rows, vocab): the vocabularies of Qwen3 and of GPT-2, which no vector width divides; many rows and few.
SHAPES = {
    "quick": [("float32", 3, 1000), ("bfloat16", 3, 1000)],
    "cpu": [("float32", 128, 151936), ("bfloat16", 128, 151936), ("float16", 128, 151936), ("float32", 512, 50257)],
    "cuda": [
        ("bfloat16", 8192, 151936),
        ("bfloat16", 16, 151936),
        ("bfloat16", 8192, 50257),
        ("bfloat16", 8192, 32000),
        ("float16", 8192, 151936),
        ("float32", 8192, 151936),
    ],
}
GOALS = {
    ("cpu", "float32", 128, 151936): {"verl": 25, "amax": 0.5},
    ("cpu", "bfloat16", 128, 151936): {"verl": 20},
    ("cuda", "bfloat16", 8192, 151936): {"copy": 0.95, "TRL": 1.05},
    ("cuda", "bfloat16", 16, 151936): {"amax": 1},  # too few rows for the bandwidth of a copy
    ("cuda", "bfloat16", 8192, 50257): {"copy": 0.85},
    ("cuda", "bfloat16", 8192, 32000): {"copy": 0.85},
    ("cuda", "float16", 8192, 151936): {"copy": 0.85},
    ("cuda", "float32", 8192, 151936): {"copy": 0.85},
}


def torch_entropy(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    return -(log_p.exp() * log_p).sum(-1)


def verl(logits: Tensor) -> Tensor:
    from verl.utils.torch_functional import entropy_from_logits

    return entropy_from_logits(logits)


def verl_chunked(logits: Tensor) -> Tensor:
    from verl.utils.torch_functional import entropy_from_logits_with_chunking

    return entropy_from_logits_with_chunking(logits)


def trl(logits: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    index = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    return selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False)[1]


def amax(logits: Tensor) -> Tensor:
    """A different result, for comparison: the time of reading the logits once."""
    return logits.amax(-1)


def case(size: str, device: torch.device, dtype: str, rows: int, vocab: int) -> Case:
    kind = getattr(torch, dtype)
    return Case(
        name=f"{dtype} [{rows}, {vocab}]",
        inputs=lambda: {"logits": (3 * torch.randn(rows, vocab, device=device)).to(kind)},
        ours=token_entropy,
        peers={
            "torch": torch_entropy,
            "torch.compile": compiled(torch_entropy),
            "verl": verl,
            "verl, chunked": verl_chunked,
            "TRL": trl,
            "amax": amax,
        },
        bytes=rows * (vocab * kind.itemsize + 4),
        goals=GOALS.get((size, dtype, rows, vocab), {}),
    )


def cases(size: str, device: torch.device) -> Iterator[Case]:
    return (case(size, device, *shape) for shape in SHAPES[size])
