"""Writes the page: one HTML file without external resources, with its data in compressed columns.

A column is a typed array, gzipped, in base64. Entropies keep all bits of float32, because the page selects tokens by
them as `global_top_mask` does. Log-probabilities are 16-bit multiples of LOG_PROB_STEP nats.
"""

import base64
import gzip
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entropy_rl.report.completions import Completion
from entropy_rl.report.measure import Measurement
from entropy_rl.report.rollouts import Rollout
from entropy_rl.report.tokens import token_text

LOG_PROB_STEP = 1 / 2000  # nats; 65535 steps reach a probability of 6e-15 and stand for every lower one

# How the common chat templates begin a user's message, and what can follow it. The last form of each is that of a
# text without special tokens, as verl writes its prompts.
USER_TURN = re.compile(
    r"<\|(?:im_start|start)\|>user(?:<\|message\|>)?|<\|start_header_id\|>user<\|end_header_id\|>"
    r"|<start_of_turn>user|<\|user\|>|<\uff5cuser\uff5c>|\[INST\]|^user$",
    re.IGNORECASE | re.MULTILINE,
)
TURN_END = re.compile(
    r"<\|[a-z_]+\|>|<end_of_turn>|<\uff5c[^\uff5c<>]+\uff5c>|\[/INST\]|</s>|^(?:assistant|model)$|assistant\s*\Z",
    re.MULTILINE,
)


@dataclass(frozen=True)
class MeasuredModel:
    name: str
    measurement: Measurement


def write_page(
    path: Path,
    models: Sequence[MeasuredModel],
    completions: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    *,
    ratio: float = 0.2,
    temperature: float = 1.0,
    sampling_temperature: float | None = None,
    title: str | None = None,
) -> None:
    """Writes the page for one model, or for two models measured on the same completions.

    Args:
        path: the file to write.
        models: one or two models with their measurements.
        completions: the completions that were measured.
        tokenizer: the models' tokenizer.
        ratio: the share of the tokens that the page selects first.
        temperature: the temperature of the measurements.
        sampling_temperature: the temperature that the completions were sampled at; None if it is not known.
        title: the page's title. None: the models' names.
    """
    tokens = torch.tensor([token for completion in completions for token in completion.tokens])
    # The page numbers the tokens that it shows: a token's number is its index in their sorted list.
    used = torch.cat([tokens, *(model.measurement.top_tokens.flatten() for model in models)]).unique()
    prompts = list(dict.fromkeys(tuple(completion.prompt) for completion in completions))
    prompt_index = {prompt: index for index, prompt in enumerate(prompts)}
    lengths = [len(completion.tokens) for completion in completions]
    names = [model.name for model in models]
    step = {
        "step": None,
        "promptOf": [prompt_index[tuple(completion.prompt)] for completion in completions],
        "lengths": lengths,
        "tokens": _column(_number_in(used, tokens)),
        "scores": None,
        "advantages": None,
        "selected": None,
        "meanEntropy": _means(models[0].measurement.entropy, lengths),
        "models": [
            {
                "entropy": _column(model.measurement.entropy),
                "logProb": _column(_steps(model.measurement.log_prob)),
                "alternatives": model.measurement.top_tokens.shape[1],
                "topTokens": _column(_number_in(used, model.measurement.top_tokens)),
                "topLogProb": _column(_steps(model.measurement.top_log_prob)),
            }
            for model in models
        ],
    }
    _write(
        path,
        title=title or " and ".join(names),
        names=[title] if title and len(names) == 1 else names,
        ratio=ratio,
        temperature=temperature,
        sampledAt=sampling_temperature,
        scale=_scale(models[0].measurement.entropy),
        vocabulary=[token_text(tokenizer, token) for token in used.tolist()],
        prompts=[tokenizer.decode(list(prompt)) for prompt in prompts],
        steps=[step],
    )


