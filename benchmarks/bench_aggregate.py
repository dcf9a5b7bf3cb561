"""aggregate: forward and backward of a masked mean over [rows, tokens]."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case, compiled
from benchmarks.token_losses import SHAPES, forward_backward, make_tokens
from entropy_rl_ext import aggregate

MODES = ("token-mean", "seq-mean-token-mean")


def case(size: str, device: torch.device, mode: str) -> Case:
    rows, tokens = SHAPES[size]

    def ours(log_prob: Tensor, response_mask: Tensor) -> Tensor:
        return aggregate(log_prob, response_mask, loss_agg_mode=mode)

    def verl(log_prob: Tensor, response_mask: Tensor) -> Tensor:
        from verl.trainer.ppo.core_algos import agg_loss

        return agg_loss(log_prob, response_mask, mode)

    def torch_mean(log_prob: Tensor, response_mask: Tensor) -> Tensor:
        if mode == "token-mean":
            return (log_prob * response_mask).sum() / response_mask.sum()
        return ((log_prob * response_mask).sum(1) / response_mask.sum(1)).mean()

    def inputs() -> dict[str, Tensor]:
        tokens_in = make_tokens((rows, tokens), device)
        return {name: tokens_in[name] for name in ("log_prob", "response_mask")}

    return Case(
        name=f"{mode} [{rows}, {tokens}]",
        inputs=inputs,
        ours=forward_backward(ours),
        peers={
            "torch": forward_backward(torch_mean),
            "torch.compile": forward_backward(compiled(torch_mean)),
            "verl": forward_backward(verl),
        },
        bytes=rows * tokens * (4 + 1 + 4),
        backward=True,
    )


def cases(size: str, device: torch.device) -> Iterator[Case]:
    return (case(size, device, mode) for mode in MODES)
