"""Reinforcement learning with verifiable rewards, with the policy gradient on the highest-entropy tokens only.

    python -m entropy_rl.train actor_rollout_ref.model.path=MODEL data.train_files=train.parquet \\
        actor_rollout_ref.actor.entropy_top_ratio=0.2

    torchrun --nproc-per-node 8 -m entropy_rl.train ...

A training step samples a group of responses to each problem, scores them, and turns the scores into advantages. It
computes the log-probabilities of the responses under the current policy and then takes optimizer steps. --help lists
every key.
"""

import sys

from entropy_rl import extras

if __name__ == "__main__":  # before the imports below, because their packages may be missing
    sys.exit(extras.run_module("entropy_rl.train"))

import contextlib
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import entropy_rl.config
from entropy_rl import advantages, checkpoint, distributed, lm_head, pretrained, progress
from entropy_rl.config import ConfigError
from entropy_rl.errors import UserError, one_line
from entropy_rl.logs import Histogram, Logs
from entropy_rl.report.rollouts import Rollout, make_rollouts, write_rollouts
from entropy_rl.rewards import Scorer
from entropy_rl.selection import StepSelection, TokenSelection, needs_all_tokens, prepass, select_tokens
from entropy_rl.tasks import Problem, load_tasks
from entropy_rl_ext import aggregate, logprob_entropy

Example = tuple[Problem, list[int]]  # a problem and its prompt as token ids


@dataclass
class Batch:
    """Prompts, padded on the left, and their responses, padded on the right."""

    tokens: Tensor  # [B, P + S] int64
    attention_mask: Tensor  # [B, P + S] int64
    response_mask: Tensor  # [B, S] bool, the end-of-text token included

    @property
    def responses(self) -> Tensor:  # [B, S] int64
        return self.tokens[:, -self.response_mask.shape[1] :]

    def rows(self, index: Tensor) -> "Batch":
        return Batch(self.tokens[index], self.attention_mask[index], self.response_mask[index])


