"""The values in the report are those of the model's own forward, for every kind of head."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from entropy_rl.errors import UserError
from entropy_rl.report import measure as measuring
from entropy_rl.report.completions import Completion
from entropy_rl.report.measure import measure
from entropy_rl_ext import reference

VOCAB = 97
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SMALL),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3),
    "gemma2": Gemma2Config(**SMALL, final_logit_softcapping=2.0),  # which a plain linear head would leave out
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),  # likewise
    "mixtral": MixtralConfig(**SMALL, num_local_experts=2),  # its forward reads more of the body's output
}


def make_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def make_completions(lengths: list[tuple[int, int]]) -> list[Completion]:
    generator = torch.Generator().manual_seed(1)

    def draw(size: int) -> list[int]:
        return torch.randint(3, VOCAB, (size,), generator=generator).tolist()

    return [Completion(draw(prompt), draw(answer)) for prompt, answer in lengths]


# One token after one token, lengths that need padding, and a completion longer than a batch of the body.
LENGTHS = [(1, 1), (5, 9), (2, 30), (7, 3), (3, 80)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_models_own_forward(name: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "BODY_TOKENS", 64)
    monkeypatch.setattr(measuring, "LOGITS_BYTES", 4 * VOCAB * 7)  # seven rows at a time
    model, completions = make_model(name), make_completions(LENGTHS)
    found = measure(model, completions, temperature=temperature)
    begin = 0
    for completion in completions:
        ids = torch.tensor([completion.prompt + completion.tokens])
        with torch.no_grad():
            logits = model(ids).logits[0, len(completion.prompt) - 1 : -1]
        end = begin + len(completion.tokens)
        log_prob, entropy = reference.logprob_entropy(logits, torch.tensor(completion.tokens), temperature=temperature)
        torch.testing.assert_close(found.log_prob[begin:end], log_prob.float(), atol=1e-4, rtol=0)
        torch.testing.assert_close(found.entropy[begin:end], entropy.float(), atol=1e-4, rtol=0)
        top = torch.log_softmax(logits.double() / temperature, -1).topk(5)
        torch.testing.assert_close(found.top_log_prob[begin:end], top.values.float(), atol=1e-4, rtol=0)
        assert (found.top_tokens[begin:end] == top.indices).float().mean() > 0.95  # near-ties may trade places
        begin = end
    assert begin == len(found.entropy)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_runs_by_itself(name: str) -> None:
    assert measuring._Head(make_model(name), [3, 4, 5])._split


def test_a_model_whose_head_cannot_run_by_itself_runs_in_one_piece() -> None:
    model, completions = make_model("qwen3"), make_completions(LENGTHS)
    expected = measure(model, completions)
    forward = model.forward

    def shifted(*arguments: Any, **options: Any) -> Any:  # what it adds depends on the token ids
        output = forward(*arguments, **options)
        output.logits = output.logits + torch.nn.functional.one_hot(options["input_ids"], VOCAB) * 3.0
        return output

    model.forward = shifted
    assert not measuring._Head(model, [3, 4, 5])._split
    assert not torch.allclose(measure(model, completions).entropy, expected.entropy)


def test_the_model_is_unmodified_afterwards() -> None:
    model, completions = make_model("qwen3"), make_completions([(3, 5)])
    ids = torch.tensor([completions[0].prompt])
    before = model(ids).logits
    measure(model, completions)
    assert torch.equal(model(ids).logits, before)


def test_logits_stay_within_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LOGITS_BYTES", 4 * VOCAB * 7)
    rows = []
    measure_rows = measuring._measure_rows
    monkeypatch.setattr(
        measuring, "_measure_rows", lambda logits, *rest: (rows.append(len(logits)), measure_rows(logits, *rest))
    )
    measure(make_model("qwen3"), make_completions(LENGTHS))
    assert max(rows) == 7 and sum(rows) == sum(answer for _, answer in LENGTHS)


def test_a_token_of_probability_zero() -> None:
    """Its log-probability is -inf. The entropy and the other values do not depend on it."""
    model = make_model("qwen3")
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([4]), -torch.inf))
    found = measure(model, [Completion([3], [4, 5])])
    assert found.log_prob[0] == -torch.inf
    assert found.entropy.isfinite().all() and found.top_log_prob.isfinite().all()


def test_tokens_and_lengths_that_the_model_does_not_have() -> None:
    with pytest.raises(UserError, match="completion: it has the id 97; the model's embedding has the ids 0 to 96"):
        measure(make_model("gpt2"), [Completion([1], [97])])
    with pytest.raises(UserError, match="has 130 tokens; the model has 128 positions"):
        measure(make_model("gpt2"), [Completion([1], [5] * 129)])
