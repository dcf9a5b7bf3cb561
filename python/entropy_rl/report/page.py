"""Writes the page: one HTML file without external resources, with its data in compressed columns.

A column is a typed array, gzipped, in base64. Entropies keep all bits of float32, because the page selects tokens by
them as `global_top_mask` does. Log-probabilities are 16-bit multiples of LOG_PROB_STEP nats.
"""

import base64
import gzip
import json
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

LOG_PROB_STEP = 1 / 2000  # nats; 65535 steps reach a probability of 6e-15 and stand for every lower one
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


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
) -> None:
    """Writes the page for one model, or for two models measured on the same completions."""
    parts = files("entropy_rl.report")
    # A token that contains "<" could end the script element.
    data = json.dumps(_data(models, completions, tokenizer, ratio, temperature)).replace("<", "\\u003c")
    page = (parts / "page.html").read_text(encoding="utf-8")
    for name in ("page.css", "page.js"):
        page = page.replace(f"/* {name} */", (parts / name).read_text(encoding="utf-8"))
    path.write_text(page.replace('"page data"', data), encoding="utf-8")


def _data(
    models: Sequence[MeasuredModel],
    completions: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    ratio: float,
    temperature: float,
) -> dict[str, Any]:
    tokens = torch.tensor([token for completion in completions for token in completion.tokens])
    # The page numbers the tokens that it shows: a token's number is its index in their sorted list.
    used = torch.cat([tokens, *(model.measurement.top_tokens.flatten() for model in models)]).unique()
    prompts = list(dict.fromkeys(tuple(completion.prompt) for completion in completions))
    prompt_index = {prompt: index for index, prompt in enumerate(prompts)}
    return {
        "ratio": ratio,
        "temperature": temperature,
        "logProbStep": LOG_PROB_STEP,
        "vocabulary": [token_text(tokenizer, token) for token in used.tolist()],
        "prompts": [tokenizer.decode(list(prompt)) for prompt in prompts],
        "promptOf": [prompt_index[tuple(completion.prompt)] for completion in completions],
        "lengths": [len(completion.tokens) for completion in completions],
        "tokens": _column(_number_in(used, tokens)),
        "models": [
            {
                "name": model.name,
                "entropy": _column(model.measurement.entropy),
                "logProb": _column(_steps(model.measurement.log_prob)),
                "alternatives": model.measurement.top_tokens.shape[1],
                "topTokens": _column(_number_in(used, model.measurement.top_tokens)),
                "topLogProb": _column(_steps(model.measurement.top_log_prob)),
            }
            for model in models
        ],
    }


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text that a token adds after another token, or its bytes in hexadecimal if it is a part of a character."""
    before = tokenizer.decode([token])
    text = tokenizer.decode([token, token])
    # A token may lose its leading space when it is decoded alone, but not after another token.
    text = text[len(before) :] if text.startswith(before) else before
    if REPLACEMENT in text:
        return f"⟨{_hexadecimal(tokenizer.convert_ids_to_tokens(token))}⟩"
    return text


def _hexadecimal(token: str) -> str:
    """The bytes of a token like <0xE4> or of byte-level BPE, which has a printable character for each byte."""
    if token.startswith("<0x"):
        return token[3:-1].lower()
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in printable)}
    return bytes(alphabet[c] for c in token).hex(" ") if set(token) <= alphabet.keys() else token


def _number_in(used: Tensor, tokens: Tensor) -> Tensor:
    return torch.searchsorted(used, tokens).to(torch.int32)


def _steps(log_prob: Tensor) -> Tensor:
    steps = (-log_prob.double() / LOG_PROB_STEP).nan_to_num(nan=65535, posinf=65535).round().clamp(0, 65535)
    return steps.to(torch.int32).to(torch.uint16)


def _column(values: Tensor) -> str:
    return base64.b64encode(gzip.compress(values.contiguous().numpy().tobytes(), mtime=0)).decode()
