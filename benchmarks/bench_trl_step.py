"""An optimizer step of GRPO in TRL with our trainer and with TRL's own: forwards, loss, backward, clipping, AdamW.

The model is a small Qwen3 with a large vocabulary for its size: as in today's small models, the LM head is most of the
step. Completions are given, not sampled. All contenders except the last train the same share of the tokens.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.harness import Case, Inputs

# (sequences, prompt tokens, completion tokens, hidden size, layers, vocabulary)
SHAPES = {
    "quick": [(2, 4, 8, 32, 1, 64)],
    "cpu": [(4, 32, 256, 256, 2, 16384)],
    "cuda": [(16, 256, 1024, 1024, 8, 151936)],
}
RATIO = 0.2


def make_model(device: torch.device, hidden: int, layers: int, vocab: int) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).to(device)


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    words = {f"<{i}>": i for i in range(vocab)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")), pad_token="<0>", eos_token="<1>"
    )


def make_trainer(
    device: torch.device,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    sequences: int,
    **settings: Any,
) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from entropy_rl.integrations.trl import EntropyGRPOConfig, EntropyGRPOTrainer

    ours = "entropy_top_ratio" in settings
    trainer = (EntropyGRPOTrainer if ours else GRPOTrainer)(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=(EntropyGRPOConfig if ours else GRPOConfig)(
            output_dir=tempfile.mkdtemp(),
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=device.type == "cpu",
            report_to="none",
            num_generations=sequences,
            per_device_train_batch_size=sequences,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["<0>"]}),
        processing_class=tokenizer,
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def step(trainer: Callable[[], Any], **batch: Tensor) -> Tensor:
    """One optimizer step; returns its loss."""
    trainer = trainer()
    trainer.model.train()
    trainer._step, trainer._buffered_inputs = 0, [batch]
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return loss.detach()


def case(device: torch.device, *shape: int) -> Case:
    sequences, prompt, completion, hidden, layers, vocab = shape

    def inputs() -> Inputs:
        mask = (torch.arange(completion) < torch.randint(completion // 2, completion + 1, (sequences, 1))).int()
        batch = {
            "prompt_ids": torch.randint(vocab, (sequences, prompt)),
            "prompt_mask": torch.ones(sequences, prompt, dtype=torch.int32),
            "completion_ids": torch.randint(vocab, (sequences, completion)),
            "completion_mask": mask,
            "advantages": torch.randn(sequences),
            "num_items_in_batch": mask.sum(),
        }
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def contender(**settings: Any) -> Callable[..., Tensor]:
        @cache
        def trainer() -> Any:
            model = make_model(device, hidden, layers, vocab)
            return make_trainer(device, model, make_tokenizer(vocab), sequences, **settings)

        return lambda **batch: step(trainer, **batch)

    return Case(
        name=f"{sequences} × ({prompt} + {completion}) tokens, hidden {hidden}, {layers} layers, vocabulary {vocab}",
        inputs=inputs,
        ours=contender(entropy_top_ratio=RATIO),
        peers={
            "ours, scope mini_batch (one more forward)": contender(
                entropy_top_ratio=RATIO, entropy_top_scope="mini_batch"
            ),
            "ours, TRL's LM head": contender(entropy_top_ratio=RATIO, entropy_lm_head="trl"),
            "TRL, top_entropy_quantile": contender(top_entropy_quantile=RATIO),
            "TRL, all tokens": contender(),
        },
        # The embeddings and AdamW's two moments read and written, their gradient written and read.
        bytes=vocab * hidden * 4 * 8,
        backward=True,
    )


def cases(size: str, device: torch.device) -> Iterator[Case]:
    return (case(device, *shape) for shape in SHAPES[size])
