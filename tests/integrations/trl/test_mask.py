"""get_high_entropy_mask keeps TRL's tokens with the rule quantile, and those of the op with the others."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import GRPOTrainer

from entropy_rl_ext import global_top_mask

ENTROPY = torch.arange(1, 13).view(2, 6) / 10
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


@pytest.fixture
def ours(trainer: Callable[..., GRPOTrainer]) -> GRPOTrainer:
    return trainer(entropy_top_ratio=0.2, entropy_top_rule="quantile", entropy_top_ranks="global")


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [
        (0.8, [0.9, 1.0]),  # a fifth of ten tokens; the padding has higher entropies and does not count
        (0.5, [0.6, 0.7, 0.8, 0.9, 1.0]),
        (0.0, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        (1.0, [1.0]),  # one token, not none
    ],
)
def test_keeps_from_the_quantile_up(ours: GRPOTrainer, threshold: float, kept: list[float]) -> None:
    mask = ours.get_high_entropy_mask(ENTROPY, MASK, threshold)
    assert mask.dtype == torch.bool and mask.shape == ENTROPY.shape
    torch.testing.assert_close(ENTROPY[mask], torch.tensor(kept))


def test_keeps_tokens_of_unsorted_rows(ours: GRPOTrainer) -> None:
    entropy = torch.tensor([[0.1, 0.2, 0.3, 1.4, 0.5, 0.14], [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
    assert ours.get_high_entropy_mask(entropy, mask, 0.8).nonzero().tolist() == [[0, 3], [1, 3]]


def test_keeps_nothing_of_nothing(ours: GRPOTrainer) -> None:
    assert not ours.get_high_entropy_mask(ENTROPY, torch.zeros_like(MASK), 0.5).any()


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    columns=st.integers(1, 20),
    threshold=st.sampled_from([0.0, 0.37, 0.5, 0.8, 0.95, 1.0]),
)
def test_keeps_what_trl_keeps(
    pair: tuple[GRPOTrainer, GRPOTrainer], seed: int, rows: int, columns: int, threshold: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(rows, columns, generator=generator)
    mask = torch.randint(0, 2, (rows, columns), generator=generator)
    theirs, ours = (trainer.get_high_entropy_mask(entropy, mask, threshold) for trainer in pair)
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("rule", ["topk", "threshold"])
def test_other_rules_are_those_of_the_op(trainer: Callable[..., GRPOTrainer], rule: str) -> None:
    entropy = torch.tensor([[0.5, 0.9, 0.5, 0.5, 0.1]])  # three tokens tie for the second highest
    mask = trainer(entropy_top_rule=rule).get_high_entropy_mask(entropy, torch.ones(1, 5), 0.6)
    assert torch.equal(mask, global_top_mask(entropy, torch.ones(1, 5), 0.4, rule=rule))
    assert mask.sum() == {"topk": 2, "threshold": 4}[rule]