def write_rollout_page(path: Path, rollouts: Sequence[Rollout], *, title: str, ratio: float = 0.2) -> None:
    """Writes the page for the responses of a training run, with a slider over its steps.

    Responses without entropies are shown without shades. A step whose rollouts all have `selected` shows the tokens
    that the trainer selected.
    """
    words = {word: i for i, word in enumerate(dict.fromkeys(w for rollout in rollouts for w in rollout.tokens))}
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(rollout.input for rollout in rollouts))}
    by_step: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        by_step.setdefault(rollout.step, []).append(rollout)
    measured = [e for rollout in rollouts for e in rollout.entropies or ()]
    _write(
        path,
        title=title,
        names=[title],
        ratio=ratio,
        temperature=None,
        sampledAt=None,
        scale=_scale(torch.tensor(measured)),
        vocabulary=list(words),
        prompts=list(prompts),
        steps=[_rollout_step(step, by_step[step], words, prompts) for step in sorted(by_step)],
    )


def _rollout_step(
    step: int, rollouts: Sequence[Rollout], words: dict[str, int], prompts: dict[str, int]
) -> dict[str, Any]:
    def column(name: str, dtype: torch.dtype) -> Tensor | None:
        """The values of all tokens of the step, or None unless every rollout has them."""
        values = [getattr(rollout, name) for rollout in rollouts]
        return None if None in values else torch.tensor([v for value in values for v in value], dtype=dtype)

    entropy, log_prob = column("entropies", torch.float32), column("log_probs", torch.float32)
    selected = column("selected", torch.uint8)
    lengths = [len(rollout.tokens) for rollout in rollouts]
    scores = [rollout.score for rollout in rollouts]
    tokens = torch.tensor([words[word] for rollout in rollouts for word in rollout.tokens], dtype=torch.int32)
    return {
        "step": step,
        "promptOf": [prompts[rollout.input] for rollout in rollouts],
        "lengths": lengths,
        "tokens": _column(tokens),
        "scores": None if None in scores else scores,
        "advantages": [rollout.advantage for rollout in rollouts],
        "selected": None if selected is None else _column(selected),
        "meanEntropy": [0.0] * len(rollouts) if entropy is None else _means(entropy, lengths),
        "models": [
            {
                "entropy": None if entropy is None else _column(entropy),
                "logProb": None if log_prob is None else _column(_steps(log_prob)),
                "alternatives": 0,
                "topTokens": None,
                "topLogProb": None,
            }
        ],
    }


def _write(path: Path, *, prompts: Sequence[str], **data: Any) -> None:
    parts = files("entropy_rl.report")
    data |= {
        "logProbStep": LOG_PROB_STEP,
        "prompts": prompts,
        "questions": [last_user_message(prompt) for prompt in prompts],
    }
    page = (parts / "page.html").read_text(encoding="utf-8")
    for name in ("page.css", "page.js"):
        page = page.replace(f"/* {name} */", (parts / name).read_text(encoding="utf-8"))
    # A token that contains "<" could end the script element.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    path.write_text(page.replace('"page data"', text), encoding="utf-8")


def last_user_message(prompt: str) -> str:
    """The last user message of a prompt's text in the form of a common chat template; otherwise the whole text."""
    turns = list(USER_TURN.finditer(prompt))
    message = TURN_END.split(prompt[turns[-1].end() :], maxsplit=1)[0] if turns else prompt
    return message.strip()


def _scale(entropy: Tensor) -> float:
    """The entropy that gets the strongest shade: the 99th percentile."""
    finite = entropy[entropy.isfinite()]
    if len(finite) == 0:
        return 0.0
    return float(finite.sort(descending=True).values[int(len(finite) * 0.01)])


def _means(entropy: Tensor, lengths: Sequence[int]) -> list[float | None]:
    means = [float(part.mean()) for part in entropy.split(list(lengths))]
    return [round(mean, 4) if math.isfinite(mean) else None for mean in means]


def _number_in(used: Tensor, tokens: Tensor) -> Tensor:
    return torch.searchsorted(used, tokens).to(torch.int32)


def _steps(log_prob: Tensor) -> Tensor:
    steps = (-log_prob.double() / LOG_PROB_STEP).nan_to_num(nan=65535, posinf=65535).round().clamp(0, 65535)
    return steps.to(torch.int32).to(torch.uint16)


def _column(values: Tensor) -> str:
    return base64.b64encode(gzip.compress(values.contiguous().numpy().tobytes(), 6, mtime=0)).decode()
