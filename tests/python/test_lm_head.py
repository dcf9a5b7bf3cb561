"""The LM head inside the model's forward: its results, that it is restored, and the models it does not support."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import Gemma2Config, Gemma2ForCausalLM

from entropy_rl import config as configuration
from entropy_rl import lm_head, train
from ranks import Ranks
from training import as_arguments


@pytest.fixture
def config(config: Any) -> Any:
    config.actor_rollout_ref.rollout.temperature = 0.8
    return config


@pytest.fixture
def model(config: Any) -> Any:
    return train.load_model(config.actor_rollout_ref.model, config.actor_rollout_ref.model.path)


def make_batch() -> train.Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 90, (3, 10), generator=generator)
    attention_mask = torch.ones_like(tokens)
    attention_mask[0, :2] = 0
    response_mask = torch.arange(6) < torch.tensor([[6], [3], [1]])
    attention_mask[:, 4:] = response_mask
    return train.Batch(tokens, attention_mask, response_mask)


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_plain_head(model: Any, config: Any, entropy_grad: bool, tied: bool) -> None:
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    plain, batch = copy.deepcopy(model), make_batch()
    results = []
    for fused, which in ((True, model), (False, plain)):
        config.actor_rollout_ref.model.use_fused_kernels = fused
        log_prob, entropy = train.log_prob_and_entropy(which, batch, config, entropy_grad=entropy_grad)
        assert entropy.requires_grad == entropy_grad
        (log_prob * (entropy.detach() > entropy.detach().median())).sum().backward()
        if entropy_grad:
            train.log_prob_and_entropy(which, batch, config, entropy_grad=True)[1].sum().backward()
        results.append((log_prob, entropy))
    for fused, expected in zip(*results, strict=True):
        torch.testing.assert_close(fused, expected, atol=1e-5, rtol=1e-5)
        assert (fused[~batch.response_mask] == 0).all()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_the_logits_are_never_made(model: Any, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lm_head.unsupported_reason(model) is None
    calls = []
    monkeypatch.setattr(
        nn.Linear, "forward", lambda self, x: calls.append(self) or nn.functional.linear(x, self.weight)
    )
    lm_head._reasons[model] = None  # stored before the patch: the patched Linear.forward would be refused
    train.log_prob_and_entropy(model, make_batch(), config)
    assert calls and model.get_output_embeddings() not in calls


def test_the_head_is_restored(model: Any, config: Any) -> None:
    head = model.get_output_embeddings()
    batch = make_batch()
    train.log_prob_and_entropy(model, batch, config)
    assert "forward" not in vars(head)
    batch.tokens[0, 9] = 10**6  # outside the vocabulary: the embedding raises
    with pytest.raises(IndexError):
        train.log_prob_and_entropy(model, batch, config)
    assert "forward" not in vars(head)
    assert model(input_ids=batch.tokens[1:]).logits.shape == (2, 10, head.weight.shape[0])


def test_a_head_with_its_own_forward_is_not_replaced(model: Any, config: Any) -> None:
    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model.get_output_embeddings().__class__ = Adapted
    assert "Adapted with its own forward" in lm_head.unsupported_reason(model)
    log_prob, _ = train.log_prob_and_entropy(model, make_batch(), config)
    assert log_prob.isfinite().all()


def test_the_head_of_a_model_that_soft_caps_its_logits_is_not_replaced() -> None:
    settings = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    model = Gemma2ForCausalLM(Gemma2Config(**settings, num_key_value_heads=1, head_dim=16))
    assert "soft-cap" in lm_head.unsupported_reason(model)


def distributed_gradients(path: str, settings: dict[str, Any], strategy: str) -> dict[str, torch.Tensor]:
    """The gradients of one backward on a rank, under DDP or FSDP2. Every rank has the same batch."""
    config = configuration.load(as_arguments(settings))
    model = train.load_model(config.actor_rollout_ref.model, path)
    if strategy == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        # The trainer reads this attribute of a model.
        wrapped.device = model.device
    else:
        wrapped = model
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    assert lm_head.unsupported_reason(wrapped) is None
    log_prob, entropy = train.log_prob_and_entropy(wrapped, make_batch(), config)
    (log_prob * (entropy > 2)).sum().backward()
    return {
        name: getattr(p.grad, "full_tensor", lambda grad=p.grad: grad)().detach().clone()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_hooks_of_ddp_and_fsdp2_run(
    strategy: str, model: Any, config: Any, overrides: dict[str, Any], tmp_path: Any
) -> None:
    log_prob, entropy = train.log_prob_and_entropy(model, make_batch(), config)
    (log_prob * (entropy > 2)).sum().backward()
    settings = overrides | {"actor_rollout_ref.rollout.temperature": 0.8}
    ranks = Ranks(2, tmp_path)
    try:
        results = ranks.run(distributed_gradients, str(overrides["actor_rollout_ref.model.path"]), settings, strategy)
    finally:
        ranks.close()
    for gradients in results:  # each is the mean of two equal gradients
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-5)


def test_the_run_says_why_the_head_is_not_replaced(
    overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lm_head, "_find_reason", lambda model: "it is a test")
    assert train.main(as_arguments(overrides)) == 0
    shown = capsys.readouterr().out
    assert "use_fused_kernels=true has no effect for this model: it is a test; its logits are kept in memory" in shown


def test_a_run_with_and_without_the_replaced_head(overrides: dict[str, Any], run: Any, tmp_path: Any) -> None:
    lines = []
    for fused in ("true", "false"):
        changes = {
            "actor_rollout_ref.model.use_fused_kernels": fused,
            "trainer.default_local_dir": tmp_path / fused,
            "trainer.total_training_steps": 2,
        }
        lines.append(run(changes)[0]["data"])
    for name in (
        "actor/loss",
        "actor/entropy",
        "actor/entropy_threshold",
        "actor/grad_norm",
        "actor/entropy_token_ratio",
    ):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-3, abs=1e-5), name
