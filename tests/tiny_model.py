"""A language model small enough to train in a test, as transformers saves it."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

WORDS = ["<pad>", "<eos>", *map(chr, range(32, 127))]
# Of every tiny model. Its weights are larger than usual: a nearly uniform policy would make all entropies equal.
SHARED = {
    "vocab_size": len(WORDS),
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def save_tiny_model(path: Path, *, tied: bool = True, positions: int = 512, heads: int = 2) -> Path:
    """Saves a Qwen3 of 20 thousand parameters with a token for each printable character."""
    config = Qwen3Config(
        **SHARED,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=16,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
    )
    return save_model_of(config, path)


def save_model_of(config: PretrainedConfig, path: Path) -> Path:
    """Saves a random model of a configuration with `SHARED`, and the tokenizer that goes with it."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto_class = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        auto_class.from_config(config).save_pretrained(path)
    return path
