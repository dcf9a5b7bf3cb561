"""GRPO by TRL on the 20 % of the tokens with the highest entropy, on a generated task of reasoning-gym.

    accelerate launch recipe/entropy_token_rule/trl_entropy_top20.py \
        --model_name_or_path path/to/model --output_dir run --task chain_sum --max_steps 100

The options are those below, TRL's, and entropy_top_*; --help lists all. docs/trl.md explains them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import reasoning_gym
from datasets import Dataset
from reasoning_gym.utils import SYSTEM_PROMPTS, extract_answer
from transformers import AutoTokenizer
from trl import TrlParser

from entropy_rl.integrations.trl import EntropyGRPOConfig, EntropyGRPOTrainer

# The paper's settings where TRL's defaults differ.
DEFAULTS = {"entropy_top_ratio": 0.2, "epsilon_high": 0.28}


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "A causal language model: a directory, or a name on the hub."})
    task: str = field(default="chain_sum", metadata={"help": "A task of reasoning-gym by its name."})
    task_size: int = field(default=10_000, metadata={"help": "How many problems to generate."})
    task_seed: int = field(default=0, metadata={"help": "Seed of the problems."})
    system_prompt: str = field(
        default="default",
        metadata={
            "help": "Which of reasoning-gym's system prompts tells the model how to answer; none: no such prompt."
        },
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = TrlParser((Arguments, EntropyGRPOConfig))
    parser.set_defaults(**DEFAULTS)
    options, config = parser.parse_args_and_config(arguments)

    task = reasoning_gym.create_dataset(options.task, size=options.task_size, seed=options.task_seed)
    problems = list(task)
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    instruction = None if options.system_prompt == "none" else SYSTEM_PROMPTS[options.system_prompt]

    def prompt(question: str) -> Any:
        messages = [{"role": "user", "content": question}]
        if instruction:
            messages.insert(0, {"role": "system", "content": instruction})
        # A base model has no template for a conversation.
        return messages if tokenizer.chat_template else "\n".join(message["content"] for message in messages) + "\n"

    def score(completions: list[Any], index: list[int], **_: Any) -> list[float]:
        rewards = []
        for completion, number in zip(completions, index, strict=True):
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            answer = extract_answer(text) if instruction else text.strip()
            rewards.append(float(task.score_answer(answer, problems[number])))
        return rewards

    trainer = EntropyGRPOTrainer(
        model=options.model_name_or_path,
        reward_funcs=score,
        args=config,
        train_dataset=Dataset.from_list(
            [{"prompt": prompt(problem["question"]), "index": number} for number, problem in enumerate(problems)]
        ),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    # PyTorch aborts now and then where a process ends while gloo's threads still hold tensors.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
