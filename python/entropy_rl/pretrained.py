"""Models and tokenizers in Hugging Face's format, and the token ids that the trainer and `inspect` share."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from entropy_rl.errors import UserError, one_line

Messages = Sequence[dict[str, str]]  # role and content

# Loading raises whatever the parsers of the user's files raise, so every exception counts as a bad file.


def load_tokenizer(
    where: str, path: str | Path, *, trust_remote_code: bool = False, **options: Any
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer at `path`, a directory or a name on the hub.

    Raises:
        UserError: the tokenizer cannot be loaded; the message begins with `where`.
    """
    try:
        # transformers asks at the terminal where trust_remote_code is not given.
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    except Exception as error:
        raise _cannot_load(where, path, "tokenizer", error) from None
    # Where the files are missing, transformers makes a tokenizer that knows its special tokens alone.
    if set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
        raise UserError(f"{where}: no tokenizer can be loaded from it: its files are missing, or hold no vocabulary")
    return tokenizer


def load_model(where: str, path: str | Path, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """Loads the causal language model at `path`; otherwise the same as `load_tokenizer`."""
    try:
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    except Exception as error:
        raise _cannot_load(where, path, "Hugging Face causal language model", error) from None


def check_model(where: str, path: str | Path, *, trust_remote_code: bool = False) -> None:
    """Raises UserError if there is no model at `path`. Does not load its weights."""
    try:
        AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _cannot_load(where, path, "Hugging Face causal language model", error) from None


def end_of_text_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response, in ascending order: the tokenizer's, and those of the generation configuration."""
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({end for end in (tokenizer.eos_token_id, *ids) if end is not None})


def conversation_text(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool = False
) -> str:
    """The text of a conversation: from the tokenizer's chat template, or without one the contents, a line each."""
    if tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in messages)
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except Exception as error:  # a template is a program and can raise anything
        raise UserError(f"the tokenizer's chat template refuses a conversation: {one_line(error)}") from None


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> list[int]:
    """Token ids of a prompt, which is a text or a list of messages.

    A chat template writes the special tokens itself. Every other prompt begins with the beginning-of-text token if
    the tokenizer puts one first, also where the text already begins with it: the token comes once.
    """
    if not isinstance(prompt, str) and tokenizer.chat_template is not None:
        text = conversation_text(tokenizer, prompt, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)
    text = prompt if isinstance(prompt, str) else conversation_text(tokenizer, prompt)
    ids = tokenizer.encode(text, add_special_tokens=False)
    begin = tokenizer.bos_token_id
    if begin is not None and ids[:1] != [begin] and tokenizer.encode("x")[:1] == [begin]:
        return [begin, *ids]
    return ids


def is_conversation(value: Any) -> bool:
    """Whether `value` is a list of at least one message with the texts `role` and `content`."""
    return (
        isinstance(value, list)
        and value != []
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
        and all(isinstance(m.get("content"), str) for m in value)
    )


def check_fits(model: PreTrainedModel, ids: Mapping[str, Iterable[int]], what: str, length: int) -> None:
    """Checks that the model has all token ids and as many positions as the longest sequence.

    Args:
        model: the model.
        ids: token ids under the words that name them in an error.
        what: the words that name the longest sequence.
        length: its number of tokens.

    Raises:
        UserError: an id outside the embedding, or more tokens than positions.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    for name, values in ids.items():
        outside = next((value for value in values if not 0 <= value < rows), None)
        if outside is not None:
            raise UserError(f"{name}: it has the id {outside}; the model's embedding has the ids 0 to {rows - 1}")
    positions = _positions(model)
    if positions is not None and length > positions:
        raise UserError(f"{what}: it has {length} tokens; the model has {positions} positions")


def _positions(model: PreTrainedModel) -> int | None:
    """The longest sequence of a model, with scaled rotary embeddings included; None where nothing limits it."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    # Some models have parameters for each kind of layer.
    scaled = [
        entry.get("original_max_position_embeddings", positions) * entry["factor"]
        for entry in (rope, *rope.values())
        if isinstance(entry, dict) and isinstance(entry.get("factor"), int | float)
    ]
    return int(max([positions, *scaled]))


def _cannot_load(where: str, path: str | Path, what: str, error: Exception) -> UserError:
    message = f"{where}: no {what} can be loaded from it"
    if Path(path).is_dir():
        return UserError(f"{message}: {one_line(error)}")
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)) is None:  # not a name on the hub
        return UserError(f"{message}: there is no such directory")
    return UserError(f"{message}: there is no such directory, and the hub does not give it: {one_line(error)}")
