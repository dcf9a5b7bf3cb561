"""A step of the trainer on a small Qwen3: old log-probabilities and one optimizer step, with our head and a plain one.

Sampling is left out because it is the same for both. In the first model the LM head has the share of the parameters
that it has in Qwen3-0.6B; in the second, a larger form of the demo's (python/entropy_rl/demo.py), it has hardly any.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks.harness import Case, Inputs
from entropy_rl import config, train

# layers, hidden size H, vocabulary V, responses, prompt tokens, response tokens
Shape = tuple[int, int, int, int, int, int]
SHAPES: dict[str, list[Shape]] = {
    "quick": [(1, 32, 300, 4, 3, 5)],
    "cpu": [(15, 512, 32768, 8, 16, 128), (3, 128, 108, 1024, 6, 12)],
    "cuda": [(28, 1024, 151936, 16, 128, 1024)],
}
ACTOR = "actor_rollout_ref.actor"
# docs/training.md explains the selections.
SELECTIONS = {
    "ratio null": [f"{ACTOR}.entropy_top_ratio=null"],
    "ratio 0.2": [f"{ACTOR}.entropy_top_ratio=0.2"],
    "ratio 0.2, known before the forward": [
        f"{ACTOR}.entropy_top_ratio=0.2",
        f"{ACTOR}.entropy_top_scope=mini_batch",
        f"{ACTOR}.entropy_top_source=old_policy",
    ],
}


@cache
def model_and_optimizer(shape: Shape, device: torch.device) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    layers, width, vocab, *_ = shape
    settings = Qwen3Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 64),
        head_dim=32,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(settings).to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-6)


@cache
def settings(responses: int, selection: str, fused: bool) -> DictConfig:
    return config.load(
        [
            "actor_rollout_ref.model.path=none",
            "data.train_files=none",
            f"actor_rollout_ref.model.use_fused_kernels={fused}",
            f"{ACTOR}.ppo_mini_batch_size=1",
            "data.train_batch_size=1",
            f"actor_rollout_ref.rollout.n={responses}",
            *SELECTIONS[selection],
        ]
    )


def step(
    shape: Shape, selection: str, fused: bool, tokens: Tensor, response_mask: Tensor, advantages: Tensor
) -> dict[str, float]:
    model, optimizer = model_and_optimizer(shape, tokens.device)
    chosen = settings(len(tokens), selection, fused)
    batch = train.Batch(tokens, torch.ones_like(tokens), response_mask)
    old_log_prob, entropy = train.compute_log_prob(model, batch, chosen)
    metrics = train.update(
        model, optimizer, train.Experience(batch, advantages, old_log_prob, None, entropy), 1, 1, chosen
    )
    optimizer.zero_grad()  # the next step begins without gradients
    return metrics


def inputs(shape: Shape, device: torch.device) -> Inputs:
    _, _, vocab, responses, prompt, length = shape
    return {
        "tokens": torch.randint(vocab, (responses, prompt + length), device=device),
        "response_mask": torch.ones(responses, length, dtype=torch.bool, device=device),
        "advantages": torch.randn(responses, 1, device=device).expand(-1, length).contiguous(),
    }


def case(shape: Shape, selection: str, device: torch.device) -> Case:
    layers, width, vocab, responses, _, length = shape
    parameters = sum(p.numel() for p in model_and_optimizer(shape, device)[0].parameters())
    contender: Any = partial(step, shape, selection)
    return Case(
        name=f"{selection}: {responses} x {length} tokens, {layers} layers, H = {width}, V = {vocab}, float32",
        inputs=partial(inputs, shape, device),
        ours=partial(contender, True),
        peers={"plain head, logits held": partial(contender, False)},
        # Two forwards and a backward read the parameters; the gradient is written; AdamW reads four, writes three.
        bytes=(2 + 1 + 1 + 4 + 3) * 4 * parameters,
        backward=True,
        peak_in_own_process=True,
    )


def cases(size: str, device: torch.device) -> Iterator[Case]:
    return (case(shape, selection, device) for shape in SHAPES[size] for selection in SELECTIONS)