@dataclass
class Experience:
    """A batch of responses with what the update needs to learn from it."""

    batch: Batch
    advantages: Tensor  # [B, S]
    old_log_prob: Tensor  # [B, S]
    ref_log_prob: Tensor | None  # [B, S], with use_kl_loss
    old_entropy: Tensor  # [B, S]
    trained: Tensor | None = None  # [B, S] bool: the tokens that the last update used; None: not asked for

    def rows(self, index: Tensor) -> "Experience":
        return Experience(
            self.batch.rows(index),
            self.advantages[index],
            self.old_log_prob[index],
            None if self.ref_log_prob is None else self.ref_log_prob[index],
            self.old_entropy[index],
            None if self.trained is None else self.trained[index],
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 2 for a user error, reported in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        print((Path(entropy_rl.config.__file__).parent / "train.yaml").read_text())
        return 0
    try:
        train(entropy_rl.config.load(arguments))
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def train(config: DictConfig) -> None:
    """Trains with a configuration of config/train.yaml. Raises ConfigError for a user error."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = choose_device(config.trainer.device)
    with distributed.process_group(device, config.actor_rollout_ref.nccl_timeout):
        check_ranks(config)
        with checkpoint.locked(Path(config.trainer.default_local_dir).expanduser()):
            run(config, device)


@dataclass
class Training:
    """What a rank trains, and what it trains on."""

    examples: list[Example]
    validation: list[Example]
    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    reference: PreTrainedModel | None  # with use_kl_loss
    optimizer: Optimizer
    resumed: Path | None  # the checkpoint that the run resumes from
    first_step: int  # its step; 0 without one
    total_steps: int


def run(config: DictConfig, device: torch.device) -> None:
    """Runs one rank: its share of every batch and of every gradient."""
    trainer, first_rank = config.trainer, distributed.rank() == 0
    directory = Path(trainer.default_local_dir).expanduser()
    training = set_up(config, directory, device)
    saved, last_step = training.resumed, training.total_steps

    def validated() -> dict[str, float]:
        return validate(training.model, training.tokenizer, training.validation, training.scorer, config)

    with contextlib.closing(Logs(directory, config, training.first_step, last_step, active=first_rank)) as logs:
        if trainer.val_before_train and training.validation and training.first_step == 0:
            with progress.doing("testing"):
                logs.write(0, validated())
        for step in range(training.first_step + 1, last_step + 1):
            timer = Timer()
            metrics, tokens = train_step(training, step, timer, logs, config)
            last = step == last_step
            if training.validation and (last or (trainer.test_freq > 0 and step % trainer.test_freq == 0)):
                with timer.phase("testing"):
                    metrics |= validated()
            # Logged before the checkpoint: a run that resumes from it has logged all of its steps.
            logs.write(step, metrics | timer.metrics(tokens))
            if metrics["critic/advantages/max"] == metrics["critic/advantages/min"] == 0:
                logs.warn("no advantage", nothing_to_learn(step, metrics))
            if is_due(step, last_step, trainer.save_freq):
                keep = trainer.max_actor_ckpt_to_keep
                state = (training.model, training.tokenizer, training.optimizer)
                saved = checkpoint.save(directory, step, *state, keep=keep, previous=saved)
    if first_rank:
        print(f"metrics, curves and checkpoints: {directory.resolve()}")


def train_step(
    training: Training, step: int, timer: "Timer", logs: Logs, config: DictConfig
) -> tuple[dict[str, float], int]:
    """Samples, scores and updates. Returns the metrics, and how many tokens the batch has over all ranks."""
    model, rollout, device = training.model, config.actor_rollout_ref.rollout, training.model.device
    chosen = share_of_rank(batch_of_step(training.examples, step, config.data), config)
    # The responses to a problem stand next to each other.
    group = [example for example in chosen for _ in range(rollout.n)]
    with timer.phase("gen"), distributed.unsharded(model) as unsharded_model:
        seed = distributed.seed_of_rank(rollout.seed * 1_000_003 + step)
        generator = torch.Generator(device).manual_seed(seed)
        prompts = [prompt for _, prompt in group]
        batch = generate(unsharded_model, training.tokenizer, prompts, config, rollout, generator)
    with timer.phase("reward"):
        rewards, faults = score(training.tokenizer, batch, [problem for problem, _ in group], training.scorer)
        rewards = rewards.to(device)
    with timer.phase("old_log_prob"):
        old_log_prob, entropy = compute_log_prob(model, batch, config)
    ref_log_prob = None
    if training.reference is not None:
        with timer.phase("ref"):
            ref_log_prob, _ = compute_log_prob(training.reference, batch, config)
    with timer.phase("adv"):
        advantage = compute_advantages(rewards, batch.response_mask, config)
    with timer.phase("update_actor"):
        trained = None if config.actor_rollout_ref.actor.entropy_top_ratio is None else batch.response_mask.clone()
        experience = Experience(batch, advantage, old_log_prob, ref_log_prob, entropy, trained)
        updated = update(model, training.optimizer, experience, step, training.total_steps, config)
    with timer.phase("dump_rollout_generations"):
        record(training, experience, group, rewards, step, logs, config)

    steps_per_epoch = len(training.examples) // config.data.train_batch_size
    metrics = {"training/global_step": step, "training/epoch": (step - 1) // steps_per_epoch}
    metrics |= updated | batch_metrics(batch, rewards, faults, advantage, entropy, config)
    return metrics, int(distributed.reduce(batch.attention_mask.sum()))


# ---- Setting up


def set_up(config: DictConfig, directory: Path, device: torch.device) -> Training:
    """Loads data and models, and the state of the checkpoint from which the run resumes."""
    actor, settings = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    resumed = distributed.from_first(find_checkpoint(config.trainer, directory))
    first_step = checkpoint.step_of(resumed) if resumed else 0
    if resumed:
        checkpoint.verify(resumed, settings.path, trust_remote_code=settings.trust_remote_code)
    problems, validation_problems, scorer = load_tasks(config)
    if config.trainer.rollout_data_dir is not None:
        distributed.on_first(lambda: make_directory(config.trainer.rollout_data_dir))
    tokenizer = load_tokenizer(settings)
    examples = encode(tokenizer, problems, config)
    validation = encode(tokenizer, validation_problems, config)
    if len(examples) < config.data.train_batch_size:
        raise ConfigError(
            f"data.train_batch_size={config.data.train_batch_size}: it must be at most the number of training "
            f"problems, {len(examples)}"
        )
    steps = config.trainer.total_epochs * (len(examples) // config.data.train_batch_size)
    total_steps = config.trainer.total_training_steps or steps

    seed = config.actor_rollout_ref.rollout.seed
    transformers.set_seed(seed)
    model = load_model(settings, checkpoint.model_directory(resumed) if resumed else settings.path).to(device)
    check_model(model, tokenizer, [*examples, *validation], config)
    saves = [
        step for step in range(first_step + 1, total_steps + 1) if is_due(step, total_steps, config.trainer.save_freq)
    ]
    checkpoint.check_saving(directory, saves, model, tokenizer)
    model = distributed.distribute(model, actor.strategy, device)
    reference = None
    if actor.use_kl_loss:
        reference = load_model(settings, settings.path).to(device).requires_grad_(False)
        if actor.strategy != "ddp":  # DDP reduces gradients, and the reference has none
            reference = distributed.distribute(reference, actor.strategy, device)
    optimizer = AdamW(model.parameters(), betas=tuple(actor.optim.betas), weight_decay=actor.optim.weight_decay)
    if distributed.rank() > 0:
        torch.manual_seed(distributed.seed_of_rank(seed))
    checkpoint.begin(directory, resumed)
    if resumed:
        checkpoint.restore(resumed, model, optimizer)
    # After the state is restored: a forward leaves the root of a sharded model unsharded until its backward.
    tell_about_lm_head(model, config)
    return Training(
        examples, validation, scorer, tokenizer, model, reference, optimizer, resumed, first_step, total_steps
    )


def is_due(step: int, total_steps: int, every: int) -> bool:
    """Whether to save or to show samples after a step: after every so many and after the last; never if it is -1."""
    return every > 0 and (step == total_steps or step % every == 0)


def tell_about_lm_head(model: PreTrainedModel, config: DictConfig) -> None:
    """Prints why the LM head does not save the work that the configuration asks for, if it does not."""
    actor = config.actor_rollout_ref.actor
    if not config.actor_rollout_ref.model.use_fused_kernels:
        return
    unsupported = lm_head.unsupported_reason(model)  # on all ranks, if the model is sharded
    needed_by = needs_all_tokens(actor) if StepSelection(actor).before_step else None
    if distributed.rank() > 0:
        return
    if unsupported:
        print(
            f"actor_rollout_ref.model.use_fused_kernels=true has no effect for this model: {unsupported}; "
            "its logits are kept in memory"
        )
    elif needed_by:
        print(
            f"actor_rollout_ref.actor.entropy_top_scope={actor.entropy_top_scope}: the training step runs the LM head "
            f"on all response tokens, because {needed_by} needs them all"
        )


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device=cuda: PyTorch sees no GPU; it must be auto or cpu here")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name) if name == "cpu" else torch.device(name, distributed.local_rank())


def check_ranks(config: DictConfig) -> None:
    """Raises ConfigError if the ranks cannot share the batch equally, or if verl's keys name other ranks."""
    actor, trainer, ranks = config.actor_rollout_ref.actor, config.trainer, distributed.size()
    if trainer.n_gpus_per_node is not None and trainer.n_gpus_per_node * trainer.nnodes != ranks:
        raise ConfigError(
            f"trainer.n_gpus_per_node={trainer.n_gpus_per_node}, trainer.nnodes={trainer.nnodes}: torchrun started "
            f"{ranks} processes (one without torchrun); leave n_gpus_per_node null, or make the numbers agree"
        )
    if actor.ppo_mini_batch_size % ranks:
        raise ConfigError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size}: the number of processes, "
            f"{ranks}, must divide it"
        )
    micro = actor.ppo_micro_batch_size_per_gpu
    responses = actor.ppo_mini_batch_size // ranks * config.actor_rollout_ref.rollout.n
    if micro is not None and responses % micro:
        raise ConfigError(
            f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={micro}: it must divide ppo_mini_batch_size * "
            f"rollout.n / processes = {responses}"
        )


