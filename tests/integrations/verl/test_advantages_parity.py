"""The trainer's advantages equal those of verl's functions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from verl.trainer.ppo import core_algos

from entropy_rl import advantages

GROUPS, SIZE, LENGTH = 5, 4, 7


@pytest.fixture(params=["binary", "real", "equal"])
def inputs(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards [B], mask [B, S], problem [B], and verl's token-level rewards [B, S]: all on the last token."""
    generator = torch.Generator().manual_seed(0)
    rows = GROUPS * SIZE
    rewards = {
        "binary": torch.randint(0, 2, (rows,), generator=generator).float(),
        "real": torch.randn(rows, generator=generator),
        "equal": torch.full((rows,), 0.5),  # no spread within a group
    }[request.param]
    lengths = torch.randint(1, LENGTH + 1, (rows,), generator=generator)
    mask = torch.arange(LENGTH) < lengths[:, None]
    token_rewards = torch.zeros(rows, LENGTH).scatter(1, lengths[:, None] - 1, rewards[:, None])
    return rewards, mask, torch.arange(rows) // SIZE, token_rewards


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_grpo(inputs: tuple[torch.Tensor, ...], norm_by_std: bool) -> None:
    rewards, mask, problem, token_rewards = inputs
    expected, _ = core_algos.compute_grpo_outcome_advantage(
        token_rewards, mask, index=problem.numpy(), norm_adv_by_std_in_grpo=norm_by_std
    )
    found = advantages.grpo(rewards, mask, problem, norm_by_std=norm_by_std)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["rloo", "gpg"])
def test_rloo_and_gpg(inputs: tuple[torch.Tensor, ...], name: str) -> None:
    rewards, mask, problem, token_rewards = inputs
    index: np.ndarray = problem.numpy()
    expected, _ = getattr(core_algos, f"compute_{name}_outcome_advantage")(token_rewards, mask, index=index)
    found = getattr(advantages, name)(rewards, mask, problem)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus(inputs: tuple[torch.Tensor, ...], gamma: float) -> None:
    rewards, mask, _, token_rewards = inputs
    expected, _ = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        token_rewards, mask.long(), config=SimpleNamespace(gamma=gamma)
    )
    found = advantages.reinforce_plus_plus(rewards, mask, gamma=gamma)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
