"""global_top_mask: one read of the entropies and the response mask, one write of the mask."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case, Inputs, compiled
from entropy_rl_ext import global_top_mask

# (rows, tokens in a row, scope)
SHAPES = {
    "quick": [(8, 64, "batch"), (8, 64, "sequence")],
    "cpu": [(256, 4096, "batch"), (1024, 4096, "batch"), (1024, 4096, "sequence")],
    "cuda": [(256, 4096, "batch"), (1024, 4096, "batch"), (1024, 4096, "sequence")],
}
GOALS = {
    ("cpu", 256, "batch"): {"authors": 15, "copy": 0.35},
    ("cpu", 1024, "batch"): {"authors": 15, "copy": 0.35},
    ("cuda", 256, "batch"): {"seconds": 40e-6, "authors": 10},
    ("cuda", 1024, "batch"): {"seconds": 100e-6},
    ("cuda", 1024, "sequence"): {"seconds": 500e-6},
}
RATIO = 0.2


def authors(entropy: Tensor, response_mask: Tensor) -> Tensor:
    """The code of the paper's authors: top-k of the gathered response tokens, scattered to an int64 mask."""
    response = response_mask.flatten().bool()
    values = entropy.flatten()[response]
    chosen = values.topk(max(1, int(len(values) * RATIO + 0.9999))).indices
    mask = torch.zeros_like(entropy.flatten(), dtype=torch.long)
    mask[response.nonzero().squeeze(1)[chosen]] = 1
    return mask.view_as(entropy)


def authors_by_row(entropy: Tensor, response_mask: Tensor) -> Tensor:
    return torch.cat([authors(e, m) for e, m in zip(entropy, response_mask, strict=True)]).view_as(entropy)


def quantile(entropy: Tensor, response_mask: Tensor) -> Tensor:
    """TRL's and ms-swift's rule, for one rank; torch.quantile takes at most 2^24 elements."""
    response = response_mask.bool()
    return (entropy >= torch.quantile(entropy[response].float(), 1 - RATIO)) & response


def by_sort(scope: str, entropy: Tensor, response_mask: Tensor) -> Tensor:
    """Our kernel with CUB's segmented sort, to compare with the radix select that `algorithm="auto"` uses."""
    ratio = torch.tensor(RATIO, dtype=torch.float64)
    mask: Tensor = torch.ops.entropy_rl.global_top_mask_forward(
        entropy, response_mask, ratio, "topk", scope, None, "sort"
    )
    return mask


def case(size: str, device: torch.device, rows: int, tokens: int, scope: str) -> Case:
    def inputs() -> Inputs:
        lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), device=device)
        entropy = torch.rand(rows, tokens, device=device).pow(4) * 3  # few high entropies among many low ones
        return {"entropy": entropy, "response_mask": torch.arange(tokens, device=device) < lengths}

    batch = scope == "batch"
    expression = authors if batch else authors_by_row
    return Case(
        name=f"scope {scope} [{rows}, {tokens}]",
        inputs=inputs,
        ours=lambda entropy, response_mask: global_top_mask(entropy, response_mask, RATIO, scope=scope),
        peers={"authors": expression}
        | ({"authors, torch.compile": compiled(authors), "torch.quantile (TRL's rule)": quantile} if batch else {})
        | ({"ours by sort": functools.partial(by_sort, scope)} if device.type == "cuda" else {}),
        bytes=rows * tokens * (4 + 1 + 1),
        goals=GOALS.get((size, rows, scope), {}),
        graph=True,
    )


def cases(size: str, device: torch.device) -> Iterator[Case]:
    return (case(size, device, *shape) for shape in SHAPES[size])