def make_directory(path: str) -> None:
    try:
        Path(path).expanduser().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"trainer.rollout_data_dir={path}: it cannot be created: {error.strerror}") from None


def find_checkpoint(trainer: DictConfig, directory: Path) -> Path | None:
    if trainer.resume_mode == "disable":
        return None
    if trainer.resume_mode == "resume_path":
        return Path(trainer.resume_from_path).expanduser().resolve()
    return checkpoint.find_latest(directory)


def load_model(settings: DictConfig, path: str | Path) -> PreTrainedModel:
    """The model in float32, the precision in which the optimizer updates it."""
    where = _where(settings) if path == settings.path else str(path)  # a checkpoint
    model = pretrained.load_model(where, path, dtype=torch.float32, trust_remote_code=settings.trust_remote_code)
    if settings.enable_gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def load_tokenizer(settings: DictConfig) -> PreTrainedTokenizerBase:
    where = _where(settings)
    tokenizer = pretrained.load_tokenizer(where, settings.path, trust_remote_code=settings.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{where}: its tokenizer has no end-of-text token, and training needs one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], config: DictConfig
) -> None:
    """Raises UserError if a token id or the longest prompt with its response does not fit the model."""
    where, limit = _where(config.actor_rollout_ref.model), config.data.max_response_length
    prompts = [prompt for _, prompt in examples]
    ids: dict[str, Iterable[int]] = {
        f"{where}: its tokenizer's padding token": [tokenizer.pad_token_id],
        f"{where}: a token that its tokenizer gives": set().union(*prompts),
    }
    longest = f"data.max_response_length={limit}: the longest prompt with a response"
    pretrained.check_fits(model, ids, longest, max(map(len, prompts)) + limit)


def _where(settings: DictConfig) -> str:
    return f"actor_rollout_ref.model.path={settings.path}"


def encode(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], config: DictConfig) -> list[Example]:
    """Problems with the token ids of their prompts. Prompts that are too long are an error, or are dropped."""
    limit, examples = config.data.max_prompt_length, []
    for problem in problems:
        prompt = pretrained.prompt_ids(tokenizer, problem.messages)
        if not prompt:
            raise ConfigError(f"{problem.where or 'data'}: a prompt has no tokens; at least one was expected")
        if len(prompt) <= limit:
            examples.append((problem, prompt))
        elif not config.data.filter_overlong_prompts:
            raise ConfigError(
                f"data.max_prompt_length={limit}: a prompt has {len(prompt)} tokens ({problem.where}); allow as many, "
                "or set data.filter_overlong_prompts=true"
            )
    return examples


