"""A small model learns Countdown by reinforcement learning on the 20 % of its tokens that have the highest entropy.

    python -m entropy_rl.demo [--directory demo] [--seed 0]

Creates a Qwen3 with 0.4 million parameters, warms it up on traces whose arithmetic is right but which mostly miss the
target, trains it with `python -m entropy_rl.train`, and shows the effect on problems that it has never seen.
"""

import sys

from entropy_rl import extras

if __name__ == "__main__":  # before the imports below, because their packages may be missing
    sys.exit(extras.run_module("entropy_rl.demo"))

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import transformers
from omegaconf import DictConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from entropy_rl import checkpoint, config, countdown, tasks, train
from entropy_rl.report.tokens import token_text
from entropy_rl.selection import select_tokens

TOP_RATIO = 0.2
TRAIN_PROBLEMS = 16384
VALIDATION_PROBLEMS = 512
WARMUP_STEPS = 900
STEPS = 120
# The share of the warm-up's traces that reach the target. The others are correct arithmetic towards another number.
SOLVED_SHARE = 0.3
SELECTED, PLAIN = "\033[1;30;43m", "\033[0m"  # black on yellow


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m entropy_rl.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("demo"), help="directory for all results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup-steps", type=int, default=WARMUP_STEPS)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of reinforcement learning")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    start = time.perf_counter()
    # Two threads would wait for each other whenever something else keeps a core busy.
    torch.set_num_threads(1)

    print("1/3 Warm-up of a small Qwen3 on Countdown traces")
    prepare(directory, arguments.seed, arguments.warmup_steps)

    print(f"2/3 Reinforcement learning on the {TOP_RATIO:.0%} of the tokens that have the highest entropy")
    overrides = training_overrides(directory, arguments.seed, arguments.steps)
    status = train_with(overrides, directory)
    if status:
        return status

    print("3/3 The effect on problems whose numbers neither phase has seen together")
    settings = config.load(overrides)
    run = Path(settings.trainer.default_local_dir)
    trained = checkpoint.model_directory(run / f"global_step_{arguments.steps}")
    before = examine(sample_held_out(directory / "warm", settings))
    samples = sample_held_out(trained, settings)
    samples.show(6)
    after = examine(samples)
    accuracy = logged(run / "metrics.jsonl", "val-core/countdown/reward/mean@1")
    results = {
        "seed": arguments.seed,
        "held_out_accuracy": accuracy,
        "before": before,
        "after": after,
        "training_reward": logged(run / "metrics.jsonl", "critic/rewards/mean"),
        "seconds": time.perf_counter() - start,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (directory / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(
        f"\n{'':44}    before     after\n"
        f"{f'solved, of {VALIDATION_PROBLEMS} held-out problems (greedy)':44}"
        f"{accuracy[0]:>10.1%}{accuracy[-1]:>10.1%}\n"
        f"{'forks among the selected tokens':44}{before['forks_selected']:>10.1%}{after['forks_selected']:>10.1%}\n"
        f"{'forks among all response tokens':44}{before['forks_all']:>10.1%}{after['forks_all']:>10.1%}\n\n"
        f"metrics     {run / 'metrics.jsonl'}, {run / 'tensorboard'}\n"
        f"curves      {run / 'curves.png'}\n"
        f"model       {trained}\n"
        f"command     {directory / 'command.txt'}\n"
        f"{results['seconds']:.0f} s"
    )
    return 0


def prepare(directory: Path, seed: int, warmup_steps: int) -> None:
    """Writes the inputs of training: the warmed-up model in directory/warm, and the problems."""
    directory.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    tokenizer, model = make_tokenizer(), make_model()
    warm_up(model, tokenizer, warmup_steps, random.Random(f"warm-up {seed}"))
    model.save_pretrained(directory / "warm")
    tokenizer.save_pretrained(directory / "warm")
    for split, count, key in (("train", TRAIN_PROBLEMS, f"train {seed}"), ("val", VALIDATION_PROBLEMS, "val")):
        drawn = countdown.problems(random.Random(key), held_out=split == "val")
        problems = (([{"role": "user", "content": one.prompt()}], one._asdict()) for one, _ in drawn)
        write_problems(directory / f"{split}.parquet", "countdown", itertools.islice(problems, count))


def training_overrides(directory: Path, seed: int, steps: int) -> list[str]:
    """The command line of the trainer."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return [
        f"actor_rollout_ref.model.path={directory / 'warm'}",
        f"data.train_files={directory / 'train.parquet'}",
        f"data.val_files={directory / 'val.parquet'}",
        f"reward.custom_reward_function.path={countdown.__file__}",
        "data.max_prompt_length=8",
        "data.max_response_length=12",
        "data.train_batch_size=64",
        f"data.seed={seed}",
        f"{rollout}.n=8",
        f"{rollout}.seed={seed}",
        f"{actor}.entropy_top_ratio={TOP_RATIO}",
        f"{actor}.clip_ratio_high=0.28",
        f"{actor}.ppo_mini_batch_size=32",
        f"{actor}.optim.lr=5e-4",
        f"{actor}.optim.weight_decay=0.0",
        f"trainer.total_training_steps={steps}",
        f"trainer.test_freq={max(1, steps // 4)}",
        f"trainer.save_freq={steps}",
        "trainer.resume_mode=disable",
        f"trainer.default_local_dir={directory / 'run'}",
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each number, operator and mark."""
    words = ["<pad>", "<eos>", "->", ":", "=", ",", *countdown.OPERATORS]
    words += [str(number) for number in range(1, countdown.LARGEST + 1)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
        # Clean-up would remove the spaces before commas.
        clean_up_tokenization_spaces=False,
    )


def make_model() -> Qwen3ForCausalLM:
    tokenizer = make_tokenizer()
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def warm_up(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    generator: random.Random,
    batch_size: int = 64,
) -> None:
    """Trains on traces: the model learns the format and the arithmetic, and chooses mostly at random."""
    optimizers = warm_up_optimizers(model)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_factor(step, steps))
        for optimizer in optimizers
    ]
    source = countdown.problems(generator)
    end = tokenizer.eos_token
    for step in (bar := tqdm(range(steps), unit="step")):
        texts = []
        for _ in range(batch_size):
            problem, trace = next(source)
            if generator.random() > SOLVED_SHARE:
                trace = countdown.random_steps(problem.numbers, generator) or trace
            texts.append(f"{problem.prompt()} {countdown.write(trace)} {end}")
        tokens = torch.tensor(tokenizer(texts)["input_ids"])  # all of the same length
        length = countdown.response_tokens(len(problem.numbers))
        logits = model(tokens, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, -length:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


class Muon(torch.optim.Muon):
    """torch.optim.Muon in float32. That one multiplies in bfloat16, slowly where the processor has no such products.

    Source: https://kellerjordan.github.io/posts/muon/
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for matrix in group["params"]:
                momentum = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalized(
                    matrix.grad.lerp(momentum, group["momentum"]), group["ns_coefficients"], group["ns_steps"]
                )
                rows, columns = matrix.shape
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(update, alpha=group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Near the orthogonal matrix with the singular vectors of this one, by the iteration of Newton and Schulz."""
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def warm_up_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which it trains in half as many steps as AdamW, and AdamW for the rest."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    inside = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    return [
        Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, weight_decay=0.01),
    ]


