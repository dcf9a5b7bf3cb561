"""Prompts and completions as token ids: from a JSON Lines or Parquet file, or sampled from the model."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from entropy_rl.errors import UserError, check_file, one_line
from entropy_rl.pretrained import check_fits, conversation_text, end_of_text_ids, is_conversation, prompt_ids


@dataclass(frozen=True)
class Completion:
    """Token ids of a prompt and of its completion, at least one each."""

    prompt: list[int]
    tokens: list[int]


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, key: str, limit: int | None) -> list[list[int]]:
    """The prompts of a file as token ids. Raises UserError if the file does not have the form that `--help` shows."""
    return [_prompt_ids(tokenizer, row, key, where) for where, row in _rows(path, limit)]


def read_completions(
    path: Path, tokenizer: PreTrainedTokenizerBase, prompt_key: str, completion_key: str, limit: int | None
) -> list[Completion]:
    """The prompts and completions of a file as token ids. Raises UserError as `read_prompts` does."""
    completions = []
    for where, row in _rows(path, limit):
        prompt = _prompt_ids(tokenizer, row, prompt_key, where)
        text = _completion_text(tokenizer, row, prompt_key, completion_key, where)
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if not tokens:
            raise UserError(f"{where}: {completion_key} is empty; at least one token was expected")
        completions.append(Completion(prompt, tokens))
    return completions


def has_completions(path: Path, key: str, limit: int | None) -> bool:
    """Whether the rows of a file hold completions. Raises UserError if some do and others do not."""
    present, absent = None, None
    for where, row in _rows(path, limit):
        if row.get(key) is not None:
            present = present or where
        else:
            absent = absent or where
        if present and absent:
            raise UserError(
                f"{absent}: there is no '{key}', but {present.removeprefix(f'--input {path}: ')} has one; give every "
                "row one, or sample with --samples"
            )
    return present is not None


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    batch_size: int,
) -> list[Completion]:
    """`samples` completions of each prompt. A completion includes the end-of-text token that ends it."""
    ends = end_of_text_ids(model, tokenizer)
    settings = GenerationConfig(
        do_sample=True,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0),
    )
    check_fits(
        model,
        {"the tokenizer's padding token": [settings.pad_token_id], "a prompt": itertools.chain(*prompts)},
        "the longest prompt with --max-new-tokens",
        max(map(len, prompts)) + max_new_tokens,
    )
    torch.manual_seed(seed)
    wanted = [prompt for prompt in prompts for _ in range(samples)]
    completions = []
    for begin in tqdm(range(0, len(wanted), batch_size), desc="sampling", unit="batch"):
        batch = wanted[begin : begin + batch_size]
        width = max(map(len, batch))
        padded = [[settings.pad_token_id] * (width - len(prompt)) + prompt for prompt in batch]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch]
        drawn = model.generate(
            torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=settings,
        )
        for prompt, row in zip(batch, drawn[:, width:].tolist(), strict=True):
            length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            completions.append(Completion(prompt, row[:length]))
    return completions


def _rows(path: Path, limit: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each row with the words that name it in an error. Raises UserError if there is none."""
    readers = {".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix not in readers:
        raise UserError(f"--input {path}: its name must end in {' or '.join(readers)}")
    check_file(f"--input {path}", path, f"a {path.suffix} file")
    count = 0
    for count, row in enumerate(readers[path.suffix](path), start=1):
        yield row
        if count == limit:
            return
    if count == 0:
        raise UserError(f"--input {path}: the file has no rows; at least one was expected")


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"--input {path}: line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                raise UserError(f"{where} is not JSON: {one_line(error)}") from None
            if not isinstance(row, dict):
                raise UserError(f"{where} is a JSON {type(row).__name__}; an object was expected")
            yield where, row


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            for number, row in enumerate(rows):
                yield f"--input {path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"--input {path}: not a Parquet file: {one_line(error)}") from None


def _field(row: dict[str, Any], key: str, where: str) -> str | list[dict[str, str]]:
    """The text or the list of messages in a column. Raises UserError if it is neither."""
    if key not in row:
        raise UserError(
            f"{where}: there is no '{key}'; it has {', '.join(map(repr, row)) or 'nothing'}; --prompt-key and "
            "--completion-key choose others"
        )
    value = row[key]
    if isinstance(value, str):
        texts = [value]
    elif is_conversation(value):
        texts = [text for message in value for text in (message["role"], message["content"])]
    else:
        kind = "null" if value is None else "empty" if value == [] else "something else"
        raise UserError(f"{where}: {key} must be a text or a list of {{role, content}}, both texts; it is {kind}")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: {key} holds the lone surrogate {text[error.start]!r}; Unicode text was expected"
            ) from None
    return value


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], key: str, where: str) -> list[int]:
    ids = prompt_ids(tokenizer, _field(row, key, where))
    if not ids:
        raise UserError(f"{where}: {key} has no tokens; at least one was expected")
    return ids


def _completion_text(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], prompt_key: str, key: str, where: str
) -> str:
    """What follows the prompt. Messages are what the chat template adds to the prompt for them."""
    prompt, completion = _field(row, prompt_key, where), _field(row, key, where)
    if isinstance(completion, str):
        return completion
    if isinstance(prompt, str):
        raise UserError(
            f"{where}: {key} is a list of messages and {prompt_key} is a text; give both as lists of "
            "{role, content}, or both as texts"
        )
    begin = conversation_text(tokenizer, prompt, add_generation_prompt=True)
    conversation = conversation_text(tokenizer, [*prompt, *completion])
    if not conversation.startswith(begin):
        raise UserError(f"{where}: with its chat template the prompt is not the beginning of the conversation")
    return conversation[len(begin) :]
