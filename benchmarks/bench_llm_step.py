"""An optimizer step of GRPO on SmolLM2-135M-Instruct (`make model`): forward, loss, backward, clipping and AdamW.

The batch is given, not sampled. All contenders whose name does not say otherwise train the same share of its tokens.
`ours` is the step of `entropy_rl.train` with a selection that is known before the forward: the trainer makes it from
the entropies that it computes with the old log-probabilities. The contenders share the model and the optimizer, except
verl's: each has a process of its own.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks import bench_trl_step, verl_step
from benchmarks.harness import ROOT, Case, InOwnProcess, Inputs
from benchmarks.report import WITHOUT_HEAD
from entropy_rl import config, train

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
# (sequences, prompt tokens, response tokens)
SHAPES = {"quick": (2, 4, 8), "cpu": (4, 64, 256), "cuda": (32, 128, 1024)}
RATIO = 0.2
# Of the random model for "quick", so that nothing need be there.
QUICK: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}
ACTOR = "actor_rollout_ref.actor"
PRESELECTED = (f"{ACTOR}.entropy_top_scope=mini_batch", f"{ACTOR}.entropy_top_source=old_policy")


@cache
def model_and_optimizer(size: str, device: torch.device) -> tuple[PreTrainedModel, AdamW]:
    """The model in float32."""
    if size == "quick":
        model = LlamaForCausalLM(LlamaConfig(**QUICK))
    else:
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return model.to(device), AdamW(model.parameters(), lr=1e-6)


@cache
def model_directory(size: str) -> str:
    """The model as verl loads it."""
    if size != "quick":
        return str(MODEL)
    directory = tempfile.mkdtemp()
    LlamaForCausalLM(LlamaConfig(**QUICK)).save_pretrained(directory)
    bench_trl_step.make_tokenizer(QUICK["vocab_size"]).save_pretrained(directory)
    return directory


@cache
def settings(sequences: int, *overrides: str) -> DictConfig:
    return config.load(
        [
            "actor_rollout_ref.model.path=none",
            "data.train_files=none",
            "data.train_batch_size=1",
            f"{ACTOR}.ppo_mini_batch_size=1",
            f"actor_rollout_ref.rollout.n={sequences}",
            f"{ACTOR}.entropy_top_ratio={RATIO}",
            "trainer.logger=[console]",  # tensorboard need not be installed
            *overrides,
        ]
    )


def as_batch(given: dict[str, Tensor]) -> train.Batch:
    """The trainer's form of a batch of TRL's."""
    tokens = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    mask = torch.cat([given["prompt_mask"], given["completion_mask"]], 1)
    return train.Batch(tokens, mask.long(), given["completion_mask"].bool())


def our_step(size: str, overrides: tuple[str, ...], **given: Tensor) -> dict[str, float]:
    batch = as_batch(given)
    chosen = settings(len(batch.tokens), *overrides)
    model, optimizer = model_and_optimizer(size, batch.tokens.device)
    advantages = given["advantages"][:, None].expand_as(batch.response_mask).contiguous()
    experience = train.Experience(batch, advantages, given["old_per_token_logps"], None, given["old_entropy"])
    metrics = train.update(model, optimizer, experience, 1, 1, chosen)
    optimizer.zero_grad()  # the next step begins without gradients
    return metrics


@cache
def trl_trainer(size: str, device: torch.device, sequences: int, name: str, value: float | None) -> Any:
    model, optimizer = model_and_optimizer(size, device)
    tokenizer = bench_trl_step.make_tokenizer(model.config.vocab_size)
    trainer = bench_trl_step.make_trainer(device, model, tokenizer, sequences, **({name: value} if name else {}))
    trainer.optimizer = optimizer
    return trainer


def trl_step(size: str, name: str, value: float | None, *, old_entropy: Tensor, **given: Tensor) -> Tensor:
    sequences, device = len(old_entropy), old_entropy.device
    return bench_trl_step.step(lambda: trl_trainer(size, device, sequences, name, value), **given)


def step_without_head(size: str, **given: Tensor) -> None:
    batch = as_batch(given)
    model, optimizer = model_and_optimizer(size, batch.tokens.device)
    model.train()
    model.base_model(input_ids=batch.tokens, attention_mask=batch.attention_mask).last_hidden_state.mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def inputs(size: str, device: torch.device) -> Inputs:
    sequences, prompt, length = SHAPES[size]
    model, _ = model_and_optimizer(size, device)
    vocab = model.config.vocab_size
    mask = (torch.arange(length) < torch.randint(length // 2, length + 1, (sequences, 1))).int()
    given = {
        "prompt_ids": torch.randint(vocab, (sequences, prompt)),
        "prompt_mask": torch.ones(sequences, prompt, dtype=torch.int32),
        "completion_ids": torch.randint(vocab, (sequences, length)),
        "completion_mask": mask,
        "advantages": torch.randn(sequences),
        "num_items_in_batch": mask.sum(),
    }
    given = {name: tensor.to(device) for name, tensor in given.items()}
    # Of the same policy: no token's gradient is clipped away.
    log_prob, entropy = train.compute_log_prob(model, as_batch(given), settings(sequences))
    return given | {"old_per_token_logps": log_prob, "old_entropy": entropy}


def case(size: str, device: torch.device) -> Case:
    model, _ = model_and_optimizer(size, device)
    sequences, prompt, length = SHAPES[size]
    trl: Callable[..., Any] = partial(trl_step, size)

    def verl(*overrides: str) -> InOwnProcess:
        return InOwnProcess(partial(verl_step.step, model_directory(size), overrides))

    selecting = f"{ACTOR}.entropy_top_ratio={RATIO}"
    return Case(
        name=f"{sequences} × ({prompt} + {length}) tokens, {model.num_parameters():,} parameters, float32",
        inputs=partial(inputs, size, device),
        ours=partial(our_step, size, PRESELECTED),
        peers={
            "ours, selected after the forward": partial(our_step, size, ()),
            "ours, in TRL's trainer": partial(trl, "entropy_top_ratio", RATIO),
            "TRL, top_entropy_quantile": partial(trl, "top_entropy_quantile", RATIO),
            "TRL, all tokens": partial(trl, "", None),
            "ours, in verl": verl(selecting, *PRESELECTED, "actor_rollout_ref.model.use_fused_kernels=true"),
            "verl, its own kernels": verl(selecting, *verl_step.VERLS_KERNELS),
            "verl, all tokens": verl(*verl_step.VERLS_KERNELS),
            WITHOUT_HEAD: partial(step_without_head, size),
        },
        # The forward and the backward read the parameters; the gradient is written; AdamW reads four, writes three.
        bytes=(1 + 1 + 1 + 4 + 3) * 4 * model.num_parameters(),
        backward=True,
        peak_in_own_process=True,
    )


def cases(size: str, device: torch.device) -> Iterator[Case]:
    yield case(size, device)