def batch_of_step(examples: Sequence[Example], step: int, data: DictConfig) -> list[Example]:
    """The problems of a step, counted from 1. They depend on nothing else, so that a resumed run sees the same ones."""
    per_epoch = len(examples) // data.train_batch_size
    epoch, index = divmod(step - 1, per_epoch)
    order = torch.arange(len(examples))
    if data.shuffle:
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed((data.seed or 0) + epoch))
    return [examples[i] for i in order[index * data.train_batch_size :][: data.train_batch_size].tolist()]


def share_of_rank(chosen: Sequence[Example], config: DictConfig) -> list[Example]:
    """The problems of this rank. Every mini-batch is shared among the ranks and does not depend on their number."""
    mini = config.actor_rollout_ref.actor.ppo_mini_batch_size
    own = mini // distributed.size()
    begins = range(distributed.rank() * own, len(chosen), mini)
    return [example for begin in begins for example in chosen[begin : begin + own]]


# ---- Sampling and scoring


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: DictConfig,
    sampling: DictConfig,
    generator: torch.Generator,
) -> Batch:
    """Samples one response to each prompt, at most rollout.max_num_seqs at a time.

    `sampling` has temperature (0 takes the most probable token), top_p and top_k.
    """
    model.eval()
    width = max(len(prompt) for prompt in prompts)
    limit, at_a_time = config.data.max_response_length, config.actor_rollout_ref.rollout.max_num_seqs
    end = torch.tensor(pretrained.end_of_text_ids(model, tokenizer), device=model.device)
    parts = []
    for begin in progress.track(range(0, len(prompts), at_a_time), "part"):
        padded = [
            [tokenizer.pad_token_id] * (width - len(prompt)) + list(prompt)
            for prompt in prompts[begin : begin + at_a_time]
        ]
        lengths = torch.tensor([len(prompt) for prompt in prompts[begin : begin + at_a_time]])
        prompt_mask = torch.arange(width) >= width - lengths[:, None]
        with autocast(model.device, config):
            parts.append(
                _generate(
                    model,
                    torch.tensor(padded, device=model.device),
                    prompt_mask.long().to(model.device),
                    limit,
                    end,
                    tokenizer.pad_token_id,
                    sampling,
                    generator,
                )
            )
    length = max(part.response_mask.shape[1] for part in parts)

    def join(tensors: Sequence[Tensor], columns: int, fill: int) -> Tensor:
        return torch.cat([torch.nn.functional.pad(t, (0, columns - t.shape[1]), value=fill) for t in tensors])

    return Batch(
        join([part.tokens for part in parts], width + length, tokenizer.pad_token_id),
        join([part.attention_mask for part in parts], width + length, 0),
        join([part.response_mask for part in parts], length, 0),
    )


