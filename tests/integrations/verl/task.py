"""A tiny model with a chat template, problems and a reward, for tests of `verl.trainer.main_ppo`."""

from pathlib import Path

import pandas
from transformers import AutoTokenizer, PretrainedConfig

from tiny_model import save_model_of, save_tiny_model

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
REWARD = '''
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **others):
    """Share of digits in the response."""
    return sum(character.isdigit() for character in solution_str) / max(1, len(solution_str))
'''


def save_model(directory: Path, *, tied: bool = True, heads: int = 2, config: PretrainedConfig | None = None) -> Path:
    """Saves the tiny Qwen3, or a model of another configuration."""
    if config is None:
        save_tiny_model(directory, tied=tied, heads=heads)
    else:
        save_model_of(config, directory)
    # verl looks up the id of <|im_end|> in a Qwen3 tokenizer, and gets that of the unknown token.
    tokenizer = AutoTokenizer.from_pretrained(directory, unk_token="?")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def save_problems(directory: Path) -> Path:
    """Writes directory/train.parquet in verl's format and directory/reward.py."""
    directory.mkdir(exist_ok=True)
    (directory / "reward.py").write_text(REWARD)
    pandas.DataFrame(
        {
            "data_source": "digits",
            "prompt": [{"role": "user", "content": f"{number}+{number + 1}="}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * number + 1)},
            "extra_info": {"index": number},
        }
        for number in range(32)
    ).to_parquet(directory / "train.parquet")
    return directory
