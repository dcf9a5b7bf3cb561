"""A tiny Qwen3 with a tokenizer of characters, saved as verl wants it, and problems for it."""

from pathlib import Path

import pandas
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz+=-?"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
REWARD = '''
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **others):
    """Share of digits in the response."""
    return sum(character.isdigit() for character in solution_str) / max(1, len(solution_str))
'''


def save_model(directory: Path) -> Path:
    """Its entropies spread from 0.5 to 3.5 nats, so that float32 and float64 select the same tokens."""
    vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def save_problems(directory: Path) -> Path:
    """directory/train.parquet in verl's format and directory/reward.py."""
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
