"""The responses of a training run, as JSON Lines: a file for each step, DIR/1.jsonl, and a line for each response.

The keys are those of verl's `trainer.rollout_data_dir` (input, output, score, step), and those that the page needs to
show entropies. Other keys, such as verl's `gts`, are ignored.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entropy_rl.errors import UserError, one_line
from entropy_rl.report.tokens import token_text

FLOATS = ("entropies", "log_probs")
PER_TOKEN = ("tokens", "token_ids", "selected", *FLOATS)


@dataclass(frozen=True)
class Rollout:
    """One response. Every list has one entry for each token of the response."""

    input: str  # the prompt's text
    output: str  # the response's text
    score: float | None  # its reward
    step: int  # the training step
    tokens: list[str]  # their texts; a token that is part of a character is its bytes, ⟨e6 98⟩
    token_ids: list[int] | None = None
    entropies: list[float] | None = None  # nats
    log_probs: list[float] | None = None  # nats, of the token itself
    selected: list[int] | None = None  # 1 for a token that the policy gradient uses, otherwise 0
    advantage: float | None = None
    data_source: str | None = None
    uid: str | None = None  # the same for the responses of one prompt in one step


def make_rollouts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    responses: Tensor,
    response_mask: Tensor,
    *,
    step: int,
    scores: Tensor,
    advantages: Tensor | None = None,
    entropies: Tensor | None = None,
    log_probs: Tensor | None = None,
    selected: Tensor | None = None,
    data_sources: Sequence[str] | None = None,
) -> list[Rollout]:
    """The rollouts of a batch.

    Args:
        tokenizer: the model's.
        prompts: B lists of token ids.
        responses: [B, S] token ids.
        response_mask: [B, S], nonzero = response token.
        step: the training step.
        scores: [B], the rewards.
        advantages: [B, S]; a response gets the mean of its tokens.
        entropies, log_probs: [B, S], nats.
        selected: [B, S], nonzero = the policy gradient uses the token.
        data_sources: B names.
    """
    texts, mask = _Texts(tokenizer), response_mask.bool().cpu()
    lengths = mask.sum(-1).tolist()

    def per_row(values: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(lengths) if values is None else values.detach().cpu()[mask].split(lengths)

    columns = map(per_row, (responses, advantages, entropies, log_probs, selected))
    rollouts = []
    for row, (ids, advantage, entropy, log_prob, chosen) in enumerate(zip(*columns, strict=True)):
        assert ids is not None
        rollouts.append(
            Rollout(
                input=tokenizer.decode(list(prompts[row])),
                output=tokenizer.decode(ids, skip_special_tokens=True),
                score=scores[row].item(),
                step=step,
                tokens=[texts[token] for token in ids.tolist()],
                token_ids=ids.tolist(),
                entropies=None if entropy is None else entropy.tolist(),
                log_probs=None if log_prob is None else log_prob.tolist(),
                selected=None if chosen is None else (chosen != 0).int().tolist(),
                advantage=None if advantage is None else advantage.double().mean().item(),
                data_source=None if data_sources is None else data_sources[row],
            )
        )
    return rollouts


class _Texts(dict[int, str]):
    """The text of each token, found once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        text = self[token] = token_text(self._tokenizer, token)
        return text


def write_rollouts(path: Path, rollouts: Iterable[Rollout]) -> None:
    """Writes a file of rollouts; a reader never sees a part of it.

    Entropies and log-probabilities keep all bits of float32. JSON has no NaN and no infinity: a number that is not
    finite is written as null.
    """
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8") as file:
        for rollout in rollouts:
            row = {key: value for key, value in vars(rollout).items() if value is not None}
            row |= {key: _finite(row[key]) for key in ("score", "advantage") if key in row}
            row |= {key: list(map(_finite, row[key])) for key in FLOATS if key in row}
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    os.replace(temporary, path)


def read_rollouts(directory: Path) -> list[Rollout]:
    """The rollouts of all files N.jsonl in a directory, in the order of the steps.

    A line without `tokens`, as verl writes it, is split into words. Raises UserError if a file has another form.
    """
    where = f"--rollouts {directory}"
    if not directory.is_dir():
        raise UserError(f"{where}: there is no such directory")
    paths = sorted(
        (p for p in directory.glob("*.jsonl") if re.fullmatch(r"\d+", p.stem)), key=lambda path: int(path.stem)
    )
    if not paths:
        raise UserError(f"{where}: it has no file like 1.jsonl; one for each training step was expected")
    rollouts = []
    for path in paths:
        place = f"{where}: {path.name}"
        with path.open("rb") as file:
            found = [_rollout(line, int(path.stem), f"{place}: line {i}") for i, line in enumerate(file, start=1)]
        if not any(rollout.tokens for rollout in found):
            raise UserError(f"{place}: there is no response with tokens in it")
        rollouts += found
    return rollouts


def _rollout(line: bytes, step: int, where: str) -> Rollout:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{where} is not JSON: {one_line(error)}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is a JSON {type(row).__name__}; an object was expected")
    for key in ("input", "output"):
        if not isinstance(row.get(key), str):
            raise UserError(f"{where}: {key} must be a text")
    row = {field.name: row.get(field.name) for field in fields(Rollout)}
    row["step"] = step if row["step"] is None else row["step"]
    if row["tokens"] is None:
        if any(row[key] is not None for key in PER_TOKEN):
            raise UserError(f"{where}: there is no 'tokens', the texts that the values of each token belong to")
        row["tokens"] = re.findall(r"\s*\S+|\s+\Z", row["output"])
    _check_types(row, where)
    for key in FLOATS:
        if row[key] is not None:
            row[key] = [math.nan if value is None else value for value in row[key]]
    return Rollout(**row)


def _finite(value: float) -> float | None:
    return float(f"{value:.9g}") if math.isfinite(value) else None


def _check_types(row: dict[str, Any], where: str) -> None:
    """Raises UserError for a value of another type, and for a list that is not as long as the tokens."""
    if type(row["step"]) is not int:
        raise UserError(f"{where}: step must be an integer")
    for key in ("score", "advantage"):
        if row[key] is not None and not _is_number(row[key]):
            raise UserError(f"{where}: {key} must be a finite number")
    for key in PER_TOKEN:
        values = row[key]
        if values is None:
            continue
        kind = "texts" if key == "tokens" else "numbers"
        if not isinstance(values, list) or not all(
            isinstance(v, str) if key == "tokens" else _is_number(v) or (v is None and key in FLOATS) for v in values
        ):
            raise UserError(f"{where}: {key} must be a list of {kind}")
        if len(values) != len(row["tokens"]):
            raise UserError(f"{where}: {key} has {len(values)} entries and tokens has {len(row['tokens'])}")
    if row["selected"] is not None and not set(row["selected"]) <= {0, 1}:
        raise UserError(f"{where}: selected must be a list of 0 and 1")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
