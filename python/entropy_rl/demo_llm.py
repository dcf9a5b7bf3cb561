"""A pretrained language model learns word problems by reinforcement learning on its highest-entropy tokens.

    python -m entropy_rl.demo_llm --model models/SmolLM2-135M-Instruct [--directory demo-llm] [--seed 0]

Writes problems as Parquet files, trains the model with `python -m entropy_rl.train`, measures it on held-out problems
before and after, and shows both models on the same responses with `entropy-rl inspect`.
"""

import sys

from entropy_rl import extras

if __name__ == "__main__":  # before the imports below, because their packages may be missing
    sys.exit(extras.run_module("entropy_rl.demo_llm"))

import argparse
import itertools
import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from entropy_rl import checkpoint, cli, config, demo, word_problems

SOURCE = "word_problems"
TRAIN_PROBLEMS = 1024
VALIDATION_PROBLEMS = 200
STEPS = 20


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m entropy_rl.demo_llm", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a directory, or a name on the hub")
    parser.add_argument("--directory", type=Path, default=Path("demo-llm"), help="directory for all results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    start, start_of_cpu = time.perf_counter(), time.process_time()

    print("1/3 Reinforcement learning on word problems")
    write_problems(directory, arguments.seed)
    overrides = training_overrides(arguments.model, directory, arguments.seed, arguments.steps)
    status = demo.train_with(overrides, directory)
    if status:
        return status

    print("2/3 The effect on problems with numbers that training has not seen")
    settings = config.load(overrides)
    limit = settings.data.max_response_length
    run = Path(settings.trainer.default_local_dir)
    trained = checkpoint.model_directory(run / f"global_step_{arguments.steps}")
    before = demo.sample_held_out(Path(arguments.model), settings)
    after = demo.sample_held_out(trained, settings)
    after.show(6)
    accuracy = demo.logged(run / "metrics.jsonl", f"val-core/{SOURCE}/reward/mean@1")
    results = {
        "seed": arguments.seed,
        "model": Path(arguments.model).name,
        "held_out_problems": VALIDATION_PROBLEMS,
        "held_out_accuracy": accuracy,
        "before": examine(before, limit),
        "after": examine(after, limit),
        "training": {
            name: demo.logged(run / "metrics.jsonl", name)
            for name in (
                "critic/rewards/mean",
                "critic/rewards/zero_std_ratio",
                "actor/entropy",
                "actor/entropy_p50",
                "actor/entropy_p80",
                "response_length/mean",
                "timing_s/gen",
                "timing_s/old_log_prob",
                "timing_s/update_actor",
                "timing_s/step",
            )
        },
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - start_of_cpu,
        "dtype": settings.actor_rollout_ref.actor.fsdp_config.dtype,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (directory / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    print("3/3 The page of both models")
    report = directory / "report.html"
    write_completions(directory / "completions.jsonl", after)
    inspect = ["inspect", "--model", str(trained), "--compare", arguments.model, "--output", str(report)]
    temperature = str(settings.actor_rollout_ref.rollout.temperature)
    status = cli.main([*inspect, "--input", str(directory / "completions.jsonl"), "--temperature", temperature])
    if status:
        return status
    print(
        f"\n{f'{VALIDATION_PROBLEMS} held-out problems':36}    before     after\n"
        f"{'solved, greedy':36}{accuracy[0]:>10.1%}{accuracy[-1]:>10.1%}\n"
        + "".join(
            f"{label:36}{results['before'][key]:>10.1%}{results['after'][key]:>10.1%}\n"
            for key, label in (("sampled_accuracy", "solved, sampled"), ("ended", "end within the limit, sampled"))
        )
        + f"\nmetrics     {run / 'metrics.jsonl'}, {run / 'tensorboard'}\n"
        f"curves      {run / 'curves.png'}\n"
        f"responses   {settings.trainer.rollout_data_dir}\n"
        f"report      {report}\n"
        f"model       {trained}\n"
        f"command     {directory / 'command.txt'}\n"
        f"{results['seconds']:.0f} s"
    )
    return 0


def write_problems(directory: Path, seed: int) -> None:
    """Writes train.parquet and val.parquet."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, count, key in (("train", TRAIN_PROBLEMS, f"train {seed}"), ("val", VALIDATION_PROBLEMS, "val")):
        drawn = word_problems.problems(random.Random(key), held_out=split == "val")
        problems = ((one.messages(), one.answer()) for one in drawn)
        demo.write_problems(directory / f"{split}.parquet", SOURCE, itertools.islice(problems, count))


def training_overrides(model: str, directory: Path, seed: int, steps: int) -> list[str]:
    """The command line of the trainer."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return [
        f"actor_rollout_ref.model.path={model}",
        f"data.train_files={directory / 'train.parquet'}",
        f"data.val_files={directory / 'val.parquet'}",
        f"reward.custom_reward_function.path={word_problems.__file__}",
        "data.max_prompt_length=64",
        "data.max_response_length=32",
        "data.train_batch_size=4",
        f"data.seed={seed}",
        f"{rollout}.n=8",
        f"{rollout}.temperature=0.7",
        f"{rollout}.seed={seed}",
        f"{actor}.entropy_top_ratio={demo.TOP_RATIO}",
        # One selection for the whole step, known before the forward: the LM head runs on the selected tokens only.
        f"{actor}.entropy_top_scope=mini_batch",
        f"{actor}.entropy_top_source=old_policy",
        f"{actor}.clip_ratio_high=0.28",
        f"{actor}.ppo_mini_batch_size=4",
        f"{actor}.ppo_micro_batch_size_per_gpu=16",
        f"{actor}.optim.lr=3e-5",
        f"{actor}.optim.weight_decay=0.0",
        f"{actor}.fsdp_config.dtype={'bfloat16' if has_bfloat16() else 'float32'}",
        f"trainer.total_training_steps={steps}",
        f"trainer.save_freq={steps}",
        "trainer.resume_mode=disable",
        f"trainer.rollout_data_dir={directory / 'rollouts'}",
        f"trainer.default_local_dir={directory / 'run'}",
    ]


def has_bfloat16() -> bool:
    """Whether the GPU, or without one the processor, multiplies in bfloat16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older versions of PyTorch do not tell what the processor has.
    capabilities: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return capabilities.get("avx512_bf16", False)


def examine(samples: demo.Samples, limit: int) -> dict[str, float]:
    """The share of solved responses and of those that end before the limit, and the mean length in tokens."""
    lengths = samples.response_mask.sum(-1).double()
    return {
        "sampled_accuracy": samples.rewards.double().mean().item(),
        "ended": (lengths < limit).double().mean().item(),
        "tokens": lengths.mean().item(),
    }


def write_completions(path: Path, samples: demo.Samples) -> None:
    """The sampled responses as an input of `entropy-rl inspect`."""
    rows = [
        {"prompt": problem.messages, "completion": "".join(texts[:length])}
        for problem, texts, length in zip(
            samples.problems, samples.texts, samples.response_mask.sum(-1).tolist(), strict=True
        )
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
