"""Models and tokenizers in the format of Hugging Face, or a UserError that says why there is none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from entropy_rl.errors import UserError, one_line

# Loading raises whatever the parsers of the user's files raise, which is why every exception counts as a bad file.


def load_tokenizer(where: str, path: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, a directory or a name on the hub; `where` begins the message of the UserError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:
        raise UserError(f"{where}: no tokenizer can be loaded from it: {one_line(error)}") from None
    # Where the files are missing, transformers makes a tokenizer that knows its special tokens alone.
    if set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
        raise UserError(f"{where}: no tokenizer can be loaded from it: its files are missing, or hold no vocabulary")
    return tokenizer


def load_model(where: str, path: str | Path, **options: Any) -> PreTrainedModel:
    """The causal language model at `path`, otherwise as `load_tokenizer`."""
    try:
        return AutoModelForCausalLM.from_pretrained(path, **options)
    except Exception as error:
        raise _no_model(where, error) from None


def check_model(where: str, path: str | Path) -> None:
    """Whether there is a model, without loading its weights."""
    try:
        AutoConfig.from_pretrained(path)
    except Exception as error:
        raise _no_model(where, error) from None


def conversation_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False
) -> str:
    """A conversation as the model sees it: by the tokenizer's chat template, or its lines where there is none."""
    if tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in messages)
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except Exception as error:  # a template is a program, and raises what it likes
        raise UserError(f"the tokenizer's chat template refuses a conversation: {one_line(error)}") from None


def _no_model(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: no Hugging Face causal language model can be loaded from it: {one_line(error)}")