def _generate(
    model: PreTrainedModel,
    tokens: Tensor,  # [B, P] int64
    attention_mask: Tensor,  # [B, P] int64
    limit: int,
    end: Tensor,  # [E] int64
    pad: int,
    sampling: DictConfig,
    generator: torch.Generator,
) -> Batch:
    """Samples one token per forward, with a cache of keys and values, until every row has ended."""
    open_rows = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    position = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    new, cache, response_mask = tokens, None, []
    for _ in progress.track(range(limit), "token"):
        output = model(
            input_ids=new,
            attention_mask=attention_mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        drawn = sample(output.logits[:, -1].float(), sampling, generator)
        new = torch.where(open_rows, drawn, pad)[:, None]
        response_mask.append(open_rows)
        tokens = torch.cat([tokens, new], -1)
        attention_mask = torch.cat([attention_mask, open_rows.long()[:, None]], -1)
        position = position[:, -1:] + 1
        open_rows = open_rows & ~torch.isin(drawn, end)
        if not open_rows.any():
            break
    return Batch(tokens, attention_mask, torch.stack(response_mask, -1))


def sample(logits: Tensor, sampling: DictConfig, generator: torch.Generator) -> Tensor:
    """Draws a token id for each row of logits [B, V]; returns [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k != -1:
        smallest = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all tokens before
        logits = torch.full_like(logits, -torch.inf).scatter(
            -1, index, ordered.masked_fill(before >= sampling.top_p, -torch.inf)
        )
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def score(
    tokenizer: PreTrainedTokenizerBase, batch: Batch, problems: Sequence[Problem], scorer: Scorer
) -> tuple[Tensor, dict[str, Tensor]]:
    """The reward of each response, [B] float32, and which responses could not be scored, [B] float32 for a metric."""
    answers = [
        tokenizer.decode(
            [token for token, inside in zip(response, mask, strict=True) if inside], skip_special_tokens=True
        )
        for response, mask in zip(batch.responses.tolist(), batch.response_mask.tolist(), strict=True)
    ]
    scores = scorer(problems, answers)
    faults = {
        f"reward/{fault}_ratio": torch.tensor([score.fault == fault for score in scores], dtype=torch.float32)
        for fault in ("error", "timeout")
    }
    return torch.tensor([score.reward for score in scores], dtype=torch.float32), faults


def validate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    scorer: Scorer,
    config: DictConfig,
) -> dict[str, float]:
    """The mean reward of each data source, as the metric `val-core/SOURCE/reward/mean@n`."""
    sampling = config.actor_rollout_ref.rollout.val_kwargs
    seed = distributed.seed_of_rank(config.actor_rollout_ref.rollout.seed)
    size = config.data.val_batch_size or len(examples)
    own = examples[distributed.rank() :: distributed.size()]
    scored: list[tuple[str, float]] = []
    with distributed.unsharded(model) as unsharded_model:
        generator = torch.Generator(unsharded_model.device).manual_seed(seed)
        for begin in progress.track(range(0, len(own), size), "batch"):
            group = [example for example in own[begin : begin + size] for _ in range(sampling.n)]
            batch = generate(unsharded_model, tokenizer, [prompt for _, prompt in group], config, sampling, generator)
            rewards, _ = score(tokenizer, batch, [problem for problem, _ in group], scorer)
            scored += zip((problem.data_source for problem, _ in group), rewards.tolist(), strict=True)
    by_source: dict[str, list[float]] = defaultdict(list)
    for of_rank in distributed.gather(scored):
        for source, reward in of_rank:
            by_source[source].append(reward)
    return {
        f"val-core/{source}/reward/mean@{sampling.n}": sum(rewards) / len(rewards)
        for source, rewards in by_source.items()
    }


def compute_advantages(rewards: Tensor, mask: Tensor, config: DictConfig) -> Tensor:
    """[B] rewards, those of the responses to one problem next to each other -> [B, S] advantages."""
    settings = config.algorithm
    problem = torch.arange(len(rewards), device=rewards.device) // config.actor_rollout_ref.rollout.n
    match settings.adv_estimator:
        case "grpo":
            return advantages.grpo(rewards, mask, problem, norm_by_std=settings.norm_adv_by_std_in_grpo)
        case "rloo":
            return advantages.rloo(rewards, mask, problem)
        case "gpg":
            return advantages.gpg(rewards, mask, problem)
        case _:
            return advantages.reinforce_plus_plus(rewards, mask, gamma=settings.gamma)


# ---- Learning


def uses_fused_head(model: PreTrainedModel, config: DictConfig) -> bool:
    return config.actor_rollout_ref.model.use_fused_kernels and lm_head.unsupported_reason(model) is None


def log_prob_and_entropy(
    model: PreTrainedModel,
    batch: Batch,
    config: DictConfig,
    *,
    mask: Tensor | None = None,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the response tokens and the policy's entropies, both [B, S] float32.

    Both are of softmax(logits / temperature), the distribution of the sampling before top_p and top_k. They are 0
    outside the mask, [B, S], which is the response mask by default.
    """
    length = batch.response_mask.shape[1]
    mask = batch.response_mask if mask is None else mask
    temperature = config.actor_rollout_ref.rollout.temperature
    fused = uses_fused_head(model, config)
    scoring: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if fused:
        scoring = lm_head.scoring(model, batch.responses, mask, temperature, entropy_grad=entropy_grad)
    with autocast(model.device, config), scoring:
        logits = model(
            input_ids=batch.tokens,
            attention_mask=batch.attention_mask,
            position_ids=(batch.attention_mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            # The logits at a position predict the next token.
            logits_to_keep=length + 1,
        ).logits[:, :-1]
    if fused:
        return logits[..., 0], logits[..., 1] if entropy_grad else logits[..., 1].detach()
    return logprob_entropy(logits, batch.responses, mask=mask, temperature=temperature, entropy_grad=entropy_grad)


@torch.no_grad()
def compute_log_prob(model: PreTrainedModel, batch: Batch, config: DictConfig) -> tuple[Tensor, Tensor]:
    """`log_prob_and_entropy` of a batch, one micro-batch at a time and without gradient."""
    model.eval()
    size = (
        config.actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu
        or config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu
        or len(batch.tokens)
    )
    rows = torch.arange(len(batch.tokens), device=batch.tokens.device).split(size)
    scored = [log_prob_and_entropy(model, batch.rows(index), config) for index in progress.track(rows, "micro-batch")]
    log_prob, entropy = map(torch.cat, zip(*scored, strict=True))
    return log_prob, entropy


def update(
    model: PreTrainedModel,
    optimizer: Optimizer,
    experience: Experience,
    step: int,
    total_steps: int,
    config: DictConfig,
) -> dict[str, float]:
    """Takes the optimizer steps of a training step and returns the means of their metrics, of ends the extremes."""
    actor = config.actor_rollout_ref.actor
    model.train()
    learning_rate = actor.optim.lr * lr_factor(step - 1, total_steps, actor.optim)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate

    generator = torch.Generator().manual_seed(distributed.seed_of_rank(actor.data_loader_seed * 1_000_003 + step))
    history: dict[str, list[Tensor]] = defaultdict(list)
    for rows in progress.track(mini_batches(len(experience.advantages), generator, config), "optimizer step"):
        rows = rows.to(experience.advantages.device)
        mini_batch = experience.rows(rows)
        optimizer.zero_grad()
        metrics = accumulate_gradients(model, mini_batch, generator, config)
        grad_norm = distributed.full_norm(
            torch.nn.utils.clip_grad_norm_(model.parameters(), actor.optim.clip_grad).detach()
        )
        for name, value in (metrics | {"actor/grad_norm": grad_norm}).items():
            history[name].append(value)
        if experience.trained is not None and mini_batch.trained is not None:
            experience.trained[rows] = mini_batch.trained
        if grad_norm.isfinite():
            optimizer.step()
            continue
        cause = non_finite_cause(model, mini_batch, metrics["actor/loss"], config)
        if distributed.rank() == 0:
            print(f"step {step}: optimizer step skipped, its gradient is not finite: {cause}", file=sys.stderr)
    joins = {"min": torch.min, "max": torch.max}
    return {
        name: joins.get(name.rsplit("/")[-1], torch.mean)(torch.stack(values).double()).item()
        for name, values in history.items()
    } | {"actor/lr": learning_rate}


def non_finite_cause(model: PreTrainedModel, mini_batch: Experience, loss: Tensor, config: DictConfig) -> str:
    """Which numbers of an optimizer step are not finite, in one line. All ranks must call it: it runs the model."""
    log_prob, entropy = compute_log_prob(model, mini_batch.batch, config)
    model.train()
    numbers = {
        "advantages (check the rewards)": mini_batch.advantages,
        "log-probabilities of the old policy": mini_batch.old_log_prob,
        "entropies of the old policy": mini_batch.old_entropy,
        "log-probabilities of the reference": mini_batch.ref_log_prob,
        "log-probabilities": log_prob,
        "entropies": entropy,
    }
    mask, wrong = mini_batch.batch.response_mask, []
    tokens = int(distributed.reduce(mask.sum()))
    for name, values in numbers.items():
        count = 0 if values is None else int(distributed.reduce((~values.isfinite() & mask).sum()))
        if count:
            wrong.append(f"{name}: {count} of {tokens} tokens")
    if not wrong and loss.isfinite():
        return "the loss and what it is computed from are finite, so the backward is the cause"
    return "; ".join([*wrong, *([] if loss.isfinite() else ["loss"])])


def mini_batches(responses: int, generator: torch.Generator, config: DictConfig) -> list[Tensor]:
    """The rows of each optimizer step, in order or with actor.shuffle at random: all responses to a problem are in the
    same mini-batch.

    Each rank shuffles its own problems, so that with actor.shuffle the mini-batches depend on the number of ranks.
    """
    actor, n = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.n
    rows = torch.arange(responses).view(-1, n)
    found = []
    for _ in range(actor.ppo_epochs):
        order = torch.randperm(len(rows), generator=generator) if actor.shuffle else torch.arange(len(rows))
        groups = order.split(actor.ppo_mini_batch_size // distributed.size())
        found += [rows[group].flatten() for group in groups]
    return found


def select_before_step(
    model: PreTrainedModel,
    mini_batch: Experience,
    rows: Sequence[Tensor],
    step: StepSelection,
    seed: int,
    config: DictConfig,
) -> list[TokenSelection]:
    """One selection for the whole optimizer step; returns the part of each micro-batch."""
    if step.old_policy:
        log_prob, entropy = mini_batch.old_log_prob, mini_batch.old_entropy
    else:
        with prepass(mini_batch.old_entropy.device):
            scored = [log_prob_and_entropy(model, mini_batch.batch.rows(index), config) for index in rows]
        log_prob, entropy = map(torch.cat, zip(*scored, strict=True))
    tokens = step.select_mini_batch(
        log_prob,
        entropy,
        mini_batch.batch.response_mask,
        old_log_prob=mini_batch.old_log_prob,
        advantages=mini_batch.advantages,
        seed=seed,
        only_selected=(
            mini_batch.ref_log_prob is None
            and needs_all_tokens(config.actor_rollout_ref.actor) is None
            and uses_fused_head(model, config)
        ),
    )
    return tokens.split([len(index) for index in rows])


def accumulate_gradients(
    model: PreTrainedModel, mini_batch: Experience, generator: torch.Generator, config: DictConfig
) -> dict[str, Tensor]:
    """Gradients of the loss of one optimizer step, micro-batch by micro-batch, and its metrics over all ranks.

    Every mean divides by a count over the whole mini-batch and all ranks, so that the losses of the micro-batches add
    up. Gradients are averaged over the ranks; each loss is therefore multiplied by their number, `dp_size`.
    """
    actor, ranks, mask = config.actor_rollout_ref.actor, distributed.size(), mini_batch.batch.response_mask
    seed = int(torch.randint(2**62, (), generator=generator))  # one draw per step, however it is split
    rows = torch.arange(len(mask), device=mask.device).split(actor.ppo_micro_batch_size_per_gpu or len(mask))
    step = StepSelection(actor)
    step.count_tokens(torch.stack([mask[index].sum() for index in rows]), seed=seed)
    tokens: list[TokenSelection | None] = [None] * len(rows)
    if step.before_step:
        tokens = [*select_before_step(model, mini_batch, rows, step, seed, config)]
    aggregation = {
        "loss_agg_mode": actor.loss_agg_mode,
        "batch_num_tokens": step.response_tokens,
        "global_batch_size": len(mask) * ranks,
        "loss_scale_factor": actor.loss_scale_factor or config.data.max_response_length,
        "dp_size": ranks,
    }
    metrics: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=mask.device))
    parts = [*zip(rows, tokens, strict=True)]
    for number, (index, selected) in enumerate(progress.track(parts, "micro-batch")):
        micro = mini_batch.rows(index)
        response_mask = micro.batch.response_mask
        distributed.reduces_gradients(model, number == len(rows) - 1)
        log_prob, entropy = log_prob_and_entropy(
            model,
            micro.batch,
            config,
            mask=None if selected is None or selected.log_prob is None else selected.mask,
            entropy_grad=actor.entropy_coeff != 0,
        )
        batch = (log_prob, entropy, micro.old_log_prob, micro.advantages, response_mask)
        loss, means = step.policy_loss(number, *batch, tokens=selected, seed=seed + number, **aggregation)
        if mini_batch.trained is not None and step.trained_mask is not None:
            mini_batch.trained[index] = step.trained_mask
        if actor.policy_loss.loss_mode == "geo_mean":  # it ignores the divisors and averages over the rows it is given
            loss = loss * (len(index) / len(mask))
        sums = {"actor/pg_loss": loss.detach()}
        if actor.entropy_coeff != 0:
            bonus = aggregate(entropy, response_mask, **aggregation)
            loss = loss - actor.entropy_coeff * bonus
            sums["actor/entropy_loss"] = bonus.detach()
        if micro.ref_log_prob is not None:
            term, penalty = step.kl_loss(log_prob, micro.ref_log_prob, response_mask, **aggregation)
            loss = loss + term
            sums["actor/kl_loss"] = penalty.detach()
        loss.backward()

        sums["actor/loss"] = loss.detach()
        for name, value in ({name: value / ranks for name, value in sums.items()} | means).items():
            metrics[name] = metrics[name] + value
    reduced = distributed.reduce(torch.stack([*metrics.values()]))
    return dict(zip(metrics, reduced, strict=True)) | step.extreme_shares()


def lr_factor(step: int, total_steps: int, optim: DictConfig) -> float:
    """The factor of the learning rate at a step, counted from 0, in verl's schedules."""
    warmup = optim.lr_warmup_steps
    if warmup <= 0:
        warmup = int(optim.lr_warmup_steps_ratio * total_steps)
    if step < warmup:
        return step / warmup
    if optim.lr_scheduler_type == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    wave = math.cos(2 * math.pi * optim.num_cycles * progress)
    return max(optim.min_lr_ratio, (1 + optim.min_lr_ratio) / 2 + wave * (1 - optim.min_lr_ratio) / 2)


def autocast(device: torch.device, config: DictConfig) -> torch.autocast:
    dtype = config.actor_rollout_ref.actor.fsdp_config.dtype
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


# ---- Responses that are shown or written


def record(
    training: Training,
    experience: Experience,
    group: Sequence[Example],
    rewards: Tensor,
    step: int,
    logs: Logs,
    config: DictConfig,
) -> None:
    """Writes all responses to trainer.rollout_data_dir, and gives the logs samples and a histogram of the entropies.

    `group` has the problems of this rank's responses, and `rewards`, [B], their rewards.
    """
    trainer, tokenizer = config.trainer, training.tokenizer
    if trainer.rollout_data_dir is not None:
        rows = torch.arange(len(rewards), device=rewards.device)
        of_ranks = distributed.gather_on_first(rollouts(tokenizer, experience, group, rewards, rows, step))
        if distributed.rank() == 0:
            path = Path(trainer.rollout_data_dir).expanduser() / f"{step}.jsonl"
            write_rollouts(path, itertools.chain(*of_ranks))
    every = trainer.log_samples_freq
    if is_due(step, training.total_steps, every) or (every > 0 and step == training.first_step + 1):
        rows = rewards.argsort(stable=True)[[0, -1]].unique()  # of this rank: the lowest and the highest reward
        logs.samples(step, rollouts(tokenizer, experience, group, rewards, rows, step))
    if "tensorboard" in trainer.logger:
        histogram = entropy_histogram(experience.old_entropy, experience.batch.response_mask)
        logs.histogram(step, "actor/entropy", histogram)


def rollouts(
    tokenizer: PreTrainedTokenizerBase,
    experience: Experience,
    group: Sequence[Example],
    rewards: Tensor,
    rows: Tensor,
    step: int,
) -> list[Rollout]:
    """Some of the responses of this rank, whose problems are `group` and whose rewards are [B]."""
    chosen, experience = [group[row] for row in rows.tolist()], experience.rows(rows)
    return make_rollouts(
        tokenizer,
        [prompt for _, prompt in chosen],
        experience.batch.responses,
        experience.batch.response_mask,
        step=step,
        scores=rewards[rows],
        advantages=experience.advantages,
        entropies=experience.old_entropy,
        log_probs=experience.old_log_prob,
        selected=experience.trained,
        data_sources=[problem.data_source for problem, _ in chosen],
    )


# ---- Metrics, under verl's names


def batch_metrics(
    batch: Batch,
    rewards: Tensor,
    faults: dict[str, Tensor],
    advantage: Tensor,
    entropy: Tensor,
    config: DictConfig,
) -> dict[str, float]:
    """Metrics of the batch of a training step, over all ranks."""
    actor, mask, n = config.actor_rollout_ref.actor, batch.response_mask, config.actor_rollout_ref.rollout.n
    length = mask.sum(-1).float()
    zero_std = {}
    if n > 1:
        groups = rewards.view(-1, n)
        zero_std["critic/rewards/zero_std_ratio"] = (groups == groups[:, :1]).all(-1).float()
    values = {
        "critic/score": rewards,
        "critic/rewards": rewards,
        **zero_std,
        "critic/advantages": advantage[mask],
        "response_length": length,
        "prompt_length": batch.attention_mask.sum(-1) - length,
        "response_length/clip_ratio": (length == config.data.max_response_length).float(),
        **faults,
    }
    sums = distributed.reduce(torch.tensor([(value.double().sum(), value.numel()) for value in values.values()]))
    ends = torch.tensor([(value.max(), -value.min()) for value in values.values()])
    ends = distributed.reduce(ends, torch.distributed.ReduceOp.MAX)
    mean_entropy = aggregate(
        entropy,
        mask,
        loss_agg_mode=actor.loss_agg_mode,
        loss_scale_factor=actor.loss_scale_factor or config.data.max_response_length,
        batch_num_tokens=distributed.reduce(mask.sum()),
        global_batch_size=len(mask) * distributed.size(),
    )
    metrics = {"actor/entropy": distributed.reduce(mean_entropy).item()}
    for percent in (50, 80, 95, 99):
        _, lowest = select_tokens(entropy, mask, (100 - percent) / 100, ranks="global")
        metrics[f"actor/entropy_p{percent}"] = lowest.item()
    for name, (total, count), (highest, lowest) in zip(values, sums.tolist(), ends.tolist(), strict=True):
        if name.endswith("_ratio"):
            metrics[name] = total / count
        else:
            metrics |= {f"{name}/mean": total / count, f"{name}/max": highest, f"{name}/min": -lowest}
    return metrics


def entropy_histogram(entropy: Tensor, mask: Tensor) -> Histogram:
    """Of the finite entropies of the response tokens, [B, S], over all ranks."""
    values = entropy[mask & entropy.isfinite()].double()
    highest = distributed.reduce(values.max() if len(values) else values.sum(), torch.distributed.ReduceOp.MAX).item()
    counts = distributed.reduce(values.histc(64, 0, highest or 1.0))  # histc needs another upper end than 0
    total, squares = distributed.reduce(torch.stack([values.sum(), (values**2).sum()])).tolist()
    return Histogram(highest or 1.0, counts.tolist(), total, squares)


def nothing_to_learn(step: int, metrics: dict[str, float]) -> str:
    """The warning for a step whose advantages are all 0."""
    lowest, highest = metrics["critic/rewards/min"], metrics["critic/rewards/max"]
    return (
        f"step {step}: the policy gradient is 0, because the responses to each problem have the same reward (the "
        f"rewards are {lowest:g} to {highest:g}). A step learns from problems that some responses solve and others do "
        "not. Look at the samples, and check the prompts, the reward and data.max_response_length; "
        "critic/rewards/zero_std_ratio is the share of such problems"
    )


class Timer:
    """The seconds that each phase of a training step takes."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with progress.doing(name):
            yield
        self._seconds[name] = time.perf_counter() - start

    def metrics(self, tokens: int) -> dict[str, float]:
        step = time.perf_counter() - self._start
        return {f"timing_s/{name}": value for name, value in (self._seconds | {"step": step}).items()} | {
            "perf/total_num_tokens": tokens,
            "perf/time_per_step": step,
            "perf/throughput": tokens / step,
        }
