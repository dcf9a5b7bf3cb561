"""Advantages against verl's definitions, written out in plain Python."""

import math
import random
import statistics
from collections import defaultdict

import pytest
import torch

from entropy_rl import advantages

ROWS, LENGTH = 12, 5


@pytest.fixture(params=["binary", "real", "equal", "zero"])
def rewards(request: pytest.FixtureRequest) -> list[float]:
    generator = random.Random(0)
    return {
        "binary": [float(generator.random() < 0.5) for _ in range(ROWS)],
        "real": [generator.gauss(0, 1) for _ in range(ROWS)],
        "equal": [1.0] * ROWS,  # no spread within a group
        "zero": [0.0] * ROWS,
    }[request.param]


# Groups of four, of seven, and one response alone.
PROBLEM = [0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 2]
MASK = torch.arange(LENGTH) < torch.tensor([1 + row % LENGTH for row in range(ROWS)])[:, None]


def groups(rewards: list[float]) -> dict[int, list[float]]:
    found = defaultdict(list)
    for problem, reward in zip(PROBLEM, rewards, strict=True):
        found[problem].append(reward)
    return found


def assert_rows(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64)[:, None] * MASK, atol=1e-6, rtol=1e-5, check_dtype=False
    )


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_grpo(rewards: list[float], norm_by_std: bool) -> None:
    expected = []
    for problem, reward in zip(PROBLEM, rewards, strict=True):
        group = groups(rewards)[problem]
        mean, std = (statistics.mean(group), statistics.stdev(group)) if len(group) > 1 else (0.0, 1.0)
        expected.append((reward - mean) / (std + 1e-6) if norm_by_std else reward - mean)
    found = advantages.grpo(torch.tensor(rewards), MASK, torch.tensor(PROBLEM), norm_by_std=norm_by_std)
    assert_rows(found, expected)


def test_rloo(rewards: list[float]) -> None:
    expected = []
    for problem, reward in zip(PROBLEM, rewards, strict=True):
        group = groups(rewards)[problem]
        others = (sum(group) - reward) / (len(group) - 1) if len(group) > 1 else 0.0
        expected.append(reward - others)
    assert_rows(advantages.rloo(torch.tensor(rewards), MASK, torch.tensor(PROBLEM)), expected)


def test_gpg(rewards: list[float]) -> None:
    scale = ROWS / max(1, sum(reward != 0 for reward in rewards))
    expected = []
    for problem, reward in zip(PROBLEM, rewards, strict=True):
        group = groups(rewards)[problem]
        expected.append(scale * (reward - (statistics.mean(group) if len(group) > 1 else 0.0)))
    assert_rows(advantages.gpg(torch.tensor(rewards), MASK, torch.tensor(PROBLEM)), expected)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_reinforce_plus_plus(rewards: list[float], gamma: float) -> None:
    returns = [
        [reward * gamma ** (int(mask.sum()) - 1 - t) for t in range(int(mask.sum()))]
        for reward, mask in zip(rewards, MASK, strict=True)
    ]
    tokens = [value for row in returns for value in row]
    mean, variance = statistics.mean(tokens), statistics.variance(tokens)
    expected = torch.zeros(ROWS, LENGTH)
    for row, values in enumerate(returns):
        for t, value in enumerate(values):
            expected[row, t] = (value - mean) / math.sqrt(variance + 1e-8)
    found = advantages.reinforce_plus_plus(torch.tensor(rewards), MASK, gamma=gamma)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reward", [0.1, 0.7, 10.3, -1e4 + 0.3, 1e-30])
@pytest.mark.parametrize("size", [2, 7, 8, 16, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_no_advantage(reward: float, size: int, dtype: torch.dtype) -> None:
    """Exactly 0 from every estimator, although the mean of equal numbers rounds."""
    rewards = torch.full((size,), reward, dtype=dtype)
    mask = torch.arange(LENGTH) < 1 + torch.arange(size)[:, None] % LENGTH
    problem = torch.zeros(size, dtype=torch.int64)
    for estimator in (advantages.grpo, advantages.rloo, advantages.gpg):
        assert not estimator(rewards, mask, problem).any(), estimator
    assert not advantages.grpo(rewards, mask, problem, norm_by_std=False).any()
    assert not advantages.reinforce_plus_plus(rewards, mask).any()


def test_equal_groups_beside_others_give_no_advantage() -> None:
    rewards = torch.tensor([0.7] * 8 + [0.1, 0.9])
    problem = torch.tensor([0] * 8 + [1, 1])
    for estimator in (advantages.grpo, advantages.rloo, advantages.gpg):
        found = estimator(rewards, torch.ones(10, 1), problem)[:, 0]
        assert not found[:8].any() and found[8] < 0 < found[9]


def test_a_batch_without_tokens() -> None:
    empty = torch.zeros(3, LENGTH, dtype=torch.bool)
    assert not advantages.reinforce_plus_plus(torch.tensor([0.0, 1.0, 2.0]), empty).any()
