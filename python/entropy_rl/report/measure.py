"""Entropy, probability and the most probable tokens at every position of the completions, in bounded memory.

The model's body runs over a few sequences at a time. Its head then runs over a few tokens at a time, because it makes
a row as long as the vocabulary for each: the logits never take more than LOGITS_BYTES.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from entropy_rl.pretrained import check_fits
from entropy_rl.report.completions import Completion
from entropy_rl_ext import logprob_entropy

LOGITS_BYTES = 256 * 2**20
BODY_TOKENS = 4096  # in the sequences that run through the body together, padding included
ALTERNATIVES = 5


@dataclass(frozen=True)
class Measurement:
    """Values for the n tokens of all completions in order, in nats, under softmax(logits / temperature)."""

    entropy: Tensor  # [n] float32, of the distribution that the token was drawn from
    log_prob: Tensor  # [n] float32, of the token itself
    top_tokens: Tensor  # [n, ALTERNATIVES] int64, the most probable first; fewer where the vocabulary is smaller
    top_log_prob: Tensor  # [n, ALTERNATIVES] float32


@torch.no_grad()
def measure(
    model: PreTrainedModel, completions: Sequence[Completion], *, temperature: float = 1.0, name: str = "model"
) -> Measurement:
    """Runs the model over the completions and shows a progress bar that counts tokens.

    Raises:
        UserError: a token id that the model does not have, or a sequence longer than its positions.
    """
    check_fits(
        model,
        {f"{name}: a prompt or completion": chain(*(c.prompt + c.tokens for c in completions))},
        f"{name}: a prompt with its completion",
        max(map(_length, completions)),
    )
    total = sum(len(completion.tokens) for completion in completions)
    starts = torch.tensor([0, *(len(completion.tokens) for completion in completions)]).cumsum(0).tolist()
    columns = min(ALTERNATIVES, model.config.get_text_config().vocab_size)
    result = Measurement(
        torch.empty(total),
        torch.empty(total),
        torch.empty(total, columns, dtype=torch.int64),
        torch.empty(total, columns),
    )
    head = _Head(model, completions[0].prompt)
    with tqdm(total=total, desc=f"measuring {name}", unit="token", unit_scale=True) as bar:
        for batch in _batches(completions):
            tokens, rows, targets, places = [], [], [], []
            width = max(_length(completions[i]) for i in batch)
            for row, i in enumerate(batch):
                prompt, answer = completions[i].prompt, completions[i].tokens
                # Padding comes last, where a causal model does not see it.
                tokens.append(prompt + answer + [0] * (width - len(prompt) - len(answer)))
                rows.append(torch.arange(len(answer)) + row * width + len(prompt) - 1)
                targets += answer
                places.append(torch.arange(starts[i], starts[i + 1]))
            ids = torch.tensor(tokens, device=model.device)
            kept, target, place = torch.cat(rows), torch.tensor(targets, device=model.device), torch.cat(places)
            body = head.run_body(ids, kept.to(model.device))
            size = max(1, LOGITS_BYTES // (4 * model.config.get_text_config().vocab_size))
            for begin in range(0, len(kept), size):
                part = slice(begin, begin + size)
                _measure_rows(head.logits(body, part), target[part], temperature, result, place[part])
                bar.update(len(place[part]))
    return result


def _measure_rows(logits: Tensor, targets: Tensor, temperature: float, result: Measurement, place: Tensor) -> None:
    """logits [R, V], targets [R]. One pass gives the entropy, another the most probable tokens."""
    top, top_tokens = logits.topk(result.top_tokens.shape[1], dim=-1)
    chosen = logits.gather(-1, targets[:, None])
    # The other log-probabilities follow from the first one: they differ from it as the logits do, over the temperature.
    first_log_prob, entropy = logprob_entropy(logits, top_tokens[:, 0], temperature=temperature)
    dtype = first_log_prob.dtype

    def log_prob(values: Tensor) -> Tensor:  # [R, K]
        return first_log_prob[:, None] + (values.to(dtype) - top[:, :1].to(dtype)) / temperature

    result.entropy[place] = entropy.float().cpu()
    result.log_prob[place] = log_prob(chosen)[:, 0].float().cpu()
    result.top_tokens[place] = top_tokens.cpu()
    result.top_log_prob[place] = log_prob(top).float().cpu()


class _Head:
    """Runs what a model does after its body, on chosen rows.

    It calls the model's own forward with the body replaced by its output, so that whatever follows the body (such as
    scaling or soft-capping of the logits) is included. If the forward does not begin with the body, the model runs
    in one piece.
    """

    def __init__(self, model: PreTrainedModel, probe: Sequence[int]) -> None:
        self._model = model
        self._split = model.base_model is not model
        if self._split:
            ids = torch.tensor([list(probe[:8])], device=model.device)
            expected = model(input_ids=ids, use_cache=False).logits
            rows = torch.arange(ids.shape[1], device=model.device)
            try:
                parts = self.logits(self.run_body(ids, rows), slice(None))
                self._split = torch.allclose(parts, expected[0], rtol=1e-2, atol=1e-2, equal_nan=True)
            except (AttributeError, KeyError, RuntimeError, TypeError):
                self._split = False

    def run_body(self, ids: Tensor, rows: Tensor) -> Any:
        """ids [B, S] -> what `logits` needs for the rows, which are flat indices into B * S."""
        if not self._split:
            return self._model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[rows]
        output = self._model.base_model(input_ids=ids, use_cache=False, return_dict=True)
        return type(output)(**{**output, "last_hidden_state": output.last_hidden_state.flatten(0, 1)[None, rows]})

    def logits(self, body: Any, part: slice) -> Tensor:
        """[R, V], the logits of a part of the rows."""
        if not self._split:
            return body[part]
        hidden = body.last_hidden_state[:, part]
        with _forward_replaced(self._model.base_model, type(body)(**{**body, "last_hidden_state": hidden})):
            ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            return self._model(input_ids=ids, use_cache=False).logits[0]


@contextmanager
def _forward_replaced(module: torch.nn.Module, output: Any) -> Any:
    own = module.__dict__.get("forward")
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _length(completion: Completion) -> int:
    return len(completion.prompt) + len(completion.tokens)


def _batches(completions: Sequence[Completion]) -> list[list[int]]:
    """Indices of completions of similar length, at most BODY_TOKENS tokens together unless one alone has more."""
    batches: list[list[int]] = []
    for i in sorted(range(len(completions)), key=lambda i: -_length(completions[i])):
        if batches and (len(batches[-1]) + 1) * _length(completions[batches[-1][0]]) <= BODY_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
