"""Each method of docs/methods.md: loss and gradient equal the formula of its paper, written here in plain torch and
float64, however the optimizer step is split into micro-batches and ranks."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from entropy_rl import selection
from entropy_rl_ext import reference
from ranks import Ranks
from steps import SEED, configuration, make_batch, micro_batches, select

Batch = dict[str, Tensor]
ROWS, LENGTH = 6, 20
ALPHA, KAPPA = 0.4, 2.0


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def entropy_shaped_advantage(log_prob: Tensor, entropy: Tensor, advantages: Tensor, response_mask: Tensor) -> Tensor:
    """The function of docs/methods.md: the shaped advantage divided by the advantage."""
    shaping = torch.minimum(ALPHA * entropy, advantages.abs() / KAPPA)
    return 1 + torch.where(advantages == 0, 0.0, shaping / advantages)


def make_float64() -> Batch:
    batch = make_batch(rows=ROWS, length=LENGTH)
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


# ---- The papers' formulas


def clipped(batch: Batch, advantages: Tensor | None = None) -> Tensor:
    """[B, S]: -min(r A, clip(r, 0.8, 1.2) A), which for A < 0 is at most -3 A (verl's dual clip)."""
    advantages = batch["advantages"] if advantages is None else advantages
    ratio = (batch["log_prob"] - batch["old_log_prob"]).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return torch.where(advantages < 0, torch.minimum(loss, -3 * advantages), loss)


def top(values: Tensor, count: int) -> Tensor:
    """Marks the `count` largest of [n] values, the first ones where they tie."""
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[values.sort(descending=True, stable=True).indices[:count]] = True
    return mask


def share(n: int, ratio: float) -> int:
    return max(1, int(n * ratio + 0.9999))


def highest(scores: Tensor, inside: Tensor, ratio: float) -> Tensor:
    mask = torch.zeros_like(inside)
    mask[inside] = top(scores[inside], share(int(inside.sum()), ratio))
    return mask


def mean(losses: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight > 0, losses * weight, 0.0).sum() / weight.sum()


def eighty_twenty(batch: Batch) -> Tensor:
    return mean(clipped(batch), highest(batch["entropy"], batch["response_mask"], 0.2))


def the_other_eighty(batch: Batch) -> Tensor:
    inside = batch["response_mask"]
    return mean(clipped(batch), inside & ~highest(batch["entropy"], inside, 0.2))


def random_twenty(batch: Batch) -> Tensor:
    """The draw in the words of the oracle."""
    inside = batch["response_mask"]
    place = inside.flatten().cumsum(0).view_as(inside) - 1
    words = reference._splitmix64(reference._splitmix64(torch.full_like(place, SEED ^ 0x2545F4914F6CDD1D)) + place)
    return mean(clipped(batch), highest((words >> 11) & (2**53 - 1), inside, 0.2))


def twenty_of_each_response(batch: Batch) -> Tensor:
    mask = torch.stack(
        [
            highest(entropy, inside, 0.2) if inside.any() else inside
            for entropy, inside in zip(batch["entropy"], batch["response_mask"], strict=True)
        ]
    )
    return mean(clipped(batch), mask)


def attenuated(batch: Batch) -> Tensor:
    """The mean over all tokens, with the factor 0.1 on those of low entropy."""
    inside = batch["response_mask"]
    factor = torch.where(highest(batch["entropy"], inside, 0.2), 1.0, 0.1)
    return torch.where(inside, clipped(batch) * factor, 0.0).sum() / inside.sum()


def spurious_tokens_silenced(batch: Batch) -> Tensor:
    spurious = (batch["advantages"] > 0) & (batch["log_prob"].detach().exp() < 0.5) & (batch["entropy"] < 0.6)
    assert (spurious & batch["response_mask"]).sum() > 3
    return mean(clipped(batch), batch["response_mask"] & ~spurious)


def entropy_in_the_advantage(batch: Batch) -> Tensor:
    advantages, inside = batch["advantages"], batch["response_mask"]
    shaped = advantages + torch.minimum(ALPHA * batch["entropy"], advantages.abs() / KAPPA)
    return mean(clipped(batch, shaped), inside)


def dual_token_constraints(batch: Batch) -> Tensor:
    """Clip ranges of 0.5 and 0.2, and KL coefficients of 0 and 0.1, above and below the 80 % quantile of a response."""
    inside, advantages, entropy = (batch[name] for name in ("response_mask", "advantages", "entropy"))
    quantile = torch.where(inside, entropy, torch.nan).nanquantile(0.8, dim=-1, keepdim=True)
    reasoning = entropy >= quantile
    assert 0 < (reasoning & inside).sum() < (inside & ~reasoning).sum()
    clip, beta = (torch.where(reasoning, *torch.tensor(pair, dtype=torch.float64)) for pair in ([0.5, 0.2], [0.0, 0.1]))
    ratio = (batch["log_prob"] - batch["old_log_prob"]).exp()
    bounded = torch.minimum(torch.maximum(ratio, 1 - clip), 1 + clip)
    assert ((bounded != ratio) & inside & reasoning).any()  # neither range is without effect
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    loss = torch.where(advantages < 0, torch.minimum(loss, -3 * advantages), loss)
    d = reference_log_prob(batch) - batch["log_prob"]
    return torch.where(inside, loss + beta * (d.exp() - d - 1), 0.0).sum() / inside.sum()


def reference_log_prob(batch: Batch) -> Tensor:
    """[B, S]: of the policy that the KL penalty compares with."""
    return batch["old_log_prob"] - 0.2 * batch["entropy"]


class Method(NamedTuple):
    formula: Callable[[Batch], Tensor]
    settings: dict[str, Any]


METHODS = {
    "80/20": Method(eighty_twenty, {"ratio": 0.2}),
    "bottom 80": Method(the_other_eighty, {"ratio": 0.2, "complement": True}),
    "random 20": Method(random_twenty, {"ratio": 0.2, "score": "random"}),
    "LightRFT": Method(twenty_of_each_response, {"ratio": 0.2, "scope": "sequence", "ranks": "local"}),
    "EG-SPO": Method(attenuated, {"ratio": 0.2, "entropy_rest": {"weight": 0.1}, "normalize": "response"}),
    "STAPO": Method(spurious_tokens_silenced, {"ratio": 1.0, "entropy_veto": {"probability": 0.5, "entropy": 0.6}}),
    "Archer": Method(
        dual_token_constraints,
        {
            **{"ratio": 0.2, "rule": "quantile", "scope": "sequence", "ranks": "local"},
            **{"clip_ratio_low": 0.5, "clip_ratio_high": 0.5, "use_kl_loss": True, "kl_loss_coef": 0.0},
            "entropy_rest": {"weight": 1.0, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "kl_loss_coef": 0.1},
        },
    ),
    "entropy-shaped advantage": Method(
        entropy_in_the_advantage,
        {"ratio": 1.0, "token_weight": f"{Path(__file__)}:entropy_shaped_advantage", "normalize": "response"},
    ),
}


def step(settings: dict[str, Any], size: int) -> tuple[float, Tensor]:
    """The loss of this rank's micro-batches, and its gradient [B, S] for the rank's rows."""
    batch = make_float64()
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    batch = {name: value.chunk(ranks)[rank] for name, value in batch.items()}
    optimizer_step, tokens = select(configuration(**settings), batch, size)
    batch["log_prob"].requires_grad_()
    total = 0.0
    for number, (part, chosen) in enumerate(zip(micro_batches(batch, size), tokens, strict=True)):
        response_tokens = {"batch_num_tokens": optimizer_step.response_tokens}
        loss, _ = optimizer_step.policy_loss(number, **part, tokens=chosen, **response_tokens)
        if settings.get("use_kl_loss"):
            batch_of_kl = (part["log_prob"], reference_log_prob(part), part["response_mask"])
            loss = loss + optimizer_step.kl_loss(*batch_of_kl, **response_tokens)[0]
        loss.backward()
        total += loss.item()
    return total, batch["log_prob"].grad


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_those_of_the_formula(name: str, two: Ranks) -> None:
    formula, settings = METHODS[name]
    batch = make_float64()
    batch["log_prob"].requires_grad_()
    expected = formula(batch)
    expected.backward()
    gradient = batch["log_prob"].grad
    assert math.isfinite(expected.item()) and gradient.abs().max() > 1e-3
    for found in (step(settings, size) for size in (6, 3, 2, 1)):
        assert found[0] == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(found[1], gradient, rtol=1e-12, atol=1e-15)
    for size in (3, 1):
        losses, gradients = zip(*two.run(step, settings, size), strict=True)
        assert sum(losses) == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-12, atol=1e-15)


