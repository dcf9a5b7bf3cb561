"""Selection as the trainer uses it: the counts known beforehand are those that the op selects."""

import random

import pytest
import torch

from entropy_rl import selection


@pytest.mark.parametrize("ratio", [0.2, 0.1, 1 / 3, 0.999, 1.0, 1e-6])
def test_top_k_count_is_what_topk_selects(ratio: float) -> None:
    tokens = torch.arange(0, 400)
    counts = selection.top_k_count(tokens, ratio)
    for n in range(0, 400, 7):
        entropy, mask = torch.rand(1, 400), torch.arange(400)[None] < n
        selected, _ = selection.select_tokens(entropy, mask, ratio, "topk")
        assert selected.sum() == counts[n]
        assert counts[n] == (max(1, int(n * ratio + 0.9999)) if n else 0)


def test_threshold_is_the_lowest_selected_entropy() -> None:
    entropy, mask = torch.tensor([[0.5, 2.0, 9.0], [1.0, 3.0, 0.1]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    selected, metrics = selection.select_tokens(entropy, mask, 0.4, "topk")
    assert selected.tolist() == [[False, True, False], [False, True, False]]
    assert metrics["actor/entropy_threshold"] == 2.0
    _, metrics = selection.select_tokens(entropy, torch.zeros_like(mask), 0.4, "topk")
    assert metrics["actor/entropy_threshold"] == 0.0


def test_divisors_of_topk_are_all_selected_tokens() -> None:
    generator = random.Random(0)
    sizes = torch.tensor([generator.randrange(1, 60) for _ in range(8)] + [0])
    counts = selection.top_k_count(sizes, 0.2)
    for size, count in zip(sizes, counts, strict=True):
        selected = torch.arange(60)[None] < count
        divisor = selection.token_divisor(selected, count, counts.sum())
        assert divisor == (counts.sum() if size else 0)
