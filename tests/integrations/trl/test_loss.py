"""The loss of an optimizer step equals TRL's with TRL's rule, and otherwise a mean over the selected tokens."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

import entropy_rl.integrations.trl as integration
import two_ranks
from entropy_rl_ext import global_top_mask, linear_logprob_entropy, logprob_entropy, policy_loss
from grpo import (
    LOSS_TYPES,
    MINI_BATCH,
    assert_same_metrics,
    assert_same_step,
    largest,
    make_batch,
    make_trainer,
    optimizer_step,
    rows_of,
    spoil,
    without,
)

AS_TRL = {"entropy_top_rule": "quantile", "entropy_top_ranks": "global", "entropy_top_normalize": "response"}

# The arguments of policy_loss for a loss_type of TRL, as in docs/trl.md.
NO_DUAL_CLIP = {"loss_mode": "vanilla", "clip_ratio_c": 1e9}
AS_POLICY_LOSS = {
    "dapo": NO_DUAL_CLIP,
    "bnpo": NO_DUAL_CLIP,
    "grpo": {**NO_DUAL_CLIP, "loss_agg_mode": "seq-mean-token-mean"},
    "dr_grpo": {**NO_DUAL_CLIP, "loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 12},
    "luspo": {**NO_DUAL_CLIP, "loss_agg_mode": "seq-mean-token-sum"},
    "cispo": {"loss_mode": "cispo", "clip_ratio_low": 1.0, "clip_ratio_high": 4.0},
    "sapo": {"loss_mode": "sapo"},
}


def differs(one: Any, other: Any) -> bool:
    return any((one[1][name] - other[1][name]).abs().max() > 1e-4 for name in one[1])


# ---- TRL's own selection


@pytest.mark.parametrize("lm_head", ["selected_rows", "trl"])
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_reproduces_top_entropy_quantile(
    trainer: Callable[..., GRPOTrainer], loss_type: str, off_policy: bool, lm_head: str
) -> None:
    batch = make_batch() if off_policy else without(make_batch(), "old_per_token_logps")
    theirs = trainer(GRPOTrainer, top_entropy_quantile=0.2, loss_type=loss_type)
    ours = trainer(entropy_top_ratio=0.2, loss_type=loss_type, entropy_lm_head=lm_head, **AS_TRL)
    expected = optimizer_step(theirs, batch)
    assert max(gradient.abs().max() for gradient in expected[1].values()) > 1e-3
    tolerance = 0 if lm_head == "trl" else 1e-6
    assert_same_step(optimizer_step(ours, batch), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.1},
        {"beta": 0.1, "use_bias_correction_kl": False},
        {"delta": 1.5},
        {"off_policy_mask_threshold": 0.5},
        {"entropy_coef": 0.1},
        {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.1},
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"temperature": 0.7},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    ],
    ids=str,
)
def test_reproduces_it_beside_other_options(trainer: Callable[..., GRPOTrainer], settings: dict[str, Any]) -> None:
    batch, micro_batches = make_batch(), settings.get("gradient_accumulation_steps", 1)
    batch["tool_mask"] = (torch.arange(12) != 3).int().expand(8, 12).clone()
    batch["num_items_in_batch"] = (batch["completion_mask"] * batch["tool_mask"]).sum()
    theirs, ours = (
        trainer(GRPOTrainer, top_entropy_quantile=0.3, **settings),
        trainer(entropy_top_ratio=0.3, **AS_TRL, **settings),
    )
    for _ in range(2):  # the second uses the state that the first left in the trainer
        expected, actual = (optimizer_step(t, batch, micro_batches) for t in (theirs, ours))
        # Relative to the largest gradient, which the penalty, far from its minimum, makes 10 and more.
        scale = max(1.0, largest(expected))
        assert_same_step(actual, expected, rtol=1e-6, atol=1e-6 * scale)
        logged = {
            name: value
            for name, value in actual[2].items()
            if not name.startswith(("entropy_token_ratio", "entropy_threshold"))
        }
        assert logged == {name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in expected[2].items()}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_without_a_ratio_the_step_is_trls_bit_for_bit(trainer: Callable[..., GRPOTrainer], loss_type: str) -> None:
    settings = {"loss_type": loss_type, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    expected = optimizer_step(trainer(GRPOTrainer, **settings), make_batch(), 2)
    actual = optimizer_step(trainer(**MINI_BATCH, **settings), make_batch(), 2)
    assert_same_step(actual, expected, rtol=0, atol=0)
    assert actual[2] == expected[2]


# ---- The mean over the selected tokens


def reference_loss(
    trainer: GRPOTrainer, batch: dict[str, Tensor], normalize: str, ratio: float, **arguments: Any
) -> Any:
    """Loss and gradients from the model's logits with this package's ops, without TRL."""
    trainer.model.zero_grad()
    mask, length = batch["completion_mask"], batch["completion_ids"].shape[1]
    logits = trainer.model(
        input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        attention_mask=torch.cat([batch["prompt_mask"], mask], 1),
    ).logits[:, -length - 1 : -1]
    log_prob, entropy = logprob_entropy(logits, batch["completion_ids"], mask=mask)
    loss, _ = policy_loss(
        log_prob,
        batch["old_per_token_logps"],
        batch["advantages"][:, None].expand(-1, length),
        mask,
        entropy_mask=global_top_mask(entropy, mask, ratio),
        normalize=normalize,
        global_batch_size=len(mask),
        **arguments,
    )
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("normalize", ["selected", "response"])
@pytest.mark.parametrize("loss_type", AS_POLICY_LOSS)
def test_loss_types_are_those_of_policy_loss(
    trainer: Callable[..., GRPOTrainer], loss_type: str, normalize: str
) -> None:
    batch = make_batch()
    # In cispo TRL's epsilon_high is the bound itself; elsewhere it is the distance from 1.
    epsilon = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    ours = trainer(entropy_top_ratio=0.3, entropy_top_normalize=normalize, loss_type=loss_type, **epsilon)
    expected = reference_loss(ours, batch, normalize, 0.3, **AS_POLICY_LOSS[loss_type])
    assert_same_step(optimizer_step(ours, batch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["micro_batch", "mini_batch"])
@pytest.mark.parametrize("rule", ["topk", "threshold", "quantile"])
def test_every_selected_token_of_a_step_has_the_same_weight(
    trainer: Callable[..., GRPOTrainer], rule: str, scope: str
) -> None:
    """The loss of four micro-batches is the mean over their selected tokens."""
    settings = {"entropy_top_ratio": 0.3, "entropy_top_rule": rule, "entropy_top_scope": scope}
    settings |= {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
    batch = without(make_batch(), "old_per_token_logps")
    ours = trainer(**settings)
    masks = []
    select = ours.get_high_entropy_mask
    ours.get_high_entropy_mask = lambda *args: masks.append(select(*args)) or masks[-1]
    loss, *_ = optimizer_step(ours, batch, 4)
    selected = torch.cat(masks) > 0
    # On policy the ratio is 1, and the loss of a token is minus its advantage.
    sums = [
        (part * rows[:, None]).sum() for part, rows in zip(selected.split(2), batch["advantages"].split(2), strict=True)
    ]
    if rule == "quantile" and scope == "micro_batch":  # keeps more or fewer tokens than topk would
        tokens = batch["completion_mask"].view(4, -1).sum(1)
        counts = [max(1, int(n * 0.3 + 0.9999)) for n in tokens.tolist()]
        expected = sum(
            -s / part.sum() * count / sum(counts)
            for s, part, count in zip(sums, selected.split(2), counts, strict=True)
        )
    else:
        expected = -sum(sums) / selected.sum()
    torch.testing.assert_close(loss, expected)


def test_selected_is_response_times_their_share(trainer: Callable[..., GRPOTrainer]) -> None:
    batch = make_batch()
    selected, response = (
        optimizer_step(trainer(entropy_top_ratio=0.2, entropy_top_normalize=normalize), batch)
        for normalize in ("selected", "response")
    )
    share = response[2]["entropy_token_ratio"][0]
    assert share < 0.25
    torch.testing.assert_close(selected[0] * share, response[0], rtol=1e-5, atol=1e-6)


# ---- One selection for the optimizer step


@pytest.mark.parametrize(
    "settings",
    [
        *({"loss_type": name, "entropy_top_normalize": "selected"} for name in LOSS_TYPES),
        *({"loss_type": name, "entropy_top_normalize": "response"} for name in LOSS_TYPES),
        *({"loss_type": name, "importance_sampling_level": "sequence"} for name in LOSS_TYPES if name != "vespo"),
        *({"loss_type": name, "beta": 0.1} for name in ("dapo", "grpo", "bnpo")),
        *({"loss_type": name, "entropy_coef": 0.1} for name in ("dapo", "bnpo", "dr_grpo", "luspo")),
        {"loss_type": "grpo", "entropy_coef": 0.1, "entropy_top_normalize": "response"},
        {"loss_type": "bnpo", "beta": 0.1, "entropy_coef": 0.1, "entropy_top_rule": "quantile"},
        {"loss_type": "bnpo", "use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.1},
        {"loss_type": "bnpo", "entropy_top_ranks": "local"},
        {"entropy_top_score": "surprisal"},
        {"entropy_top_score": "random", "loss_type": "grpo"},
        *({"loss_type": name, "entropy_rest_weight": 0.3} for name in LOSS_TYPES),
        {"entropy_rest_weight": 1.0, "entropy_veto_probability": 0.2, "entropy_veto_entropy": 4.07},
        *({"loss_type": name, **two_ranks.DUAL} for name in ("dapo", "grpo", "bnpo", "dr_grpo", "luspo")),
        {"loss_type": "grpo", "token_weight": f"{two_ranks.__file__}:only_high_entropies"},
        {"loss_type": "bnpo", "delta": 1.5},
        {"loss_type": "bnpo", "off_policy_mask_threshold": 0.5},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:importance_sampling_level")
def test_a_step_does_not_depend_on_its_split(trainer: Callable[..., GRPOTrainer], settings: dict[str, Any]) -> None:
    """In one micro-batch it does not depend on the scope either: then every mean is TRL's own over a micro-batch."""
    batch = make_batch()
    batch["tool_mask"] = (torch.arange(12) != 3).int().expand(8, 12).clone()
    batch["completion_mask"][[0, 4, 5]] = (
        0  # as mask_truncated_completions does, also to a whole micro-batch of the four
    )
    batch["num_items_in_batch"] = (batch["completion_mask"] * batch["tool_mask"]).sum()
    settings = {"entropy_top_ratio": 0.3, **MINI_BATCH, **settings}
    trainers = [trainer(**settings | {"entropy_top_scope": "micro_batch"})]
    trainers += [
        trainer(gradient_accumulation_steps=n, per_device_train_batch_size=8 // n, **settings) for n in (1, 2, 4)
    ]
    for _ in range(2):  # the second uses the adaptive coefficient of the bonus that the first left
        expected, *steps = (optimizer_step(t, batch, t.args.gradient_accumulation_steps) for t in trainers)
        for step in steps:
            # Relative to the largest gradient, which the penalty, far from its minimum, makes 10 and more.
            assert_same_step(step, expected, rtol=1e-5, atol=1e-6 * max(1.0, largest(expected)))
            assert_same_metrics(step, expected)


@pytest.mark.parametrize("normalize", ["selected", "response"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_weighted_mean(trainer: Callable[..., GRPOTrainer], loss_type: str, normalize: str) -> None:
    """On policy the loss of a token is minus its advantage."""
    batch = without(make_batch(), "old_per_token_logps")
    settings = {"entropy_top_ratio": 0.3, "entropy_rest_weight": 0.2, "loss_type": loss_type}
    settings |= {"entropy_top_normalize": normalize, "token_weight": f"{two_ranks.__file__}:only_high_entropies"}
    ours = trainer(**settings, entropy_veto_probability=0.05, entropy_veto_entropy=4.07)
    seen = []
    select = ours.get_high_entropy_mask
    ours.get_high_entropy_mask = lambda entropy, *rest: (
        seen.append((entropy, ours._recorded["log_probs"])) or select(entropy, *rest)
    )
    loss, _, metrics = optimizer_step(ours, batch)
    ((entropy, log_prob),) = seen
    mask, advantages = batch["completion_mask"] != 0, batch["advantages"][:, None]
    weight = torch.where(global_top_mask(entropy, mask, 0.3), 1.0, 0.2) * mask * (entropy - 4).clamp(min=0)
    vetoed = mask & (advantages > 0) & (log_prob.exp() < 0.05) & (entropy < 4.07)
    weight = torch.where(vetoed, 0.0, weight)
    assert vetoed.any() and metrics["entropy_veto_ratio"] == [pytest.approx(float(vetoed.sum() / mask.sum()))]
    divisor = weight if normalize == "selected" else mask.float()
    losses = -weight * advantages
    by_row = losses.sum(1) / divisor.sum(1).clamp(min=1e-9)
    expected = losses.sum() / divisor.sum() if loss_type == "dapo" else by_row.mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo"])
def test_the_other_tokens_have_their_own_clip_range_and_kl_coefficient(
    trainer: Callable[..., GRPOTrainer], loss_type: str, beta: float
) -> None:
    """Loss and gradient from the model's logits in plain torch. With beta 0 only the other tokens have a penalty."""
    batch, epsilon_high = make_batch(), 3.0 if loss_type == "cispo" else 0.4
    settings = {"entropy_rest_weight": 1.0, "entropy_rest_kl_loss_coef": 0.3, "beta": beta}
    settings |= {"epsilon_high": epsilon_high, "entropy_rest_clip_ratio_high": epsilon_high / 2}
    settings |= {} if loss_type == "cispo" else {"epsilon": 0.3, "entropy_rest_clip_ratio_low": 0.1}
    ours = trainer(entropy_top_ratio=0.3, loss_type=loss_type, use_bias_correction_kl=False, **settings)
    assert ours.args.beta == beta
    mask, length, advantages = batch["completion_mask"], batch["completion_ids"].shape[1], batch["advantages"][:, None]
    logits = ours.model(
        input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        attention_mask=torch.cat([batch["prompt_mask"], mask], 1),
    ).logits[:, -length - 1 : -1]
    log_probs = logits.log_softmax(-1)
    log_prob = log_probs.gather(-1, batch["completion_ids"][..., None])[..., 0]
    chosen = global_top_mask(-(log_probs.exp() * log_probs).sum(-1).detach(), mask, 0.3)
    above, below = (torch.where(chosen, *pair) for pair in ((epsilon_high, epsilon_high / 2), (0.3, 0.1)))
    ratio = (log_prob - batch["old_per_token_logps"]).exp()
    if loss_type == "cispo":
        losses = -torch.minimum(ratio, above).detach() * advantages * log_prob
    else:
        bounded = torch.minimum(torch.maximum(ratio, 1 - below), 1 + above)
        losses = -torch.minimum(ratio * advantages, bounded * advantages)
    d = batch["ref_per_token_logps"] - log_prob
    losses = (losses + torch.where(chosen, beta, 0.3) * (d.exp() - d - 1)) * mask
    by_row = losses.sum(1) / mask.sum(1).clamp(min=1)
    expected = by_row.mean() if loss_type == "grpo" else losses.sum() / mask.sum()
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in ours.model.named_parameters()}
    ours.model.zero_grad()
    step = optimizer_step(ours, batch)
    assert_same_step(step, (expected.detach(), gradients), rtol=1e-4, atol=1e-5 * max(1.0, largest((0, gradients))))
    numbers = ours.epsilon_low, ours.epsilon_high, ours.beta
    assert all(isinstance(number, float) for number in numbers), "the trainer has its own numbers after the loss"


def test_surprisal_selects_the_least_probable_tokens(trainer: Callable[..., GRPOTrainer]) -> None:
    """On policy the loss of a token is minus its advantage, so the loss shows which tokens are selected."""
    batch = without(make_batch(), "old_per_token_logps")
    by_score = {}
    for score in ("surprisal", "entropy"):
        ours = trainer(entropy_top_ratio=0.3, entropy_top_score=score)
        loss, _, metrics = optimizer_step(ours, batch)
        by_score[score] = loss
        assert (f"{'score' if score == 'surprisal' else 'entropy'}_threshold") in metrics
    mask, length = batch["completion_mask"], batch["completion_ids"].shape[1]
    logits = ours.model(
        input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        attention_mask=torch.cat([batch["prompt_mask"], mask], 1),
    ).logits[:, -length - 1 : -1]
    surprisal = -logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0].detach()
    selected = global_top_mask(surprisal, mask, 0.3)
    torch.testing.assert_close(by_score["surprisal"], -(selected * batch["advantages"][:, None]).sum() / selected.sum())
    assert (by_score["surprisal"] - by_score["entropy"]).abs() > 1e-3


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_each_completion_has_its_own_share(trainer: Callable[..., GRPOTrainer], loss_type: str) -> None:
    """The selected tokens are each row's own top share, in training and in evaluation, for any split."""
    batch, settings = make_batch(), {"entropy_top_ratio": 0.3, "entropy_top_scope": "sequence", "loss_type": loss_type}
    steps, seen = [], []
    for n in (1, 2, 4):
        ours = trainer(gradient_accumulation_steps=n, per_device_train_batch_size=8 // n, **settings)
        select = ours.get_high_entropy_mask
        ours.get_high_entropy_mask = lambda entropy, *rest, select=select: (
            seen.append((entropy, select(entropy, *rest))) or seen[-1][1]
        )
        steps.append(optimizer_step(ours, batch, n))
    entropy, weight = seen[0]
    mask = batch["completion_mask"]
    expected = torch.stack([global_top_mask(row, inside, 0.3) for row, inside in zip(entropy, mask, strict=True)])
    assert torch.equal(weight > 0, expected)
    shares = (expected.sum(1) / mask.sum(1)).tolist()
    assert steps[0][2]["entropy_token_ratio/min"] == [pytest.approx(min(shares))]
    assert steps[0][2]["entropy_token_ratio/max"] == [pytest.approx(max(shares))]
    for step in steps[1:]:
        assert_same_step(step, steps[0], rtol=1e-5, atol=1e-6)
        assert_same_metrics(step, steps[0])


def test_metrics_of_single_tokens_do_not_depend_on_the_split(trainer: Callable[..., GRPOTrainer]) -> None:
    """With one column, TRL counts one value per sequence, masked or not."""
    batch = make_batch(completion=1)
    batch["completion_mask"][[0, 4, 5]] = 0
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    one, four = (
        optimizer_step(
            trainer(
                entropy_top_ratio=0.3, gradient_accumulation_steps=n, per_device_train_batch_size=8 // n, **MINI_BATCH
            ),
            batch,
            n,
        )
        for n in (1, 4)
    )
    assert_same_metrics(four, one)


def test_bnpo_is_over_an_optimizer_step_of_a_generation(trainer: Callable[..., GRPOTrainer]) -> None:
    """Two optimizer steps of a generation equal two generations of one step. dapo's mean is over the generation."""
    settings = {"entropy_top_ratio": 0.3, "loss_type": "bnpo", "beta": 0.1, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 2, **MINI_BATCH}
    batch = make_batch()
    actual = optimizer_step(trainer(steps_per_generation=4, **settings), batch, 4)
    halves = [optimizer_step(trainer(**settings), rows_of(batch, rows), 2) for rows in (slice(4), slice(4, 8))]
    expected = halves[0][0] + halves[1][0], {name: halves[0][1][name] + halves[1][1][name] for name in halves[0][1]}
    assert_same_step(actual, expected, rtol=1e-5, atol=1e-6 * largest(expected))


def test_a_micro_batch_step_does_depend_on_its_split(trainer: Callable[..., GRPOTrainer]) -> None:
    one, two = (
        optimizer_step(
            trainer(entropy_top_ratio=0.2, gradient_accumulation_steps=n, per_device_train_batch_size=8 // n),
            make_batch(),
            n,
        )
        for n in (1, 2)
    )
    assert differs(one, two)


def test_each_step_of_a_generation_has_its_own_selection(trainer: Callable[..., GRPOTrainer]) -> None:
    """One generation serves two optimizer steps of two micro-batches."""
    ours = trainer(
        entropy_top_ratio=0.2,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        per_device_train_batch_size=2,
        **MINI_BATCH,
    )
    masks = []
    select = ours.get_high_entropy_mask
    ours.get_high_entropy_mask = lambda *args: masks.append(select(*args) > 0) or masks[-1]
    batch = make_batch()
    optimizer_step(ours, batch, 4)
    for half, rows in zip(torch.cat(masks).split(4), batch["completion_mask"].split(4), strict=True):
        assert half.sum() == max(1, int(int(rows.sum()) * 0.2 + 0.9999))


def test_the_prepass_changes_no_random_numbers_and_no_gradients(trainer: Callable[..., GRPOTrainer]) -> None:
    """With dropout, and with autocast, which caches cast weights from one forward to the next."""
    steps = []
    for scope in ("micro_batch", "mini_batch"):
        ours = trainer(entropy_top_ratio=1.0, entropy_top_scope=scope, bf16=True)
        ours.model.model.embed_tokens.register_forward_hook(lambda _, __, out: torch.nn.functional.dropout(out, 0.3))
        torch.manual_seed(3)
        steps.append(optimizer_step(ours, make_batch()))
    assert_same_step(steps[1], steps[0], rtol=0, atol=0)
    assert max(gradient.abs().max() for gradient in steps[0][1].values()) > 1e-3


# ---- The LM head


class Heads:
    """Records how many rows each call of the head with a gradient computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        monkeypatch.setattr(integration, "linear_logprob_entropy", self)

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            self.rows.append(len(hidden) if options["mask"] is None else int(options["mask"].sum()))
        return linear_logprob_entropy(hidden, weight, targets, **options)


@pytest.mark.parametrize("scope", ["micro_batch", "mini_batch"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_both_heads_give_the_same_step(trainer: Callable[..., GRPOTrainer], loss_type: str, scope: str) -> None:
    """The head on selected rows equals TRL's, which computes every position."""
    batch = make_batch()
    batch["tool_mask"] = (torch.arange(12) != 3).int().expand(8, 12).clone()
    settings = {"entropy_top_ratio": 0.3, "entropy_top_scope": scope, "loss_type": loss_type, "temperature": 0.7}
    settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    expected, actual = (
        optimizer_step(trainer(entropy_lm_head=head, **settings), batch, 2) for head in ("trl", "selected_rows")
    )
    assert max(gradient.abs().max() for gradient in expected[1].values()) > 1e-4
    assert_same_step(actual, expected, rtol=1e-6, atol=1e-6)
    assert actual[2] == {name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in expected[2].items()}


@pytest.mark.parametrize(
    ("settings", "only_selected"),
    [
        ({}, True),
        ({"off_policy_mask_threshold": 0.5}, True),
        ({"beta": 0.1}, False),
        ({"entropy_coef": 0.1}, False),
        ({"importance_sampling_level": "sequence", "loss_type": "luspo"}, False),
        ({"entropy_top_scope": "micro_batch"}, False),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:importance_sampling_level")
def test_the_head_runs_on_selected_rows_only_if_no_others_train(
    trainer: Callable[..., GRPOTrainer],
    settings: dict[str, Any],
    only_selected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, settings = make_batch(), {"entropy_top_ratio": 0.2, "entropy_top_scope": "mini_batch"} | settings
    heads = Heads(monkeypatch)
    actual = optimizer_step(trainer(**settings), batch)
    tokens = int(batch["completion_mask"].sum())
    assert heads.rows == [max(1, int(tokens * 0.2 + 0.9999)) if only_selected else tokens]
    expected = optimizer_step(trainer(entropy_lm_head="trl", **settings), batch)
    assert_same_step(actual, expected, rtol=1e-5, atol=1e-6 * max(1.0, largest(expected)))


@pytest.mark.parametrize("change", [{"final_logit_softcapping": 3.0}, {"logit_scale": 0.25}, {"logits_scaling": 4.0}])
def test_models_that_change_their_logits_after_the_head(
    model_path: Path, tmp_path: Path, change: dict[str, float]
) -> None:
    steps = []
    for head in ("trl", "selected_rows"):
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        model.config.update(change)
        ours = make_trainer(model, tmp_path, entropy_top_ratio=0.2, entropy_lm_head=head)
        steps.append(optimizer_step(ours, make_batch()))
    assert_same_step(steps[1], steps[0], rtol=1e-5, atol=1e-6)


def test_under_zero_3_the_head_is_trls(trainer: Callable[..., GRPOTrainer], monkeypatch: pytest.MonkeyPatch) -> None:
    heads = Heads(monkeypatch)
    monkeypatch.setattr(integration, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.warns(UserWarning, match="'selected_rows', but DeepSpeed ZeRO-3 gathers the LM head"):
        ours = trainer(entropy_top_ratio=0.2)
    optimizer_step(ours, make_batch())
    assert not heads.rows


# ---- Metrics, empty batches and NaN


def test_metrics_weight_micro_batches_by_tokens(trainer: Callable[..., GRPOTrainer]) -> None:
    batch = make_batch()
    _, _, metrics = optimizer_step(
        trainer(entropy_top_ratio=0.2, gradient_accumulation_steps=4, per_device_train_batch_size=2), batch, 4
    )
    tokens = batch["completion_mask"].view(4, -1).sum(1).tolist()
    expected = sum(max(1, int(n * 0.2 + 0.9999)) for n in tokens) / sum(tokens)
    assert metrics["entropy_token_ratio"] == [pytest.approx(expected)]
    assert len(metrics["entropy_threshold"]) == 1 and 0 < metrics["entropy_threshold"][0] < math.log(97)


def test_threshold_is_the_lowest_selected_entropy(trainer: Callable[..., GRPOTrainer]) -> None:
    ours = trainer(entropy_top_ratio=0.2)
    seen = []
    select = ours.get_high_entropy_mask
    ours.get_high_entropy_mask = lambda entropy, *rest: seen.append((entropy, select(entropy, *rest))) or seen[-1][1]
    _, _, metrics = optimizer_step(ours, make_batch())
    ((entropy, weight),) = seen
    assert metrics["entropy_threshold"] == [pytest.approx(entropy[weight > 0].min().item())]


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1, "entropy_coef": 0.1, "entropy_top_normalize": "response"}])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("scope", ["micro_batch", "mini_batch"])
def test_without_completion_tokens_nothing_is_learnt(
    trainer: Callable[..., GRPOTrainer], loss_type: str, scope: str, settings: dict[str, Any]
) -> None:
    batch = make_batch()
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    batch["num_items_in_batch"] = torch.tensor(0)
    loss, gradients, metrics = optimizer_step(
        trainer(entropy_top_ratio=0.2, loss_type=loss_type, entropy_top_scope=scope, **settings), batch
    )
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())
    assert metrics["entropy_token_ratio"] == [0] and metrics["entropy_threshold"] == [0]


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("scope", ["micro_batch", "mini_batch"])
def test_nan_reaches_the_loss(trainer: Callable[..., GRPOTrainer], scope: str, everywhere: bool) -> None:
    """In TRL's trainer as in ours. The selection still keeps its share."""
    batch = make_batch()
    batch["prompt_ids"].clamp_(max=95)
    batch["completion_ids"].clamp_(max=95)
    batch["prompt_ids"][:, -1] = 96 if everywhere else batch["prompt_ids"][:, -1]
    batch["completion_ids"][0, 0] = 96
    batch["completion_mask"][0] = torch.arange(12) < 3
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    theirs, ours = (
        trainer(GRPOTrainer, top_entropy_quantile=0.2),
        trainer(entropy_top_ratio=0.2, entropy_top_scope=scope),
    )
    for some in (theirs, ours):
        spoil(some.model, 96)
        loss, _, metrics = optimizer_step(some, batch)
        assert loss.isnan()
    tokens = int(batch["num_items_in_batch"])
    assert metrics["entropy_token_ratio"] == [pytest.approx(int(tokens * 0.2 + 0.9999) / tokens)]
    (threshold,) = metrics["entropy_threshold"]
    assert threshold == math.inf if everywhere else 0 < threshold < math.log(97)