def test_methods_differ_from_each_other() -> None:
    losses = [formula(make_float64()).item() for formula, _ in METHODS.values()]
    assert len({round(loss, 6) for loss in losses}) == len(METHODS)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_weight_zero_is_eq_6_and_weight_one_the_mean_over_the_response(weight: float) -> None:
    batch = make_float64()
    expected = eighty_twenty(batch) if weight == 0 else mean(clipped(batch), batch["response_mask"])
    assert step({"ratio": 0.2, "entropy_rest": {"weight": weight}}, 2)[0] == pytest.approx(expected.item(), rel=1e-12)


def test_every_method_of_the_page_is_tested() -> None:
    """docs/methods.md names the tests by the keys of METHODS, and its function is the one that is tested."""
    page = (Path(__file__).parents[2] / "docs/methods.md").read_text()
    for name in METHODS:
        assert f"[{name}]" in page, name
    code = page.split("```python\n")[1].split("```")[0]
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    batch = make_float64()
    arguments = [batch[name] for name in ("log_prob", "entropy", "advantages", "response_mask")]
    torch.testing.assert_close(namespace["shaped"](*arguments), entropy_shaped_advantage(*arguments))


def test_the_scopes_of_the_methods_are_exact() -> None:
    assert {settings.get("scope", "mini_batch") for _, settings in METHODS.values()} <= set(selection.SCOPES)
