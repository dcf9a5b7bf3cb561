"""covariance_mask: parity, the same choice for any split over ranks, and bad input."""

import math
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_rl_ext import covariance_mask, policy_loss, reference
from ranks import Ranks
from selections import DTYPES, GROUPS, cut_up, make_steps

MODES = ["clip_cov", "kl_cov"]

# Both choose a third of the tokens, as far as so many are eligible for clip_cov.
OPTIONS: dict[str, dict[str, float]] = {
    "clip_cov": {"clip_cov_ratio": 1 / 3, "clip_cov_lb": -0.5, "clip_cov_ub": 1.5},
    "kl_cov": {"kl_cov_ratio": 1 / 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_equals_reference(mode: str, device: torch.device) -> None:
    """In float64, where no covariance rounds to another side of a bound. One token, one chunk, and more."""
    for seed, tokens in enumerate([1, 33, 1000, 100_003]):
        batch = [value.to(device) for value in make_steps(tokens, seed, False, torch.float64)]
        chosen = covariance_mask(*batch, mode, seed=seed, **OPTIONS[mode])
        assert torch.equal(chosen, reference.covariance_mask(*batch, mode, seed=seed, **OPTIONS[mode]))


def test_clip_ratios_of_each_token(device: torch.device) -> None:
    """clip_cov draws from other tokens where their clip ratios differ; all of the same value are that number."""
    batch = [value.to(device) for value in make_steps(1000, 5, False, torch.float64)]
    options = OPTIONS["clip_cov"] | {"clip_cov_ratio": 1.0}
    low, high = (torch.where(batch[0] > batch[0].mean(), *values) for values in ((0.0, 0.5), (0.05, 0.6)))
    low, high = low.double(), high.double()
    for ratios in ({"clip_ratio_low": low, "clip_ratio_high": high}, {"clip_ratio_high": high}):
        chosen = covariance_mask(*batch, "clip_cov", **ratios, **options)
        assert torch.equal(chosen, reference.covariance_mask(*batch, "clip_cov", **ratios, **options))
        assert not torch.equal(chosen, covariance_mask(*batch, "clip_cov", **options))
    full = torch.full_like(low, 0.2)
    assert torch.equal(
        covariance_mask(*batch, "clip_cov", clip_ratio_low=full, clip_ratio_high=full, **options),
        covariance_mask(*batch, "clip_cov", **options),
    )


def differences(size: int, seed: int, tokens: int, tied: bool, dtype: torch.dtype, mode: str) -> Any:
    """Where this rank's choice from its part of a batch differs from the choice from the unsplit batch."""
    if dist.get_rank() >= size:
        return []
    batch = make_steps(tokens, seed, tied, dtype)
    unsplit = covariance_mask(*batch, mode, seed=seed, **OPTIONS[mode])
    own = list(cut_up([*batch, unsplit], size, random.Random(seed)))[dist.get_rank()]
    # Only the first rank's seed counts.
    found = covariance_mask(*own[:4], mode, group=GROUPS[size - 1], seed=seed + dist.get_rank(), **OPTIONS[mode])
    return (found != own[4]).nonzero().tolist()


@settings(deadline=None, max_examples=150)
@given(
    size=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 400),
    tied=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(MODES),
)
def test_any_split_gives_the_choice_of_the_unsplit_batch(eight: Ranks, **case: Any) -> None:
    assert eight.run(differences, *case.values()) == [[]] * 8


def test_kl_cov_takes_the_largest_covariances(device: torch.device) -> None:
    log_prob, old, advantage, mask = (value.to(device) for value in make_steps(1000, 1, tied=False))
    inside = [value[mask].double() for value in (log_prob, advantage)]
    covariance = (inside[1] - inside[1].mean()) * (inside[0] - inside[0].mean())
    chosen = covariance_mask(log_prob, old, advantage, mask, "kl_cov", kl_cov_ratio=0.1)
    assert chosen.sum() == int(0.1 * int(mask.sum())) and not (chosen & ~mask).any()
    assert covariance[chosen[mask]].min() > covariance[~chosen[mask]].max()
    assert covariance_mask(log_prob, old, advantage, mask, "kl_cov", kl_cov_ratio=1e-9).sum() == 1


def test_clip_cov_draws_every_eligible_token_equally_often() -> None:
    batch = make_steps(120, 2, tied=False)
    log_prob, old, advantage, mask = batch
    bounds = {"clip_cov_lb": 0.0, "clip_cov_ub": 1.0}
    covariance = (advantage - advantage[mask].mean()) * (log_prob - log_prob[mask].mean())
    ratio = (log_prob - old).exp()
    clipped = torch.where(advantage > 0, ratio > 1.2, ratio < 0.8)
    eligible = mask & ~clipped & (covariance > 0) & (covariance < 1)
    count, k, draws = int(eligible.sum()), int(0.1 * int(mask.sum())), 2000
    assert count > 2 * k > 10
    often = torch.zeros(120)
    for seed in range(draws):
        drawn = covariance_mask(*batch, "clip_cov", clip_cov_ratio=0.1, seed=seed, **bounds)
        assert drawn.sum() == k and not (drawn & ~eligible).any()
        often += drawn
    p = k / count
    assert ((often[eligible] / draws - p).abs() < 5 * math.sqrt(p * (1 - p) / draws)).all()


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_choice_of_policy_loss_where_nothing_is_random(mode: str, device: torch.device) -> None:
    """Loss and metrics to the bit; clip_cov draws all eligible tokens."""
    batch = [value.view(10, 100).to(device) for value in make_steps(1000, 3, tied=False)]
    options = OPTIONS[mode] | ({"clip_cov_ratio": 1.0} if mode == "clip_cov" else {})
    chosen = covariance_mask(*batch, mode, **options)
    assert chosen.shape == (10, 100) and 0 < chosen.sum() < batch[3].sum()
    loss, metrics = policy_loss(*batch, loss_mode=mode, covariance_mask=chosen, **options)
    expected, expected_metrics = policy_loss(*batch, loss_mode=mode, **options)
    assert torch.equal(loss, expected) and metrics == expected_metrics


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_choose_from(mode: str, device: torch.device) -> None:
    for shape in ((0,), (3, 0), (2, 5)):
        log_prob = torch.full(shape, math.nan, device=device)
        chosen = covariance_mask(log_prob, log_prob, log_prob, torch.zeros(shape, device=device), mode)
        assert chosen.shape == shape and not chosen.any()
    one = torch.ones(1, 1, device=device)
    assert covariance_mask(one, one, one, one, mode).sum() == (mode == "kl_cov")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mode": "vanilla"}, "loss_mode is 'vanilla'; it must be one of 'clip_cov', 'kl_cov'"),
        ({"old_log_prob": torch.ones(3)}, r"old_log_prob has shape \[3\]; it must be \[2, 3\], that of log_prob"),
        ({"advantages": torch.ones(2, 2)}, r"advantages has shape \[2, 2\]"),
        ({"response_mask": torch.ones(2)}, r"response_mask has shape \[2\]"),
        ({"log_prob": torch.ones(2, 3, dtype=torch.int64)}, "log_prob is int64"),
        ({"clip_cov_lb": 6.0}, "clip_cov_lb is 6; it must be below clip_cov_ub, 5"),
        ({"clip_cov_ratio": 0.0}, "clip_cov_ratio is 0"),
        ({"loss_mode": "kl_cov", "kl_cov_ratio": 2.0}, "kl_cov_ratio is 2"),
        ({"clip_ratio": -1.0}, "clip_ratio_low is -1"),
        ({"clip_ratio_low": torch.ones(3)}, r"clip_ratio_low has shape \[3\]; it must be \[2, 3\], that of log_prob"),
        ({"seed": -1}, "seed is -1; it must be 0 or above"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    names = ("log_prob", "old_log_prob", "advantages", "response_mask")
    good = dict.fromkeys(names, torch.ones(2, 3)) | {"loss_mode": "clip_cov"}
    with pytest.raises(ValueError, match=message):
        covariance_mask(**(good | change))
