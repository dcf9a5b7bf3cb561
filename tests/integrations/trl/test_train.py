"""Complete runs: sampling, steps, evaluation, logs, checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from entropy_rl.report.rollouts import read_rollouts
from grpo import PROMPTS, share_of_digits


def weights(trainer: GRPOTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same_weights(one: GRPOTrainer, other: GRPOTrainer) -> None:
    expected = weights(other)
    for name, value in weights(one).items():
        assert torch.equal(value, expected[name]), name


def trained(trainer: GRPOTrainer) -> GRPOTrainer:
    trainer.train()  # before another trainer is created, which seeds the random numbers again
    return trainer


def logged(trainer: GRPOTrainer, name: str) -> list[Any]:
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.mark.parametrize(
    ("scope", "checkpointing"),
    [("micro_batch", False), ("mini_batch", False), ("mini_batch", True), ("sequence", False)],
)
def test_trains_and_evaluates(trainer: Callable[..., GRPOTrainer], scope: str, checkpointing: bool) -> None:
    run = trainer(
        entropy_top_ratio=0.2,
        entropy_top_scope=scope,
        gradient_checkpointing=checkpointing,
        gradient_accumulation_steps=2,
        num_iterations=2,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=4,
    )
    before = weights(run)
    run.train()
    assert run.model.is_gradient_checkpointing == checkpointing
    assert any(not torch.equal(before[name], value) for name, value in weights(run).items())
    for prefix, times in (("", 4), ("eval_", 2)):
        ratios, thresholds = (logged(run, f"{prefix}entropy_{name}") for name in ("token_ratio", "threshold"))
        assert len(ratios) == len(thresholds) == times
        assert all(0.2 <= ratio < 0.3 for ratio in ratios) and all(threshold > 0 for threshold in thresholds)
        lowest, highest = (logged(run, f"{prefix}entropy_token_ratio/{end}") for end in ("min", "max"))
        for shares in zip(lowest, ratios, highest, strict=True):
            assert list(shares) == sorted(shares) and (scope != "sequence" or shares[0] >= 0.2)


def test_without_a_ratio_a_run_is_trls_bit_for_bit(trainer: Callable[..., GRPOTrainer]) -> None:
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "beta": 0.01}
    ours = trained(trainer(**settings))
    theirs = trained(trainer(GRPOTrainer, **settings))
    assert_same_weights(ours, theirs)
    assert logged(ours, "loss") == logged(theirs, "loss")
    assert not logged(ours, "entropy_token_ratio")


def test_with_trls_rule_a_run_is_trls(trainer: Callable[..., GRPOTrainer]) -> None:
    """With TRL's LM head, three steps, each sampled from the model that the last one left, have the same bits."""
    ours = trained(
        trainer(
            entropy_top_ratio=0.2,
            entropy_top_rule="quantile",
            entropy_top_ranks="global",
            entropy_top_normalize="response",
            entropy_lm_head="trl",
            max_steps=3,
        )
    )
    assert_same_weights(ours, trained(trainer(GRPOTrainer, top_entropy_quantile=0.2, max_steps=3)))


@pytest.mark.parametrize("settings", [{"loss_type": "grpo"}, {"loss_type": "bnpo", "beta": 0.01}], ids=str)
def test_a_run_does_not_depend_on_its_split(trainer: Callable[..., GRPOTrainer], settings: dict[str, Any]) -> None:
    """Two generations of two iterations each, in one, two and four micro-batches per step. SGD, because Adam takes full
    steps where a gradient is only rounding error."""
    runs = [
        trained(
            trainer(
                entropy_top_ratio=0.2,
                entropy_top_scope="mini_batch",
                entropy_top_ranks="global",
                gradient_accumulation_steps=n,
                per_device_train_batch_size=8 // n,
                num_iterations=2,
                scale_rewards="batch",
                optim="sgd",
                max_steps=4,
                **settings,
            )
        )
        for n in (1, 2, 4)
    ]
    expected = weights(runs[0])
    for run in runs[1:]:
        for name in ("loss", "grad_norm", "reward", "entropy", "entropy_token_ratio", "entropy_threshold"):
            assert logged(run, name) == pytest.approx(logged(runs[0], name), rel=1e-4, abs=1e-6), name
        torch.testing.assert_close(weights(run), expected, rtol=1e-5, atol=1e-6)
    assert len(logged(runs[0], "reward")) == 2 and len(logged(runs[0], "entropy_threshold")) == 4
    assert min(logged(runs[0], "grad_norm")) > 1


