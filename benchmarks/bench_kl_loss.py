"""kl_loss: forward and backward over [rows, tokens] against a reference policy."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case, compiled
from benchmarks.token_losses import SHAPES, forward_backward, make_tokens
from entropy_rl_ext import kl_loss

KINDS = ("low_var_kl", "k1", "k2")


def case(size: str, device: torch.device, kind: str) -> Case:
    rows, tokens = SHAPES[size]

    def ours(log_prob: Tensor, old_log_prob: Tensor, response_mask: Tensor) -> Tensor:
        return kl_loss(log_prob, old_log_prob, response_mask, kl_loss_type=kind)

    def verl(log_prob: Tensor, old_log_prob: Tensor, response_mask: Tensor) -> Tensor:
        from verl.trainer.ppo.core_algos import agg_loss, kl_penalty

        return agg_loss(kl_penalty(log_prob, old_log_prob, kind), response_mask, "token-mean")

    def torch_loss(log_prob: Tensor, old_log_prob: Tensor, response_mask: Tensor) -> Tensor:
        d = (old_log_prob - log_prob).clamp(-20, 20)
        losses = {"low_var_kl": d.exp() - d - 1, "k1": -d, "k2": d.square() / 2}[kind]
        return (losses * response_mask).sum() / response_mask.sum()

    def inputs() -> dict[str, Tensor]:
        tokens_in = make_tokens((rows, tokens), device)
        return {name: tokens_in[name] for name in ("log_prob", "old_log_prob", "response_mask")}

    return Case(
        name=f"{kind} [{rows}, {tokens}]",
        inputs=inputs,
        ours=forward_backward(ours),
        peers={
            "torch": forward_backward(torch_loss),
            "torch.compile": forward_backward(compiled(torch_loss)),
            "verl": forward_backward(verl),
        },
        bytes=rows * tokens * (2 * 4 + 1 + 4),
        backward=True,
    )


def cases(size: str, device: torch.device) -> Iterator[Case]:
    return (case(size, device, kind) for kind in KINDS)
