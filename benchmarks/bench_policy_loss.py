"""policy_loss: forward and backward over [rows, tokens] with an old policy, advantages and a response mask."""

from collections.abc import Callable, Iterator
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
# Larger than the caches, and a micro-batch of one row, whose time is that of a call.
OTHER_SHAPES = ((512, 4096), (1, 4096))
MODES_OF_OTHER_SHAPES = ("vanilla", "gspo", "dppo_kl")
NUMBERS = {"dro_beta": 0.3}


@cache
def verl_config(mode: str) -> Any:
    from verl.workers.config import ActorConfig, PolicyLossConfig

    loss = PolicyLossConfig(loss_mode=mode, **NUMBERS)
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=loss)


def verl_loss(mode: str, log_prob: Tensor, **others: Tensor) -> Any:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    return get_policy_loss_fn(mode)(
        log_prob=log_prob, **others, loss_agg_mode=aggregation(mode), config=verl_config(mode)
    )


@cache
def plain_loss(mode: str) -> Callable[..., Tensor]:
    """The loss alone, without metrics, in the arithmetic of its inputs; for torch.compile, which fuses it.

    The response mask is applied where the loss is aggregated, as in verl, so that NaN outside of it would not be safe.
    """
    low, high, bound, beta = 0.2, 0.2, 3.0, NUMBERS["dro_beta"]

    def surrogate(ratio: Tensor, a: Tensor) -> Tensor:
        return torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))

    def covariance(lp: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum()
        return (a - (a * mask).sum() / count) * (lp.detach() - (lp.detach() * mask).sum() / count)

    def chosen(keys: Tensor, share: float) -> Tensor:
        """Of the [B, S] keys, the share that is largest. It is one of all tokens: a count of some is not static."""
        threshold = keys.flatten().topk(max(1, int(share * keys.numel()))).values[-1]
        return keys >= threshold

    def truncated(lp: Tensor, old: Tensor, a: Tensor, valid: Tensor) -> Tensor:
        return -a * (lp - old).detach().clamp(-20, 20).exp().clamp(max=bound) * lp * valid

    def vanilla(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        losses = surrogate((lp - old).clamp(-20, 20).exp(), a)
        return torch.where(a < 0, torch.minimum(losses, -a * bound), losses)

    def gpg(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        return -a * lp

    def clip_cov(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        ratio = (lp - old).exp()
        value = covariance(lp, a, mask)
        eligible = mask & (-a * ratio >= -a * ratio.clamp(1 - low, 1 + high)) & (value > 1.0) & (value < 5.0)
        keys = torch.where(eligible, torch.rand_like(lp), -1.0)
        return torch.where(chosen(keys, 0.0002) & eligible, 0.0, surrogate(ratio, a))

    def kl_cov(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        keys = torch.where(mask, covariance(lp, a, mask), -torch.inf)
        losses = -a * (lp - old).exp()
        return torch.where(chosen(keys, 0.0002), losses + 0.1 * (lp - old).abs(), losses)

    def gspo(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        sequence = ((lp - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return surrogate((lp - lp.detach() + sequence.detach()).clamp(max=10).exp(), a)

    def dppo_tv(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        moved = lp.detach().exp() - old.exp()
        return truncated(lp, old, a, torch.where(a > 0, moved <= high, moved >= -low))

    def dppo_kl(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        p, q = lp.detach().exp(), old.exp()
        moved = q * (old - lp.detach()) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
        return truncated(lp, old, a, torch.where(a > 0, (moved <= high) | (p <= q), (moved <= low) | (p >= q)))

    def sapo(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        tau = torch.where(a > 0, 1.0, 1.05)
        return -a * torch.sigmoid(tau * ((lp - old).clamp(-20, 20).exp() - 1)) * 4 / tau

    def dro(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        return -(lp * a - 0.5 * beta * (lp - old) ** 2)

    def cispo(lp: Tensor, old: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        return -(lp - old).detach().clamp(-20, 20).exp().clamp(1 - low, 1 + high) * a * lp

    losses = {f.__name__: f for f in (vanilla, gpg, clip_cov, kl_cov, gspo, dppo_tv, dppo_kl, sapo, dro, cispo)}

    def loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, response_mask: Tensor) -> Tensor:
        if mode == "geo_mean":
            d, a = log_prob - old_log_prob, advantages
            clipped = d.clamp(-low, high)
            towards = torch.where(a > 0, torch.minimum(d, clipped), torch.maximum(d, clipped))
            count = response_mask.sum(1) + 1e-8
            mean_advantage = (a * response_mask).sum(1) / count
            return (-mean_advantage * ((towards * (a != 0) * response_mask).sum(1) / count).exp()).mean()
        values = losses[mode](log_prob, old_log_prob, advantages, response_mask) * response_mask
        if aggregation(mode) == "token-mean":
            return values.sum() / response_mask.sum()
        counts = response_mask.sum(1)
        return (values.sum(1) / (counts + 1e-8)).sum() / (counts > 0).sum()

    return loss


class Nothing(torch.autograd.Function):
    """A loss and a gradient that nobody computes: what PyTorch itself takes for any loss."""

    @staticmethod
    def forward(ctx: Any, log_prob: Tensor) -> Tensor:
        ctx.shape = log_prob.shape
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        return torch.empty(ctx.shape)


def aggregation(mode: str) -> str:
    return "seq-mean-token-mean" if mode in ("gspo", "sapo") else "token-mean"


def case(size: str, device: torch.device, mode: str, shape: tuple[int, int]) -> Case:
    rows, tokens = shape

    def ours(log_prob: Tensor, **others: Tensor) -> Any:
        return policy_loss(log_prob, **others, loss_mode=mode, loss_agg_mode=aggregation(mode), **NUMBERS)

    peers = {"torch.compile": forward_backward(compiled(plain_loss(mode)))}
    if shape == SHAPES[size]:
        peers = {"verl": forward_backward(lambda log_prob, **others: verl_loss(mode, log_prob, **others))} | peers
    if mode == "vanilla":
        peers["torch"] = forward_backward(plain_loss(mode))
    goals = {"verl": GOALS[size][mode]} if "verl" in peers and mode in GOALS.get(size, {}) else {}
    if size == "cpu" and rows > 1:
        goals["torch.compile"] = 2
    if size == "cpu" and rows == 1:
        peers["nothing"] = forward_backward(lambda log_prob, **_: Nothing.apply(log_prob))
        goals["seconds"] = 0.12e-3
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
    yield from (case(size, device, mode, SHAPES[size]) for mode in MODES)
    if size == "cpu":
        yield from (case(size, device, mode, shape) for shape in OTHER_SHAPES for mode in MODES_OF_OTHER_SHAPES)
    yield from (clip_ratios_case(size, device, mode) for mode in CLIPPING_MODES)
