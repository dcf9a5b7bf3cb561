"""Prompts and completions as token ids: from a JSON Lines or Parquet file, or sampled from the model."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from entropy_rl.errors import UserError, one_line
from entropy_rl.pretrained import conversation_text


@dataclass(frozen=True)
class Completion:
    """At least one token each."""

    prompt: list[int]
    tokens: list[int]


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, key: str, limit: int | None) -> list[list[int]]:
    """The prompts of a file as token ids. Raises UserError for what is not as `--help` says."""
    return [_prompt_tokens(tokenizer, _prompt_text(tokenizer, row, key, where)) for where, row in _rows(path, limit)]


def read_completions(
    path: Path, tokenizer: PreTrainedTokenizerBase, prompt_key: str, completion_key: str, limit: int | None
) -> list[Completion]:
    """The prompts and completions of a file as token ids. Raises UserError for what is not as `--help` says."""
    completions = []
    for where, row in _rows(path, limit):
        prompt = _prompt_text(tokenizer, row, prompt_key, where)
        text = _field(row, completion_key, where)
        if isinstance(text, list):
            messages = _messages(row, prompt_key, where) + _messages(row, completion_key, where)
            whole = conversation_text(tokenizer, messages)
            if not whole.startswith(prompt):
                raise UserError(f"{where}: with its chat template the prompt is not the beginning of the conversation")
            text = whole[len(prompt) :]
        if not isinstance(text, str):
            raise UserError(f"{where}: {completion_key} must be a text or a list of {{role, content}}")
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if not tokens:
            raise UserError(f"{where}: {completion_key} is empty; at least one token was expected")
        completions.append(Completion(_prompt_tokens(tokenizer, prompt), tokens))
    return completions


def has_completions(path: Path, key: str) -> bool:
    return key in next(_rows(path, 1))[1]


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
    """`samples` completions of each prompt; the end-of-text token belongs to a completion."""
    end = model.generation_config.eos_token_id
    end = end if end is not None else tokenizer.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    settings = GenerationConfig(
        do_sample=True,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends - {None}, default=0),
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
    """Each row with the words that name it in an error. At least one, or a UserError."""
    readers = {".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix not in readers:
        raise UserError(f"--input {path}: its name must end in {' or '.join(readers)}")
    if not path.is_file():
        raise UserError(f"--input {path}: there is no such file")
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
            except ValueError as error:  # UnicodeDecodeError too
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


def _field(row: dict[str, Any], key: str, where: str) -> Any:
    if row.get(key) is None:
        raise UserError(
            f"{where}: there is no '{key}'; it has {', '.join(map(repr, row)) or 'nothing'}; --prompt-key and "
            "--completion-key choose others"
        )
    return row[key]


def _messages(row: dict[str, Any], key: str, where: str) -> list[dict[str, str]]:
    messages = _field(row, key, where)
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
        or not all(isinstance(m.get("content"), str) for m in messages)
    ):
        raise UserError(f"{where}: {key} must be a text or a list of {{role, content}}")
    return messages


def _prompt_text(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], key: str, where: str) -> str:
    if isinstance(_field(row, key, where), str):
        return row[key]
    return conversation_text(tokenizer, _messages(row, key, where), add_generation_prompt=True)


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """With the beginning-of-text token that the tokenizer puts first, if it puts one, once."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    begin = tokenizer.bos_token_id
    if begin is not None and tokens[:1] != [begin] and tokenizer.encode("x")[:1] == [begin]:
        tokens = [begin, *tokens]
    if not tokens:
        raise UserError("--input: a prompt has no tokens; at least one was expected")
    return tokens
