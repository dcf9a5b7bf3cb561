"""policy_loss: forward and backward over [rows, tokens] with an old policy, advantages and a response mask."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Inputs, compiled
from benchmarks.token_losses import SHAPES, forward_backward, make_tokens
from entropy_rl_ext import policy_loss

MODES = ("vanilla", "kl_cov", "clip_cov", "gspo", "geo_mean", "gpg", "dppo_tv", "dppo_kl", "sapo", "dro", "cispo")
CLIPPING_MODES = ("vanilla", "clip_cov", "gspo", "geo_mean", "dppo_tv", "dppo_kl", "cispo")
GOALS = {"cpu": {"vanilla": 5, "kl_cov": 3, "clip_cov": 3, "gspo": 3, "geo_mean": 3}, "cuda": {"vanilla": 10}}
NUMBERS = {"dro_beta": 0.3}


@cache
def verl_config(mode: str) -> Any:
    from verl.workers.config import ActorConfig, PolicyLossConfig

    loss = PolicyLossConfig(loss_mode=mode, **NUMBERS)
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=loss)


def verl_loss(mode: str, log_prob: Tensor, **others: Tensor) -> Any:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    aggregation = "seq-mean-token-mean" if mode in ("gspo", "sapo") else "token-mean"
    return get_policy_loss_fn(mode)(log_prob=log_prob, **others, loss_agg_mode=aggregation, config=verl_config(mode))


def torch_vanilla(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, response_mask: Tensor) -> Tensor:
    """The loss without metrics."""
    ratio = (log_prob - old_log_prob).clamp(-20, 20).exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    losses = torch.where(advantages < 0, torch.minimum(losses, -3 * advantages), losses)
    return (losses * response_mask).sum() / response_mask.sum()


def case(size: str, device: torch.device, mode: str) -> Case:
    rows, tokens = SHAPES[size]
    aggregation = "seq-mean-token-mean" if mode in ("gspo", "sapo") else "token-mean"

    def ours(log_prob: Tensor, **others: Tensor) -> Any:
        return policy_loss(log_prob, **others, loss_mode=mode, loss_agg_mode=aggregation, **NUMBERS)

    peers = {"verl": forward_backward(lambda log_prob, **others: verl_loss(mode, log_prob, **others))}
    if mode == "vanilla":
        peers["torch"] = forward_backward(torch_vanilla)
        peers["torch.compile"] = forward_backward(compiled(torch_vanilla))
    goals = {"verl": GOALS[size][mode]} if mode in GOALS.get(size, {}) else {}
    # 2^21 tokens in at most 2.5 times the time that a copy of their bytes takes.
    if size == "cuda" and mode == "vanilla":
        goals["copy"] = 1 / 2.5
    return Case(
        name=f"{mode} [{rows}, {tokens}]",
        inputs=lambda: make_tokens((rows, tokens), device),
        ours=forward_backward(ours),
        peers=peers,
        # Log-probs, advantages and mask in, one gradient out.
        bytes=rows * tokens * (3 * 4 + 1 + 4),
        backward=True,
        goals=goals,
    )


def clip_ratios_case(size: str, device: torch.device, mode: str) -> Case:
    """Clip ratios that differ from token to token, as of selected and other tokens, against two numbers."""
    rows, tokens = SHAPES[size]

    def inputs() -> Inputs:
        chosen = torch.rand(rows, tokens, device=device) < 0.2
        ratios = {"clip_ratio_low": torch.where(chosen, 0.5, 0.2), "clip_ratio_high": torch.where(chosen, 0.5, 0.28)}
        return make_tokens((rows, tokens), device) | ratios

    def ours(log_prob: Tensor, **others: Tensor) -> Any:
        return policy_loss(log_prob, **others, loss_mode=mode)

    def numbers(log_prob: Tensor, clip_ratio_low: Tensor, clip_ratio_high: Tensor, **others: Tensor) -> Any:
        return policy_loss(log_prob, **others, loss_mode=mode, clip_ratio_low=0.2, clip_ratio_high=0.28)

    return Case(
        name=f"{mode} [{rows}, {tokens}], clip ratios of each token",
        inputs=inputs,
        ours=forward_backward(ours),
        peers={"ours, two numbers": forward_backward(numbers)},
        bytes=rows * tokens * (5 * 4 + 1 + 4),
        backward=True,
        goals={"ours, two numbers": 1 / 1.3},
    )


def cases(size: str, device: torch.device) -> Iterator[Case]:
    yield from (case(size, device, mode) for mode in MODES)
    yield from (clip_ratios_case(size, device, mode) for mode in CLIPPING_MODES)
