"""Runs with a tool: its tokens neither compete nor train nor count, and the steps are those of TRL's own trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer

from entropy_rl.integrations.trl import EntropyGRPOTrainer
from grpo import MINI_BATCH, PROMPTS, TRLS_RULE, log_of, make_trainer
from tiny_model import WORDS

ANSWER = "It is noon."
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% for call in message.get('tool_calls') or [] %}"
    "{{ call['function']['name'] }}{{ call['function']['arguments'] | tojson }}{% endfor %}{% endfor %}"
)


def clock() -> str:
    """Tells the time."""
    return ANSWER


def call_the_tool(tokenizer: Any, ids: list[int], **_: Any) -> dict[str, Any]:
    """A random model calls no tool, so each of its answers is taken for a call."""
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    return {"role": "assistant", "content": tokenizer.decode(ids), "tool_calls": [call]}


def share_of_digits(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    texts = [completion[-1]["content"] for completion in completions]
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in texts]


class Recorded(EntropyGRPOTrainer):
    """Keeps the tokens that may be selected and those that were, [B, T], of each micro-batch."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        selected = super().get_high_entropy_mask(entropies, mask, threshold)
        self.seen.append((mask, selected > 0))  # the loss gets weights
        return selected


@pytest.fixture
def run(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(trl.trainer.grpo_trainer, "parse_response", call_the_tool)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = {}  # TRL then parses answers

    def run(trainer_class: type, **settings: Any) -> GRPOTrainer:
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        # Digits end a turn, so that several fit into a completion.
        model.generation_config.eos_token_id = [1, *(WORDS.index(digit) for digit in "0123456789")]
        prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        others = {
            "reward_funcs": share_of_digits,
            "train_dataset": Dataset.from_dict({"prompt": prompts}),
            "processing_class": tokenizer,
            "tools": [clock],
        }
        settings = {"max_steps": 2, "max_completion_length": 48, "max_tool_calling_iterations": 1} | settings
        trainer = make_trainer(model, tmp_path, trainer_class, others=others, **settings)
        trainer.train()
        return trainer

    return run


def test_two_steps_with_a_tool_are_trls(run: Any) -> None:
    theirs = log_of(run(GRPOTrainer, top_entropy_quantile=0.2))
    assert len(theirs) == 2 and all(norm > 0.01 for _, norm, _ in theirs)
    for scope in ("micro_batch", "mini_batch"):  # the same tokens: a step is one micro-batch
        ours = log_of(run(EntropyGRPOTrainer, **TRLS_RULE, entropy_top_scope=scope))
        for mine, other in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(other, rel=1e-5)


def test_tokens_of_a_tool_are_never_selected(run: Any) -> None:
    trainer = run(
        Recorded, entropy_top_ratio=0.2, **MINI_BATCH, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    logged = [line for line in trainer.state.log_history if "loss" in line]
    with_tool = 0
    for step, line in enumerate(logged):
        seen = trainer.seen[2 * step : 2 * step + 2]
        for mask, selected in seen:
            may = mask.bool()
            assert not selected[~may].any()
            # Tokens of the tool have tokens of the model before and after them.
            between = ~may & (may.cumsum(1) > 0) & (may.flip(1).cumsum(1).flip(1) > 0)
            assert set(between.sum(1).tolist()) <= {0, len(ANSWER)}
            with_tool += int(between.any(1).sum())
        n = sum(int(mask.sum()) for mask, _ in seen)
        chosen = sum(int(selected.sum()) for _, selected in seen)
        assert chosen == int(n * 0.2 + 0.9999)
        assert line["entropy_token_ratio"] == pytest.approx(chosen / n)
    assert with_tool >= 4