@pytest.mark.parametrize("settings", [{}, {"entropy_top_scope": "mini_batch", "loss_type": "grpo"}], ids=str)
def test_completions_are_written(trainer: Callable[..., GRPOTrainer], settings: dict[str, Any], tmp_path: Path) -> None:
    """Those of every optimizer step, for `entropy-rl inspect`, with what TRL logs of them."""
    run = trained(
        trainer(
            entropy_top_ratio=0.2,
            rollout_data_dir=str(tmp_path / "rollouts"),
            gradient_accumulation_steps=2,
            per_device_train_batch_size=4,
            max_steps=2,
            **settings,
        )
    )
    written = read_rollouts(tmp_path / "rollouts")
    for step, (reward, entropy, ratio) in enumerate(
        zip(*(logged(run, name) for name in ("reward", "entropy", "entropy_token_ratio")), strict=True), start=1
    ):
        rows = [row for row in written if row.step == step]
        assert len(rows) == 8 and {row.input for row in rows} <= set(PROMPTS)
        assert sum(row.score or 0.0 for row in rows) / 8 == pytest.approx(reward)
        for row in rows:
            assert row.score == pytest.approx(share_of_digits([row.output])[0])
            assert (row.advantage or 0.0) == pytest.approx(
                advantage_in_group(row.score, [r.score for r in rows if r.input == row.input]), abs=1e-3
            )
        pairs = [pair for row in rows for pair in zip(row.entropies or [], row.selected or [], strict=True)]
        assert sum(chosen for _, chosen in pairs) / len(pairs) == pytest.approx(ratio)
        if settings:  # with micro_batch TRL logs the mean over micro-batches
            assert sum(e for e, _ in pairs) / len(pairs) == pytest.approx(entropy, rel=1e-4)
            lowest = min(e for e, chosen in pairs if chosen)
            assert all(chosen == (e >= lowest) for e, chosen in pairs)
    assert len(written) == 16


def advantage_in_group(score: float, scores: list[float]) -> float:
    group = torch.tensor(scores)
    return ((score - group.mean()) / (group.std() + 1e-4)).item()


def test_completions_are_written_without_a_ratio(trainer: Callable[..., GRPOTrainer], tmp_path: Path) -> None:
    trained(trainer(rollout_data_dir=str(tmp_path / "rollouts"), max_steps=1))
    rows = read_rollouts(tmp_path / "rollouts")
    assert len(rows) == 8 and all(row.selected is None and row.entropies and row.log_probs for row in rows)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo"])
def test_a_run_whose_completions_are_all_truncated(trainer: Callable[..., GRPOTrainer], loss_type: str) -> None:
    run = trainer(
        entropy_top_ratio=0.2,
        entropy_top_scope="mini_batch",
        loss_type=loss_type,
        gradient_accumulation_steps=2,
        mask_truncated_completions=True,
        generation_kwargs={"suppress_tokens": [0, 1]},  # padding, end of text
        max_steps=2,
    )
    before = weights(run)
    run.train()
    assert logged(run, "loss") == logged(run, "grad_norm") == logged(run, "entropy_token_ratio") == [0, 0]
    assert all(torch.equal(before[name], value) for name, value in weights(run).items())


def test_a_resumed_run_ends_like_an_uninterrupted_one(trainer: Callable[..., GRPOTrainer], tmp_path: Path) -> None:
    settings = {
        "entropy_top_ratio": 0.2,
        "entropy_top_scope": "mini_batch",
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = trained(trainer(**settings))
    resumed = trainer(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert logged(resumed, "entropy_threshold") == logged(whole, "entropy_threshold")
    assert_same_weights(resumed, whole)