def warm_up_factor(step: int, steps: int) -> float:
    """Learning rate in relation to its peak: a linear rise over 50 steps, then half a cosine down to 5 %."""
    return min(1.0, (step + 1) / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))


def write_problems(path: Path, source: str, problems: Iterable[tuple[list[dict[str, str]], Any]]) -> None:
    """A Parquet file in verl's format, of conversations with their ground truths. Its name is the split's."""
    rows = [
        {
            "data_source": source,
            "prompt": messages,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"split": path.stem, "index": index},
        }
        for index, (messages, truth) in enumerate(problems)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def train_with(overrides: list[str], directory: Path) -> int:
    """Writes the trainer's command line to directory/command.txt and runs it. Returns its exit status."""
    (directory / "command.txt").write_text(" ".join(["python -m entropy_rl.train", *overrides]) + "\n")
    return train.main(overrides)


@dataclass
class Samples:
    """Responses to the held-out problems, sampled as in training."""

    problems: list[tasks.Problem]
    texts: list[list[str]]  # of each token, [B][S]
    response_mask: Tensor  # [B, S] bool
    selected: Tensor  # [B, S] bool, the tokens that training would select
    rewards: Tensor  # [B]

    def show(self, count: int) -> None:
        """Prints the first responses, with the selected tokens in color."""
        for row, problem in enumerate(self.problems[:count]):
            marks = zip(self.texts[row], self.selected[row].tolist(), self.response_mask[row].tolist(), strict=True)
            response = "".join(colored(text) if mark else text for text, mark, inside in marks if inside)
            solved = "solved" if self.rewards[row] == 1 else "not solved"
            print(f"  {problem.messages[-1]['content']} {response}   {solved}")
        print(f"  {SELECTED}selected tokens{PLAIN}: the {TOP_RATIO:.0%} of highest entropy")


def colored(text: str) -> str:
    """The text of a token in color, without the space that a word begins with."""
    word = text.lstrip() or text
    return f"{text[: len(text) - len(word)]}{SELECTED}{word}{PLAIN}"


def sample_held_out(model_path: Path, settings: DictConfig) -> Samples:
    tokenizer = train.load_tokenizer(settings.actor_rollout_ref.model)
    model = train.load_model(settings.actor_rollout_ref.model, model_path).to(
        train.choose_device(settings.trainer.device)
    )
    _, problems, scorer = tasks.load_tasks(settings)
    examples = train.encode(tokenizer, problems, settings)
    rollout, actor = settings.actor_rollout_ref.rollout, settings.actor_rollout_ref.actor
    generator = torch.Generator(model.device).manual_seed(rollout.seed)
    batch = train.generate(model, tokenizer, [prompt for _, prompt in examples], settings, rollout, generator)
    rewards, _ = train.score(tokenizer, batch, problems, scorer)
    _, entropy = train.compute_log_prob(model, batch, settings)
    selected, _ = select_tokens(entropy, batch.response_mask, actor.entropy_top_ratio, actor.entropy_top_rule)
    texts = [[token_text(tokenizer, token) for token in row] for row in batch.responses.tolist()]
    return Samples(problems, texts, batch.response_mask, selected, rewards)


def examine(samples: Samples) -> dict[str, float]:
    """The share of forks among the selected tokens and among all tokens, and the mean reward."""
    forks = torch.tensor([countdown.forks([word.strip() for word in row]) for row in samples.texts])
    return {
        "forks_selected": forks[samples.selected.cpu()].double().mean().item(),
        "forks_all": forks[samples.response_mask.cpu()].double().mean().item(),
        "sampled_accuracy": samples.rewards.double().mean().item(),
    }


def logged(metrics: Path, name: str) -> list[float]:
    """The values of a metric in the order of the steps."""
    lines = [json.loads(line)["data"] for line in metrics.read_text().splitlines()]
    return [line[name] for line in lines if name in line]
